"""Scoring with another model than the one in training: the check that it reads the same tokens, and its short life."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .options import STMOptions
from .sharding import loaded_whole


def check_same_tokens(reference: str, reference_kwargs: dict[str, Any], tokenizer: Any, token_ids: np.ndarray) -> None:
    """Check that every token id in the data means the same to a reference model as to the model in training.

    Args:
        reference: Path or id of the reference model.
        reference_kwargs: Keyword arguments it is loaded with.
        tokenizer: Tokenizer of the model in training.
        token_ids: The data's token ids, any shape.

    Raises:
        ValueError: Naming the first id that differs, or if the reference cannot be loaded.
    """
    from transformers import AutoTokenizer

    shared = {name: reference_kwargs[name] for name in ("revision", "trust_remote_code") if name in reference_kwargs}
    try:
        other = AutoTokenizer.from_pretrained(reference, **shared)
    except (OSError, ValueError) as error:
        raise _cannot_load(reference, error) from error
    ids = np.unique(token_ids).tolist()
    for token_id, ours, theirs in zip(ids, _tokens(tokenizer, ids), _tokens(other, ids), strict=True):
        if ours != theirs:
            raise ValueError(
                f"stm_reference={reference!r} has another tokenizer than the model in training: id {token_id} is "
                f"{ours!r} here and {theirs!r} there. Its perplexities would be those of other tokens. Choose a "
                "reference of the same family, or 'initial'."
            )


@contextmanager
def loaded_reference(options: STMOptions, device: torch.device) -> Iterator[Any]:
    """The reference model, in its checkpoint's dtype unless its options say otherwise; freed at the end.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    assert not isinstance(options.stm_reference_kwargs, str)
    keywords = {"dtype": "auto"} | (options.stm_reference_kwargs or {})
    try:
        with loaded_whole():
            model = AutoModelForCausalLM.from_pretrained(options.stm_reference, **keywords)
    except (OSError, ValueError) as error:
        raise _cannot_load(options.stm_reference, error) from error
    if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
        model.to(device)
    try:
        yield model
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _cannot_load(reference: str, error: Exception) -> ValueError:
    return ValueError(
        f"stm_reference={reference!r} is neither 'initial' nor a model that can be loaded from a folder or the hub: "
        f"{error}"
    )


def _tokens(tokenizer: Any, ids: list[int]) -> list[Any]:
    """Tokens of ids; None for those beyond the vocabulary."""
    size = len(tokenizer)
    known = [token_id for token_id in ids if token_id < size]
    tokens = dict(zip(known, tokenizer.convert_ids_to_tokens(known), strict=True))
    return [tokens.get(token_id) for token_id in ids]

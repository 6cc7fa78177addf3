"""Scoring with other models than the one in training: that they read the same tokens, and their short life."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..loading import load_causal_lm, tokenizer_source
from ..options import STMOptions
from .sharding import loaded_whole


def check_same_tokens(option: str, name: str, keywords: dict[str, Any], tokenizer: Any, token_ids: np.ndarray) -> None:
    """Check that every token id in the data means the same to another model as to the model in training.

    Args:
        option: The option that names it.
        name: Path or id of the other model, or of an adapter.
        keywords: Keyword arguments it is loaded with.
        tokenizer: Tokenizer of the model in training.
        token_ids: The data's token ids, any shape.

    Raises:
        ValueError: Naming the first id that differs, or if the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    trusted = {key: keywords[key] for key in ("trust_remote_code",) if key in keywords}
    try:
        source = tokenizer_source(name, keywords.get("revision"))
        other = AutoTokenizer.from_pretrained(source.name, revision=source.revision, **trusted)
    except (OSError, ValueError) as error:
        raise _cannot_load(option, name, error) from error
    ids = np.unique(token_ids).tolist()
    for token_id, ours, theirs in zip(ids, _tokens(tokenizer, ids), _tokens(other, ids), strict=True):
        if ours != theirs:
            raise ValueError(
                f"{option}={name!r} has another tokenizer than the model in training: id {token_id} is {ours!r} here "
                f"and {theirs!r} there. Its perplexities would be those of other tokens. Choose a model of the same "
                "family" + (", or 'initial'." if option == "stm_reference" else ".")
            )


@contextmanager
def loaded_reference(options: STMOptions, device: torch.device) -> Iterator[Any]:
    """The reference model, in its checkpoint's dtype unless its options say otherwise; freed at the end.

    Raises:
        ValueError: If it, or the base of an adapter, cannot be loaded.
    """
    assert not isinstance(options.stm_reference_kwargs, str)
    keywords = {"dtype": "auto"} | (options.stm_reference_kwargs or {})
    with _loaded("stm_reference", options.stm_reference, keywords, device) as model:
        yield model
        del model


@contextmanager
def loaded_tuned_model(options: STMOptions, trained: Any, device: torch.device) -> Iterator[Any]:
    """The model of `stm_tuned_model`, in dtypes, quantization and attention as the one in training; freed at the end.

    Each weight has the dtype that the host gave the one of that name, such as float32 for the norms of a quantized
    model. It is on the CPU, but for a quantized one.

    Args:
        options: Checked STM options.
        trained: The model in training, as it is loaded: not yet shared out or wrapped.
        device: Where it is trained.

    Raises:
        ValueError: If it, or the base of an adapter, cannot be loaded.
    """
    from .fingerprint import quantization, take_over_dtypes, weight_dtypes
    from .nll import causal_lm

    lm, name = causal_lm(trained), str(options.stm_tuned_model)
    # As the model in training is: where two scores are close, any other rounding would decide between them.
    keywords: dict[str, Any] = {"dtype": lm.dtype, "attn_implementation": lm.config._attn_implementation}
    if getattr(lm, "is_quantized", False):
        keywords |= {"quantization_config": lm.config.quantization_config, "device_map": {"": device}}
    keywords |= trusted_code(lm)
    with _loaded("stm_tuned_model", name, keywords, torch.device("cpu")) as model:
        if quantization(model) == quantization(trained):  # else it is refused, or packed weights would be cast
            take_over_dtypes(model, weight_dtypes(trained))
        yield model
        del model


def trusted_code(lm: Any) -> dict[str, Any]:
    """Keywords that let another checkpoint of a model run its own code, where the model in training does."""
    return {"trust_remote_code": True} if getattr(lm.config, "auto_map", None) else {}


@contextmanager
def _loaded(option: str, name: str, keywords: dict[str, Any], device: torch.device) -> Iterator[Any]:
    try:
        with loaded_whole():
            model = load_causal_lm(name, keywords)
    except (OSError, ValueError) as error:
        raise _cannot_load(option, name, error) from error
    if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):
        model.to(device)
    try:
        yield model
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _cannot_load(option: str, name: str, error: Exception) -> ValueError:
    or_else = " neither 'initial' nor" if option == "stm_reference" else " not"
    return ValueError(f"{option}={name!r} is{or_else} a model that can be loaded from a folder or the hub: {error}")


def _tokens(tokenizer: Any, ids: list[int]) -> list[Any]:
    """Tokens of ids; None for those beyond the vocabulary."""
    size = len(tokenizer)
    known = [token_id for token_id in ids if token_id < size]
    tokens = dict(zip(known, tokenizer.convert_ids_to_tokens(known), strict=True))
    return [tokens.get(token_id) for token_id in ids]

"""Tokens that all rows of a batch begin with (a system prompt, an instruction, a list of tools), computed once.

Shapes: B rows, T tokens, P tokens of the prefix, H hidden size.
"""

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_SAVING = 0.05
"""Share of a batch's tokens that a prefix has to save, to be worth a forward pass of its own."""

PREFIX_BYTES = 128 * 2**20
"""Most memory of a prefix's keys and values; a longer prefix is shared as far as that goes."""

MASK_BYTES = 64 * 2**20
"""Most memory of the attention mask that the rest of the rows needs, in float32, where a causal one has none."""


def shared_prefix(input_ids: np.ndarray, limit: int) -> int:
    """Tokens that all rows begin with, at most `limit`; 0 where sharing them is not worth it.

    Args:
        input_ids: Token ids, shape `(B, T)`.
        limit: No row needs the hidden states of these first tokens; less than T.
    """
    rows, width = input_ids.shape
    is_shared = (input_ids[:, :limit] == input_ids[0, :limit]).all(axis=0)
    length = limit if is_shared.all() else int(is_shared.argmin())
    saves_enough = (rows - 1) * length >= LEAST_SAVING * rows * width
    return length if saves_enough and 4 * rows * (width - length) * width <= MASK_BYTES else 0


def most_to_share(lm: PreTrainedModel) -> int:
    """Tokens of the longest prefix that fits into `PREFIX_BYTES`; 0 for a model that cannot go on from a prefix.

    It can if it is one of transformers' own models of text, with attention of its own kinds, and keeps nothing between
    tokens but keys and values that do not depend on what follows. A prefix stays within every sliding window, since
    some models have one that they do not slide.
    """
    config = lm.config
    if getattr(config, "is_heterogeneous", False):  # sizes that differ from layer to layer
        return 0
    heads = getattr(config, "num_attention_heads", None)
    rotations = str(getattr(config, "rope_parameters", None))
    if (
        not type(lm.base_model).__module__.startswith("transformers.")
        or config.get_text_config() is not config
        or config._attn_implementation not in ("eager", "sdpa")
        or "dynamic" in rotations  # turned by the length of the longest row
        or "longrope" in rotations
        or not isinstance(heads, int)
        or not _has_plain_layers(cache := DynamicCache(config=config))
    ):
        return 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    fitting = PREFIX_BYTES // (2 * config.num_hidden_layers * key_heads * head_size * lm.dtype.itemsize)
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return max(0, min([fitting, *(window - 1 for window in windows)]))


def last_hidden_states(lm: PreTrainedModel, input_ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """What the backbone yields for each row's tokens; where their first `prefix` are run once, for those after them.

    Args:
        lm: Causal language model (the one with the head, without a PEFT wrapper), in eval mode.
        input_ids: Token ids, shape `(B, T)`.
        prefix: Tokens that all rows begin with, less than T; 0 for none.

    Returns:
        Hidden states, shape `(B, T - P, H)`, or `(B, T, H)` if the prefix could not be shared.
    """
    if prefix:
        output = lm.base_model(input_ids=input_ids[:1, :prefix], use_cache=True)
        cache = getattr(output, "past_key_values", None)
        del output
        if _holds(cache, prefix):
            rest = input_ids[:, prefix:]
            states: torch.Tensor = lm.base_model(
                input_ids=rest, past_key_values=_Prefix(cache, len(rest)), use_cache=True
            )[0]
            return states
        del cache  # its memory is for the whole rows
    states = lm.base_model(input_ids=input_ids, use_cache=False)[0]
    return states


def _has_plain_layers(cache: Any) -> bool:
    """Whether a cache is keys and values, layer by layer, and nothing else."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def _holds(cache: Any, length: int) -> bool:
    """Whether a cache is that of one row of some length, all of it, and not too large."""
    return (
        _has_plain_layers(cache)
        and len(cache.layers) > 0
        and all(
            layer.is_initialized
            and layer.keys.shape[0] == layer.values.shape[0] == 1
            and layer.keys.shape[-2] == layer.values.shape[-2] == length
            for layer in cache.layers
        )
        and sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) <= PREFIX_BYTES
    )


class _Prefix(DynamicCache):
    """A prefix's keys and values, seen as every row's; those of the tokens after it are joined on, but not kept."""

    def __init__(self, cache: DynamicCache, rows: int):
        super().__init__()
        self.layers = cache.layers
        for layer in self.layers:
            layer.keys, layer.values = (part.expand(rows, *part.shape[1:]) for part in (layer.keys, layer.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        attributes = vars(self.layers[layer_idx])
        before = attributes.copy()
        joined = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        attributes.update(before)
        return joined

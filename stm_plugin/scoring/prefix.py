"""Tokens that all rows of a batch, or of all batches, begin with (a system prompt, a list of tools), computed once.

Shapes: B rows, T tokens, P tokens of the prefix, H hidden size.
"""

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_SAVING = 0.05
"""Share of a batch's tokens that a prefix has to save, to be worth a forward pass of its own."""

PREFIX_BYTES = 64 * 2**20
"""Most memory of a prefix's keys and values, on a CPU a quarter of it; a longer one is shared as far as that goes."""

MASK_BYTES = 64 * 2**20
"""Most memory of the attention mask that the rest of the rows needs, in float32, where a causal one has none."""


def shared_prefix(input_ids: np.ndarray, limit: int, common: int = 0) -> int:
    """Tokens that all rows begin with, at most `limit`; 0 where sharing them is not worth it.

    Args:
        input_ids: Token ids, shape `(B, T)`.
        limit: No row needs the hidden states of these first tokens; less than T.
        common: Tokens that all rows of all batches begin with, computed once for all; such a prefix is not worth less
            than a somewhat longer one that is this batch's own.
    """
    rows, width = input_ids.shape
    is_shared = (input_ids[:, :limit] == input_ids[0, :limit]).all(axis=0)
    length = limit if is_shared.all() else int(is_shared.argmin())
    common = min(common, length)
    least = LEAST_SAVING * rows * width

    def fits(prefix: int) -> bool:
        return 4 * rows * (width - prefix) * width <= MASK_BYTES

    if rows * common < least or not fits(common):
        common = 0
    return length if (rows - 1) * length >= rows * common + least and fits(length) else common


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
    fitting = _most_bytes(lm) // (2 * config.num_hidden_layers * key_heads * head_size * lm.dtype.itemsize)
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return max(0, min([fitting, *(window - 1 for window in windows)]))


class Backbone:
    """Runs a model's backbone over batches; what their rows begin with once, for as many batches as begin with it.

    The weights must stay as they are from batch to batch. The keys and values of the last prefix are kept, at most
    `PREFIX_BYTES` of them.

    Args:
        lm: Causal language model (the one with the head, without a PEFT wrapper), in eval mode.
    """

    def __init__(self, lm: PreTrainedModel):
        self._lm = lm
        self._device = lm.get_input_embeddings().weight.device
        self._kept: tuple[np.ndarray, DynamicCache | None] | None = None

    def last_hidden_states(self, input_ids: np.ndarray, prefix: int) -> torch.Tensor:
        """What the backbone yields for each row's tokens; with a prefix, for those after it.

        Args:
            input_ids: Token ids, shape `(B, T)`.
            prefix: Tokens that all rows begin with, less than T; 0 for none.

        Returns:
            Hidden states, shape `(B, T - P, H)`, or `(B, T, H)` if the prefix could not be shared.
        """
        cache = self._cache_of(input_ids[0, :prefix]) if prefix else None
        keywords: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            input_ids = input_ids[:, prefix:]
            keywords = {"use_cache": True, "past_key_values": _Prefix(cache, len(input_ids))}
        states: torch.Tensor = self._lm.base_model(input_ids=self._to_device(input_ids), **keywords)[0]
        return states

    def _cache_of(self, token_ids: np.ndarray) -> DynamicCache | None:
        """Keys and values of a prefix; None for a model that keeps something else."""
        if self._kept is not None and np.array_equal(self._kept[0], token_ids):
            return self._kept[1]
        self._kept = None  # its memory is for the new one
        output = self._lm.base_model(input_ids=self._to_device(token_ids[None]), use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if not _holds(cache, len(token_ids), _most_bytes(self._lm)):
            cache = None
        self._kept = (token_ids.copy(), cache)
        return cache

    def _to_device(self, input_ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(input_ids).to(self._device)


def _most_bytes(lm: PreTrainedModel) -> int:
    return PREFIX_BYTES // 4 if lm.device.type == "cpu" else PREFIX_BYTES


def _has_plain_layers(cache: Any) -> bool:
    """Whether a cache is keys and values, layer by layer, and nothing else."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def _holds(cache: Any, length: int, most_bytes: int) -> bool:
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
        and sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) <= most_bytes
    )


class _Prefix(DynamicCache):
    """A prefix's keys and values, seen as every row's; those of the tokens after it are joined on, but not kept."""

    def __init__(self, cache: DynamicCache, rows: int):
        super().__init__()
        self.layers = cache.layers
        for layer in self.layers:
            parts = layer.keys[:1], layer.values[:1]  # of as many rows as the batch before had
            layer.keys, layer.values = (part.expand(rows, *part.shape[1:]) for part in parts)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        attributes = vars(self.layers[layer_idx])
        before = attributes.copy()
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        finally:  # also where the device had no memory for a part of it
            attributes.update(before)

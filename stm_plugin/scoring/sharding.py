"""Weights that the processes of a run share out among them (DeepSpeed ZeRO-3), made whole for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether no process holds the model's weights whole, so that all must run its forward in step."""
    return any(_is_partitioned(parameter) for parameter in model.parameters())


@contextmanager
def whole(*tensors: Any) -> Iterator[None]:
    """Hold tensors whole, for reading; all processes must enter with the same ones. Others stay as they are."""
    partitioned = [tensor for tensor in tensors if _is_partitioned(tensor)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models whole, on every process, though transformers shares out what it loads while ZeRO-3 is on."""
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config


def _is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")  # DeepSpeed's mark

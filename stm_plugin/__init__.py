"""Selective Token Masking (STM) for TRL and Axolotl: fine-tune without the tokens that make a model forget."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .axolotl.plugin import STMPlugin
    from .scoring.nll import score_dataset
    from .selection import mask_labels
    from .trl import STMSFTConfig, STMSFTTrainer

_PUBLIC = {
    "STMPlugin": ".axolotl.plugin",
    "STMSFTConfig": ".trl",
    "STMSFTTrainer": ".trl",
    "mask_labels": ".selection",
    "score_dataset": ".scoring.nll",
}

__all__ = ["STMPlugin", "STMSFTConfig", "STMSFTTrainer", "mask_labels", "score_dataset"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

"""The receipt `stm.json` of a masked run: what was masked, by which scores, with which options."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .constants import RECEIPT_NAME
from .masks import Masks
from .options import STMOptions
from .store import ScoresKey

Receipt = dict[str, Any]

OPTIONS_OF_THE_MASK = (
    # With the same scores, these decide the mask.
    "threshold_nats",
    "mask_fraction",
    "strategy",
    "seed",
    "keep_stop_tokens",
    "reference",
)

_PACKAGES = ("torch", "transformers", "trl", "axolotl", "peft", "accelerate", "datasets", "bitsandbytes", "numpy")


def make_receipt(masks: Masks, options: STMOptions, key: ScoresKey, entry: Path, **facts: Any) -> Receipt:
    """Everything about a mask that a reader of a saved model may ask.

    Args:
        masks: The masks.
        options: The options they were made with.
        key: Key of the scores.
        entry: Folder of the scores.
        facts: What only the trainer knows, such as `dtype` and `unscored_label_tokens`.

    Returns:
        A dictionary that JSON can hold; an infinite threshold is the string `inf`.
    """
    threshold = math.exp(min(masks.threshold_nats, 700)) if options.threshold is None else options.threshold
    return {
        "threshold": _finite_or_inf(threshold),
        "threshold_nats": _finite_or_inf(masks.threshold_nats),
        "mask_fraction": options.stm_mask_fraction,
        "strategy": options.stm_strategy,
        "seed": options.stm_seed,
        "keep_stop_tokens": options.stm_keep_stop_tokens,
        "reference": options.stm_reference,
        "label_tokens": masks.documents.num_label_tokens,
        "masked_tokens": masks.num_masked,
        "masked_fraction": masks.masked_fraction,
        "stop_tokens": masks.num_stop_tokens,
        "stop_tokens_masked": masks.num_masked_stop_tokens,
        "stop_tokens_masked_fraction": masks.masked_stop_tokens_fraction,
        "rows": len(masks.documents.row_offsets) - 1,
        "documents": len(masks.documents),
        "rows_without_kept_tokens": masks.rows_without_kept_tokens,
        **facts,
        "scores_entry": str(entry),
        "scores_key": vars(key).copy(),
        "mask_digest": masks.documents.digest(masks.labels),
        "versions": {"stm_plugin": __version__, "python": platform.python_version()} | _installed_versions(),
    }


def write_receipt(receipt: Receipt, folder: str | os.PathLike[str]) -> None:
    """Write `stm.json` into a folder, which is made where it is missing."""
    os.makedirs(folder, exist_ok=True)
    draft = Path(folder) / f".{RECEIPT_NAME}.{os.getpid()}"
    draft.write_text(json.dumps(receipt, indent=2) + "\n")
    os.replace(draft, Path(folder) / RECEIPT_NAME)


def _finite_or_inf(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def read_receipt(checkpoint: str | os.PathLike[str], callback: str) -> Receipt | None:
    """The receipt that a checkpoint's `trainer_state.json` carries, or None.

    Args:
        checkpoint: The checkpoint's folder.
        callback: Name of the callback that keeps it.
    """
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    facts = state.get("stateful_callbacks", {}).get(callback)
    return facts["attributes"]["receipt"] if isinstance(facts, dict) else None

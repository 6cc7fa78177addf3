"""The receipt `stm.json` of a masked run: what was masked, by which scores, with which options."""

import json
import math
import os
import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..constants import RECEIPT_NAME
from ..options import STMOptions
from ..scoring.store import ScoresKey
from ..selection import perplexity
from .masks import LiveTotals, Masks

Receipt = dict[str, Any]

OPTIONS_OF_THE_MASK = (
    # With the same scores, these decide the mask.
    "threshold_nats",
    "mask_fraction",
    "strategy",
    "seed",
    "keep_stop_tokens",
    "reference",
    "tuned_model",
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
    return {
        **_options_of(options, masks.threshold_nats),
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
        "mask_digest": masks.documents.digest(masks.masked),
        "versions": _versions(),
    }


def make_live_receipt(options: STMOptions, totals: LiveTotals, **facts: Any) -> Receipt:
    """The receipt of a run with `stm_reference: current`: running totals in the place of a digest.

    Args:
        options: The options in force.
        totals: Totals so far, over all ranks.
        facts: What only the trainer knows.
    """
    return {
        **_options_of(options, totals.threshold_nats),
        "steps": totals.steps,
        "label_tokens": totals.label_tokens,
        "masked_tokens": totals.masked_tokens,
        "masked_fraction": totals.masked_tokens / max(1, totals.label_tokens),
        "stop_tokens": totals.stop_tokens,
        "stop_tokens_masked": totals.stop_tokens_masked,
        "stop_tokens_masked_fraction": totals.stop_tokens_masked / max(1, totals.stop_tokens),
        **facts,
        "versions": _versions(),
    }


def live_totals(receipt: Receipt) -> LiveTotals:
    """The totals that a receipt of `make_live_receipt` carries on."""
    facts = {option.name: receipt[option.name] for option in fields(LiveTotals)}
    nats = facts.pop("threshold_nats")
    return LiveTotals(**facts, threshold_nats=math.inf if nats == "inf" else nats)


def _options_of(options: STMOptions, threshold_nats: float | None) -> Receipt:
    threshold = options.threshold
    if threshold is not None:
        threshold_nats = math.log(threshold)
    elif threshold_nats is not None:
        threshold = perplexity(threshold_nats)
    return {
        "threshold": _finite_or_inf(threshold),
        "threshold_nats": _finite_or_inf(threshold_nats),
        "mask_fraction": options.stm_mask_fraction,
        "strategy": options.stm_strategy,
        "seed": options.stm_seed,
        "keep_stop_tokens": options.stm_keep_stop_tokens,
        "reference": options.stm_reference,
        "tuned_model": None if options.stm_tuned_model is None else str(options.stm_tuned_model),
    }


def _versions() -> dict[str, str]:
    return {"stm_plugin": __version__, "python": platform.python_version()} | _installed_versions()


def write_receipt(receipt: Receipt, folder: str | os.PathLike[str]) -> None:
    """Write `stm.json` into a folder, which is made where it is missing."""
    os.makedirs(folder, exist_ok=True)
    draft = Path(folder) / f".{RECEIPT_NAME}.{os.getpid()}"
    draft.write_text(json.dumps(receipt, indent=2) + "\n")
    os.replace(draft, Path(folder) / RECEIPT_NAME)


def _finite_or_inf(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value


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

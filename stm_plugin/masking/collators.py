"""Around the host's data collator: a check that it keeps the masks, and a count of masked tokens beside each batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..constants import IGNORE_INDEX, MASKED_COLUMN

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


class MaskCounter:
    """A collator that adds to the batch how many label tokens STM masked in each of its rows.

    Args:
        collator: The host's collator; it never sees the extra column.
    """

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate rows, or lists of rows to be packed; the batch gets `stm_masked_tokens`, shape `(B,)`."""
        counts = [_masked_tokens(example) for example in examples]
        batch = self.collator([_without_count(example) for example in examples])
        batch[MASKED_COLUMN] = torch.tensor(counts)
        return batch


def _masked_tokens(example: Any) -> int:
    return sum(map(_masked_tokens, example)) if isinstance(example, list) else int(example[MASKED_COLUMN])


def _without_count(example: Any) -> Any:
    if isinstance(example, list):
        return [_without_count(row) for row in example]
    return {name: value for name, value in example.items() if name != MASKED_COLUMN}


def num_predicted(batch: dict[str, Any]) -> torch.Tensor:
    """Labels of a batch that the loss is over; nothing predicts position 0."""
    return (batch["labels"][..., 1:] != IGNORE_INDEX).sum()


def check_collator(collator: Collator, rows: list[dict[str, Any]], masked: list[np.ndarray]) -> None:
    """Check that a collator keeps the masks of some rows.

    Args:
        collator: The trainer's collator.
        rows: Masked rows as the dataloader hands them over.
        masked: Whether STM masked each token, one bool array a row.

    Raises:
        ValueError: Naming the collator, if it labels a masked token, or changes token ids so that this cannot be told.
    """
    name = type(collator).__name__
    for row, row_masked in zip(rows, masked, strict=True):
        ids, labels = _flat(collator([dict(row)]), name)
        offset = _offset(ids, np.asarray(row["input_ids"]))
        if offset is None:
            raise ValueError(
                f"The data collator {name} changes the token ids of a row, so STM cannot tell whether it keeps the "
                "masks. Use the trainer's own collator (data_collator=None), or one that only pads or joins rows."
            )
        found = labels[offset : offset + len(row_masked)]
        if (found[row_masked[: len(found)]] != IGNORE_INDEX).any():
            raise ValueError(_rebuilt(name))
    joint = _flat(collator([dict(row) for row in rows]), name)[1]
    kept = sum(int((np.asarray(row["labels"]) != IGNORE_INDEX).sum()) for row in rows)
    if (joint != IGNORE_INDEX).sum() > kept:
        raise ValueError(_rebuilt(name))


def _rebuilt(name: str) -> str:
    return (
        f"The data collator {name} puts labels where STM has masked them (-100): it builds labels anew instead of "
        "using the 'labels' column, so the run would train unmasked. Use the trainer's own collator "
        "(data_collator=None), or one that keeps 'labels'."
    )


def _flat(batch: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    if "input_ids" not in batch or "labels" not in batch:
        raise ValueError(
            f"The data collator {name} returns {sorted(batch)}; STM needs 'input_ids' and 'labels' in every batch."
        )
    return np.asarray(batch["input_ids"]).ravel(), np.asarray(batch["labels"]).ravel()


def _offset(collated: np.ndarray, ids: np.ndarray) -> int | None:
    """Where a row starts within its collated ids: padded right or left, or cut at the end; None if it is not there."""
    size = min(len(ids), len(collated))
    for offset in (0, len(collated) - size):
        if (collated[offset : offset + size] == ids[:size]).all():
            return offset
    return None

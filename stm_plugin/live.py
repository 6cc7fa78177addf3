"""`stm_reference: current`: label tokens of an optimizer step, masked by their perplexity under the live weights."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .constants import IGNORE_INDEX
from .documents import Documents
from .masks import Masks, apply_threshold, candidate_scores, threshold_in_nats
from .options import STMOptions

Score = Callable[[Documents], np.ndarray]
Gather = Callable[[np.ndarray], np.ndarray]


def mask_batches(
    batches: list[dict[str, Any]], options: STMOptions, stop_token_ids: set[int], score: Score, gather: Gather
) -> Masks:
    """Mask the labels of all micro-batches of one optimizer step, in place.

    Args:
        batches: Collated micro-batches with `input_ids` and `labels` of shape `(B, T)`, and where they have them
            `attention_mask` and `position_ids`.
        options: Checked STM options.
        stop_token_ids: Ids that end a turn or a text.
        score: Gives the NLL in nats of all N label tokens of some documents, in their order, shape `(N,)`.
        gather: Joins an array of scores with those of all other ranks.

    Returns:
        The masks of this rank's micro-batches.

    Raises:
        ValueError: For a batch without labels, or with labels that are shifted already.
    """
    parts = [_documents_of(batch) for batch in batches]
    documents = Documents.concatenate([part for part, _ in parts])
    nll = score(documents)
    candidates = gather(candidate_scores(documents, nll, options, stop_token_ids))
    threshold_nats = threshold_in_nats(candidates, options) if len(candidates) else math.inf
    masks = apply_threshold(documents, nll, threshold_nats, options, stop_token_ids)
    start = 0
    for batch, (_, where) in zip(batches, parts, strict=True):
        masked = where[masks.masked[start : start + len(where)]]
        labels = batch["labels"]
        index = torch.from_numpy(masked).to(labels.device)
        batch["labels"] = labels.flatten().index_fill(0, index, IGNORE_INDEX).view(labels.shape)
        start += len(where)
    return masks


def _documents_of(batch: dict[str, Any]) -> tuple[Documents, np.ndarray]:
    if "labels" not in batch or "input_ids" not in batch or "shift_labels" in batch:
        raise ValueError(
            f"stm_reference='current' masks the 'labels' of each batch, and this data collator yields "
            f"{sorted(batch)}. Use the trainer's own collator (data_collator=None)."
        )

    def array(name: str) -> np.ndarray | None:
        value: Any = batch.get(name)
        return None if value is None or value.ndim != 2 else value.cpu().numpy()

    input_ids, labels = array("input_ids"), array("labels")
    assert input_ids is not None
    assert labels is not None
    return Documents.from_batch(input_ids, labels, array("attention_mask"), array("position_ids"))

"""Masks made live, for `stm_reference: current`: at every optimizer step, by perplexity under the weights of then.

All micro-batches of a step are scored under the same weights, before any of them is counted or trained.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..constants import IGNORE_INDEX
from ..options import STMOptions
from ..randomness import preserved_random_state
from ..scoring.documents import Documents
from ..scoring.fingerprint import weights_dtype
from ..scoring.nll import score
from ..scoring.plan import ScorePlan
from ..scoring.sharding import is_sharded
from .checkpoint import check_same_options, receipt_of
from .collators import num_predicted
from .host import Host
from .masks import LiveTotals, Masks, apply_threshold, candidate_scores, threshold_in_nats
from .receipt import Receipt, live_totals, make_live_receipt

Score = Callable[[Documents], np.ndarray]
Gather = Callable[[np.ndarray], np.ndarray]


class MaskingLive:
    """Masks a trainer's micro-batches, step by step; a `Masking` of the mixin.

    Args:
        host: The trainer.

    Attributes:
        totals: What has been masked so far; None before the first run.
    """

    masks_steps = True
    run = None

    def __init__(self, host: Host):
        self.totals: LiveTotals | None = None
        self._host = host
        self._dtype: list[str] = []

    @property
    def receipt(self) -> Receipt | None:
        """What `stm.json` says as of now."""
        if self.totals is None:
            return None
        return make_live_receipt(
            self._host.options,
            self.totals,
            dtype=self._dtype,
            autocast=self._host.autocast_dtype,
            normalization=self._host.normalization,
        )

    def check(self) -> dict[str, Any]:
        """Nothing: processes need not agree on the rows, which may stream."""
        return {}

    def set_up(self) -> None:
        """Nothing: nothing is stored."""

    def before_loading(self, checkpoint: str) -> None:
        """Nothing: the checkpoint's weights are those that count."""

    def begin(self, checkpoint: str | None) -> None:
        """Count from nothing, or on from what the checkpoint's run had counted."""
        options = self._host.options
        self.totals = LiveTotals()
        if checkpoint is not None:
            original = receipt_of(checkpoint)
            check_same_options(checkpoint, original, make_live_receipt(options, self.totals))
            self.totals = live_totals(original)
        self._dtype = weights_dtype(self._host.model).split(",")  # now, for which all processes are needed
        self._host.info(
            "STM is on: at every step, label tokens of perplexity above %s under the live weights are masked "
            "(strategy %s, reference current), for one more forward pass. The training loss is over kept tokens: "
            "compare eval_loss, not it, with a plain run's.",
            f"that of the step's own share {options.stm_mask_fraction}"
            if options.threshold is None
            else options.threshold,
            options.stm_strategy,
        )

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Mask a step's micro-batches, and count what was masked."""
        if self.totals is None or not batches:
            return None
        host, options = self._host, self._host.options
        with preserved_random_state():
            masks = mask_batches(batches, options, host.stop_token_ids, self._scores_of, self._gathered)
        own = [
            masks.documents.num_label_tokens,
            masks.num_masked,
            masks.num_stop_tokens,
            masks.num_masked_stop_tokens,
            sum(not num_predicted(batch) for batch in batches),
        ]
        counts = host.sum_over_ranks(torch.tensor(own, device=device))
        *totals, num_empty = counts.tolist()
        if num_empty and not host.loss_takes_count:
            raise ValueError(
                f"{num_empty} micro-batches of a step keep no token, and would divide by zero: the loss of "
                f"{type(host.model).__name__} takes no count of tokens. Raise stm_threshold, or use larger batches."
            )
        self.totals.add(masks.threshold_nats, *totals)
        return torch.stack([counts[0] - counts[1], counts[1]])

    def _scores_of(self, documents: Documents) -> np.ndarray:
        """NLL in nats of all label tokens of some documents under the live weights."""
        host, plan = self._host, ScorePlan.of(documents)
        scores = score(
            host.model,
            plan,
            tokens_per_batch=host.options.tokens_per_batch(host.device.type),
            autocast=host.autocast,
            agree=host.ranks.largest if is_sharded(host.model) else None,
            progress=False,
        )
        return plan.spread(scores)

    def _gathered(self, scores: np.ndarray) -> np.ndarray:
        """Scores of all ranks, where a fraction of them gives the threshold."""
        if self._host.options.stm_mask_fraction is None:
            return scores
        return np.concatenate(self._host.ranks.gather(scores))


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

"""Masks made ahead of training, for `stm_reference: initial` or another model: scores once, then masked labels.

The masked data set takes the place of the training set, with one more column that says how many label tokens of a row
are masked; a step's batches are those that the host makes of it.
"""

import math
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..constants import MASKED_COLUMN
from ..options import REFERENCE_INITIAL, STMOptions, rule_in_words
from ..scoring.documents import with_columns
from ..scoring.plan import ScorePlan
from ..scoring.store import ScoresKey
from ..selection import deciding_scores
from .checkpoint import check_same_options, receipt_of
from .collators import num_predicted
from .host import Host
from .masks import Masks, make_masks, unmasked_documents
from .receipt import Receipt, make_receipt
from .start_scores import StartScores, TunedScores

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ScoredRows:
    """A training set with its scores.

    Attributes:
        source: The data set as the host prepared it.
        plan: What was scored.
        nll: NLL in nats of all N label tokens, in the data set's order, shape `(N,)`, float32.
        tuned_nll: The same under the tuned model; None where the strategy takes none.
        key: Key of the scores.
        tuned_key: Key of the tuned model's.
        rows_file: Name of the file that the rows are kept in; None if they are not.
    """

    source: "Dataset"
    plan: ScorePlan
    nll: np.ndarray
    tuned_nll: np.ndarray | None
    key: ScoresKey
    tuned_key: ScoresKey | None
    rows_file: str | None


@dataclass(frozen=True)
class MaskedRun(ScoredRows):
    """A training set with its scores and masks.

    Attributes:
        options: The options in force.
        masks: What is masked.
        receipt: What `stm.json` says.
    """

    options: STMOptions
    masks: Masks
    receipt: Receipt

    @cached_property
    def masked(self) -> "Dataset":
        """The data set with its masked labels."""
        masks = self.masks
        return with_columns(self.source, masks.documents, masks.labels, **{MASKED_COLUMN: masks.masked_per_row})


class MaskingAhead:
    """Masks a trainer's training set before the first step; a `Masking` of the mixin.

    Args:
        host: The trainer.

    Attributes:
        run: What was masked; None before the first run.
    """

    masks_steps = False

    def __init__(self, host: Host):
        self.run: MaskedRun | None = None
        self._host = host
        self._scores = StartScores(host)
        self._tuned_scores = TunedScores(host)
        self._trained: Dataset | None = None  # the masked data set that the trainer was given
        self._model: weakref.ref[Any] | None = None  # which was scored

    @property
    def receipt(self) -> Receipt | None:
        """What `stm.json` says."""
        return self.run.receipt if self.run is not None else None

    def check(self) -> dict[str, Any]:
        """Check the data and the reference; processes must agree on the rows."""
        documents = unmasked_documents(self._host.train_dataset)
        self._scores.check_reference(documents)
        if self._host.options.stm_tuned_model is not None:
            self._tuned_scores.check_reference(documents)
        return {"training rows": documents.rows_fingerprint} if self._host.ranks.count > 1 else {}

    def set_up(self) -> None:
        """Check the store, and under FSDP find the scores."""
        self._scores.set_up()
        if self._host.options.stm_tuned_model is not None:
            self._tuned_scores.set_up()

    def before_loading(self, checkpoint: str) -> None:
        """Make the scores that a resumed run needs, if they are gone."""
        if self.run is None:
            self._scores.make_before_resuming(checkpoint)

    def begin(self, checkpoint: str | None) -> "Dataset | None":
        """Score and mask the training set, unless it is masked already.

        Returns:
            The masked data set; None where nothing will be trained.
        """
        run, origin = self._masked_run(checkpoint)
        if checkpoint is not None:
            _check_resumed(checkpoint, run)
        if not self._host.only_scores and self._trained is not run.masked:
            self._host.check_collator(run.masked, run.masks)
            self._trained = run.masked
        self.run = run
        self._model = weakref.ref(self._host.model)
        self._announce(run.receipt, origin)
        return None if self._host.only_scores else run.masked

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Take the column of masked tokens out of a step's batches, and count by it."""
        num_masked = sum(batch.pop(MASKED_COLUMN).sum() for batch in batches if MASKED_COLUMN in batch)
        num_kept = sum(num_predicted(batch) for batch in batches)
        if not torch.is_tensor(num_masked) or not torch.is_tensor(num_kept):
            return None
        return self._host.sum_over_ranks(torch.stack([num_kept.to(device), num_masked.to(device)]))

    def _masked_run(self, checkpoint: str | None) -> tuple[MaskedRun, str]:
        """The masked training set, made anew as far as model, data or options are new; and whence its scores came."""
        host, options, run, origin = self._host, self._host.options, self.run, "made before"
        masked_before = run is not None and host.train_dataset is self._trained
        same_model = not host.makes_models or (self._model is not None and self._model() is host.model)
        if run is not None and masked_before and same_model:
            if options.stm_reference != run.options.stm_reference:
                raise ValueError(
                    f"stm_reference changed from {run.options.stm_reference!r} to {options.stm_reference!r} after the "
                    "training set was scored. Make a new trainer for it."
                )
            source, plan, nll, key, rows_file = run.source, run.plan, run.nll, run.key, run.rows_file
        else:
            source = run.source if run is not None and masked_before else host.train_dataset
            plan = ScorePlan.of(unmasked_documents(source))
            rows_file = host.ranks.from_main(lambda: self._keep_documents(source, plan))  # before scores take memory
            if checkpoint is None:
                key, scores, origin = self._scores.find_or_make(plan)
            else:
                (key, scores), origin = self._scores.of_checkpoint(checkpoint, plan), "of the start"
            nll = plan.spread(scores)
            del scores  # of a large data set both would be much
        if run is not None and masked_before and options == run.options and key == run.key:
            return run, origin
        tuned_key, tuned_nll = self._of_tuned_model(checkpoint, plan, key)
        scored = ScoredRows(source, plan, nll, tuned_nll, key, tuned_key, rows_file)
        try:
            return self._apply(options, scored), origin
        except ValueError as error:
            if not host.only_scores:
                raise
            # What training would refuse can be looked at all the same, to choose another threshold.
            host.warn("Training with these options would stop: %s", error)
            everything_kept = replace(options, stm_threshold=math.inf, stm_mask_fraction=None)
            return self._apply(everything_kept, scored), origin

    def _of_tuned_model(
        self, checkpoint: str | None, plan: ScorePlan, initial: ScoresKey
    ) -> tuple[ScoresKey, np.ndarray] | tuple[None, None]:
        """Key and NLL under the tuned model, where the strategy compares with one.

        Args:
            checkpoint: Of a resumed run.
            plan: What is scored.
            initial: Key of the initial model's scores.

        Raises:
            ValueError: If it computes what the initial model does, or in another precision.
        """
        tuned_model = self._host.options.stm_tuned_model
        if tuned_model is None:
            return None, None
        scores = self._tuned_scores
        key, found = scores.find_or_make(plan)[:2] if checkpoint is None else scores.of_checkpoint(checkpoint, plan)
        if key.model == initial.model:
            raise ValueError(
                f"stm_tuned_model={tuned_model!r} computes exactly what the model in training does before its first "
                "step: there is no difference to mask by. Name the model, or the adapter, that was tuned on the data."
            )
        if (key.quantization, key.autocast) != (initial.quantization, initial.autocast):
            raise ValueError(
                f"stm_tuned_model={tuned_model!r} is scored with quantization {key.quantization} and autocast "
                f"{key.autocast}, the initial model with {initial.quantization} and {initial.autocast}: their "
                "difference would be one of precision. Give a checkpoint in the form of the model in training."
            )
        return key, plan.spread(found)

    def _apply(self, options: STMOptions, scored: ScoredRows) -> MaskedRun:
        """What options mask of a scored data set, with its receipt."""
        host, key = self._host, scored.key
        scores = deciding_scores(scored.nll, scored.tuned_nll, options.stm_strategy)
        masks = make_masks(scored.plan.documents, scores, options, host.stop_token_ids)
        del scores
        if masks.rows_without_kept_tokens and not host.loss_takes_count:
            raise ValueError(
                f"{masks.rows_without_kept_tokens} rows keep no token; a micro-batch of them would divide by zero: "
                f"the loss of {type(host.model).__name__} takes no count of tokens. Raise stm_threshold, or leave "
                "these rows out."
            )
        receipt = make_receipt(
            masks,
            options,
            key,
            self._scores.store.path(key),
            unscored_label_tokens=masks.documents.num_unscored_labels if host.trains_first_label else 0,
            dtype=key.dtype.split(","),
            autocast=key.autocast,
            normalization=host.normalization,
            model=host.model_name if options.stm_reference == REFERENCE_INITIAL else options.stm_reference,
            documents_file=scored.rows_file,
        )
        if scored.tuned_key is not None:
            receipt |= {
                "tuned_scores_entry": str(self._tuned_scores.store.path(scored.tuned_key)),
                TunedScores.key_name: vars(scored.tuned_key).copy(),
            }
        return MaskedRun(**vars(scored), options=options, masks=masks, receipt=receipt)

    def _keep_documents(self, source: "Dataset", plan: ScorePlan) -> str | None:
        """Keep the rows for `stm report` and the like; name of the file, or None where it could not be written."""
        try:
            return self._host.kept_documents(source, plan).write(plan).name
        except Exception as error:  # a run does not end for what only shows it
            self._host.warn("The rows could not be kept for stm inspect, sweep and report: %r", error)
            return None

    def _announce(self, receipt: Receipt, origin: str) -> None:
        """Say in one log line what is masked; warn about what may hurt."""
        self._host.info(
            "STM is on: %s of %s label tokens masked (%.2f %%), %s (%s nats, strategy %s, reference %s); %d of %d "
            "rows keep no token. Scores: %s, in %s. The training loss is over kept tokens: "
            "compare eval_loss, not it, with a plain run's.",
            f"{receipt['masked_tokens']:,}",
            f"{receipt['label_tokens']:,}",
            100 * receipt["masked_fraction"],
            rule_in_words(receipt["strategy"], receipt["threshold"], receipt["tuned_model"]),
            receipt["threshold_nats"],
            receipt["strategy"],
            receipt["reference"],
            receipt["rows_without_kept_tokens"],
            receipt["rows"],
            origin,
            receipt["scores_entry"],
        )
        self._host.warn_of_stop_tokens(receipt, again=True)


def _check_resumed(checkpoint: str, run: MaskedRun) -> None:
    """Raise ValueError unless a run masks what the run did that left a checkpoint."""
    original = receipt_of(checkpoint)
    check_same_options(checkpoint, original, run.receipt)
    if original["mask_digest"] != run.receipt["mask_digest"]:
        raise ValueError(
            f"The masks of this run are not those of {checkpoint} (digest {run.receipt['mask_digest'][:12]}… "
            f"against {original['mask_digest'][:12]}…), though scores and options agree: the tokenizer's or the "
            "model's stop tokens may have changed."
        )

"""Selective Token Masking for any `transformers.Trainer`: the training set's labels are masked before the first step.

Whatever follows the labels (collator, packing, token counts, every fused loss) then works as the host has it. The
seams, and all that is overridden:

- `_prepare_for_training`: the model is placed, cast and under autocast; scores are found or made, `train_dataset` gets
  its masked labels, and the dataloader is built anew from the random state that the host's own was built from.
- `_load_from_checkpoint`: scores that a resumed run needs and that are gone are made while the weights are still those
  of the start.
- `get_batch_samples`: counts for the metrics; a step without kept tokens divides by 1.
- `save_model`, `log`: the receipt and the metrics.

With `stm_reference: current` nothing is scored ahead: `get_batch_samples`, which sees all micro-batches of a step
before any is counted or trained, masks them under the live weights.

`stm_score()` goes through the same door and stops before the first step.
"""

import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ._compat import counts_predicted_labels
from .collators import MaskCounter, check_collator
from .constants import IGNORE_INDEX, MASKED_COLUMN, REPORT_NAME
from .document_store import KeptDocuments
from .documents import Documents, with_columns
from .engine import find_or_make_scores
from .fingerprint import model_fingerprint, quantization, weights_dtype
from .live import mask_batches
from .logs import show_log_lines
from .masks import LiveTotals, Masks, make_masks
from .options import REFERENCE_CURRENT, REFERENCE_INITIAL, STMOptions
from .plan import ScorePlan
from .randomness import RandomState, preserved_random_state
from .ranks import Ranks
from .receipt import (
    OPTIONS_OF_THE_MASK,
    Receipt,
    live_totals,
    make_live_receipt,
    make_receipt,
    read_receipt,
    write_receipt,
)
from .reference import check_same_tokens, loaded_reference
from .report.page import write_report
from .scored import ScoredData
from .scoring import Autocast, check_scorable, score
from .sharding import is_sharded
from .store import ScoresError, ScoresKey, ScoreStore

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object

logger = logging.getLogger(__name__)

_STOP_TOKENS_WARNING = 0.05


class _Scored(Exception):  # noqa: N818
    """Ends a `train()` that was only to score."""


class STMState(TrainerCallback, ExportableState):
    """Carries the receipt into `trainer_state.json`, where a resumed run reads it."""

    def __init__(self) -> None:
        self.make_receipt: Callable[[], Receipt | None] | None = None

    @property
    def receipt(self) -> Receipt | None:
        """The receipt as of now; None before the run is masked."""
        return self.make_receipt() if self.make_receipt is not None else None

    @receipt.setter
    def receipt(self, receipt: Receipt | None) -> None:
        """What `restore_callback_states_from_checkpoint` does; the run then makes its own."""
        self.make_receipt = lambda: receipt

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves."""
        return {"args": {}, "attributes": {"receipt": self.receipt}}


@dataclass(frozen=True)
class MaskedRun:
    """A training set with its scores and masks.

    Attributes:
        options: The options in force.
        source: The data set as the host prepared it.
        plan: What was scored.
        nll: NLL in nats of all N label tokens, in the data set's order, shape `(N,)`, float32.
        key: Key of the scores.
        masks: What is masked.
        receipt: What `stm.json` says.
    """

    options: STMOptions
    source: "datasets.Dataset"
    plan: ScorePlan
    nll: np.ndarray
    key: ScoresKey
    masks: Masks
    receipt: Receipt

    @cached_property
    def masked(self) -> "datasets.Dataset":
        """The data set with its masked labels."""
        masks = self.masks
        return with_columns(self.source, masks.documents, masks.labels, **{MASKED_COLUMN: masks.masked_per_row})


class STMTrainerMixin(_Host):
    """Puts Selective Token Masking (arXiv 2501.14315) into a `transformers.Trainer`, left of it in the bases.

    The host's arguments carry the fields of `STMOptions`. The host's `__init__` ends with `_stm_setup()`.
    """

    train_dataset: Any
    data_collator: Any
    _signature_columns: Any

    _stm_logger = logger
    """Where log lines go; hosts may show the INFO lines of none but their own."""

    _stm_data_name: str | None = None
    """What reports call the training set; None for the name that it was loaded by."""

    _stm_trains_first_label = False
    """Whether the host trains a label at a document's position 0, which has no score."""

    def _stm_setup(self) -> None:
        """Check, before anything is trained, all that can be checked; raise ValueError for what cannot be masked."""
        show_log_lines()
        self._stm_run: MaskedRun | None = None
        self._stm_masked: datasets.Dataset | None = None
        self._stm_model: weakref.ref[Any] | None = None
        self._stm_state = STMState()
        self._stm_loader_state = RandomState()
        self._stm_counts: dict[str, Any] = {}
        self._stm_only_scores = False
        self._stm_totals: LiveTotals | None = None
        self._stm_live_dtype: list[str] = []
        self._stm_warned_of_stop_tokens = False
        self._stm_unsharded: tuple[ScoresKey, Any] | None = None
        self._stm_ranks = Ranks(self.args.process_index, self.args.world_size)
        facts = self._stm_ranks.each(self._stm_checked_facts)
        self._stm_ranks.check_agreement(facts[self._stm_ranks.index])
        options = STMOptions.from_args(self.args)
        if options.stm_reference != REFERENCE_CURRENT:
            self._stm_ranks.from_main(ScoreStore(options.stm_scores_dir).check_usable)
            if self.is_fsdp_enabled and options.stm_reference == REFERENCE_INITIAL:
                self._stm_find_scores_before_sharding(options)
        self.add_callback(self._stm_state)
        if not self.args.average_tokens_across_devices:
            self.args.average_tokens_across_devices = True
            self._stm_info("average_tokens_across_devices is on while STM is: its loss is over all tokens of a step.")
        if not self._stm_counts_tokens():
            self._stm_warn(
                "The host does not divide the loss of %s by the number of kept tokens of a step: its own averaging "
                "stays.",
                type(self.model).__name__,
            )

    def _stm_checked_facts(self) -> dict[str, Any]:
        """What all processes must agree on, after the checks that each makes by itself."""
        options = STMOptions.from_args(self.args)
        self._stm_check_supported(options)
        facts = {name: value for name, value in vars(options).items() if name != "stm_scores_dir"}
        facts["stm_reference_kwargs"] = options.plain_reference_kwargs()  # configs have no equality
        if options.stm_reference == REFERENCE_CURRENT:
            check_unmasked(self.train_dataset)
            return facts
        documents = _unmasked_documents(self.train_dataset)
        self._stm_check_reference(options, documents)
        return facts | ({"training rows": documents.rows_fingerprint} if self.args.world_size > 1 else {})

    def _stm_check_reference(self, options: STMOptions, documents: Documents) -> None:
        if options.stm_reference != REFERENCE_INITIAL:
            assert not isinstance(options.stm_reference_kwargs, str)
            check_same_tokens(
                options.stm_reference,
                options.stm_reference_kwargs or {},
                getattr(self.processing_class, "tokenizer", self.processing_class),
                documents.input_ids,
            )

    def _stm_check_supported(self, options: STMOptions) -> None:
        if options.stm_reference != REFERENCE_CURRENT and not isinstance(self.train_dataset, datasets.Dataset):
            raise ValueError(
                f"stm_reference={options.stm_reference!r} scores the training set before the first step, which a "
                f"streaming or custom data set ({type(self.train_dataset).__name__}) does not allow. Load it as a "
                "datasets.Dataset (streaming=False), or set stm_reference to 'current'."
            )
        check_scorable(self.model)
        parallelism = self.accelerator.parallelism_config
        enabled = parallelism is not None and {
            "context parallelism (cp_size)": parallelism.cp_enabled,
            "sequence parallelism (sp_size)": parallelism.sp_enabled,
            "tensor parallelism (tp_size)": parallelism.tp_enabled,
        }
        kinds = [kind for kind, on in (enabled or {}).items() if on]
        if self.is_fsdp_enabled and options.stm_reference == REFERENCE_CURRENT:
            kinds.append("FSDP with stm_reference='current'")
        if getattr(self, "is_distributed_loading_by_transformers", False):
            kinds.append("weights that transformers shards as it loads them (distributed_config)")
        if self.args.n_gpu > 1:
            kinds.append("nn.DataParallel (launch with torchrun or accelerate instead)")
        if kinds:
            raise ValueError(
                f"STM cannot yet score exactly under {' and '.join(kinds)}. Use one process, DDP or DeepSpeed."
            )

    def stm_score(self) -> MaskedRun:
        """Score and mask the training set as `train()` would, with the model prepared as for training; train nothing.

        Returns:
            What was scored and masked.
        """
        if STMOptions.from_args(self.args).stm_reference == REFERENCE_CURRENT:
            raise ValueError(
                "stm_reference='current' scores at every step of training; there is nothing to score ahead."
            )
        self._stm_only_scores = True
        try:
            self.train()
        except _Scored:
            pass
        finally:
            self._stm_only_scores = False
        assert self._stm_run is not None
        return self._stm_run

    def get_train_dataloader(self) -> Any:
        """The host's, remembering the random state that it was built from."""
        self._stm_loader_state = RandomState()
        return super().get_train_dataloader()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if STMOptions.from_args(self.args).stm_reference == REFERENCE_CURRENT:
            self._stm_start_live(resume_from_checkpoint)
            return model, train_dataloader
        with preserved_random_state():
            self._stm_mask(resume_from_checkpoint)
            if self._stm_only_scores:
                raise _Scored
            self._stm_loader_state.restore()
            train_dataloader = self._stm_train_dataloader()
        self.callback_handler.train_dataloader = train_dataloader
        return model, train_dataloader

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        live = STMOptions.from_args(self.args).stm_reference == REFERENCE_CURRENT
        if self.is_in_train and self._stm_run is None and model is None and not live:
            with preserved_random_state():
                self._stm_score_before_resuming(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _stm_mask(self, checkpoint: str | None) -> None:
        """Give `train_dataset` its masked labels, unless it has them already."""
        options = STMOptions.from_args(self.args)
        run, origin = self._stm_run, "made before"
        masked_before = run is not None and self.train_dataset is self._stm_masked
        same_model = self.model_init is None or (self._stm_model is not None and self._stm_model() is self.model)
        if run is not None and masked_before and same_model:
            if options.stm_reference != run.options.stm_reference:
                raise ValueError(
                    f"stm_reference changed from {run.options.stm_reference!r} to {options.stm_reference!r} after the "
                    "training set was scored. Make a new trainer for it."
                )
            source, plan, nll, key = run.source, run.plan, run.nll, run.key
        else:
            source = run.source if run is not None and masked_before else self.train_dataset
            plan = ScorePlan.of(_unmasked_documents(source))
            if checkpoint is None:
                key, scores, origin = self._stm_find_or_make_scores(plan, options)
            else:
                (key, scores), origin = self._stm_scores_of_checkpoint(checkpoint, plan, options), "of the start"
            nll = plan.spread(scores)
            del scores  # of a large data set both would be much
        if run is None or not masked_before or options != run.options or key != run.key:
            try:
                run = self._stm_apply(options, source, plan, nll, key)
            except ValueError as error:
                if not self._stm_only_scores:
                    raise
                # What training would refuse can be looked at all the same, to choose another threshold.
                self._stm_warn("Training with these options would stop: %s", error)
                everything_kept = replace(options, stm_threshold=math.inf, stm_mask_fraction=None)
                run = self._stm_apply(everything_kept, source, plan, nll, key)
        if checkpoint is not None:
            self._stm_check_resumed(checkpoint, run)
        if not self._stm_only_scores and (self._stm_masked is None or self._stm_masked is not run.masked):
            self._stm_check_collator(run.masked, run.masks)
            self.train_dataset = self._stm_masked = run.masked
        self._stm_run = run
        self._stm_model = weakref.ref(self.model)
        self._stm_state.make_receipt = lambda: run.receipt
        self.state.stateful_callbacks[STMState.__name__] = self._stm_state.state()
        self._stm_counts = {}
        self._stm_warned_of_stop_tokens = False
        self._stm_announce(run.receipt, origin)
        if self.args.should_save and not self._stm_only_scores:
            write_receipt(run.receipt, self.args.output_dir)
        if self.args.should_save and options.stm_report:
            self._stm_write_report(run)

    def _stm_start_live(self, checkpoint: str | None) -> None:
        """Begin a run that is masked under its live weights, or go on with one."""
        options = STMOptions.from_args(self.args)
        if self._stm_run is not None:
            raise ValueError(
                "stm_reference changed to 'current' after the training set was masked. Make a new trainer."
            )
        self._stm_totals = LiveTotals()
        if checkpoint is not None:
            original = _receipt_of(checkpoint)
            self._stm_check_same_options(checkpoint, original, make_live_receipt(options, self._stm_totals))
            self._stm_totals = live_totals(original)
        self._stm_counts = {}
        self._stm_live_dtype = weights_dtype(self.model).split(",")  # now, for which all processes are needed
        self._stm_state.make_receipt = self._stm_live_receipt
        self._stm_info(
            "STM is on: at every step, label tokens of perplexity above %s under the live weights are masked "
            "(strategy %s, reference current), for one more forward pass. The training loss is over kept tokens: "
            "compare eval_loss, not it, with a plain run's.",
            f"that of the step's own share {options.stm_mask_fraction}"
            if options.threshold is None
            else options.threshold,
            options.stm_strategy,
        )
        if self.args.should_save:
            write_receipt(self._stm_live_receipt(), self.args.output_dir)

    def _stm_live_receipt(self) -> Receipt:
        assert self._stm_totals is not None
        with self.accelerator.autocast():
            device = self.args.device.type
            autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
        return make_live_receipt(
            STMOptions.from_args(self.args),
            self._stm_totals,
            dtype=self._stm_live_dtype,
            autocast=autocast,
            normalization="global" if self._stm_counts_tokens() else "host",
        )

    def _stm_mask_live(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Mask a step's micro-batches in place; kept and masked tokens over all ranks, shape `(2,)`."""
        assert self._stm_totals is not None
        options = STMOptions.from_args(self.args)

        ranks = self._stm_ranks
        agree = ranks.largest if is_sharded(self.model) else None

        def scores_of(documents: Documents) -> Any:
            plan = ScorePlan.of(documents)
            scores = score(
                self.model,
                plan,
                tokens_per_batch=options.tokens_per_batch(self.args.device.type),
                autocast=self.accelerator.autocast,
                agree=agree,
                progress=False,
            )
            return plan.spread(scores)

        def gathered(scores: Any) -> Any:
            return np.concatenate(ranks.gather(scores)) if options.stm_mask_fraction is not None else scores

        with preserved_random_state():
            masks = mask_batches(batches, options, self._stm_stop_token_ids(), scores_of, gathered)
        own = [
            masks.documents.num_label_tokens,
            masks.num_masked,
            masks.num_stop_tokens,
            masks.num_masked_stop_tokens,
            sum(not _num_predicted(batch) for batch in batches),
        ]
        counts = torch.tensor(own, device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        *totals, num_empty = counts.tolist()
        if num_empty and not self._stm_loss_takes_count():
            raise ValueError(
                f"{num_empty} micro-batches of a step keep no token, and would divide by zero: the loss of "
                f"{type(self.model).__name__} takes no count of tokens. Raise stm_threshold, or use larger batches."
            )
        self._stm_totals.add(masks.threshold_nats, *totals)
        return torch.stack([counts[0] - counts[1], counts[1]])

    def _stm_apply(
        self, options: STMOptions, source: "datasets.Dataset", plan: ScorePlan, nll: np.ndarray, key: ScoresKey
    ) -> MaskedRun:
        """What options mask of a scored data set, with its receipt; its rows are kept for who would look at them."""
        masks = make_masks(plan.documents, nll, options, self._stm_stop_token_ids())
        if masks.rows_without_kept_tokens and not self._stm_loss_takes_count():
            raise ValueError(
                f"{masks.rows_without_kept_tokens} rows keep no token; a micro-batch of them would divide by zero: "
                f"the loss of {type(self.model).__name__} takes no count of tokens. Raise stm_threshold, or leave "
                "these rows out."
            )
        receipt = make_receipt(
            masks,
            options,
            key,
            ScoreStore(options.stm_scores_dir).path(key),
            unscored_label_tokens=masks.documents.num_unscored_labels if self._stm_trains_first_label else 0,
            dtype=key.dtype.split(","),
            autocast=key.autocast,
            normalization="global" if self._stm_counts_tokens() else "host",
            model=self._stm_model_name(options),
            documents_file=self._stm_ranks.from_main(lambda: self._stm_keep_documents(source, plan)),
        )
        return MaskedRun(options, source, plan, nll, key, masks, receipt)

    def stm_scored_data(self, run: MaskedRun) -> ScoredData:
        """A masked training set as `stm inspect`, `stm sweep` and `stm report` take it; on the main process."""
        return ScoredData(self._stm_kept_documents(run.source, run.plan), run.nll, run.key, run.receipt)

    def _stm_kept_documents(self, source: "datasets.Dataset", plan: ScorePlan) -> KeptDocuments:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return KeptDocuments.of_dataset(source, plan, tokenizer, self._stm_stop_token_ids(), self._stm_data_name)

    def _stm_keep_documents(self, source: "datasets.Dataset", plan: ScorePlan) -> str | None:
        """Keep the rows for `stm report` and the like; name of the file, or None where it could not be written."""
        try:
            return self._stm_kept_documents(source, plan).write(plan).name
        except Exception as error:  # a run does not end for what only shows it
            self._stm_warn("The rows could not be kept for stm inspect, sweep and report: %r", error)
            return None

    def _stm_write_report(self, run: MaskedRun) -> None:
        try:
            path = write_report([self.stm_scored_data(run)], Path(self.args.output_dir) / REPORT_NAME)
        except Exception as error:  # a run does not end for what only shows it
            self._stm_warn("The report could not be written: %r", error)
        else:
            self._stm_info("Report: %s", path)

    def _stm_model_name(self, options: STMOptions) -> str:
        """What the model that scores is called."""
        if options.stm_reference != REFERENCE_INITIAL:
            return options.stm_reference
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)

    def _stm_announce(self, receipt: Receipt, origin: str) -> None:
        """Say in one log line what is masked; warn about what may hurt."""
        self._stm_info(
            "STM is on: %s of %s label tokens masked (%.2f %%), those of perplexity above %s (%s nats, strategy %s, "
            "reference %s); %d of %d rows keep no token. Scores: %s, in %s. The training loss is over kept tokens: "
            "compare eval_loss, not it, with a plain run's.",
            f"{receipt['masked_tokens']:,}",
            f"{receipt['label_tokens']:,}",
            100 * receipt["masked_fraction"],
            receipt["threshold"],
            receipt["threshold_nats"],
            receipt["strategy"],
            receipt["reference"],
            receipt["rows_without_kept_tokens"],
            receipt["rows"],
            origin,
            receipt["scores_entry"],
        )
        self._stm_warn_of_stop_tokens(receipt)

    def _stm_warn_of_stop_tokens(self, receipt: Receipt) -> None:
        """Warn, once for each masked run, if too many stop tokens are masked."""
        if self._stm_warned_of_stop_tokens or receipt["stop_tokens_masked_fraction"] <= _STOP_TOKENS_WARNING:
            return
        self._stm_warned_of_stop_tokens = True
        self._stm_warn(
            "STM masks %.1f %% of the stop tokens (%d of %d): the model may not learn to stop. A base model or a "
            "foreign chat template is the usual cause. stm_keep_stop_tokens=True keeps them in the loss.",
            100 * receipt["stop_tokens_masked_fraction"],
            receipt["stop_tokens_masked"],
            receipt["stop_tokens"],
        )

    def _stm_find_or_make_scores(
        self, plan: ScorePlan, options: STMOptions, expected: ScoresKey | None = None
    ) -> tuple[ScoresKey, Any, str]:
        """Key and scores of a plan, and where they came from; with `expected`, only if that is the key."""
        store = ScoreStore(options.stm_scores_dir)
        self._stm_check_reference(options, plan.documents)
        if self._stm_unsharded is not None:
            if self._stm_unsharded[0].data != plan.fingerprint:
                raise ScoresError(
                    "The training set has changed since the trainer was made, and under FSDP no scores are made for "
                    "another one. Make a new trainer with it, after it has been scored."
                )
            return *self._stm_unsharded, "found"
        with self._stm_scoring_model(options) as (model, autocast):
            key = self._stm_key(model, autocast, plan)
            if expected is not None and key != expected:
                differing = [name for name, value in vars(expected).items() if value != getattr(key, name)]
                raise ScoresError(
                    f"The scores of the original start are gone from {store.path(expected)}, and cannot be made again "
                    f"from this model: its {' and '.join(differing)} differs. Put that folder back, or build the "
                    "trainer with the model that the run started from."
                )
            scores, origin = find_or_make_scores(
                store,
                key,
                plan,
                model,
                tokens_per_batch=options.tokens_per_batch(self.args.device.type),
                autocast=autocast,
                ranks=self._stm_ranks,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            )
        return key, scores, origin

    def _stm_key(self, model: Any, autocast: Autocast, plan: ScorePlan) -> ScoresKey:
        """Key of a model's scores, found by all processes if they share out its weights, else by the main one."""

        def make() -> ScoresKey:
            return _scores_key(model, autocast, plan, self.args.device.type)

        return self._stm_ranks.each(make)[0] if is_sharded(model) else self._stm_ranks.from_main(make)

    def _stm_find_scores_before_sharding(self, options: STMOptions) -> None:
        """Find the scores while the model is whole: under FSDP none are made."""
        plan = ScorePlan.of(_unmasked_documents(self.train_dataset))
        with self._stm_scoring_model(options) as (model, autocast):
            key = self._stm_key(model, autocast, plan)
        store = ScoreStore(options.stm_scores_dir)
        scores = self._stm_ranks.from_main(lambda: store.read(key, plan.num_scores))
        if scores is None:
            raise ScoresError(
                f"Under FSDP the scores must be there before training starts, and {store.path(key)} is missing "
                f"(weights {key.dtype}, autocast {key.autocast}). Make them with the same model, data and options in "
                "one process, without FSDP: `stm score` for TRL, `axolotl stm-score CONFIG` for Axolotl; with the "
                "adapter, if it is not a fresh LoRA."
            )
        self._stm_unsharded = key, scores

    @contextmanager
    def _stm_scoring_model(self, options: STMOptions) -> Iterator[tuple[Any, Autocast]]:
        """The model that scores and its autocast: the one about to train, as it will train, or the reference."""
        if options.stm_reference == REFERENCE_INITIAL:
            yield self.model, self.accelerator.autocast
        else:
            with loaded_reference(options, self.args.device) as model:
                yield model, nullcontext
                del model
            gc.collect()

    def _stm_scores_of_checkpoint(
        self, checkpoint: str, plan: ScorePlan, options: STMOptions
    ) -> tuple[ScoresKey, Any]:
        """Key and scores that the run started with whose checkpoint is resumed."""
        key = self._stm_key_of_checkpoint(checkpoint, plan)
        store = ScoreStore(options.stm_scores_dir)
        scores = self._stm_ranks.from_main(lambda: store.read(key, plan.num_scores))
        if scores is None:
            raise ScoresError(
                f"The scores of the original start are gone from {store.path(key)}, and the weights that {checkpoint} "
                "holds are not those they were made from. Put that folder back, or set stm_scores_dir to where it is."
            )
        return key, scores

    def _stm_score_before_resuming(self, checkpoint: str) -> None:
        """If a resumed run's scores are gone, make them while the model is still as its trainer was given it."""
        options = STMOptions.from_args(self.args)
        plan = ScorePlan.of(_unmasked_documents(self.train_dataset))
        key = self._stm_key_of_checkpoint(checkpoint, plan)
        if not self._stm_ranks.from_main(ScoreStore(options.stm_scores_dir).path(key).exists):
            self._stm_find_or_make_scores(plan, options, expected=key)

    def _stm_key_of_checkpoint(self, checkpoint: str, plan: ScorePlan) -> ScoresKey:
        key = ScoresKey(**_receipt_of(checkpoint)["scores_key"])
        if key.data != plan.fingerprint:
            raise ScoresError(
                f"{checkpoint} was trained on other rows: the token ids or label positions of this training set "
                "differ from those that were scored at the original start. Resume with the same data, chat template "
                "and max_length."
            )
        return key

    def _stm_check_same_options(self, checkpoint: str, original: Receipt, receipt: Receipt) -> None:
        for name in OPTIONS_OF_THE_MASK:
            if original[name] != receipt[name] and not (name == "threshold_nats" and original["mask_fraction"]):
                raise ValueError(
                    f"{checkpoint} was trained with {name}={original[name]!r}, this run has {receipt[name]!r}. A "
                    "resumed run keeps the masks of its start: set the option back, or start a new run."
                )

    def _stm_check_resumed(self, checkpoint: str, run: MaskedRun) -> None:
        original = _receipt_of(checkpoint)
        self._stm_check_same_options(checkpoint, original, run.receipt)
        if original["mask_digest"] != run.receipt["mask_digest"]:
            raise ValueError(
                f"The masks of this run are not those of {checkpoint} (digest {run.receipt['mask_digest'][:12]}… "
                f"against {original['mask_digest'][:12]}…), though scores and options agree: the tokenizer's or the "
                "model's stop tokens may have changed."
            )

    def _stm_check_collator(self, masked: "datasets.Dataset", masks: Masks, num_rows: int = 4) -> None:
        counts = masks.masked_per_row
        indices = sorted(sorted(range(len(counts)), key=lambda row: -counts[row])[:num_rows])
        signature = self._signature_columns
        rows = self._remove_unused_columns(masked.select(indices).remove_columns(MASKED_COLUMN), "STM check")
        self._signature_columns = signature
        offsets = masks.documents.row_offsets
        check_collator(
            self.data_collator,
            [rows[index] for index in range(len(rows))],
            [masks.masked[offsets[index] : offsets[index + 1]] for index in indices],
        )

    def _stm_train_dataloader(self) -> Any:
        """The host's dataloader of the masked data set, whose batches carry their count of masked tokens."""
        signature = self._signature_columns
        if signature is None:
            self._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or []), MASKED_COLUMN]
        try:
            loader = super().get_train_dataloader()
        finally:
            self._signature_columns = signature
        # Only now: hosts look at the collator while they build the loader.
        inner = getattr(loader, "base_dataloader", loader)
        inner.collate_fn = MaskCounter(inner.collate_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The host's micro-batches of a step, with at least 1 as their number of kept tokens."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._stm_totals is not None and batches:
            counts = self._stm_mask_live(batches)
            self._stm_counts["sum"] = self._stm_counts.get("sum", 0) + counts
            num_items_in_batch = self._get_num_items_in_batch(batches, device)
            if torch.is_tensor(num_items_in_batch):
                num_items_in_batch = num_items_in_batch.clamp(min=1)
            return batches, num_items_in_batch
        num_masked = sum(batch.pop(MASKED_COLUMN).sum() for batch in batches if MASKED_COLUMN in batch)
        num_kept = sum(_num_predicted(batch) for batch in batches)
        if torch.is_tensor(num_masked) and torch.is_tensor(num_kept):
            counts = torch.stack([num_kept.to(device), num_masked.to(device)])
            if self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, "sum")
            self._stm_counts["sum"] = self._stm_counts.get("sum", 0) + counts
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return batches, num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add STM's metrics to the logs of training."""
        receipt = self._stm_state.receipt
        if receipt is not None and ("loss" in logs or "train_loss" in logs) and "sum" in self._stm_counts:
            self._stm_warn_of_stop_tokens(receipt)
            num_kept, num_masked = self._stm_counts.pop("sum").tolist()
            logs["stm/kept_tokens"] = num_kept
            logs["stm/masked_fraction"] = num_masked / max(1, num_kept + num_masked)
            if receipt["threshold"] != "inf":  # JSON, and so trainer_state.json, has no infinity
                logs["stm/threshold"] = receipt["threshold"]
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the receipt beside the model."""
        if self._stm_state.receipt is not None and self.args.should_save:
            write_receipt(self._stm_state.receipt, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _stm_counts_tokens(self) -> bool:
        """Whether the host divides by the number of kept tokens of a whole step."""
        return self._stm_loss_takes_count() and counts_predicted_labels(self)

    def _stm_loss_takes_count(self) -> bool:
        return bool(self.model_accepts_loss_kwargs) or self.compute_loss_func is not None

    def _stm_stop_token_ids(self) -> set[int]:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        of_model = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = {*(of_model if isinstance(of_model, list) else [of_model]), getattr(tokenizer, "eos_token_id", None)}
        return {token_id for token_id in ids if token_id is not None}

    def _stm_info(self, message: str, *values: Any) -> None:
        if self.is_world_process_zero():
            self._stm_logger.info(message, *values)

    def _stm_warn(self, message: str, *values: Any) -> None:
        if self.is_world_process_zero():
            self._stm_logger.warning(message, *values)


def _scores_key(model: Any, autocast: Autocast, plan: ScorePlan, device: str) -> ScoresKey:
    with autocast():
        dtype = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "none"
    return ScoresKey(
        model=model_fingerprint(model),
        quantization=quantization(model),
        dtype=weights_dtype(model),
        autocast=dtype,
        data=plan.fingerprint,
    )


def _num_predicted(batch: dict[str, Any]) -> torch.Tensor:
    """Labels of a batch that the loss is over; nothing predicts position 0."""
    return (batch["labels"][..., 1:] != IGNORE_INDEX).sum()


def check_unmasked(dataset: Any) -> None:
    """Raise ValueError for a data set that STM has masked already."""
    if isinstance(dataset, datasets.Dataset) and MASKED_COLUMN in dataset.column_names:
        raise ValueError(
            f"The training set has been masked by STM already (it has a column {MASKED_COLUMN!r}): masking it again "
            "would leave out what other scores chose. Give the data set as it was before."
        )


def _unmasked_documents(dataset: "datasets.Dataset") -> Documents:
    check_unmasked(dataset)
    return Documents.from_dataset(dataset)


def _receipt_of(checkpoint: str) -> Receipt:
    receipt = read_receipt(checkpoint, STMState.__name__)
    if receipt is None:
        raise ValueError(
            f"{checkpoint} was trained without STM: its trainer_state.json has no receipt, so there are no "
            "perplexities of an original start. Resume it without STM, or start a new STM run from its weights."
        )
    return receipt

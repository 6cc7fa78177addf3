"""Selective Token Masking for any `transformers.Trainer`: the methods of the host that are overridden, and why.

Masks are laid in the labels before these are counted or trained, so token counts and every fused loss work as the host
has them; collators and packing too, where masks are made ahead of training (`ahead.py`) and not live at every step
(`live.py`). The trainer holds one of the two, a `Masking`. The seams, and all that is overridden:

- `_prepare_for_training`: the model is placed, cast and under autocast, so a run begins. Where the training set is
  masked ahead, the dataloader is built anew from the random state that the host's own was built from.
- `get_train_dataloader`: to know that state.
- `_load_from_checkpoint`: the last moment at which a resumed run has the weights of its start.
- `get_batch_samples`: sees all micro-batches of a step before any is counted or trained: they are masked, or counted
  for the metrics; a step without kept tokens divides by 1.
- `save_model`, `log`: the receipt and the metrics.

`stm_score()` goes through the same door and stops before the first step.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import datasets
import torch

from ..constants import MASKED_COLUMN, REPORT_NAME
from ..inspection.scored import ScoredData
from ..logs import show_log_lines
from ..options import REFERENCE_CURRENT, STMOptions
from ..randomness import RandomState, preserved_random_state
from ..report.page import write_report
from ..scoring.nll import check_scorable
from .ahead import MaskedRun, MaskingAhead
from .checkpoint import STMState
from .collators import MaskCounter
from .host import Host
from .live import MaskingLive
from .masks import check_unmasked, is_masked
from .receipt import Receipt, write_receipt

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class Masking(Protocol):
    """How a trainer's labels are masked: what the seams ask of it, in the order of a run.

    All processes call every method but `check` together.
    """

    masks_steps: bool
    """Whether `prepare_step` masks labels, so that they must be counted after it."""

    def check(self) -> dict[str, Any]:
        """Check the training set before anything is trained; what there is that all processes must agree on."""

    def set_up(self) -> None:
        """Do what can only be done while the model is as the trainer was given it."""

    def before_loading(self, checkpoint: str) -> None:
        """Do what can only be done before a checkpoint's weights take the place of those of the start."""

    def begin(self, checkpoint: str | None) -> "datasets.Dataset | None":
        """Begin a run, or go on with the checkpoint's.

        Returns:
            What takes the place of the training set, if anything does.
        """

    def prepare_step(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """Make a step's micro-batches what is to be trained, in place.

        Returns:
            Kept and masked label tokens over all ranks, shape `(2,)`; None where that is not known.
        """

    @property
    def receipt(self) -> Receipt | None:
        """What `stm.json` says as of now; None before the first run."""

    @property
    def run(self) -> MaskedRun | None:
        """What has been masked for good; None before the first run, and where every step is masked anew."""


class _Scored(Exception):  # noqa: N818
    """Ends a `train()` that was only to score."""


class STMTrainerMixin(_Trainer):
    """Puts Selective Token Masking (arXiv 2501.14315) into a `transformers.Trainer`, left of it in the bases.

    The host's arguments carry the fields of `STMOptions`. The host's `__init__` ends with `_stm_setup()`.
    """

    train_dataset: Any
    data_collator: Any
    _signature_columns: Any
    neftune_hook_handle: Any = None
    model_accepts_loss_kwargs: bool

    _stm_logger = logger
    """Where log lines go; hosts may show the INFO lines of none but their own."""

    _stm_data_name: str | None = None
    """What reports call the training set; None for the name that it was loaded by."""

    _stm_trains_first_label = False
    """Whether the host trains a label at a document's position 0, which has no score."""

    _stm_host_takes_count: bool | None = None
    """Whether the host by itself gives its loss the number of tokens, where that was changed; None where not."""

    def _stm_setup(self) -> None:
        """Check, before anything is trained, all that can be checked; raise ValueError for what cannot be masked."""
        show_log_lines()
        self._stm_host = Host(self)
        self._stm_masking: Masking = MaskingAhead(self._stm_host)
        self._stm_state = STMState()
        self._stm_loader_state = RandomState()
        self._stm_counts: torch.Tensor | None = None
        self._stm_only_scores = False
        ranks = self._stm_host.ranks
        facts = ranks.each(self._stm_checked_facts)
        ranks.check_agreement(facts[ranks.index])
        self._stm_masking.set_up()
        self.add_callback(self._stm_state)
        self._stm_average_tokens = self.args.average_tokens_across_devices
        if not self.args.average_tokens_across_devices:
            self.args.average_tokens_across_devices = True
            self._stm_host.info(
                "average_tokens_across_devices is on while STM is: its loss is over all tokens of a step."
            )
        if self._stm_host.normalization == "host":
            self._stm_host.warn(
                "The host does not divide the loss of %s by the number of kept tokens of a step: its own averaging "
                "stays.",
                type(self.model).__name__,
            )

    def _stm_checked_facts(self) -> dict[str, Any]:
        """What all processes must agree on, after the checks that each makes by itself."""
        options = self._stm_host.options
        self._stm_check_supported(options)
        check_unmasked(self.train_dataset)
        facts = {name: value for name, value in vars(options).items() if name != "stm_scores_dir"}
        facts["stm_reference_kwargs"] = options.plain_reference_kwargs()  # configs have no equality
        self._stm_choose()
        return facts | self._stm_masking.check()

    def _stm_check_supported(self, options: STMOptions) -> None:
        if options.stm_reference != REFERENCE_CURRENT and not isinstance(self.train_dataset, datasets.Dataset):
            raise ValueError(
                f"stm_reference={options.stm_reference!r} scores the training set before the first step, which a "
                f"streaming or custom data set ({type(self.train_dataset).__name__}) does not allow. Load it as a "
                "datasets.Dataset (streaming=False), or, unless stm_strategy compares with a tuned model, set "
                "stm_reference to 'current'."
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

    def _stm_choose(self) -> None:
        """Hold the masking that `stm_reference` asks for, which may have been changed."""
        live = self._stm_host.options.stm_reference == REFERENCE_CURRENT
        kind: type[MaskingLive | MaskingAhead] = MaskingLive if live else MaskingAhead
        if isinstance(self._stm_masking, kind):
            return
        if self._stm_run is not None:
            raise ValueError(
                "stm_reference changed to 'current' after the training set was masked. Make a new trainer."
            )
        self._stm_masking = kind(self._stm_host)

    @property
    def _stm_run(self) -> MaskedRun | None:
        """What was masked ahead, if anything was."""
        return self._stm_masking.run

    def stm_score(self) -> MaskedRun:
        """Score and mask the training set as `train()` would, with the model prepared as for training; train nothing.

        Returns:
            What was scored and masked.
        """
        if self._stm_host.options.stm_reference == REFERENCE_CURRENT:
            raise ValueError(
                "stm_reference='current' scores at every step of training; there is nothing to score ahead."
            )
        self._stm_only_scores = True
        try:
            with preserved_random_state():
                self.train()
        except _Scored:
            pass
        finally:
            self._stm_only_scores = False
            self.is_in_train = False
            noise, self.neftune_hook_handle = self.neftune_hook_handle, None
            if noise is not None:
                noise.remove()  # as the end of `train` would have
        assert self._stm_run is not None
        return self._stm_run

    def stm_scored_data(self, run: MaskedRun) -> ScoredData:
        """A masked training set as `stm inspect`, `stm sweep` and `stm report` take it; on the main process."""
        kept = self._stm_host.kept_documents(run.source, run.plan)
        return ScoredData(kept, run.nll, run.key, run.receipt, tuned_nll=run.tuned_nll)

    def get_train_dataloader(self) -> Any:
        """The host's, remembering the random state that it was built from."""
        self._stm_loader_state = RandomState()
        return super().get_train_dataloader()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_in_train and model is None:
            self._stm_choose()
            with preserved_random_state():
                self._stm_masking.before_loading(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with preserved_random_state():
            is_new = self._stm_mask(resume_from_checkpoint)
            if self._stm_only_scores:
                raise _Scored
            if is_new:
                self._stm_loader_state.restore()
                train_dataloader = self._stm_train_dataloader()
                self.callback_handler.train_dataloader = train_dataloader
        return model, train_dataloader

    def _stm_mask(self, checkpoint: str | None) -> bool:
        """Begin a masked run, or go on with the checkpoint's; whether it has a training set of its own."""
        self._stm_choose()
        masking = self._stm_masking
        masked = masking.begin(checkpoint)
        if masked is not None:
            self.train_dataset = masked
        self._stm_state.make_receipt = lambda: masking.receipt
        if masking.run is not None:  # for `save_state`, which asks no callback
            self.state.stateful_callbacks[STMState.__name__] = self._stm_state.state()
        self._stm_counts = None
        if self.args.should_save and not self._stm_only_scores:
            assert masking.receipt is not None
            write_receipt(masking.receipt, self.args.output_dir)
        if self.args.should_save and masking.run is not None and self._stm_host.options.stm_report:
            self._stm_write_report(masking.run)
        return masked is not None

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
        """The host's micro-batches of a step, masked, with at least 1 as their number of kept tokens."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = self._stm_masking.prepare_step(batches, device)
        if counts is not None:
            self._stm_counts = counts if self._stm_counts is None else self._stm_counts + counts
        if self._stm_masking.masks_steps:
            num_items_in_batch = self._get_num_items_in_batch(batches, device)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return batches, num_items_in_batch

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The host's; of the training set as it was before it was masked."""
        return super().evaluate(self._stm_unmasked(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's; of the training set as it was before it was masked."""
        return super().predict(self._stm_unmasked(test_dataset), *args, **kwargs)

    def _stm_unmasked(self, dataset: Any) -> Any:
        run = self._stm_run
        masked = None if run is None else vars(run).get("masked")  # not made only to be compared
        if run is not None and masked is not None and dataset is masked:
            return run.source
        if is_masked(dataset):
            self._stm_host.warn(
                "Rows of the training set as STM masked it are evaluated: the loss leaves their masked tokens out. "
                "For all tokens, take the rows from the data set as it was given, or before train()."
            )
        return dataset

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, whose loss is averaged as it is without STM."""
        in_training = self.args.average_tokens_across_devices, self.model_accepts_loss_kwargs
        self.args.average_tokens_across_devices = self._stm_average_tokens
        if self._stm_host_takes_count is not None:
            self.model_accepts_loss_kwargs = self._stm_host_takes_count
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices, self.model_accepts_loss_kwargs = in_training

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add STM's metrics to the logs of training."""
        receipt = self._stm_state.receipt
        if receipt is not None and ("loss" in logs or "train_loss" in logs) and self._stm_counts is not None:
            self._stm_host.warn_of_stop_tokens(receipt)
            num_kept, num_masked = self._stm_counts.tolist()
            self._stm_counts = None
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

    def _stm_write_report(self, run: MaskedRun) -> None:
        try:
            path = write_report([self.stm_scored_data(run)], Path(self.args.output_dir) / REPORT_NAME)
        except Exception as error:  # a run does not end for what only shows it
            self._stm_host.warn("The report could not be written: %r", error)
        else:
            self._stm_host.info("Report: %s", path)

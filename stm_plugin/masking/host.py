"""The host's trainer as STM sees it: what is read of it, in STM's own words, and the lines that it logs."""

from typing import TYPE_CHECKING, Any

import torch

from .._compat import counts_predicted_labels
from ..constants import MASKED_COLUMN
from ..options import STMOptions
from ..ranks import Ranks
from ..scoring.document_store import KeptDocuments
from ..scoring.fingerprint import autocast_dtype
from ..scoring.nll import Autocast, causal_lm, function_takes_count
from ..scoring.plan import ScorePlan
from .collators import check_collator
from .masks import Masks
from .receipt import Receipt

if TYPE_CHECKING:
    from datasets import Dataset

_STOP_TOKENS_WARNING = 0.05


class Host:
    """A view of a trainer: all is read when it is asked for, since arguments, model and data may be changed.

    Args:
        trainer: A `transformers.Trainer` with `STMTrainerMixin`.

    Attributes:
        ranks: The processes of the run.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._warned_of_stop_tokens = False
        self._loss_function: tuple[Any, bool] | None = None  # and whether it takes a count
        self.ranks = Ranks(trainer.args.process_index, trainer.args.world_size)

    @property
    def options(self) -> STMOptions:
        """The options in force, checked."""
        return STMOptions.from_args(self._trainer.args)

    @property
    def only_scores(self) -> bool:
        """Whether nothing will be trained: `train()` was called by `stm_score()`."""
        return self._trainer._stm_only_scores

    # The model.

    @property
    def model(self) -> Any:
        """The model in training, as its forward is called while it is scored."""
        return self._trainer.model

    @property
    def makes_models(self) -> bool:
        """Whether every `train()` begins with a new model."""
        return self._trainer.model_init is not None

    @property
    def model_name(self) -> str:
        """What the model is called: where it was loaded from, or its class."""
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether FSDP will share out the model's weights."""
        return self._trainer.is_fsdp_enabled

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self._trainer.args.device

    @property
    def autocast(self) -> Autocast:
        """Makes the context that the model trains in."""
        return self._trainer.accelerator.autocast

    @property
    def autocast_dtype(self) -> str:
        """Dtype that training autocasts to, or `none`."""
        return autocast_dtype(self.autocast, self.device)

    # The data.

    @property
    def train_dataset(self) -> Any:
        """The training set, masked or not."""
        return self._trainer.train_dataset

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model in training."""
        processing_class = self._trainer.processing_class
        return getattr(processing_class, "tokenizer", processing_class)

    @property
    def stop_token_ids(self) -> set[int]:
        """Ids that end a turn or a text, by the model and by the tokenizer."""
        of_model = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        of_tokenizer = getattr(self.tokenizer, "eos_token_id", None)
        ids = {*(of_model if isinstance(of_model, list) else [of_model]), of_tokenizer}
        return {token_id for token_id in ids if token_id is not None}

    @property
    def trains_first_label(self) -> bool:
        """Whether a label at a document's position 0, which has no score, is trained."""
        return self._trainer._stm_trains_first_label

    def kept_documents(self, dataset: "Dataset", plan: ScorePlan) -> KeptDocuments:
        """A data set's rows with what it takes to show them."""
        return KeptDocuments.of_dataset(
            dataset, plan, self.tokenizer, self.stop_token_ids, self._trainer._stm_data_name
        )

    def check_collator(self, masked: "Dataset", masks: Masks, num_rows: int = 4) -> None:
        """Check on a masked data set's rows, those with the most masked tokens, that the collator keeps the masks."""
        counts = masks.masked_per_row
        indices = sorted(sorted(range(len(counts)), key=lambda row: -counts[row])[:num_rows])
        trainer = self._trainer
        signature = trainer._signature_columns
        rows = trainer._remove_unused_columns(masked.select(indices).remove_columns(MASKED_COLUMN), "STM check")
        trainer._signature_columns = signature
        offsets = masks.documents.row_offsets
        check_collator(
            trainer.data_collator,
            [rows[index] for index in range(len(rows))],
            [masks.masked[offsets[index] : offsets[index + 1]] for index in indices],
        )

    # The loss.

    @property
    def loss_takes_count(self) -> bool:
        """Whether the loss is divided by a number of tokens that it is given."""
        function = self._trainer.compute_loss_func
        if function is None:
            return bool(self._trainer.model_accepts_loss_kwargs)
        if self._loss_function is None or self._loss_function[0] is not function:
            vocab_size = causal_lm(self.model).config.get_text_config().vocab_size
            self._loss_function = function, function_takes_count(function, vocab_size)
        return self._loss_function[1]

    @property
    def normalization(self) -> str:
        """`global` if a step's loss is divided by its kept tokens over all ranks; `host` if the host averages it."""
        return "global" if self.loss_takes_count and counts_predicted_labels(self._trainer) else "host"

    def sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' counts, any shape."""
        return self._trainer.accelerator.reduce(counts, "sum") if self.ranks.count > 1 else counts

    # What users see.

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return self._trainer.is_world_process_zero() and not self._trainer.args.disable_tqdm

    def info(self, message: str, *values: Any) -> None:
        """Log a line, once for all processes."""
        if self._trainer.is_world_process_zero():
            self._trainer._stm_logger.info(message, *values)

    def warn(self, message: str, *values: Any) -> None:
        """Log a warning, once for all processes."""
        if self._trainer.is_world_process_zero():
            self._trainer._stm_logger.warning(message, *values)

    def warn_of_stop_tokens(self, receipt: Receipt, *, again: bool = False) -> None:
        """Warn, only once, if too many stop tokens are masked.

        Args:
            receipt: What is masked.
            again: Whether to warn of it though there was a warning before.
        """
        if again:
            self._warned_of_stop_tokens = False
        if self._warned_of_stop_tokens or receipt["stop_tokens_masked_fraction"] <= _STOP_TOKENS_WARNING:
            return
        self._warned_of_stop_tokens = True
        self.warn(
            "STM masks %.1f %% of the stop tokens (%d of %d): the model may not learn to stop. A base model or a "
            "foreign chat template is the usual cause. stm_keep_stop_tokens=True keeps them in the loss.",
            100 * receipt["stop_tokens_masked_fraction"],
            receipt["stop_tokens_masked"],
            receipt["stop_tokens"],
        )

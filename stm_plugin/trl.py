"""Selective Token Masking for TRL: `STMSFTConfig` and `STMSFTTrainer`. Here STM is put into TRL's trainer."""

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from ._compat import check_trl_version
from .constants import PAPER_CITATION, PAPER_ID, PAPER_TITLE
from .logs import show_log_lines
from .masking.masks import check_unmasked
from .masking.mixin import STMTrainerMixin
from .options import STMOptions

logger = logging.getLogger(__name__)

check_trl_version()


@dataclass
class STMSFTConfig(STMOptions, SFTConfig):
    """TRL's `SFTConfig` with the STM options: every field of `STMOptions` beside every field of `SFTConfig`.

    Raises:
        ValueError: For an STM option with a value that is not allowed.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "stm_reference_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """The fields as what JSON can hold, as trackers ask for them."""
        fields: dict[str, Any] = super().to_dict()
        return fields | {"stm_reference_kwargs": self.plain_reference_kwargs()}


class STMSFTTrainer(STMTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with Selective Token Masking (arXiv 2501.14315).

    Takes what `SFTTrainer` takes. Before the first step the training set's label tokens are scored with the model as
    it will train, and the labels of those above the threshold become -100; all else is TRL's.

    Args:
        model: As for `SFTTrainer`.
        args: `STMSFTConfig`. An `SFTConfig`, `TrainingArguments` or None becomes one with the STM defaults.
        *others: As for `SFTTrainer`, in the same order.
        **keywords: As for `SFTTrainer`.

    Raises:
        ValueError: For options, data or a set-up that cannot be masked exactly, saying what to change.
    """

    _tag_names = [*SFTTrainer._tag_names, "stm"]
    _name = "STM"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": PAPER_CITATION}

    @functools.wraps(SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, model: Any, args: Any = None, *others: Any, **keywords: Any) -> None:
        show_log_lines()
        if not isinstance(args, STMSFTConfig):
            given = "no args" if args is None else type(args).__name__
            args = STMSFTConfig(_default_output_dir(model)) if args is None else _with_stm_defaults(args)
            logger.info("%s given: STM runs with its defaults (stm_threshold=%s).", given, STMOptions().threshold)
        given_data = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *others, **keywords).arguments
        check_unmasked(given_data.get("train_dataset"))
        super().__init__(model, args, *others, **keywords)
        if self._is_vision_dataset:
            raise ValueError(
                "STM cannot mask vision data: its token ids are only made batch by batch, by the collator. Train on "
                "text, or use SFTTrainer."
            )
        if "seq_lengths" in (getattr(self.train_dataset, "column_names", None) or []) and not self.padding_free:
            raise ValueError(
                "The training set has the column seq_lengths, which cuts a row into documents, and TRL trains whole "
                "rows unless padding_free=True: tokens would be scored with another context than they are trained "
                "with. Set padding_free=True, or remove the column."
            )
        self._stm_setup()


def _with_stm_defaults(args: TrainingArguments) -> STMSFTConfig:
    """The same arguments with the STM defaults; what the argument object has become since it was made stays."""
    if not isinstance(args, SFTConfig):
        fields = args.to_dict() | {"hub_token": args.hub_token}  # to_dict hides the token; TRL converts likewise
        args = SFTConfig(**fields)
    config = STMSFTConfig.__new__(STMSFTConfig)
    config.__dict__.update(vars(STMOptions()) | vars(args))
    config.check()
    return config


def _default_output_dir(model: Any) -> str:
    """The folder name that `SFTTrainer` would choose."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return f"{name.split('/')[-1]}-SFT"

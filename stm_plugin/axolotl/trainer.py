"""STM in a trainer that Axolotl has built."""

import logging
from typing import Any

from transformers import Trainer

from ..masking.mixin import STMTrainerMixin
from ..options import STMOptions
from ..scoring.nll import loss_facts


def put_stm_into(trainer: Any, options: STMOptions) -> None:
    """Make a trainer one that masks: its class gains `STMTrainerMixin`, its arguments the options.

    Args:
        trainer: A `transformers.Trainer` of any class, not trained yet.
        options: Checked STM options.

    Raises:
        ValueError: For a model, data set or set-up that cannot be masked exactly.
    """
    host = type(trainer)
    if host.train is not Trainer.train:
        raise ValueError(
            f"STM cannot mask what {host.__name__} trains: its `train` is not that of transformers.Trainer. Remove "
            "`plugins: stm`, or the plugin or `trainer_cls` that brings this trainer."
        )
    trainer.__class__ = type(host.__name__, (STMTrainerMixin, host), {"__module__": host.__module__})
    for name, value in vars(options).items():
        setattr(trainer.args, name, value)
    trainer._stm_logger = logging.getLogger("axolotl.stm")  # Axolotl shows INFO lines of no other names
    trainer._stm_check_supported(options)
    if trainer.compute_loss_func is None:
        # Axolotl 0.19 denies that nearly any model takes a count, and then averages the means of micro-batches;
        # transformers does not know that the losses that Axolotl puts in the place of its own shift labels.
        facts = loss_facts(trainer.model)
        trainer.model_accepts_loss_kwargs, trainer._loss_shifts_labels = facts
    # In a pack, the label at a document's position 0 is predicted by the document before it.
    trainer._stm_trains_first_label = bool(getattr(trainer.args, "sample_packing", False))
    trainer._stm_setup()

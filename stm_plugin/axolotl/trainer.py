"""STM in a trainer that Axolotl has built."""

from typing import Any

from ..mixin import STMTrainerMixin
from ..options import STMOptions
from ..scoring import loss_takes_count


def put_stm_into(trainer: Any, options: STMOptions) -> None:
    """Make a trainer one that masks: its class gains `STMTrainerMixin`, its arguments the options.

    Args:
        trainer: A `transformers.Trainer` of any class, not trained yet.
        options: Checked STM options.

    Raises:
        ValueError: For a model, data set or set-up that cannot be masked exactly.
    """
    host = type(trainer)
    trainer.__class__ = type(host.__name__, (STMTrainerMixin, host), {"__module__": host.__module__})
    for name, value in vars(options).items():
        setattr(trainer.args, name, value)
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        # Axolotl 0.19 says no for nearly every model, and then averages the means of micro-batches.
        trainer.model_accepts_loss_kwargs = loss_takes_count(trainer.model)
    # In a pack, the label at a document's position 0 is predicted by the document before it.
    trainer._stm_trains_first_label = bool(getattr(trainer.args, "sample_packing", False))
    trainer._stm_setup()

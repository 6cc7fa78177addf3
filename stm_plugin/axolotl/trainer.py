"""STM in a trainer that Axolotl has built."""

import logging
from typing import Any

from transformers import Trainer

from ..masking.mixin import STMTrainerMixin
from ..options import STMOptions
from ..scoring.nll import LossFacts, causal_lm, loss_facts


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
        trainer._stm_host_takes_count = bool(trainer.model_accepts_loss_kwargs)
        trainer.model_accepts_loss_kwargs = True  # or a loss that would heed the count is not given it
        facts = _loss_facts(trainer, host)
        trainer.model_accepts_loss_kwargs, trainer._loss_shifts_labels = facts
        _warn_of_router_loss(trainer)
    # In a pack, the label at a document's position 0 is predicted by the document before it.
    trainer._stm_trains_first_label = bool(getattr(trainer.args, "sample_packing", False))
    trainer._stm_setup()


def _loss_facts(trainer: Any, host: Any) -> LossFacts:
    """Facts about the loss that a trainer computes; ValueError where it is not over the labels of the batch."""
    from axolotl.core.trainers.base import AxolotlTrainer

    if host.compute_loss in (Trainer.compute_loss, AxolotlTrainer.compute_loss):
        return loss_facts(trainer.model)
    try:
        return loss_facts(
            trainer.model, lambda batch, count: trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        )
    except Exception as error:
        raise ValueError(
            f"STM cannot mask what {host.__name__} trains: its `compute_loss` is not one over the `labels` of a batch "
            f"({error}). Remove `plugins: stm`, or the plugin, `trainer_cls` or model that brings this trainer."
        ) from error


def _warn_of_router_loss(trainer: Any) -> None:
    """Warn where a router's auxiliary loss, which takes no count, is summed and was averaged without STM."""
    config = causal_lm(trainer.model).config.get_text_config()
    parts = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    if (
        parts > 1
        and trainer.model_accepts_loss_kwargs
        and not trainer._stm_host_takes_count
        and getattr(config, "output_router_logits", False)
        and getattr(config, "router_aux_loss_coef", 0)
    ):
        trainer._stm_logger.warning(
            "With STM the router's auxiliary loss is summed over the %d micro-batches of a step, where Axolotl "
            "averages it. For the same weight of it, set overrides_of_model_config: {router_aux_loss_coef: %g}.",
            parts,
            config.router_aux_loss_coef / parts,
        )

"""`STMPlugin`: where Axolotl meets `STMTrainerMixin`."""

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from ..masking.receipt import write_receipt
from .conflicts import check_conflicts
from .names import check_active, is_active
from .schema import options_of
from .trainer import put_stm_into


class STMPlugin(BasePlugin):
    """Selective Token Masking (arXiv 2501.14315) for Axolotl; does nothing for a config that does not list it.

    The trainer that Axolotl builds, of whatever class, is given the mixin once it exists: no slot for trainer classes
    or collators is taken from other plugins.
    """

    def register(self, cfg: Any) -> None:
        """Check a config before it is validated; raise ValueError for what cannot be masked."""
        check_active(cfg)
        if is_active(cfg):
            options_of(cfg)
            check_conflicts(cfg)

    def get_input_args(self) -> str:
        """Where the schema of the options is."""
        return "stm_plugin.axolotl.schema.STMArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put STM into the trainer that will train."""
        if is_active(cfg):
            check_conflicts(cfg)  # again: other plugins and the schema have had their say
            put_stm_into(trainer, options_of(cfg))
            trainer._stm_data_name = ", ".join(Path(str(data["path"])).stem for data in cfg.datasets or []) or None
            self._trainer = trainer

    def post_train(self, cfg: Any, model: Any) -> None:
        """Leave the receipt beside the model, which Axolotl saves without its trainer.

        Raises:
            RuntimeError: If a loop of another kind than `transformers.Trainer`'s has trained unmasked.
        """
        trainer, self._trainer = getattr(self, "_trainer", None), None
        if not is_active(cfg) or trainer is None:
            return
        if trainer._stm_state.receipt is None:
            raise RuntimeError(
                f"{type(trainer).__name__} has trained without Selective Token Masking: its loop is not that of "
                "transformers.Trainer. Remove `plugins: stm`, or the plugin or `trainer_cls` that brings this trainer."
            )
        if trainer.args.should_save:
            write_receipt(trainer._stm_state.receipt, trainer.args.output_dir)

"""`STMPlugin`: where Axolotl meets `STMTrainerMixin`."""

from typing import Any

from axolotl.integrations.base import BasePlugin

from .conflicts import check_conflicts, check_text_only
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

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Load nothing; stop a model that Axolotl has found to be multimodal before its data are prepared."""
        if is_active(cfg) and not preprocess:
            check_text_only(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put STM into the trainer that will train."""
        if is_active(cfg):
            put_stm_into(trainer, options_of(cfg))

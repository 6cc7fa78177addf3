"""The receipt in a checkpoint: what a resumed run must share with its start."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .receipt import OPTIONS_OF_THE_MASK, Receipt, read_receipt


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


def receipt_of(checkpoint: str) -> Receipt:
    """The receipt of the run that left a checkpoint.

    Raises:
        ValueError: If that run had no STM.
    """
    receipt = read_receipt(checkpoint, STMState.__name__)
    if receipt is None:
        raise ValueError(
            f"{checkpoint} was trained without STM: its trainer_state.json has no receipt, so there are no "
            "perplexities of an original start. Resume it without STM, or start a new STM run from its weights."
        )
    return receipt


def check_same_options(checkpoint: str, original: Receipt, receipt: Receipt) -> None:
    """Raise ValueError unless a run has the options of the mask that its checkpoint was trained with.

    Args:
        checkpoint: The checkpoint's folder.
        original: Its receipt.
        receipt: The receipt of the run that resumes it.
    """
    for name in OPTIONS_OF_THE_MASK:
        if original.get(name) != receipt[name] and not (name == "threshold_nats" and original["mask_fraction"]):
            raise ValueError(
                f"{checkpoint} was trained with {name}={original.get(name)!r}, this run has {receipt[name]!r}. A "
                "resumed run keeps the masks of its start: set the option back, or start a new run."
            )

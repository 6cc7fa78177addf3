"""A trainer callback that tells the demo's progress in plain lines and keeps its losses and start time."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """Says one line at each log of the trainer.

    Args:
        title: What is trained.
        say: Takes one line at a time.

    Attributes:
        losses: The logged training losses, in nats per kept token.
        train_begin: `time.monotonic()` just before the first step, when scoring is done.
    """

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self.title = title
        self.say = say
        self.losses: list[float] = []
        self.train_begin = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes the time."""
        self.train_begin = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Says where training is."""
        if logs is not None and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            seconds = time.monotonic() - self.train_begin
            self.say(
                f"{self.title}: step {state.global_step} of {state.max_steps}, loss {self.losses[-1]:.3f}, "
                f"{seconds:.0f} s"
            )

"""The global random state of Python, NumPy and torch, taken and put back: STM must move none of it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """A copy of the state of all global generators at the time it is made."""

    python: Any = field(default_factory=random.getstate)
    numpy: Any = field(default_factory=np.random.get_state)
    torch_cpu: torch.Tensor = field(default_factory=torch.get_rng_state)
    torch_cuda: list[torch.Tensor] = field(
        default_factory=lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    )

    def restore(self) -> None:
        """Put the state back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(self.torch_cuda)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave all global generators as they were, whatever is drawn within."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()

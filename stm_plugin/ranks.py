"""What the processes of a run tell one another; where there is one process, nothing."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Every method is for all processes to call, in the same order. An error that one of them meets is raised on all, so
    that none waits for another.

    Attributes:
        index: Rank of this process.
        count: Processes there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reads and writes."""
        return self.index == 0

    def gather(self, value: Value) -> list[Value]:
        """The value of every process, in the order of ranks."""
        return gather_object([value]) if self.count > 1 else [value]

    def largest(self, numbers: list[int]) -> list[int]:
        """The largest number of all processes at each place, as many as the longest list has."""
        return [max(some) for some in zip_longest(*self.gather(numbers), fillvalue=0)]

    def from_main(self, make: Callable[[], Value]) -> Value:
        """A value that the main process makes, on every process."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            outcome = list(_attempt(make))
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def each(self, make: Callable[[], Value]) -> list[Value]:
        """The values that all processes make, each its own, in the order of ranks."""
        if self.count == 1:
            return [make()]
        outcomes = self.gather(_attempt(make))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def check_agreement(self, facts: dict[str, Any]) -> None:
        """Check that every process holds the same facts.

        Raises:
            ValueError: On every process, naming the facts that differ and each process's.
        """
        everyones = self.gather(facts)
        differing = [
            f"{name} ({', '.join(f'rank {rank}: {own.get(name)!r}' for rank, own in enumerate(everyones))})"
            for name in dict.fromkeys(name for own in everyones for name in own)
            if any(own.get(name) != everyones[0].get(name) for own in everyones)
        ]
        if differing:
            raise ValueError(
                f"The processes of this run disagree on {' and '.join(differing)}. Start all of them with the same "
                "options, the same data in the same order, and the same model."
            )


def _attempt(make: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # raised on every process
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot travel between processes."""
    try:
        copy.deepcopy(error)
        return error
    except Exception:  # some exceptions cannot be built from their arguments
        return RuntimeError(f"{type(error).__name__}: {error}")

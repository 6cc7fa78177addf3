"""What generates answers: the types that every engine shares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Messages = list[dict[str, Any]]
"""A chat: mappings of `role` and `content`."""

STOP = "stop"
"""The model ended its answer itself."""
LENGTH = "length"
"""The answer was cut at the limit of new tokens."""
ERROR = "error"
"""There is no answer; `Generated.error` says why."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Defaults are the paper's (arXiv 2501.14315).

    Attributes:
        temperature: Of the softmax; 0 takes the most likely token.
        top_p: Share of probability that is drawn from.
        max_new_tokens: Longest answer, in tokens.
        seed: Seed of all draws.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int = 0


class Request(NamedTuple):
    """An answer that is wanted.

    Attributes:
        row: Index of the row that it is for.
        sample: Which of the row's samples it is, from 0.
        messages: What the model is to answer.
        template_kwargs: Keyword arguments of the chat template; None for none.
    """

    row: int
    sample: int
    messages: Messages
    template_kwargs: dict[str, Any] | None = None


class Generated(NamedTuple):
    """An answer, or the lack of one.

    Attributes:
        row: As in the request.
        sample: As in the request.
        text: The answer, without what ends a turn; empty where there is none.
        num_tokens: New tokens, that which ends the turn included.
        finish: `STOP`, `LENGTH` or `ERROR`.
        error: What went wrong; None where nothing did.
        is_refused: Whether the error is the request's own (too long, refused), and not the engine's or server's.
    """

    row: int
    sample: int
    text: str
    num_tokens: int
    finish: str
    error: str | None = None
    is_refused: bool = False


class Engine(Protocol):
    """Generates answers."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Answer requests, each once, in any order, as they are done; what is yielded may be kept at once.

        An answer that cannot be had is yielded with `ERROR`; only what would fail every request is raised.

        Raises:
            EngineError: If no request can be answered, saying what to change.
        """

    def close(self) -> None:
        """Free what the engine holds."""


class EngineError(ValueError):
    """Nothing can be generated: a model that cannot be loaded, an endpoint that is not there or refuses."""

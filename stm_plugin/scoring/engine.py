"""Scores of a plan, made into the store: by one process or by many, from the start or from where another stopped.

The unit of work is the shard: `BATCHES_PER_SHARD` batches of the plan, dealt out to the processes, gathered and
written. Which documents share a batch, and which batches a shard, depends on the documents and the token budget alone.
"""

import logging
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ranks import Ranks
from ..selection import check_scores
from .nll import Autocast, Scorer, progress_bar
from .plan import ScorePlan
from .sharding import is_sharded
from .store import Draft, Interval, ScoresBusyError, ScoresError, ScoresKey, ScoreStore

logger = logging.getLogger(__name__)

BATCHES_PER_SHARD = 64
"""Work that is lost when a run is killed: at most so many batches, a few seconds on a GPU."""

_SECONDS_OF_WAITING = 60.0  # for another run that makes the same scores, at a time

_BATCHES_PER_PROCESS = 2  # in a round; with more processes than half a shard's batches, a round has several shards


@dataclass(frozen=True)
class Piece:
    """A part of a shard, or all of it, that is to be scored.

    Attributes:
        interval: Its places in the plan's order.
        batches: The batches that it needs.
    """

    interval: Interval
    batches: list[range]


def find_or_make_scores(
    store: ScoreStore,
    key: ScoresKey,
    plan: ScorePlan,
    model: Any,
    *,
    tokens_per_batch: int,
    autocast: Autocast,
    ranks: Ranks,
    progress: bool,
) -> tuple[np.ndarray, str]:
    """Scores of a plan: stored ones, or else made, by all processes together, and stored.

    Args:
        store: Where scores are kept; the main process alone reads and writes there.
        key: Key of the scores.
        plan: Documents to score, the same on all processes.
        model: The model that the key is of.
        tokens_per_batch: Most tokens of one forward pass, padding included.
        autocast: Makes the context of the forward pass.
        ranks: The processes.
        progress: Whether this process shows a progress bar.

    Returns:
        NLL in nats in the plan's order, shape `(plan.num_scores,)`, float32, on every process; and where they came
        from, in words.

    Raises:
        ScoresError: If they cannot be stored.
    """

    def stored() -> np.ndarray | None:
        try:
            return store.read(key, plan.num_scores)
        except ScoresError:
            return None  # whoever writes says what is wrong, and makes it again

    scores = ranks.from_main(stored)
    if scores is not None:
        return scores, "found"
    started = time.monotonic()
    with ExitStack() as stack:
        drafts: list[Draft] = []

        def begin() -> list[Interval] | None:
            writing = store.writing(key, plan.num_scores, tokens_per_batch, patience=_SECONDS_OF_WAITING)
            try:
                drafts.append(stack.enter_context(writing))
            except ScoresBusyError:
                return None
            return drafts[0].missing

        missing = ranks.from_main(begin)
        while missing is None:  # a little at a time, so that no process waits for another beyond its limit
            missing = ranks.from_main(begin)
        scorer = Scorer(model, plan, autocast, ranks.largest if is_sharded(model) else None)
        _fill(drafts, list(pieces(plan, tokens_per_batch, missing)), scorer, ranks, progress)

        def end() -> np.ndarray:
            drafts[0].finish()
            return drafts[0].scores

        scores = ranks.from_main(end)
    return scores, f"made in {time.monotonic() - started:.1f} s" if missing else "found"


def pieces(plan: ScorePlan, tokens_per_batch: int, missing: list[Interval]) -> Iterator[Piece]:
    """What to score so that nothing is missing, each piece within one shard of the plan."""
    batches = plan.batches(tokens_per_batch)
    shards = [batches[start : start + BATCHES_PER_SHARD] for start in range(0, len(batches), BATCHES_PER_SHARD)]
    starts = [int(plan.offsets[shard[0].start]) for shard in shards]
    for gap in missing:
        for index in range(bisect_right(starts, gap.start) - 1, len(shards)):
            stop = starts[index + 1] if index + 1 < len(shards) else plan.num_scores
            interval = Interval(max(gap.start, starts[index]), min(gap.stop, stop))
            if interval.start >= interval.stop:
                break
            needed = [
                batch
                for batch in shards[index]
                if plan.offsets[batch.start] < interval.stop and plan.offsets[batch.stop] > interval.start
            ]
            yield Piece(interval, needed)


def _fill(drafts: list[Draft], todo: list[Piece], scorer: Scorer, ranks: Ranks, progress: bool) -> None:
    """Score what is missing, piece by piece; the main process, which holds the draft, writes."""
    plan = scorer.plan
    with progress_bar(sum(plan.num_tokens(piece.batches) for piece in todo), shown=progress) as bar:
        for some in _rounds(todo, ranks.count):
            batches = [batch for piece in some for batch in piece.batches]
            before = bar.n
            own = batches[ranks.index :: ranks.count]

            def score(own: list[range] = own) -> tuple[list[np.ndarray], int | None]:
                try:
                    scores = scorer.score(own, bar.update)
                except Exception:
                    if scorer.agree is not None:  # the others may be waiting within their forward: say it first
                        logger.exception("Scoring failed on process %d. Lower stm_tokens_per_batch?", ranks.index)
                    raise
                for batch_scores in scores:
                    check_scores(batch_scores)
                return scores, scorer.tokens_per_batch

            shares = ranks.each(score)
            budgets = [budget for _, budget in shares if budget is not None]
            scores: list[Any] = [None] * len(batches)
            for rank, (share, _) in enumerate(shares):
                scores[rank :: ranks.count] = share

            def put(some: list[Piece] = some, scores: list[Any] = scores, budgets: list[int] = budgets) -> None:
                for piece in some:
                    joined = np.concatenate(scores[: len(piece.batches)])
                    del scores[: len(piece.batches)]
                    first = int(plan.offsets[piece.batches[0].start])
                    start, stop = piece.interval
                    drafts[0].put(start, joined[start - first : stop - first], min(budgets, default=None))

            ranks.from_main(put)
            bar.update(before + plan.num_tokens(batches) - bar.n)  # what the others scored


def _rounds(todo: list[Piece], num_processes: int) -> Iterator[list[Piece]]:
    """The pieces in groups that give every process enough batches."""
    some: list[Piece] = []
    for piece in todo:
        some.append(piece)
        if sum(len(piece.batches) for piece in some) >= _BATCHES_PER_PROCESS * num_processes:
            yield some
            some = []
    if some:
        yield some

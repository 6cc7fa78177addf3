"""Resampled relative changes of a task's score, and intervals of them.

A resample draws documents with replacement, the same ones for both models. Left at that, a few documents on which
nothing changed would pass for certainty: of 20 answers, none changed, every resample says "no change", though a model
that gets one in ten wrong afterwards looks like this every eighth time. So two documents are added to those that are
drawn from, one that falls and one that rises by the whole scale, as Bonett and Price (2012) do for paired proportions.
They leave the initial score as it is, and matter below some hundred documents only.
"""

import math
from typing import NamedTuple

import numpy as np

_CELLS_PER_CHUNK = 2**22
"""Drawn counts that are in memory at once."""


class Interval(NamedTuple):
    """An interval; an end may be infinite.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


def relative_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`(after - before) / before`, elementwise; 0/0 counts as no change, x/0 as an infinite one.

    Args:
        before: Scores of the initial model.
        after: Scores of the tuned model, of the same shape.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        change = (after - before) / before
    return np.where(before == 0, np.where(after == 0, 0.0, math.inf), change)


def paired_changes(before: np.ndarray, after: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Relative change of the mean score in each resample of the documents.

    Naively, with the two added documents among the n + 2 of `before` and `after`,
    `relative_change(before[i].mean(), after[i].mean()) for i in rng.integers(n + 2, size=(num_resamples, n + 2))`.
    Drawn here is how often each pair of scores comes, which is the same and cheap where scores are 0 or 1.

    Args:
        before: Score of each document under the initial model, shape `(n,)`.
        after: Score of each document under the tuned model, shape `(n,)`.
        num_resamples: R.
        rng: What draws.

    Returns:
        Shape `(R,)`.
    """
    mean = before.mean()
    scale = max(1.0, np.abs(before).max(), np.abs(after).max())
    pairs = np.stack([np.append(before, [mean, mean]), np.append(after, [mean - scale, mean + scale])], axis=1)
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    num_drawn = len(pairs)
    changes = np.empty(num_resamples)
    step = max(1, _CELLS_PER_CHUNK // len(cells))
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        means = rng.multinomial(num_drawn, counts / num_drawn, size=rows) @ cells / num_drawn
        changes[start : start + rows] = relative_change(means[:, 0], np.maximum(means[:, 1], 0.0))
    return changes


def unpaired_changes(
    before: tuple[float, float], after: tuple[float, float], num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Relative change between scores that are drawn apart, from normal distributions cut off at 0.

    Where the documents were the same, this is wider than need be: what they have in common is not taken out.

    Args:
        before: Score of the initial model and its standard error.
        after: Score of the tuned model and its standard error.
        num_resamples: R.
        rng: What draws.

    Returns:
        Shape `(R,)`.
    """
    drawn = [np.maximum(rng.normal(score, stderr, num_resamples), 0.0) for score, stderr in (before, after)]
    return relative_change(*drawn)


def standard_error(score: float, num_samples: int, stderr: float | None) -> float | None:
    """Standard error of a score; None where it cannot be told.

    Args:
        score: The score.
        num_samples: Documents; 0 where that is not known.
        stderr: lm-eval's own, which is used unless it is 0 or missing. Then that of a share of `num_samples` with two
            successes and two failures added (Agresti and Coull 1998), if the score can be one.
    """
    if stderr:
        return stderr
    if num_samples < 1 or not 0 <= score <= 1:
        return None
    share = (score * num_samples + 2) / (num_samples + 4)
    return math.sqrt(share * (1 - share) / (num_samples + 4))


def percentile_interval(values: np.ndarray, confidence: float) -> Interval:
    """The middle `confidence` of some values; no interpolation, which infinite ones would not stand."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, tail, method="lower"), np.quantile(values, 1 - tail, method="higher")
    return Interval(float(low), float(high))

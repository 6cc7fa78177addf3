"""Whether one arm forgets less than another: the difference of their BWT (or TI), with an interval and a verdict.

    difference = mean over tasks of (a_first - a_second) / a_initial

where an arm's score a is the mean over its seeds. A resample draws documents of each task, the same ones for the
initial model and both arms, and seeds, the same ones for both arms where they have the same. So the interval covers
the choice of both; with two or three seeds it covers that of the seeds poorly, and with one not at all.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..forgetting.bootstrap import Interval, percentile_interval
from ..forgetting.evaluation import Evaluation

MORE = "higher"
LESS = "lower"
UNDECIDED = "not enough evidence"

_RESAMPLES_PER_CHUNK = 1000


class Contrast(NamedTuple):
    """The difference of two arms' mean relative changes.

    Attributes:
        difference: That of the first less that of the second; None where no task has one.
        interval: Its interval; None where documents' scores are missing.
        verdict: `higher` where the whole interval lies above 0, `lower` where it lies below, else not enough evidence.
        num_tasks: Tasks that it is over.
        num_documents: Their documents.
        num_seeds: Seeds of the first and of the second arm.
        paired_seeds: Whether both have the same seeds.
    """

    difference: float | None
    interval: Interval | None
    verdict: str
    num_tasks: int
    num_documents: int
    num_seeds: tuple[int, int]
    paired_seeds: bool


def contrast(
    before: Evaluation,
    first: Mapping[int, Evaluation],
    second: Mapping[int, Evaluation],
    tasks: Sequence[str],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Contrast:
    """Contrast two arms.

    Args:
        before: Scores of the initial model.
        first: Scores of an arm by seed.
        second: Scores of the other arm by seed.
        tasks: The tasks; those with an initial score of 0 are left out, as they are of TI and BWT.
        num_resamples: Resamples.
        confidence: What share of intervals holds the true value.
        seed: Seed of the resamples.
    """
    tasks = [task for task in tasks if before.tasks[task].score != 0]
    paired = first.keys() == second.keys()
    counts = len(first), len(second)
    rng = np.random.default_rng(seed)
    # How often each seed comes in a resample, as a share: shape (resamples, seeds).
    weights = [rng.multinomial(count, np.full(count, 1 / count), num_resamples) / count for count in counts]
    if paired:
        weights[1] = weights[0]
    differences: list[float] = []
    resampled: list[np.ndarray] = []
    num_documents = 0
    for task in tasks:
        score = before.tasks[task].score
        means = [np.mean([arm[number].tasks[task].score for number in sorted(arm)]) for arm in (first, second)]
        differences.append(float(means[0] - means[1]) / score)
        num_documents += before.tasks[task].num_samples
        scores = _scores(before, first, second, task)
        if scores is not None:
            resampled.append(_resampled(*scores, weights, rng))
    difference = float(np.mean(differences)) if differences else None
    interval = None
    if differences and len(resampled) == len(differences):
        interval = percentile_interval(np.mean(resampled, axis=0), confidence)
    verdict = UNDECIDED
    if interval is not None and interval.low > 0:
        verdict = MORE
    elif interval is not None and interval.high < 0:
        verdict = LESS
    return Contrast(difference, interval, verdict, len(differences), num_documents, counts, paired)


def _scores(
    before: Evaluation, first: Mapping[int, Evaluation], second: Mapping[int, Evaluation], task: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Documents' scores, shape (n,) of the initial model and (n, seeds) of each arm; None where some are missing."""
    initial = before.tasks[task].samples
    if initial is None:
        return None
    ids = sorted(initial)
    arms = []
    for arm in (first, second):
        columns = [arm[number].tasks[task].samples for number in sorted(arm)]
        if any(column is None or column.keys() != initial.keys() for column in columns):
            return None
        arms.append(np.array([[column[name] for column in columns if column is not None] for name in ids]))
    return np.array([initial[name] for name in ids]), arms[0], arms[1]


def _resampled(
    before: np.ndarray, first: np.ndarray, second: np.ndarray, weights: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """The task's difference in each resample of documents and seeds.

    Two documents are added that change by the whole scale, one up and one down (see `forgetting.bootstrap`): so that
    a few documents on which the arms agree do not pass for certainty.
    """
    scale = max(1.0, *(float(np.abs(scores).max()) for scores in (before, first, second)))
    up_and_down = np.array([[scale], [-scale]])
    before = np.append(before, [before.mean()] * 2)
    first = np.concatenate([first, first.mean(axis=0) + up_and_down])
    second = np.concatenate([second, np.tile(second.mean(axis=0), (2, 1))])
    num_drawn, num_resamples = len(before), len(weights[0])
    results = np.empty(num_resamples)
    for start in range(0, num_resamples, _RESAMPLES_PER_CHUNK):
        rows = slice(start, min(start + _RESAMPLES_PER_CHUNK, num_resamples))
        drawn = rng.multinomial(num_drawn, np.full(num_drawn, 1 / num_drawn), rows.stop - rows.start) / num_drawn
        means = [
            (drawn @ arm * weight[rows]).sum(axis=1) for arm, weight in zip((first, second), weights, strict=True)
        ]
        difference, initial = means[0] - means[1], drawn @ before
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = difference / initial
        results[rows] = np.where(difference == 0, 0.0, ratio)
    return results

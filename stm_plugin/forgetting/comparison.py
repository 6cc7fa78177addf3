"""How much a tuned model gained on its target tasks and lost on others: TI and BWT of arXiv 2501.14315.

    TI  = (a_after - a_before) / a_before                  of the target task; of several, their mean
    BWT = mean over the non-target tasks of the same ratio

Each comes with an interval, and BWT with a verdict that may be that there is not enough evidence.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .bootstrap import Interval, paired_changes, percentile_interval, standard_error, unpaired_changes
from .evaluation import NOT_THE_MEAN, OFF_UNLESS_SET, Evaluation, TaskScore

FORGETS = "forgets"
WITHIN = "within the limit"
UNDECIDED = "not enough evidence"
EXIT_STATUS = {WITHIN: 0, FORGETS: 3, UNDECIDED: 4}
"""Exit status of a command that was given a limit; without one it is 0."""

_SHARES = re.compile(
    r"(?!balanced_|macro_)(?:\w+_)?(?:acc|exact_match|math_verify|pass|em|exact|contains)(?:[_@,].*)?"
)
"""Metrics that count successes, whose standard error can be told from the number of documents."""


class TaskChange(NamedTuple):
    """One task before and after.

    Attributes:
        task: Its name.
        metric: The metric, as in `TaskScore`.
        is_target: Whether it is a target task.
        before: Score of the initial model.
        after: Score of the tuned model.
        change: `(after - before) / before`; None where `before` is 0.
        interval: Interval of `change`; None where there is none to be had.
        num_samples: Documents; 0 where that is not known.
        num_worse: Documents that score lower than before; None where they cannot be paired.
        num_better: Documents that score higher than before; None where they cannot be paired.
        paired: Whether the interval is of the same documents under both models.
        note: What to know about it, or nothing.
    """

    task: str
    metric: str
    is_target: bool
    before: float
    after: float
    change: float | None
    interval: Interval | None
    num_samples: int
    num_worse: int | None
    num_better: int | None
    paired: bool
    note: str


class Mean(NamedTuple):
    """TI or BWT.

    Attributes:
        value: Mean of the tasks' relative changes; None where no task has one.
        interval: Its interval; None where a task has none.
        num_tasks: Tasks that the mean is over.
    """

    value: float | None
    interval: Interval | None
    num_tasks: int


class Comparison(NamedTuple):
    """A tuned model against its initial model.

    Attributes:
        before_model: Name of the initial model.
        after_model: Name of the tuned model.
        tasks: All tasks, the target ones first.
        ti: Target improvement.
        bwt: Backward transfer; below 0, the model forgot.
        max_forgetting: The limit L that was given, as a share; None where none was.
        confidence: What share of intervals holds the true value.
        num_resamples: Resamples of the bootstrap.
        seed: Its seed.
        verdict: "forgets" where the whole interval of BWT lies below -L, "within the limit" where all of it is at or
            above, else "not enough evidence". Without a limit, L is 0.
        why: The reason, as a sentence.
        notes: What else a reader has to know.
    """

    before_model: str
    after_model: str
    tasks: tuple[TaskChange, ...]
    ti: Mean
    bwt: Mean
    max_forgetting: float | None
    confidence: float
    num_resamples: int
    seed: int
    verdict: str
    why: str
    notes: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """0; where a limit was given: 0 within it, 3 beyond it, 4 for not enough evidence."""
        return 0 if self.max_forgetting is None else EXIT_STATUS[self.verdict]


def compare(
    before: Evaluation,
    after: Evaluation,
    target: Sequence[str],
    non_target: Sequence[str],
    *,
    max_forgetting: float | None = None,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare a tuned model with its initial model.

    The interval of a task is from a paired bootstrap over its documents (see `bootstrap`), independent of other tasks
    and the same whichever they are. Where documents are not known, it is from two independent normal distributions.
    It covers the choice of documents, not that of the training seed.

    Args:
        before: Scores of the initial model.
        after: Scores of the tuned model.
        target: Tasks that it was tuned for.
        non_target: Tasks that it was not tuned for.
        max_forgetting: L, the largest loss that is no forgetting, as a share of the initial score: 0.05 for 5 %.
        num_resamples: Resamples, at least 1,000.
        confidence: What share of intervals holds the true value.
        seed: Seed of the resamples, at least 0.

    Raises:
        ValueError: A task is missing, named twice, or evaluated differently or on other documents in the two; its
            score cannot be made into a ratio; or an argument is out of range.
    """
    check_arguments(max_forgetting, confidence, seed, num_resamples)
    _check_tasks(before, after, target, non_target)
    tasks: list[TaskChange] = []
    resampled: dict[str, np.ndarray | None] = {}
    for task in (*target, *non_target):
        change, resampled[task] = _task_change(
            before.tasks[task], after.tasks[task], task in target, num_resamples, confidence, seed
        )
        tasks.append(change)
    ti, bwt = (
        _mean([one for one in tasks if one.is_target == asked], resampled, confidence) for asked in (True, False)
    )
    limit = max_forgetting or 0.0
    verdict, why = _verdict(bwt, limit, confidence, [one for one in tasks if not one.is_target])
    return Comparison(
        before_model=before.model,
        after_model=after.model,
        tasks=tuple(tasks),
        ti=ti,
        bwt=bwt,
        max_forgetting=max_forgetting,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
        verdict=verdict,
        why=why,
        notes=tuple(_notes(before, after, tasks, limit, verdict)),
    )


def check_arguments(max_forgetting: float | None, confidence: float, seed: int, num_resamples: int = 10_000) -> None:
    """Raises ValueError for arguments of `compare` that are out of range."""
    if max_forgetting is not None and not 0 <= max_forgetting < 1:
        raise ValueError(f"max_forgetting is a share from 0 up to 1 (0.05 is 5 %), got {max_forgetting}.")
    if num_resamples < 1000:
        raise ValueError(f"an interval takes at least 1000 resamples, got {num_resamples}.")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is a share from 0.5 up to 1 (0.95 is 95 %), got {confidence}.")
    if seed < 0:
        raise ValueError(f"seed is at least 0, got {seed}.")


def _check_tasks(before: Evaluation, after: Evaluation, target: Sequence[str], non_target: Sequence[str]) -> None:
    """Raises ValueError unless the tasks are there, each once, and evaluated alike."""
    if not target and not non_target:
        raise ValueError(
            "There is no task to compare. Name a target task, and tasks that the model was not tuned for."
        )
    owner: dict[str, str] = {}
    for task in (*target, *non_target):
        for name, evaluation in (("initial", before), ("tuned", after)):
            if task not in evaluation.tasks:
                there = ", ".join(evaluation.tasks) or "none"
                raise ValueError(f"the {name} model has no score of {task}. It has: {there}.")
        for leaf in before.tasks[task].leaves or (task,):
            if leaf in owner:
                other = owner[leaf]
                raise ValueError(
                    f"{task} is named twice, as target or non-target. It counts once: leave out one of them."
                    if other == task
                    else f"{other} and {task} share the task {leaf}, which would count twice. Leave out one of them."
                )
            owner[leaf] = task
        versions = [evaluation.versions.get("lm_eval_version") for evaluation in (before, after)]
        _check_alike(before.tasks[task], after.tasks[task], versions[0] is not None and versions[0] == versions[1])


def _check_alike(before: TaskScore, after: TaskScore, same_version: bool) -> None:
    """Raises ValueError unless both scores are of the same metric and task, evaluated alike on the same documents.

    A setting that only one of them has counts where both are of the same version of lm-eval, which then would know it.
    """
    task = before.task
    if before.metric != after.metric:
        raise ValueError(
            f"{task} has {before.metric} before and {after.metric} after. Choose one metric for both (--metric)."
        )
    if False in (before.higher_is_better, after.higher_is_better):
        raise ValueError(
            f"{before.metric} of {task} is better when lower; TI and BWT take metrics that are better when higher. "
            "Choose another with --metric."
        )
    for score, when in ((before, "before"), (after, "after")):
        if not 0 <= score.score < math.inf:
            raise ValueError(
                f"{before.metric} of {task} is {score.score} {when}; TI and BWT are ratios of scores of at least 0."
            )
    known = (before.settings.keys() & after.settings.keys()).union(OFF_UNLESS_SET)
    names = [name for name in {**before.settings, **after.settings} if same_version or name in known]
    pairs = {name: (before.settings.get(name, "not set"), after.settings.get(name, "not set")) for name in names}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        told = "; ".join(
            f"{name} is {_short(one)} before and {_short(other)} after" for name, (one, other) in differing.items()
        )
        raise ValueError(f"{task} was evaluated differently: {told}. Evaluate both models alike.")
    _check_documents(before, after)


def _check_documents(before: TaskScore, after: TaskScore) -> None:
    counts = before.num_samples, after.num_samples
    if all(counts) and counts[0] != counts[1]:
        raise ValueError(
            f"{before.task} was evaluated on {counts[0]:,} documents before and {counts[1]:,} after. Evaluate both "
            "models with the same --limit."
        )
    if before.samples is None or after.samples is None or before.samples.keys() == after.samples.keys():
        return
    only = len(before.samples.keys() - after.samples.keys()), len(after.samples.keys() - before.samples.keys())
    raise ValueError(
        f"{before.task} was evaluated on different documents: {only[0]:,} of {len(before.samples):,} before are not "
        f"among those after, and {only[1]:,} of {len(after.samples):,} after not among those before (their numbers "
        "and hashes are compared). Evaluate both models on the same data."
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _task_change(
    before: TaskScore, after: TaskScore, is_target: bool, num_resamples: int, confidence: float, seed: int
) -> tuple[TaskChange, np.ndarray | None]:
    """One task before and after, and its relative change in each resample, if there is any."""
    rng = np.random.default_rng([seed, *before.task.encode()])  # whichever other tasks there are
    resampled: np.ndarray | None = None
    note, worse, better = "", None, None
    scores = None
    if before.samples is not None and after.samples is not None:
        scores = np.array([(score, after.samples[key]) for key, score in before.samples.items()])
        worse, better = int((scores[:, 1] < scores[:, 0]).sum()), int((scores[:, 1] > scores[:, 0]).sum())
    if before.score == 0:
        note = "the initial score is 0, so no ratio to it is defined" + ("" if is_target else "; left out of BWT")
    elif scores is not None:
        resampled = paired_changes(scores[:, 0], scores[:, 1], num_resamples, rng)
    else:
        resampled, note = _unpaired(before, after, num_resamples, rng)
    change = None if before.score == 0 else (after.score - before.score) / before.score
    interval = None if resampled is None else percentile_interval(resampled, confidence)
    return TaskChange(
        task=before.task,
        metric=before.metric,
        is_target=is_target,
        before=before.score,
        after=after.score,
        change=change,
        interval=interval,
        num_samples=before.num_samples or after.num_samples,
        num_worse=worse,
        num_better=better,
        paired=scores is not None,
        note=note,
    ), resampled


def _unpaired(
    before: TaskScore, after: TaskScore, num_resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray | None, str]:
    """Relative changes from the scores' standard errors, and why it takes these; None where there are none."""
    why = next(one.why_no_samples for one in (before, after) if one.samples is None)
    errors = [standard_error(one.score, _count_of_shares(one), one.stderr) for one in (before, after)]
    if errors[0] is None or errors[1] is None:
        return None, f"no interval: {why}, and there is no standard error above 0"
    resampled = unpaired_changes((before.score, errors[0]), (after.score, errors[1]), num_resamples, rng)
    return resampled, f"not paired, so its interval is wider than need be: {why}"


def _count_of_shares(score: TaskScore) -> int:
    """Documents of a score that is, by its name, the share of them that succeeded; 0 for any other, such as F1."""
    is_share = _SHARES.fullmatch(score.metric) and score.why_no_samples != NOT_THE_MEAN and len(score.leaves) <= 1
    return score.num_samples if is_share else 0


def _mean(tasks: Sequence[TaskChange], resampled: dict[str, np.ndarray | None], confidence: float) -> Mean:
    """Mean of the relative changes that are defined, with its interval if each of them has one."""
    tasks = [task for task in tasks if task.change is not None]
    if not tasks:
        return Mean(None, None, 0)
    value = float(np.mean([task.change for task in tasks]))
    changes = [changes for task in tasks if (changes := resampled[task.task]) is not None]
    if len(changes) < len(tasks):
        return Mean(value, None, len(tasks))
    return Mean(value, percentile_interval(np.mean(changes, axis=0), confidence), len(tasks))


def _verdict(bwt: Mean, limit: float, confidence: float, tasks: Sequence[TaskChange]) -> tuple[str, str]:
    """The verdict on BWT, and why."""
    if not tasks:
        return UNDECIDED, "no non-target task was named"
    if bwt.value is None:
        return UNDECIDED, "the initial model scores 0 on every non-target task"
    if bwt.interval is None:
        missing = ", ".join(task.task for task in tasks if task.change is not None and task.interval is None)
        return UNDECIDED, f"there is no interval without the documents' scores or a standard error of {missing}"
    place = f"-{100 * limit:g} %" if limit else "0 %"
    if bwt.interval.high < -limit:
        return FORGETS, f"the whole {100 * confidence:g} % interval of BWT lies below {place}"
    if bwt.interval.low >= -limit:
        return WITHIN, f"the whole {100 * confidence:g} % interval of BWT is at or above {place}"
    return (
        UNDECIDED,
        f"the {100 * confidence:g} % interval of BWT reaches to both sides of {place}; {_needed(bwt, limit, tasks)}",
    )


def _needed(bwt: Mean, limit: float, tasks: Sequence[TaskChange]) -> str:
    """How many documents might decide: an interval's arm shrinks with the square root of their number."""
    assert bwt.value is not None
    assert bwt.interval is not None
    distance = bwt.value + limit
    arm = bwt.value - bwt.interval.low if distance > 0 else bwt.interval.high - bwt.value
    known = sum(task.num_samples for task in tasks if task.change is not None)
    if distance == 0 or not 0 < arm < math.inf or (arm / distance) ** 2 > 1000:
        return "the measured value is too close to it to say how many documents would decide"
    factor = max((arm / distance) ** 2, 1.0)
    count = f", {_rounded_up(factor * known):,} in the place of {known:,}" if known else ""
    return f"if BWT stays as measured, about {factor:.1f} times as many documents would decide{count}"


def _rounded_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _notes(
    before: Evaluation, after: Evaluation, tasks: Iterable[TaskChange], limit: float, verdict: str
) -> Iterable[str]:
    """What a reader has to know beside the figures."""
    for task in tasks:
        if task.note:
            yield f"{task.task}: {task.note}."
        low = task.interval is not None and task.interval.high < -limit
        if low and not task.is_target and verdict != FORGETS:
            yield f"{task.task} alone falls below the limit, with its whole interval; the mean over tasks hides it."
    for name in sorted(before.versions.keys() & after.versions.keys()):
        if before.versions[name] != after.versions[name]:
            told = [_short(str(one.versions[name])) for one in (before, after)]
            yield f"{name} is {told[0]} before and {told[1]} after."
    for task in tasks:
        if None in (before.tasks[task.task].higher_is_better, after.tasks[task.task].higher_is_better):
            yield f"{task.task}: the results do not say whether a higher {task.metric} is better; taken as if it were."
    for task in tasks:
        digests = before.tasks[task.task].prompt_digest, after.tasks[task.task].prompt_digest
        if all(digests) and digests[0] != digests[1]:
            yield f"{task.task}: the prompts differ, as with another chat template (or one that names the date)."

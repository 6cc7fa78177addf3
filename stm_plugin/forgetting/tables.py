"""A comparison as Markdown, as sentences and as JSON."""

import math
from typing import Any

from .bootstrap import Interval
from .comparison import FORGETS, UNDECIDED, WITHIN, Comparison, Mean, TaskChange

_HEAD = ("task", "", "metric", "documents", "before", "after", "change", "interval", "worse / better")


def percent(share: float | None, sign: bool = True) -> str:
    """A share in percent, "+1.38 %"; "-" for None."""
    if share is None:
        return "-"
    if math.isinf(share):
        return f"{'+' if share > 0 else '-'}inf"
    text = f"{100 * share:+.2f}" if sign else f"{100 * share:.2f}"
    return f"{text.lstrip('+-') if float(text) == 0 else text} %"


def interval_text(interval: Interval | None) -> str:
    """An interval in percent, "-1.20 % to +3.00 %"; "-" for None."""
    return "-" if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def table(comparison: Comparison) -> str:
    """One row for each task, then TI and BWT, as a Markdown table."""
    head = list(_HEAD)
    head[head.index("interval")] = f"{100 * comparison.confidence:g} % interval"
    rows = [head, ["---"] * len(head), *(_task_row(task) for task in comparison.tasks)]
    for name, mean in (("TI", comparison.ti), ("BWT", comparison.bwt)):
        if mean.num_tasks:
            over = "1 task" if mean.num_tasks == 1 else f"{mean.num_tasks} tasks"
            ends = [percent(mean.value), interval_text(mean.interval), ""]
            rows.append([f"**{name}**", over, "", "", "", "", *ends])
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _task_row(task: TaskChange) -> list[str]:
    counts = "-" if task.num_worse is None else f"{task.num_worse:,} / {task.num_better:,}"
    return [
        task.task,
        "target" if task.is_target else "non-target",
        task.metric,
        f"{task.num_samples:,}" if task.num_samples else "?",
        f"{task.before:.4f}",
        f"{task.after:.4f}",
        "undefined" if task.change is None else percent(task.change),
        interval_text(task.interval),
        counts,
    ]


def sentences(comparison: Comparison) -> list[str]:
    """What came out, for a reader who does not know the measures' names: one sentence or two in each entry."""
    lines = [f"{comparison.after_model} (tuned) against {comparison.before_model} (initial)."]
    for task in comparison.tasks:
        if task.is_target:
            lines.append(f"Target task {task.task}: {task.metric} {task.before:.4f} -> {task.after:.4f}.")
    lines.append(_mean_sentence("TI (relative change of the score on the target)", comparison.ti, comparison))
    num = sum(task.num_samples for task in comparison.tasks if not task.is_target and task.change is not None)
    over = f", over {comparison.bwt.num_tasks} tasks" + (f" and {num:,} documents" if num else "")
    lines.append(
        _mean_sentence("BWT (mean relative change of the scores on the non-target tasks)", comparison.bwt, comparison)
        + (f"{over}." if comparison.bwt.num_tasks > 1 else ".")
    )
    lines[-2] += "."
    lines.append(verdict_sentence(comparison))
    return [*lines, *(f"Note: {note}" for note in comparison.notes)]


def _mean_sentence(name: str, mean: Mean, comparison: Comparison) -> str:
    if mean.value is None:
        return f"{name}: undefined"
    if mean.interval is None:
        return f"{name}: {percent(mean.value)}, no interval"
    return f"{name}: {percent(mean.value)}, {100 * comparison.confidence:g} % interval {interval_text(mean.interval)}"


def verdict_sentence(comparison: Comparison) -> str:
    """The verdict, what it means and why."""
    limit = comparison.max_forgetting
    loss = f"more than {100 * limit:g} % of its score" if limit else "any of its score"
    loss += " on the non-target tasks, on average"
    meaning = {
        FORGETS: f"The tuned model loses {loss}",
        WITHIN: f"The tuned model does not lose {loss}",
        UNDECIDED: f"These results do not tell whether the tuned model loses {loss}",
    }[comparison.verdict]
    if comparison.verdict == FORGETS and not limit:
        meaning = meaning.replace("any of", "some of")
    sentence = f"Verdict: {comparison.verdict}. {meaning}: {comparison.why}."
    return sentence + ("" if limit is not None else " (No limit was given; --max-forgetting 0.05 allows 5 %.)")


def markdown(comparison: Comparison) -> str:
    """Table and sentences as a Markdown document."""
    head = "# Forgetting, measured"
    how = (
        f"Intervals are from {comparison.num_resamples:,} resamples of the documents, the same ones for both models "
        f"(seed {comparison.seed}), with two documents added to each task, one better and one worse by all that a "
        "score can differ: so few documents cannot look certain. They do not cover the seed of training."
    )
    return "\n\n".join([head, table(comparison), *sentences(comparison), how]) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """What JSON can hold: shares as numbers, an infinite one as the string "inf", what is undefined as null."""
    facts = comparison._asdict()
    facts["tasks"] = [
        {name: _plain(value) for name, value in task._asdict().items() if name != "task"} | {"task": task.task}
        for task in comparison.tasks
    ]
    for name in ("ti", "bwt"):
        facts[name] = {key: _plain(value) for key, value in facts[name]._asdict().items()}
    return facts | {"notes": list(comparison.notes), "exit_status": comparison.exit_status}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return [_plain(end) for end in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value

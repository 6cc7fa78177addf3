"""A comparison as a picture."""

import math
import os
from pathlib import Path
from typing import Any

from .._compat import missing_extra
from .comparison import Comparison, Mean, TaskChange
from .tables import percent

_TARGET, _NON_TARGET, _MEAN = "#2f6db5", "#b5482f", "#222222"
_MARKERS = {_TARGET: "s", _NON_TARGET: "o", _MEAN: "D"}


def write_plot(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Draw each task's score before and after, and its relative change with TI and BWT, into a PNG.

    Equal comparisons give equal files under the same matplotlib.

    Args:
        comparison: What to draw.
        path: The file to write.

    Returns:
        The file.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report") from None

    rows = len(comparison.tasks) + 2
    figure = Figure(figsize=(11, 1.9 + 0.42 * rows), layout="constrained")
    scores, changes = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_scores(scores, comparison)
    _draw_changes(changes, comparison)
    for axes in (scores, changes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(rows - 0.5, -0.5)
    figure.legend(*changes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"{_short(comparison.after_model)} against {_short(comparison.before_model)}: {comparison.verdict}"
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return Path(path)


def _colour(task: TaskChange) -> str:
    return _TARGET if task.is_target else _NON_TARGET


def _draw_scores(axes: Any, comparison: Comparison) -> None:
    """An open mark before, a filled one after, and a line from one to the other."""
    for row, task in enumerate(comparison.tasks):
        colour, marker = _colour(task), _MARKERS[_colour(task)]
        axes.plot([task.before, task.after], [row, row], color=colour, linewidth=1.5, zorder=1)
        axes.plot(task.before, row, marker=marker, markersize=8, markerfacecolor="white", color=colour, clip_on=False)
        axes.plot(task.after, row, marker=marker, markersize=5, color=colour, clip_on=False)
    labels = [f"{task.task}\n({'target' if task.is_target else 'non-target'})" for task in comparison.tasks]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    highest = max((max(task.before, task.after) for task in comparison.tasks), default=1.0)
    axes.set(xlim=(0, 1.08 * highest or 1), xlabel="score (each task's metric)", title="open: before, filled: after")


def _draw_changes(axes: Any, comparison: Comparison) -> None:
    """A mark and an interval for each task, TI and BWT."""
    finite = [100 * end for _, mean in _rows(comparison) for end in _values(mean) if math.isfinite(end)]
    limit = 100 * (comparison.max_forgetting or 0)
    low, high = min([*finite, -limit, 0.0]), max([*finite, 0.0])
    room = 0.08 * max(high - low, 1.0)
    names = {_TARGET: "target task", _NON_TARGET: "non-target task", _MEAN: "TI, BWT"}
    for row, (colour, mean) in enumerate(_rows(comparison)):
        if mean.value is None:
            axes.text(room / 4, row, "undefined", va="center", fontsize=8)
            continue
        if mean.interval is not None:
            ends = [min(max(100 * end, low - room), high + room) for end in mean.interval]
            axes.plot(ends, [row, row], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(100 * mean.value, row, _MARKERS[colour], color=colour, linestyle="", label=names.pop(colour, None))
        axes.annotate(
            percent(mean.value), (100 * mean.value, row), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.axvline(0, color="#888888", linewidth=1, zorder=0)
    if comparison.max_forgetting:
        axes.axvline(-limit, color="#888888", linestyle="--", zorder=0, label=f"limit, -{limit:g} %")
    labels = [*(task.task for task in comparison.tasks), "TI", "BWT"]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(
        xlim=(low - 2 * room, high + 2 * room),
        xlabel="change of the score, relative to before (%)",
        title=f"relative change, {100 * comparison.confidence:g} % interval",
    )


def _rows(comparison: Comparison) -> list[tuple[str, Mean]]:
    tasks = [(_colour(task), Mean(task.change, task.interval, 1)) for task in comparison.tasks]
    return [*tasks, (_MEAN, comparison.ti), (_MEAN, comparison.bwt)]


def _values(mean: Mean) -> list[float]:
    return [end for end in (mean.value, *(mean.interval or ())) if end is not None]


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]

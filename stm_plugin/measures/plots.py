"""The plots of single measures as PNG; equal figures give equal files under the same matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._compat import missing_extra
from ..tokens import visible
from .drift import Drift

if TYPE_CHECKING:
    from .perplexity import PerplexitySummary

_COLOURS = ("#54789c", "#b4431f", "#5d8a4a", "#7d5a94", "#8a7a3d")
_STYLES = ("-", "--", "-.", ":")
_MOST_NAMED = 60
"""Most prompts that are written beside their bars."""
_MOST_CHARACTERS = 60


def plot_perplexity(summaries: Mapping[str, "PerplexitySummary"], model: str, path: Path) -> None:
    """Draw the share of each data set's rows up to each perplexity.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(7, 4.2)
    from matplotlib.ticker import LogFormatter

    axes = figure.subplots()
    for index, (name, summary) in enumerate(summaries.items()):
        rows = np.sort(summary.rows)
        axes.step(
            np.concatenate([rows[:1], rows]),
            100 * np.arange(len(rows) + 1) / len(rows),
            where="post",
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index % len(_STYLES)],
            label=f"{visible(name)}: mean {summary.mean:.3g}, std {summary.std:.3g}",
        )
    axes.set(
        xscale="log",
        ylim=(0, 100),
        xlabel="perplexity of a row's answer (log scale)",
        ylabel="rows up to that perplexity (%)",
        title=f"Perplexity under {visible(_name(model))}",
    )
    for ticks in ("major", "minor"):  # 2, 4 and 10, not powers of ten
        getattr(axes.xaxis, f"set_{ticks}_formatter")(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.legend(frameon=False, loc="lower right")
    _save(figure, axes, path)


def plot_drift(drift: Drift, prompts: Sequence[str], tuned: str, path: Path) -> None:
    """Draw the drift of each prompt, the largest on top, and the mean over all tokens.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    per_token = [row.sum_nats / row.num_tokens for row in drift.rows]
    order = sorted(range(len(per_token)), key=lambda index: per_token[index])
    named = len(order) <= _MOST_NAMED
    figure = _figure(9 if named else 7, 1.8 + 0.2 * len(order) if named else 5)
    axes = figure.subplots()
    axes.barh(range(len(order)), [per_token[index] for index in order], color=_COLOURS[0])
    axes.axvline(drift.mean, color=_COLOURS[1], linestyle="--", label=f"all tokens: {drift.mean:.3g}")
    axes.set_yticks(range(len(order)) if named else [], [_short(visible(prompts[i])) for i in order] if named else [])
    axes.set(
        xlabel="KL(initial || tuned), nats per token",
        ylabel="prompt" if named else f"{len(order):,} prompts, the largest drift on top",
        title=f"Drift of {visible(_name(tuned))}",
    )
    axes.legend(frameon=False, loc="lower right")
    _save(figure, axes, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report") from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _name(model: str) -> str:
    """The last part of a folder or hub id."""
    return _short(model.rstrip("/").rpartition("/")[2])


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"

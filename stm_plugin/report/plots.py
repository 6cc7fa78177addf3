"""The plots of a report as PNG."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._compat import missing_extra
from ..inspection.sweep import PAPER_BAND
from ..selection import perplexity
from ..tokens import visible
from .figures import BINS_PER_DECADE, Figures

_COLOURS = ("#54789c", "#b4431f")
_STYLES = ("-", "--")


def write_plots(figures: list[Figures], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the distribution, the masked share by threshold and those by group.

    Args:
        figures: Figures of one data set, or of two to be shown together.
        folder: Where the files go; made where it is missing.

    Returns:
        The files.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report") from None

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    titles = list(dict.fromkeys(group.title for one in figures for group in one.groups))
    drawings = {"distribution": _distribution, "masked_share": _masked_share}
    files = []
    for name in (*drawings, *(f"by_{title.replace(' ', '_')}" for title in titles)):
        title = name.removeprefix("by_").replace("_", " ")
        bars = sum(len(group.labels) for one in figures for group in one.groups if group.title == title)
        figure = Figure(figsize=(7, 4.2 if name in drawings else 1.6 + 0.3 * bars), layout="constrained")
        axes = figure.subplots()
        if name in drawings:
            drawings[name](axes, figures)
        else:
            _by_group(axes, figures, title)
        axes.spines[["top", "right"]].set_visible(False)
        if len(figures) > 1:
            figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150, metadata={"Software": None})
    return files


def _distribution(axes: Any, figures: list[Figures]) -> None:
    for one, colour, style in zip(figures, _COLOURS, _STYLES, strict=False):
        edges = 10 ** (np.arange(len(one.histogram) + 1) / BINS_PER_DECADE)
        shares = 100 * one.histogram / len(one.data.nll)
        axes.stairs(shares, edges, fill=len(figures) == 1, color=colour, linestyle=style, label=visible(one.data.name))
        axes.axvline(_shown(one), color=colour if len(figures) > 1 else _COLOURS[1], linestyle=style)
    axes.set(
        xscale="log",
        yscale="symlog",
        xlim=(1, 10 ** (max(len(one.histogram) for one in figures) / BINS_PER_DECADE)),
        xlabel="perplexity of the token (log scale)",
        ylabel="label tokens (%, log scale above 1 %)",
        title=f"Distribution of perplexity; threshold {figures[0].stops[figures[0].start].text}",
    )


def _masked_share(axes: Any, figures: list[Figures]) -> None:
    axes.axhspan(*(100 * share for share in PAPER_BAND), color="#dfe8da", zorder=0)
    axes.text(
        0.99,
        100 * PAPER_BAND[1] + 1,
        "20 to 24 %: best in the paper",
        ha="right",
        transform=axes.get_yaxis_transform(),
    )
    for one, colour, style in zip(figures, _COLOURS, _STYLES, strict=False):
        at = [(perplexity(stop.nats), masked) for stop, masked in zip(one.stops, one.masked, strict=True)][:-1]
        x, masked = np.array(at).T
        axes.plot(x, 100 * masked / len(one.data.nll), color=colour, linestyle=style, label=visible(one.data.name))
        axes.plot([_shown(one)], [100 * one.masks.masked_fraction], "o", color=_COLOURS[1])
    axes.set(
        xscale="log",
        xlim=(1, 10 ** (max(len(one.histogram) for one in figures) / BINS_PER_DECADE)),
        ylim=(0, 100),
        xlabel="threshold (perplexity, log scale)",
        ylabel="masked label tokens (%)",
        title="Masked share by threshold",
    )


def _by_group(axes: Any, figures: list[Figures], title: str) -> None:
    groups = [(one, group) for one in figures for group in one.groups if group.title == title]
    labels = list(dict.fromkeys(label for _, group in groups for label in group.labels))
    height = 0.8 / len(figures)
    for number, (one, group) in enumerate(groups):
        place = [labels.index(label) + number * height for label in group.labels]
        shares = 100 * group.masked[:, one.start] / group.totals
        bars = axes.barh(
            place,
            shares,
            height,
            color=_COLOURS[number],
            hatch="//" if number else None,
            edgecolor="white",
            label=visible(one.data.name),
        )
        axes.bar_label(
            bars, [f"{share:.1f} % of {total:,}" for share, total in zip(shares, group.totals, strict=True)], padding=3
        )
    axes.set_yticks(np.arange(len(labels)) + height * (len(figures) - 1) / 2, labels)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 118), xlabel="masked label tokens of the class (%)", ylabel=title, title=f"Masked share by {title}"
    )
    axes.set_xticks(range(0, 101, 25))


def _shown(figures: Figures) -> float:
    """The threshold as a perplexity that a log axis can show."""
    return min(perplexity(figures.masks.threshold_nats), 10.0 ** (len(figures.histogram) / BINS_PER_DECADE))

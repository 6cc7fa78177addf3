"""An experiment's figures: pure functions of its summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._compat import missing_extra
from .results import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"plain": "#b5482f", "stm": "#2f6db5", "kl": "#5f8f3a"}
_MARKERS = {"plain": "o", "stm": "s", "kl": "^"}
_NAMES = {"plain": "plain fine-tuning", "stm": "STM", "kl": "KL penalty"}


def write_plots(summary: Facts, folder: Path) -> list[Path]:
    """Draw an experiment into PNG files; equal summaries give equal files under the same matplotlib.

    Args:
        summary: What `summarize` returns.
        folder: Where the files go.

    Returns:
        The files: `forgetting.png`, and `masked.png` and `learning_rate.png` where arms differ in these.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "report") from None

    paths = []
    for name, draw in (("forgetting", _draw_arms), ("masked", _draw_masked), ("learning_rate", _draw_rates)):
        figure = Figure(figsize=(11, max(4.0, 1.6 + 0.34 * len(summary["arms"]))) if name == "forgetting" else (11, 4))
        figure.set_layout_engine("constrained")
        if draw(figure, summary):
            figure.suptitle(summary["title"])
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150, metadata={"Software": None})
            paths.append(path)
    return paths


def _draw_arms(figure: "Figure", summary: Facts) -> bool:
    """TI and BWT of every arm with their intervals, and a small mark for each seed."""
    arms = list(summary["arms"].values())
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name, label in zip(
        panels,
        ("bwt", "ti", "drift"),
        ("BWT, % (below 0: forgetting)", "TI, %", "drift, nats per token"),
        strict=True,
    ):
        for row, arm in enumerate(arms):
            colour = _COLOURS[arm["kind"]]
            if name == "drift":
                value, ends, seeds = (arm["drift"] or {}).get("mean"), None, []
            else:
                value, ends = _percents([arm[name]["mean"]])[0], _percents(arm[name]["interval"])
                seeds = _percents(arm[name]["of_seeds"])
            if value is None:
                continue
            axes.plot([value], [row], _MARKERS[arm["kind"]], color=colour)
            if ends and None not in ends:
                axes.plot(ends, [row, row], color=colour, linewidth=1.2)
            several = [seed for seed in seeds if seed is not None] if len(seeds) > 1 else []
            axes.plot(several, [row + 0.22] * len(several), "|", color=colour, markersize=5)
        if name != "drift":
            axes.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), [arm["title"] for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    _legend(panels[-1], [arm["kind"] for arm in arms])
    return True


def _draw_masked(figure: "Figure", summary: Facts) -> bool:
    """TI and BWT over the share of masked tokens."""
    points = [
        (0.0 if arm["masked_fraction"] is None else 100 * arm["masked_fraction"]["mean"], arm)
        for arm in summary["arms"].values()
        if arm["kind"] != "kl"
    ]
    if len({x for x, _ in points}) < 3:
        return False
    for axes, name in zip(figure.subplots(1, 2), ("bwt", "ti"), strict=True):
        for x, arm in points:
            (value,) = _percents([arm[name]["mean"]])
            if value is not None:
                axes.plot([x], [value], _MARKERS[arm["kind"]], color=_COLOURS[arm["kind"]])
                axes.annotate(arm["title"], (x, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_xlabel("masked label tokens, %")
        axes.set_ylabel(f"{name.upper()}, %")
        axes.spines[["top", "right"]].set_visible(False)
    return True


def _draw_rates(figure: "Figure", summary: Facts) -> bool:
    """TI and BWT over the learning rate: arms that differ in nothing else, one line for each such group."""
    groups: dict[str, list[tuple[float, Facts]]] = {}
    for arm in summary["arms"].values():
        training = {name: value for name, value in arm["training"].items() if name != "learning_rate"}
        rate = arm["training"].get("learning_rate")
        if isinstance(rate, int | float):
            alike = [arm[name] for name in ("kind", "options", "lora", "data", "rows", "dtype")]
            key = repr((alike, sorted(training.items(), key=str)))
            groups.setdefault(key, []).append((float(rate), arm))
    several = [group for group in groups.values() if len({rate for rate, _ in group}) > 2]
    lines = [sorted(group, key=lambda point: point[0]) for group in several]
    if not lines:
        return False
    for axes, name in zip(figure.subplots(1, 2), ("bwt", "ti"), strict=True):
        for line in lines:
            kind = line[0][1]["kind"]
            values = _percents([arm[name]["mean"] for _, arm in line])
            known = [(rate, value) for (rate, _), value in zip(line, values, strict=True) if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), f"{_MARKERS[kind]}-", color=_COLOURS[kind], label=_NAMES[kind])
                axes.set_xscale("log")
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(f"{name.upper()}, %")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return True


def _percents(shares: Sequence[float | str | None] | None) -> list[float | None]:
    """Shares in percent; None for what cannot be drawn."""
    return [100 * share if isinstance(share, int | float) and abs(share) < 1e6 else None for share in shares or []]


def _legend(axes: "Axes", kinds: Sequence[str]) -> None:
    for kind in dict.fromkeys(kinds):
        axes.plot([], [], _MARKERS[kind], color=_COLOURS[kind], label=_NAMES[kind])
    axes.legend(frameon=False, loc="lower right", fontsize=8)

"""The demo's figure: a pure function of its results."""

from pathlib import Path
from typing import TYPE_CHECKING

from .results import DemoResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"plain": "#b5482f", "stm": "#2f6db5"}
_HATCHES = {"plain": "", "stm": "//"}


def save_plot(results: DemoResults, path: Path) -> None:
    """Draws drift and weight change of both arms, and the drift of each prompt, into a PNG.

    Equal results give equal files under the same matplotlib.

    Args:
        results: What the demo measured.
        path: The file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    drift_axes, change_axes, prompt_axes = figure.subplots(1, 3)
    _draw_bars(drift_axes, results, "drift_nats_per_token", "KL(initial || tuned), nats per token")
    drift_axes.set_title(f"Drift on {len(results['drift_prompts'])} general prompts")
    _draw_bars(change_axes, results, "weight_change_l2", "L2 norm of the weight change")
    change_axes.set_title("Weight change")
    _draw_prompts(prompt_axes, results)
    model, rows = results["model"]["name"].split("/")[-1], results["options"]["rows"]
    figure.suptitle(
        f"{model}, LoRA, {rows} functions of Python's standard library; "
        f"STM masks {results['arms']['stm']['masked_fraction']:.1%} of the label tokens"
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _draw_bars(axes: "Axes", results: DemoResults, key: str, label: str) -> None:
    """One labelled bar for each arm."""
    for position, (name, arm) in enumerate(results["arms"].items()):
        value = arm[key]  # type: ignore[literal-required]
        axes.bar(position, value, width=0.6, color=_COLOURS[name], hatch=_HATCHES[name], edgecolor="white")
        axes.annotate(f"{value:.3g}", (position, value), ha="center", va="bottom")
    axes.set_xticks(range(len(results["arms"])), [arm["title"] for arm in results["arms"].values()])
    axes.set_ylabel(label)
    axes.margins(y=0.12)


def _draw_prompts(axes: "Axes", results: DemoResults) -> None:
    """One point for each prompt; below the diagonal STM drifts less, above it more."""
    plain, stm = (results["arms"][name]["drift_nats_per_prompt"] for name in ("plain", "stm"))
    axes.scatter(plain, stm, s=18, color="#333333")
    limit = 1.08 * max(*plain, *stm)
    if limit > 0:
        axes.set(xlim=(0, limit), ylim=(0, limit))
    axes.plot([0, limit], [0, limit], linestyle=":", color="#888888", label="equal drift")
    axes.set_xlabel("plain SFT, nats per token")
    axes.set_ylabel("STM, nats per token")
    axes.set_title("Drift of each prompt")
    axes.legend(loc="lower right", frameon=False)

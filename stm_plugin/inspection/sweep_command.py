"""`stm sweep`: what a range of thresholds and fractions would mask, from stored scores alone."""

import argparse
import json

from ..tokens import visible
from .sources import RULE, add_source, options_of, scored_of
from .sweep import FRACTIONS, PAPER_FRACTION, THRESHOLDS, sweep_of


def add_arguments(parser: argparse.ArgumentParser, scores_now: bool = False) -> None:
    """Add the options of `stm sweep`."""
    add_source(parser, None if scores_now else 1, RULE[2:])
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, metavar="PERPLEXITY")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, metavar="SHARE")
    parser.add_argument(
        "--share", type=float, default=PAPER_FRACTION, help="name the threshold that masks this share (0.22)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Run `stm sweep`."""
    (data,) = scored_of(args)
    sweep = sweep_of(data, args.thresholds, args.fractions, args.share, options_of(args, data))
    print(json.dumps(sweep.as_json(), indent=2) if args.json else "\n".join([visible(data.name), *sweep.lines()]))
    return 0

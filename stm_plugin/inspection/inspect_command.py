"""`stm inspect`: rows in the terminal, with what is masked in them."""

import argparse
import os
import sys

import numpy as np

from ..masking.masks import Masks
from .rows import Style, heading, row_lines
from .sources import RULE, add_source, options_of, scored_of


def add_arguments(parser: argparse.ArgumentParser, scores_now: bool = False) -> None:
    """Add the options of `stm inspect`."""
    add_source(parser, None if scores_now else 1, RULE)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", metavar="LIST", help="rows by number, from 0: `3,10-12`")
    which.add_argument("--most", type=_count, metavar="N", help="the N rows of which the largest share is masked")
    which.add_argument("--random", type=_count, default=3, metavar="N", help="N rows drawn at random (default: 3)")
    parser.add_argument("--random_seed", type=int, default=0, help="seed of --random (default: 0)")
    parser.add_argument("--redact", action="store_true", help="show [REDACTED] in the place of masked tokens")
    parser.add_argument(
        "--context", type=int, default=40, metavar="N", help="tokens shown before each answer (default: 40)"
    )
    parser.add_argument(
        "--most_tokens", type=int, default=2000, metavar="N", help="most tokens shown of a row (default: 2000)"
    )
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto (the default): on a terminal, unless NO_COLOR is set",
    )


def main(args: argparse.Namespace) -> int:
    """Run `stm inspect`."""
    (data,) = scored_of(args)
    options = options_of(args, data)
    masks = data.masks(options)
    auto = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    style = Style(
        args.color == "always" or (args.color == "auto" and auto), args.redact, args.context, args.most_tokens
    )
    print("\n".join(heading(data, masks, options, style)))
    for row in choose_rows(args, masks):
        print()
        print("\n".join(row_lines(data, masks, row, style)))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is needed, got {text!r}")
    return int(text)


def choose_rows(args: argparse.Namespace, masks: Masks) -> list[int]:
    """Indices of the rows that a command line asks for.

    Raises:
        ValueError: For a row that there is not, or a range that is none.
    """
    labels = masks.documents.rows_with(masks.documents.label_mask)
    with_labels = np.flatnonzero(labels)
    if args.rows is not None:
        return _parse_rows(args.rows, len(labels))
    if args.most is not None:
        share = masks.masked_per_row[with_labels] / labels[with_labels]
        return with_labels[np.argsort(-share, kind="stable")][: args.most].tolist()
    generator = np.random.default_rng(args.random_seed)
    number = min(args.random, len(with_labels))
    return sorted(generator.choice(with_labels, size=number, replace=False).tolist())


def _parse_rows(text: str, num_rows: int) -> list[int]:
    rows: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--rows takes numbers and ranges such as 3,10-12, got {text!r}.")
        rows += range(int(first), int(last if dash else first) + 1)
    beyond = [row for row in rows if row >= num_rows]
    if beyond:
        raise ValueError(f"There is no row {beyond[0]}: the data have {num_rows:,} rows, numbered from 0.")
    return rows

"""The command `stm report`."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..constants import REPORT_NAME
from ..inspection.sources import RULE, add_source, options_of, scored_of
from .figures import make_figures
from .page import write_page


def add_arguments(parser: argparse.ArgumentParser, scores_now: bool = False) -> None:
    """Add the options of `stm report`."""
    add_source(parser, None if scores_now else "+", RULE)
    parser.add_argument(
        "--out", type=Path, default=Path(REPORT_NAME), metavar="FILE", help="the page (default: %(default)s)"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="what to call the sources (default: model and data)"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write the plots there as PNG (needs the extra `report`)"
    )


def main(args: argparse.Namespace) -> int:
    """Run `stm report`.

    Raises:
        ValueError: For more than two sources, or another number of names.
    """
    if len(args.source or []) > 2:
        raise ValueError(f"stm report shows one source, or two side by side, got {len(args.source)}.")
    datas = scored_of(args)
    if args.names and len(args.names) != len(datas):
        raise ValueError(f"--names takes one name for each source, got {len(args.names)} for {len(datas)}.")
    if args.names:
        datas = [replace(data, title=name) for data, name in zip(datas, args.names, strict=True)]
    figures = make_figures(datas, [options_of(args, data) for data in datas])
    print(write_page(figures, args.out))
    if args.png is not None:
        from .plots import write_plots

        for path in write_plots(figures, args.png):
            print(path)
    return 0

"""The command `stm experiment`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import Experiment, RunName, read_experiment
from .run import RunFailedError, Runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stm experiment`."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the experiment's YAML")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of the files that the YAML names (needed to run)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of the results (default: the YAML's name, here)"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM[/SEED]", help="do these runs, and none of the others")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="start no run that would end later, going by how long others took"
    )
    parser.add_argument("--again", action="store_true", help="make results anew whose settings have changed")
    parser.add_argument("--keep-models", action="store_true", help="keep the trained models, in OUTPUT/models")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the runs and which are done; run nothing")
    what.add_argument(
        "--table", action="store_true", help="write table.md, results.json and plots of what is done; run nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Run `stm experiment`.

    Returns:
        The exit status: 0; 1 if a run failed; 130 after Ctrl-C.

    Raises:
        ValueError: For a config, a name or a folder that is not allowed, or results with other settings.
    """
    experiment = read_experiment(args.config)
    runs = experiment.chosen_runs(args.only)
    output = args.output or Path(experiment.name)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, where the folder of the results is to be. Name another with --output.")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder.")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes must be more than 0, got {args.minutes}.")
    runner = Runner(
        experiment, args.data, output, lambda line: print(line, flush=True), args.minutes, args.again, args.keep_models
    )
    if args.list:
        print("\n".join(listing(runner, experiment, runs)))
        if args.data is None:
            print("Without --data it is not looked whether files or models have changed.", file=sys.stderr)
        return 0
    if args.table:
        if args.only is not None:
            raise ValueError("--only is of no use with --table, which shows every run that is done.")
        from .tables import write_tables

        paths, notes = write_tables(experiment, output)
        print(*paths, sep="\n")
        for note in notes:
            print(f"stm: {note}", file=sys.stderr)
        return 0
    if args.data is None:
        raise ValueError("--data is missing: the folder of the files that the YAML names.")
    try:
        failed = runner.run(runs)
    except RunFailedError as error:
        print(f"stm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What is done stays; start again to go on.", file=sys.stderr)
        return 130
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}. Start again to try them again.", file=sys.stderr)
    return int(bool(failed))


def listing(runner: Runner, experiment: Experiment, runs: Sequence[RunName]) -> list[str]:
    """A line for each of some runs, and before them the data sets they need: name, kind, and whether it is done."""
    lines = []
    for name, generation in experiment.generate.items():
        users = {run for run in experiment.runs() if experiment.generation_of(run) is generation}
        if users and not users & set(runs):
            continue
        changes = runner.generation_changes(generation)
        state = "done" if runner.is_generated(generation) else "to do" if changes is None else "begun"
        if changes:
            state = f"begun with other settings: {'; '.join(changes)}"
        lines.append(f"{'generate.' + name:<32} {generation.options['method']:<6} {state}")
    for run in runs:
        result, changes = runner.result(run), runner.changes(run)
        if result is None:
            state = "to do"
        elif changes:
            state = f"done with other settings: {'; '.join(changes)}"
        else:
            state = f"done, {result['seconds']['total']:.0f} s"
        lines.append(f"{run!s:<32} {experiment.arms[run.arm].kind:<6} {state}")
    return lines

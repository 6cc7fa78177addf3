"""The command `stm`."""

import argparse
import functools
import os
import sys
from collections.abc import Callable

from . import __version__
from ._compat import MissingExtraError
from .demo import run as demo
from .experiment import command as experiment
from .forgetting import command as forgetting
from .generation import command as generate
from .inspection import inspect_command as inspect
from .inspection import sweep_command as sweep
from .inspection.sources import names_a_model
from .measures import command as measure
from .report import command as report
from .sandbox import SandboxError

_EPILOG = """\
examples:
  stm demo                     see STM beside plain fine-tuning on a small real model
  stm sft --model_name_or_path MODEL --dataset_name chats.jsonl --use_peft --stm_threshold 2.5
  stm sft --config run.yaml    the same from a file; `stm sft --help` lists every option
  stm score --config run.yaml  score ahead, and see what thresholds would mask; `stm sft` then finds the scores
  stm score --verify FOLDER    check stored scores; --info FOLDER says what they are
  stm inspect OUTPUT_FOLDER    see what a run masked, row by row; `stm sweep`, `stm report` take the same
  stm forgetting --tuned ADAPTER --target gsm8k --non-target ifeval arc_challenge    what it gained, what it forgot
  stm measure drift --tuned ADAPTER                                                  the same without a benchmark
  stm generate --method self-output --model MODEL --data chats.jsonl --output own.jsonl   the model's own answers
  stm experiment CONFIG --data FOLDER    train and measure many ways of fine-tuning, one after the other
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["sft"]:  # TRL's parser reads the rest, --help too
        from .sft import main as train

        train(arguments[1:])
        return 0
    if arguments[:1] == ["score"]:
        from .score_command import main as score

        return score(arguments[1:])
    scores_now = arguments[:1] in (["inspect"], ["sweep"], ["report"]) and names_a_model(arguments)
    parser = make_parser(scores_now)
    args, rest = parser.parse_known_args(arguments)
    if rest and not scores_now:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    status: int = args.run(args)
    return status


def make_parser(scores_now: bool = False) -> argparse.ArgumentParser:
    """The parser of all subcommands but `sft` and `score`, which are TRL's; nothing heavy is loaded for it.

    Args:
        scores_now: Whether `inspect`, `sweep` and `report` take a model and data in the place of stored scores.
    """
    parser = argparse.ArgumentParser(
        prog="stm",
        description="Selective Token Masking (arXiv 2501.14315): leave out of fine-tuning what makes a model forget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stm-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("sft", help="fine-tune with STM: TRL's sft script, flags or YAML", add_help=False)
    commands.add_parser("score", help="score ahead of training, or look at stored scores", add_help=False)
    command = commands.add_parser("demo", help="plain fine-tuning and STM side by side, measured, in minutes")
    demo.add_arguments(command)
    command.set_defaults(run=demo.main)
    for name, module, text in (
        ("inspect", inspect, "show rows in the terminal, with what is masked in them"),
        ("sweep", sweep, "show what a range of thresholds masks"),
        ("report", report, "write a page of HTML that shows what is masked and moves the threshold"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        module.add_arguments(command, scores_now)
        command.set_defaults(run=functools.partial(_told, module.main))
    for name, module, text in (
        ("forgetting", forgetting, "compare a tuned model with its initial one: target gained, the rest forgotten"),
        ("measure", measure, "drift, weight change, diversity and perplexity, each on its own"),
        ("generate", generate, "make a data set of the model's own answers, verified, in the place of people's"),
        ("experiment", experiment, "train and measure the arms of an experiment; a table of what came out"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=functools.partial(_told, module.main))
    return parser


def _told(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command whose errors say what to change, so that they need no traceback; its reader may go away."""
    try:
        status = run(args)
        sys.stdout.flush()
    except (ValueError, MissingExtraError, SandboxError) as error:
        print(f"stm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stm: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would flush it again
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

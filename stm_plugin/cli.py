"""The command `stm`."""

import argparse
import sys

from . import __version__
from .demo import run as demo

_EPILOG = """\
examples:
  stm demo                     see STM beside plain fine-tuning on a small real model
  stm sft --model_name_or_path MODEL --dataset_name chats.jsonl --use_peft --stm_threshold 2.5
  stm sft --config run.yaml    the same from a file; `stm sft --help` lists every option
  stm score --config run.yaml  score ahead, and see what thresholds would mask; `stm sft` then finds the scores
  stm score --verify FOLDER    check stored scores; --info FOLDER says what they are
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
    parser = make_parser()
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands but `sft` and `score`, which is TRL's; nothing heavy is loaded for it."""
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
    return parser


if __name__ == "__main__":
    sys.exit(main())

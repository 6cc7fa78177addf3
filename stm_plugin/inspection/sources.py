"""What the command lines of `stm inspect`, `stm sweep` and `stm report` name: stored scores, or a model and data."""

import argparse
from dataclasses import fields, replace
from typing import Any

from ..options import STRATEGIES, STMOptions
from .scored import ScoredData, read_scored

RULE = ("stm_threshold", "stm_mask_fraction", "stm_strategy", "stm_seed", "stm_keep_stop_tokens")
"""The options that, with the scores, decide what is masked."""


def score_now(arguments: list[str], rule: dict[str, Any]) -> ScoredData:
    """Score data with a model, or find that it was scored before; nothing is trained.

    Args:
        arguments: Those of `stm sft`, such as `--model_name_or_path` and `--dataset_name`.
        rule: Options of `RULE` in the place of those that the arguments, or their YAML, give.
    """
    from ..score_command import make_scores
    from ..sft import parse

    if "stm_strategy" in rule:  # which other options are checked against
        arguments = [*arguments, "--stm_strategy", rule["stm_strategy"]]
    script_args, training_args, *others = parse(arguments)
    if rule.keys() & {"stm_threshold", "stm_mask_fraction"}:
        training_args.stm_threshold = training_args.stm_mask_fraction = None
    for name, value in rule.items():
        setattr(training_args, name, value)
    trainer, run = make_scores(script_args, training_args, *others)
    data = trainer.stm_scored_data(run)
    # Where training would refuse the options, the run has others, which nobody asked to see.
    return data if run.options == STMOptions.from_args(training_args) else replace(data, receipt=None)


def names_a_model(arguments: list[str]) -> bool:
    """Whether a command line asks for scores made now: its flags are those of `stm sft`, without a SOURCE."""
    names = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    return bool(names & {"__model_name_or_path", "__config"})


def add_source(parser: argparse.ArgumentParser, sources: str | int | None, rule: tuple[str, ...]) -> None:
    """Add what every command takes: where the scores are, and which tokens are masked.

    Args:
        parser: The command's parser.
        sources: `nargs` of the sources; None for scores that are made now.
        rule: Which of `RULE` may be given.
    """
    if sources is None:
        parser.set_defaults(source=None)
    else:
        parser.add_argument(
            "source",
            nargs=sources,
            metavar="SOURCE",
            help="output folder or checkpoint of a run with STM, or an entry of the scores folder; in its place give "
            "--model_name_or_path and --dataset_name as to `stm sft`, and the data are scored now",
        )
    group = parser.add_argument_group("what is masked (those of the run, or else the defaults)")
    types = {"stm_threshold": float, "stm_mask_fraction": float, "stm_seed": int}
    for option in fields(STMOptions):
        if option.name not in rule:
            continue
        text = option.metadata["help"].replace("%", "%%")
        if option.name == "stm_keep_stop_tokens":
            group.add_argument(f"--{option.name}", action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = STRATEGIES if option.name == "stm_strategy" else None
            kind = types.get(option.name, str)
            group.add_argument(f"--{option.name}", type=kind, choices=choices, default=None, help=text)


def scored_of(args: argparse.Namespace) -> list[ScoredData]:
    """The scored data that a command line names.

    Args:
        args: What a parser with `add_source` read; `rest` holds what it did not know, for `stm sft`.
    """
    if args.source:
        return [read_scored(source) for source in args.source]
    return [score_now(args.rest, _rule_given(args))]


def options_of(args: argparse.Namespace, data: ScoredData) -> STMOptions:
    """The options of the run, those of the command line in their place, checked."""
    given = _rule_given(args)
    options = {name: getattr(data.options, name) for name in RULE}
    if given.keys() & {"stm_threshold", "stm_mask_fraction"}:
        options |= {"stm_threshold": None, "stm_mask_fraction": None}
    options |= given
    if data.compares_two_models(options["stm_strategy"]):
        options["stm_tuned_model"] = data.options.stm_tuned_model
    chosen = STMOptions(**options)
    chosen.check()
    return chosen


def _rule_given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in RULE if getattr(args, name, None) is not None}

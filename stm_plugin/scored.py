"""A data set with its scores, as `stm inspect`, `stm sweep` and `stm report` take it: found on disk, or made now."""

import argparse
import json
import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .constants import RECEIPT_NAME
from .document_store import KeptDocuments, documents_folder, find_documents, read_documents
from .documents import Documents
from .masks import Masks, apply_threshold, candidate_scores, threshold_in_nats
from .options import STRATEGIES, STRATEGIES_BY_TWO_MODELS, STMOptions
from .plan import ScorePlan
from .receipt import Receipt
from .selection import deciding_scores
from .store import MANIFEST, ScoresError, ScoresKey, ScoreStore, default_root, read_key

RULE = ("stm_threshold", "stm_mask_fraction", "stm_strategy", "stm_seed", "stm_keep_stop_tokens")
"""The options that, with the scores, decide what is masked."""


@dataclass(frozen=True)
class ScoredData:
    """A data set, the score of each of its N label tokens, and what they say.

    Attributes:
        kept: Its rows, texts and stop tokens.
        nll: NLL in nats of all label tokens, in the data set's order, shape `(N,)`, float32.
        key: Key of the scores.
        receipt: `stm.json` of the run that they belong to; None where they are not looked at as those of a run.
        title: What to call them; None for model and data.
        tuned_nll: NLL under the tuned model, of the shape of `nll`; None where there are no such scores.
    """

    kept: KeptDocuments
    nll: np.ndarray
    key: ScoresKey
    receipt: Receipt | None = None
    title: str | None = None
    tuned_nll: np.ndarray | None = None

    @property
    def documents(self) -> Documents:
        """The data set's rows."""
        return self.kept.documents

    @property
    def name(self) -> str:
        """Model and data, for a heading."""
        if self.title is not None:
            return self.title
        model = (self.receipt or {}).get("model")
        model = model.rstrip("/").rpartition("/")[2] if model else f"model {self.key.model[:8]}"
        return f"{model} on {self.kept.name}"

    @cached_property
    def options(self) -> STMOptions:
        """The options of the run; the defaults where there is none."""
        return options_of_receipt(self.receipt) if self.receipt is not None else STMOptions()

    def scores(self, options: STMOptions) -> np.ndarray:
        """The scores in nats that the options' strategy compares, shape `(N,)`, float32 (see `deciding_scores`).

        Raises:
            ValueError: For a strategy that compares with a tuned model, if there are no scores of one.
        """
        by_two = self.compares_two_models(options.stm_strategy)
        return deciding_scores(self.nll, self.tuned_nll if by_two else None, options.stm_strategy)

    def compares_two_models(self, strategy: str) -> bool:
        """Whether a strategy compares with a tuned model; ValueError if it does and there are no scores of one."""
        by_two = strategy in STRATEGIES_BY_TWO_MODELS
        if by_two and self.tuned_nll is None:
            raise ValueError(
                f"stm_strategy={strategy!r} compares with a tuned model's perplexities, which this run did not make. "
                "Give a run with that strategy, or score the data with --stm_tuned_model."
            )
        return by_two

    def masks(self, options: STMOptions | None = None) -> Masks:
        """What options mask; all tokens, where they say so.

        Args:
            options: Checked STM options; None for those of the run.
        """
        options = options or self.options
        stop_token_ids = set(self.kept.stop_token_ids)
        scores = self.scores(options)
        threshold_nats = threshold_in_nats(candidate_scores(self.documents, scores, options, stop_token_ids), options)
        return apply_threshold(self.documents, scores, threshold_nats, options, stop_token_ids)


def options_of_receipt(receipt: Receipt) -> STMOptions:
    """The options that decided a receipt's masks."""
    fraction = receipt["mask_fraction"]
    options = STMOptions(
        stm_threshold=None if fraction is not None else float(receipt["threshold"]),
        stm_mask_fraction=fraction,
        stm_strategy=receipt["strategy"],
        stm_tuned_model=receipt.get("tuned_model"),
        stm_seed=receipt["seed"],
        stm_keep_stop_tokens=receipt["keep_stop_tokens"],
        stm_reference=receipt["reference"],
    )
    options.check()
    return options


def read_scored(source: str | os.PathLike[str]) -> ScoredData:
    """Scored data from a folder.

    Args:
        source: A run's output folder or checkpoint (it has `stm.json`), or an entry of the scores folder.

    Raises:
        ScoresError: For a folder that is neither, or scores that are gone or damaged.
        DocumentsError: For rows that are gone or damaged.
    """
    folder = Path(source).expanduser()
    if (folder / RECEIPT_NAME).is_file():
        return _of_run(folder)
    if (folder / MANIFEST).is_file():
        key = read_key(folder)
        kept, plan = read_documents(find_documents(key.data))
        return ScoredData(kept, plan.spread(_read(ScoreStore(folder.resolve().parent), key, plan)), key)
    raise ScoresError(
        f"{folder} has neither a {RECEIPT_NAME} nor a {MANIFEST}. Give the output folder or a checkpoint of a run "
        f"with STM, or an entry of the scores folder (by default below {default_root()})."
    )


def _of_run(folder: Path) -> ScoredData:
    receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
    if "scores_key" not in receipt:
        raise ScoresError(
            f"{folder} was trained with stm_reference 'current', which scores anew at every step and keeps nothing to "
            "look at. Give a run with stm_reference 'initial', or score the data with a model."
        )
    key = ScoresKey(**receipt["scores_key"])
    path = documents_folder() / receipt["documents_file"] if receipt.get("documents_file") else None
    kept, plan = read_documents(path if path is not None and path.is_file() else find_documents(key.data))
    tuned_nll = None
    if "tuned_scores_key" in receipt:
        tuned_key = ScoresKey(**receipt["tuned_scores_key"])
        tuned_nll = plan.spread(_read(_store_of(receipt["tuned_scores_entry"]), tuned_key, plan))
    nll = plan.spread(_read(_store_of(receipt["scores_entry"]), key, plan))
    data = ScoredData(kept, nll, key, receipt, tuned_nll=tuned_nll)
    masks = data.masks()
    if data.documents.digest(masks.masked) != receipt["mask_digest"]:
        raise ScoresError(
            f"The rows and scores that are kept do not give the masks of {folder / RECEIPT_NAME} (its mask_digest "
            "differs): the rows were replaced by others, or the file was changed. Score the run's data again."
        )
    return data


def _store_of(entry: str) -> ScoreStore:
    """The store that an entry lies in; the default one if it is not there any more."""
    return ScoreStore(Path(entry).parent if Path(entry).is_dir() else None)


def _read(store: ScoreStore, key: ScoresKey, plan: ScorePlan) -> np.ndarray:
    scores = store.read(key, plan.num_scores)
    if scores is None:
        raise ScoresError(
            f"The scores are gone from {store.path(key)}. Put that folder back, or score the data again."
        )
    return scores


def score_now(arguments: list[str], rule: dict[str, Any]) -> ScoredData:
    """Score data with a model, or find that it was scored before; nothing is trained.

    Args:
        arguments: Those of `stm sft`, such as `--model_name_or_path` and `--dataset_name`.
        rule: Options of `RULE` in the place of those that the arguments, or their YAML, give.
    """
    from .score_command import make_scores
    from .sft import parse

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

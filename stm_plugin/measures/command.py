"""The command `stm measure`: one measure at a time, of models, adapters or data sets."""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._compat import missing_extra
from ..forgetting.reuse import local_weights
from ..loading import Source, base_of
from ..tokens import visible
from .inputs import (
    DTYPES,
    LoadedModel,
    add_template_kwargs,
    as_chats,
    is_adapter,
    load_model,
    read_prompts,
    read_rows,
    read_samples,
)

if TYPE_CHECKING:
    from ..answers import Prompt

_PROMPTS_HELP = (
    "plain text, one prompt a line; or .jsonl with `prompt` (text, or messages) or chats in `messages`, whose last "
    "answer is left off"
)
_PAPER = "The paper (MBPP, Llama 3 8B): ground truth 4.83 (7.04), rephrased 1.69 (0.16), self-output 1.16 (0.01)."


def add_arguments(parser: argparse.ArgumentParser, scores_now: bool = False) -> None:
    """Add the options of `stm measure`, a subcommand for each measure."""
    measures = parser.add_subparsers(title="measures", metavar="MEASURE", required=True)
    for name, add, run, text in (
        ("drift", _add_drift, _drift, "mean KL(initial || tuned), nats per token, on the initial model's own answers"),
        ("weight-change", _add_weight_change, _weight_change, "L2 norm of the change of all weights together"),
        ("self-bleu", _add_self_bleu, _self_bleu, "how alike a model's samples for one prompt are, 0 to 100"),
        ("perplexity", _add_perplexity, _perplexity, "perplexity of the answers of data sets under a model"),
    ):
        measure = measures.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        add(measure)
        measure.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there as JSON")
        measure.set_defaults(measure=run)


def main(args: argparse.Namespace) -> int:
    """Run `stm measure`.

    Raises:
        ValueError: For models, files or options that cannot be measured, saying what to change.
    """
    for package, extra, needed in (
        ("matplotlib", "report", getattr(args, "png", None) is not None),
        ("sacrebleu", "forgetting", args.measure is _self_bleu),
    ):
        if needed and find_spec(package) is None:
            raise missing_extra(package, extra)  # before a model answers for an hour
    for name in ("json", "png", "save_samples"):
        path = getattr(args, name, None)
        if path is not None and path.is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {path} is a folder; it takes a file.")
    measure: Callable[[argparse.Namespace], dict[str, Any]] = args.measure
    facts = measure(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(facts | {"versions": _versions()}, indent=2, allow_nan=False, ensure_ascii=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _add_drift(parser: argparse.ArgumentParser) -> None:
    _add_tuned_and_initial(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help=f"{_PROMPTS_HELP} (default: 24 general questions)"
    )
    add_template_kwargs(parser, "is given; a row's own column of that name prevails")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    _add_batch_size(parser)
    _add_model_options(parser, "both models, or the initial one with and without the adapter,")
    _add_png(parser, "the drift of each prompt")


def _drift(args: argparse.Namespace) -> dict[str, Any]:
    from ..answers import greedy_answers
    from ..demo.prompts import GENERAL_PROMPTS
    from .drift import measure_drift

    prompts, template_kwargs = read_prompts(args.prompts or GENERAL_PROMPTS, args.chat_template_kwargs)
    source = _initial(args)
    initial, initial_name = _load(args, source), source.name
    answers = greedy_answers(
        initial.model, initial.tokenizer, prompts, args.max_new_tokens, args.batch_size, template_kwargs
    )
    tuned = _load(args, Source(args.tuned), base=_base_of_tuned(args, source))
    drift = measure_drift(initial.model, tuned.model, answers)
    interval = drift.interval()
    _print_table(
        ["tuned", "initial", "drift (nats/token)", "95 % interval", "prompts", "answer tokens"],
        [
            args.tuned,
            initial_name,
            f"{drift.mean:.4g}",
            _range(interval),
            f"{len(prompts):,}",
            f"{drift.num_tokens:,}",
        ],
    )
    print("\nDrift: mean KL(initial || tuned) over the tokens of the initial model's own greedy answers.")
    print("Interval: bootstrap over prompts.")
    if args.png is not None:
        from .plots import plot_drift

        plot_drift(drift, [_text(prompt) for prompt in prompts], args.tuned, args.png)
    return {
        "measure": "drift",
        "initial": initial_name,
        "tuned": args.tuned,
        "nats_per_token": drift.mean,
        "interval_95": interval,
        "answer_tokens": drift.num_tokens,
        "max_new_tokens": args.max_new_tokens,
        "chat_template_kwargs": args.chat_template_kwargs,
        **_loaded_as(args),
        "prompts": [
            {"prompt": prompt, "nats_per_token": row.sum_nats / row.num_tokens, "answer_tokens": row.num_tokens}
            for prompt, row in zip(prompts, drift.rows, strict=True)
        ],
    }


def _add_weight_change(parser: argparse.ArgumentParser) -> None:
    _add_tuned_and_initial(parser)
    _add_model_options(parser, "the initial model")


def _weight_change(args: argparse.Namespace) -> dict[str, Any]:
    from .weight_change import adapter_change_norm, change_norm, checkpoint_change_norm

    adapter, source = is_adapter(args.tuned), _initial(args)
    initial = source.name
    if is_adapter(initial):  # training went on from one
        if args.load_in_4bit:
            raise ValueError(
                f"--initial {initial} is an adapter, and the change from it is that of merged weights, which 4 bits "
                "would round. Leave --load-in-4bit out."
            )
        norm = change_norm(_merged(args, initial), _merged(args, args.tuned))
    elif adapter:
        base = _base_of_tuned(args, source)
        if base == source:
            norm = adapter_change_norm(_load(args, Source(args.tuned), base=source).model)
        elif args.load_in_4bit:
            raise ValueError(
                f"{args.tuned} is an adapter of {base and base.name}, not of --initial {initial}, and the change from "
                "that is one of merged weights, which 4 bits would round. Leave --load-in-4bit out."
            )
        else:
            norm = change_norm(_merged(args, initial), _merged(args, args.tuned))
    elif args.load_in_4bit:
        tuned = load_model(args.tuned, dtype=args.dtype, device=args.device)
        norm = change_norm(_load(args, source).model, tuned.model)
    else:
        norm = checkpoint_change_norm(initial, args.tuned)
    _print_table(["tuned", "initial", "weight change (L2)"], [args.tuned, initial, f"{norm:.6g}"])
    print("\nWeight change: L2 norm of the difference of all weights together.")
    return {
        "measure": "weight-change",
        "initial": initial,
        "tuned": args.tuned,
        "is_adapter": adapter,
        "l2_norm": norm,
        **_loaded_as(args),
    }


def _add_self_bleu(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="MODEL", help="a model or an adapter that answers the prompts")
    source.add_argument(
        "--samples", type=Path, metavar="FILE", help="answers there are already: .jsonl, each line a list of texts"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help=f"{_PROMPTS_HELP} (default: 24 general questions)"
    )
    add_template_kwargs(parser, "is given; a row's own column of that name prevails")
    parser.add_argument("--k", type=_positive, default=5, metavar="N", help="samples of each prompt (default: 5)")
    parser.add_argument("--temperature", type=float, default=0.7, help="(default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: %(default)s)")
    parser.add_argument("--save-samples", type=Path, metavar="FILE", help="keep the samples, for --samples")
    _add_batch_size(parser)
    _add_model_options(parser, "the model")


def _self_bleu(args: argparse.Namespace) -> dict[str, Any]:
    from .diversity import check_samples, self_bleu, without_empty

    if args.samples is not None:
        if (args.prompts, args.chat_template_kwargs, args.save_samples) != (None, None, None):
            raise ValueError(
                "--samples takes the place of --model: leave --prompts, --chat-template-kwargs and --save-samples out "
                "with it."
            )
        samples, name = read_samples(args.samples), str(args.samples)
        sampling = None
    else:
        samples, sampling = _sampled(args)
        name = args.model
    kept = without_empty(samples)
    if not kept:
        check_samples(samples)
    measured = self_bleu(kept)
    interval = measured.interval()
    num_given = sum(map(len, samples))
    left_out = {"samples": num_given - measured.num_samples, "prompts": len(samples) - len(kept)}
    _print_table(
        ["model" if sampling else "samples", "self-BLEU", "95 % interval", "prompts", "samples"],
        [
            name,
            f"{measured.mean:.2f}",
            _range(interval),
            f"{len(measured.prompts):,}",
            f"{measured.num_samples:,}",
        ],
    )
    print("\nSelf-BLEU: each sample against the others of its prompt (sacrebleu, sentence level), mean over samples,")
    print("then prompts; higher is less diverse. Interval: bootstrap over prompts.")
    if left_out["samples"]:
        print(
            f"Left out: {left_out['samples']:,} of {num_given:,} samples, which are empty or alone with empty ones, "
            f"and with them {left_out['prompts']:,} of {len(samples):,} prompts."
        )
    return {
        "measure": "self-bleu",
        "of": name,
        "self_bleu": measured.mean,
        "interval_95": interval,
        "num_samples": measured.num_samples,
        "prompts": measured.prompts,
        "left_out": left_out,
        "sampling": sampling,
        "sacrebleu": version("sacrebleu"),
    }


def _sampled(args: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    """Samples of a model, and how they were made."""
    from ..demo.prompts import GENERAL_PROMPTS
    from .diversity import check_sampling, sample_answers

    if args.k < 2:
        raise ValueError(f"--k {args.k}: self-BLEU compares the samples of a prompt with each other; take at least 2.")
    prompts, template_kwargs = read_prompts(args.prompts or GENERAL_PROMPTS, args.chat_template_kwargs)
    sampling = {
        name: getattr(args, name) for name in ("k", "temperature", "top_p", "max_new_tokens", "seed", "batch_size")
    }
    check_sampling(args.k, args.temperature, args.top_p)
    loaded = _load(args, Source(args.model))
    samples = sample_answers(loaded.model, loaded.tokenizer, prompts, template_kwargs=template_kwargs, **sampling)
    if args.save_samples is not None:
        args.save_samples.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"prompt": prompt, "samples": texts}, ensure_ascii=False) + "\n"
            for prompt, texts in zip(prompts, samples, strict=True)
        ]
        args.save_samples.write_text("".join(lines), encoding="utf-8")
    return samples, sampling | {"chat_template_kwargs": args.chat_template_kwargs} | _loaded_as(args)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model or an adapter")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".jsonl with chats in `messages`, whose last message is the answer, or with `prompt` and `completion`",
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what to call the files (default: their names)")
    parser.add_argument(
        "--common",
        nargs="?",
        const="prompt",
        metavar="KEY",
        help="keep what is in all files, by the user's prompt, or by a field such as task_id",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N rows of each file")
    parser.add_argument(
        "--max-length", type=_positive, metavar="N", help="cut rows as training with it would (default: no row is cut)"
    )
    _add_model_options(parser, "the model")
    _add_png(parser, "the distributions")


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from .perplexity import common_rows, measure_perplexity

    labels = args.labels or [path.stem for path in args.data]
    if len(labels) != len(args.data):
        raise ValueError(f"--labels takes one name for each file, got {len(labels)} for {len(args.data)}.")
    if len(set(labels)) != len(labels):
        raise ValueError(f"the data sets need different names, got {', '.join(labels)}: give --labels.")
    data = {label: read_rows(path) for label, path in zip(labels, args.data, strict=True)}
    if args.common is not None:
        data = common_rows(data, args.common, args.limit)
    data = {label: rows[: args.limit] for label, rows in data.items()}
    for label, rows in data.items():
        as_chats(rows, label)  # before a model is loaded
    loaded = _load(args, Source(args.model))
    summaries = measure_perplexity(
        loaded.model,
        loaded.tokenizer,
        data,
        max_length=args.max_length,
        paired=args.common is not None,
        progress=True,
    )
    heads = ["data", "rows", "answer tokens", "mean (std)", "5 %", "25 %", "median", "75 %", "95 %", "all tokens"]
    lines = []
    for label, summary in summaries.items():
        cells = [f"{value:.3f}" for value in (*summary.quantiles.values(), summary.pooled)]
        spread = f"{summary.mean:.3f} ({summary.std:.3f})"
        lines.append([label, f"{len(summary.rows):,}", f"{summary.num_tokens:,}", spread, *cells])
    _print_table(heads, *lines)
    print(f"\nPerplexity under {visible(args.model)} of each row's answer: exp of the mean NLL of its tokens; mean,")
    print("standard deviation and quantiles over rows; all tokens: exp of the mean NLL of all of them together.")
    print(_PAPER)
    if args.png is not None:
        from .plots import plot_perplexity

        plot_perplexity(summaries, args.model, args.png)
    return {
        "measure": "perplexity",
        "model": args.model,
        "common": args.common,
        "max_length": args.max_length,
        **_loaded_as(args),
        "data": {
            label: {
                "file": path.name,
                "rows": len(summary.rows),
                "answer_tokens": summary.num_tokens,
                "mean": summary.mean,
                "std": summary.std,
                "quantiles": {str(share): value for share, value in summary.quantiles.items()},
                "all_tokens": summary.pooled,
                "row_perplexity": summary.rows,
            }
            for (label, summary), path in zip(summaries.items(), args.data, strict=True)
        },
    }


def _add_tuned_and_initial(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tuned", required=True, metavar="MODEL", help="an adapter, or a model after training that was saved whole"
    )
    parser.add_argument(
        "--initial",
        metavar="MODEL",
        help="the model before training (default: the one that the adapter names); an adapter is put on it if that "
        "is not on this machine",
    )


def _initial(args: argparse.Namespace) -> Source:
    """The model before training: the one asked for, or else the one that the adapter names."""
    if args.initial is not None:
        return Source(args.initial)
    if not is_adapter(args.tuned):
        raise ValueError(
            f"{args.tuned} is no adapter (it has no adapter_config.json), and a whole model does not say what it was "
            "before: name the model with --initial."
        )
    try:
        return base_of(args.tuned)
    except ValueError as error:
        raise ValueError(f"{error} Name it with --initial.") from None


def _base_of_tuned(args: argparse.Namespace, initial: Source) -> Source | None:
    """What a tuned adapter is put on: its own base if that is on this machine, or else the initial model.

    Where both have the same weights, it is the initial model. None for a model that is no adapter, or where the
    initial model is one: each is then on its own base.
    """
    if not is_adapter(args.tuned) or is_adapter(initial.name):
        return None
    if args.initial is None:
        return initial
    try:
        own = base_of(args.tuned)
    except ValueError:  # it names none
        return initial
    if own.name == initial.name:
        return initial
    weights = local_weights(own)
    if weights is None:
        print(f"Note: {args.tuned} names {own.name}, which is not here; it is put on {initial.name}.", file=sys.stderr)
        return initial
    if weights == local_weights(initial):
        return initial
    print(f"Note: {args.tuned} is on its own base, {own.name}, not on --initial.", file=sys.stderr)
    return own


def _add_model_options(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto (the default): as they are saved"
    )
    parser.add_argument(
        "--load-in-4bit", action="store_true", help=f"load {which} in 4 bit (NF4), as QLoRA does; needs bitsandbytes"
    )
    parser.add_argument("--device", help="such as cuda:1 (default: the first GPU, or else the CPU)")


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="answers made at once (default: %(default)s)"
    )


def _add_png(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--png", type=Path, metavar="FILE", help=f"also plot {what} there (needs the extra `report`)")


def _load(args: argparse.Namespace, source: Source, base: Source | None = None) -> LoadedModel:
    return load_model(
        source.name,
        revision=source.revision,
        base=base,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        device=args.device,
    )


def _merged(args: argparse.Namespace, name: str) -> Any:
    """A model with its adapter merged into it, in float32."""
    model: Any = load_model(name, dtype="float32", device=args.device).model
    return model.merge_and_unload() if is_adapter(name) else model


def _loaded_as(args: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": args.dtype, "load_in_4bit": args.load_in_4bit}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is needed, got {text!r}")
    return int(text)


def _print_table(heads: list[str], *rows: list[str]) -> None:
    """Print a Markdown table, first column to the left."""
    cells = [[visible(cell).replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (cells[0], rule, *cells[1:]):
        first, *others = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print(f"| {' | '.join(padded)} |")


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _text(prompt: "Prompt") -> str:
    """A prompt in one string: of a chat, its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "transformers", "peft", "trl")}
    return {"python": platform.python_version(), "stm_plugin": __version__} | packages

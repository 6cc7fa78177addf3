"""The command `stm forgetting`."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..loading import Source
from ..measures.inputs import add_template_kwargs
from .comparison import Comparison, check_arguments, compare
from .evaluation import Evaluation, read_evaluation
from .reuse import ModelFiles, Options, jobs_of, model_files, run_jobs
from .tables import as_json, markdown, sentences, table

EPILOG = """\
two ways:
  stm forgetting --tuned ADAPTER --target mbpp=test.jsonl --non-target gsm8k arc_challenge --output FOLDER
      evaluates the initial model (an adapter's base; else --initial MODEL) and the tuned one, and compares them
  stm forgetting --before FILE_OR_FOLDER --after FILE_OR_FOLDER --target mbpp --non-target gsm8k arc_challenge
      compares two results of lm-eval (results_*.json, with samples_*.jsonl beside it: lm_eval --log_samples)

A task is one of lm-eval's by its name, or KIND=FILE.jsonl or NAME:KIND=FILE.jsonl with KIND one of mbpp, gsm8k, math,
arc_challenge, ifeval. With --output, what has been evaluated there with the same weights, data and options is not
evaluated again: a run that was stopped goes on, and a second tuned model costs only its own evaluation.

exit status with --max-forgetting: 0 within the limit, 3 forgets more, 4 not enough evidence; 1 is an error
"""
_WAYS = "Either --tuned MODEL (with --initial MODEL unless it is an adapter), or --before and --after with results."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stm forgetting`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--tuned", metavar="MODEL", help="the tuned model: folder or hub id of a model or an adapter")
    parser.add_argument(
        "--initial",
        metavar="MODEL",
        help="the initial model (default: the base that the adapter names); an adapter is put on it if that is gone",
    )
    parser.add_argument("--before", type=Path, metavar="PATH", help="results of the initial model: a file or a folder")
    parser.add_argument("--after", type=Path, metavar="PATH", help="results of the tuned model: a file or a folder")
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--target", metavar="TASK", help="tasks that the model was tuned for", **many)
    parser.add_argument("--non-target", metavar="TASK", help="tasks that it was not tuned for", **many)
    parser.add_argument(
        "--metric", metavar="TASK=METRIC", help="a task's metric (default: lm-eval's first for it)", **many
    )
    parser.add_argument("--limit", metavar="N|TASK=N", help="most documents of every task, or of one", **many)
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows evaluated at once (8)")
    parser.add_argument("--device", help="where the model goes (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights (auto)")
    parser.add_argument("--load-in-4bit", action="store_true", help="load the base model in 4 bits (NF4)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: each task's own)")
    parser.add_argument(
        "--run-model-written-code",
        action="store_true",
        help="run code that the model writes, in a contained process (the local mbpp task needs it)",
    )
    add_template_kwargs(parser, "is given")
    parser.add_argument("--no-chat-template", action="store_true", help="prompts as plain text, not as a user's turn")
    parser.add_argument(
        "--max-forgetting", type=float, metavar="SHARE", help="largest allowed loss elsewhere: 0.05 is 5 %% (of BWT)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, metavar="SHARE", help="of the intervals (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples and of the evaluation (0)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="keep before/ and after/ there, and comparison.json, .md and .png of the last comparison",
    )


def main(args: argparse.Namespace) -> int:
    """Run `stm forgetting`.

    Returns:
        0; with a limit, 3 where the model forgets more and 4 where there is not enough evidence.

    Raises:
        ValueError: The options do not go together, or as `compare`, `read_evaluation` and `harness.evaluate` do.
    """
    if not args.target:
        raise ValueError("--target names the task that the model was tuned for.")
    if args.max_forgetting is not None and not args.non_target:
        raise ValueError("--max-forgetting is a limit on the loss elsewhere: name tasks with --non-target.")
    check_arguments(args.max_forgetting, args.confidence, args.seed)
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; it takes a folder, for several files.")
    if args.tuned is not None and args.before is None and args.after is None:
        before, after, target, non_target = _evaluated(args)
    elif args.tuned is None and args.before is not None and args.after is not None:
        before, after, target, non_target = *_read(args), args.target, args.non_target
    else:
        raise ValueError(_WAYS)
    comparison = compare(
        before,
        after,
        target,
        non_target,
        max_forgetting=args.max_forgetting,
        confidence=args.confidence,
        seed=args.seed,
    )
    print(table(comparison), *sentences(comparison), sep="\n\n")
    if args.output is not None:
        versions: dict[str, object] = {"stm_plugin": __version__, "before": before.versions, "after": after.versions}
        _write(comparison, versions, args.output)
    return comparison.exit_status


def _read(args: argparse.Namespace) -> tuple[Evaluation, Evaluation]:
    """Both evaluations from files."""
    without_use = {
        "--initial": args.initial,
        "--limit": args.limit,
        "--batch-size": args.batch_size,
        "--device": args.device,
        "--dtype": args.dtype,
        "--load-in-4bit": args.load_in_4bit,
        "--max-new-tokens": args.max_new_tokens,
        "--run-model-written-code": args.run_model_written_code,
        "--no-chat-template": args.no_chat_template,
        "--chat-template-kwargs": args.chat_template_kwargs,
    }
    given = [flag for flag, value in without_use.items() if value not in (None, False, [])]
    if given:
        raise ValueError(f"{', '.join(given)}: of no use with --before and --after, which are evaluated already.")
    if args.before.resolve() == args.after.resolve():
        raise ValueError(f"--before and --after are the same: {args.before}.")
    tasks = [*args.target, *args.non_target]
    metrics = _by_task(args.metric, "--metric TASK=METRIC", tasks)
    return read_evaluation(args.before, metrics, tasks), read_evaluation(args.after, metrics, tasks)


def _evaluated(args: argparse.Namespace) -> tuple[Evaluation, Evaluation, list[str], list[str]]:
    """Both evaluations by the harness, and the tasks' names in them."""
    from ..tasks.loading import load_tasks, parse_task

    target, non_target = ([parse_task(text).name for text in texts] for texts in (args.target, args.non_target))
    names = [*target, *non_target]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: named twice. A task counts once; NAME:KIND=FILE names another.")
    metrics = _by_task(args.metric, "--metric TASK=METRIC", names)
    limits = _limits(args.limit, names)
    options = Options(
        batch_size=8 if args.batch_size is None else args.batch_size,
        device=args.device,
        dtype=args.dtype or "auto",
        load_in_4bit=args.load_in_4bit,
        run_model_code=args.run_model_written_code,
        max_new_tokens=args.max_new_tokens,
        apply_chat_template=not args.no_chat_template,
        chat_template_kwargs=args.chat_template_kwargs or None,
        seed=args.seed,
    )
    if args.no_chat_template and args.chat_template_kwargs:
        raise ValueError("--chat-template-kwargs are for the chat template that --no-chat-template leaves out.")
    tasks = [*args.target, *args.non_target]
    try:
        jobs = [
            jobs_of(model, tasks, limits, options, None if args.output is None else args.output / name)
            for model, name in zip(_models(args), ("before", "after"), strict=True)
        ]
        to_run = dict.fromkeys(job.text for job in (*jobs[0], *jobs[1]) if not job.is_done)
        if to_run:  # whatever is wrong with a task shows before hours of another one
            loaded = load_tasks(list(to_run), args.run_model_written_code)
            _check_metrics(metrics, {name: task.aggregation() for name, task in loaded.tasks.items()})
        before, after = (run_jobs(of_model, metrics, _say) for of_model in jobs)
    except ImportError as error:  # what is not installed; it says how to get it
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        _say("What is evaluated stays: the same command goes on." if args.output else "Only --output keeps results.")
        raise
    return before, after, target, non_target


def _check_metrics(metrics: Mapping[str, str], known: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for a metric that its task lacks; a group's are known when it is evaluated."""
    for task, metric in metrics.items():
        there = list(known.get(task, ()))
        if there and metric.partition(",")[0] not in there:
            raise ValueError(f"--metric {task}={metric}: {task} has no such metric. It has: {' '.join(there)}.")


def _models(args: argparse.Namespace) -> tuple[ModelFiles, ModelFiles]:
    given = None if args.initial is None else Source(args.initial)
    tuned = model_files(args.tuned, base=given)
    source = given or tuned.base
    if source is None:
        raise ValueError(f"{args.tuned} is a whole model: name the one that it was tuned from with --initial MODEL.")
    initial = model_files(*source)
    if tuned.base is not None and tuned.base is given:
        _say(f"Note: the base that {tuned.name} names is not to be had; it is put on {given.name}.")
    if initial.identity == tuned.identity:
        _say(f"Note: {initial.name} and {tuned.name} are the same, byte for byte.")
    return initial, tuned


def _by_task(texts: Sequence[str], form: str, names: Sequence[str]) -> dict[str, str]:
    """`TASK=VALUE` as a dict.

    Raises:
        ValueError: A text has another form, or names another task or one twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        task, is_pair, value = text.partition("=")
        if not is_pair or not value:
            raise ValueError(f"{form}, got {text!r}.")
        if task not in names:
            raise ValueError(f"{form}: {task!r} is none of the tasks, which are {', '.join(names)}.")
        if task in values:
            raise ValueError(f"{form}: {task} is there twice.")
        values[task] = value
    return values


def _limits(texts: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """The limit of each task that has one."""
    form = "--limit N or TASK=N, N a whole number of at least 1"
    plain = [text for text in texts if "=" not in text]
    if len(plain) > 1:
        raise ValueError(f"{form}: got {' and '.join(plain)} for every task.")
    values = dict.fromkeys(names, plain[0]) if plain else {}
    values |= _by_task([text for text in texts if "=" in text], form, names)
    for value in values.values():
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{form}, got {value!r}.")
    return {task: int(value) for task, value in values.items()}


def _write(comparison: Comparison, versions: dict[str, object], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(as_json(comparison) | {"versions": versions}, indent=2, allow_nan=False)
    (folder / "comparison.json").write_text(facts + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    from .plots import write_plot

    try:
        write_plot(comparison, folder / "comparison.png")
    except ImportError as error:  # no reason to fail after hours of evaluation
        _say(f"No comparison.png: {error}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""What lm-eval measured of one model: scores of tasks, and of each of their documents, from its result files."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

NO_SAMPLES = "the results hold no samples"
SEVERAL_VALUES = "the metric has several values, or none, for a document"
NOT_THE_MEAN = "the metric is not the mean of its documents' values"

_NOT_THE_TASK = {"dataset_kwargs", "metadata", "num_fewshot", "tag", "task", "task_alias"}
"""Keys of a task's config that do not say how it is evaluated, or are compared under another name.

`dataset_kwargs` has the paths of local files, whose documents are compared by their hashes.
"""
_BETTER_WHEN_LOWER = "perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter wer cer".split()
"""Metrics of lm-eval, in results that do not say so."""
_ENVIRONMENT = ("lm_eval_version", "transformers_version", "chat_template_sha")


OFF_UNLESS_SET = ("system_instruction", "fewshot_as_multiturn")
"""Settings of all tasks that results have only where they are on."""


class TaskScore(NamedTuple):
    """What one task measured.

    Attributes:
        task: The task's name, or a group's.
        metric: lm-eval's name of the metric, with ",filter" unless the filter is "none".
        score: The score.
        num_samples: Documents that were scored; 0 where that is not known.
        samples: Score of each document by an id that is stable between two runs: its number in the task and the hash
            of its content, "3:5f2c..."; None where they are not known.
        stderr: Standard error of the score as lm-eval gives it.
        higher_is_better: Whether a higher score is a better one; None where the results do not say.
        settings: How the task was evaluated, name to value as text; two runs that differ in one measure two things.
        leaves: The tasks that a group consists of; else the task itself.
        why_no_samples: Why `samples` is None.
        prompt_digest: Hash over the hashes of all prompts; None where they are not known.
    """

    task: str
    metric: str
    score: float
    num_samples: int
    samples: dict[str, float] | None = None
    stderr: float | None = None
    higher_is_better: bool | None = True
    settings: Mapping[str, str] = MappingProxyType({})
    leaves: tuple[str, ...] = ()
    why_no_samples: str = NO_SAMPLES
    prompt_digest: str | None = None


class Evaluation(NamedTuple):
    """What lm-eval measured of one model.

    Attributes:
        model: The model's name.
        tasks: Scores by task.
        versions: Versions of what measured, and what else may differ between two runs without making them two things.
    """

    model: str
    tasks: dict[str, TaskScore]
    versions: dict[str, Any]


def evaluation_of(
    results: Mapping[str, Any],
    metrics: Mapping[str, str] | None = None,
    tasks: Sequence[str] | None = None,
    where: str = "these results",
) -> Evaluation:
    """Take from lm-eval's results what a comparison needs.

    Args:
        results: What `lm_eval.simple_evaluate` returns, or its JSON.
        metrics: Metric by task, "acc_norm" or with its filter "exact_match,strict-match". Of any other task, the first
            metric that lm-eval lists, with its first filter.
        tasks: Which tasks; None for all that have a score.
        where: What to call the results in an error.

    Raises:
        ValueError: These are no results of lm-eval, or have no such task or metric, or a score is no number.
    """
    samples = results.get("samples")
    return _evaluation(results, lambda task: None if samples is None else samples.get(task), metrics, tasks, where)


def read_evaluation(
    path: str | os.PathLike[str], metrics: Mapping[str, str] | None = None, tasks: Sequence[str] | None = None
) -> Evaluation:
    """Read result files of lm-eval.

    Args:
        path: A `results_*.json`, with the `samples_*.jsonl` of the same run beside it if they were written
            (`--log_samples`); or a folder with some, at any depth: of each task the newest file that has it.
        metrics: As for `evaluation_of`.
        tasks: As for `evaluation_of`.

    Raises:
        ValueError: As for `evaluation_of`; or there is no such file, or a folder holds results of several models.
    """
    files = _result_files(Path(path))
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    models: dict[str, Path] = {}
    for file in files:
        results = _read_json(file)
        models.setdefault(_model_name(results), file)
        for task in results["results"]:
            found.setdefault(task, (file, results))
    if len(models) > 1:
        listed = ", ".join(f"{name} ({file})" for name, file in models.items())
        raise ValueError(
            f"{path} holds results of several models: {listed}. Name the file, or a folder of one model. (What "
            "`stm forgetting --output` kept, the same command with its --tuned reads without evaluating anything.)"
        )
    wanted = list(found) if tasks is None else list(tasks)
    _check_names(wanted, metrics, found, str(path))
    scores: dict[str, TaskScore] = {}
    for file in dict.fromkeys(found[task][0] for task in wanted):
        here = [task for task in wanted if found[task][0] == file]
        results = found[here[0]][1]
        mine = {task: metric for task, metric in (metrics or {}).items() if task in here}
        chosen = here if tasks is not None else [task for task in here if _metric_keys(results["results"][task])]
        scores |= _evaluation(results, _sample_reader(file, results), mine, chosen, str(file)).tasks
    return Evaluation(
        _model_name(found[wanted[0]][1]) if wanted else next(iter(models)),
        {task: scores[task] for task in wanted if task in scores},
        _environment(found[wanted[0]][1] if wanted else {}),
    )


Rows = Iterable[Mapping[str, Any]]


def _evaluation(
    results: Mapping[str, Any],
    samples_of: Callable[[str], Rows | None],
    metrics: Mapping[str, str] | None,
    tasks: Sequence[str] | None,
    where: str,
) -> Evaluation:
    if not isinstance(results.get("results"), Mapping):
        raise ValueError(f"{where}: no results of lm-eval, which have an entry `results`.")
    if tasks is None:
        tasks = [task for task, entry in results["results"].items() if _metric_keys(entry)]
    _check_names(tasks, metrics, results["results"], where)
    scores = {task: _task_score(results, task, samples_of, (metrics or {}).get(task), where) for task in tasks}
    return Evaluation(_model_name(results), scores, _environment(results))


def _check_names(tasks: Iterable[str], metrics: Mapping[str, str] | None, there: Iterable[str], where: str) -> None:
    for task in (*tasks, *(metrics or {})):
        if task not in there:
            raise ValueError(f"{where}: no task {task!r}. There are: {', '.join(there) or 'none'}.")


def _task_score(
    results: Mapping[str, Any], task: str, samples_of: Callable[[str], Rows | None], metric: str | None, where: str
) -> TaskScore:
    entry, leaves = results["results"][task], _leaves(results, task)
    key = _metric_key(results, task, metric, where)
    name, _, filter_name = key.partition(",")
    score = _number(entry[key])
    if score is None or not math.isfinite(score):
        raise ValueError(f"{where}: {task} has no score, {key} is {entry[key]!r}.")
    samples, why, digest = _samples(leaves, samples_of, name, filter_name, where)
    if samples is not None and not math.isclose(np.mean([*samples.values()]), score, rel_tol=1e-6, abs_tol=1e-9):
        samples, why = None, NOT_THE_MEAN
    counts = [results.get("n-samples", {}).get(leaf, {}).get("effective", 0) for leaf in leaves]
    stderr = _number(entry.get(f"{name}_stderr,{filter_name}"))
    return TaskScore(
        task=task,
        metric=key.removesuffix(",none"),
        score=score,
        num_samples=len(samples or ()) or sum(counts) or int(entry.get("sample_len", 0)),
        samples=samples,
        stderr=stderr if stderr is not None and math.isfinite(stderr) else None,
        higher_is_better=_higher_is_better(results, (task, *leaves), name),
        settings=_settings(results, task, leaves),
        leaves=leaves,
        why_no_samples=why,
        prompt_digest=digest,
    )


def _higher_is_better(results: Mapping[str, Any], tasks: Iterable[str], metric: str) -> bool | None:
    """What results say of a metric for a task and its parts; of a group whose parts differ, lm-eval says nothing."""
    directions = results.get("higher_is_better") or {}
    said = [(directions.get(task) or {}).get(metric) for task in tasks]
    if False in said or (True not in said and metric in _BETTER_WHEN_LOWER):
        return False
    return True if True in said else None


def _metric_keys(entry: Mapping[str, Any]) -> list[str]:
    """Names of the metrics, each with its filter, in lm-eval's order."""
    return [key for key in entry if "," in key and not key.partition(",")[0].endswith("_stderr")]


def _metric_key(results: Mapping[str, Any], task: str, metric: str | None, where: str) -> str:
    keys = _metric_keys(results["results"][task])
    if not keys:
        parts = ", ".join(results.get("group_subtasks", {}).get(task, [])) or "none"
        raise ValueError(f"{where}: {task} has no score of its own. Name its tasks instead: {parts}.")
    if metric is None:
        return keys[0]
    for key in keys:
        if metric in (key, key.partition(",")[0]):
            return key
    raise ValueError(f"{where}: {task} has no metric {metric!r}. It has: {' '.join(keys)}.")


def _samples(
    leaves: Sequence[str], samples_of: Callable[[str], Rows | None], name: str, filter_name: str, where: str
) -> tuple[dict[str, float] | None, str, str | None]:
    """Scores of documents by id, or why there are none; and a digest of the prompts."""
    scores: dict[str, float] = {}
    prompts: list[str] = []
    why = ""
    for leaf in leaves:
        rows = samples_of(leaf)
        if rows is None:
            return None, NO_SAMPLES, None
        for row in rows:
            if row.get("filter", "none") != filter_name:
                continue
            value = _number(row.get(name))
            key = f"{row.get('doc_id', '')}:{row.get('doc_hash', '')}"
            key = key if len(leaves) == 1 else f"{leaf}/{key}"
            if value is None:
                why = SEVERAL_VALUES
            elif not math.isfinite(value):
                raise ValueError(f"{where}: document {row.get('doc_id')} of {leaf} has the score {value}.")
            elif key in scores:
                raise ValueError(f"{where}: document {row.get('doc_id')} of {leaf} is there twice.")
            else:
                scores[key] = value
            prompts.append(f"{key} {row.get('prompt_hash', '')}")
    if why or not scores:
        return None, why or NO_SAMPLES, None
    return scores, "", _digest(sorted(prompts))


def _number(value: Any) -> float | None:
    """A number or a truth value as a number; None for all else, such as lm-eval's "N/A".

    lm-eval 0.4.11 writes numbers of NumPy's types as texts.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):
        value = {"True": True, "False": False}.get(value, value)
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, bool | int | float) else None


def _leaves(results: Mapping[str, Any], task: str) -> tuple[str, ...]:
    parts = results.get("group_subtasks", {}).get(task) or []
    return tuple(leaf for part in parts for leaf in _leaves(results, part)) or (task,)


def _settings(results: Mapping[str, Any], task: str, leaves: Sequence[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for leaf in leaves:
        config = results.get("configs", {}).get(leaf, {})
        facts = {key: value for key, value in config.items() if key not in _NOT_THE_TASK}
        for name, key in (("version", "versions"), ("num_fewshot", "n-shot")):
            if leaf in results.get(key, {}):
                facts[name] = results[key][leaf]
        settings |= {key if leaf == task else f"{key} of {leaf}": _text(value) for key, value in facts.items()}
    if "chat_template" in results:
        settings["chat template"] = "applied" if results["chat_template"] else "not applied"
    return settings | {name: _text(results[name]) for name in OFF_UNLESS_SET if results.get(name)}


def _text(value: Any) -> str:
    """A setting as text; of a function without its address, of an absolute path only the last name."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return re.sub(r'"(?:/|[A-Za-z]:)[^"\n]*[/\\]([^"/\\]+)"', r'"\1"', re.sub(r" at 0x[0-9a-f]+", "", text))


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: results[name] for name in _ENVIRONMENT if results.get(name) is not None}
    dtype = results.get("config", {}).get("model_dtype")
    return facts if dtype is None else facts | {"model_dtype": str(dtype)}


def _model_name(results: Mapping[str, Any]) -> str:
    config = results.get("config", {})
    arguments = config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    named = arguments if isinstance(arguments, Mapping) else {}
    return str(results.get("model_name") or named.get("peft") or named.get("pretrained") or config.get("model") or "?")


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _result_files(path: Path) -> list[Path]:
    """The files to read, newest first (lm-eval ends their names with the time)."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder. It takes a results_*.json of lm-eval, or a folder of them.")
    files = sorted(path.rglob("results_*.json"), key=lambda file: (file.name, str(file)), reverse=True)
    if not files:
        raise ValueError(f"{path}: no results_*.json of lm-eval in this folder, nor below it.")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a JSON file ({error}).") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise ValueError(f"{file}: no results of lm-eval, which have an entry `results`.")
    return results


def _sample_reader(file: Path, results: Mapping[str, Any]) -> Callable[[str], Rows | None]:
    """What gives the samples of a task: those in the results, or the lines of the file beside them."""

    def samples_of(task: str) -> Rows | None:
        if "samples" in results:
            return results["samples"].get(task)
        lines = file.parent / f"samples_{task}_{file.stem.rpartition('_')[2]}.jsonl"
        return _read_lines(lines) if lines.is_file() else None

    return samples_of


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}: line {number} is not JSON ({error}).") from None

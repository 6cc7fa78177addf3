"""Evaluations that are kept, and used again where the same model, task and options come back.

    FOLDER/TASK/KEY/MODEL/results_*.json     lm-eval's files
    FOLDER/TASK/KEY/evaluation.json          what KEY is a hash of; written last, so only where the files are whole

Of the model, the bytes of its weights, tokenizer and configs count, not its path; of a hub id, its commit.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from .._compat import missing_extra
from .evaluation import Evaluation, evaluation_of, read_evaluation

_RECORD = "evaluation.json"
_MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.index.json", "*.gguf", "*.py"),
    *("config.json", "generation_config.json", "adapter_config.json", "chat_template*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
)
"""What of a model's folder makes its answers: no checkpoints below it, no optimizer state."""

Say = Callable[[str], None]


class Options(NamedTuple):
    """How a model is evaluated; names and meanings are those of `harness.evaluate`."""

    batch_size: int = 8
    device: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    run_model_code: bool = False
    max_new_tokens: int | None = None
    apply_chat_template: bool = True
    seed: int = 0


_NOT_THE_RESULT = ("batch_size", "device", "run_model_code")
"""Options that change no score, but for rounding; without `run_model_code` a task that needs it has none."""


class ModelFiles(NamedTuple):
    """Where a model's files are.

    Attributes:
        name: Folder or hub id.
        adapter_config: Its adapter_config.json, if it is an adapter.
        identity: What its function depends on: hashes of files, or a commit; of an adapter, its base's too.
    """

    name: str
    adapter_config: Path | None
    identity: dict[str, Any]

    @property
    def base(self) -> str | None:
        """Folder or hub id of an adapter's base model; None for a model that is none."""
        return None if self.adapter_config is None else _base(self.adapter_config)


def model_files(name: str) -> ModelFiles:
    """Look up a model.

    Args:
        name: Folder or hub id, of an adapter too.

    Raises:
        ValueError: It is nowhere to be had, or an adapter does not name its base.
    """
    folder = Path(name)
    if folder.is_dir():
        config = folder / "adapter_config.json"
        files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
        identity: dict[str, Any] = {"files": {file.name: _hash(file) for file in sorted(files)}}
        if not files:
            raise ValueError(
                f"{name}: no model in this folder, which has neither config.json nor adapter_config.json."
            )
        adapter_config = config if config.is_file() else None
    else:
        adapter_config, found = _hub_file(name, "adapter_config.json"), _hub_file(name, "config.json")
        file = adapter_config or found
        if file is None:
            raise ValueError(f"{name}: no such folder, and no model of this name could be had from the hub.")
        identity = {"hub": name, "commit": file.parent.name}
    if adapter_config is not None:
        identity["base"] = model_files(_base(adapter_config)).identity
    return ModelFiles(name, adapter_config, identity)


def _base(adapter_config: Path) -> str:
    base = json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter_config} names no base model (base_model_name_or_path).")
    return str(base)


def _hub_file(name: str, file: str) -> Path | None:
    """A file of a hub repository, whose folder there is named by the commit; None if there is none to be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


class Job(NamedTuple):
    """The evaluation of one model on one task.

    Attributes:
        model: The model.
        text: The task, as `harness.parse_task` reads it.
        task: Its name in the results.
        arguments: Keyword arguments for `harness.evaluate`.
        place: Folder of its results; None to keep none.
        facts: What the results depend on.
    """

    model: ModelFiles
    text: str
    task: str
    arguments: dict[str, Any]
    place: Path | None
    facts: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether the results are there from before."""
        return self.place is not None and (self.place / _RECORD).is_file()


def jobs_of(
    model: ModelFiles, tasks: Sequence[str], limits: dict[str, int], options: Options, folder: Path | None
) -> list[Job]:
    """The evaluations of a model on tasks.

    Args:
        model: The model.
        tasks: Tasks, as `harness.parse_task` reads them.
        limits: Most documents by task.
        options: How to evaluate.
        folder: Where results are kept; None to keep none.

    Raises:
        ValueError: A task's form is not allowed.
        ImportError: lm-eval is not installed.
    """
    from ..tasks.loading import parse_task

    jobs = []
    for text in tasks:
        task = parse_task(text)
        arguments: dict[str, Any] = options._asdict() | {"limit": limits.get(task.name)}
        facts = {
            "model": model.identity,
            "task": [task.name, task.kind, None if task.file is None else _hash(task.file)],
            "options": {name: value for name, value in arguments.items() if name not in _NOT_THE_RESULT},
            "versions": _versions(),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        place = None if folder is None else folder / re.sub(r"[^\w.-]", "_", task.name) / key
        jobs.append(Job(model, text, task.name, arguments, place, facts))
    return jobs


def run_jobs(jobs: Sequence[Job], metrics: dict[str, str], say: Say) -> Evaluation:
    """Run a model's evaluations, but for those that are there.

    Args:
        jobs: At least one, all of one model.
        metrics: Metric by task, as for `evaluation_of`.
        say: Takes a line of progress at a time.

    Raises:
        ValueError: As `harness.evaluate` and `evaluation_of` do.
        ImportError: As `harness.evaluate` does.
    """
    from .harness import evaluate

    parts: list[Evaluation] = []
    for job in jobs:
        metric = {job.task: metrics[job.task]} if job.task in metrics else None
        if job.is_done:
            say(f"{job.model.name}: {job.task} was evaluated before, in {job.place}")
        else:
            say(f"{job.model.name}: evaluating {job.task} ...")
            results = evaluate(job.model.name, [job.text], output=job.place, **job.arguments)
        if job.place is None:
            parts.append(evaluation_of(results, metric, [job.task]))
            continue
        if not job.is_done:
            _write(job.place / _RECORD, job.facts)
        parts.append(read_evaluation(job.place, metric, [job.task]))
    scores = {name: score for part in parts for name, score in part.tasks.items()}
    return Evaluation(jobs[0].model.name, scores, parts[0].versions)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    if find_spec("lm_eval") is None:
        raise missing_extra("lm_eval", "forgetting")
    return {"stm_plugin": __version__, "lm_eval": version("lm_eval"), "transformers": version("transformers")}


def _hash(file: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def _write(file: Path, facts: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(new, file)

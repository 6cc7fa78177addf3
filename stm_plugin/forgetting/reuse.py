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
from ..loading import Source, base_in
from ..tasks import definition_version
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
    chat_template_kwargs: dict[str, Any] | None = None
    seed: int = 0


_NOT_THE_RESULT = ("batch_size", "device", "run_model_code")
"""Options that change no score, but for rounding; without `run_model_code` a task that needs it has none."""


class ModelFiles(NamedTuple):
    """Where a model's files are.

    Attributes:
        name: Folder or hub id.
        arguments: What `harness.evaluate` takes to load it.
        base: The model that an adapter is put on; None for a whole model.
        identity: What its function depends on: hashes of files, or a commit; of an adapter, its base's too.
    """

    name: str
    arguments: dict[str, Any]
    base: Source | None
    identity: dict[str, Any]


def model_files(name: str, revision: str | None = None, *, base: Source | None = None) -> ModelFiles:
    """Look up a model.

    Args:
        name: Folder or hub id, of an adapter too.
        revision: On the hub; None for the newest.
        base: Model that an adapter is put on where the one that its config names is not to be had.

    Raises:
        ValueError: It is nowhere to be had, or an adapter names no base that is.
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
        adapter_config, found = (_hub_file(name, file, revision) for file in ("adapter_config.json", "config.json"))
        file = adapter_config or found
        if file is None:
            raise ValueError(f"{name}: no such folder, and no model of this name could be had from the hub.")
        identity = {"hub": name, "commit": file.parent.name}
    arguments = _arguments(Source(name, revision))
    if adapter_config is None:
        return ModelFiles(name, arguments, None, identity)
    try:
        own = base_in(adapter_config)
        identity["base"] = model_files(*own).identity
    except ValueError:
        if base is None:
            raise
        own, identity["base"] = base, model_files(*base).identity
        arguments = _arguments(base) | {"adapter": name}
    return ModelFiles(name, arguments, own, identity)


def _arguments(model: Source) -> dict[str, Any]:
    return {"model": model.name} | ({} if model.revision is None else {"revision": model.revision})


def _hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub repository, whose folder there is named by the commit; None if there is none to be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
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


def local_weights(model: Source) -> frozenset[str] | None:
    """Hashes of the files of a model's weights; None where they are not on this machine."""
    from huggingface_hub import snapshot_download

    folder = Path(model.name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
        except (OSError, ValueError):
            return None
    files = [file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    return frozenset(map(_hash, files)) or None


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
            "definition": None if task.kind is None else definition_version(task.kind),
            "options": {  # without the younger one where it is not given, so that what was kept before it is found
                name: value
                for name, value in arguments.items()
                if name not in _NOT_THE_RESULT and not (name == "chat_template_kwargs" and value is None)
            },
            "versions": _versions(),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        place = None if folder is None else folder / re.sub(r"[^\w.-]", "_", task.name) / key
        jobs.append(Job(model, text, task.name, arguments, place, facts))
    return jobs


def run_jobs(jobs: Sequence[Job], metrics: dict[str, str], say: Say) -> Evaluation:
    """Run a model's evaluations, but for those that are there; the model is loaded once.

    Args:
        jobs: At least one, all of one model.
        metrics: Metric by task, as for `evaluation_of`.
        say: Takes a line of progress at a time.

    Raises:
        ValueError: As `harness.evaluate` and `evaluation_of` do.
        ImportError: As `harness.evaluate` does.
    """
    from . import harness

    parts: list[Evaluation] = []
    loaded: harness.LoadedModel | None = None
    for job in jobs:
        metric = {job.task: metrics[job.task]} if job.task in metrics else None
        if job.is_done:
            say(f"{job.model.name}: {job.task} was evaluated before, in {job.place}")
        else:
            arguments = dict(job.arguments)
            how = {name: arguments.pop(name) for name in ("device", "dtype", "load_in_4bit")}
            if loaded is None:
                loaded = harness.load(**job.model.arguments, **how)
            say(f"{job.model.name}: evaluating {job.task} ...")
            results = harness.evaluate(loaded, [job.text], output=job.place, **arguments)
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

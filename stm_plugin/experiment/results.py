"""The JSON files of an experiment: written whole or not at all, with scores of documents in little space.

    initial.json         what was measured of the initial model, and the ids of all documents
    runs/ARM/SEED.json   one training run: settings, masks, losses, seconds, and what was measured of the model
    perplexity/*.json    perplexity of training answers under the initial model, one file for each data set
    scoring/*.json       seconds that scoring took, one file for each entry of scores
    models/ARM-SEED      a trained model, with the settings of its run

Documents' scores are lists in the order of `initial.json`'s ids.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..forgetting.evaluation import Evaluation, TaskScore
from .config import RunName
from .settings import Settings, plain

INITIAL_NAME = "initial.json"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "numpy", "bitsandbytes")

Facts = dict[str, Any]


def run_path(output: Path, run: RunName) -> Path:
    """The file of a run's result."""
    return output / "runs" / run.arm / f"{run.seed}.json"


def model_path(output: Path, run: RunName) -> Path:
    """The folder of a run's trained model, where it is kept."""
    return output / "models" / f"{run.arm}-{run.seed}"


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    """Write JSON so that a reader finds the whole of it or what was there before; no infinity, no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(plain(facts), indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_json(path: Path) -> Facts | None:
    """What a result file holds; None where there is none.

    Raises:
        ValueError: If it is no JSON.
    """
    try:
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it, and its run is done again.") from None
    return facts


def settings_digest(settings: Settings) -> str:
    """A short name for settings: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def document_ids(evaluation: Evaluation) -> dict[str, list[str]]:
    """Ids of the documents of each task that has their scores, in the order that packed scores have."""
    return {name: sorted(score.samples) for name, score in evaluation.tasks.items() if score.samples is not None}


def packed_evaluation(evaluation: Evaluation) -> Facts:
    """An evaluation as JSON has it: of the documents' scores only the values, in the order of their sorted ids."""
    return {
        "model": evaluation.model,
        "versions": plain(evaluation.versions),
        "tasks": {name: _packed_score(score) for name, score in evaluation.tasks.items()},
    }


def _packed_score(score: TaskScore) -> Facts:
    facts = plain(score._asdict())
    if score.samples is not None:
        ids = sorted(score.samples)
        values = [score.samples[name] for name in ids]
        facts["samples"] = [int(value) if float(value).is_integer() else value for value in values]
        facts["documents_digest"] = _digest(ids)
    return facts


def unpacked_evaluation(facts: Facts, ids: Mapping[str, Sequence[str]]) -> Evaluation:
    """What `packed_evaluation` packed.

    Args:
        facts: A packed evaluation.
        ids: Ids of each task's documents, as `initial.json` has them.

    Raises:
        ValueError: If a task was evaluated on other documents than those.
    """
    tasks = {}
    for name, packed in facts["tasks"].items():
        packed = dict(packed)
        digest, values = packed.pop("documents_digest", None), packed["samples"]
        if values is not None:
            if digest != _digest(ids.get(name, [])):
                raise ValueError(f"{name} was evaluated on other documents than the initial model's. Run it again.")
            packed["samples"] = dict(zip(ids[name], map(float, values), strict=True))
        tasks[name] = TaskScore(**packed | {"leaves": tuple(packed["leaves"])})
    return Evaluation(facts["model"], tasks, facts["versions"])


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def finite_or_none(value: float) -> float | None:
    """A number, or None for one that JSON lacks, such as the loss of a run that diverged."""
    return float(value) if math.isfinite(value) else None


def environment() -> Facts:
    """Versions, machine, commit of this package, and the date: what else a result may depend on."""
    versions = {"stm_plugin": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": _machine(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> Facts:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"platform": f"{platform.system()} {platform.machine()}", "cores": cores, "gpus": gpus}


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, with `+` where files of it have changed; None elsewhere."""
    here = Path(__file__).resolve().parents[2]
    try:
        if not (here / ".git").exists():
            return None
        done = [
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=30, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0].stdout.strip() + ("+" if done[1].stdout.strip() else "")

"""The settings that a result depends on: what they say of tasks and files, and how two of them differ."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
"""What a result depends on, as JSON can hold it."""


LOOKED_UP = ("files", "models")
"""Settings that are digests of what is behind names: None where nobody looked, or for what was not to be had."""


def task_name(task: str) -> str:
    """What results call a task: of NAME:KIND=FILE the NAME, of KIND=FILE the KIND, else the hub task itself."""
    return task.partition("=")[0].partition(":")[0] if "=" in task else task


def task_file(task: str) -> str | None:
    """The file of a local task, relative to the data folder; None for a hub task."""
    return task.partition("=")[2] or None


def task_kind(task: str) -> str | None:
    """The kind of a local task, NAME:KIND=FILE or KIND=FILE; None for a hub task."""
    name, equals, _ = task.partition("=")
    return name.rpartition(":")[2] if equals else None


def with_folder(task: str, folder: Path) -> str:
    """A task whose file is looked for in a folder."""
    name, equals, file = task.partition("=")
    return f"{name}={folder / file}" if equals else task


def digests(names: Iterable[str], folder: Path) -> dict[str, str]:
    """SHA-256 of files in a folder, by name.

    Raises:
        ValueError: For a file that is missing, with those that the folder has.
    """
    found = {}
    for name in names:
        if not (folder / name).is_file():
            there = ", ".join(sorted(path.name for path in folder.glob("*.json*"))) or "no JSON file"
            raise ValueError(
                f"{folder / name}: no such file. --data must be a folder that has it; this one has {there}."
            )
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


def differences(before: Settings, now: Settings, path: str = "") -> list[str]:
    """What differs between two settings, a line each; what is `LOOKED_UP` only where both have it."""
    lines = []
    for key in dict.fromkeys([*before, *now]):
        name, old, new = f"{path}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{name}.")
        elif old != new and not ((name in LOOKED_UP or path == "models.") and (old is None or new is None)):
            lines.append(f"{name} was {_short(old)}, is now {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples as lists, and numbers that it lacks (inf, nan) as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""Tasks by the names that users give them: read, checked, and loaded with their rows."""

import difflib
import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._compat import missing_extra
from . import KINDS, definition

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

CODE_FLAG = "--run-model-written-code"
"""The flag of the command line that stands for `run_model_code`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NEEDS_PUNKT = ("ifeval", "leaderboard")
"""What the names of the hub tasks that need NLTK's data have in common."""
_MODELS = "lm_eval.models.huggingface"


class Task(NamedTuple):
    """A task as a user names it.

    Attributes:
        name: Its name in the results.
        kind: Kind of a local task; None for one of lm-eval's own.
        file: A local task's rows, JSON lines; None for one of lm-eval's own.
    """

    name: str
    kind: str | None
    file: Path | None


def parse_task(text: str) -> Task:
    """Reads a task's name: one of lm-eval's (`gsm8k`), `KIND=FILE.jsonl` or `NAME:KIND=FILE.jsonl`.

    Raises:
        ValueError: The kind or the name is not allowed, or there is no such file.
    """
    head, is_local, file = text.partition("=")
    if not is_local:
        if not text.strip():
            raise ValueError(f"a task needs a name: one of lm-eval's, or {_local_form()}.")
        return Task(text, None, None)
    name, has_name, kind = head.rpartition(":")
    if kind not in KINDS:
        raise ValueError(f"{text!r}: there is no kind of local task {kind!r}; write {_local_form()}.")
    if not has_name:
        name = kind
    if not _NAME.fullmatch(name):
        raise ValueError(f"{text!r}: a task's name is of letters, digits, '_', '-' and '.', not {name!r}.")
    if not Path(file).is_file():
        raise ValueError(f"{text!r}: there is no file {file}.")
    return Task(name, kind, Path(file))


class LoadedTasks(NamedTuple):
    """Tasks with their rows.

    Attributes:
        specs: What lm-eval takes: tasks, and names of its groups.
        tasks: Every single task by its name.
        manager: The manager that knows them.
        runs_code: Whether there is one that runs code of the model.
    """

    specs: list[Any]
    tasks: dict[str, Any]
    manager: "TaskManager"
    runs_code: bool


def load_tasks(texts: Sequence[str], run_model_code: bool) -> LoadedTasks:
    """Reads, checks and loads tasks with their rows.

    Args:
        texts: Tasks, as `parse_task` reads them.
        run_model_code: Whether code that the model writes may be run, contained.

    Raises:
        ImportError: lm-eval, or what a task needs, is not installed.
        ValueError: There is no task, or one is not allowed, or cannot be loaded.
    """
    tasks = [parse_task(text) for text in texts]
    if not tasks:
        raise ValueError(f"there is no task to evaluate: name one of lm-eval's, or {_local_form()}.")
    if any(task.kind == "mbpp" for task in tasks) and not run_model_code:
        raise ValueError(
            "the task mbpp runs code that the model writes, in a contained process, which must be asked for: by "
            f"{CODE_FLAG}, in Python run_model_code=True."
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm_eval", "forgetting")
    with quiet():
        return _loaded(tasks)


def _loaded(tasks: Sequence[Task]) -> LoadedTasks:
    """Loads tasks, local ones through definitions that name their files."""
    from lm_eval.tasks import TaskManager

    specs: list[Any] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="stm-tasks-") as folder:
        for number, task in enumerate(tasks):
            if task.kind is not None and task.file is not None:
                config: dict[str, Any] = {"include": str(definition(task.kind)), "task": task.name}
                config |= {"dataset_kwargs": {"file": str(task.file.resolve())}}
                Path(folder, f"{number}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        # Reading lm-eval's own thousands of definitions takes seconds.
        manager = TaskManager(include_path=folder, include_defaults=any(task.kind is None for task in tasks))
        for task in tasks:
            parts, is_group = _load_task(manager, task)
            for name in parts.keys() & found.keys():
                raise ValueError(f"two tasks are named {name}: give a local one another name, NAME:KIND=FILE.jsonl.")
            found |= parts
            specs += [task.name] if is_group else parts.values()
    return LoadedTasks(specs, found, manager, any(task.kind == "mbpp" for task in tasks))


def _load_task(manager: "TaskManager", task: Task) -> tuple[dict[str, Any], bool]:
    """Loads what one name stands for: a task, several, or a group of several (True)."""
    if task.kind is not None:
        return _flat(manager.load_task_or_group(task.name)), False
    if task.name not in manager.task_index:
        near = difflib.get_close_matches(task.name, manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm_eval ls tasks` lists them."
        raise ValueError(f"lm-eval has no task {task.name!r}{hint} A local one is {_local_form()}.")
    if _asks_for_unsafe_code(manager.task_index[task.name]):
        raise _runs_code_in_process(task.name)
    if any(part in task.name for part in _NEEDS_PUNKT):
        from .punkt import ensure_punkt

        ensure_punkt()
    try:
        nested = manager.load_task_or_group(task.name)
    except Exception as error:  # of data, network and imports, which share no base class
        raise ValueError(
            f"lm-eval's task {task.name!r} could not be loaded: {str(error).strip() or type(error).__name__}\n"
            f"Its data come from the hub or its cache. Rows of your own can be evaluated as {_local_form()}."
        ) from error
    tasks = _flat(nested)
    for name, part in tasks.items():
        if getattr(part, "UNSAFE_CODE", False):
            raise _runs_code_in_process(name)
    return tasks, any(isinstance(value, dict) for value in nested.values())


def _flat(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """The tasks in groups of groups of tasks, by their names."""
    tasks: dict[str, Any] = {}
    for key, value in nested.items():
        tasks |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return tasks


def _asks_for_unsafe_code(entry: Any) -> bool:
    """Whether a task of lm-eval says that it runs code of the model; read before anything of it is imported."""
    path = entry["yaml_path"] if isinstance(entry, dict) else entry.yaml_path  # dicts up to lm-eval 0.4.11
    return bool(isinstance(path, str | Path) and _definition_in(Path(path)).get("unsafe_code"))


def _definition_in(path: Path) -> dict[str, Any]:
    """A task definition of lm-eval with what it includes, its functions as mere names."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML in which a function is its name."""

    Loader.add_constructor("!function", lambda _, node: node.value)
    own = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    includes = own.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _definition_in(path.parent / include)
    return merged | own


def _runs_code_in_process(name: str) -> ValueError:
    return ValueError(
        f"lm-eval's task {name!r} runs code that the model writes without containing it. The local task "
        f"mbpp=FILE.jsonl runs it contained, with {CODE_FLAG}."
    )


def _local_form() -> str:
    return f"KIND=FILE.jsonl or NAME:KIND=FILE.jsonl with KIND one of {', '.join(KINDS)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's log to errors, and to prompts that are too long for a model; its progress bars stay."""
    if _is_about_truncation in logging.getLogger(_MODELS).filters:  # quiet already
        yield
        return
    everything, models = logging.getLogger("lm_eval"), logging.getLogger(_MODELS)
    levels = everything.level, models.level
    everything.setLevel(logging.ERROR)
    models.setLevel(logging.WARNING)
    models.addFilter(_is_about_truncation)
    try:
        with warnings.catch_warnings():
            # lm-eval 0.4.13's word for the one way of loading tasks that 0.4.11 has as well
            warnings.filterwarnings("ignore", message="Use TaskManager.load", category=DeprecationWarning)
            yield
    finally:
        models.removeFilter(_is_about_truncation)
        everything.setLevel(levels[0])
        models.setLevel(levels[1])


def _is_about_truncation(record: logging.LogRecord) -> bool:
    return "runcat" in record.getMessage()

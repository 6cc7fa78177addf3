"""What the YAML task definitions beside this file name by `!function`: rows, prompts, verdicts.

lm-eval loads this file by its path, as a module without a package and perhaps several times: so imports are absolute,
and there is no state here.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stm_plugin.tasks.code_answers import PASSED, fault_of_tests

if TYPE_CHECKING:
    from datasets import Dataset

_GSM8K_ANSWER = re.compile(r"#### -?[0-9.,]*[0-9]")
"""What the task's own filters can find in an answer."""


def mbpp_rows(file: str, **_: Any) -> dict[str, "Dataset"]:
    """Rows with `messages` and `test_list`, perhaps `test_setup_code` and `test_imports`."""
    from stm_plugin.sandbox import isolation

    isolation()  # an error where nothing can be contained
    return {"test": _rows(file, "mbpp", ("messages", "test_list"), ("task_id", "test_setup_code", "test_imports"))}


def gsm8k_rows(file: str, **_: Any) -> dict[str, "Dataset"]:
    """Rows with `messages` and `answer`, which ends in `#### NUMBER`."""
    return {"test": _rows(file, "gsm8k", ("messages", "answer"), ("question",))}


def math_rows(file: str, **_: Any) -> dict[str, "Dataset"]:
    r"""Rows with `messages` and `solution`, which has its answer in `\boxed{}`."""
    from stm_plugin._compat import missing_extra

    if importlib.util.find_spec("math_verify") is None:
        raise missing_extra("math-verify", "forgetting")
    return {"test": _rows(file, "math", ("messages", "solution"), ("problem", "level", "type"))}


def arc_rows(file: str, **_: Any) -> dict[str, "Dataset"]:
    """Rows as on the hub: `question`, `choices` with `text` and `label`, `answerKey`."""
    return {"test": _rows(file, "arc_challenge", ("question", "choices", "answerKey"), ("id",))}


def ifeval_rows(file: str, **_: Any) -> dict[str, "Dataset"]:
    """Rows as on the hub: `key`, `prompt`, `instruction_id_list`, `kwargs`."""
    from stm_plugin._compat import missing_extra
    from stm_plugin.tasks.punkt import ensure_punkt

    for package in ("langdetect", "immutabledict", "nltk"):  # what lm-eval's verifiers import
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "forgetting")
    ensure_punkt()
    return {"test": _rows(file, "ifeval", ("key", "prompt", "instruction_id_list", "kwargs"), ())}


def prompt(doc: Mapping[str, Any]) -> str:
    """The row's user message."""
    return str(doc["messages"][0]["content"])


def mbpp_target(doc: Mapping[str, Any]) -> str:
    """The asserts, one a line."""
    return "\n".join(doc["test_list"])


def run_tests(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Runs each answer's code with its row's asserts in a contained process, as many at a time as there are cores.

    Returns:
        For each answer `passed`, or how it did not.
    """
    from stm_plugin.tasks import code_answers

    jobs = [(answer, doc) for answers, doc in zip(resps, docs, strict=True) for answer in answers]
    verdicts = iter(code_answers.run_tests(jobs, progress=True))
    return [[next(verdicts) for _ in answers] for answers in resps]


def mbpp_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass@1 of one answer, given what `run_tests` says."""
    return {"pass_at_1": float(results[0] == PASSED)}


def math_target(doc: Mapping[str, Any]) -> str:
    r"""What is in the solution's last `\boxed{}`."""
    from stm_plugin.tasks.math_answers import boxed

    return boxed(doc["solution"]) or ""


def math_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is equivalent to the solution's."""
    from stm_plugin.tasks.math_answers import same_answer

    return {"math_verify": float(same_answer(results[0], doc["solution"]))}


def ifeval_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The verdicts of lm-eval's verifiers, a list for each metric of instructions."""
    import langdetect
    from lm_eval.tasks.ifeval.utils import process_results

    langdetect.DetectorFactory.seed = 0  # or the language of a short answer would be drawn anew each time
    return dict(process_results(doc, results))


def instruction_accuracy(items: Iterable[Sequence[bool]]) -> float:
    """Share of instructions followed, over the instructions of all rows."""
    verdicts = [verdict for row in items for verdict in row]
    return sum(verdicts) / len(verdicts)


def _rows(file: str, kind: str, required: Sequence[str], optional: Sequence[str]) -> "Dataset":
    """The rows of a file of JSON lines, with those fields that the task reads.

    Raises:
        ValueError: There are none, or one is no row of this kind; the message names its line.
    """
    from datasets import Dataset

    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}, is not JSON: {error}.") from error
            try:
                fault = _fault(row, kind, required)
            except (AttributeError, KeyError, TypeError) as error:
                fault = f"its fields have another form ({error!r})"
            if fault:
                raise ValueError(f"{file}, line {number}, is no row of a {kind} task: {fault}.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no rows.")
    names = [*required, *(name for name in optional if any(name in row for row in rows))]
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _fault(row: Any, kind: str, required: Sequence[str]) -> str | None:
    """Why a row is not one of its kind, in words."""
    missing = [name for name in required if not isinstance(row, dict) or name not in row]
    if missing:
        return f"it lacks {', '.join(map(repr, missing))}; needed are {', '.join(map(repr, required))}"
    if "messages" in required:
        roles = [message.get("role") for message in row["messages"]]
        if roles not in (["user"], ["user", "assistant"]):
            return f"its messages are of {roles}; needed are one user message, and perhaps an answer after it"
    if kind == "mbpp":
        fault = fault_of_tests(row)
        return fault and f"it {fault}"
    if kind == "math":
        from stm_plugin.tasks.math_answers import boxed

        if not boxed(row["solution"]):
            return r"its solution has no \boxed{} answer"
    if kind == "gsm8k" and not _GSM8K_ANSWER.search(row["answer"]):
        return "its answer does not end in '#### NUMBER'"
    if kind == "arc_challenge" and row["answerKey"] not in row["choices"]["label"]:
        return f"its answerKey {row['answerKey']!r} is none of {row['choices']['label']}"
    return None

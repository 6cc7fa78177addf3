"""Whether the code in an answer passes its row's tests, run in contained processes."""

import ast
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

PASSED = "passed"
"""The verdict on an answer that passes."""

_FENCES = re.compile(r"```(\w*)[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IN_LINE = re.compile(r"```[^\n`]+```")
_MODULE = "answer"
"""Name of the module that an answer is: what it would do as a script, below `if __name__ == "__main__"`, is no part of
what its tests call, and may read an input or leave."""
_NOTE = re.compile(r"\[[^\]]*\]")  # how the process ended, as the sandbox puts it below the output


def run_tests(jobs: Sequence[tuple[str, Mapping[str, Any]]], *, progress: bool = False) -> list[str]:
    """Runs each answer's code with its row's asserts in a contained process, as many at a time as there are cores.

    Args:
        jobs: Answers with their rows, which have `test_list`, perhaps `test_setup_code` and `test_imports`.
        progress: Whether to show a progress bar.

    Returns:
        For each answer `PASSED`, or how it did not.

    Raises:
        SandboxError: The system cannot run code contained.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        verdicts = pool.map(lambda job: _verdict(*job), jobs)
        return list(tqdm(verdicts, total=len(jobs), desc="Running tests", disable=not progress))


def code_of(answer: str) -> str:
    """The code in an answer: its first Python block, else its first block, else all of it.

    A block that is not closed, as in an answer that was cut, goes to the end. One that is indented as a whole, as in a
    list, is moved to the left.
    """
    blocks = [(language, textwrap.dedent(code)) for language, code in _FENCES.findall(_IN_LINE.sub("", answer))]
    python = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    return str((python or [code for _, code in blocks] or [answer])[0])


def fault_of_tests(row: Mapping[str, Any]) -> str | None:
    """What hinders the running of a row's tests, as the end of a sentence; None where nothing does."""
    tests, imports, setup = row.get("test_list"), row.get("test_imports"), row.get("test_setup_code")
    if not _are_texts(tests) or not any(tests or ()):
        return "has no `test_list` of asserts"
    if imports is not None and not _are_texts(imports):
        return "has `test_imports` that are no list of texts"
    return None if setup is None or isinstance(setup, str) else "has a `test_setup_code` that is not text"


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _program(code: str, row: Mapping[str, Any]) -> str:
    """An answer's code between what its row has to stand before it and the asserts."""
    before = "\n".join([*(row.get("test_imports") or ()), row.get("test_setup_code") or ""])
    futures = ""
    if before.strip() and "__future__" in code:
        futures, code = _behind_future_imports(re.sub("\r\n?", "\n", code))
    return "\n".join([futures, before, code, *row["test_list"]]) + "\n"


def _behind_future_imports(code: str) -> tuple[str, str]:
    """Code up to the end of its imports from `__future__`, which nothing may stand before, and the rest."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", code  # it fails in any case
    imports = [node for node in statements if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    if not imports:
        return "", code
    lines = code.encode().split(b"\n")
    row, column = imports[-1].end_lineno or 1, imports[-1].end_col_offset or 0
    end = sum(len(line) + 1 for line in lines[: row - 1]) + column
    rest = code.encode()[end:].decode()
    return code.encode()[:end].decode(), rest.lstrip(" \t").removeprefix(";").lstrip(" \t")


def _verdict(answer: str, row: Mapping[str, Any]) -> str:
    """Runs one answer's code with its row's asserts behind it."""
    from ..sandbox import run_code

    outcome = run_code(_program(code_of(answer), row), name=_MODULE)
    if outcome.passed:
        return PASSED
    lines = [line for line in outcome.output.splitlines() if line.strip() and not _NOTE.fullmatch(line)]
    return f"{outcome.status}: {lines[-1][-200:]}" if lines else outcome.status

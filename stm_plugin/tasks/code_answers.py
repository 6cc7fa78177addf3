"""Whether the code in an answer passes its row's tests, run in contained processes."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

PASSED = "passed"
"""The verdict on an answer that passes."""

_FENCES = re.compile(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NOTE = re.compile(r"\[[^\]]*\]")  # how the process ended, as the sandbox puts it below the output


def run_tests(jobs: Sequence[tuple[str, Mapping[str, Any]]], *, progress: bool = False) -> list[str]:
    """Runs each answer's code with its row's asserts in a contained process, as many at a time as there are cores.

    Args:
        jobs: Answers with their rows, which have `test_list`, perhaps `test_setup_code`.
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

    A block that is not closed, as in an answer that was cut, goes to the end.
    """
    blocks = _FENCES.findall(answer)
    python = [code for language, code in blocks if language.lower() in ("python", "python3", "py")]
    return str((python or [code for _, code in blocks] or [answer])[0])


def _verdict(answer: str, row: Mapping[str, Any]) -> str:
    """Runs one answer's code with its row's asserts behind it."""
    from ..sandbox import run_code

    parts = [row.get("test_setup_code") or "", code_of(answer), *row["test_list"]]
    outcome = run_code("\n".join(parts) + "\n")
    if outcome.passed:
        return PASSED
    lines = [line for line in outcome.output.splitlines() if line.strip() and not _NOTE.fullmatch(line)]
    return f"{outcome.status}: {lines[-1][-200:]}" if lines else outcome.status

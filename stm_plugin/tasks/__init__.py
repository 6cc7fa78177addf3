"""Local tasks for lm-eval over files of JSON lines: MBPP, GSM8K, MATH, ARC-Challenge and IFEval.

Each YAML here is a task definition of lm-eval that lacks only its file. A definition of one's own includes it, and is
then found by `lm_eval --include_path FOLDER`:

    include: PATH/stm_plugin/tasks/gsm8k.yaml
    task: my_gsm8k
    dataset_kwargs: {file: PATH/rows.jsonl}
"""

import re
from pathlib import Path

KINDS = ("mbpp", "gsm8k", "math", "arc_challenge", "ifeval")
"""The kinds of local tasks."""


def definition(kind: str) -> Path:
    """The file of a kind's task definition."""
    return Path(__file__).with_name(f"{kind}.yaml")


def definition_version(kind: str) -> str:
    """The version of a kind's task definition: scores of two versions are not to be compared."""
    found = re.search(r"^  version: (\S+)$", definition(kind).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "every definition has one"
    return found[1]

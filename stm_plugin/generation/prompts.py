"""What a model is asked for: the problem as it is, or to put the reference answer into its own words."""

import re
from pathlib import Path

from .engines import Messages

REPHRASE_TEMPLATE = """\
Below are a task and an answer to it that is known to be correct. Write the answer again in your own words, as you \
would give it yourself. Keep it correct and complete, change nothing of what it says, and keep to the form that the \
task asks for. Reply with the new answer alone, without a word about the one given.

### Task
{instruction}

### Correct answer
{answer}
"""
"""Default template of `rephrase`."""

_FIELDS = re.compile(r"\{(instruction|answer)\}")


def read_template(path: Path | None) -> str:
    """The template of `rephrase`; None for the default.

    Raises:
        ValueError: If it cannot be read, or lacks `{instruction}` or `{answer}`.
    """
    if path is None:
        return REPHRASE_TEMPLATE
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--template {path}: cannot be read ({error}).") from None
    missing = [name for name in ("instruction", "answer") if name not in _FIELDS.findall(template)]
    if missing:
        raise ValueError(
            f"--template {path}: lacks {' and '.join(f'{{{name}}}' for name in missing)}; it needs {{instruction}} "
            "where the task goes, and {answer} where the human answer goes."
        )
    return template


def rephrase_messages(template: str, messages: Messages, answer: str, where: str) -> Messages:
    """A chat that asks for an answer in other words.

    What comes before the last message, a system message say, stays as it is.

    Args:
        template: Has `{instruction}` and `{answer}`; other braces are text.
        messages: What the answer answers.
        answer: The reference answer.
        where: Says in errors which row it is.

    Raises:
        ValueError: If the last message is not a user's, of text.
    """
    *before, last = messages
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise ValueError(f"{where}: to be rephrased, an answer must follow a user's message of text, not {last}.")
    values = {"instruction": last["content"], "answer": answer}
    return [*before, {"role": "user", "content": _FIELDS.sub(lambda match: values[match[1]], template)}]

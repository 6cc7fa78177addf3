"""Chats with people's answers, read; and the same rows with a model's answers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..measures.inputs import TEMPLATE_KWARGS, TOOLS, Row, as_chat, read_rows, template_kwargs, template_kwargs_of
from .engines import Messages

SOURCE = "stm_source"
"""Column that says where a row's answer is from: a method's name, or `GROUND_TRUTH`."""
GROUND_TRUTH = "ground-truth"

_SAVED = ("state.json", "dataset_dict.json")
_SPLIT = "train"


class Problem(NamedTuple):
    """A row of the data.

    Attributes:
        messages: What is answered.
        answer: The human answer.
        template_kwargs: Keyword arguments of the chat template.
    """

    messages: Messages
    answer: str
    template_kwargs: dict[str, Any]


def read_data(name: str, limit: int | None = None) -> list[Row]:
    """Rows of a data set.

    Args:
        name: A file of JSON lines; or a Parquet file, a folder that datasets saved, or a hub id, of which the split
            `train` is read.
        limit: Most rows to read, from the first; None for all.

    Raises:
        ValueError: If there is no such data set, or no row in it.
    """
    path = Path(name)
    if path.is_file() and path.suffix.lower() != ".parquet":
        return read_rows(path)[:limit]
    if path.suffix.lower() in (".jsonl", ".json", ".parquet") and not path.exists():
        raise ValueError(f"--data {name}: no such file.")
    rows = _load(name)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"--data {name}: there is no row in it.")
    return list(rows)


def _load(name: str) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    try:
        if any((path / file).is_file() for file in _SAVED):
            found = load_from_disk(name)
        elif path.suffix.lower() == ".parquet":
            found = load_dataset("parquet", data_files=name)
        else:
            found = load_dataset(name)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--data {name}: give a .jsonl file, or a data set that `datasets` loads ({reason})."
        ) from None
    if isinstance(found, Dataset):
        return found
    if not isinstance(found, DatasetDict) or _SPLIT not in found:
        raise ValueError(
            f"--data {name}: it has no split {_SPLIT!r}, it has {sorted(found)}. Save the rows as .jsonl."
        )
    return found[_SPLIT]


def problems_of(rows: Sequence[Row], name: str) -> list[Problem]:
    """What the rows ask, and the answers that they have.

    Args:
        rows: Each has `messages`, or `prompt` and `completion` that are lists of messages (see `inputs.as_chat`), all
            of one form.
        name: Says in errors which data set it is.

    Raises:
        ValueError: For a row of another form, one whose answer is not text, one with `tools`, by which it would be
            trained on as another text than it is asked as, or `chat_template_kwargs` that not all rows have.
    """
    kwargs = template_kwargs_of(rows, name)
    problems = [_problem(row, f"{name}, row {index}", kwargs[index]) for index, row in enumerate(rows)]
    forms = [_form(row) for row in rows]
    if len(set(forms)) > 1:
        index = next(index for index, form in enumerate(forms) if form != forms[0])
        raise ValueError(f"{name}: all rows must have one form; row 0 has {forms[0]}, row {index} has {forms[index]}.")
    return problems


def with_template_kwargs(rows: Sequence[Row], kwargs: dict[str, Any] | None) -> list[Row]:
    """Rows with keyword arguments for the chat template in the column where TRL looks for them; a row's own prevail.

    Raises:
        ValueError: For a row that has something else there.
    """
    if not kwargs:
        return list(rows)
    return [row | {TEMPLATE_KWARGS: kwargs | template_kwargs(row, f"row {index}")} for index, row in enumerate(rows)]


def _form(row: Row) -> str:
    return "messages" if "messages" in row else "prompt and completion"


def _problem(row: Row, where: str, kwargs: dict[str, Any]) -> Problem:
    if row.get(TOOLS):
        raise ValueError(
            f"{where}: the column {TOOLS!r} is not supported: the model would be asked without them, and trained with "
            "them. Remove the column."
        )
    both = [name for name in ("prompt", "completion") if name in row]
    if "messages" in row and both:
        raise ValueError(
            f"{where} has `messages` and also {' and '.join(both)}: only one of them would get the new answer, and "
            "TRL may train on the other. Remove one form."
        )
    chat = as_chat(row, where)
    prompt, completion = chat["prompt"], chat["completion"]
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: `prompt` and `completion` are plain text, which is trained on as it is, but answers are asked "
            "for through the model's chat template. Give `messages`, or both as lists of messages."
        )
    messages = [*prompt, *completion]
    if not all(isinstance(message, dict) for message in messages) or len(messages) < 2 or not completion:
        raise ValueError(f"{where}: a request and an answer are needed, each a message with `role` and `content`.")
    last = messages[-1]
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise ValueError(f"{where}: the last message must be the assistant's, with text as its `content`.")
    return Problem(messages[:-1], last["content"], kwargs)


def with_answer(row: Row, answer: str, source: str) -> Row:
    """A row with another answer.

    Args:
        row: A row of messages; it is left as it is.
        answer: Takes the place of the last message, of which the role stays, but nothing else that is said there:
            people's reasoning and tool calls are not the model's.
        source: What the column `SOURCE` says.
    """
    name = "messages" if "messages" in row else "completion"
    *before, last = row[name]
    return row | {name: [*before, {"role": last["role"], "content": answer}], SOURCE: source}


def rows_digest(rows: Sequence[Row], name: str) -> str:
    """SHA-256 of rows, whatever the order of their fields.

    Raises:
        ValueError: For a row that JSON lines cannot hold.
    """
    digest = hashlib.sha256()
    for index, row in enumerate(rows):
        try:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}, row {index}: JSON lines cannot hold it ({error}).") from None
    return digest.hexdigest()

"""What the measures' commands are given by name: prompts, chats and samples in files, models and adapters."""

import argparse
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import loading
from .._compat import missing_extra
from ..answers import Prompt
from ..loading import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
"""One line of a JSON-lines file."""

TOOLS, TEMPLATE_KWARGS = "tools", "chat_template_kwargs"
"""Columns from which TRL takes a part in how a chat is written."""
_GIVEN_BY_US = ("tokenize", "add_generation_prompt", "tools", "return_dict")

DTYPES = ("auto", "float32", "bfloat16", "float16")


class LoadedModel(NamedTuple):
    """A model, ready to be measured.

    Attributes:
        model: Causal language model, with its adapter if it is one.
        tokenizer: The tokenizer saved with it, or else with its base.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file.

    Raises:
        ValueError: For no such file, no row in it, or a line that is no JSON object.
    """
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}.")
        rows.append(row)
    return rows


class Prompts(NamedTuple):
    """What a model is to answer.

    Attributes:
        prompts: The prompts.
        template_kwargs: What the chat template is given beside the messages of each.
    """

    prompts: list[Prompt]
    template_kwargs: list[dict[str, Any]]


def read_prompts(source: Path | Sequence[Prompt], kwargs: Mapping[str, Any] | None = None) -> Prompts:
    """Prompts from a file: plain text, one a line, or JSON lines of `prompt` or of chats in `messages`.

    A `prompt` is text or a list of messages. Of a chat in `messages`, an answer at its end is left off. What a row has
    in `tools` and `chat_template_kwargs` goes to the chat template, as in TRL.

    Args:
        source: The file; or the prompts themselves.
        kwargs: What else the chat template is given; a row's own prevail.

    Raises:
        ValueError: For no such file, nothing in it, a row without a prompt, or as for `template_kwargs`.
    """
    given = dict(kwargs or {})
    if isinstance(source, Path) and source.suffix.lower() == ".jsonl":
        rows = [(row, f"{source}, row {index}") for index, row in enumerate(read_rows(source))]
        own = [template_kwargs(row, where) | ({TOOLS: row[TOOLS]} if row.get(TOOLS) else {}) for row, where in rows]
        return Prompts([prompt_of(row, where) for row, where in rows], [given | some for some in own])
    prompts: list[Prompt] = list(source) if not isinstance(source, Path) else [line for _, line in _lines(source)]
    return Prompts(prompts, [given] * len(prompts))


def prompt_of(row: Row, where: str) -> Prompt:
    """The prompt of a row (see `read_prompts`); `where` says in errors which row it is."""
    if isinstance(row.get("prompt"), str | list) and row["prompt"]:
        return row["prompt"]
    messages = row.get("messages")
    if isinstance(messages, list) and messages:
        before = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if before:
            return before
    raise ValueError(f"{where}: needs a `prompt`, or `messages` that start with a request; it has {sorted(row)}.")


def as_chat(row: Row, where: str) -> Row:
    """A row as prompt and completion, the form in which TRL trains on answers alone.

    Of `messages`, the last one is the answer and all before it the prompt; `prompt` and `completion` stay as they are.

    Args:
        row: Has `messages`, or `prompt` and `completion` (both text, or both lists of messages).
        where: Says in errors which row it is.

    Raises:
        ValueError: For a row of another form, or one that does not end with an answer.
    """
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ValueError(f"{where}: `messages` must be a request and end with a message of the role assistant.")
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    if "prompt" not in row or type(row["prompt"]) is not type(row.get("completion")):
        raise ValueError(
            f"{where}: needs `messages`, or `prompt` and `completion` that are both text or both lists of messages; "
            f"it has {sorted(row)}."
        )
    return {"prompt": row["prompt"], "completion": row["completion"]}


def as_chats(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows as `as_chat` has them, with their template columns (see `with_template_columns`).

    Raises:
        ValueError: As both do.
    """
    chats = [as_chat(row, f"{name}, row {index}") for index, row in enumerate(rows)]
    return with_template_columns(chats, rows, name)


def with_template_columns(chats: Sequence[Row], rows: Sequence[Row], name: str) -> list[Row]:
    """Chats with the columns of their rows from which TRL takes a part in how a chat is written.

    Args:
        chats: What is to be trained on or scored, one of each row.
        rows: May have `tools` and `chat_template_kwargs`.
        name: Says in errors which data set it is.

    Returns:
        The chats, all with the same columns, as `datasets` needs them: it goes by those of the first.

    Raises:
        ValueError: As for `template_kwargs_of`.
    """
    columns: list[Row] = [{} for _ in rows]
    if any(row.get(TOOLS) for row in rows):
        columns = [{TOOLS: row.get(TOOLS) or None} for row in rows]
    kwargs = template_kwargs_of(rows, name)
    if any(kwargs):
        columns = [column | {TEMPLATE_KWARGS: some} for column, some in zip(columns, kwargs, strict=True)]
    return [chat | column for chat, column in zip(chats, columns, strict=True)]


def template_kwargs_of(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """What each row's `chat_template_kwargs` say.

    Raises:
        ValueError: For one that is no mapping, or has not the keys that the others have: `datasets` would give each
            row all of them.
    """
    found = [template_kwargs(row, f"{name}, row {index}") for index, row in enumerate(rows)]
    for index, kwargs in enumerate(found):
        if kwargs.keys() != found[0].keys():
            raise ValueError(
                f"{name}: all rows must have the same keys in {TEMPLATE_KWARGS!r}, or `datasets` gives each row all "
                f"of them; row 0 has {sorted(found[0])}, row {index} has {sorted(kwargs)}."
            )
    return found


def template_kwargs(row: Row, where: str) -> dict[str, Any]:
    """What a row's `chat_template_kwargs` say; `where` says in errors which row it is."""
    return check_template_kwargs(row.get(TEMPLATE_KWARGS) or {}, where)


def check_template_kwargs(found: Any, where: str) -> dict[str, Any]:
    """Raise ValueError for `chat_template_kwargs` that are no mapping, or name what is set already; else the same."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {TEMPLATE_KWARGS!r} must be a mapping, such as {{'enable_thinking': False}}.")
    for key in _GIVEN_BY_US:
        if key in found:
            raise ValueError(f"{where}: {key!r} is not for {TEMPLATE_KWARGS!r}: it is set already. Remove it.")
    return found


def add_template_kwargs(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--chat-template-kwargs JSON` to a command; `text` says which chats they are for, and what else."""
    parser.add_argument(
        "--chat-template-kwargs",
        type=_template_kwargs_argument,
        metavar="JSON",
        help=f"what the chat template {text}, such as '{{\"enable_thinking\": false}}'",
    )


def _template_kwargs_argument(text: str) -> dict[str, Any]:
    try:
        return check_template_kwargs(json.loads(text), text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_samples(path: Path) -> list[list[str]]:
    """Samples from a JSON-lines file: each line is a list of texts, or an object with such a list in `samples`.

    Raises:
        ValueError: For no such file, nothing in it, or a line of another form.
    """
    samples = []
    for number, line in _lines(path):
        try:
            texts = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}).") from None
        texts = texts.get("samples") if isinstance(texts, dict) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, line {number}: a list of texts is needed, or an object with one in `samples`.")
        samples.append(texts)
    return samples


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id is that of an adapter.

    Raises:
        ValueError: If it is neither a folder nor a hub id that can be reached.
    """
    try:
        return loading.is_adapter(name)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from None


def load_model(
    name: str,
    *,
    revision: str | None = None,
    base: Source | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    device: str | None = None,
) -> LoadedModel:
    """Load a model, or an adapter on its base.

    Args:
        name: Folder or hub id.
        revision: On the hub; None for the newest.
        base: Model that an adapter is put on; None for the one that its config names. Of no use for a whole model.
        dtype: One of `DTYPES`, `auto` being the checkpoint's own.
        load_in_4bit: Whether bitsandbytes quantizes the model, or the adapter's base, to NF4.
        device: Such as `cuda:1`; None for the first GPU, or else the CPU.

    Raises:
        ValueError: If the model, or an adapter's base, is nowhere to be had, or an adapter does not fit its base.
    """
    from transformers import AutoTokenizer

    device = loading.device_of(device)
    base = (base or loading.base_of(name, revision)) if is_adapter(name) else None
    source = base or Source(name, revision)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision}
    if load_in_4bit:
        options |= {"quantization_config": _four_bit(source, dtype), "device_map": {"": device}}
    try:
        of_tokenizer = loading.tokenizer_source(name, revision, base)
        tokenizer = AutoTokenizer.from_pretrained(of_tokenizer.name, revision=of_tokenizer.revision)
        model = loading.load_causal_lm(name, options, base=base, num_tokens=len(tokenizer))
    except (OSError, ValueError) as error:
        raise not_found(source.name, error) from None
    return LoadedModel(model if load_in_4bit else model.to(device), tokenizer)


def _four_bit(source: Source, dtype: str) -> Any:
    """NF4 as `stm sft --load_in_4bit` has it, computing in the dtype asked for."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_extra("bitsandbytes", "qlora")
    try:
        compute = AutoConfig.from_pretrained(source.name, revision=source.revision).dtype if dtype == "auto" else dtype
    except (OSError, ValueError) as error:
        raise not_found(source.name, error) from None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute or torch.float32
    )


def not_found(name: str, error: Exception) -> ValueError:
    """The error for a model that cannot be loaded."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"cannot load {name}: give a folder or a hub id of a causal language model or an adapter ({reason})"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty.")
    return iter((number, line.strip()) for number, line in lines)

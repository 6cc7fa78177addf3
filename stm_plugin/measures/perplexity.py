"""Perplexity of data sets under a model: the paper's table of ground truth, rephrased answers and self-output.

A row's perplexity is `exp` of the mean NLL of its answer tokens; mean, standard deviation and quantiles are over rows.
The paper (arXiv 2501.14315) has, for MBPP under Llama 3 8B: ground truth 4.83 (7.04), rephrased 1.69 (0.16),
self-output 1.16 (0.01).
"""

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..constants import IGNORE_INDEX
from ..selection import check_scores, perplexity
from .inputs import Row, as_chat, as_chats

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_ROW = "stm_row"
"""Column that says which row of the file a tokenized row is."""


class PerplexitySummary(NamedTuple):
    """Perplexity of a data set's answers under a model.

    Attributes:
        rows: Perplexity of each row with answer tokens, in order.
        num_tokens: Answer tokens of all rows.
        sum_nats: Sum of their NLL, in nats.
    """

    rows: list[float]
    num_tokens: int
    sum_nats: float

    @property
    def mean(self) -> float:
        """Mean over rows."""
        return float(np.mean(self.rows))

    @property
    def std(self) -> float:
        """Standard deviation over rows (of the rows as they are: divided by their number)."""
        return float(np.std(self.rows))

    @property
    def quantiles(self) -> dict[float, float]:
        """Perplexity at each of `QUANTILES` of the rows, interpolated linearly."""
        return dict(zip(QUANTILES, np.quantile(self.rows, QUANTILES).tolist(), strict=True))

    @property
    def pooled(self) -> float:
        """`exp` of the mean NLL of all answer tokens together."""
        return perplexity(self.sum_nats / self.num_tokens)


def perplexity_summary(nll: Sequence[np.ndarray]) -> PerplexitySummary:
    """Summarize scores, one array a row.

    Args:
        nll: As `score_dataset` returns them: NLL in nats, NaN where there is no label token. Rows without label
            tokens are left out.

    Raises:
        ValueError: If no row has a label token.
    """
    scores = [row[~np.isnan(row)].astype(np.float64) for row in nll]
    scores = [row for row in scores if len(row)]
    if not scores:
        raise ValueError("There is no answer token to take the perplexity of.")
    return PerplexitySummary(
        [perplexity(row.mean()) for row in scores], sum(map(len, scores)), float(sum(row.sum() for row in scores))
    )


def measure_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: Mapping[str, Sequence[Row]],
    *,
    max_length: int | None = None,
    paired: bool = False,
    tokens_per_batch: int | None = None,
    progress: bool = False,
) -> dict[str, PerplexitySummary]:
    """Perplexity of the answers of data sets under a model, adapters included, in eval mode.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        data: Rows of each data set by its name (see `inputs.as_chats` for their form).
        max_length: As for `answer_tokens`.
        paired: Whether the data sets are the same problems in the same order (`common_rows`), so that a row that
            `max_length` leaves without an answer in one is left out of all.
        tokens_per_batch: Most tokens of one forward pass.
        progress: Whether to show a progress bar.

    Returns:
        A summary of each data set, under its name.

    Raises:
        ValueError: For rows of another form, a data set without an answer token, or scores that are NaN.
    """
    from ..scoring.nll import score_dataset

    prepared = answer_tokens(data, tokenizer, max_length)
    if paired:
        left = set.intersection(*(set(dataset[_ROW]) for dataset in prepared.values()))
        prepared = {
            name: dataset.select([index for index, row in enumerate(dataset[_ROW]) if row in left])
            for name, dataset in prepared.items()
        }
    summaries = {}
    for name, dataset in prepared.items():
        scores = score_dataset(model, dataset, tokens_per_batch=tokens_per_batch, progress=progress)
        for row, labels in zip(scores, dataset["labels"], strict=True):
            check_scores(row[1:][np.asarray(labels[1:]) != IGNORE_INDEX])
        summaries[name] = perplexity_summary(scores)
    return summaries


def answer_tokens(
    data: Mapping[str, Sequence[Row]], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> "dict[str, Dataset]":
    """Rows as token ids with labels on the answers alone, made by TRL's own trainer.

    Args:
        data: Rows of each data set by its name.
        tokenizer: The tokenizer; it is left as it is.
        max_length: Where TRL cuts rows; it drops those that have no answer left. None cuts nothing.

    Returns:
        `input_ids`, `labels` and `stm_row` (the row's index) of each data set.

    Raises:
        ValueError: For rows of another form, or a data set of which nothing is left.
    """
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    chats = {
        name: datasets.Dataset.from_list([chat | {_ROW: index} for index, chat in enumerate(as_chats(rows, name))])
        for name, rows in data.items()
    }
    if not all(map(len, chats.values())):
        raise ValueError("There is a data set without rows.")
    with tempfile.TemporaryDirectory(prefix="stm-perplexity-") as folder, _nothing_global_changed():
        config = SFTConfig(
            folder,
            max_length=max_length,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        )
        # A trainer wants a model, of which the preparation of data needs nothing: the smallest there is.
        stand_in = LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        first = next(iter(chats.values()))
        trainer = SFTTrainer(
            stand_in,
            config,
            train_dataset=first.select([0]),
            eval_dataset=chats,
            processing_class=copy.deepcopy(tokenizer),
        )
        prepared: dict[str, Dataset] = trainer.eval_dataset
    for name, dataset in prepared.items():
        if len(dataset) == 0:
            raise ValueError(f"{name}: no row has an answer token within max_length={max_length}. Raise it.")
    return {name: dataset.select_columns(["input_ids", "labels", _ROW]) for name, dataset in prepared.items()}


@contextmanager
def _nothing_global_changed() -> Iterator[None]:
    """Put back what making a trainer changes: random state, accelerate's view of the devices, progress bars."""
    import datasets
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from ..randomness import preserved_random_state

    shared: list[dict[str, Any]] = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in shared]
    shows_progress = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # upstream's notes to itself
            yield
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)
        if shows_progress:
            datasets.enable_progress_bars()


def common_rows(
    data: Mapping[str, Sequence[Row]], key: str = "prompt", limit: int | None = None
) -> dict[str, list[Row]]:
    """The rows whose key occurs in every data set, each key once a data set, in the order of the first.

    Args:
        data: Rows of each data set by its name.
        key: `prompt` for what the user asks, or the name of a field that all rows have, such as `task_id`.
        limit: How many keys to keep at most; None for all.

    Raises:
        ValueError: If a row lacks the field, or nothing is common.
    """
    by_key: dict[str, dict[str, Row]] = {}
    for name, rows in data.items():
        by_key[name] = {}
        for index, row in enumerate(rows):
            by_key[name].setdefault(_key(row, key, f"{name}, row {index}"), row)
    first, *others = by_key.values()
    keys = [value for value in first if all(value in other for other in others)][:limit]
    if not keys:
        raise ValueError(f"no {key} is in all of {', '.join(data)}. Choose another --common, or leave it out.")
    return {name: [rows[value] for value in keys] for name, rows in by_key.items()}


def _key(row: Row, key: str, where: str) -> str:
    if key == "prompt":
        prompt = as_chat(row, where)["prompt"]
        if isinstance(prompt, list):
            prompt = [message.get("content") for message in prompt if message.get("role") == "user"]
        return json.dumps(prompt)
    if key not in row:
        raise ValueError(f"{where}: has no field {key!r} to find it by in the other files; it has {sorted(row)}.")
    return json.dumps(row[key], sort_keys=True)

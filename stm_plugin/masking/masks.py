"""From scores to the masked labels of a whole training set, and what there is to report about them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..constants import IGNORE_INDEX, MASKED_COLUMN
from ..options import STRATEGIES_BY_TWO_MODELS, STMOptions
from ..scoring.documents import Documents
from ..selection import check_scores, fraction_threshold_nats, perplexity, select_masked

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Masks:
    """Masked labels of a data set.

    Attributes:
        documents: The data set's documents.
        masked: Whether STM masked a token, shape `(total,)`, bool.
        threshold_nats: The threshold that was compared, in nats.
        num_stop_tokens: Stop tokens among the label tokens.
        num_masked_stop_tokens: Those of them that are masked.
    """

    documents: Documents
    masked: np.ndarray
    threshold_nats: float
    num_stop_tokens: int
    num_masked_stop_tokens: int

    @property
    def labels(self) -> np.ndarray:
        """Final labels of all tokens, shape `(total,)`; made anew at every call."""
        return np.where(self.masked, np.int16(IGNORE_INDEX), self.documents.labels)

    @cached_property
    def num_masked(self) -> int:
        """Masked label tokens."""
        return int(self.masked.sum())

    @property
    def masked_fraction(self) -> float:
        """Masked label tokens over all label tokens, pooled."""
        return self.num_masked / self.documents.num_label_tokens

    @property
    def masked_stop_tokens_fraction(self) -> float:
        """Masked stop tokens over all stop tokens among the label tokens; 0 where there are none."""
        return self.num_masked_stop_tokens / max(1, self.num_stop_tokens)

    @cached_property
    def masked_per_row(self) -> np.ndarray:
        """Masked label tokens of each row, shape `(R,)`."""
        return self.documents.rows_with(self.masked)

    @cached_property
    def rows_without_kept_tokens(self) -> int:
        """Rows that had label tokens and keep none."""
        had = self.documents.rows_with(self.documents.label_mask)
        return int(((had > 0) & (had == self.masked_per_row)).sum())


@dataclass
class LiveTotals:
    """Running totals of a run, over all ranks.

    Attributes:
        steps: Optimizer steps masked.
        label_tokens: Label tokens seen, once for each time.
        masked_tokens: Those of them that were masked.
        stop_tokens: Stop tokens among them.
        stop_tokens_masked: Those that were masked.
        threshold_nats: Threshold of the last step; None before the first.
    """

    steps: int = 0
    label_tokens: int = 0
    masked_tokens: int = 0
    stop_tokens: int = 0
    stop_tokens_masked: int = 0
    threshold_nats: float | None = None

    def add(
        self, threshold_nats: float, label_tokens: int, masked_tokens: int, stop_tokens: int, stop_tokens_masked: int
    ) -> None:
        """Count a step."""
        self.steps += 1
        self.label_tokens += label_tokens
        self.masked_tokens += masked_tokens
        self.stop_tokens += stop_tokens
        self.stop_tokens_masked += stop_tokens_masked
        self.threshold_nats = threshold_nats


def is_masked(dataset: Any) -> bool:
    """Whether a data set has been masked by STM, or is a part of one that has."""
    import datasets

    return isinstance(dataset, datasets.Dataset) and MASKED_COLUMN in dataset.column_names


def check_unmasked(dataset: Any) -> None:
    """Raise ValueError for a data set that STM has masked already."""
    if is_masked(dataset):
        raise ValueError(
            f"The training set has been masked by STM already (it has a column {MASKED_COLUMN!r}): masking it again "
            "would leave out what other scores chose. Give the data set as it was before."
        )


def unmasked_documents(dataset: "Dataset") -> Documents:
    """Documents of a data set that STM has not masked yet; ValueError for one that it has."""
    check_unmasked(dataset)
    return Documents.from_dataset(dataset)


def make_masks(documents: Documents, scores: np.ndarray, options: STMOptions, stop_token_ids: set[int]) -> Masks:
    """Mask a training set.

    Args:
        documents: Its documents.
        scores: Scores in nats of all N label tokens, in the data set's order, shape `(N,)`, float32: what
            `deciding_scores` says that the strategy compares.
        options: Checked STM options.
        stop_token_ids: Ids that end a turn or a text.

    Returns:
        The masks.

    Raises:
        ValueError: For no label token at all, a NaN score, or a threshold that every label token exceeds.
    """
    if len(scores) == 0:
        raise ValueError(
            "The training set has no label token: every label is -100, or stands at the start of its document. Check "
            "the chat template and the options that decide which tokens are trained."
        )
    threshold_nats = threshold_in_nats(candidate_scores(documents, scores, options, stop_token_ids), options)
    masks = apply_threshold(documents, scores, threshold_nats, options, stop_token_ids)
    if masks.num_masked == len(scores):
        if options.stm_strategy in STRATEGIES_BY_TWO_MODELS:
            raise ValueError(
                f"stm_strategy={options.stm_strategy!r} masks every one of the {len(scores)} label tokens, so nothing "
                f"is left to train on: they are less likely under stm_tuned_model={options.stm_tuned_model!r}. Look "
                "whether that is a model tuned on this kind of data."
            )
        smallest = perplexity(scores.min())
        raise ValueError(
            f"Every one of the {len(scores)} label tokens has a perplexity above stm_threshold={options.threshold}, "
            f"so nothing is left to train on. The smallest perplexity is {smallest:.6g}; "
            f"{_threshold_for_share(scores):.6g} would mask about 22 %. Look first whether the chat template is the "
            "model's own."
        )
    return masks


def candidate_scores(
    documents: Documents, scores: np.ndarray, options: STMOptions, stop_token_ids: set[int]
) -> np.ndarray:
    """Scores of the label tokens that may be masked, from which a fraction takes its threshold."""
    return scores[~_is_stop(documents, stop_token_ids)] if options.stm_keep_stop_tokens else scores


def threshold_in_nats(candidates: np.ndarray, options: STMOptions) -> float:
    """The threshold of a training set, or of a step: the option's own, or the one that a fraction gives.

    Args:
        candidates: Scores in nats of the label tokens that may be masked, over all ranks.
        options: Checked STM options.

    Raises:
        ValueError: For a NaN score, or a fraction of no tokens.
    """
    check_scores(candidates)
    if options.stm_mask_fraction is not None:
        return fraction_threshold_nats(candidates, options.stm_mask_fraction)
    assert options.threshold is not None
    return math.log(options.threshold)


def apply_threshold(
    documents: Documents, scores: np.ndarray, threshold_nats: float, options: STMOptions, stop_token_ids: set[int]
) -> Masks:
    """Mask documents with a threshold that is known (see `make_masks`); all, some or none of their label tokens."""
    check_scores(scores)
    is_stop = _is_stop(documents, stop_token_ids)
    masked_labels = select_masked(
        scores,
        documents.tokens_per_document,
        threshold_nats=threshold_nats,
        strategy=options.stm_strategy,
        seed=options.stm_seed,
        label_ids=documents.label_ids,
        candidates=~is_stop if options.stm_keep_stop_tokens else None,
    )
    masked = np.zeros(len(documents.input_ids), dtype=bool)
    masked[documents.label_mask] = masked_labels
    return Masks(
        documents,
        masked,
        threshold_nats,
        int(is_stop.sum()),
        int((is_stop & masked_labels).sum()),
    )


def _is_stop(documents: Documents, stop_token_ids: set[int]) -> np.ndarray:
    """Whether each label token ends a turn or a text, shape `(N,)`."""
    label_ids = documents.label_ids
    is_stop = np.zeros(len(label_ids), dtype=bool)
    for token_id in stop_token_ids:  # a few; numpy's isin takes many times the memory
        is_stop |= label_ids == token_id
    return is_stop


def _threshold_for_share(nll: np.ndarray, share: float = 0.22) -> float:
    """Perplexity that masks a share of the tokens: what to suggest to a user."""
    return perplexity(fraction_threshold_nats(nll, share))

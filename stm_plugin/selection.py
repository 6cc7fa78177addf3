"""Which label tokens are masked: a pure function of their NLL (nats), their documents and the options.

Selective Token Masking, arXiv 2501.14315: a label token `w_t` stays in the loss iff its perplexity
`exp(nll_t)`, `nll_t = -log p(w_t | w_<t)`, does not exceed the threshold.
"""

import hashlib
import math
from typing import Any, TypeVar

import numpy as np

from .constants import DEFAULT_THRESHOLD, IGNORE_INDEX
from .options import CONTROLS, STRATEGIES_BY_TWO_MODELS, check_fraction, check_seed, check_strategy, check_threshold

Row = TypeVar("Row")

_BEYOND_ALL_NATS = 1e4
"""A score above every finite threshold: exp of it is no float."""


def mask_labels(
    labels: Row,
    nll: Any,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    strategy: str = "high",
    seed: int = 0,
    tuned_nll: Any = None,
) -> Row:
    """Mask one document's labels: `-100` for every label token whose perplexity exceeds `threshold`.

    For `strategy="high"` the naive equivalent is

        [-100 if t > 0 and label != -100 and nll[t] > math.log(threshold) else label for t, label in enumerate(labels)]

    Args:
        labels: Token ids of shape `(T,)`, `-100` where the loss is off: a list, NumPy array or torch tensor.
        nll: Negative log-likelihoods in nats, shape `(T,)`; `nll[t]` is that of `labels[t]`, predicted at `t - 1`.
            Values at position 0 (which has no prediction) and at labels of `-100` are not read.
        threshold: Perplexity, greater than 1; `inf` masks nothing. A token exactly at the threshold is kept.
        strategy: `"high"`; a control that masks as many tokens, `"low"` (lowest NLL, earlier first) or `"random"`; or
            `"difference"` or `"hybrid"`, which compare with a tuned model (see `deciding_scores`).
        seed: Seed of `"random"`.
        tuned_nll: As `nll`, under the tuned model; for `"difference"` and `"hybrid"` alone.

    Returns:
        Masked labels, of the kind, dtype and device of `labels`; the argument itself is not changed.

    Raises:
        ValueError: For lengths that differ, a score that is NaN, or an option out of range.
    """
    check_strategy(strategy)
    check_threshold(threshold, strategy)
    check_seed(seed)
    given = _to_numpy(labels)
    if given.dtype.kind in "ub":
        raise ValueError(f"labels must be of a type that can hold -100, got {given.dtype}.")
    label_ids = given.astype(np.int64)
    scores = _to_numpy(nll).astype(np.float32)
    if label_ids.ndim != 1 or scores.shape != label_ids.shape:
        raise ValueError(
            f"labels and nll must be one row of the same length, got shapes {label_ids.shape} and {scores.shape}. "
            "nll[t] is the score of labels[t]."
        )
    positions = label_positions(label_ids)
    tuned_scores = None
    if tuned_nll is not None:
        tuned_scores = _to_numpy(tuned_nll).astype(np.float32)
        if tuned_scores.shape != label_ids.shape:
            raise ValueError(f"tuned_nll must have the shape of nll, {scores.shape}, got {tuned_scores.shape}.")
        tuned_scores = tuned_scores[positions]
    masked = select_masked(
        deciding_scores(scores[positions], tuned_scores, strategy),
        np.array([len(positions)]),
        threshold_nats=math.log(threshold),
        strategy=strategy,
        seed=seed,
        label_ids=label_ids[positions],
    )
    return _like(labels, np.where(_scatter(masked, positions, len(label_ids)), IGNORE_INDEX, label_ids))


def label_positions(labels: np.ndarray) -> np.ndarray:
    """Positions of one document's label tokens: label not `-100`, and not position 0, which nothing predicts."""
    return np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1


def deciding_scores(nll: np.ndarray, tuned_nll: np.ndarray | None, strategy: str) -> np.ndarray:
    """The scores, in nats, that a strategy compares with the threshold's logarithm.

    Of `difference`, the logarithm of the difference of the perplexities, `log(exp(tuned_nll) - exp(nll))`; where that
    is not positive, a score below every threshold. Of `hybrid`, the token's own NLL; where the tuned model's exceeds
    it, a score above every finite threshold. Of all other strategies, the token's own NLL. The filters `dpf` and
    `stm_dpf` of the code published with arXiv 2501.14315.

    Args:
        nll: NLL in nats under the initial model, shape `(N,)`, float32.
        tuned_nll: NLL in nats under the tuned model, shape `(N,)`, float32; None where the strategy takes none.
        strategy: One of `options.STRATEGIES`.

    Returns:
        Shape `(N,)`, float32; `nll` itself for a strategy by one model.

    Raises:
        ValueError: For scores of a tuned model that are missing, of no use, NaN, or of another number.
    """
    if (strategy in STRATEGIES_BY_TWO_MODELS) != (tuned_nll is not None):
        need = "needs" if tuned_nll is None else "has no use for"
        raise ValueError(f"strategy={strategy!r} {need} the scores of a tuned model.")
    if tuned_nll is None:
        return nll
    if tuned_nll.shape != nll.shape:
        raise ValueError(f"scores of two models of the same tokens are needed, got {nll.shape} and {tuned_nll.shape}.")
    check_scores(nll)
    check_scores(tuned_nll)
    more = tuned_nll > nll
    if strategy == "hybrid":
        return np.where(more, np.float32(_BEYOND_ALL_NATS), nll)
    initial, tuned = nll[more].astype(np.float64), tuned_nll[more].astype(np.float64)
    scores = np.full(len(nll), -_BEYOND_ALL_NATS, dtype=np.float32)
    scores[more] = tuned + np.log(-np.expm1(initial - tuned))
    return scores


def select_masked(
    nll: np.ndarray,
    tokens_per_document: np.ndarray,
    *,
    threshold_nats: float,
    strategy: str = "high",
    seed: int = 0,
    label_ids: np.ndarray | None = None,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """Decide for every label token of a data set whether it is masked.

    Args:
        nll: Score in nats of all N label tokens, document after document, shape `(N,)`, float32: their NLL, or what
            `deciding_scores` made of two.
        tokens_per_document: Label tokens of each document, shape `(D,)`, summing to N.
        threshold_nats: `log(threshold)`; a token at it is kept. Compared with the float32 scores in float64.
        strategy: One of `options.STRATEGIES`.
        seed: Seed of `"random"`.
        label_ids: Token ids of the label tokens, shape `(N,)`; needed by `"random"`.
        candidates: Whether a token may be masked at all, shape `(N,)`; None lets all be.

    Returns:
        Whether each label token is masked, shape `(N,)`, bool.

    Raises:
        ValueError: For a score that is NaN.
    """
    check_scores(nll)
    masked = exceeds(nll, threshold_nats)
    if candidates is not None:
        masked &= candidates
    if strategy not in CONTROLS or not masked.any():
        return masked
    document = np.repeat(np.arange(len(tokens_per_document)), tokens_per_document)
    num_masked = np.bincount(document, weights=masked, minlength=len(tokens_per_document)).astype(np.int64)
    turns = _turns(nll, tokens_per_document, document, strategy, seed, label_ids, candidates, num_masked)
    return turns < num_masked[document]


def fraction_threshold_nats(nll: np.ndarray, fraction: float) -> float:
    """Smallest score T such that at most `floor(fraction * N)` of the N scores exceed it.

    Args:
        nll: NLL in nats of all candidates, shape `(N,)`, float32.
        fraction: Share to mask, between 0 and 1, exclusive.

    Returns:
        T in nats.

    Raises:
        ValueError: For a fraction out of range, a score that is NaN, or no score at all.
    """
    check_fraction(fraction)
    check_scores(nll)
    if len(nll) == 0:
        raise ValueError("stm_mask_fraction needs at least one label token that may be masked, got none.")
    rank = len(nll) - 1 - math.floor(fraction * len(nll))
    return float(np.partition(nll, rank)[rank])


def exceeds(nll: np.ndarray, threshold_nats: float) -> np.ndarray:
    """Whether each float32 score exceeds a float64 threshold: `nll.astype(np.float64) > threshold_nats`."""
    return nll > largest_score_within(threshold_nats)


def largest_score_within(threshold_nats: float) -> np.float32:
    """The largest float32 that does not exceed a float64 threshold: what it means for scores."""
    nearest = np.float32(threshold_nats)
    return nearest if float(nearest) <= threshold_nats else np.nextafter(nearest, np.float32(-np.inf))


def perplexity(nats: float) -> float:
    """`exp(nats)`, at most about 1e304."""
    return math.exp(min(float(nats), 700.0))


def check_scores(nll: np.ndarray) -> None:
    """Raise ValueError if a score is NaN."""
    nans = np.flatnonzero(np.isnan(nll))
    if len(nans):
        raise ValueError(
            f"{len(nans)} of {len(nll)} scores are NaN, the first at label token {nans[0]}: the model yields no "
            "probability there. Check its weights and dtype (float16 overflows in some models; use bfloat16 or "
            "float32)."
        )


def effective_scores(
    nll: np.ndarray,
    tokens_per_document: np.ndarray,
    *,
    strategy: str = "high",
    seed: int = 0,
    label_ids: np.ndarray | None = None,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """The score by which each label token is masked under any strategy: at a threshold T iff it exceeds T.

    A document masks as many tokens as it has candidates above T. So the token whose turn comes k-th (from 0) is masked
    iff the document's k-th highest candidate exceeds T. But for the controls, that is the token's own score.

    Args:
        nll: As for `select_masked`, like the others.
        tokens_per_document: Label tokens of each document, shape `(D,)`.
        strategy: One of `options.STRATEGIES`.
        seed: Seed of `"random"`.
        label_ids: Token ids of the label tokens, shape `(N,)`; needed by `"random"`.
        candidates: Whether a token may be masked at all, shape `(N,)`.

    Returns:
        Shape `(N,)`, float32; `-inf` for a token that is no candidate.
    """
    check_scores(nll)
    scores = nll if candidates is None else np.where(candidates, nll, np.float32(-np.inf))
    if strategy not in CONTROLS:
        return scores
    document = np.repeat(np.arange(len(tokens_per_document)), tokens_per_document)
    turns = _turns(nll, tokens_per_document, document, strategy, seed, label_ids, candidates)
    highest_first = scores[np.lexsort((-scores, document))]
    starts = np.cumsum(tokens_per_document) - tokens_per_document
    place = starts[document] + np.minimum(turns, tokens_per_document[document] - 1)
    return np.where(np.isneginf(scores), scores, highest_first[place])


def _turns(
    nll: np.ndarray,
    tokens_per_document: np.ndarray,
    document: np.ndarray,
    strategy: str,
    seed: int,
    label_ids: np.ndarray | None,
    candidates: np.ndarray | None,
    num_masked: np.ndarray | None = None,
) -> np.ndarray:
    """In which turn of its document each token would be masked by a control, from 0; never for no candidate.

    With `num_masked`, shape `(D,)`, only documents that mask something are drawn.
    """
    turns = np.full(len(nll), np.iinfo(np.int64).max)
    if strategy == "low":
        pool = np.arange(len(nll)) if candidates is None else np.flatnonzero(candidates)
        order = pool[np.lexsort((nll[pool], document[pool]))]  # stable: equal scores stay in the order of positions
        first = np.searchsorted(document[order], np.arange(len(tokens_per_document)))
        turns[order] = np.arange(len(order)) - first[document[order]]
        return turns
    assert label_ids is not None
    ends = np.cumsum(tokens_per_document)
    for index in np.flatnonzero(tokens_per_document if num_masked is None else num_masked):
        start, end = ends[index] - tokens_per_document[index], ends[index]
        pool = np.arange(start, end) if candidates is None else start + np.flatnonzero(candidates[start:end])
        turns[pool[_document_generator(seed, label_ids[start:end]).permutation(len(pool))]] = np.arange(len(pool))
    return turns


def _document_generator(seed: int, label_ids: np.ndarray) -> np.random.Generator:
    """PCG64 seeded by the document itself, so that a draw depends on no order, packing, rank or run."""
    content = np.concatenate(([seed], label_ids)).astype("<i8").tobytes()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(content).digest(), "little")))


def _scatter(values: np.ndarray, positions: np.ndarray, length: int) -> np.ndarray:
    scattered = np.zeros(length, dtype=values.dtype)
    scattered[positions] = values
    return scattered


def _to_numpy(row: Any) -> np.ndarray:
    if hasattr(row, "detach"):  # a torch tensor; torch itself is not imported here
        row = row.detach().cpu()
        row = row.float() if row.is_floating_point() else row  # NumPy has no bfloat16
    return np.asarray(row)


def _like(original: Any, row: np.ndarray) -> Any:
    if hasattr(original, "detach"):
        return original.new_tensor(row)
    if isinstance(original, np.ndarray):
        return row.astype(original.dtype)
    return type(original)(row.tolist())

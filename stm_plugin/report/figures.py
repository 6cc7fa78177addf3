"""The figures of a report: of all label tokens, at every threshold that the page's slider can stop at.

Shapes: N label tokens, S stops, R rows.

Every stop is a threshold T in nats, and a token's *code* is the number of stops below its score. So it is masked at
stop `i` iff `i < code`, which is the rule itself (`nll > T`) for each of them, and counts of codes are exact.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..constants import DEFAULT_THRESHOLD
from ..inspection.scored import ScoredData
from ..inspection.sweep import THRESHOLDS, shortest_threshold
from ..masking.masks import Masks, candidate_scores, threshold_in_nats
from ..options import STMOptions
from ..selection import effective_scores
from ..tokens import TOKEN_CLASSES, token_classes, visible

BINS_PER_DECADE = 10
"""Bins of the distribution for each factor of ten of perplexity."""

_OUTLIERS = 0.001
_MOST_STRINGS = 24
_MOST_TURNS = 10
_NAMED = (5, 10, 15, 20, 22, 24, 30)
_ROUND = np.round(10 ** (np.arange(24) / 24), 1).tolist()


@dataclass(frozen=True)
class Stop:
    """A threshold that the slider can stop at.

    Attributes:
        nats: What scores are compared with.
        text: The perplexity, as a user would write it.
        note: Why it is there, where that is worth saying.
    """

    nats: float
    text: str
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Label tokens counted in classes.

    Attributes:
        title: What the classes are.
        note: How a token gets into one.
        labels: Names of the classes that occur.
        totals: Label tokens of each.
        masked: Those of them that each stop masks, one row of S for each class.
    """

    title: str
    note: str
    labels: list[str]
    totals: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class Figures:
    """All figures of one data set.

    Attributes:
        data: The scored data.
        options: The options whose strategy, seed and stop tokens count.
        masks: What the report's own threshold masks.
        stops: The slider's thresholds, ascending.
        start: Index of the report's own threshold in them.
        thresholds: The perplexity that masks each whole percent.
    """

    data: ScoredData
    options: STMOptions
    masks: Masks
    stops: list[Stop]
    start: int
    thresholds: dict[int, float]

    @cached_property
    def effective(self) -> np.ndarray:
        """The score by which each label token is masked, shape `(N,)`, float32 (see `effective_scores`)."""
        documents = self.data.documents
        return effective_scores(
            self.data.scores(self.options),
            documents.tokens_per_document,
            strategy=self.options.stm_strategy,
            seed=self.options.stm_seed,
            label_ids=documents.label_ids,
            candidates=~self.is_stop_token if self.options.stm_keep_stop_tokens else None,
        )

    @cached_property
    def is_stop_token(self) -> np.ndarray:
        """Whether each label token ends a turn or a text, shape `(N,)`."""
        return np.isin(self.data.documents.label_ids, list(self.data.kept.stop_token_ids))

    @cached_property
    def codes(self) -> np.ndarray:
        """How many stops mask each label token, shape `(N,)`."""
        nats = np.array([stop.nats for stop in self.stops])
        return np.searchsorted(nats, self.effective.astype(np.float64), side="left")

    @cached_property
    def masked(self) -> np.ndarray:
        """Label tokens that each stop masks, shape `(S,)`."""
        return self._masked_in(np.zeros(len(self.codes), dtype=np.int64), 1)[0]

    @cached_property
    def stop_tokens_masked(self) -> np.ndarray:
        """Stop tokens that each stop of the slider masks, shape `(S,)`."""
        return self._masked_in(self.is_stop_token.astype(np.int64), 2)[1]

    @cached_property
    def labels_per_row(self) -> np.ndarray:
        """Label tokens of each row, shape `(R,)`."""
        documents = self.data.documents
        return documents.rows_with(documents.label_mask)

    @cached_property
    def rows_without_kept_tokens(self) -> np.ndarray:
        """Rows with label tokens that keep none at each stop, shape `(S,)`."""
        counts = self.labels_per_row[self.labels_per_row > 0]
        lowest = np.minimum.reduceat(self.codes, np.cumsum(counts) - counts)
        return np.bincount(lowest, minlength=len(self.stops) + 1)[:0:-1].cumsum()[::-1]

    @property
    def for_percent(self) -> list[tuple[int, int]]:
        """Some percentages, each with the index of the stop that masks as many of the label tokens, or just fewer."""
        texts = [stop.text for stop in self.stops]
        return [(percent, texts.index(_text(self.thresholds[percent]))) for percent in _NAMED if self.thresholds]

    @cached_property
    def histogram(self) -> np.ndarray:
        """Label tokens in each bin of perplexity, from 1 up, `BINS_PER_DECADE` for each factor of ten.

        The last bin holds what lies beyond too: at most one token in a thousand.
        """
        nll = self.data.nll.astype(np.float64)
        usual = min(float(np.quantile(nll, 1 - _OUTLIERS, method="lower")), 700.0)
        size = max(1, math.ceil(usual / math.log(10))) * BINS_PER_DECADE
        bins = np.clip(nll * (BINS_PER_DECADE / math.log(10)), 0, size - 1).astype(np.int64)
        return np.bincount(bins, minlength=size)

    @cached_property
    def groups(self) -> list[Group]:
        """By position in the answer, turn and class of token; by data set where there are several."""
        documents = self.data.documents
        positions = np.flatnonzero(documents.label_mask)
        document = np.repeat(np.arange(len(documents)), documents.tokens_per_document)
        begins = np.ones(len(positions), dtype=bool)
        begins[1:] = (np.diff(positions) != 1) | (np.diff(document) != 0)
        answer = np.cumsum(begins) - 1
        place = np.arange(len(positions)) - np.flatnonzero(begins)[answer]
        first_answer = answer[np.searchsorted(document, document)]
        turn = np.minimum(answer - first_answer, _MOST_TURNS - 1)
        octave = np.log2(place + 1).astype(np.int64)
        octaves = [f"{2**k:,}" if k == 0 else f"{2**k:,}–{2 ** (k + 1) - 1:,}" for k in range(int(octave.max()) + 1)]
        turns = [*(str(k + 1) for k in range(_MOST_TURNS - 1)), f"{_MOST_TURNS} and later"]
        classes = token_classes(documents, self.data.kept.text_of, self.data.kept.stop_token_ids)
        groups = [
            self._group(
                "position in the answer", "Label tokens of one answer, counted from its first.", octave, octaves
            ),
            self._group(
                "token class",
                "Code identifiers: names with an underscore, a digit or an inner capital, or directly before ( or [.",
                classes,
                list(TOKEN_CLASSES),
            ),
            self._group("turn", "Answers of one document, counted from its first.", turn, turns),
        ]
        if self.data.kept.groups:
            row = np.repeat(self.data.kept.row_groups, self.labels_per_row)
            groups.append(
                self._group("data set", "As a column of the data names it.", row, list(self.data.kept.groups))
            )
        return groups

    @cached_property
    def strings(self) -> Group:
        """The strings that are most often masked at some stop."""
        ids, inverse = np.unique(self.data.documents.label_ids, return_inverse=True)
        shown = [visible(self.data.kept.text_of[token_id]) for token_id in ids.tolist()]
        texts, text_of_id = np.unique(np.array(shown, dtype=object), return_inverse=True)
        masked = self._masked_in(text_of_id[inverse], len(texts))
        most = min(_MOST_STRINGS, len(texts))
        order = np.arange(len(texts))
        ranks = (order - counts.astype(np.int64) * len(texts) for counts in masked.T)  # equal counts: first in order
        chosen = np.unique([np.argpartition(rank, most - 1)[:most] for rank in ranks])
        totals = np.bincount(text_of_id[inverse], minlength=len(texts))
        return Group("string", "", texts[chosen].tolist(), totals[chosen], masked[chosen])

    def _group(self, title: str, note: str, index: np.ndarray, labels: list[str]) -> Group:
        totals = np.bincount(index, minlength=len(labels))
        there = np.flatnonzero(totals)
        masked = self._masked_in(index, len(labels))
        return Group(title, note, [visible(labels[place]) for place in there], totals[there], masked[there])

    def _masked_in(self, index: np.ndarray, number: int) -> np.ndarray:
        """Label tokens that each stop masks in each of some classes, shape `(number, S)`."""
        size = len(self.stops) + 1
        counts = np.bincount(index.astype(np.int64) * size + self.codes, minlength=number * size).reshape(number, size)
        return counts[:, :0:-1].cumsum(axis=1, dtype=np.int32)[:, ::-1]


def pair_rows(figures: list[Figures]) -> np.ndarray:
    """Which rows of the data sets belong together: those with the same context before their first label token.

    Returns:
        Shape `(P, len(figures))`: indices of rows, `-1` where a data set has no such row; each row once.
    """
    first = figures[0]
    pairs = np.arange(len(first.labels_per_row))[:, None]
    for other in figures[1:]:
        waiting: dict[bytes, list[int]] = {}
        for row, context in enumerate(_contexts(other)):
            waiting.setdefault(context, []).append(row)
        for rows in waiting.values():
            rows.reverse()
        found = np.array([waiting[one].pop() if waiting.get(one) else -1 for one in _contexts(first)])
        rest = np.array(sorted(row for rows in waiting.values() for row in rows), dtype=np.int64)
        alone = np.full((len(rest), pairs.shape[1]), -1)
        pairs = np.concatenate([np.column_stack([pairs, found]), np.column_stack([alone, rest])])
    return pairs


def _contexts(figures: Figures) -> list[bytes]:
    """The token ids of each row before its first label token."""
    documents = figures.data.documents
    starts, ends = documents.row_offsets[:-1], documents.row_offsets[1:]
    labels = np.append(np.flatnonzero(documents.label_mask), len(documents.input_ids))
    until = np.minimum(labels[np.searchsorted(labels, starts)], ends)
    return [
        documents.input_ids[start:end].tobytes() for start, end in zip(starts.tolist(), until.tolist(), strict=True)
    ]


def make_figures(datas: list[ScoredData], options: list[STMOptions]) -> list[Figures]:
    """The figures of one or several data sets, at the same stops.

    Args:
        datas: Scored data.
        options: Checked options, one for each; the first's threshold is where the slider starts.

    Raises:
        ValueError: For data without label tokens.
    """
    if any(len(data.nll) == 0 for data in datas):
        raise ValueError("There is no label token to report on.")
    masks = [data.masks(some) for data, some in zip(datas, options, strict=True)]
    thresholds = [_percent_thresholds(data, some) for data, some in zip(datas, options, strict=True)]
    stops = _stops(datas, options, masks, thresholds)
    nats = [stop.nats for stop in stops]
    figures = [
        Figures(data, some, mask, stops, nats.index(mask.threshold_nats), percents)
        for data, some, mask, percents in zip(datas, options, masks, thresholds, strict=True)
    ]
    for one in figures:
        if one.masked[one.start] != one.masks.num_masked:
            raise AssertionError(f"{one.masked[one.start]} against {one.masks.num_masked} masked tokens")
    return figures


def _stops(
    datas: list[ScoredData], options: list[STMOptions], masks: list[Masks], thresholds: list[dict[int, float]]
) -> list[Stop]:
    """Round perplexities, a threshold for every whole percent of each data set, and the report's own."""
    values = {float(f"{1 + base * 10.0**power:.6g}") for power in range(-4, 0) for base in _ROUND}
    values |= {float(f"{base * 10.0**power:.6g}") for power in range(9) for base in _ROUND if base * 10**power >= 2}
    values |= {*THRESHOLDS, 1e9}.union(*(some.values() for some in thresholds))
    stops = {math.log(value): Stop(math.log(value), _text(value)) for value in values}
    stops[math.inf] = Stop(math.inf, "inf", "masks nothing")
    for data, some, mask in reversed([*zip(datas, options, masks, strict=True)]):
        nats, of_stop = mask.threshold_nats, set(data.kept.stop_token_ids)
        value = some.threshold or shortest_threshold(
            candidate_scores(data.documents, data.scores(some), some, of_stop), nats, some.stm_strategy
        )
        if math.log(value) not in {mask.threshold_nats for mask in masks}:
            stops.pop(math.log(value), None)  # masks the same, and would read the same
        note = "the run's threshold" if data.receipt and nats == data.receipt["threshold_nats"] else "asked for"
        if data.receipt is None and some.threshold == DEFAULT_THRESHOLD:
            note = "the default"
        stops[nats] = Stop(nats, _text(value), note)
    return [stops[nats] for nats in sorted(stops)]


def _text(perplexity: float) -> str:
    """A perplexity with all its digits, and no more."""
    return repr(float(perplexity)).removesuffix(".0")


def _percent_thresholds(data: ScoredData, options: STMOptions) -> dict[int, float]:
    """The perplexity that masks each whole percent of the label tokens, or just less where scores are equal."""
    candidates = candidate_scores(data.documents, data.scores(options), options, set(data.kept.stop_token_ids))
    if len(candidates) == 0 or options.stm_strategy == "hybrid":  # which takes no fraction
        return {}
    candidates = np.sort(candidates)
    wanted = (replace(options, stm_threshold=None, stm_mask_fraction=percent / 100) for percent in range(1, 100))
    nats = [threshold_in_nats(candidates, some) for some in wanted]
    return {
        percent: shortest_threshold(candidates, some, options.stm_strategy) for percent, some in enumerate(nats, 1)
    }

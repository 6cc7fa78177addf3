"""A data set's rows as flat arrays of documents: what is scored, masked and hashed.

A document is the longest span whose tokens attend to each other in training: a TRL `seq_lengths` segment, else the
whole row. The only module that knows how `datasets` stores columns.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ..constants import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_READ = 10_000
_TOKENS_PER_BLOCK = 2**18
"""Tokens that are worked on at a time, so that what is needed on the way stays small for any data set."""


@dataclass(frozen=True)
class Documents:
    """Token ids and labels of all documents, one after the other.

    Attributes:
        input_ids: Token ids, shape `(total,)`, int16 if that holds them, else int32.
        has_label: Whether the host trains each token's label, shape `(total,)`, bool.
        other_labels: Labels of all tokens, shape `(total,)`; None where each is its token's id, or `-100`.
        document_offsets: Where each document starts, and the end, shape `(D + 1,)`.
        row_offsets: Where each data-set row starts, and the end, shape `(R + 1,)`.
    """

    input_ids: np.ndarray
    has_label: np.ndarray
    other_labels: np.ndarray | None
    document_offsets: np.ndarray
    row_offsets: np.ndarray

    @classmethod
    def of(
        cls, input_ids: np.ndarray, labels: np.ndarray, document_offsets: np.ndarray, row_offsets: np.ndarray
    ) -> "Documents":
        """Documents with the labels of all tokens, shape `(total,)`, `-100` where the host keeps the loss off."""
        has_label = labels != IGNORE_INDEX
        are_ids = labels is input_ids or bool(((labels == input_ids) | ~has_label).all())
        other_labels = None if are_ids else _smallest(labels)
        return cls(_smallest(input_ids), has_label, other_labels, document_offsets, row_offsets)

    @classmethod
    def from_rows(cls, input_ids: list[Any], labels: list[Any], seq_lengths: list[Any] | None = None) -> "Documents":
        """Documents of rows given as sequences of ints (see `from_dataset`)."""
        lengths = np.array([len(row) for row in input_ids], dtype=np.int64)
        segments = [[length] for length in lengths] if seq_lengths is None else seq_lengths
        return cls._build(
            _concatenate(input_ids),
            _concatenate(labels),
            lengths,
            np.array([len(row) for row in labels], dtype=np.int64),
            _concatenate(segments),
            np.array([sum(row) for row in segments], dtype=np.int64),
        )

    @classmethod
    def from_dataset(cls, dataset: "Dataset") -> "Documents":
        """Documents of a tokenized data set with `input_ids`, and where it has them `labels` and `seq_lengths`.

        Without a `labels` column every token is a label, as hosts have it.

        Raises:
            ValueError: For no `input_ids`, a transform, or labels or segments of another length than the ids.
        """
        columns = dataset.column_names
        if "input_ids" not in columns:
            raise ValueError(
                "STM needs tokenized rows with an 'input_ids' column before training starts; this data set has "
                f"{columns}."
            )
        if dataset.format["type"] == "custom":
            raise ValueError(
                "STM cannot mask a data set with a transform (with_transform or set_transform): its rows are made "
                "anew at every read. Apply the transform once with Dataset.map, or remove it with "
                "Dataset.reset_format."
            )
        ids, id_lengths = _read_lists(dataset, "input_ids")
        ids = _smallest(ids)
        labels, label_lengths = _read_lists(dataset, "labels") if "labels" in columns else (ids, id_lengths)
        segments, segment_sums = id_lengths, id_lengths
        if "seq_lengths" in columns:
            segments, segments_per_row = _read_lists(dataset, "seq_lengths")
            row = np.repeat(np.arange(len(id_lengths)), segments_per_row)
            segment_sums = np.bincount(row, weights=segments, minlength=len(id_lengths)).astype(np.int64)
        documents = cls._build(ids, labels, id_lengths, label_lengths, segments, segment_sums)
        if "position_ids" in columns:
            _check_positions(_read_lists(dataset, "position_ids")[0], documents.document_offsets)
        return documents

    @classmethod
    def from_batch(
        cls,
        input_ids: np.ndarray,
        labels: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
    ) -> tuple["Documents", np.ndarray]:
        """Documents of a collated batch: padded rows, or packs in which every document's positions start at 0.

        Args:
            input_ids: Token ids, shape `(B, T)`.
            labels: Labels, shape `(B, T)`.
            attention_mask: 0 at padding; packs may number their documents in it. Shape `(B, T)`.
            position_ids: Shape `(B, T)`.

        Returns:
            The documents, one a row, without padding; and the flat index of each of their tokens in the batch, shape
            `(total,)`.

        Raises:
            ValueError: For padding between tokens, without positions that say what it parts.
        """
        shape = input_ids.shape
        real = np.ones(shape, dtype=bool) if attention_mask is None else attention_mask != 0
        starts = np.zeros(shape, dtype=bool)
        starts[:, 0] = True
        starts[:, 1:] |= ~real[:, :-1]
        if position_ids is not None:
            starts |= np.broadcast_to(position_ids, shape) == 0
        if attention_mask is not None:
            starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
        where = np.flatnonzero(real)
        if position_ids is None and ((real[:, 1:] & ~real[:, :-1]).sum(1) > ~real[:, 0]).any():
            raise ValueError(
                "A row has padding between its tokens and no position_ids: whether the model in training sees through "
                "it cannot be told, so STM cannot score it. Pad at one end, or pack with position_ids (Axolotl: "
                "pretraining_sample_concatenation: false)."
            )
        offsets = np.append(np.flatnonzero(starts.ravel()[where]), len(where))
        documents = cls.of(input_ids.ravel()[where], labels.ravel()[where], offsets, offsets)
        if position_ids is not None:
            _check_positions(np.broadcast_to(position_ids, shape).ravel()[where], offsets)
        return documents, where

    @classmethod
    def concatenate(cls, parts: "list[Documents]") -> "Documents":
        """All documents of several sets, one set after the other."""
        starts = np.concatenate(([0], np.cumsum([len(part.input_ids) for part in parts])))

        def joined(offsets: list[np.ndarray]) -> np.ndarray:
            moved = [start + some[:-1] for start, some in zip(starts, offsets, strict=False)]
            return np.concatenate([*moved, starts[-1:]])

        return cls.of(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            joined([part.document_offsets for part in parts]),
            joined([part.row_offsets for part in parts]),
        )

    @classmethod
    def _build(
        cls,
        input_ids: np.ndarray,
        labels: np.ndarray,
        id_lengths: np.ndarray,
        label_lengths: np.ndarray,
        segments: np.ndarray,
        segment_sums: np.ndarray,
    ) -> "Documents":
        if (segments < 0).any():
            raise ValueError(f"seq_lengths must be lengths of documents, got {segments[segments < 0][0]}.")
        _check_lengths("labels", label_lengths, id_lengths, "Give one label per token, -100 where the loss is off.")
        _check_lengths("seq_lengths (summed)", segment_sums, id_lengths, "They must cut the row into its documents.")
        rows = offsets_of(id_lengths)
        return cls.of(
            input_ids,
            labels,
            rows if segments is id_lengths and (segments > 0).all() else offsets_of(segments[segments > 0]),
            rows,
        )

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def labels(self) -> np.ndarray:
        """Labels before STM, shape `(total,)`, `-100` where the host keeps the loss off; made anew at every call."""
        return self.labels_at(slice(None))

    def labels_at(self, tokens: Any) -> np.ndarray:
        """Labels before STM of some tokens, a slice or indices of all."""
        if self.other_labels is not None:
            return self.other_labels[tokens]
        ids = self.input_ids[tokens]
        return np.where(self.has_label[tokens], ids, ids.dtype.type(IGNORE_INDEX))

    @cached_property
    def label_mask(self) -> np.ndarray:
        """Whether each position is a label token: label not `-100` and not a document's position 0; `(total,)`."""
        starts = self.document_offsets[:-1]
        if not self.has_label[starts].any():
            return self.has_label
        mask = self.has_label.copy()
        mask[starts] = False
        return mask

    @cached_property
    def tokens_per_document(self) -> np.ndarray:
        """Label tokens of each document, shape `(D,)`."""
        return self._count(self.label_mask, self.document_offsets)

    @property
    def label_ids(self) -> np.ndarray:
        """Token ids of all N label tokens, shape `(N,)`."""
        return (self.input_ids if self.other_labels is None else self.other_labels)[self.label_mask]

    def occurring_ids(self) -> np.ndarray:
        """Every id that a token or a label token has, once, in order."""
        of_labels = self.input_ids if self.other_labels is None else self.other_labels
        largest = max(int(ids.max(initial=0)) for ids in (self.input_ids, of_labels))
        occurs = np.zeros(largest + 1, dtype=bool)
        for first, last in runs(self.document_offsets):
            tokens = slice(self.document_offsets[first], self.document_offsets[last])
            occurs[self.input_ids[tokens]] = True
            occurs[of_labels[tokens][self.label_mask[tokens]]] = True
        return np.flatnonzero(occurs)

    @property
    def num_label_tokens(self) -> int:
        """N, the label tokens of all documents."""
        return int(self.tokens_per_document.sum())

    @property
    def num_unscored_labels(self) -> int:
        """Labels that are not `-100` at a document's position 0, which nothing predicts."""
        return int(self.has_label[self.document_offsets[:-1]].sum())

    def content_hashes(self) -> np.ndarray:
        """128-bit hash of each document's ids and label tokens, as int32, shape `(D, 2)`, uint64."""
        hashes = np.empty((len(self), 2), dtype=np.uint64)
        for first, block in self._blocks():
            tokens = slice(block[0], block[-1])
            scored = np.where(self.label_mask[tokens], self.labels_at(tokens), np.int32(IGNORE_INDEX))
            digests = [xxhash.xxh3_128_digest(content) for content in _contents(self.input_ids, scored, block, "<i4")]
            hashes[first : first + len(digests)] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
        return hashes

    def context_lengths(self) -> np.ndarray:
        """Tokens of each document before its last label token, 0 where it has none, shape `(D,)`, int32."""
        lengths = np.zeros(len(self), dtype=np.int32)
        for first, block in self._blocks():
            counts = self.tokens_per_document[first : first + len(block) - 1]
            labelled = np.flatnonzero(counts)
            positions = np.flatnonzero(self.label_mask[block[0] : block[-1]])
            last = positions[np.cumsum(counts)[labelled] - 1]
            lengths[first + labelled] = last - (block[labelled] - block[0])
        return lengths

    def rows_with(self, token_flags: np.ndarray) -> np.ndarray:
        """How many of the flagged tokens (shape `(total,)`, bool) each row has, shape `(R,)`."""
        return self._count(token_flags, self.row_offsets)

    def digest(self, masked: np.ndarray) -> str:
        """`mask_digest`: SHA-256 over the sorted SHA-256 hashes of each document's (`input_ids`, `labels`), as int64.

        Independent of the order of rows, of packing, ranks and host.

        Args:
            masked: Which labels become `-100` before that, shape `(total,)`, bool.
        """
        hashes = np.empty(len(self), dtype="S32")
        for first, block in self._blocks():
            tokens = slice(block[0], block[-1])
            labels = np.where(masked[tokens], np.int16(IGNORE_INDEX), self.labels_at(tokens))
            contents = _contents(self.input_ids, labels, block, "<i8")
            digests = [hashlib.sha256(content).digest() for content in contents]
            hashes[first : first + len(digests)] = np.frombuffer(b"".join(digests), dtype="S32")
        hashes.sort()
        return hashlib.sha256(hashes.view(np.uint8).data).hexdigest()

    @property
    def rows_fingerprint(self) -> str:
        """128-bit hash of all rows in their order, in hexadecimal."""
        digest = xxhash.xxh3_128()
        for array in (self.input_ids, self.has_label, self.other_labels, self.document_offsets, self.row_offsets):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of documents: the index of the first, and the offsets of all of them with the end."""
        for first, last in runs(self.document_offsets):
            yield first, self.document_offsets[first : last + 1]

    @staticmethod
    def _count(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """How many flags are set between every two offsets, int32."""
        counts = np.zeros(len(offsets) - 1, dtype=np.int32)
        for first, last in runs(offsets):
            cumulative = np.zeros(offsets[last] - offsets[first] + 1, dtype=np.int32)
            np.cumsum(flags[offsets[first] : offsets[last]], out=cumulative[1:])
            counts[first:last] = np.diff(cumulative[offsets[first : last + 1] - offsets[first]])
        return counts


def with_columns(dataset: "Dataset", documents: Documents, labels: np.ndarray, **row_values: np.ndarray) -> "Dataset":
    """The data set with new `labels` (shape `(total,)`) and a column of ints for each of `row_values` (shape `(R,)`).

    Other columns, the order of rows and the output format stay; nothing is copied but the new columns, and no map
    cache is read or written.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    features = dataset.features.copy()
    list_type = features.get("labels", features["input_ids"])
    if getattr(list_type, "length", -1) != -1 or list_type.feature.dtype.startswith("uint"):
        # A fixed length would not fit stored rows that are not shown, nor an unsigned type -100.
        list_type = datasets.List(datasets.Value("int64"))
    feature_of = {"labels": list_type, **{name: datasets.Value("int64") for name in row_values}}
    lengths = np.diff(documents.row_offsets)
    # Rows of the stored table that `dataset` shows; it may select, repeat or reorder them.
    shown = np.arange(len(dataset)) if dataset._indices is None else dataset._indices.column(0).to_numpy()
    num_stored = len(dataset._data)
    source = np.full(num_stored, -1)
    source[shown] = np.arange(len(dataset))
    stored_lengths = np.where(source >= 0, lengths[source], 0)
    schema = datasets.Features(feature_of).arrow_schema
    schema = pa.schema([(field.name, field.type) for field in schema])
    stored_offsets = offsets_of(stored_lengths)
    values = np.empty(stored_offsets[-1], dtype=list_type.feature.dtype)
    parts = []
    for first, last in runs(stored_offsets):
        rows = source[first:last]
        block = values[stored_offsets[first] : stored_offsets[last]]
        block[:] = labels[gather(documents.row_offsets[rows], stored_lengths[first:last])]
        offsets = pa.array(stored_offsets[first : last + 1] - stored_offsets[first], pa.int32())
        columns = {"labels": pa.ListArray.from_arrays(offsets, pa.array(block))}
        columns |= {name: pa.array(np.where(rows >= 0, column[rows], 0)) for name, column in row_values.items()}
        parts.append(pa.table(columns).cast(schema))
    new = InMemoryTable(pa.concat_tables([schema.empty_table(), *parts]))
    kept = [name for name in dataset._data.column_names if name not in feature_of]
    info = dataset.info.copy()
    info.features = datasets.Features({name: features[name] for name in kept} | feature_of)
    table = concat_tables([dataset._data.select(kept), new], axis=1)
    # The constructor would pickle the whole table to make a fingerprint.
    fingerprint = xxhash.xxh3_64(f"{dataset._fingerprint} {[*feature_of]}".encode())
    for column in (values, stored_offsets, *row_values.values()):
        fingerprint.update(np.ascontiguousarray(column).data)
    masked = datasets.Dataset(
        table, info, split=dataset.split, indices_table=dataset._indices, fingerprint=fingerprint.hexdigest()
    )
    format_ = dataset.format
    if format_["type"] is not None or set(format_["columns"]) != set(dataset.column_names):
        format_["columns"] = [*dict.fromkeys([*format_["columns"], *feature_of])]
        masked.set_format(**format_)
    return masked


def _read_lists(dataset: "Dataset", column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists of ints as (all values, int64 lengths), read in slices."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrow = dataset.select_columns([column]).with_format("arrow")
    slices = range(0, len(arrow), _ROWS_PER_READ)
    lengths = np.empty(len(arrow), dtype=np.int64)
    values, end = np.empty(0, dtype=np.int32), 0
    for start in slices:
        rows = arrow[start : start + _ROWS_PER_READ][column]
        if rows.null_count:
            raise _missing(column, start, len(rows))
        lengths[start : start + len(rows)] = pc.list_value_length(rows).to_numpy()
    values = np.empty(lengths.sum(), dtype=np.int32)
    for start in slices:
        for chunk in arrow[start : start + _ROWS_PER_READ][column].chunks:
            flat = chunk.flatten()
            if flat.null_count:
                raise _missing(column, start, len(chunk))
            if len(flat) and not pa.types.is_integer(flat.type):
                raise ValueError(f"Column {column!r} must hold lists of integers, got {flat.type}.")
            values[end : end + len(flat)] = flat.to_numpy(zero_copy_only=False)
            end += len(flat)
    return values, lengths


def _missing(column: str, start: int, count: int) -> ValueError:
    return ValueError(f"Column {column!r} has missing values in rows {start} to {start + count}.")


def _smallest(values: np.ndarray) -> np.ndarray:
    """The same integers as int16 if that holds them, else int32."""
    limits = np.iinfo(np.int16)
    is_small = not len(values) or (limits.min <= values.min() and values.max() <= limits.max)
    return np.ascontiguousarray(values, dtype=np.int16 if is_small else np.int32)


def _check_positions(positions: np.ndarray, document_offsets: np.ndarray) -> None:
    """Raise ValueError for positions that do not count up by one within each document, as scoring has them."""
    follows = positions[1:] == positions[:-1] + 1
    follows[document_offsets[1:-1] - 1] = True  # between documents
    if len(positions) != document_offsets[-1] or not follows.all():
        raise ValueError(
            "STM cannot score these rows: their position_ids do not count up by one within each document, so tokens "
            "would be trained in other places than they are scored. Remove the column, or what makes it (PoSE)."
        )


def _check_lengths(name: str, lengths: np.ndarray, id_lengths: np.ndarray, hint: str) -> None:
    if len(lengths) != len(id_lengths):
        raise ValueError(f"{name} has {len(lengths)} rows, input_ids has {len(id_lengths)}.")
    wrong = np.flatnonzero(lengths != id_lengths)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"{name} has {lengths[row]} entries in row {row}, where input_ids has {id_lengths[row]} ({len(wrong)} "
            f"such rows). {hint}"
        )


def runs(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of runs of documents, or rows, that hold about `_TOKENS_PER_BLOCK` tokens each."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _TOKENS_PER_BLOCK, side="right")) - 1)
        yield first, last
        first = last


def _contents(input_ids: np.ndarray, others: np.ndarray, offsets: np.ndarray, dtype: str) -> Iterator[memoryview]:
    """For each document of a run its ids followed by its `others`, as the bytes of a type.

    Args:
        input_ids: Ids of all documents, shape `(total,)`.
        others: Another value for each token of the run.
        offsets: Where in `input_ids` each document of the run starts, and the end.
        dtype: The type, with its order of bytes.
    """
    starts = offsets - offsets[0]
    lengths = np.diff(starts)
    at = np.arange(starts[-1]) + np.repeat(starts[:-1], lengths)
    both = np.empty(2 * starts[-1], dtype=dtype)
    both[at] = input_ids[offsets[0] : offsets[-1]]
    both[at + np.repeat(lengths, lengths)] = others
    content = both.view(np.uint8).data
    for start, end in pairwise((2 * both.itemsize * starts).tolist()):
        yield content[start:end]


def gather(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices `[s, s + 1, ..., s + n - 1]` for every start and length, joined."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of some lengths starts when they follow one another, and the end, int64."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _concatenate(rows: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)

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

from .constants import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_READ = 10_000


@dataclass(frozen=True)
class Documents:
    """Token ids and labels of all documents, one after the other.

    Attributes:
        input_ids: Token ids, shape `(total,)`, int32.
        labels: Labels before STM, shape `(total,)`, int32, `-100` where the host keeps the loss off.
        document_offsets: Where each document starts, and the end, shape `(D + 1,)`.
        row_offsets: Where each data-set row starts, and the end, shape `(R + 1,)`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_offsets: np.ndarray
    row_offsets: np.ndarray

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
        offsets = np.append(np.flatnonzero(starts.ravel()[where]), len(where))
        documents = cls(
            np.ascontiguousarray(input_ids.ravel()[where], dtype=np.int32),
            np.ascontiguousarray(labels.ravel()[where], dtype=np.int32),
            offsets,
            offsets,
        )
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

        return cls(
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
        return cls(
            np.ascontiguousarray(input_ids, dtype=np.int32),
            np.ascontiguousarray(labels, dtype=np.int32),
            _offsets(segments[segments > 0]),
            _offsets(id_lengths),
        )

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    @cached_property
    def label_mask(self) -> np.ndarray:
        """Whether each position is a label token: label not `-100` and not a document's position 0; `(total,)`."""
        mask = self.labels != IGNORE_INDEX
        mask[self.document_offsets[:-1]] = False
        return mask

    @cached_property
    def tokens_per_document(self) -> np.ndarray:
        """Label tokens of each document, shape `(D,)`."""
        return self._count(self.label_mask, self.document_offsets)

    @property
    def label_ids(self) -> np.ndarray:
        """Token ids of all N label tokens, shape `(N,)`, int32."""
        return self.labels[self.label_mask]

    @property
    def num_label_tokens(self) -> int:
        """N, the label tokens of all documents."""
        return int(self.tokens_per_document.sum())

    @property
    def num_unscored_labels(self) -> int:
        """Labels that are not `-100` at a document's position 0, which nothing predicts."""
        return int((self.labels[self.document_offsets[:-1]] != IGNORE_INDEX).sum())

    @cached_property
    def content_hashes(self) -> np.ndarray:
        """128-bit hash of each document's ids and label tokens, shape `(D, 2)`, uint64."""
        scored = np.where(self.label_mask, self.labels, np.int32(IGNORE_INDEX))
        hashes = bytearray()
        for start, end in self._spans():
            digest = xxhash.xxh3_128(self.input_ids[start:end].data)
            digest.update(scored[start:end].data)
            hashes += digest.digest()
        return np.frombuffer(bytes(hashes), dtype=">u8").astype(np.uint64).reshape(-1, 2)

    def rows_with(self, token_flags: np.ndarray) -> np.ndarray:
        """How many of the flagged tokens (shape `(total,)`, bool) each row has, shape `(R,)`."""
        return self._count(token_flags, self.row_offsets)

    def digest(self, labels: np.ndarray) -> str:
        """`mask_digest`: SHA-256 over the sorted SHA-256 hashes of each document's (`input_ids`, `labels`), as int64.

        Independent of the order of rows, of packing, ranks and host.
        """
        ids64, labels64 = self.input_ids.astype("<i8"), labels.astype("<i8")
        hashes = sorted(
            hashlib.sha256(ids64[start:end].tobytes() + labels64[start:end].tobytes()).digest()
            for start, end in self._spans()
        )
        return hashlib.sha256(b"".join(hashes)).hexdigest()

    @property
    def rows_fingerprint(self) -> str:
        """128-bit hash of all rows in their order, in hexadecimal."""
        digest = xxhash.xxh3_128()
        for array in (self.input_ids, self.labels, self.document_offsets, self.row_offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _spans(self) -> Iterator[tuple[int, int]]:
        offsets = self.document_offsets.tolist()
        return pairwise(offsets)

    @staticmethod
    def _count(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        cumulative = np.concatenate(([0], np.cumsum(flags)))
        return np.diff(cumulative[offsets])


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
    values = labels[_gather(documents.row_offsets[:-1][source], stored_lengths)]
    list_array = pa.ListArray.from_arrays(pa.array(_offsets(stored_lengths), pa.int32()), pa.array(values, pa.int64()))
    columns = {"labels": list_array}
    columns |= {name: pa.array(np.where(source >= 0, column[source], 0)) for name, column in row_values.items()}
    schema = datasets.Features(feature_of).arrow_schema
    new = InMemoryTable(pa.table(columns).cast(pa.schema([(field.name, field.type) for field in schema])))
    kept = [name for name in dataset._data.column_names if name not in columns]
    info = dataset.info.copy()
    info.features = datasets.Features({name: features[name] for name in kept} | feature_of)
    table = concat_tables([dataset._data.select(kept), new], axis=1)
    masked = datasets.Dataset(table, info=info, split=dataset.split, indices_table=dataset._indices)
    format_ = dataset.format
    if format_["type"] is not None or set(format_["columns"]) != set(dataset.column_names):
        format_["columns"] = [*dict.fromkeys([*format_["columns"], *columns])]
        masked.set_format(**format_)
    return masked


def _read_lists(dataset: "Dataset", column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists of ints as (all values, int64 lengths), read in slices."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrow = dataset.select_columns([column]).with_format("arrow")
    values, lengths = [], []
    for start in range(0, len(arrow), _ROWS_PER_READ):
        for chunk in arrow[start : start + _ROWS_PER_READ][column].chunks:
            flat = chunk.flatten()
            if chunk.null_count or flat.null_count:
                raise ValueError(f"Column {column!r} has missing values in rows {start} to {start + len(chunk)}.")
            if len(flat) and not pa.types.is_integer(flat.type):
                raise ValueError(f"Column {column!r} must hold lists of integers, got {flat.type}.")
            values.append(flat.to_numpy(zero_copy_only=False).astype(np.int32))
            lengths.append(pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64))
    return _concatenate(values), _concatenate(lengths)


def _check_positions(positions: np.ndarray, document_offsets: np.ndarray) -> None:
    """Raise ValueError for positions that do not count up by one within each document, as scoring has them."""
    steps = np.diff(positions)
    steps[document_offsets[1:-1] - 1] = 1  # between documents
    if len(positions) != document_offsets[-1] or (steps != 1).any():
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


def _gather(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices `[s, s + 1, ..., s + n - 1]` for every start and length, joined."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _concatenate(rows: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)

"""A data set's rows on disk, beside its scores, so that scores can be looked at without the data or a tokenizer.

    CACHE_HOME/documents/FINGERPRINT-CONTENT.npz

FINGERPRINT is that of the `ScorePlan`, which finds the rows of a scores entry. It knows neither the order of rows nor
how often one occurs, so CONTENT, a hash of all that the file holds, tells such data sets apart. Scores, which several
data sets share, hold no rows.
"""

import json
import os
import threading
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..constants import IGNORE_INDEX
from ..tokens import token_texts
from .documents import Documents
from .plan import ScorePlan
from .store import cache_home

_FORMAT_VERSION = 1
_GROUP_COLUMNS = ("dataset", "dataset_name", "data_source", "source", "subset")
_MOST_GROUPS = 50
_ARRAYS = (
    "input_ids",
    "has_label",
    "other_labels_at",
    "other_labels",
    "document_lengths",
    "row_lengths",
    "token_ids",
    "stop_token_ids",
    "row_groups",
    "texts",
)


class DocumentsError(ValueError):
    """Kept rows that are missing or must not be used."""


@dataclass(frozen=True)
class KeptDocuments:
    """A data set's rows with what it takes to show them.

    Attributes:
        documents: The rows.
        text_of: Text of each token id that occurs.
        stop_token_ids: Ids that end a turn or a text.
        name: What to call the data in a heading.
        groups: Names of the data sets that the rows come from; empty where there is one, or nobody knows.
        row_groups: Index in `groups` of each row, shape `(R,)`, or `(0,)` without groups.
    """

    documents: Documents
    text_of: dict[int, str]
    stop_token_ids: frozenset[int]
    name: str
    groups: tuple[str, ...] = ()
    row_groups: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def of_dataset(
        cls, dataset: Any, plan: ScorePlan, tokenizer: Any, stop_token_ids: set[int], name: str | None = None
    ) -> "KeptDocuments":
        """The rows of a tokenized data set.

        Args:
            dataset: The data set. A column of strings called `dataset`, `source` or the like names the groups.
            plan: The plan of its documents.
            tokenizer: Tells what the ids say.
            stop_token_ids: Ids that end a turn or a text.
            name: What the data are called; None for the name that they were loaded by.
        """
        documents = plan.documents
        token_ids = documents.occurring_ids().tolist()
        texts = token_texts(tokenizer, token_ids)
        return cls(
            documents,
            dict(zip(token_ids, texts, strict=True)),
            frozenset(stop_token_ids),
            name or _data_name(dataset, plan.fingerprint),
            *_row_groups(dataset),
        )

    def write(self, plan: ScorePlan) -> Path:
        """Keep the rows; a file that is there already stays.

        Args:
            plan: The plan of the same documents.

        Returns:
            The file.

        Raises:
            OSError: If it cannot be written.
        """
        arrays = self._arrays()
        path = documents_folder() / f"{plan.fingerprint}-{_content_hash(arrays)}.npz"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.stem}-{os.getpid()}-{threading.get_ident()}")
        try:
            with draft.open("xb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        return path

    def _arrays(self) -> dict[str, np.ndarray]:
        documents = self.documents
        other = np.zeros(0, dtype=np.int64)
        if documents.other_labels is not None:
            other = np.flatnonzero(documents.has_label & (documents.other_labels != documents.input_ids))
        texts = {
            "format_version": _FORMAT_VERSION,
            "name": self.name,
            "groups": self.groups,
            "tokens": list(self.text_of.values()),
        }
        return {
            "input_ids": _compact(documents.input_ids),
            "has_label": np.packbits(documents.has_label),
            "other_labels_at": _compact(other),
            "other_labels": _compact(documents.labels_at(other)),
            "document_lengths": _compact(np.diff(documents.document_offsets)),
            "row_lengths": _compact(np.diff(documents.row_offsets)),
            "token_ids": _compact(np.array(list(self.text_of), dtype=np.int64)),
            "stop_token_ids": _compact(np.array(sorted(self.stop_token_ids), dtype=np.int64)),
            "row_groups": _compact(self.row_groups),
            "texts": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
        }


def documents_folder() -> Path:
    """Where rows are kept: `documents` in `$STM_HOME`, or in `~/.cache/stm_plugin`."""
    return cache_home() / "documents"


def find_documents(fingerprint: str) -> Path:
    """The rows of a plan's fingerprint; of several data sets with the same documents, the one kept last.

    Raises:
        DocumentsError: If there are none.
    """
    folder = documents_folder()
    found = sorted(folder.glob(f"{fingerprint}-*.npz"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not found:
        raise DocumentsError(
            f"The rows that these scores belong to are not in {folder} (no {fingerprint}-*.npz). Rows are kept there "
            "when they are scored or masked: run the training or scoring command again (stored scores are used, "
            "nothing is scored twice), or set STM_HOME to where they are."
        )
    return found[-1]


def read_documents(path: Path) -> tuple[KeptDocuments, ScorePlan]:
    """Kept rows and their plan.

    Raises:
        DocumentsError: For a file that cannot be read, or whose content is not what its name says.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
        if path.stem.partition("-")[2] != _content_hash(arrays):
            raise _unusable(path, "it has been altered (its content is not what its name says)")
        texts: dict[str, Any] = json.loads(arrays["texts"].tobytes())
        if texts["format_version"] != _FORMAT_VERSION:
            raise _unusable(path, f"it has format version {texts['format_version']}, this is {_FORMAT_VERSION}")
        kept = _from_arrays(arrays, texts)
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unusable(path, f"it cannot be read ({error!r})") from error
    except ValueError as error:
        raise error if isinstance(error, DocumentsError) else _unusable(path, f"it is damaged ({error})") from error
    plan = ScorePlan.of(kept.documents)
    if plan.fingerprint != path.stem.partition("-")[0]:
        raise _unusable(path, "its rows are not those that its name says")
    return kept, plan


def _from_arrays(arrays: dict[str, np.ndarray], texts: dict[str, Any]) -> KeptDocuments:
    input_ids = arrays["input_ids"].astype(np.int32)
    has_label = np.unpackbits(arrays["has_label"], count=len(input_ids)).astype(bool)
    labels = np.where(has_label, input_ids, np.int32(IGNORE_INDEX))
    labels[arrays["other_labels_at"].astype(np.int64)] = arrays["other_labels"].astype(np.int32)
    offsets = [
        np.concatenate(([0], np.cumsum(arrays[name], dtype=np.int64))) for name in ("document_lengths", "row_lengths")
    ]
    return KeptDocuments(
        Documents.of(input_ids, labels, *offsets),
        dict(zip(arrays["token_ids"].tolist(), texts["tokens"], strict=True)),
        frozenset(arrays["stop_token_ids"].tolist()),
        texts["name"],
        tuple(texts["groups"]),
        arrays["row_groups"].astype(np.int64),
    )


def _compact(numbers: np.ndarray) -> np.ndarray:
    """The same non-negative numbers in the smallest type that holds them, little-endian."""
    largest = int(numbers.max()) if len(numbers) else 0
    return numbers.astype(np.min_scalar_type(largest).newbyteorder("<"))


def _content_hash(arrays: dict[str, np.ndarray]) -> str:
    """64 bits in hexadecimal."""
    digest = xxhash.xxh3_64()
    for name in _ARRAYS:
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _unusable(path: Path, fault: str) -> DocumentsError:
    return DocumentsError(f"The rows in {path} cannot be used: {fault}. Delete the file and score the data again.")


def _data_name(dataset: Any, fingerprint: str) -> str:
    """What to call a data set: the name it was loaded by, or the start of its fingerprint."""
    name = dataset.info.dataset_name
    return f"data {fingerprint[:8]}" if name in (None, "json", "parquet", "csv", "text", "arrow") else str(name)


def _row_groups(dataset: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Which data set each row comes from, where a column of strings says so, with a few different ones.

    Returns:
        The names, and each row's index in them, shape `(R,)`; both empty where no column says it.
    """
    for column in _GROUP_COLUMNS:
        if column in dataset.column_names and getattr(dataset.features[column], "dtype", None) == "string":
            values = dataset.with_format(None)[column][:]
            names = sorted({*values} - {None})
            if None not in values and 2 <= len(names) <= _MOST_GROUPS:
                index = {name: number for number, name in enumerate(names)}
                return tuple(names), np.array([index[value] for value in values], dtype=np.int64)
    return (), np.zeros(0, dtype=np.int64)

"""What is scored, and in which order: the part of a scores entry that depends on the data alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from .documents import Documents


@dataclass(frozen=True)
class ScorePlan:
    """The different documents that have label tokens, each once, in canonical order: longest first, then by content.

    The order, and so the layout of stored scores and the batches, depends on the documents alone: not on the order of
    rows, on packing, or on the number of processes.

    Attributes:
        documents: The data set's documents.
        members: Index of each planned document in `documents`, shape `(P,)`.
        lengths: Tokens of each planned document that its last label token needs as context, shape `(P,)`.
        planned: Index of each document of `documents` in the plan, shape `(D,)`; -1 where it has no label token.
    """

    documents: Documents
    members: np.ndarray
    lengths: np.ndarray
    planned: np.ndarray

    @classmethod
    def of(cls, documents: Documents) -> "ScorePlan":
        """Plan the scoring of a data set's documents."""
        labelled = np.flatnonzero(documents.tokens_per_document)
        positions = np.flatnonzero(documents.label_mask)
        last = positions[np.cumsum(documents.tokens_per_document)[labelled] - 1]
        lengths = last - documents.document_offsets[labelled]
        hashes = documents.content_hashes[labelled]
        order = np.lexsort((hashes[:, 1], hashes[:, 0], -lengths))
        ordered = hashes[order]
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        planned = np.full(len(documents), -1)
        planned[labelled[order]] = np.cumsum(is_new) - 1
        first = order[is_new]
        return cls(documents, labelled[first], lengths[first], planned)

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each planned document's scores start, and the end, shape `(P + 1,)`."""
        return np.concatenate(([0], np.cumsum(self.documents.tokens_per_document[self.members])))

    @property
    def num_scores(self) -> int:
        """Label tokens to score: those of every different document once."""
        return int(self.offsets[-1])

    @cached_property
    def fingerprint(self) -> str:
        """128-bit hash of all planned documents' ids and label tokens, in hexadecimal."""
        hashes = self.documents.content_hashes[self.members].astype(">u8")
        return xxhash.xxh3_128(hashes.tobytes()).hexdigest()

    def batches(self, tokens_per_batch: int) -> list[range]:
        """Runs of planned documents whose padded size stays within a token budget (a longer document goes alone)."""
        return self.split(range(len(self)), tokens_per_batch)

    def split(self, batch: range, tokens_per_batch: int) -> list[range]:
        """A batch in parts whose padded size stays within a smaller budget (a longer document goes alone)."""
        parts, start = [], batch.start
        while start < batch.stop:
            size = max(1, tokens_per_batch // int(self.lengths[start]))  # the first is the longest
            parts.append(range(start, min(start + size, batch.stop)))
            start += size
        return parts

    def num_tokens(self, batches: list[range]) -> int:
        """Tokens of some batches, without padding."""
        return sum(int(self.lengths[batch.start : batch.stop].sum()) for batch in batches)

    def num_padded_tokens(self, batch: range) -> int:
        """Tokens of a batch's forward pass."""
        return len(batch) * int(self.lengths[batch.start])

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Scores in canonical order, shape `(num_scores,)`, as those of all N label tokens in the data set's order."""
        starts = self.offsets[np.maximum(self.planned, 0)]
        counts = self.documents.tokens_per_document
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
        return scores[np.repeat(starts, counts) + within]

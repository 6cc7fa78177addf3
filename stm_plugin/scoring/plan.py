"""What is scored, and in which order: the part of a scores entry that depends on the data alone."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from .documents import Documents, gather, offsets_of, runs

_HASHES_PER_BLOCK = 2**16
_TOKENS_PER_BLOCK = 2**20


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
        fingerprint: 128-bit hash of all planned documents' ids and label tokens, in hexadecimal.
    """

    documents: Documents
    members: np.ndarray
    lengths: np.ndarray
    planned: np.ndarray
    fingerprint: str

    @classmethod
    def of(cls, documents: Documents) -> "ScorePlan":
        """Plan the scoring of a data set's documents."""
        labelled = np.flatnonzero(documents.tokens_per_document)
        lengths = documents.context_lengths()[labelled]
        hashes = documents.content_hashes()[labelled]
        order = np.lexsort((hashes[:, 1], hashes[:, 0], -lengths))
        hashes = hashes[order]
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
        planned = np.full(len(documents), -1, dtype=np.int32)
        planned[labelled[order]] = np.cumsum(is_new) - 1
        first = order[is_new]
        digest = xxhash.xxh3_128()
        for start in range(0, len(hashes), _HASHES_PER_BLOCK):
            block = slice(start, start + _HASHES_PER_BLOCK)
            digest.update(hashes[block][is_new[block]].astype(">u8").tobytes())
        return cls(documents, labelled[first].astype(np.int32), lengths[first], planned, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each planned document's scores start, and the end, shape `(P + 1,)`."""
        return offsets_of(self.documents.tokens_per_document[self.members])

    @property
    def num_scores(self) -> int:
        """Label tokens to score: those of every different document once."""
        return int(self.offsets[-1])

    @cached_property
    def common_prefix(self) -> int:
        """Tokens that all planned documents begin with (a system prompt), up to what predicts the first label of any.

        0 for fewer than two documents.
        """
        if len(self) < 2:
            return 0
        documents = self.documents
        length = int(self.lengths[-1]) - 1
        start = documents.document_offsets[self.members[0]]
        first = documents.input_ids[start : start + length]
        done = 0
        while length and done < len(self):
            members = self.members[done : done + max(1, _TOKENS_PER_BLOCK // (length + 1))]
            block = documents.document_offsets[members][:, None]
            differs = (documents.input_ids[block + np.arange(length)] != first[:length]).any(axis=0)
            # the token at t is predicted at t - 1
            predicts = documents.label_mask[block + np.arange(1, length + 1)].any(axis=0)
            length = int(np.append(differs | predicts, True).argmax())
            done += len(block)
        return length

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
        counts = self.documents.tokens_per_document
        offsets = offsets_of(counts)
        spread = np.empty(offsets[-1], dtype=scores.dtype)
        for first, last in runs(offsets):
            starts = self.offsets[np.maximum(self.planned[first:last], 0)]
            spread[offsets[first] : offsets[last]] = scores[gather(starts, counts[first:last])]
        return spread

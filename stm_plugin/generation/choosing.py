"""Which of a row's samples becomes its answer, and what became of the others."""

from collections import Counter
from collections.abc import Iterable

from .samples import Sample


def choose(samples: Iterable[Sample]) -> dict[int, Sample]:
    """The verified sample of lowest perplexity of each row that has one; of equal ones, the first.

    Naively, for one row: `min((s for s in samples if s.is_verified), key=lambda s: (s.perplexity, s.sample))`.

    Returns:
        The chosen sample by the row's index.
    """
    chosen: dict[int, Sample] = {}
    for sample in samples:
        if sample.is_verified:
            best = chosen.get(sample.row)
            if best is None or _rank(sample) < _rank(best):
                chosen[sample.row] = sample
    return chosen


def _rank(sample: Sample) -> tuple[float, int]:
    assert sample.perplexity is not None
    return sample.perplexity, sample.sample


def rejections(samples: Iterable[Sample]) -> dict[str, int]:
    """How many samples were rejected for what: verdicts up to the first colon, the most frequent first."""
    reasons = Counter(str(sample.verdict).partition(":")[0] for sample in samples if not sample.is_verified)
    return dict(reasons.most_common())

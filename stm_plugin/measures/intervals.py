"""Bootstrap intervals of what is measured over prompts."""

from collections.abc import Sequence

_DRAWS_PER_BLOCK = 2**22
"""Draws that are in memory at once."""


def ratio_interval(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `sum(sums) / sum(counts)`, the P prompts drawn with replacement.

    Args:
        sums: One sum a prompt, shape `(P,)`.
        counts: What each is a sum of, all above 0, shape `(P,)`; ones for a mean over prompts.
        confidence: Share of the resamples that lie within, between 0 and 1.
        num_resamples: How often the prompts are drawn.
        seed: Seed of the draws.

    Returns:
        Lower and upper end; None for fewer than two prompts, which say nothing about their spread.
    """
    import numpy as np

    if len(sums) < 2:
        return None
    numerators, denominators = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    generator = np.random.default_rng(seed)
    size = max(1, _DRAWS_PER_BLOCK // len(sums))
    ratios = []
    for start in range(0, num_resamples, size):
        drawn = generator.integers(len(sums), size=(min(size, num_resamples - start), len(sums)))
        ratios.append(numerators[drawn].sum(1) / denominators[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

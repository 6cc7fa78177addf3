"""What thresholds would mask, from stored scores alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .selection import fraction_threshold_nats, largest_score_within

THRESHOLDS = (1.5, 2.0, 2.5, 3.0, 5.0, 10.0, 25.0, 100.0, 1000.0)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
PAPER_FRACTION = 0.22
"""Middle of the share that the paper finds best, 20 to 24 % (arXiv 2501.14315)."""


@dataclass(frozen=True)
class Sweep:
    """What a range of thresholds masks of N label tokens.

    Attributes:
        label_tokens: N.
        quantiles: Perplexity at each of some quantiles.
        masked: Share of the label tokens that each threshold (a perplexity) masks.
        threshold_for_paper: Perplexity that masks `PAPER_FRACTION` of them, or as much below it as ties allow.
    """

    label_tokens: int
    quantiles: dict[float, float]
    masked: dict[float, float]
    threshold_for_paper: float

    @classmethod
    def of(cls, nll: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> "Sweep":
        """Sweep scores.

        Args:
            nll: NLL in nats of all N label tokens, shape `(N,)`, float32.
            thresholds: Perplexities.
        """
        threshold_for_paper = _perplexity(fraction_threshold_nats(nll, PAPER_FRACTION))  # checks the scores
        ordered = np.sort(nll)

        def share(tau: float) -> float:
            within = np.searchsorted(ordered, largest_score_within(math.log(tau)), side="right")
            return float((len(ordered) - within) / len(ordered))

        return cls(
            len(nll),
            {q: _perplexity(ordered[math.floor(q * (len(ordered) - 1))]) for q in QUANTILES},
            {tau: share(tau) for tau in thresholds},
            threshold_for_paper,
        )

    def lines(self) -> list[str]:
        """A table for the terminal."""
        quantiles = ", ".join(f"{q:.0%} {perplexity:.3g}" for q, perplexity in self.quantiles.items())
        return [
            f"{self.label_tokens:,} label tokens; quantiles of their perplexity: {quantiles}",
            "",
            "  threshold   masked",
            *(f"  {tau:>9g}  {share:>6.1%}" for tau, share in self.masked.items()),
            "",
            f"stm_threshold: {self.threshold_for_paper:.4g} masks {PAPER_FRACTION:.0%} (the paper finds 20 to 24 % "
            f"best); so does stm_mask_fraction: {PAPER_FRACTION}.",
        ]


def _perplexity(nats: float) -> float:
    return math.exp(min(float(nats), 700.0))

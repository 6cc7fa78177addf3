"""What a range of thresholds and fractions would mask, from stored scores alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..masking.masks import apply_threshold, candidate_scores, threshold_in_nats
from ..options import STMOptions, least_threshold
from ..scoring.documents import Documents
from ..selection import check_scores, perplexity
from .scored import ScoredData

THRESHOLDS = (1.5, 2.0, 2.5, 3.0, 5.0, 10.0, 25.0, 100.0, 1000.0)
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.22, 0.24, 0.3, 0.4)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
PAPER_FRACTION = 0.22
"""Middle of the share that the paper finds best (arXiv 2501.14315)."""
PAPER_BAND = (0.20, 0.24)
"""That share, from and to."""


@dataclass(frozen=True)
class SweepRow:
    """What one threshold, or one fraction, masks.

    Attributes:
        threshold: A perplexity.
        mask_fraction: The fraction that the threshold was taken from; None where it was given itself.
        threshold_nats: The threshold that is compared, in nats.
        masked_tokens: Masked label tokens.
        masked_fraction: Their share of all label tokens.
        kept_tokens: Label tokens that stay in the loss.
        rows_without_kept_tokens: Rows that have label tokens and keep none.
        stop_tokens_masked: Masked stop tokens.
        in_paper_band: Whether the share is one that the paper finds best.
    """

    threshold: float
    mask_fraction: float | None
    threshold_nats: float
    masked_tokens: int
    masked_fraction: float
    kept_tokens: int
    rows_without_kept_tokens: int
    stop_tokens_masked: int
    in_paper_band: bool


@dataclass(frozen=True)
class Sweep:
    """What a range of thresholds and fractions masks of N label tokens.

    Attributes:
        label_tokens: N.
        rows: Rows of the data set.
        stop_tokens: Stop tokens among the label tokens.
        quantiles: Perplexity at each of some quantiles.
        thresholds: What each threshold masks.
        fractions: What each fraction masks; none under `hybrid`, which takes no fraction.
        share: The share that was asked for.
        for_share: What the threshold for that share masks, as much below it as ties allow; None under `hybrid`.
        strategy: The strategy. Thresholds of `difference` are differences of perplexities.
    """

    label_tokens: int
    rows: int
    stop_tokens: int
    quantiles: dict[float, float]
    thresholds: tuple[SweepRow, ...]
    fractions: tuple[SweepRow, ...]
    share: float
    for_share: SweepRow | None
    strategy: str = "high"

    @classmethod
    def of(
        cls,
        documents: Documents,
        scores: np.ndarray,
        stop_token_ids: Iterable[int] = (),
        *,
        nll: np.ndarray | None = None,
        thresholds: Sequence[float] = THRESHOLDS,
        fractions: Sequence[float] = FRACTIONS,
        share: float = PAPER_FRACTION,
        options: STMOptions | None = None,
    ) -> "Sweep":
        """Sweep scores.

        Args:
            documents: A data set's documents.
            scores: Scores in nats of all N label tokens, in the data set's order, shape `(N,)`, float32: what
                `deciding_scores` says that the strategy compares.
            stop_token_ids: Ids that end a turn or a text.
            nll: NLL in nats of the same tokens, where the scores are another thing; the quantiles are of these.
            thresholds: Perplexities.
            fractions: Shares between 0 and 1, exclusive.
            share: The share to name a threshold for.
            options: Strategy, seed and whether stop tokens are kept; None for the defaults.

        Raises:
            ValueError: For no label token, a NaN score, or a threshold or share out of range.
        """
        check_scores(scores)
        if len(scores) == 0:
            raise ValueError("There is no label token to sweep over.")
        options, stop = options or STMOptions(), set(stop_token_ids)
        num_stop_tokens = 0

        def row(threshold: float | None, fraction: float | None) -> SweepRow:
            nonlocal num_stop_tokens
            here = replace(options, stm_threshold=threshold, stm_mask_fraction=fraction)
            here.check()
            nats = threshold_in_nats(candidate_scores(documents, scores, here, stop), here)
            masks = apply_threshold(documents, scores, nats, here, stop)
            num_stop_tokens = masks.num_stop_tokens
            return SweepRow(
                shortest_threshold(scores, nats, options.stm_strategy) if threshold is None else threshold,
                fraction,
                nats,
                masks.num_masked,
                masks.masked_fraction,
                len(scores) - masks.num_masked,
                masks.rows_without_kept_tokens,
                masks.num_masked_stop_tokens,
                PAPER_BAND[0] <= masks.masked_fraction <= PAPER_BAND[1],
            )

        rows = tuple(row(threshold, None) for threshold in thresholds)
        takes_fraction = options.stm_strategy != "hybrid"
        shares = tuple(row(None, fraction) for fraction in fractions) if takes_fraction else ()
        wished = row(None, share) if takes_fraction else None
        quantiles = {
            q: perplexity(np.quantile((scores if nll is None else nll).astype(np.float64), q, method="lower"))
            for q in QUANTILES
        }
        num_rows = len(documents.row_offsets) - 1
        return cls(
            len(scores), num_rows, num_stop_tokens, quantiles, rows, shares, share, wished, options.stm_strategy
        )

    def lines(self) -> list[str]:
        """Tables for the terminal; a star marks what lies within the paper's band."""
        quantiles = ", ".join(f"{q:.0%} {value:.3g}" for q, value in self.quantiles.items())
        head = "      masked         kept   rows without   stop tokens"
        units = "                    tokens    kept tokens        masked"
        lines = [
            f"{self.label_tokens:,} label tokens in {self.rows:,} rows; quantiles of their perplexity: {quantiles}",
            "",
            f"  stm_threshold     {head}",
            f"  ({'difference' if self.strategy == 'difference' else 'perplexity'})      {units}",
            *(f"  {row.threshold:>13g}     {self._columns(row)}" for row in self.thresholds),
            "",
        ]
        if self.for_share is None:
            return lines
        return [
            *lines,
            f"  stm_mask_fraction {head}",
            f"                    {units}",
            *(f"  {row.mask_fraction:>13g}     {self._columns(row)}" for row in self.fractions),
            "",
            f"  * within {PAPER_BAND[0]:.0%} to {PAPER_BAND[1]:.0%}, where the paper finds masking best",
            "",
            f"stm_threshold: {self.for_share.threshold!r} masks {self.for_share.masked_fraction:.2%}; so does "
            f"stm_mask_fraction: {self.share!r}, whatever the scores of other data.",
        ]

    def _columns(self, row: SweepRow) -> str:
        share = f"{row.masked_fraction:>10.2%} {'*' if row.in_paper_band else ' '}"
        stop = f"{row.stop_tokens_masked:,} of {self.stop_tokens:,}"
        return f"{share} {row.kept_tokens:>12,} {row.rows_without_kept_tokens:>14,} {stop:>13}"

    def as_json(self) -> dict[str, object]:
        """What JSON can hold; an infinite threshold is the string `inf`."""
        facts = asdict(self)
        for row in (*facts["thresholds"], *facts["fractions"], facts["for_share"] or {}):
            row.update({name: "inf" for name, value in row.items() if value == math.inf})
        facts["quantiles"] = {str(quantile): value for quantile, value in self.quantiles.items()}
        return facts


def shortest_threshold(scores: np.ndarray, threshold_nats: float, strategy: str = "high") -> float:
    """The threshold with the fewest digits that masks the same label tokens as one in nats.

    Args:
        scores: Scores in nats of all label tokens, shape `(N,)`, float32.
        threshold_nats: The threshold.
        strategy: The strategy, of which the least threshold depends.
    """
    if math.isinf(threshold_nats):
        return math.inf
    kept = scores[scores.astype(np.float64) <= threshold_nats]
    masked = scores[scores.astype(np.float64) > threshold_nats]
    least = least_threshold(strategy)
    lowest = float(kept.max()) if len(kept) else -math.inf
    highest = float(masked.min()) if len(masked) else math.inf
    exact = perplexity(threshold_nats)
    if exact == 0:  # below every difference: what comes next above it
        exact = perplexity(min(highest, 0.0)) / 2
    for digits in range(2, 18):
        step = 10.0 ** (math.floor(math.log10(exact)) + 1 - digits)
        for value in (float(f"{exact:.{digits}g}"), float(f"{exact + step:.{digits}g}")):
            if value > least and lowest <= math.log(value) < highest:
                return value
    return exact


def sweep_of(
    data: ScoredData,
    thresholds: Sequence[float] = THRESHOLDS,
    fractions: Sequence[float] = FRACTIONS,
    share: float = PAPER_FRACTION,
    options: STMOptions | None = None,
) -> Sweep:
    """Sweep scored data (see `Sweep.of`)."""
    return Sweep.of(
        data.documents,
        data.scores(options or data.options),
        data.kept.stop_token_ids,
        nll=data.nll,
        thresholds=thresholds,
        fractions=fractions,
        share=share,
        options=options,
    )

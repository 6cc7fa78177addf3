"""How far a tuned model's next-token distributions are from the initial model's, on the initial model's answers.

Drift is the mean of `KL(initial || tuned)` in nats per token. Measured on prompts that have nothing to do with the
training data, it needs no benchmark and sees change long before an accuracy does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..answers import TokenRow
from .intervals import ratio_interval

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_POSITIONS_PER_CHUNK = 256
"""Positions whose two full float64 distributions are in memory at once."""


class RowDrift(NamedTuple):
    """Drift of one row.

    Attributes:
        sum_nats: Sum of `KL(initial || tuned)` over the row's answer tokens, in nats.
        num_tokens: How many answer tokens that are.
    """

    sum_nats: float
    num_tokens: int


class Drift(NamedTuple):
    """Drift over a set of rows.

    Attributes:
        rows: One entry for each row, in the order given.
    """

    rows: list[RowDrift]

    @property
    def sum_nats(self) -> float:
        """Sum over all answer tokens, in nats."""
        return sum(row.sum_nats for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Number of answer tokens."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def mean(self) -> float:
        """Nats per token, pooled over all rows: the sum over the count."""
        return self.sum_nats / self.num_tokens

    def interval(self, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Bootstrap interval of the mean, rows drawn with replacement; None for a single row."""
        sums, counts = zip(*self.rows, strict=True)
        return ratio_interval(sums, counts, confidence=confidence, seed=seed)


def measure_drift(initial: "PreTrainedModel", tuned: "PreTrainedModel", rows: Sequence[TokenRow]) -> Drift:
    """Measures `KL(initial || tuned)` at every answer token of `rows`.

    With `p, q = initial(ids).logits.softmax(-1), tuned(ids).logits.softmax(-1)`, a row adds
    `(p * (p.log() - q.log())).sum(-1)` at the positions that predict its answer. The rows go through the models one
    by one, so no padding takes part; the softmax and the sum are in float64.

    Args:
        initial: The model before training.
        tuned: The model after training, with the same vocabulary; adapters are used as they stand.
        rows: Prompts with answers, each with at least one answer token.

    Returns:
        Sums and counts for each row.

    Raises:
        ValueError: There are no rows, a row has no prompt or no answer, or the models' vocabularies differ in size.
    """
    import torch

    from ..scoring.nll import eval_mode

    if not rows:
        raise ValueError("drift needs at least one row, got none.")
    for index, row in enumerate(rows):
        if not 1 <= row.num_prompt_tokens < len(row.input_ids):
            raise ValueError(
                f"row {index} has {row.num_prompt_tokens} prompt tokens of {len(row.input_ids)}; drift needs at least "
                "one prompt token and one answer token."
            )
    with eval_mode(initial), eval_mode(tuned), torch.no_grad():
        return Drift([_row_drift(initial, tuned, row) for row in rows])


def _row_drift(initial: "PreTrainedModel", tuned: "PreTrainedModel", row: TokenRow) -> RowDrift:
    """Sums the KL divergence over one row's answer."""
    initial_logits = _answer_logits(initial, row)
    tuned_logits = _answer_logits(tuned, row).to(initial_logits.device)
    if initial_logits.shape != tuned_logits.shape:
        raise ValueError(
            f"the models have vocabularies of {initial_logits.shape[-1]} and {tuned_logits.shape[-1]} tokens, whose "
            "distributions cannot be compared. Give a model that was tuned from the initial one, with its vocabulary."
        )
    sum_nats = 0.0
    for start in range(0, len(initial_logits), _POSITIONS_PER_CHUNK):
        chunk = slice(start, start + _POSITIONS_PER_CHUNK)
        initial_log_probs = initial_logits[chunk].double().log_softmax(-1)
        tuned_log_probs = tuned_logits[chunk].double().log_softmax(-1)
        kl = (initial_log_probs.exp() * (initial_log_probs - tuned_log_probs)).sum(-1)
        sum_nats += kl.sum().item()
    return RowDrift(sum_nats, len(initial_logits))


def _answer_logits(model: "PreTrainedModel", row: TokenRow) -> "Tensor":
    """Logits that predict the answer: shape (answer tokens, vocabulary)."""
    import torch

    input_ids = torch.tensor([row.input_ids], device=model.device)
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[0, row.num_prompt_tokens - 1 : -1]

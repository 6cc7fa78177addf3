"""What came out of a generation: how much passed, perplexities before and after, tokens, seconds, settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..experiment.results import environment
from ..experiment.settings import Settings
from .choosing import rejections
from .samples import Sample, SamplesFile

Receipt = dict[str, Any]


def make_receipt(
    settings: Settings,
    options: Mapping[str, Any],
    file: SamplesFile,
    chosen: Mapping[int, Sample],
    answers: Sequence[float],
    failed: Mapping[str, int],
    num_refused: int,
) -> Receipt:
    """Everything about a generated data set that its reader may ask.

    Args:
        settings: What the samples depend on.
        options: All options, as the user gave them.
        file: The samples, with the time spent.
        chosen: The chosen sample by row.
        answers: Perplexity of each answer in the output, in order.
        failed: Requests that ended without an answer, by reason.
        num_refused: How many of them failed by themselves, so that asking again would not help.

    Returns:
        A dictionary that JSON can hold.
    """
    samples, ground_truth = file.in_order(), file.ground_truth
    num_rows, passed = len(ground_truth), sum(sample.is_verified for sample in samples)
    drops = options["rejected"] == "drop"
    rejected = num_rows - len(chosen)
    return {
        "method": options["method"],
        "model": options["model"],
        "seed": settings["seed"],
        "rows": {
            "read": num_rows,
            "with_a_passing_sample": len(chosen),
            "acceptance_rate": len(chosen) / num_rows,
            "ground_truth": 0 if drops else rejected,
            "dropped": rejected if drops else 0,
            "written": len(answers),
            "of_equal_samples": equal_samples(samples),
        },
        "samples": {
            "generated": len(samples),
            "passed": passed,
            "acceptance_rate": passed / len(samples),
            "rejected": rejections(samples),
            "without_an_answer": dict(failed),
            "refused": num_refused,
        },
        "perplexity": {"before": _summary(ground_truth), "after": _summary(answers)},
        "tokens_generated": sum(sample.num_tokens for sample in samples),
        "seconds": file.seconds | {"total": sum(file.seconds.values())},
        "options": dict(options),
        "settings": settings,
        **environment(),
    }


def equal_samples(samples: Sequence[Sample]) -> int:
    """How many rows have several samples that are all the same text: a server may not heed the temperature."""
    texts: dict[int, list[str]] = {}
    for sample in samples:
        texts.setdefault(sample.row, []).append(sample.text)
    return sum(len(of_row) > 1 and len(set(of_row)) == 1 for of_row in texts.values())


def _summary(perplexities: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and standard deviation over rows (divided by their number)."""
    if not perplexities:
        return {"rows": 0, "mean": None, "std": None}
    return {"rows": len(perplexities), "mean": float(np.mean(perplexities)), "std": float(np.std(perplexities))}

"""The schema of `results.json`: what the demo measured, and in which setting."""

import json
from pathlib import Path
from typing import TypedDict

RESULTS_NAME = "results.json"


class ArmResults(TypedDict):
    """Figures of one training run.

    Attributes:
        adapter: Folder of the adapter, relative to `results.json`.
        drift_nats_per_prompt: Mean KL(initial || tuned) over each prompt's answer, in nats per token.
        drift_nats_per_token: The same over all answers together.
        label_tokens: Answer tokens of the training set.
        losses: Mean training loss over each quarter of the run, in nats per kept token. Those of two arms are over
            different tokens and not comparable.
        masked_fraction: Share of the label tokens that the loss leaves out.
        masked_tokens: Their number.
        scoring_seconds: Time until the first step; in the STM arm, nearly all of it goes into scoring.
        seconds: Time of the whole run, scoring included.
        steps: Optimizer steps.
        threshold: Perplexity above which a token is masked; None masks nothing, infinity is the string `inf`.
        title: Name for tables and plots.
        weight_change_l2: L2 norm of the change of all weights together.
    """

    adapter: str
    drift_nats_per_prompt: list[float]
    drift_nats_per_token: float
    label_tokens: int
    losses: list[float]
    masked_fraction: float
    masked_tokens: int
    scoring_seconds: float
    seconds: float
    steps: int
    threshold: float | str | None
    title: str
    weight_change_l2: float


class Sample(TypedDict):
    """One training answer, before and after masking.

    Attributes:
        answer: The answer in full.
        label_tokens: Its tokens, end-of-turn token included.
        masked_tokens: How many of them STM masks.
        redacted: The answer with each run of masked tokens as `[REDACTED]`.
        request: The user's message.
    """

    answer: str
    label_tokens: int
    masked_tokens: int
    redacted: str
    request: str


class DemoResults(TypedDict):
    """Everything in `results.json`.

    Attributes:
        arms: `plain` and `stm`.
        drift_prompts: The prompts whose answers drift was measured on.
        drift_tokens: Number of answer tokens it was measured on.
        machine: `cores` and `platform`.
        model: `name` and `origin`.
        options: The settings both arms were trained with.
        sample: One training answer.
        seconds: Time of the whole demo.
        versions: Versions of Python and of the packages that matter.
    """

    arms: dict[str, ArmResults]
    drift_prompts: list[str]
    drift_tokens: int
    machine: dict[str, str | int]
    model: dict[str, str]
    options: dict[str, str | int | float]
    sample: Sample
    seconds: float
    versions: dict[str, str]


def write_results(results: DemoResults, folder: Path) -> Path:
    """Writes `results.json` (keys sorted, so equal results are equal bytes) and returns its path."""
    path = folder / RESULTS_NAME
    path.write_text(json.dumps(results, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_results(folder: Path) -> DemoResults:
    """Reads the `results.json` of a demo's folder."""
    results: DemoResults = json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))
    return results

"""The STM options: names, defaults, help texts and checks. The only place that defines any of them."""

import difflib
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .constants import DEFAULT_THRESHOLD, TOKENS_PER_BATCH, TOKENS_PER_BATCH_ON_CPU

STRATEGIES = ("high", "low", "random", "difference", "hybrid")
CONTROLS = ("low", "random")
"""Those that mask as many tokens of each document as `high`, but others."""
STRATEGIES_BY_TWO_MODELS = ("difference", "hybrid")
"""Those that compare the perplexities with a tuned model's."""
REFERENCE_INITIAL = "initial"
REFERENCE_CURRENT = "current"


@dataclass
class STMOptions:
    """Options of Selective Token Masking, as flat `stm_...` fields that every host shares.

    Call `check()` before use; `STMSFTConfig` does so in its `__post_init__`.
    """

    stm_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Label tokens whose perplexity exceeds this are left out of the loss; greater than 1, `inf` masks "
            f"nothing. Unset, it means {DEFAULT_THRESHOLD} (the paper's) unless `stm_mask_fraction` is given."
        },
    )
    stm_mask_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Mask at most this share of the training set's label tokens, those of highest perplexity; between "
            "0 and 1, exclusive. Takes the place of `stm_threshold`: set only one of them."
        },
    )
    stm_reference: str = field(
        default=REFERENCE_INITIAL,
        metadata={
            "help": "Whose perplexities count: `initial` (the model as training starts, scored once), `current` (the "
            "live weights, scored anew at every step: one more forward pass) or the path or id of another model, or "
            "adapter, with the same tokenizer."
        },
    )
    stm_reference_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` when `stm_reference` is another "
            "model, such as `dtype`, `revision` or `quantization_config`. As JSON on a command line."
        },
    )
    stm_strategy: str = field(
        default="high",
        metadata={
            "help": "`high` masks the label tokens above the threshold (the paper's method). `low` and `random` are "
            "its controls: as many tokens in each document, but those of lowest perplexity, or drawn at random. "
            "`difference` and `hybrid` also take the perplexities under `stm_tuned_model`: `difference` masks the "
            "label tokens whose perplexity there exceeds the initial model's by more than the threshold (a "
            "difference, greater than 0), `hybrid` those that `high` masks and all that became more perplexing "
            "(options `dpf` and `stm_dpf` of the authors' code).",
            "choices": list(STRATEGIES),
        },
    )
    stm_tuned_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or id of the tuned model, or adapter, that `stm_strategy: difference` and `hybrid` compare "
            "with. Loaded for scoring alone, in dtype, quantization and attention as the model in training."
        },
    )
    stm_seed: int = field(default=0, metadata={"help": "Seed of `stm_strategy: random`. Moves no other randomness."})
    stm_keep_stop_tokens: bool = field(
        default=False,
        metadata={
            "help": "Never mask the end-of-turn and end-of-text tokens (the ids in `generation_config.eos_token_id` "
            "and the tokenizer's `eos_token_id`)."
        },
    )
    stm_scores_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the scores, one entry for each model and data set. Unset, it is `scores` in "
            "`$STM_HOME`, or in `~/.cache/stm_plugin`."
        },
    )
    stm_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens, padding included, of one forward pass while scoring (a longer row goes alone). "
            f"Unset, it means {TOKENS_PER_BATCH:,}, on a CPU {TOKENS_PER_BATCH_ON_CPU:,}.",
            "aliases": ["--tokens_per_batch", "--tokens-per-batch"],  # of the command line
        },
    )
    stm_report: bool = field(
        default=False,
        metadata={
            "help": "Write `stm_report.html` into the output folder once the training set is scored: what is masked, "
            "row by row, and what other thresholds would mask."
        },
    )

    @property
    def threshold(self) -> float | None:
        """Effective threshold as a perplexity, or None where a fraction sets it from the data."""
        if self.stm_mask_fraction is not None:
            return None
        return DEFAULT_THRESHOLD if self.stm_threshold is None else self.stm_threshold

    def tokens_per_batch(self, device_type: str) -> int:
        """Effective `stm_tokens_per_batch` on a kind of device, as torch names it."""
        if self.stm_tokens_per_batch is not None:
            return self.stm_tokens_per_batch
        return TOKENS_PER_BATCH_ON_CPU if device_type == "cpu" else TOKENS_PER_BATCH

    def plain_reference_kwargs(self) -> dict[str, Any] | str | None:
        """`stm_reference_kwargs` as what JSON can hold, a config of transformers as its dictionary."""
        if not isinstance(self.stm_reference_kwargs, dict):
            return self.stm_reference_kwargs
        return {
            name: value.to_dict()
            if hasattr(value, "to_dict")
            else value
            if isinstance(value, str | int | float | None)
            else str(value)
            for name, value in self.stm_reference_kwargs.items()
        }

    @classmethod
    def from_args(cls, args: Any) -> "STMOptions":
        """The checked STM options that a host's arguments carry as attributes.

        Raises:
            ValueError: For an option with a value that is not allowed.
        """
        options = cls(**{name: getattr(args, name) for name in option_names()})
        options.check()
        return options

    def check(self) -> None:
        """Check every value.

        Raises:
            ValueError: Saying what was given, what is allowed and what to change.
        """
        if self.stm_threshold is not None:
            if self.stm_mask_fraction is not None:
                raise ValueError(
                    f"stm_threshold={self.stm_threshold!r} and stm_mask_fraction={self.stm_mask_fraction!r} were both "
                    "given, but each decides which tokens are masked. Remove one of them."
                )
            check_threshold(self.stm_threshold, self.stm_strategy)
        if self.stm_mask_fraction is not None:
            check_fraction(self.stm_mask_fraction)
        check_strategy(self.stm_strategy)
        check_seed(self.stm_seed)
        self._check_tuned_model()
        if not isinstance(self.stm_reference, str) or not self.stm_reference:
            raise ValueError(
                f"stm_reference must be 'initial', 'current' or the path or id of a model, got {self.stm_reference!r}."
            )
        if self.stm_reference == REFERENCE_CURRENT and self.stm_scores_dir is not None:
            raise ValueError(
                f"stm_scores_dir={self.stm_scores_dir!r} has no effect while stm_reference is 'current', which scores "
                "anew at every step and keeps nothing. Remove it, or set stm_reference to 'initial'."
            )
        if self.stm_reference_kwargs is not None:
            if not isinstance(self.stm_reference_kwargs, dict):
                raise ValueError(
                    f"stm_reference_kwargs must be a mapping of keyword arguments, got {self.stm_reference_kwargs!r}."
                )
            if self.stm_reference in (REFERENCE_INITIAL, REFERENCE_CURRENT):
                raise ValueError(
                    f"stm_reference_kwargs={self.stm_reference_kwargs!r} has no effect while stm_reference is "
                    f"{self.stm_reference!r}. Remove it, or set stm_reference to the model that it is meant for."
                )
        if not isinstance(self.stm_keep_stop_tokens, bool):
            raise ValueError(f"stm_keep_stop_tokens must be true or false, got {self.stm_keep_stop_tokens!r}.")
        if not isinstance(self.stm_report, bool):
            raise ValueError(f"stm_report must be true or false, got {self.stm_report!r}.")
        if self.stm_report and self.stm_reference == REFERENCE_CURRENT:
            raise ValueError(
                "stm_report has no effect while stm_reference is 'current', which scores anew at every step and keeps "
                "nothing to report. Remove it, or set stm_reference to 'initial'."
            )
        if self.stm_scores_dir is not None and (
            (not isinstance(self.stm_scores_dir, str) and not hasattr(self.stm_scores_dir, "__fspath__"))
            or self.stm_scores_dir == ""
        ):
            raise ValueError(f"stm_scores_dir must be the path of a folder, got {self.stm_scores_dir!r}.")
        tokens = self.stm_tokens_per_batch
        if tokens is not None and (_not_a(Integral, tokens) or tokens < 1):
            raise ValueError(f"stm_tokens_per_batch must be a positive number of tokens, got {tokens!r}.")

    def _check_tuned_model(self) -> None:
        """Raise ValueError for a tuned model that is missing, of no use, or used where it cannot be."""
        tuned, strategy = self.stm_tuned_model, self.stm_strategy
        if hasattr(tuned, "__fspath__"):
            self.stm_tuned_model = tuned = str(tuned)  # arguments are written as JSON
        if tuned is not None and (not isinstance(tuned, str) or tuned == ""):
            raise ValueError(f"stm_tuned_model must be the path or id of a model or adapter, got {tuned!r}.")
        if strategy not in STRATEGIES_BY_TWO_MODELS:
            if tuned is not None:
                raise ValueError(
                    f"stm_tuned_model={tuned!r} has no effect while stm_strategy is {strategy!r}. Remove it, or set "
                    "stm_strategy to 'difference' or 'hybrid'."
                )
            return
        if tuned is None:
            raise ValueError(
                f"stm_strategy={strategy!r} compares with a tuned model's perplexities. Set stm_tuned_model to its "
                "path or id, or to that of its adapter."
            )
        if self.stm_reference != REFERENCE_INITIAL:
            raise ValueError(
                f"stm_strategy={strategy!r} compares the tuned model with the one in training as it starts, and "
                f"stm_reference is {self.stm_reference!r}. Set stm_reference to 'initial'."
            )
        if strategy == "hybrid" and self.stm_mask_fraction is not None:
            raise ValueError(
                f"stm_mask_fraction={self.stm_mask_fraction!r} has no meaning for stm_strategy='hybrid', which masks "
                "by two rules, one of them without a threshold. Set stm_threshold instead."
            )


def option_names() -> list[str]:
    """Names of all STM options, in the order they are defined."""
    return [option.name for option in fields(STMOptions)]


def nearest_option(name: str) -> str:
    """The STM option whose name is closest to a misspelt one."""
    return difflib.get_close_matches(name, option_names(), n=1, cutoff=0.0)[0]


def check_threshold(threshold: Any, strategy: str = "high") -> None:
    """Raise ValueError unless `threshold` is a perplexity greater than 1, or a difference of two (`inf` included)."""
    kind, least = (
        "a difference of perplexities" if strategy == "difference" else "a perplexity",
        least_threshold(strategy),
    )
    if _not_a(Real, threshold) or not (threshold > least and _fits_a_float(threshold)):
        raise ValueError(
            f"stm_threshold must be {kind}, a number greater than {least} (inf masks nothing), got {threshold!r}. The "
            f"paper's value is {DEFAULT_THRESHOLD}."
        )


def rule_in_words(strategy: str, threshold: Any, tuned_model: str | None) -> str:
    """Which label tokens a strategy masks at a threshold: "those of perplexity above 2.5"."""
    if strategy == "difference":
        return f"those whose perplexity under {tuned_model} exceeds the initial model's by more than {threshold}"
    above = f"those of perplexity above {threshold}"
    if strategy == "hybrid":
        above += f" and those of higher perplexity under {tuned_model}"
    return above


def least_threshold(strategy: str) -> int:
    """What a threshold must exceed: a perplexity is at least 1, a difference of two may be anything above 0."""
    return 0 if strategy == "difference" else 1


def check_fraction(fraction: Any) -> None:
    """Raise ValueError unless `fraction` lies between 0 and 1, exclusive."""
    if _not_a(Real, fraction) or not 0 < fraction < 1:
        raise ValueError(
            f"stm_mask_fraction must be a number between 0 and 1, exclusive, got {fraction!r}. The paper finds 0.20 "
            "to 0.24 best."
        )


def check_strategy(strategy: Any) -> None:
    """Raise ValueError for anything but a name in `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"stm_strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}.")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless `seed` is an integer of 64 bits."""
    if _not_a(Integral, seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"stm_seed must be an integer of at most 64 bits, got {seed!r}.")


def _fits_a_float(value: Any) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _not_a(kind: type, value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, kind)

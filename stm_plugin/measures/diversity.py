"""How alike a model's samples for one prompt are: self-BLEU (Zhu et al. 2018, "Texygen", arXiv 1802.01886).

Each sample of a prompt is the hypothesis once, the prompt's other samples are its references. BLEU is sacrebleu's
`sentence_bleu` with its defaults (tokenizer 13a, case kept, exponential smoothing, effective order). The mean is taken
over the samples of a prompt, then over prompts: 0 for samples that share no word, 100 for identical ones.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._compat import missing_extra
from ..answers import Prompt, generate
from .intervals import ratio_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SelfBleu(NamedTuple):
    """Self-BLEU of some prompts.

    Attributes:
        prompts: Self-BLEU of each prompt, 0 to 100, in the order given.
        num_samples: How many samples they have together.
    """

    prompts: list[float]
    num_samples: int

    @property
    def mean(self) -> float:
        """Mean over prompts, 0 to 100."""
        return sum(self.prompts) / len(self.prompts)

    def interval(self, confidence: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
        """Bootstrap interval of the mean over prompts; None for a single prompt."""
        return ratio_interval(self.prompts, [1] * len(self.prompts), confidence=confidence, seed=seed)


def self_bleu(samples: Sequence[Sequence[str]]) -> SelfBleu:
    """Self-BLEU of samples.

    Naively, for one prompt: `mean(sacrebleu.sentence_bleu(s, others).score for s, others in ...)`.

    Args:
        samples: The samples of each prompt, at least two for each and none of them empty.

    Returns:
        A figure for each prompt.

    Raises:
        ValueError: For no prompt, one with fewer than two samples, or an empty sample, of which BLEU says nothing.
        ImportError: If sacrebleu is not installed.
    """
    check_samples(samples)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise missing_extra("sacrebleu", "forgetting") from None

    bleu = BLEU(effective_order=True)  # what sacrebleu.sentence_bleu is
    prompts = []
    for texts in samples:
        scores = [
            bleu.sentence_score(text, [*texts[:index], *texts[index + 1 :]]).score for index, text in enumerate(texts)
        ]
        prompts.append(sum(scores) / len(scores))
    return SelfBleu(prompts, sum(map(len, samples)))


def without_empty(samples: Sequence[Sequence[str]]) -> list[list[str]]:
    """Samples without empty ones, of which BLEU says nothing, and without prompts that lack two because of that."""
    pairs = (([text for text in texts if text.strip()], len(texts)) for texts in samples)
    return [texts for texts, num_given in pairs if len(texts) > 1 or num_given < 2]


def check_samples(samples: Sequence[Sequence[str]]) -> None:
    """Raise ValueError for samples that self-BLEU is not defined for, saying which."""
    if not samples:
        raise ValueError("self-BLEU needs the samples of at least one prompt, got none.")
    for prompt, texts in enumerate(samples):
        if isinstance(texts, str) or len(texts) < 2:
            number = "one text" if isinstance(texts, str) else len(texts)
            raise ValueError(
                f"prompt {prompt} has {number} where self-BLEU needs a list of at least two samples: each is compared "
                "with the others. Sample more (--k)."
            )
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(
                    f"sample {index} of prompt {prompt} is empty, and BLEU says nothing about an empty text. Leave it "
                    "out (`without_empty`), or sample it again with another seed."
                )


def check_sampling(k: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for values that `sample_answers` refuses."""
    if k < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"samples need k of at least 1, a temperature above 0 and top_p above 0 and at most 1, got k={k}, "
            f"temperature={temperature}, top_p={top_p}. Greedy answers are all alike: for them there is no diversity."
        )


def sample_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    k: int,
    *,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    template_kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> list[list[str]]:
    """Let a model answer each prompt several times, by sampling from its distribution as temperature and top-p cut it.

    What the model's own generation config says beside its stop tokens (top-k, penalties) has no part in it. All global
    generators are left as they were; the same seed, prompts and batch size give the same samples on the same machine.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        prompts: The prompts, as for `greedy_answers`.
        k: Samples of each prompt, at least 1.
        temperature: Above 0.
        top_p: Smallest probability mass to sample from, above 0, at most 1.
        max_new_tokens: Longest answer, in tokens.
        seed: Seed of the samples.
        batch_size: Answers that are made at once.
        template_kwargs: As for `greedy_answers`.

    Returns:
        The texts of each prompt's samples, without special tokens.

    Raises:
        ValueError: For a value out of its range.
    """
    import torch

    from ..randomness import preserved_random_state

    check_sampling(k, temperature, top_p)
    repeated = [prompt for prompt in prompts for _ in range(k)]
    kwargs = None if template_kwargs is None else [some for some in template_kwargs for _ in range(k)]
    with preserved_random_state():
        torch.manual_seed(seed)
        rows = generate(
            model,
            tokenizer,
            repeated,
            max_new_tokens,
            batch_size,
            kwargs,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            min_p=None,
            typical_p=1.0,
        )
    texts = [tokenizer.decode(row.input_ids[row.num_prompt_tokens :], skip_special_tokens=True) for row in rows]
    return [texts[start : start + k] for start in range(0, len(texts), k)]

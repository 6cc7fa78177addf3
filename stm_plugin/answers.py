"""What a model answers to prompts, by transformers' own `generate`, in left-padded batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]
"""What a model is to answer: a user's message, or the messages of a chat up to the answer."""


class TokenRow(NamedTuple):
    """A prompt and an answer as token ids.

    Attributes:
        input_ids: Prompt and answer, unpadded.
        num_prompt_tokens: How many of the ids are prompt, at least 1.
    """

    input_ids: list[int]
    num_prompt_tokens: int


def greedy_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int = 8,
    template_kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> list[TokenRow]:
    """Lets a model answer prompts greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. With a chat template, a prompt of plain text becomes a user's message; without one,
            it is continued as it is.
        prompts: The prompts, as text or as the messages of a chat.
        max_new_tokens: Longest answer, in tokens. An answer ends with its end-of-turn token if it gets that far.
        batch_size: How many prompts go through the model at once (left-padded).
        template_kwargs: What the chat template is given beside the messages of each prompt; None for nothing.

    Returns:
        One row for each prompt, in order.
    """
    return generate(model, tokenizer, prompts, max_new_tokens, batch_size, template_kwargs, do_sample=False)


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    template_kwargs: Sequence[Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> list[TokenRow]:
    """Answers as for `greedy_answers`, with further options of `model.generate` that say how a token is chosen.

    Of each prompt, `template_kwargs` may say what else its chat template is given.

    Of the model's generation config, only what ends an answer counts: its penalties, forced and forbidden tokens,
    limits and other ways of choosing are off.
    """
    import torch
    from transformers import GenerationConfig

    from .scoring.nll import eval_mode

    kwargs = template_kwargs or [None] * len(prompts)
    prompt_ids = [prompt_token_ids(tokenizer, *each) for each in zip(prompts, kwargs, strict=True)]
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=pad_id, **options)
    rows: list[TokenRow] = []
    with eval_mode(model), _without_generation_config(model), torch.no_grad():
        for start in range(0, len(prompt_ids), batch_size):
            batch = prompt_ids[start : start + batch_size]
            width = max(map(len, batch))
            padded = [[pad_id] * (width - len(ids)) + ids for ids in batch]
            mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            for ids, answer in zip(batch, output[:, width:].tolist(), strict=True):
                stop = next((i + 1 for i, token in enumerate(answer) if token in stop_ids), len(answer))
                rows.append(TokenRow(ids + answer[:stop], len(ids)))
    return rows


@contextmanager
def _without_generation_config(model: "PreTrainedModel") -> Iterator[None]:
    """Keep a model's generation config away: `generate` takes from it whatever its caller leaves open."""
    from transformers import GenerationConfig

    whole: list[Any] = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [(part, part.generation_config) for part in whole if "generation_config" in vars(part)]
    try:
        for part, _ in before:
            part.generation_config = GenerationConfig()
        yield
    finally:
        for part, config in before:
            part.generation_config = config


def prompt_token_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the model starts to answer; its chat template is given the kwargs."""
    if tokenizer.chat_template is None:
        if template_kwargs:
            raise ValueError(
                f"{dict(template_kwargs)} is for a chat template, and the tokenizer has none. Leave it out, or take a "
                "model whose tokenizer has one."
            )
        if not isinstance(prompt, str):
            raise ValueError(
                "a prompt is a chat, and the tokenizer has no chat template. Give prompts of plain text, or a model "
                "whose tokenizer has one."
            )
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end an answer: those of the generation config, or else the tokenizer's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("neither the model's generation config nor the tokenizer names an end-of-turn token.")
    return [eos] if isinstance(eos, int) else list(eos)

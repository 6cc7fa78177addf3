"""Answers by a model in this process, in batches, by transformers' own `generate`."""

import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..answers import TokenRow, generate, prompt_token_ids, stop_token_ids
from .engines import ERROR, LENGTH, STOP, EngineError, Generated, Request, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SEED_BITS = 63


class TransformersEngine:
    """Answers with a model in memory, in eval mode, an adapter included.

    Requests are answered in batches of like length, those with the longest prompts first. A batch's draws depend on
    the seed and on which requests it has, on nothing drawn before; all global generators stay as they were. What the
    model's own generation config says beside its stop tokens (top-k, penalties, forbidden tokens) has no part in it.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer, with a chat template.
        sampling: How answers are drawn.
        batch_size: Answers that are made at once, at least 1.

    Attributes:
        batch_size: As given, or what a GPU out of memory has made of it.

    Raises:
        EngineError: For a value out of its range, or a tokenizer without chat template or end-of-turn token.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling,
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise EngineError(f"batch_size must be at least 1, got {batch_size}.")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.max_new_tokens < 1:
            raise EngineError(
                "sampling needs a temperature of at least 0, top_p above 0 and at most 1, and max_new_tokens of at "
                f"least 1, got temperature={sampling.temperature}, top_p={sampling.top_p}, "
                f"max_new_tokens={sampling.max_new_tokens}."
            )
        if tokenizer.chat_template is None:
            raise EngineError(
                "the tokenizer has no chat template, so that the model cannot be asked. Give a model that answers "
                "chats."
            )
        try:
            self._stop_ids = stop_token_ids(model, tokenizer)
        except ValueError as error:
            raise EngineError(str(error)) from None
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self.batch_size = batch_size

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Answer requests (see `Engine.generate`); what is yielded together was one batch.

        An error is yielded for a chat that the template refuses, a prompt that leaves no room for the longest answer
        in the model's window, and an answer for which the GPU has no memory on its own.
        """
        lengths: list[tuple[int, int]] = []
        for index, request in enumerate(requests):
            length = self._prompt_length(request)
            if isinstance(length, str):
                yield _without_answer(request, length)
            else:
                lengths.append((-length, index))
        waiting = [requests[index] for _, index in sorted(lengths)]
        while waiting:
            batch = waiting[: self.batch_size]
            rows = self._rows(batch)
            if rows is None and len(batch) > 1:
                self.batch_size = len(batch) // 2
                logger.warning("Out of memory: generation goes on with %d answers at once.", self.batch_size)
                continue
            del waiting[: len(batch)]
            if rows is None:
                yield _without_answer(batch[0], "the GPU has no memory for it. Lower max_new_tokens.")
            else:
                yield from map(self._answer, batch, rows)

    def close(self) -> None:
        """Nothing: the model is the caller's."""

    def _prompt_length(self, request: Request) -> int | str:
        """Tokens of a prompt, or why it cannot be answered."""
        from jinja2 import TemplateError

        try:
            length = len(prompt_token_ids(self._tokenizer, request.messages, request.template_kwargs))
        except TemplateError as error:
            return f"the chat template refuses the chat: {error}"
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and length + self._sampling.max_new_tokens > window:
            return (
                f"a prompt of {length} tokens and max_new_tokens={self._sampling.max_new_tokens} are more than the "
                f"model's {window} positions"
            )
        return length

    def _rows(self, batch: Sequence[Request]) -> list[TokenRow] | None:
        """Prompts and answers of a batch; None if the GPU has no memory for it."""
        import torch

        from ..randomness import preserved_random_state

        options: dict[str, Any] = {"do_sample": False}
        if self._sampling.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": self._sampling.temperature,
                "top_p": self._sampling.top_p,
                "top_k": 0,
                "min_p": None,
                "typical_p": 1.0,
            }
        name = f"{self._sampling.seed} {[(request.row, request.sample) for request in batch]}"
        with preserved_random_state():
            torch.manual_seed(random.Random(name).getrandbits(_SEED_BITS))
            try:
                return generate(
                    self._model,
                    self._tokenizer,
                    [request.messages for request in batch],
                    self._sampling.max_new_tokens,
                    len(batch),
                    [request.template_kwargs for request in batch],
                    **options,
                )
            except torch.OutOfMemoryError:
                pass
        # out of the handler, whose traceback holds on to the batch's memory
        torch.cuda.empty_cache()
        return None

    def _answer(self, request: Request, row: TokenRow) -> Generated:
        ids = row.input_ids[row.num_prompt_tokens :]
        stopped = ids[-1] in self._stop_ids
        # Not all tokenizers count what ends a turn among the special tokens.
        text = self._tokenizer.decode(
            ids[:-1] if stopped else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Generated(request.row, request.sample, text, len(ids), STOP if stopped else LENGTH)


def _without_answer(request: Request, reason: str) -> Generated:
    return Generated(request.row, request.sample, "", 0, ERROR, reason, is_refused=True)

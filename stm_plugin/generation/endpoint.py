"""Answers by a server that speaks OpenAI's chat completions, such as vLLM, SGLang, TGI or `transformers serve`."""

import asyncio
import json
import logging
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import TYPE_CHECKING, Any

from .._compat import missing_extra
from .access import check_url, clean_key
from .engines import ERROR, LENGTH, STOP, EngineError, Generated, Request, Sampling

if TYPE_CHECKING:
    from openai import APIError

logger = logging.getLogger(__name__)

_SEED_BITS = 31
_BYTES_PER_TOKEN = 4
_SECONDS_TO_CONNECT = 10
_SECONDS_BETWEEN_TRIES = 120
"""The longest that the client waits before it asks again: what it grants a server that names a time."""
_LONGEST_REASON = 300
_NO_KEY = "EMPTY"
"""Sent as the key where there is none; the client would take that of OpenAI from the environment."""
_REFUSALS = {401, 402, 403, 404}
"""Status codes that every request would get: no key, no money, not allowed, no such model or address."""
_OVERLOADED = {429, 503}
"""Status codes of a server that has too much to do, and may answer later."""
_PASSING = {408, 409, 425, 429}
"""Status codes below 500 that are no fault of the request."""
_NO_MONEY = "insufficient_quota"
"""OpenAI's code for a 429 that waiting does not mend."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds between tries on a server that stays overloaded."""
_HIDDEN_KEY = "[API key]"
_NOT_THERE = {"ConnectError", "ConnectTimeout"}
"""Errors of httpx, by name as openai has it from two packages: there is nothing at the address."""


class EndpointEngine:
    """Answers from a server, several at a time, each by a request of its own.

    OpenAI's client asks again, after growing pauses, where a server is overloaded (429) or fails (5xx), a connection
    breaks or an answer takes too long. One that stays overloaded (429, 503) is asked again, at least once a minute,
    until the time that all these tries may take is over. With `max_retries=0`, all is asked once.

    What a server draws by beside temperature and top-p (top-k, penalties) is its own affair, and so is whether it
    heeds a request's `seed`, which depends on the seed, the row and the sample only. To servers that refuse
    `max_tokens` or `seed`, `max_completion_tokens` and no seed are sent.

    An answer of as many tokens as are allowed counts as cut, even where the server says that the model ended it: some
    count what ends a turn, others do not, and one that was cut must not pass for a whole one.

    Where a server does not say how many tokens an answer has, they are estimated: `max_new_tokens` for an answer that
    was cut, otherwise one for every four bytes of UTF-8 and one that ends the turn.

    Args:
        base_url: Address of the API, such as `http://localhost:8000/v1`.
        model: Name of the model there.
        sampling: How answers are drawn.
        api_key: Key for the server; None where it wants none (the environment's is not sent). It is in no error.
        concurrency: Requests in flight at once, at least 1.
        timeout: Seconds without a sign from the server after which a request is given up and made again.
        max_retries: How many times a request is made again, at least 0.

    Raises:
        EngineError: For a value out of its range, a URL with a password in it, or a key that no header can hold.
        MissingExtraError: If openai is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        sampling: Sampling,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        max_retries: int = 5,
    ):
        check_url(base_url)
        if concurrency < 1 or timeout <= 0 or max_retries < 0:
            raise EngineError(
                "an endpoint needs concurrency of at least 1, timeout above 0 and max_retries of at least 0, got "
                f"concurrency={concurrency}, timeout={timeout}, max_retries={max_retries}."
            )
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError:
            raise missing_extra("openai", "generate") from None

        self._base_url, self._model, self._sampling = base_url, model, sampling
        self._concurrency, self._key = concurrency, clean_key(api_key)
        self._deadline = timeout + max_retries * (timeout + _SECONDS_BETWEEN_TRIES)
        self._client = AsyncOpenAI(
            base_url=base_url,
            api_key=self._key or _NO_KEY,
            timeout=Timeout(timeout, connect=min(timeout, _SECONDS_TO_CONNECT)),
            max_retries=max_retries,
        )
        self._limit_name = "max_tokens"
        self._sends_seed = True
        self._was_answered = False
        self._slots = asyncio.Semaphore(concurrency)
        # A loop of its own keeps the server busy while the caller works on what it has got.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stm-endpoint", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Answer requests (see `Engine.generate`), in the order in which answers come.

        A few more than are in flight are waiting for their turn or for the caller; all others are still to be made
        when the caller stops, and those in flight are then cancelled.

        Raises:
            EngineError: If nothing is at the address and no request was ever answered; or if the server knows
                neither the address nor the model, or refuses the key.
        """
        to_ask = iter(requests)
        pending = set(map(self._start, islice(to_ask, 2 * self._concurrency)))
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending.update(map(self._start, islice(to_ask, len(done))))
                yield from (future.result() for future in done if future.exception() is None)
                for future in done:
                    future.result()
        finally:
            if not self._loop.is_closed():
                # In one step of the loop: one by one, a request that waits would go out for each that is cancelled.
                self._loop.call_soon_threadsafe(lambda: [future.cancel() for future in pending])

    def close(self) -> None:
        """Close connections; nothing can be generated after."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _start(self, request: Request) -> "Future[Generated]":
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    async def _answer(self, request: Request) -> Generated:
        """The answer to a request, or why there is none.

        Raises:
            EngineError: As for `generate`.
        """
        from openai import APIConnectionError, APIStatusError

        try:
            async with self._slots, asyncio.timeout(self._deadline):
                text = await self._ask(request, self._loop.time() + self._deadline)
        except TimeoutError:
            return self._error(request, f"no whole answer within {self._deadline:.0f} seconds")
        except APIStatusError as error:
            reason = f"{error.status_code}: {self._words(error.body)}"
            if error.status_code in _REFUSALS or error.code == _NO_MONEY:
                raise EngineError(
                    f"{self._base_url} refuses to answer as {self._model!r}: {reason}. Check the URL (most end in "
                    "/v1), the model's name there, and the key (--api-key-env)."
                ) from None
            return self._error(request, reason, error.status_code < 500 and error.status_code not in _PASSING)
        except APIConnectionError as error:
            reason = self._one_line(f"{error.message} {error.__cause__ or ''}")
            if type(error.__cause__).__name__ in _NOT_THERE and not self._was_answered:
                raise EngineError(
                    f"nothing answers at {self._base_url}: {reason}. Start the server, or check the URL."
                ) from None
            return self._error(request, reason)
        self._was_answered = True
        return self._read(request, text)

    async def _ask(self, request: Request, until: float) -> str:
        """The body of the server's response, which may be anything.

        Args:
            request: What to ask.
            until: Time of the loop at which the request is given up.

        Raises:
            APIError: What the client raises.
        """
        from openai import APIError, BadRequestError, UnprocessableEntityError

        client, pauses = self._client, 0
        name = f"{self._sampling.seed} {request.row} {request.sample}"
        seed = random.Random(name).getrandbits(_SEED_BITS)
        while True:
            limit_name, sends_seed = self._limit_name, self._sends_seed
            options: dict[str, Any] = {limit_name: self._sampling.max_new_tokens}
            if sends_seed:
                options["seed"] = seed
            if request.template_kwargs:  # as vLLM and SGLang call it
                options["extra_body"] = {"chat_template_kwargs": request.template_kwargs}
            try:
                response = await client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=request.messages,
                    temperature=self._sampling.temperature,
                    top_p=self._sampling.top_p,
                    **options,
                )
            except (BadRequestError, UnprocessableEntityError) as error:
                words = self._words(error.body)
                if limit_name == "max_tokens" and "max_completion_tokens" in words:
                    self._limit_name = "max_completion_tokens"
                elif sends_seed and re.search(r"\bseed\b", words):
                    self._sends_seed = False
                    logger.warning("The server takes no seed, so that its answers cannot be had again: %s", words)
                else:
                    raise
            except APIError as error:
                pause = _pause(error, pauses)
                if pause is not None and self._client.max_retries > 0 and self._loop.time() + pause < until:
                    await asyncio.sleep(pause)
                    client, pauses = self._client.with_options(max_retries=0), pauses + 1
                elif pause is None and client is not self._client:
                    client = self._client  # of other failures, the client takes care itself
                else:
                    raise
            else:
                return str(response.text)

    def _read(self, request: Request, body: str) -> Generated:
        """An answer from the body of a response."""
        try:
            completion = json.loads(body)
            choice, usage = completion["choices"][0], completion.get("usage")
            content, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            return self._error(request, f"the response is no chat completion: {body.strip() or 'it is empty'}", True)
        if reason not in (STOP, LENGTH):
            words = f"the answer ended with finish_reason {reason!r}, not 'stop' or 'length'"
            return self._error(request, words, True)
        if content is None and reason == LENGTH:
            content = ""  # the limit came while the model was still thinking
        if not isinstance(content, str):
            return self._error(request, f"the response has no text: {json.dumps(choice['message'])}", True)
        text = content.encode(errors="replace").decode()  # JSON can have halves of characters, files cannot
        count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
        if not isinstance(count, int) or count < 0:
            count = self._estimate(text, reason)
        elif count >= self._sampling.max_new_tokens:
            reason = LENGTH
        return Generated(request.row, request.sample, text, count, reason)

    def _estimate(self, text: str, finish: str) -> int:
        """About how many tokens an answer has."""
        if finish == LENGTH:
            return self._sampling.max_new_tokens
        return min(-(-len(text.encode()) // _BYTES_PER_TOKEN) + 1, self._sampling.max_new_tokens)

    def _error(self, request: Request, reason: str, is_refused: bool = False) -> Generated:
        return Generated(request.row, request.sample, "", 0, ERROR, self._one_line(reason), is_refused)

    def _words(self, body: object) -> str:
        """What a server says about an error."""
        if isinstance(body, Mapping):
            body = next((body[name] for name in ("message", "detail", "error") if body.get(name)), body)
        return self._one_line(body if isinstance(body, str) else json.dumps(body)) or "no reason given"

    def _one_line(self, text: str) -> str:
        """Text for a reason: one line, not too long, and without the key, which a server may repeat."""
        line = " ".join(text.replace(self._key, _HIDDEN_KEY).split() if self._key else text.split())
        return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + " ..."


def _pause(error: "APIError", pauses: int) -> float | None:
    """Seconds to wait before an overloaded server is asked again; None for an error of another kind.

    Args:
        error: What came of the last try.
        pauses: How many times this request has waited.
    """
    from openai import APIStatusError

    if not isinstance(error, APIStatusError) or error.status_code not in _OVERLOADED or error.code == _NO_MONEY:
        return None
    try:
        asked = float(error.response.headers.get("retry-after", "0"))
    except ValueError:  # a date
        asked = 0.0
    pause = _SHORTEST_PAUSE * 2.0 ** min(pauses, 10) * random.SystemRandom().uniform(0.75, 1)  # not all at once
    return min(max(pause, asked), _LONGEST_PAUSE)

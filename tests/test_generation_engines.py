"""Engines that generate answers: transformers against naive loops, endpoints against servers good and bad."""

import contextlib
import copy
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from stm_plugin.generation import endpoint
from stm_plugin.generation.endpoint import EndpointEngine
from stm_plugin.generation.engines import ERROR, LENGTH, STOP, EngineError, Generated, Request, Sampling
from stm_plugin.generation.local import TransformersEngine

QUESTIONS = [
    "Add.",
    "What is the capital of France?",
    "Sort the list, please. " * 3,
    "Print.",
    "Who are you, and why?",
]
GREEDY = Sampling(temperature=0, max_new_tokens=12)


def requests_for(questions, samples=1):
    return [
        Request(row, sample, [{"role": "user", "content": question}])
        for row, question in enumerate(questions)
        for sample in range(samples)
    ]


def by_request(answers):
    answers = list(answers)
    found = {(answer.row, answer.sample): answer for answer in answers}
    assert len(found) == len(answers)
    return found


# In this process.


@pytest.fixture
def model(make_model):
    """In float64, so that padding changes no choice of a token."""
    return make_model().double()


def prompt_of(tokenizer, request):
    kwargs = request.template_kwargs or {}
    text = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy_one_by_one(model, tokenizer, request, max_new_tokens, stop_ids):
    """The naive answer: no batch, no padding, no cache."""
    ids = prompt_of(tokenizer, request)
    answer = []
    while len(answer) < max_new_tokens and not (answer and answer[-1] in stop_ids):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1]
        answer.append(int(logits.argmax()))
    stopped = answer[-1] in stop_ids
    text = tokenizer.decode(answer[: len(answer) - stopped], skip_special_tokens=True)
    return Generated(request.row, request.sample, text, len(answer), STOP if stopped else LENGTH)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_greedy_answers_are_those_of_a_naive_loop(model, tokenizer, batch_size):
    requests = requests_for(QUESTIONS * 2)
    plain = [greedy_one_by_one(model, tokenizer, request, 12, ()) for request in requests]
    # Two tokens that the model does choose end a turn; the tokenizer calls neither special.
    first = [greedy_ids(model, tokenizer, request) for request in requests]
    to_the_limit = next(ids for ids in first if ids[-1] not in ids[:-1])
    stop_ids = [to_the_limit[-1], next(ids[5] for ids in first if ids[5] not in to_the_limit)]
    assert not set(stop_ids) & set(tokenizer.all_special_ids)
    expected = [greedy_one_by_one(model, tokenizer, request, 12, stop_ids) for request in requests]
    assert {answer.finish for answer in expected} == {STOP, LENGTH}
    assert any(answer.finish == STOP and answer.num_tokens == 12 for answer in expected)  # at the limit itself
    assert expected != plain

    model.generation_config.eos_token_id = stop_ids
    answers = by_request(TransformersEngine(model, tokenizer, GREEDY, batch_size).generate(requests))
    assert answers == {(answer.row, answer.sample): answer for answer in expected}


def greedy_ids(model, tokenizer, request, length=12):
    ids = prompt_of(tokenizer, request)
    for _ in range(length):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-length:]


def test_draws_follow_temperature_and_top_p_and_nothing_else(model, tokenizer):
    model.lm_head.weight.data *= 0.3  # flat enough that hundreds of tokens could be drawn
    request = requests_for(["Add."])[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_of(tokenizer, request)])).logits[0, -1]
    probabilities = (logits / 0.8).softmax(-1).numpy()
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    expected = np.zeros_like(probabilities)
    expected[order[:size]] = probabilities[order[:size]] / probabilities[order[:size]].sum()
    assert 5 < size < 200
    texts = {token: tokenizer.decode([token], skip_special_tokens=True) for token in order[:size].tolist()}
    assert len(set(texts.values())) > 5

    model.generation_config.update(top_k=2, min_p=0.5, typical_p=0.2, repetition_penalty=5.0, temperature=0.1)
    model.generation_config.update(epsilon_cutoff=0.1, eta_cutoff=0.1, suppress_tokens=order[:3].tolist())
    model.generation_config.do_sample = True
    own_config = model.generation_config
    sampling = Sampling(temperature=0.8, top_p=0.6, max_new_tokens=1, seed=3)
    number = 4000
    requests = [request._replace(sample=sample) for sample in range(number)]
    answers = list(TransformersEngine(model, tokenizer, sampling, 500).generate(requests))
    counts = Counter(answer.text for answer in answers)
    mass = Counter()
    for token, text in texts.items():
        mass["" if token == tokenizer.eos_token_id else text] += expected[token]
    assert set(counts) <= set(mass)
    deviations = [
        (counts[text] - number * share) / (number * share * (1 - share)) ** 0.5 for text, share in mass.items()
    ]
    assert max(map(abs, deviations)) < 4.5, deviations
    assert model.generation_config is own_config


def test_draws_depend_on_the_seed_and_the_batch_alone(model, tokenizer):
    requests = requests_for(["Add."] * 3, samples=4)

    def texts(seed, of=requests):
        engine = TransformersEngine(model, tokenizer, Sampling(max_new_tokens=8, seed=seed), 4)
        return {key: answer.text for key, answer in by_request(engine.generate(of)).items()}

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = texts(0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    torch.manual_seed(6)
    assert texts(0) == first
    assert texts(1) != first
    # Another run that begins with the second batch goes on as this one did.
    assert texts(0, requests[4:]) == {key: text for key, text in first.items() if key[0] > 0}
    # The same question in other batches is answered with other draws.
    assert len({tuple(first[row, sample] for sample in range(4)) for row in range(3)}) == 3
    assert len({first[0, sample] for sample in range(4)}) > 1


def test_long_prompts_come_first_and_batches_as_they_are_done(model, tokenizer):
    requests = requests_for(QUESTIONS)
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    answers = TransformersEngine(model, tokenizer, Sampling(max_new_tokens=1), 2).generate(requests)
    lengths = [len(prompt_of(tokenizer, requests[next(answers).row])) for _ in range(2)]
    assert len(sizes) == 1
    lengths += [len(prompt_of(tokenizer, requests[answer.row])) for answer in answers]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 2
    assert [rows for rows, _ in sizes] == [2, 2, 1]
    assert [width for _, width in sizes] == lengths[::2]


def test_training_mode_and_dropout_have_no_part(make_model, tokenizer):
    model = make_model(attention_dropout=0.9).train()
    answers = [list(TransformersEngine(model, tokenizer, GREEDY, 2).generate(requests_for(QUESTIONS))) for _ in "ab"]
    assert answers[0] == answers[1]
    assert model.training


@pytest.fixture
def memory(model):
    """Sets how many rows the model takes: the device's error, raised by hand, as no CPU has it."""
    limit, sizes = [64], []

    def check(_, args):
        sizes.append(len(args[0]))
        if len(args[0]) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_input_embeddings().register_forward_pre_hook(check)
    return limit, sizes


def test_out_of_memory_halves_the_batch(model, tokenizer, memory, caplog):
    limit, sizes = memory
    requests = requests_for(QUESTIONS, samples=2)
    engine = TransformersEngine(model, tokenizer, GREEDY, 8)
    expected = by_request(engine.generate(requests))
    limit[0] = 3
    sizes.clear()
    assert by_request(engine.generate(requests)) == expected
    assert engine.batch_size == 2
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[2:]) == 2
    assert caplog.text.count("Out of memory: generation goes on with") == 2


def test_an_answer_without_memory_is_an_error_and_the_others_are_not(model, tokenizer):
    def check(_, args):
        if args[0].shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_input_embeddings().register_forward_pre_hook(check)
    requests = requests_for([*QUESTIONS, "Long. " * 60])
    answers = by_request(TransformersEngine(model, tokenizer, Sampling(max_new_tokens=2), 4).generate(requests))
    assert [answers[row, 0].finish == ERROR for row in range(6)] == [False] * 5 + [True]
    words = "the GPU has no memory for it. Lower max_new_tokens."
    assert answers[5, 0] == Generated(5, 0, "", 0, ERROR, words, is_refused=True)


def test_what_cannot_be_answered_is_an_error_of_its_own(make_model, tokenizer, monkeypatch):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    model = make_model(max_position_embeddings=100)
    requests = [
        *requests_for(["Add.", "Long. " * 60]),
        Request(7, 3, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Add."}]),
    ]
    answers = by_request(TransformersEngine(model, tokenizer, Sampling(max_new_tokens=40), 4).generate(requests))
    assert answers[0, 0].finish != ERROR
    length = len(prompt_of(tokenizer, requests[1]))
    assert answers[1, 0].error == (
        f"a prompt of {length} tokens and max_new_tokens=40 are more than the model's 100 positions"
    )
    assert answers[7, 3] == Generated(7, 3, "", 0, ERROR, "the chat template refuses the chat: No system role.", True)
    assert answers[1, 0].is_refused


def test_what_the_template_is_given(model, tokenizer, monkeypatch):
    with_mood = "{% if mood is defined %}<|im_start|>system\nBe {{ mood }}.<|im_end|>\n{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", with_mood + tokenizer.chat_template)
    moods = [{"mood": "calm and polite"}, None, {"mood": "quick"}]
    requests = [
        request._replace(row=row, template_kwargs=kwargs)
        for row, kwargs in enumerate(moods)
        for request in requests_for(QUESTIONS[:1])
    ]
    assert len({len(prompt_of(tokenizer, request)) for request in requests}) == 3
    answers = by_request(TransformersEngine(model, tokenizer, GREEDY, 3).generate(requests))
    for request in requests:
        assert answers[request.row, 0] == greedy_one_by_one(model, tokenizer, request, 12, [tokenizer.eos_token_id])


def test_no_requests_no_answers(model, tokenizer):
    assert list(TransformersEngine(model, tokenizer, GREEDY, 2).generate([])) == []


@pytest.mark.parametrize(
    ("sampling", "batch_size", "words"),
    [
        (Sampling(), 0, "batch_size must be at least 1, got 0"),
        (Sampling(temperature=-0.1), 1, "got temperature=-0.1"),
        (Sampling(top_p=0), 1, "top_p=0,"),
        (Sampling(top_p=1.01), 1, r"top_p=1\.01"),
        (Sampling(max_new_tokens=0), 1, "max_new_tokens=0"),
    ],
)
def test_values_out_of_range(model, tokenizer, sampling, batch_size, words):
    with pytest.raises(EngineError, match=words):
        TransformersEngine(model, tokenizer, sampling, batch_size)


def test_a_tokenizer_without_template_or_stop_token(model, tokenizer):
    model.generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(EngineError, match="names an end-of-turn token"):
        TransformersEngine(model, tokenizer, GREEDY, 1)
    tokenizer.chat_template = None
    with pytest.raises(EngineError, match="no chat template"):
        TransformersEngine(model, tokenizer, GREEDY, 1)


# Servers of few lines, on loopback.

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?"}]


def completion(content="Fine.", finish_reason="stop", usage={"completion_tokens": 3}, **message):  # noqa: B006
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content} | message}]}
    answer["choices"][0]["finish_reason"] = finish_reason
    return answer | {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}


def respond(handler, body, status=200, **headers):
    """Send JSON, or text or bytes as they are."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    data = text if isinstance(text, bytes) else text.encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


class Server:
    """Calls `behave(handler, number)` for the request of each number, from 0; keeps what was asked."""

    def __init__(self, behave):
        outer = self
        self.asked, self.headers, self.in_flight, self.most_in_flight = [], [], 0, 0
        self._lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.asked)
                    outer.asked.append(body | {"path": self.path})
                    outer.headers.append(self.headers)
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    behave(self, number)
                except OSError:
                    pass  # the client did not wait
                finally:
                    with outer._lock:
                        outer.in_flight -= 1

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    pytest.importorskip("openai", reason="openai is not installed")
    servers = []

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@contextlib.contextmanager
def engine_for(url, sampling=Sampling(), **options):  # noqa: B008
    engine = EndpointEngine(
        getattr(url, "url", url), "some/model", sampling, **{"timeout": 30, "max_retries": 2} | options
    )
    with contextlib.closing(engine):
        yield engine


def ask(url, requests=None, sampling=Sampling(), **options):  # noqa: B008
    with engine_for(url, sampling, **options) as engine:
        return list(engine.generate(requests or [Request(4, 2, MESSAGES)]))


def test_what_is_asked_and_what_is_answered(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/other")
    server = serve(lambda handler, _: respond(handler, completion("Größe: 1\n ")))
    sampling = Sampling(temperature=0.3, top_p=0.8, max_new_tokens=77, seed=5)
    assert ask(server, sampling=sampling) == [Generated(4, 2, "Größe: 1\n ", 3, STOP)]
    assert ask(server, sampling=sampling, api_key="mine") == [Generated(4, 2, "Größe: 1\n ", 3, STOP)]
    expected = {
        "path": "/v1/chat/completions",
        "model": "some/model",
        "messages": MESSAGES,
        "temperature": 0.3,
        "top_p": 0.8,
        "max_tokens": 77,
        "seed": server.asked[0]["seed"],
    }
    assert server.asked == [expected, expected]
    ask(server, [Request(4, 2, MESSAGES, {"enable_thinking": False})], sampling=sampling)
    assert server.asked[2] == expected | {"chat_template_kwargs": {"enable_thinking": False}}
    assert [headers["Authorization"] for headers in server.headers[:2]] == ["Bearer EMPTY", "Bearer mine"]
    assert not any("secret" in str(headers) for headers in server.headers)


def test_seeds_depend_on_seed_row_and_sample(serve):
    server = serve(lambda handler, _: respond(handler, completion(handler.headers["X-Stainless-Retry-Count"])))
    requests = [
        Request(row, sample, [{"role": "user", "content": f"{row} {sample}"}])
        for row in range(3)
        for sample in range(12)
    ]

    def seeds(seed, of):
        server.asked.clear()
        ask(server, of, Sampling(seed=seed), concurrency=5)
        return {body["messages"][0]["content"]: body["seed"] for body in server.asked}

    first = seeds(0, requests)
    assert len(set(first.values())) == 36
    assert all(0 <= seed < 2**31 for seed in first.values())
    assert seeds(0, requests[20:]).items() <= first.items()
    assert not set(seeds(1, requests).values()) & set(first.values())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_twice_is_asked_again(serve, status):
    def behave(handler, number):
        if number < 2:
            respond(handler, {"error": {"message": "busy"}}, status, retry_after_ms="1")
        else:
            respond(handler, completion())

    server = serve(behave)
    assert ask(server) == [Generated(4, 2, "Fine.", 3, STOP)]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "out of\n memory"}}, "out of memory"),
        ({"detail": "worker died"}, "worker died"),
        ({"error": "no slot"}, "no slot"),
        ({"object": "error", "code": 17}, '{"object": "error", "code": 17}'),
        ("<html><h1>Bad gateway</h1></html>", "<html><h1>Bad gateway</h1></html>"),
        ("", "no reason given"),
        ("x" * 5000, "x" * 295 + " ..."),
    ],
)
def test_a_server_that_fails_for_ever_fails_its_requests_alone(serve, body, words):
    def behave(handler, number):
        if "Tell" in server.asked[number]["messages"][0]["content"]:
            respond(handler, body, 500, retry_after_ms="1")
        else:
            respond(handler, completion())

    server = serve(behave)
    answers = by_request(ask(server, requests_for(["Add.", "Tell.", "Go."]), concurrency=1))
    assert [answers[row, 0].finish for row in range(3)] == [STOP, ERROR, STOP]
    assert answers[1, 0] == Generated(1, 0, "", 0, ERROR, f"500: {words}")
    assert len(server.asked) == 5


def without(answer, *path):
    *first, last = path
    inner = answer
    for key in first:
        inner = inner[key]
    del inner[last]
    return answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "no chat completion: it is empty"),
        ("<!doctype html>\n<p>Log in", "no chat completion: <!doctype html> <p>Log in"),
        (json.dumps(completion())[:70], 'no chat completion: {"choices": [{"index": 0'),
        (b"\xff\xfe\x00", "no chat completion"),
        ([1, 2], "no chat completion: [1, 2]"),
        ("null", "no chat completion: null"),
        ({"choices": []}, "no chat completion"),
        ({"choices": {}}, "no chat completion"),
        ({"choices": [None]}, "no chat completion"),
        ({"choices": ["text"]}, "no chat completion"),
        ({"choices": [{"message": None, "finish_reason": "stop"}]}, "no chat completion"),
        ({"error": {"message": "busy"}}, 'no chat completion: {"error": {"message": "busy"}}'),
        (without(completion(), "choices", 0, "message"), "no chat completion"),
        (without(completion(), "choices", 0, "finish_reason"), "finish_reason None"),
        (completion(finish_reason="content_filter"), "finish_reason 'content_filter', not 'stop' or 'length'"),
        (completion(None, "tool_calls", tool_calls=[]), "finish_reason 'tool_calls'"),
        (completion(finish_reason=["stop"]), "finish_reason ['stop']"),
        (without(completion(), "choices", 0, "message", "content"), 'no text: {"role": "assistant"}'),
        (completion(None, refusal="I can't."), 'no text: {"role": "assistant", "content": null, "refusal"'),
        (completion([{"type": "text", "text": "a"}]), "no text"),
        (completion(7), "no text"),
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
def test_garbage_is_an_error_with_its_reason(serve, body, words, content_type):
    server = serve(lambda handler, _: respond(handler, body, Content_Type=content_type))
    (answer,) = ask(server)
    assert answer[:5] == (4, 2, "", 0, ERROR)
    assert words in answer.error
    assert "\n" not in answer.error
    assert len(answer.error) < 400
    assert answer.is_refused


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (completion("", "stop", {"completion_tokens": 1}), ("", 1, STOP)),
        (completion("", "length", {"completion_tokens": 9}), ("", 9, LENGTH)),
        (completion("cut", "length", {"completion_tokens": 9}), ("cut", 9, LENGTH)),
        (completion(None, "length", {"completion_tokens": 9}, reasoning_content="Hm."), ("", 9, LENGTH)),
        (completion("a\ud800b"), ("a?b", 3, STOP)),
        # as many tokens as are allowed
        (completion("all but one", "stop", {"completion_tokens": 19}), ("all but one", 19, STOP)),
        (completion("all", "stop", {"completion_tokens": 20}), ("all", 20, LENGTH)),
        (completion("more", "stop", {"completion_tokens": 21}), ("more", 21, LENGTH)),
        # no count: an estimate
        (completion("cut", "length", None), ("cut", 20, LENGTH)),
        (without(completion("äöüä"), "usage"), ("äöüä", 3, STOP)),
        (completion("x", "stop", {}), ("x", 2, STOP)),
        (completion("x", "stop", {"completion_tokens": None}), ("x", 2, STOP)),
        (completion("x", "stop", [3]), ("x", 2, STOP)),
        (completion("x" * 1000, "stop", None), ("x" * 1000, 20, STOP)),
        (completion("", "stop", None), ("", 1, STOP)),
    ],
)
def test_empty_and_cut_answers_and_counts(serve, body, expected):
    server = serve(lambda handler, _: respond(handler, body))
    assert ask(server, sampling=Sampling(max_new_tokens=20)) == [Generated(4, 2, *expected)]


def cut(handler, number):
    respond(handler, json.dumps(completion())[:50], Content_Length="500")
    handler.close_connection = True


def test_a_connection_that_breaks_is_made_again(serve):
    server = serve(lambda handler, number: cut(handler, number) if number == 0 else respond(handler, completion()))
    assert ask(server, max_retries=1) == [Generated(4, 2, "Fine.", 3, STOP)]
    server = serve(cut)
    (answer,) = ask(server, max_retries=1)
    assert answer[:5] == (4, 2, "", 0, ERROR)
    assert answer.error.startswith("Connection error. ")
    assert len(server.asked) == 2


def test_a_slow_server_is_not_waited_for(serve):
    done = threading.Event()
    server = serve(lambda handler, number: done.wait(100) if number < 2 else respond(handler, completion()))
    assert ask(server, timeout=5, max_retries=1)[0].error.startswith("Request timed out.")
    assert len(server.asked) == 2
    assert ask(server, timeout=60, max_retries=1)[0].finish == STOP
    done.set()


def test_nor_one_that_sends_a_byte_now_and_then(serve, monkeypatch):
    def drip(handler, _):
        respond(handler, " ", Content_Length="5000")
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    monkeypatch.setattr(endpoint, "_SECONDS_BETWEEN_TRIES", 0)
    assert ask(serve(drip), timeout=0.4, max_retries=1)[0].error == "no whole answer within 1 seconds"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": "Incorrect API key"}}, "401: Incorrect API key"),
        (403, {"error": "not for you"}, "403: not for you"),
        (
            404,
            {"error": {"message": "The model `some/model` does not exist."}},
            "404: The model `some/model` does not",
        ),
        (404, {"detail": "Not Found"}, "404: Not Found. Check the URL .*end in /v1"),
    ],
)
def test_a_server_that_refuses_all_ends_the_run(serve, status, body, words):
    server = serve(lambda handler, number: respond(handler, body, status))
    with pytest.raises(EngineError, match=f"{server.url} refuses to answer as 'some/model': {words}"):
        ask(server, requests_for(QUESTIONS), concurrency=1)
    assert len(server.asked) < len(QUESTIONS)


def test_a_refusal_in_mid_run_loses_no_answer(serve):
    """Four answers and twelve refusals are there when the caller comes back for more."""
    answered, all_answered = [], threading.Event()

    def behave(handler, number):
        if number < 4:
            respond(handler, completion())
            answered.append(number)
            if len(answered) == 4:
                all_answered.set()
        else:
            all_answered.wait(100)
            time.sleep(0.5)
            respond(handler, "expired", 401)

    found = []

    def take_slowly():
        with engine_for(serve(behave), concurrency=16) as engine:
            for answer in engine.generate(requests_for(QUESTIONS * 4)):
                found.append(answer)
                time.sleep(1.5)

    with pytest.raises(EngineError, match="401: expired"):
        take_slowly()
    assert [answer.finish for answer in found] == [STOP] * 4


def test_nothing_at_the_address():
    pytest.importorskip("openai", reason="openai is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EngineError, match=f"nothing answers at {url}: Connection error.*Start the server"):
            ask(url, max_retries=1)


def test_a_server_that_goes_away_fails_what_is_left(serve):
    server = serve(lambda handler, _: respond(handler, completion(), Connection="close"))
    with engine_for(server, concurrency=1, max_retries=0) as engine:
        assert [answer.finish for answer in engine.generate(requests_for(["Add."]))] == [STOP]
        server.stop()
        answers = list(engine.generate(requests_for(QUESTIONS)))
    assert [answer.finish for answer in answers] == [ERROR] * len(QUESTIONS)
    assert all(answer.error.startswith("Connection error.") for answer in answers)


def test_servers_that_want_other_names(serve, caplog):
    def behave(handler, number):
        asked = server.asked[number]
        if "max_tokens" in asked:
            words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            respond(handler, {"error": {"message": words}}, 400)
        elif "seed" in asked:
            respond(handler, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}, 422)
        else:
            respond(handler, completion())

    server = serve(behave)
    answers = ask(server, requests_for(QUESTIONS), Sampling(max_new_tokens=9), concurrency=2)
    assert [answer.finish for answer in answers] == [STOP] * len(QUESTIONS)
    assert [body for body in server.asked if "max_tokens" not in body and "seed" not in body] == [
        body for body in server.asked if body.get("max_completion_tokens") == 9 and "seed" not in body
    ]
    assert len(server.asked) <= len(QUESTIONS) + 4  # what the server wants is learnt once
    assert "The server takes no seed" in caplog.text


@pytest.mark.parametrize(("status", "is_refused"), [(400, True), (413, True), (422, True), (418, True), (408, False)])
def test_whose_fault_an_error_is(serve, status, is_refused):
    server = serve(lambda handler, number: respond(handler, {"error": {"message": "no"}}, status))
    (answer,) = ask(server, max_retries=0)
    assert answer == Generated(4, 2, "", 0, ERROR, f"{status}: no", is_refused)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_stays_overloaded_is_asked_until_it_has_time(serve, status, monkeypatch):
    monkeypatch.setattr(endpoint, "_SHORTEST_PAUSE", 0.01)

    def behave(handler, number):
        if number < 7:
            respond(handler, {"error": {"message": "busy"}}, status, x_should_retry="false")
        elif number == 7:
            respond(handler, "", 500, retry_after_ms="1")  # which the client takes care of as before
        else:
            respond(handler, completion())

    server = serve(behave)
    assert ask(server, max_retries=1) == [Generated(4, 2, "Fine.", 3, STOP)]
    assert len(server.asked) == 9
    assert ask(server, max_retries=0)[0].finish == STOP
    server = serve(behave)
    assert ask(server, max_retries=0) == [Generated(4, 2, "", 0, ERROR, f"{status}: busy")]
    assert len(server.asked) == 1


def test_a_server_that_is_overloaded_for_ever_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "_SECONDS_BETWEEN_TRIES", 0)
    monkeypatch.setattr(endpoint, "_pause", lambda error, pauses: 0.01 if pauses < 3 else 61)  # of 60 seconds in all
    server = serve(lambda handler, _: respond(handler, {"detail": "busy"}, 429, x_should_retry="false"))
    assert ask(server, timeout=30, max_retries=1) == [Generated(4, 2, "", 0, ERROR, "429: busy")]
    assert len(server.asked) == 4


def test_pauses_grow_up_to_a_minute():
    openai = pytest.importorskip("openai", reason="openai is not installed")

    def pauses(status=429, body=None, headers=None):
        response = SimpleNamespace(status_code=status, headers=headers or {}, request=None)
        error = openai.APIStatusError("busy", response=response, body=body)
        return [endpoint._pause(error, number) for number in range(9)]

    plain = pauses()
    for number, pause in enumerate(plain):
        assert 0.75 * min(2 * 2**number, 60) <= pause <= min(2 * 2**number, 60)
    assert min(pauses(503, headers={"retry-after": "30"})) == 30
    assert set(pauses(headers={"retry-after": "300"})) == {60}
    assert pauses(headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})[0] <= 2
    assert set(pauses(500)) == {None}
    assert set(pauses(body={"code": "insufficient_quota"})) == {None}


def test_no_money_is_not_waited_for(serve):
    body = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
    server = serve(lambda handler, _: respond(handler, body, 429, retry_after_ms="1"))
    with pytest.raises(EngineError, match="refuses to answer as 'some/model': 429: You exceeded"):
        ask(server, max_retries=1)


KEY = "sk-" + "a1B2" * 8


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_that_the_server_repeats_is_told_to_nobody(serve, status, caplog):
    padding = "x" * (200 if status == 200 else 260)  # so that the reason would be cut in the middle of the key
    words = f"no seed for {padding} {KEY}"
    server = serve(lambda handler, _: respond(handler, {"error": {"message": words}}, status))
    try:
        answers = ask(server, api_key=f" {KEY}\r\n", max_retries=0)
        told = answers[0].error
    except EngineError as error:
        told = str(error)
    assert "[API key]" in told
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert not any(KEY[:length] in told + caplog.text for length in (8, len(KEY)))


@pytest.mark.parametrize("between", ["\r", "\n", " ", "\x00", "\x7f", "ü", "\u2028"])
def test_a_key_that_no_header_holds_is_refused_without_repeating_it(between):
    with pytest.raises(EngineError, match="the API key has blanks, line breaks or other characters") as caught:
        EndpointEngine("http://localhost/v1", "model", Sampling(), api_key=f"sk-aaaa{between}bbbb")
    assert "aaaa" not in str(caught.value)
    assert "bbbb" not in str(caught.value)


def test_an_address_with_a_password_is_refused():
    with pytest.raises(EngineError, match="must not have a name or a password") as caught:
        EndpointEngine("http://me:pa55@localhost/v1", "model", Sampling())
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize("words", ["max_tokens is too large", "top_p is not supported", "seedless"])
def test_other_complaints_fail_the_request_alone(serve, words):
    server = serve(
        lambda handler, number: (
            respond(handler, {"error": {"message": words}}, 400) if number == 0 else respond(handler, completion())
        )
    )
    answers = ask(server, requests_for(QUESTIONS), concurrency=1)
    assert [answer.error for answer in answers if answer.finish == ERROR] == [f"400: {words}"]
    assert len(server.asked) == len(QUESTIONS)


def test_as_many_at_once_as_allowed(serve):
    barrier = threading.Barrier(3)

    def behave(handler, _):
        barrier.wait(100)  # no answer until three are asked for
        time.sleep(0.1)  # time for a fourth to come
        respond(handler, completion())

    server = serve(behave)
    answers = ask(server, requests_for(QUESTIONS * 3), concurrency=3)
    assert [answer.finish for answer in answers] == [STOP] * 15
    assert server.most_in_flight == 3


def test_a_caller_that_stops_is_the_end_of_it(serve):
    release = threading.Event()

    def behave(handler, number):
        if number:
            release.wait(100)
        respond(handler, completion())

    server = serve(behave)
    with engine_for(server, concurrency=2) as engine:
        answers = engine.generate(requests_for(QUESTIONS * 10))
        next(answers)
        answers.close()
        release.set()
        # The engine is still good.
        assert [answer.row for answer in engine.generate(requests_for(["Add."]))] == [0]
    assert len(server.asked) <= 5
    engine.close()


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"]
)
def test_an_address_that_is_none(url):
    with pytest.raises(EngineError, match="an endpoint is a URL such as http://localhost:8000/v1, got "):
        EndpointEngine(url, "model", Sampling())


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"timeout": 0}, {"max_retries": -1}])
def test_endpoint_values_out_of_range(options):
    with pytest.raises(EngineError, match=f"got .*{next(iter(options))}={next(iter(options.values()))}"):
        EndpointEngine("http://localhost/v1", "model", Sampling(), **options)


def test_openai_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "stm-plugin\[generate\]"'):
        EndpointEngine("http://localhost/v1", "model", Sampling())


# A real server.

SERVE = "from transformers.cli.transformers import main; main()"


class TransformersServe:
    """`transformers serve` in a process of its own, on a port that stays the same."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._model, self._log = f"http://127.0.0.1:{self.port}/v1", str(model), log

    def start(self):
        command = [sys.executable, "-c", SERVE, "serve", self._model, "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--device", "cpu"], stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.2)

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model in a folder of its own, where its generation config may be changed."""
    from stm_plugin.demo.model import ModelNotFoundError, find_model

    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    try:
        found = find_model().path
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    folder.mkdir()
    for file in found.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder


def change_generation_config(folder, **changes):
    file = folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    file.write_text(json.dumps(config | changes), encoding="utf-8")


def test_transformers_serve_that_dies_and_comes_back(smollm2, tmp_path):
    """Its answers are those of the engine in this process; what its death fails is answered once it is back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions = ["Is 7 odd? Yes or no.", "Say hello.", "What is 2 + 2?", "Name a color.", "Why?"]
    requests = requests_for(questions)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    sampling = Sampling(temperature=0, max_new_tokens=14)
    local = TransformersEngine(model, AutoTokenizer.from_pretrained(smollm2), sampling, 1)
    expected = by_request(local.generate(requests))
    assert len({answer.text for answer in expected.values()}) > 3
    # The server calls an answer cut that ends with the last token allowed: there must be none.
    assert not any(answer.finish == STOP and answer.num_tokens == 14 for answer in expected.values())

    # It draws only where the model's generation config says so, whatever the temperature.
    change_generation_config(smollm2, do_sample=True)
    server = TransformersServe(smollm2, tmp_path / "log")
    server.start()
    try:
        found, failed = {}, []
        engine = EndpointEngine(server.url, str(smollm2), sampling, concurrency=1, timeout=120, max_retries=1)
        with contextlib.closing(engine):
            for number, answer in enumerate(engine.generate(requests)):
                if number == 1:
                    server.kill()
                found |= {(answer.row, answer.sample): answer} if answer.finish != ERROR else {}
                failed += [answer] if answer.finish == ERROR else []
            assert 2 <= len(found) <= 4, (found, failed)  # two, and perhaps what was done while the second was taken
            assert len(found) + len(failed) == len(requests)
            assert all(answer.error for answer in failed)

            server.start()
            again = by_request(engine.generate([requests[answer.row] for answer in failed]))
            assert not found.keys() & again.keys()
            assert found | again == expected

            # Its seeds make draws that can be had again, and others for each sample.
            sampler = EndpointEngine(server.url, str(smollm2), Sampling(max_new_tokens=6), concurrency=1)
            with contextlib.closing(sampler):
                samples = requests_for(["Tell me something new."], samples=2)
                draws = [by_request(sampler.generate(of)) for of in (samples, samples[::-1])]
            assert draws[0] == draws[1]
            assert len({answer.text for answer in draws[0].values()}) > 1
        with pytest.raises(EngineError, match="refuses"):
            ask(server.url.removesuffix("/v1"), requests)
        (answer,) = ask(server, requests[:1])
        assert answer.error.startswith("400: Server is pinned to")
    finally:
        server.kill()

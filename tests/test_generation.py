"""`stm generate`: what is chosen and written, what stops it and how it goes on, what it refuses."""

import argparse
import copy
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl", reason="trl is not installed")

import torch
from datasets import Dataset, load_dataset
from trl_helpers import plain_trainer

from stm_plugin.cli import main as stm
from stm_plugin.generation import command, run
from stm_plugin.generation.choosing import choose, rejections
from stm_plugin.generation.data import problems_of, read_data, rows_digest, with_answer
from stm_plugin.generation.engines import ERROR, LENGTH, STOP, EngineError, Generated, Sampling
from stm_plugin.generation.progress import Progress
from stm_plugin.generation.prompts import REPHRASE_TEMPLATE, read_template, rephrase_messages
from stm_plugin.generation.run import generate_data
from stm_plugin.generation.samples import Sample, SamplesFile
from stm_plugin.generation.settings import Endpoint, GenerateSettings

ROOT = Path(__file__).resolve().parents[1]

JUDGE = """
def anything(answer, row):
    return True

def nothing(answer, row):
    return False

def good(answer, row):
    return "good" in answer

def even(answer, row):
    return sum(answer.encode()) % 2 == 0

def raises(answer, row):
    if "bad" in answer:
        raise ZeroDivisionError("of the judge")
    return True

def interrupted(answer, row):
    raise KeyboardInterrupt
"""


REFUSED = "refused"
"""A finish, for `Scripted`: the error of a request that is at fault itself."""


class Scripted:
    """An engine whose answers are given: texts, or pairs of text and finish; anything else is made up."""

    def __init__(self, answers=None, before=lambda number: None):
        self.answers, self.before, self.asked, self.closed = answers or {}, before, [], 0

    def generate(self, requests):
        for request in requests:
            self.before(len(self.asked))
            self.asked.append((request.row, request.sample))
            answer = self.answers.get((request.row, request.sample), f"answer {request.row} {request.sample}")
            text, finish = (answer, STOP) if isinstance(answer, str) else answer
            if finish in (ERROR, REFUSED):
                yield Generated(request.row, request.sample, "", 0, ERROR, text, finish == REFUSED)
            else:
                yield Generated(request.row, request.sample, text, len(text) + 1, finish)

    def close(self):
        self.closed += 1


@pytest.fixture(scope="session")
def learned(tmp_path_factory, make_model, tokenizer, chats):
    """Folder of a small model that has seen the chats, so that it ends most of its answers."""
    state = torch.get_rng_state()
    folder = tmp_path_factory.mktemp("learned")
    model = make_model(hidden_size=64, intermediate_size=128, initializer_range=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        chat = chats[step % 6]
        ids = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


@pytest.fixture
def place(tmp_path, learned, chats, monkeypatch):
    """A working folder with six chats in `chats.jsonl`, a model in `model` and verifiers in `judge.py`."""
    (tmp_path / "model").symlink_to(learned)
    (tmp_path / "judge.py").write_text(JUDGE)
    rows = [
        {"task_id": index, "messages": chat["prompt"] + chat["completion"], "note": None}
        for index, chat in enumerate(chats[:6])
    ]
    write_rows(rows, tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return tmp_path


def write_rows(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def settings(**changes):
    defaults = {
        "method": "self-output",
        "model": "model",
        "data": "chats.jsonl",
        "output": Path("out.jsonl"),
        "samples": 3,
        "sampling": Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24),
        "batch_size": 6,
        "verifier": "judge:anything",
    }
    return GenerateSettings(**defaults | changes)


def samples_in(path="out.samples.jsonl"):
    """Lines of samples in a finished file."""
    return [record for record in rows_of(path) if "text" in record]


def naive_perplexity(model, tokenizer, messages):
    """`exp` of the mean NLL, in float64, of what a chat has after its generation prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        log_probs = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    nll = [-float(log_probs[position - 1, ids[position]]) for position in range(len(prompt), len(ids))]
    return float(np.exp(np.mean(nll)))


# The whole, with a model that generates in process.


def test_the_verified_sample_of_lowest_perplexity_is_chosen(place, tokenizer):
    from transformers import AutoModelForCausalLM

    lines = []
    receipt = generate_data(settings(samples=8, verifier="judge:even"), lines.append)
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    rows, samples = rows_of("chats.jsonl"), samples_in()
    assert [(s["row"], s["sample"]) for s in samples] == [(row, sample) for row in range(6) for sample in range(8)]
    for sample in samples:
        assert (sample["perplexity"] is None) == (not sample["text"].strip())
        if sample["perplexity"] is not None:
            answered = [*rows[sample["row"]]["messages"][:-1], {"role": "assistant", "content": sample["text"]}]
            assert sample["perplexity"] == pytest.approx(naive_perplexity(model, tokenizer, answered), rel=1e-4)
    written, perplexities = rows_of("out.jsonl"), []
    for index, (before, after) in enumerate(zip(rows, written, strict=True)):
        best = None
        for sample in samples:
            if sample["row"] != index or sample["finish"] != "stop" or not sample["text"].strip():
                continue
            if sum(sample["text"].encode()) % 2 == 0 and (best is None or sample["perplexity"] < best["perplexity"]):
                best = sample
        answer = before["messages"][-1]["content"] if best is None else best["text"]
        expected = {"stm_source": "ground-truth" if best is None else "self-output"} | {
            "messages": [*before["messages"][:-1], {"role": "assistant", "content": answer}]
        }
        assert after == before | expected
        perplexities.append(naive_perplexity(model, tokenizer, after["messages"]))
    sources = [row["stm_source"] for row in written]
    assert {"stop", "length"} == {sample["finish"] for sample in samples}, "both ends of answers are to be covered"
    assert len({sample["text"] for sample in samples}) > 12
    assert sources.count("self-output") >= 3

    before = [naive_perplexity(model, tokenizer, row["messages"]) for row in rows]
    for name, values in (("before", before), ("after", perplexities)):
        assert receipt["perplexity"][name]["mean"] == pytest.approx(np.mean(values), rel=1e-4)
        assert receipt["perplexity"][name]["std"] == pytest.approx(np.std(values), rel=1e-3)
    passed = sum(sample["verdict"] == "passed" for sample in samples)
    assert receipt["samples"]["passed"] == passed
    assert receipt["samples"]["acceptance_rate"] == pytest.approx(passed / 48)
    assert receipt["samples"]["rejected"]["cut"] == sum(sample["finish"] == "length" for sample in samples)
    assert sum(receipt["samples"]["rejected"].values()) + passed == 48
    assert receipt["rows"]["with_a_passing_sample"] == sources.count("self-output")
    assert receipt["rows"]["ground_truth"] == sources.count("ground-truth")
    assert receipt["tokens_generated"] == sum(sample["num_tokens"] for sample in samples)
    assert receipt["seed"] == 0
    assert receipt["options"]["sampling"]["max_new_tokens"] == 24
    assert {"load", "generate", "verify", "score", "total"} == set(receipt["seconds"])
    assert receipt == json.loads(Path("out.receipt.json").read_text())
    assert lines[-1].startswith("6 of 6 problems, ")


def test_trl_takes_what_is_written(place, make_model, tokenizer):
    generate_data(settings(), engine=Scripted())
    data = load_dataset("json", data_files="out.jsonl", split="train")
    trainer = plain_trainer(make_model(), data, tokenizer, place / "trained", max_steps=1, assistant_only_loss=True)
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert all(f"assistant\nanswer {index}" in text for index, text in enumerate(texts))
    trainer.train()


def test_prompt_and_completion(place, chats):
    rows = [dict(chat) for chat in chats[:3]]
    write_rows(rows, place / "pairs.jsonl")
    receipt = generate_data(settings(data="pairs.jsonl", samples=1), engine=Scripted())
    written = rows_of("out.jsonl")
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert [row["completion"][0]["content"] for row in written] == ["answer 0 0", "answer 1 0", "answer 2 0"]
    assert receipt["perplexity"]["after"]["rows"] == 3


def test_what_the_template_is_given(place, tokenizer, monkeypatch):
    """Asked, scored, written and trained on with it; a row's own prevails."""
    from transformers import AutoModelForCausalLM

    generate = Scripted.generate
    shutil.copytree(place / "model", place / "moody")
    with_mood = "<|im_start|>system\nBe {{ mood }}.<|im_end|>\n" + tokenizer.chat_template
    (place / "moody" / "chat_template.jinja").write_text(with_mood)
    rows = rows_of("chats.jsonl")[:2]
    rows[1]["chat_template_kwargs"] = {"mood": "quick"}
    write_rows(rows, place / "two.jsonl")
    moods = [{"mood": "calm and polite"}, {"mood": "quick"}]
    engine, asked = Scripted(), []
    monkeypatch.setattr(
        Scripted, "generate", lambda self, requests: asked.extend(requests) or generate(self, requests)
    )
    options = {"model": "moody", "data": "two.jsonl", "samples": 1, "chat_template_kwargs": moods[0]}
    generate_data(settings(**options), engine=engine)
    assert [request.template_kwargs for request in asked] == moods
    assert [row["chat_template_kwargs"] for row in rows_of("out.jsonl")] == moods
    moody = copy.deepcopy(tokenizer)
    model = AutoModelForCausalLM.from_pretrained("moody", dtype=torch.float32)
    for row, sample, mood in zip(rows_of("out.jsonl"), samples_in(), moods, strict=True):
        moody.chat_template = with_mood.replace("{{ mood }}", mood["mood"])
        assert sample["perplexity"] == pytest.approx(naive_perplexity(model, moody, row["messages"]), rel=1e-4)
    with pytest.raises(ValueError, match="other settings"):
        generate_data(settings(**options | {"chat_template_kwargs": moods[1]}), engine=engine)


def test_rephrase_shows_task_and_answer(place):
    asked = []

    class Asked(Scripted):
        def generate(self, requests):
            asked.extend(requests)
            return super().generate(requests)

    Path("template.txt").write_text("<{answer}> for <{instruction}> as {json: {}}", encoding="utf-8")
    receipt = generate_data(
        settings(method="rephrase", samples=None, template=Path("template.txt")), engine=Asked({(0, 0): "good"})
    )
    question, answer = (message["content"] for message in rows_of("chats.jsonl")[4]["messages"])
    assert len(asked) == 6  # one sample each
    assert asked[4].messages == [{"role": "user", "content": f"<{answer}> for <{question}> as {{json: {{}}}}"}]
    assert rows_of("out.jsonl")[0]["messages"][-1]["content"] == "good"
    assert rows_of("out.jsonl")[0]["messages"][0] == rows_of("chats.jsonl")[0]["messages"][0]
    assert rows_of("out.jsonl")[0]["stm_source"] == "rephrase"
    assert receipt["settings"]["template"].startswith("<{answer}>")


def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)


def save_adapter(folder, base_name):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = get_peft_model(base(), config)
    adapter.peft_config["default"].base_model_name_or_path = base_name
    adapter.save_pretrained(folder)


def test_an_adapter_is_put_on_the_model(place, tokenizer, caplog):
    from peft import PeftModel
    from transformers import AutoTokenizer

    save_adapter("adapter", "nowhere/to-be-had")
    receipt = generate_data(settings(adapter="adapter"), engine=Scripted())
    assert "The adapter adapter says that it is for nowhere/to-be-had, and is put on model." in caplog.text
    model, tokenizer = PeftModel.from_pretrained(base(), "adapter"), AutoTokenizer.from_pretrained("model")
    expected = [naive_perplexity(model, tokenizer, row["messages"]) for row in rows_of("out.jsonl")]
    assert receipt["perplexity"]["after"]["mean"] == pytest.approx(np.mean(expected), rel=1e-4)
    with pytest.raises(ValueError, match=r"adapter was .*, is now None"):
        generate_data(settings(), engine=Scripted())
    tokenizer.save_pretrained("adapter")  # the answers are written with it
    with pytest.raises(ValueError, match=r"adapter\.tokenizer\.json was None"):
        generate_data(settings(adapter="adapter"), engine=Scripted())


@pytest.mark.parametrize("where", ["by name", "by place", "by files"])
def test_an_adapter_of_the_same_base_is_no_warning(where, place, learned, caplog):
    if where == "by files":
        shutil.copytree(learned, "copied")
    save_adapter("adapter", {"by name": "model", "by place": str(learned), "by files": "copied"}[where])
    generate_data(settings(adapter="adapter", samples=1, rows=1), engine=Scripted())
    assert "says that it is for" not in caplog.text


def test_an_adapter_that_is_none_is_refused(place, learned):
    """And does not take the place of the model."""
    (place / "other").symlink_to(learned)
    with pytest.raises(ValueError, match=r"--adapter other: this is no adapter.* goes into --model"):
        generate_data(settings(adapter="other"), engine=Scripted(before=pytest.fail))
    assert not Path("out.samples.jsonl").exists()


# What is chosen.


def test_cut_and_empty_answers_are_never_chosen(place):
    human = rows_of("chats.jsonl")[0]["messages"][-1]["content"]  # the model has learned it
    answers = {(0, 0): (human, LENGTH), (0, 1): "", (0, 2): " \n", (0, 3): "qx zv"}
    answers |= {(row, sample): ("cut off", LENGTH) for row in range(1, 6) for sample in range(4)}
    answers |= {(5, 3): ("", LENGTH)}  # still thinking
    receipt = generate_data(settings(samples=4), engine=Scripted(answers))
    samples = samples_in()[:4]
    assert [sample["verdict"] for sample in samples] == ["cut", "empty", "empty", "passed"]
    assert samples[0]["perplexity"] < samples[3]["perplexity"]
    assert rows_of("out.jsonl")[0]["messages"][-1]["content"] == "qx zv"
    assert [row["stm_source"] for row in rows_of("out.jsonl")] == ["self-output"] + ["ground-truth"] * 5
    assert receipt["samples"]["rejected"] == {"cut": 21, "empty": 2}


def test_of_equal_samples_the_first_is_chosen():
    samples = [
        Sample(0, 2, "c", 1, STOP, "passed", 2.0),
        Sample(0, 1, "b", 1, STOP, "passed", 2.0),
        Sample(0, 0, "a", 1, STOP, "wrong", 1.0),
        Sample(1, 0, "a", 1, LENGTH, "passed", 1.0),  # by no verifier of ours, yet never
        Sample(1, 1, " ", 1, STOP, "passed", 1.0),
        Sample(2, 0, "a", 1, STOP, "passed", 3.0),
        Sample(2, 1, "a", 1, STOP, "passed", 2.5),
    ]
    assert {row: sample.sample for row, sample in choose(samples).items()} == {0: 1, 2: 1}
    assert rejections(
        [Sample(0, 0, "a", 1, STOP, verdict) for verdict in ("error: A: b", "wrong", "error: C: d")]
    ) == {
        "error": 2,
        "wrong": 1,
    }


def test_rows_of_which_nothing_passes_keep_the_human_answer_or_are_dropped(place, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    answers = {(row, 1): "a good one" for row in (1, 4)}
    engine = Scripted(answers)
    receipt = generate_data(settings(verifier="judge:good"), engine=engine)
    before = rows_of("chats.jsonl")
    written = rows_of("out.jsonl")
    assert [row["stm_source"] == "self-output" for row in written] == [False, True, False, False, True, False]
    assert [row["messages"] for row in written if row["stm_source"] == "ground-truth"] == [
        before[index]["messages"] for index in (0, 2, 3, 5)
    ]
    assert receipt["rows"]["ground_truth"] == 4
    assert receipt["rows"]["dropped"] == 0
    expected = [naive_perplexity(model, tokenizer, row["messages"]) for row in written]
    assert receipt["perplexity"]["after"]["mean"] == pytest.approx(np.mean(expected), rel=1e-4)

    nobody = Scripted(before=pytest.fail)
    receipt = generate_data(settings(verifier="judge:good", rejected="drop"), engine=nobody)
    assert [row["task_id"] for row in rows_of("out.jsonl")] == [1, 4]
    assert {row["stm_source"] for row in rows_of("out.jsonl")} == {"self-output"}
    assert receipt["rows"]["dropped"] == 4
    assert receipt["perplexity"]["after"]["rows"] == 2
    assert receipt["perplexity"]["before"]["rows"] == 6


def test_nothing_passes_and_all_is_dropped(place):
    with pytest.raises(ValueError, match=r"no row has a sample that passes.*wrong \(18 times\)"):
        generate_data(settings(verifier="judge:nothing", rejected="drop"), engine=Scripted())
    assert not Path("out.jsonl").exists()
    assert len(samples_in()) == 18
    assert json.loads(Path("out.receipt.json").read_text())["samples"]["rejected"] == {"wrong": 18}


def test_a_verifier_that_raises_is_a_counted_rejection(place):
    answers = {(row, 0): "a bad one" for row in range(6)}
    receipt = generate_data(settings(verifier="judge:raises"), engine=Scripted(answers))
    assert receipt["samples"]["rejected"] == {"error": 6}
    assert samples_in()[0]["verdict"] == "error: ZeroDivisionError: of the judge"
    assert all("bad" not in row["messages"][-1]["content"] for row in rows_of("out.jsonl"))
    assert receipt["rows"]["with_a_passing_sample"] == 6


# What stops it, and how it goes on.

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_generation import Scripted, settings
from stm_plugin.generation.run import generate_data

def before(number):
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)

generate_data(settings(verifier="judge:even"), engine=Scripted(before=before))
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "STM_HOME": str(Path("stm-home").resolve())}


def test_killed_and_started_again_nothing_is_generated_twice_or_lost(place):
    script = KILLED.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = samples_in()
    assert [(sample["row"], sample["sample"]) for sample in kept] == [(index // 3, index % 3) for index in range(7)]
    assert not Path("out.jsonl").exists()
    before = rows_of("out.samples.jsonl")
    spent = sum(record.get("seconds", {}).get("score", 0) for record in before)
    engine = Scripted()
    receipt = generate_data(settings(verifier="judge:even"), engine=engine)
    assert engine.asked == [(index // 3, index % 3) for index in range(7, 18)]
    assert [sample["text"] for sample in samples_in()] == [f"answer {i // 3} {i % 3}" for i in range(18)]
    assert receipt["seconds"]["score"] > spent > 0
    interrupted, whole = Path("out.jsonl").read_bytes(), Scripted()
    generate_data(settings(verifier="judge:even", output=Path("whole.jsonl")), engine=whole)
    assert len(whole.asked) == 18
    assert Path("whole.jsonl").read_bytes() == interrupted


def stopped_after(number, **changes):
    """Start, and raise KeyboardInterrupt before a sample."""

    def before(count):
        if count == number:
            raise KeyboardInterrupt

    engine = Scripted(before=before)
    with pytest.raises(KeyboardInterrupt):
        generate_data(settings(**changes), engine=engine)
    assert engine.closed == 1


def test_a_torn_last_line_is_generated_again(place):
    stopped_after(7)
    path = Path("out.samples.jsonl")
    content = path.read_bytes()
    start = content.index(b'{"row": 2, "sample": 0')
    path.write_bytes(content[: start + 30])
    stopped_after(2)  # what follows must not be written behind the torn piece
    engine = Scripted()
    generate_data(settings(), engine=engine)
    assert engine.asked == [(index // 3, index % 3) for index in range(8, 18)]
    assert len(samples_in()) == 18


def test_a_torn_first_line_is_written_again(place):
    Path("out.samples.jsonl").write_text('{"settings": {"meth')
    generate_data(settings(), engine=Scripted())
    assert len(samples_in()) == 18


def test_a_damaged_line_is_named(place):
    stopped_after(7)
    path = Path("out.samples.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(ValueError, match=r"out.samples.jsonl, line 4, is damaged"):
        generate_data(settings(), engine=Scripted())
    path.write_text("\n".join([*lines[:3], *lines[4:]]))
    engine = Scripted()
    generate_data(settings(), engine=engine)
    assert engine.asked == [(0, 1), *((index // 3, index % 3) for index in range(7, 18))]


def test_another_verifier_judges_what_is_there(place):
    receipt = generate_data(settings(), engine=Scripted({(2, 0): ("cut", LENGTH), (3, 1): ""}))
    before, scored = samples_in(), receipt["seconds"]["score"]
    assert receipt["samples"]["passed"] == 16
    receipt = generate_data(settings(verifier="judge:even"), engine=Scripted(before=pytest.fail))
    even = [sum(sample["text"].encode()) % 2 == 0 for sample in before]
    expected = ["passed" if is_even else "wrong" for is_even in even]
    expected[6], expected[10] = "cut", "empty"
    assert 4 < expected.count("passed") < 14
    after = samples_in()
    assert [sample["verdict"] for sample in after] == expected
    assert [sample | {"verdict": None} for sample in after] == [sample | {"verdict": None} for sample in before]
    assert receipt["samples"]["passed"] == expected.count("passed")
    assert receipt["seconds"]["score"] == scored  # perplexities stay, too
    assert receipt["settings"]["verifier"] == "judge:even"
    assert rows_of("out.samples.jsonl")[0] == {"settings": receipt["settings"]}
    generate_data(
        settings(verifier="judge:even", output=Path("anew.jsonl")), engine=Scripted({(2, 0): "", (3, 1): ""})
    )
    assert rows_of("out.jsonl") == rows_of("anew.jsonl")


@pytest.mark.parametrize("where", ["judge.py", "helpers.py"])
def test_a_verifier_that_has_changed_judges_again(where, place):
    Path("judge.py").write_text("from helpers import *\n" if where == "helpers.py" else JUDGE)
    Path("helpers.py").write_text(JUDGE)

    def started(engine):
        for name in ("judge", "helpers"):
            sys.modules.pop(name, None)
        return generate_data(settings(verifier="judge:anything"), engine=engine)

    try:
        assert started(Scripted())["samples"]["passed"] == 18
        assert started(Scripted(before=pytest.fail))["samples"]["passed"] == 18
        Path(where).write_text(JUDGE.replace("return True", "return 'answer 1' in answer"))
        importlib.invalidate_caches()
        assert started(Scripted(before=pytest.fail))["samples"]["passed"] == 3
    finally:
        sys.modules.pop("helpers", None)


def test_stopped_while_judging_anew_nothing_is_lost(place):
    texts = [sample["text"] for sample in samples_in()] if generate_data(settings(), engine=Scripted()) else []
    with pytest.raises(KeyboardInterrupt):
        generate_data(settings(verifier="judge:interrupted"), engine=Scripted(before=pytest.fail))
    receipt = generate_data(settings(verifier="judge:even"), engine=Scripted(before=pytest.fail))
    assert [sample["text"] for sample in samples_in()] == texts
    assert sum(receipt["samples"]["rejected"].values()) + receipt["samples"]["passed"] == 18


def test_more_samples_and_more_rows_are_added(place):
    first = Scripted()
    generate_data(settings(samples=2, rows=4), engine=first)
    assert len(first.asked) == 8
    more = Scripted()
    receipt = generate_data(settings(samples=3), engine=more)
    assert sorted(more.asked) == sorted({(row, s) for row in range(6) for s in range(3)} - set(first.asked))
    assert receipt["rows"]["read"] == receipt["perplexity"]["before"]["rows"] == len(rows_of("out.jsonl")) == 6
    assert receipt["samples"]["generated"] == 18
    anew = generate_data(settings(output=Path("anew.jsonl")), engine=Scripted())
    assert rows_of("out.jsonl") == rows_of("anew.jsonl")
    for name in ("before", "after"):
        for fact in ("mean", "std"):
            assert receipt["perplexity"][name][fact] == pytest.approx(anew["perplexity"][name][fact], rel=1e-6)
    # More rows, of which a first one is another, are other data.
    rows = rows_of("chats.jsonl")
    write_rows([rows[0] | {"note": "new"}, *rows[1:], rows[0]], Path("chats.jsonl"))
    with pytest.raises(ValueError, match=r"(?s)rows was 6, is now 7.*data was "):
        generate_data(settings(), engine=Scripted(before=pytest.fail))
    write_rows([*rows, rows[0]], Path("chats.jsonl"))
    more = Scripted()
    generate_data(settings(), engine=more)
    assert more.asked == [(6, 0), (6, 1), (6, 2)]


def test_a_full_disk_tears_no_line_that_is_followed_by_another(tmp_path, monkeypatch):
    path = tmp_path / "x.samples.jsonl"
    file = SamplesFile(path, {"method": "x"})
    file.add(Sample(0, 0, "first", 1, STOP))
    write, calls = os.write, []

    def half(descriptor, data):
        calls.append(data)
        if len(calls) == 1:
            return write(descriptor, data[: len(data) // 2])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    file.spent("generate", 2.0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.add(Sample(0, 1, "second", 1, STOP))
    file.close()  # there is room again
    assert len(calls) == 3
    again = SamplesFile(path, {"method": "x"})
    assert {key: sample.text for key, sample in again.samples.items()} == {(0, 0): "first"}
    assert again.seconds == {"generate": 2.0}
    again.close()


def test_stopped_while_verifying_it_verifies_again(place):
    with pytest.raises(KeyboardInterrupt):
        generate_data(settings(verifier="judge:interrupted"), engine=Scripted())
    Path("judge.py").write_text(JUDGE.replace("raise KeyboardInterrupt", "return True"))
    sys.modules.pop("judge")
    receipt = generate_data(settings(verifier="judge:interrupted"), engine=Scripted(before=pytest.fail))
    assert receipt["samples"]["passed"] == 18


def test_other_settings_are_named(place):
    stopped_after(7)
    sampling = Sampling(temperature=0.5, top_p=1.0, max_new_tokens=24)
    for changes, message in (
        ({"sampling": sampling}, "temperature was 1.0, is now 0.5"),
        ({"samples": 2}, "samples was 3, is now 2"),
        ({"samples": 4, "sampling": sampling}, "temperature was 1.0, is now 0.5"),
        ({"rows": 2}, "rows was 6, is now 2"),
        ({"method": "rephrase"}, "method was 'self-output', is now 'rephrase'"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}.*start anew with --again"):
            generate_data(settings(**changes), engine=Scripted())
    write_rows(rows_of("chats.jsonl")[::-1], Path("chats.jsonl"))
    with pytest.raises(ValueError, match="data was '"):
        generate_data(settings(), engine=Scripted())
    engine = Scripted()
    generate_data(settings(again=True), engine=engine)
    assert len(engine.asked) == 18


def test_another_model_is_another_setting(place, make_model, tokenizer):
    stopped_after(7)
    Path("model").unlink()
    make_model(seed=5).save_pretrained("model")
    tokenizer.save_pretrained("model")
    with pytest.raises(ValueError, match=r"model\.files\.model\.safetensors was '"):
        generate_data(settings(), engine=Scripted())


def test_the_same_from_another_place_goes_on(place):
    stopped_after(7)
    Path("moved").mkdir()
    for name in ("model", "chats.jsonl"):
        Path(name).rename(f"moved/{name}")
    engine = Scripted()
    generate_data(settings(model="moved/model", data="moved/chats.jsonl", batch_size=1), engine=engine)
    assert len(engine.asked) == 11


def test_two_runs_on_one_output(place):
    def before(number):
        if number == 3:
            with pytest.raises(ValueError, match=r"another stm generate works on out\.jsonl"):
                generate_data(settings(again=True), engine=Scripted())

    generate_data(settings(), engine=Scripted(before=before))
    assert len(samples_in()) == 18


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


ARGUMENTS = [
    *("generate", "--method", "self-output", "--model", "model", "--data", "chats.jsonl", "--output", "out.jsonl"),
    *("--samples", "24", "--temperature", "1", "--max-new-tokens", "48", "--batch-size", "4"),
    *("--verifier", "judge:even"),
]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_goes_on_where_it_was_stopped(how, place, capsys):
    script = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "import time\nfrom stm_plugin.generation.samples import SamplesFile\nadd = SamplesFile.add\n"
    script += "def add_twelve(self, sample):\n    add(self, sample)\n"
    script += "    if len(self.samples) == 12: time.sleep(600)\n"  # so that it is in the middle of it
    script += "SamplesFile.add = add_twelve\n"
    script += "from stm_plugin.cli import main\nsys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *ARGUMENTS],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = Path("out.samples.jsonl")
    try:
        wait_for(lambda: process.poll() is not None or (path.exists() and path.read_bytes().count(b'"text"') >= 8))
        assert process.poll() is None, process.stderr.read()
        assert stm(ARGUMENTS) == 1
        assert "another stm generate works on out.jsonl" in capsys.readouterr().err
        process.send_signal(how)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "Stopped. What has been generated stays; start again to go on."
        assert "Traceback" not in errors
    whole = path.read_bytes().rpartition(b"\n")[0].decode()
    kept = {(r["row"], r["sample"]): r["text"] for r in map(json.loads, whole.splitlines()) if "text" in r}
    assert 8 <= len(kept) < 144
    assert stm(ARGUMENTS) == 0
    printed = capsys.readouterr()
    assert f"{len(kept)} of 144 samples are there already." in printed.err
    assert " of 144 pass (" in printed.out
    samples = {(sample["row"], sample["sample"]): sample["text"] for sample in samples_in()}
    assert len(samples) == len(samples_in()) == 144
    assert kept.items() <= samples.items()


# Requests without an answer.


def test_requests_without_an_answer_are_asked_again(place, capsys, monkeypatch):
    answers = {(1, 0): ("500: busy", ERROR), (3, 2): ("refused", ERROR)}
    receipt = generate_data(settings(), engine=Scripted(answers))
    assert receipt["samples"]["without_an_answer"] == {"500: busy": 1, "refused": 1}
    assert receipt["samples"]["refused"] == 0
    assert receipt["samples"]["generated"] == 16
    assert len(rows_of("out.jsonl")) == 6
    engine = Scripted()
    receipt = generate_data(settings(), engine=engine)
    assert engine.asked == [(1, 0), (3, 2)]
    assert receipt["samples"]["without_an_answer"] == {}
    assert len(samples_in()) == 18


class Completions(BaseHTTPRequestHandler):
    """Chat completions over HTTP: as many answers as the server has `left`, then 500."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((asked, self.headers["Authorization"]))
            refused = asked["messages"][-1]["content"] in self.server.too_long
            fine = self.server.left > 0 and not refused
            self.server.left -= 1
            text = self.server.text or f"reply {self.server.left}"
        message = {"role": "assistant", "content": text}
        body = {"error": {"message": "too long" if refused else "no memory"}}
        if fine:
            usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
            body["choices"] = choices
        content = json.dumps(body).encode()
        self.send_response(200 if fine else 400 if refused else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving(left):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.lock, server.asked, server.left, server.text, server.too_long = threading.Lock(), [], left, None, ()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server():
    with serving(left=1000) as server:
        yield server


def test_a_server_that_fails_in_the_middle_and_is_started_again(place, capsys, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed")
    monkeypatch.setenv("MY_KEY", "secret")
    arguments = [*ARGUMENTS[:9], "--samples", "10", "--max-new-tokens", "16", "--verifier", "judge:anything"]
    arguments += ["--concurrency", "2", "--max-retries", "0", "--api-key-env", "MY_KEY"]
    with serving(left=10) as failing:
        arguments += ["--endpoint", f"http://127.0.0.1:{failing.server_port}/v1", "--endpoint-model", "its-name"]
        assert stm(arguments) == 1
    error = capsys.readouterr().err
    assert "requests in a row got no answer, the last because: 500: no memory" in error
    num_kept = int(re.search(r"(\d+) of 60 samples are kept", error)[1])
    assert num_kept in (9, 10)  # one answer may be on its way when the run ends
    assert len(failing.asked) < 60
    with serving(left=1000) as started_again:
        assert stm([*arguments, "--endpoint", f"http://127.0.0.1:{started_again.server_port}/v1"]) == 0
    assert len(started_again.asked) == 60 - num_kept
    assert {(asked["model"], asked["max_tokens"], key) for asked, key in failing.asked + started_again.asked} == {
        ("its-name", 16, "Bearer secret")
    }
    assert len({sample["text"] for sample in samples_in()}) == 60
    receipt = json.loads(Path("out.receipt.json").read_text())
    assert receipt["tokens_generated"] == 300
    assert receipt["settings"]["engine"] == "endpoint"
    assert "secret" not in Path("out.receipt.json").read_text() + Path("out.samples.jsonl").read_text()


def test_the_command_says_what_got_no_answer(place, capsys, monkeypatch):
    monkeypatch.setattr(run._Run, "_engine", lambda self: Scripted({(1, 0): ("500: busy", ERROR)}))
    arguments = [*ARGUMENTS[:9], "--samples", "2", "--verifier", "judge:anything"]
    assert stm(arguments) == 1
    assert "stm: 1 requests got no answer: 500: busy" in capsys.readouterr().err
    assert len(rows_of("out.jsonl")) == 6


def test_a_server_that_draws_nothing_is_told(server, place, capsys):
    pytest.importorskip("openai", reason="openai is not installed")
    server.text = "always the same"
    arguments = [*ARGUMENTS[:9], "--samples", "3", "--max-new-tokens", "16", "--verifier", "judge:anything"]
    arguments += ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1"]
    assert stm(arguments) == 0
    assert "the samples of 6 rows are all the same, as if nothing was drawn" in capsys.readouterr().err
    assert json.loads(Path("out.receipt.json").read_text())["rows"]["of_equal_samples"] == 6
    server.text = None
    assert stm([*arguments, "--again"]) == 0
    assert "all the same" not in capsys.readouterr().err


def test_a_server_that_is_gone_ends_the_run(place):
    gone = {(row, sample): ("connection refused", ERROR) for row in range(1, 6) for sample in range(10)}
    engine = Scripted(gone)
    message = r"(?s)2\d requests in a row got no answer, .*connection refused.*10 of 60 samples are kept.*start again"
    with pytest.raises(EngineError, match=message):
        generate_data(settings(samples=10), engine=engine)
    assert len(engine.asked) == 10 + 21  # the twenty-first is the first of a third row
    assert engine.closed == 1
    assert not Path("out.jsonl").exists()
    engine = Scripted()
    generate_data(settings(samples=10), engine=engine)
    assert len(engine.asked) == 50


def test_prompts_that_are_too_long_do_not_end_the_run(place):
    too_long = {(row, sample): ("400: too long", ERROR) for row in (1, 2) for sample in range(25)}
    receipt = generate_data(settings(samples=25), engine=Scripted(too_long))
    assert receipt["samples"]["without_an_answer"] == {"400: too long": 50}
    assert [row["stm_source"] == "ground-truth" for row in rows_of("out.jsonl")] == [False, True, True] + [False] * 3


def test_requests_that_are_refused_do_not_end_the_run(place):
    """Not even where a start has nothing else to ask for."""
    refused = {(row, sample): ("400: too long", REFUSED) for row in (1, 3, 4) for sample in range(10)}
    for asked in (60, 30, 30):
        engine = Scripted(refused)
        receipt = generate_data(settings(samples=10), engine=engine)
        assert len(engine.asked) == asked
        assert receipt["samples"]["without_an_answer"] == {"400: too long": 30}
        assert receipt["samples"]["refused"] == 30
        assert len(rows_of("out.jsonl")) == 6


def test_refused_requests_do_not_hide_that_the_server_is_gone(place):
    answers = {(row, sample): ("too long", REFUSED) for row in (0, 1) for sample in range(10)}
    answers |= {(row, sample): ("gone", ERROR) for row in range(2, 6) for sample in range(10)}
    with pytest.raises(EngineError, match="21 requests in a row got no answer, the last because: gone"):
        generate_data(settings(samples=10), engine=Scripted(answers))


def test_a_server_that_refuses_some_rows(server, place, capsys):
    pytest.importorskip("openai", reason="openai is not installed")
    server.too_long = [rows_of("chats.jsonl")[index]["messages"][-2]["content"] for index in (0, 2, 3)]
    arguments = [*ARGUMENTS[:9], "--samples", "10", "--max-new-tokens", "16", "--verifier", "judge:anything"]
    arguments += ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1"]
    for asked in (60, 90):
        assert stm(arguments) == 1
        assert "stm: 30 requests got no answer: 400: too long" in capsys.readouterr().err
        assert len(server.asked) == asked
        sources = [row["stm_source"] for row in rows_of("out.jsonl")]
        assert [source == "ground-truth" for source in sources] == [True, False, True, True, False, False]


KEY = "sk-" + "a1B2" * 8


def test_openais_key_is_for_openai_alone(monkeypatch):
    from stm_plugin.generation.access import find_key

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MINE", "mine")
    monkeypatch.setenv("BLANK", " ")
    for url in ("https://api.openai.com/v1", "https://eu.API.openai.com:443/v1", "https://openai.com"):
        assert find_key(url, None) == KEY
    for url in (
        *("http://localhost:8000/v1", "https://api.openai.com.example.org/v1", "https://notopenai.com/v1"),
        *("https://example.org/openai.com", "https://example.org?openai.com"),
    ):
        assert find_key(url, None) is None
        assert find_key(url, "OPENAI_API_KEY") == KEY
        assert find_key(url, "MINE") == "mine"
    for name in ("NONE_SUCH", "BLANK"):
        with pytest.raises(ValueError, match=f"--api-key-env {name}: this environment variable is not set, or empty"):
            find_key("https://api.openai.com/v1", name)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert find_key("https://api.openai.com/v1", None) is None


def test_the_key_goes_where_it_is_wanted_and_nowhere_else(server, place, capsys, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    arguments = [*ARGUMENTS[:9], "--samples", "1", "--max-new-tokens", "16", "--verifier", "judge:anything"]
    arguments += ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1"]
    assert stm([*arguments, "--api-key-env", "NONE_SUCH"]) == 1
    assert "--api-key-env NONE_SUCH: this environment variable is not set" in capsys.readouterr().err
    assert server.asked == []
    assert "perplexity" not in Path("out.samples.jsonl").read_text()  # told before anything is scored
    assert stm(arguments) == 0
    assert not any(KEY in authorization for _, authorization in server.asked)
    server.asked.clear()
    assert stm([*arguments, "--again", "--api-key-env", "OPENAI_API_KEY"]) == 0
    assert {authorization for _, authorization in server.asked} == {f"Bearer {KEY}"}
    assert KEY not in "".join(path.read_text() for path in Path().glob("out*"))


def test_a_url_with_a_password_is_refused_without_repeating_it():
    for url in (
        *("http://me:pa55@host:1/v1", "https://pa55@host/v1", "me:pa55@host/v1", "http://me:pa55@[::1/v1"),
        "http://me:pa55/@host/v1",
    ):
        with pytest.raises(ValueError, match="URL") as caught:
            settings(endpoint=Endpoint(url))
        assert "pa55" not in str(caught.value)
    with pytest.raises(ValueError, match=r"must not have a name or a password.*--api-key-env"):
        settings(endpoint=Endpoint("http://me:pa55@host:1/v1"))
    settings(endpoint=Endpoint("http://host/@cf/v1"))


def test_failures_with_answers_between_them_do_not_end_the_run(place):
    every_other = {(row, sample): ("busy", ERROR) for row in range(6) for sample in range(0, 10, 2)}
    receipt = generate_data(settings(samples=10), engine=Scripted(every_other))
    assert receipt["samples"]["without_an_answer"] == {"busy": 30}


def test_no_answer_at_all_is_an_error(place):
    nothing = {(row, sample): ("prompt too long", ERROR) for row in range(6) for sample in range(3)}
    with pytest.raises(EngineError, match=r"no request got an answer: prompt too long \(18 times\)"):
        generate_data(settings(), engine=Scripted(nothing))
    assert not Path("out.jsonl").exists()


def test_what_an_engine_leaves_out_is_told(place):
    class Lazy(Scripted):
        def generate(self, requests):
            return super().generate(requests[:-2])

    receipt = generate_data(settings(), engine=Lazy())
    assert receipt["samples"]["without_an_answer"] == {"the engine left it out": 2}


# Data.

CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


def test_data_in_parquet_and_in_a_saved_folder(place):
    rows = rows_of("chats.jsonl")
    Dataset.from_list(rows).to_parquet("chats.parquet")
    Dataset.from_list(rows).save_to_disk("saved")
    for name in ("chats.parquet", "saved"):
        assert read_data(name) == rows
        assert read_data(name, 2) == rows[:2]
    assert rows_digest(rows, "x") == rows_digest([dict(reversed(row.items())) for row in rows], "x")
    assert rows_digest(rows, "x") != rows_digest(rows[::-1], "x")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "x, row 0: needs `messages`, or `prompt` and `completion`"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "row 0: `messages` must be a request and end with"),
        ([CHAT, {"messages": []}], "row 1: `messages` must"),
        (
            [{"messages": [], "prompt": "x", "completion": "y"}],
            "x, row 0 has `messages` and also prompt and completion: only one of them would get the new answer",
        ),
        ([{"prompt": "x", "completion": "y"}], "x, row 0: `prompt` and `completion` are plain text.*Give `messages`"),
        ([CHAT, CHAT | {"tools": [{"type": "function"}]}], "x, row 1: the column 'tools' is not supported"),
        ([CHAT, CHAT | {"chat_template_kwargs": "no"}], "row 1: 'chat_template_kwargs' must be a mapping"),
        (
            [CHAT, CHAT | {"chat_template_kwargs": {"enable_thinking": False}}],
            r"the same keys in 'chat_template_kwargs', .*row 0 has \[\], row 1 has \['enable_thinking'\]",
        ),
        ([{"prompt": [], "completion": [{"role": "assistant", "content": "y"}]}], "row 0: a request and an answer"),
        (
            [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "tool", "content": "y"}]}],
            "row 0: the last message must be the assistant's",
        ),
        (
            [CHAT, {"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}],
            "row 1: the last message must be the assistant's, with text",
        ),
        (
            [{"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, CHAT],
            "x: all rows must have one form; row 0 has prompt and completion, row 1 has messages",
        ),
    ],
)
def test_data_of_another_form_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        problems_of(rows, "x")


def test_columns_that_say_nothing_are_no_fault():
    assert problems_of([CHAT | {"tools": None, "chat_template_kwargs": None}], "x")[0].answer == "y"
    assert problems_of([CHAT | {"tools": [], "chat_template_kwargs": {}}], "x")[0].answer == "y"


def test_data_that_is_not_there(place):
    with pytest.raises(ValueError, match=r"--data none.jsonl: no such file"):
        read_data("none.jsonl")
    with pytest.raises(ValueError, match=r"--data some/where: give a .jsonl file"):
        read_data("some/where")
    with pytest.raises(ValueError, match="row 0: JSON lines cannot hold it"):
        rows_digest([{"x": b"bytes"}], "x")
    with pytest.raises(ValueError, match="row 0: JSON lines cannot hold it"):
        rows_digest([{"x": "\ud800"}], "x")


def test_the_row_itself_stays_as_it_is():
    question = {"role": "user", "content": "q", "name": "n"}
    human = {"role": "assistant", "content": "a", "reasoning_content": "r", "thinking": "t", "tool_calls": [1]}
    row = {"messages": [question, human], "x": 1}
    before = json.dumps(row)
    assert with_answer(row, "b", "self-output") == {
        "messages": [question, {"role": "assistant", "content": "b"}],
        "x": 1,
        "stm_source": "self-output",
    }
    assert json.dumps(row) == before


def test_human_reasoning_goes_with_the_human_answer_only(place):
    rows = rows_of("chats.jsonl")
    for row in rows:
        row["messages"][-1]["reasoning_content"] = "as people think"
    write_rows(rows, Path("chats.jsonl"))
    generate_data(settings(samples=1, verifier="judge:good"), engine=Scripted({(2, 0): "a good one"}))
    written = rows_of("out.jsonl")
    assert written[2]["messages"][-1] == {"role": "assistant", "content": "a good one"}
    assert [row["messages"] for row in written[:2] + written[3:]] == [row["messages"] for row in rows[:2] + rows[3:]]


def test_rows_without_a_verifiers_form_are_refused_before_anything_is_generated(place):
    with pytest.raises(ValueError, match="verifier"):
        generate_data(settings(verifier=None), engine=Scripted(before=pytest.fail))
    assert not Path("out.samples.jsonl").exists()


# Prompts.


def test_template():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {answer}?"}]
    asked = rephrase_messages(REPHRASE_TEMPLATE, messages, "It is {instruction}.", "row 0")
    assert asked[0] == messages[0]
    assert "### Task\nWhat is {answer}?\n" in asked[1]["content"]
    assert "### Correct answer\nIt is {instruction}.\n" in asked[1]["content"]
    with pytest.raises(ValueError, match="row 3: to be rephrased, an answer must follow a user's message"):
        rephrase_messages(REPHRASE_TEMPLATE, messages[:1], "a", "row 3")


def test_template_files(tmp_path):
    assert read_template(None) == REPHRASE_TEMPLATE
    (tmp_path / "t").write_text("only {instruction}")
    with pytest.raises(ValueError, match=r"t: lacks \{answer\}; it needs \{instruction\} where"):
        read_template(tmp_path / "t")
    with pytest.raises(ValueError, match="none: cannot be read"):
        read_template(tmp_path / "none")


# Options.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "x"}, "--method must be one of self-output, rephrase, got 'x'"),
        ({"rejected": "x"}, "--rejected must be one of ground-truth, drop"),
        ({"template": Path("t")}, "--template is for --method rephrase"),
        ({"output": Path("out.json")}, "--output must end in .jsonl"),
        ({"samples": 0}, "--samples must be a whole number of at least 1, got 0"),
        ({"rows": 0}, "--rows must be"),
        ({"batch_size": -1}, "--batch-size must be"),
        ({"sampling": Sampling(temperature=-1)}, "--temperature must be 0 or more, got -1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "--temperature must be"),
        ({"sampling": Sampling(temperature=0)}, "all 3 samples of a row would be the same"),
        ({"sampling": Sampling(top_p=0)}, "--top-p must be more than 0 and at most 1"),
        ({"sampling": Sampling(max_new_tokens=0)}, "--max-new-tokens must be"),
        ({"sampling": Sampling(seed=-1)}, "--seed must be 0 or more"),
        ({"endpoint": Endpoint("http://x", concurrency=0)}, "--concurrency must be"),
        ({"endpoint": Endpoint("http://x", timeout=0)}, "--timeout must be more than 0 seconds"),
        ({"endpoint": Endpoint("http://x", max_retries=-1)}, "--max-retries must be 0 or more"),
    ],
)
def test_values_that_are_not_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_data_and_other_files_are_not_written_over(place):
    with pytest.raises(ValueError, match=r"--output .*chats.jsonl is the data itself"):
        settings(output=place / "chats.jsonl")
    Path("out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"out.jsonl is there already, without out.samples.jsonl"):
        generate_data(settings(), engine=Scripted(before=pytest.fail))
    assert Path("out.jsonl").read_text() == "mine"


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.settings_of(parser.parse_args([*ARGUMENTS[1:9], *arguments]))


def test_flags():
    assert parsed() == GenerateSettings("self-output", "model", "chats.jsonl", Path("out.jsonl"))
    assert parsed().num_samples == 32
    assert parsed().sampling == Sampling(0.7, 0.95, 512, 0)
    server = parsed("--endpoint", "http://x/v1", "--endpoint-model", "m", "--concurrency", "2", "--timeout", "3")
    assert server.endpoint == Endpoint("http://x/v1", "m", 2, 3.0)
    assert parsed("--chat-template-kwargs", '{"a": false}').chat_template_kwargs == {"a": False}
    with pytest.raises(SystemExit):
        parsed("--chat-template-kwargs", "[1]")
    with pytest.raises(ValueError, match="--endpoint-model, --max-retries: of no use without --endpoint URL"):
        parsed("--endpoint-model", "m", "--max-retries", "2")


def test_bad_flags_are_told_without_a_traceback(place, capsys):
    assert stm([*ARGUMENTS, "--top-p", "2"]) == 1
    assert capsys.readouterr().err == "stm: --top-p must be more than 0 and at most 1, got 2.0.\n"


def test_progress_line(tmp_path):
    file = SamplesFile(tmp_path / "x.samples.jsonl", {})
    file.add(Sample(0, 0, "a", 1, STOP))
    progress = Progress(file, 2, 10, pytest.fail)
    for key in ((0, 1), (1, 0), (1, 1), (2, 0)):
        file.add(Sample(*key, "a", 1, STOP))
    file.judge([Sample(0, 0, "a", 1, STOP, "passed", 1.0), Sample(0, 1, "a", 1, STOP, "wrong", 1.0)])
    # 4 samples in 30 s are 4 problems' halves a minute; 15 samples are left
    assert progress.line(30) == "2 of 10 problems, 4 a minute, about 2 min left; 50.0% of the samples pass"
    file.close()


def test_progress_of_batches(tmp_path, monkeypatch):
    """Four samples come at once, every 100 seconds; none of the next batch counts before all of it do."""
    clock, lines = [0.0], []
    monkeypatch.setattr("stm_plugin.generation.progress.time.monotonic", lambda: clock[0])
    file = SamplesFile(tmp_path / "x.samples.jsonl", {})
    progress = Progress(file, 2, 8, lines.append)
    for number in range(12):
        clock[0] += 0 if number % 4 else 100
        progress.tell()
        file.add(Sample(*divmod(number, 2), "a", 1, STOP))
    assert lines == [
        "0 of 8 problems",
        "2 of 8 problems, 1.2 a minute, about 5 min left",
        "4 of 8 problems, 1.2 a minute, about 3 min left",
    ]
    file.close()

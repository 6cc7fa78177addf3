"""lm-eval on models: against plain loops of one's own, and what is written, left as it was, or refused."""

import copy
import json
import logging
import os
import random
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("lm_eval", reason="lm_eval, of the extra 'forgetting', is not installed")

import numpy as np
import torch

from stm_plugin.forgetting import harness
from stm_plugin.forgetting.evaluation import evaluation_of, read_evaluation
from stm_plugin.forgetting.harness import evaluate

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

ARC = [
    {
        "id": str(number),
        "question": f"What is {number} plus {number}?",
        "choices": {"text": ["a long answer", "an int", f"{2 * number}", "nothing"], "label": list("ABCD")},
        "answerKey": "ABCD"[number % 4],
    }
    for number in range(9)
]
GSM8K = [
    {
        "messages": [{"role": "user", "content": f"Add {number} and 1{' please' * number}."}],
        "answer": f"#### {number + 1}",
    }
    for number in range(5)
]


@pytest.fixture
def rows(tmp_path):
    """Files of a few made-up rows."""

    def write(name, lines):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    return {"arc": f"arc_challenge={write('arc', ARC)}", "gsm8k": f"gsm8k={write('gsm8k', GSM8K)}"}


def naive_arc(model, tokenizer, questions, templated):
    """For each question the likeliest choice, and the likeliest by characters: one forward a choice, unpadded.

    White space that ends the context, a chat template's newline, counts as the choice's: lm-eval's way.
    """
    picked = []
    for row in questions:
        text, gap = f"Question: {row['question']}\nAnswer:", " "
        if templated:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            gap = ""
        scores = []
        for choice in row["choices"]["text"]:
            context = len(tokenizer(text.rstrip())["input_ids"])
            ids = tokenizer(text + gap + choice)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(context, len(ids))))
        lengths = [len(choice) for choice in row["choices"]["text"]]
        picked.append((int(np.argmax(scores)), int(np.argmax(np.array(scores) / lengths)), scores))
    return picked


def compare_with_naive(results, questions, picked):
    samples = results["samples"]["arc_challenge"]
    assert [sample["doc"]["id"] for sample in samples] == [row["id"] for row in questions]
    gold = [row["choices"]["label"].index(row["answerKey"]) for row in questions]
    for sample, target, (likeliest, by_length, scores) in zip(samples, gold, picked, strict=True):
        logged = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(logged, scores, atol=2e-3)
        assert int(np.argmax(logged)) == likeliest
        assert sample["acc"] == float(likeliest == target)
        assert sample["acc_norm"] == float(by_length == target)
    scores = results["results"]["arc_challenge"]
    assert scores["acc,none"] == pytest.approx(np.mean([pick[0] == g for pick, g in zip(picked, gold, strict=True)]))
    assert scores["acc_norm,none"] == pytest.approx(np.mean([p[1] == g for p, g in zip(picked, gold, strict=True)]))


@pytest.mark.parametrize("templated", [True, False], ids=["chat", "text"])
def test_arc_equals_a_plain_loop(make_model, tokenizer, rows, templated):
    model = make_model()
    results = evaluate(model, [rows["arc"]], tokenizer=tokenizer, batch_size=5, apply_chat_template=templated)
    compare_with_naive(results, ARC, naive_arc(model, tokenizer, ARC, templated))


def test_the_chat_template_is_given_what_it_asks_for(make_model, tokenizer, rows, tmp_path):
    model, asking = make_model(), copy.deepcopy(tokenizer)
    asking.chat_template += "{{ mood }}"
    plain, calm = (
        evaluate(
            model,
            [rows["arc"], rows["gsm8k"]],
            tokenizer=asking,
            output=tmp_path / str(kwargs),
            max_new_tokens=3,
            chat_template_kwargs=kwargs,
        )
        for kwargs in (None, {"mood": "calm, and glad"})
    )
    asking.chat_template = asking.chat_template.replace("{{ mood }}", "calm, and glad")
    compare_with_naive(calm, ARC, naive_arc(model, asking, ARC, templated=True))
    for before, after in zip(plain["samples"]["gsm8k"], calm["samples"]["gsm8k"], strict=True):
        assert after["arguments"][0][0] == before["arguments"][0][0] + "calm, and glad"
    assert read_evaluation(tmp_path / str({"mood": "calm, and glad"})).model == evaluation_of(plain).model


@pytest.mark.slow
def test_smollm2s_arc_equals_a_plain_loop():
    """40 questions of ARC-Challenge, float32, the model's own chat template."""
    file = SHARED_DATA / "arc_challenge.jsonl"
    if not file.exists():
        pytest.skip(f"needs {file}")
    pytest.importorskip("gguf", reason="gguf, which reads the packaged SmolLM2, is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stm_plugin.demo.model import find_model

    os.environ.pop("STM_HOME")  # this test's own; the model is in the real cache
    torch.set_num_threads(os.cpu_count() or 1)
    path = find_model().path
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:40]]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    results = evaluate(str(path), [f"arc_challenge={file}"], limit=40, batch_size=16, dtype="float32")
    compare_with_naive(results, questions, naive_arc(model, tokenizer, questions, templated=True))


def test_answers_are_greedy_and_files_are_lm_evals(make_model, tokenizer, rows, tmp_path):
    model = make_model()
    output = tmp_path / "results"
    results = evaluate(
        model,
        [rows["arc"], rows["gsm8k"]],
        tokenizer=tokenizer,
        output=output,
        batch_size=3,
        max_new_tokens=7,
    )
    for sample, row in zip(results["samples"]["gsm8k"], GSM8K, strict=False):
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for _ in range(7):  # greedy by hand, unpadded
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        assert sample["arguments"][0][0] == prompt
        whole = tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert sample["resps"][0][0] == whole
    assert [path.name.split("_2")[0] for path in sorted(output.rglob("*.*"))] == [
        "results",
        "samples_arc_challenge",
        "samples_gsm8k",
    ]
    read, made = read_evaluation(output), evaluation_of(results)
    assert read.tasks.keys() == made.tasks.keys() == {"arc_challenge", "gsm8k"}
    for task in read.tasks:
        assert read.tasks[task].samples == made.tasks[task].samples
        assert len(read.tasks[task].samples) == {"arc_challenge": 9, "gsm8k": 5}[task]
        assert read.tasks[task] == made.tasks[task]
    for path in output.rglob("*.json*"):
        assert "NaN" not in path.read_text(encoding="utf-8")
        assert " at 0x" not in path.read_text(encoding="utf-8")


def test_nothing_of_the_callers_changes(make_model, tokenizer, rows, caplog):
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        evaluate(model, [rows["gsm8k"]], tokenizer=bare, max_new_tokens=2)
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == before
    assert [module.training for module in model.modules()] == modes
    assert bare.pad_token is None
    assert logging.getLogger("lm_eval").level == logging.WARNING
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def test_a_prompt_that_is_cut_is_told(make_model, tokenizer, rows, caplog):
    evaluate(make_model(max_position_embeddings=32), [rows["gsm8k"]], tokenizer=tokenizer, max_new_tokens=8)
    assert "Left truncation applied" in caplog.text


def test_an_adapter_by_whatever_way(make_model, tokenizer, rows, tmp_path):
    """As `adapter=`, as the model's folder, and in memory: the same; and not as its base."""
    from peft import LoraConfig, get_peft_model

    base = make_model()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")

    def logged(model, **options):
        results = evaluate(model, [rows["arc"]], output=tmp_path / "out", device="cpu", **options)
        samples = results["samples"]["arc_challenge"]
        return results, [float(response[0][0]) for sample in samples for response in sample["resps"]]

    results, from_folder = logged(tmp_path / "adapter")
    assert results["model_name"] == str(tmp_path / "adapter")
    _, given = logged(str(tmp_path / "base"), adapter=tmp_path / "adapter")
    _, in_memory = logged(tuned, tokenizer=tokenizer)
    assert from_folder == given
    np.testing.assert_allclose(from_folder, in_memory, atol=1e-5)
    _, initial = logged(str(tmp_path / "base"))
    assert np.abs(np.subtract(initial, given)).max() > 0.1
    _, in_bfloat16 = logged(str(tmp_path / "base"), dtype="bfloat16")
    np.testing.assert_allclose(initial, in_bfloat16, atol=1.0)
    assert initial != in_bfloat16


def test_a_base_in_4_bits(make_model, tokenizer, rows, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra 'qlora', is not installed")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    four = evaluate(tmp_path / "base", [rows["arc"]], load_in_4bit=True, dtype="float32", device="cpu")
    whole = evaluate(tmp_path / "base", [rows["arc"]], dtype="float32", device="cpu")
    first = [float(results["samples"]["arc_challenge"][0]["resps"][0][0][0]) for results in (four, whole)]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], abs=5)


def test_limits(make_model, tokenizer, rows):
    model = make_model()

    def counts(limit):
        results = evaluate(model, [rows["arc"], rows["gsm8k"]], tokenizer=tokenizer, limit=limit, max_new_tokens=1)
        assert {task: count["effective"] for task, count in results["n-samples"].items()} == {
            task: len({sample["doc_id"] for sample in samples}) for task, samples in results["samples"].items()
        }
        return {task: count["effective"] for task, count in results["n-samples"].items()}

    assert counts(2) == {"arc_challenge": 2, "gsm8k": 2}
    assert counts({"gsm8k": 3}) == {"arc_challenge": 9, "gsm8k": 3}
    assert counts({"gsm8k": 300, "arc_challenge": 1}) == {"arc_challenge": 1, "gsm8k": 5}
    with pytest.raises(ValueError, match="limit names the task 'mbpp'; the tasks are arc_challenge, gsm8k"):
        counts({"mbpp": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "there is no task to evaluate"),
        ({"limit": 0}, "limit must be a whole number, at least 1, got 0"),
        ({"limit": {"arc_challenge": 0.5}}, "limit of arc_challenge must be a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"output": Path("results.json")}, "output is a folder"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"adapter": "somewhere"}, "evaluated as it stands"),
        ({"load_in_4bit": True}, "evaluated as it stands"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "apply_chat_template": False},
            "chat_template_kwargs {'enable_thinking': False} are for a chat template, and prompts are plain text here",
        ),
        ({"tasks": ["twice:arc_challenge=ARC", "twice:arc_challenge=ARC"]}, "two tasks are named twice"),
    ],
)
def test_refusals(make_model, tokenizer, rows, options, message):
    options = {"tasks": [rows["arc"]], "tokenizer": tokenizer} | options
    options["tasks"] = [text.replace("ARC", rows["arc"].partition("=")[2]) for text in options["tasks"]]
    with pytest.raises(ValueError, match=message):
        evaluate(make_model(), **options)


def test_a_model_that_is_nowhere(rows):
    with pytest.raises(ValueError, match="the model no/where cannot be loaded from a folder or the hub"):
        evaluate("no/where", [rows["arc"]])


def test_without_lm_eval(rows, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'lm_eval is not installed.*pip install "stm-plugin\[forgetting\]"'):
        evaluate("no/where", [rows["arc"]])


def test_files_that_cannot_be_written_are_an_error(make_model, tokenizer, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", _full_disk)
    with pytest.raises(OSError, match="could not write"):
        harness._save(_tracker(tmp_path), {"samples": {}, "model_name_sanitized": "None"}, tmp_path)


def _full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def _tracker(folder):
    from lm_eval.loggers import EvaluationTracker

    return EvaluationTracker(output_path=str(folder))


# Tasks of lm-eval.


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def known(manager, monkeypatch):
    """lm-eval's own definitions, which take seconds to read, read once."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)


@pytest.mark.parametrize("name", ["mbpp", "mbpp_instruct", "humaneval"])
def test_tasks_that_run_code_in_process_are_refused(known, name):
    with pytest.raises(ValueError, match=f"task '{name}' runs code that the model writes without containing it"):
        evaluate("no/where", [name], run_model_code=True)


def test_unknown_tasks_are_refused(known):
    with pytest.raises(ValueError, match=r"lm-eval has no task 'arc_chalenge'; did you mean .*arc_challenge"):
        evaluate("no/where", ["arc_chalenge"])


def test_a_hub_that_cannot_be_reached(known, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)lm-eval's task 'gsm8k' could not be loaded: .*KIND=FILE.jsonl"):
        evaluate("no/where", ["gsm8k"])

"""`stm measure`: tables, JSON and plots of each measure, and what it refuses."""

import argparse
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stm_plugin.answers import greedy_answers
from stm_plugin.demo.prompts import GENERAL_PROMPTS
from stm_plugin.measures import command
from stm_plugin.measures.diversity import sample_answers
from stm_plugin.measures.drift import measure_drift
from stm_plugin.measures.inputs import read_samples
from stm_plugin.measures.perplexity import measure_perplexity

PNG = b"\x89PNG\r\n\x1a\n"


def measure(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([*map(str, arguments)]))


@pytest.fixture
def place(tmp_path, make_model, tokenizer, chats, monkeypatch):
    """A working folder with two models, an adapter on the first, prompts, chats and samples."""
    for name, seed in (("initial", 0), ("tuned", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "initial")
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = get_peft_model(base, config)
    adapter.peft_config["default"].base_model_name_or_path = "initial"
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("Add 1 and 2.\n\nWhat is | France?\nSort it.\n", encoding="utf-8")
    for name, rows in (("chats", chats[:4]), ("others", chats[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text('["a b c d", "a b c d"]\n{"samples": ["e f", "e f", "e f"]}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(printed: str) -> list[list[str]]:
    """The cells of a printed table, head first."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns must be aligned"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:1] + lines[2:]]


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_drift(tuned, place, tokenizer, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flags = ["--initial", "initial", "--tuned", tuned, "--prompts", "prompts.txt", "--max-new-tokens", "9"]
    assert measure("drift", *flags, "--json", "out/drift.json", "--png", "out/drift.png") == 0
    initial, other = (AutoModelForCausalLM.from_pretrained("initial") for _ in range(2))
    other = PeftModel.from_pretrained(other, "adapter") if tuned == "adapter" else None
    other = other or AutoModelForCausalLM.from_pretrained("tuned")
    prompts = ["Add 1 and 2.", "What is | France?", "Sort it."]
    expected = measure_drift(initial, other, greedy_answers(initial, tokenizer, prompts, 9))
    facts = json.loads((place / "out" / "drift.json").read_text())
    assert facts["nats_per_token"] == pytest.approx(expected.mean, rel=1e-6)
    assert facts["nats_per_token"] > 0.01
    assert [row["prompt"] for row in facts["prompts"]] == prompts
    assert facts["answer_tokens"] == expected.num_tokens == sum(row["answer_tokens"] for row in facts["prompts"])
    low, high = facts["interval_95"]
    assert low < facts["nats_per_token"] < high
    assert (place / "out" / "drift.png").read_bytes().startswith(PNG)
    _, row = cells(capsys.readouterr().out)
    assert row[:3] == [tuned, "initial", f"{expected.mean:.4g}"]


def test_drift_of_a_model_with_itself_on_the_default_prompts(place, capsys):
    assert measure("drift", "--initial", "initial", "--tuned", "initial", "--max-new-tokens", "1", "--json", "o") == 0
    facts = json.loads((place / "o").read_text())
    assert [row["prompt"] for row in facts["prompts"]] == list(GENERAL_PROMPTS)
    assert facts["nats_per_token"] == 0
    assert facts["interval_95"] == [0, 0]


def test_drift_of_an_adapter_from_the_model_that_it_names(place, capsys):
    values = []
    for initial in ([], ["--initial", "initial"]):
        flags = ["--tuned", "adapter", "--prompts", "prompts.txt", "--max-new-tokens", "3", "--json", "o"]
        assert measure("drift", *flags, *initial) == 0
        facts = json.loads((place / "o").read_text())
        values.append((facts["nats_per_token"], facts["initial"]))
    assert values[0] == values[1]
    assert values[0][1] == "initial"
    assert values[0][0] > 0.01
    with pytest.raises(ValueError, match=r"tuned is no adapter .* name the model with --initial"):
        measure("drift", "--tuned", "tuned")


def test_prompts_of_every_form(place, capsys):
    rows = [
        {"prompt": "Sort it."},
        {"prompt": [{"role": "user", "content": "Sort it."}]},
        {"messages": [{"role": "user", "content": "Sort it."}, {"role": "assistant", "content": "No."}]},
        {"messages": [{"role": "user", "content": "Sort it."}]},
    ]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--initial", "initial", "--tuned", "tuned", "--max-new-tokens", "3", "--json", "o"]
    assert measure("drift", *flags, "--prompts", "p.jsonl") == 0
    values = {row["nats_per_token"] for row in json.loads((place / "o").read_text())["prompts"]}
    assert max(values) == pytest.approx(min(values), rel=1e-6)


@pytest.fixture
def templated(place, tokenizer):
    """Prompts whose chat template is given something, as rows and as they are written; what reads them as they are."""
    ending = "{{ mood }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    asking = copy.deepcopy(tokenizer)
    asking.chat_template += ending
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for name in ("initial", "tuned"):
        asking.save_pretrained(name)
    rows = [
        {"prompt": "Sort it.", "chat_template_kwargs": {"mood": "glad"}},
        {"messages": [{"role": "user", "content": "Add 1 and 2."}], "tools": [{"name": "abacus"}]},
        {"prompt": [{"role": "user", "content": "Sort it."}], "chat_template_kwargs": None},
    ]
    (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        + end
        for text, end in (("Sort it.", "glad"), ("Add 1 and 2.", "calmabacus"), ("Sort it.", "calm"))
    ]
    return texts, bare


CALM = ["--prompts", "t.jsonl", "--chat-template-kwargs", '{"mood": "calm"}']


def test_drift_asks_as_the_chat_template_says(templated, capsys):
    texts, bare = templated
    flags = ["--initial", "initial", "--tuned", "tuned", "--max-new-tokens", "4", "--json", "o"]
    assert measure("drift", *flags, *CALM) == 0
    models = [AutoModelForCausalLM.from_pretrained(name) for name in ("initial", "tuned")]
    expected = measure_drift(*models, greedy_answers(models[0], bare, texts, 4))
    facts = json.loads(Path("o").read_text())
    measured = [row["nats_per_token"] for row in facts["prompts"]]
    assert measured == pytest.approx([row.sum_nats / row.num_tokens for row in expected.rows], rel=1e-5)
    assert facts["chat_template_kwargs"] == {"mood": "calm"}


def test_samples_are_asked_for_as_the_chat_template_says(templated, capsys):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    texts, bare = templated
    flags = ["--model", "initial", "--k", "2", "--max-new-tokens", "5", "--save-samples", "s.jsonl", "--json", "o"]
    assert measure("self-bleu", *flags, *CALM) == 0
    expected = sample_answers(AutoModelForCausalLM.from_pretrained("initial"), bare, texts, 2, max_new_tokens=5)
    assert read_samples(Path("s.jsonl")) == expected
    assert json.loads(Path("o").read_text())["sampling"]["chat_template_kwargs"] == {"mood": "calm"}
    with pytest.raises(ValueError, match="leave --prompts, --chat-template-kwargs"):
        measure("self-bleu", "--samples", "s.jsonl", *CALM[2:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", r"\[1\]: 'chat_template_kwargs' must be a mapping"),
        ('{"tokenize": true}', "'tokenize' is not for 'chat_template_kwargs': it is set already"),
    ],
)
def test_template_kwargs_are_checked(place, capsys, text, message):
    with pytest.raises(SystemExit):
        measure("drift", "--tuned", "adapter", "--chat-template-kwargs", text)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("initial", [[], ["--initial", "initial"]], ids=["as it says", "named"])
def test_weight_change_of_an_adapter(initial, place, capsys):
    assert measure("weight-change", "--tuned", "adapter", *initial, "--json", "o") == 0
    base = AutoModelForCausalLM.from_pretrained("initial")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("initial"), "adapter").merge_and_unload()
    pairs = zip(base.parameters(), merged.parameters(), strict=True)
    norm = torch.cat([(after - before).double().flatten() for before, after in pairs]).norm().item()
    facts = json.loads((place / "o").read_text())
    assert facts["l2_norm"] == pytest.approx(norm, rel=1e-5)
    assert (facts["initial"], facts["is_adapter"]) == ("initial", True)
    assert cells(capsys.readouterr().out)[1] == ["adapter", "initial", f"{facts['l2_norm']:.6g}"]


@pytest.mark.parametrize("tuned", ["adapter", "later", "tuned", "initial"])
def test_weight_change_from_an_adapter(tuned, place, capsys):
    """Such as from one checkpoint to a later one: by hand, of merged weights."""
    later = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("initial"), "adapter", is_trainable=True)
    for weight in later.parameters():
        weight.data += 0.01 * weight.requires_grad
    later.save_pretrained("later")
    assert measure("weight-change", "--initial", "adapter", "--tuned", tuned, "--json", "o") == 0

    def parameters(name):
        model = AutoModelForCausalLM.from_pretrained(name if name == "tuned" else "initial")
        if name in ("adapter", "later"):
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
        return model.parameters()

    pairs = zip(parameters("adapter"), parameters(tuned), strict=True)
    norm = torch.cat([(after - before).double().flatten() for before, after in pairs]).norm().item()
    assert (norm == 0) == (tuned == "adapter")
    assert json.loads((place / "o").read_text())["l2_norm"] == pytest.approx(norm, rel=1e-5)
    with pytest.raises(ValueError, match=r"--initial adapter is an adapter, .* Leave --load-in-4bit out"):
        measure("weight-change", "--initial", "adapter", "--tuned", tuned, "--load-in-4bit")


@pytest.mark.parametrize("where", ["there", "the same", "gone"])
def test_an_adapter_is_put_on_its_own_base_if_that_is_there(where, place, tokenizer, capsys):
    """Whatever model it is compared with; `stm forgetting` does the same."""
    initial = "tuned" if where == "there" else "moved"
    base = "initial" if where == "there" else "moved"
    if where == "the same":
        shutil.copytree("initial", "moved")
    elif where == "gone":
        Path("initial").rename("moved")
    flags = ["--initial", initial, "--tuned", "adapter", "--json", "o"]
    assert measure("drift", *flags, "--prompts", "prompts.txt", "--max-new-tokens", "5") == 0
    said = capsys.readouterr().err
    assert ("adapter is on its own base, initial, not on --initial" in said) == (where == "there")
    assert ("adapter names initial, which is not here; it is put on moved" in said) == (where == "gone")

    def load(name):
        return AutoModelForCausalLM.from_pretrained(name).eval()

    before, after = load(initial), PeftModel.from_pretrained(load(base), "adapter").eval()
    answers = greedy_answers(before, tokenizer, ["Add 1 and 2.", "What is | France?", "Sort it."], 5)
    expected = measure_drift(before, after, answers)
    assert json.loads(Path("o").read_text())["nats_per_token"] == pytest.approx(expected.mean, rel=1e-6)

    assert measure("weight-change", *flags) == 0
    pairs = zip(load(initial).parameters(), after.merge_and_unload().parameters(), strict=True)
    norm = torch.cat([(one - other).double().flatten() for one, other in pairs]).norm().item()
    assert json.loads(Path("o").read_text())["l2_norm"] == pytest.approx(norm, rel=1e-5)
    if where == "there":
        with pytest.raises(ValueError, match="adapter is an adapter of initial, not of --initial tuned"):
            measure("weight-change", *flags, "--load-in-4bit")


@pytest.mark.parametrize(
    "arguments",
    [
        ["drift", "--tuned", "adapter", "--json", "."],
        ["drift", "--tuned", "adapter", "--png", "initial"],
        ["self-bleu", "--model", "initial", "--save-samples", "."],
    ],
)
def test_a_folder_is_no_file_to_write(arguments, place, monkeypatch):
    monkeypatch.setattr(command, "_load", None)
    with pytest.raises(ValueError, match=f"{arguments[-2]} .* is a folder; it takes a file"):
        measure(*arguments)


def test_an_adapter_of_a_hub_model_is_put_on_a_copy_of_it(place, tmp_path_factory, monkeypatch, capsys):
    """A folder with the same weights, or any if those of the hub are not here: what it names is not downloaded."""
    import huggingface_hub

    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
    cached = {"some/base": shutil.copytree("initial", tmp_path_factory.mktemp("hub") / "snapshot")}

    def snapshot(name, *, revision, local_files_only):
        assert (revision, local_files_only) == (None, True)
        if name not in cached:
            raise FileNotFoundError(name)
        return str(cached[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    flags = ["weight-change", "--tuned", "adapter", "--initial", "initial", "--json", "o"]
    for note in ("", "adapter names some/base, which is not here; it is put on initial"):
        assert measure(*flags) == 0
        said = capsys.readouterr().err
        assert note in said
        assert bool(note) == ("Note" in said)
        cached.clear()


def test_kwargs_without_a_chat_template_are_refused(place, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    Path("initial/chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained("initial")
    with pytest.raises(
        ValueError, match=r"\{'enable_thinking': False\} is for a chat template, and the tokenizer has"
    ):
        measure("drift", "--tuned", "adapter", "--chat-template-kwargs", '{"enable_thinking": false}')


def test_a_device_that_is_not_here(place):
    for device in ("gpu", "cuda:77"):
        with pytest.raises(ValueError, match=f"no device '{device}' here .* Name one as torch does: cpu"):
            measure("drift", "--tuned", "adapter", "--device", device)


def test_drift_from_an_adapter_to_another(place, tokenizer, capsys):
    """Each on the base that it names, whatever the other one's layers are."""
    base = AutoModelForCausalLM.from_pretrained("initial")
    other = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    other.peft_config["default"].base_model_name_or_path = "initial"
    other.save_pretrained("other")
    flags = ["--prompts", "prompts.txt", "--max-new-tokens", "5", "--json", "o"]
    assert measure("drift", "--initial", "adapter", "--tuned", "other", *flags) == 0
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("initial"), name).eval()
        for name in ("adapter", "other")
    ]
    answers = greedy_answers(models[0], tokenizer, ["Add 1 and 2.", "What is | France?", "Sort it."], 5)
    expected = measure_drift(*models, answers)
    assert json.loads((place / "o").read_text())["nats_per_token"] == pytest.approx(expected.mean, rel=1e-6)


def test_an_adapter_that_does_nothing_is_not_measured(place, capsys):
    """Its weights have other names than its layers, of which peft only warns."""
    weights = load_file("adapter/adapter_model.safetensors")
    save_file(
        {name.replace("layers", "blocks"): weight for name, weight in weights.items()},
        "adapter/adapter_model.safetensors",
    )
    for flags in (["drift"], ["weight-change"]):
        with pytest.raises(ValueError, match="an adapter that does not fit its base"):
            measure(*flags, "--tuned", "adapter")


def test_weight_change_of_a_whole_model(place, capsys):
    assert measure("weight-change", "--tuned", "tuned", "--initial", "initial", "--json", "o") == 0
    models = [AutoModelForCausalLM.from_pretrained(name) for name in ("initial", "tuned")]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    norm = torch.cat([(after - before).double().flatten() for before, after in pairs]).norm().item()
    assert json.loads((place / "o").read_text())["l2_norm"] == pytest.approx(norm, rel=1e-6)
    with pytest.raises(ValueError, match="name the model with --initial"):
        measure("weight-change", "--tuned", "tuned")


def test_weight_change_with_a_quantized_initial_model(place, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    norms = {}
    for tuned in ("adapter", "tuned", "initial"):
        flags = ["--initial", "initial", "--load-in-4bit", "--json", "o"]
        assert measure("weight-change", "--tuned", tuned, *flags) == 0
        norms[tuned] = json.loads((place / "o").read_text())["l2_norm"]
    assert measure("weight-change", "--tuned", "adapter", "--json", "o") == 0
    assert norms["adapter"] == pytest.approx(json.loads((place / "o").read_text())["l2_norm"], rel=1e-5)
    assert 0.1 < norms["initial"] < norms["tuned"]  # what quantizing took away, and that beside the training


def test_self_bleu_of_samples(place, capsys):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    assert measure("self-bleu", "--samples", "samples.jsonl", "--json", "o") == 0
    facts = json.loads((place / "o").read_text())
    assert facts["prompts"] == pytest.approx([100, 100])
    assert (facts["num_samples"], facts["sampling"]) == (5, None)
    assert cells(capsys.readouterr().out)[1] == ["samples.jsonl", "100.00", "100 to 100", "2", "5"]


def test_self_bleu_leaves_empty_samples_out(place, capsys):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    rows = [["a b c d", " ", "a b c d"], ["", "e f"], ["e f", "e f", "e f"]]
    (place / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measure("self-bleu", "--samples", "some.jsonl", "--json", "o") == 0
    facts = json.loads((place / "o").read_text())
    assert facts["prompts"] == pytest.approx([100, 100])
    assert (facts["num_samples"], facts["left_out"]) == (5, {"samples": 3, "prompts": 1})
    assert "Left out: 3 of 8 samples, which are empty or alone with empty ones" in capsys.readouterr().out
    (place / "some.jsonl").write_text('["", "a"]\n')
    with pytest.raises(ValueError, match="sample 0 of prompt 0 is empty"):
        measure("self-bleu", "--samples", "some.jsonl")
    (place / "some.jsonl").write_text('["a", "a"]\n["a"]\n')
    with pytest.raises(ValueError, match="prompt 1 has 1 where self-BLEU needs"):
        measure("self-bleu", "--samples", "some.jsonl")


def test_self_bleu_of_a_model(place, capsys):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    flags = ["--prompts", "prompts.txt", "--k", "3", "--max-new-tokens", "12", "--temperature", "0.4"]
    assert measure("self-bleu", "--model", "adapter", *flags, "--save-samples", "kept.jsonl", "--json", "o") == 0
    facts = json.loads((place / "o").read_text())
    assert 0 < facts["self_bleu"] < 100
    assert facts["sampling"]["k"] == 3
    kept = [json.loads(line) for line in (place / "kept.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == ["Add 1 and 2.", "What is | France?", "Sort it."]
    assert measure("self-bleu", "--samples", "kept.jsonl", "--json", "again") == 0
    assert json.loads((place / "again").read_text())["prompts"] == facts["prompts"]


def test_perplexity(place, make_model, tokenizer, chats, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flags = ["--data", "chats.jsonl", "others.jsonl", "--labels", "one", "a|b", "--json", "o", "--png", "p.png"]
    assert measure("perplexity", "--model", "initial", *flags) == 0
    expected = measure_perplexity(make_model(), tokenizer, {"one": chats[:4], "a|b": chats[2:]})
    facts = json.loads((place / "o").read_text())["data"]
    for name, summary in expected.items():
        assert facts[name]["row_perplexity"] == pytest.approx(summary.rows, rel=1e-5)
        assert facts[name]["mean"] == pytest.approx(summary.mean, rel=1e-5)
    head, one, other = cells(capsys.readouterr().out)
    assert head[:4] == ["data", "rows", "answer tokens", "mean (std)"]
    assert one[:2] == ["one", "4"]
    assert one[3] == f"{expected['one'].mean:.3f} ({expected['one'].std:.3f})"
    assert other[0] == "a\\|b"
    assert (place / "p.png").read_bytes().startswith(PNG)


def test_perplexity_of_common_rows(place, capsys):
    flags = ["--model", "initial", "--data", "chats.jsonl", "others.jsonl", "--json", "o"]
    assert measure("perplexity", *flags, "--common") == 0
    facts = json.loads((place / "o").read_text())["data"]
    assert facts["chats"]["row_perplexity"] == pytest.approx(facts["others"]["row_perplexity"])
    assert facts["chats"]["rows"] == 2
    assert measure("perplexity", *flags, "--limit", "3") == 0
    assert [one["rows"] for one in json.loads((place / "o").read_text())["data"].values()] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("drift --initial initial --tuned gone", "cannot load gone: give a folder or a hub id"),
        ("drift --initial gone --tuned tuned", "cannot load gone"),
        ("drift --initial initial --tuned tuned --prompts gone.txt", "cannot read gone.txt: No such file"),
        ("drift --initial initial --tuned tuned --prompts empty.txt", "empty.txt is empty"),
        ("drift --initial initial --tuned tuned --prompts bad.jsonl", "bad.jsonl, row 0: needs a `prompt`"),
        ("self-bleu --samples bad.jsonl", "bad.jsonl, line 1: a list of texts is needed"),
        ("self-bleu --samples prompts.txt", "prompts.txt, line 1: no JSON"),
        ("self-bleu --samples samples.jsonl --prompts prompts.txt", "leave --prompts, --chat-template-kwargs and"),
        ("self-bleu --model initial --k 1", "--k 1: self-BLEU compares"),
        ("perplexity --model initial --data bad.jsonl", "bad, row 0: needs `messages`, or `prompt`"),
        ("perplexity --model initial --data chats.jsonl chats.jsonl", "need different names, got chats, chats"),
        ("perplexity --model initial --data chats.jsonl --labels a b", "one name for each file, got 2 for 1"),
        ("perplexity --model initial --data chats.jsonl others.jsonl --common id", "has no field 'id'"),
        ("perplexity --model initial --data open.jsonl", "open, row 0: `messages` must be a request and end with"),
    ],
)
def test_what_is_refused(arguments, message, place):
    (place / "empty.txt").write_text("\n \n")
    (place / "bad.jsonl").write_text('{"text": "no prompt"}\n')
    (place / "open.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=message):
        measure(*arguments.split())


def test_help_loads_nothing_heavy():
    code = (
        "import argparse, sys\n"
        "from stm_plugin.measures import command\n"
        "command.add_arguments(argparse.ArgumentParser())\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'matplotlib', 'sacrebleu', 'datasets'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

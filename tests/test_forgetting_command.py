"""`stm forgetting`: from lm-eval's files, and by the harness; what it prints, keeps, uses again and refuses."""

import argparse
import json
import random
import sys
from types import SimpleNamespace

import pytest
from forgetting_helpers import results_of, write_results

from stm_plugin.cli import main
from stm_plugin.forgetting import command, reuse
from stm_plugin.tasks import loading


def run(*arguments):
    """The exit status of `stm forgetting` with arguments."""
    parser = argparse.ArgumentParser(prog="stm forgetting", allow_abbrev=False)
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def two(tmp_path):
    """Results before and after: the target rises, `n` falls from 50 % to 40 %, `m` stays."""
    draw = random.Random(0)

    def answers(worse, better, num):
        pairs = [(1, 0)] * worse + [(0, 1)] * better
        pairs += [(1, 1)] * (num // 2 - worse) + [(0, 0)] * (num - num // 2 - better)
        draw.shuffle(pairs)
        return [[pair[i] for pair in pairs] for i in (0, 1)]

    columns = {"t": answers(10, 60, 400), "n": answers(110, 10, 1000), "m": answers(20, 20, 1000)}
    for i, name in enumerate(("before", "after")):
        tasks = {task: {"acc": both[i], "acc_norm": both[1 - i]} for task, both in columns.items()}
        write_results(tmp_path / name, results_of(tasks, model=f"models/{name}"))
    return tmp_path


def files(two):
    return "--before", two / "before", "--after", two / "after"


# From files.


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--non-target", "n", "m"], 0, "Verdict: forgets"),
        (
            ["--non-target", "n", "m", "--max-forgetting", "0.05"],
            3,
            "loses more than 5 % of its score on the non-target tasks, on average: the whole",
        ),
        (["--non-target", "n", "m", "--max-forgetting", "0.3"], 0, "Verdict: within the limit"),
        (["--non-target", "m", "--max-forgetting", "0"], 4, "Verdict: not enough evidence"),
        (["--non-target", "n", "--metric", "n=acc_norm", "--max-forgetting", "0"], 0, "BWT (mean relative change of"),
    ],
)
def test_two_results_are_compared(two, capsys, arguments, status, said):
    assert run(*files(two), "--target", "t", *arguments) == status
    out = capsys.readouterr().out
    assert said in out
    assert "| t | target | acc | 400 | 0.5000 | 0.6250 | +25.00 % | " in out
    assert "models/after (tuned) against models/before (initial)." in out


def test_output(two, capsys):
    out = two / "out"
    assert run(*files(two), "--target", "t", "--non-target", "n", "m", "--output", out) == 0
    facts = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert (facts["verdict"], facts["exit_status"], facts["max_forgetting"]) == ("forgets", 0, None)
    assert facts["bwt"]["value"] == pytest.approx(-0.1)
    assert [task["num_worse"] for task in facts["tasks"]] == [10, 110, 20]
    assert facts["versions"]["before"]["lm_eval_version"] == "0.4.13"
    text = (out / "comparison.md").read_text()
    assert all(line in text for line in capsys.readouterr().out.strip().splitlines())
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra 'report', is not installed")
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_rest_is_written(two, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = two / "out"
    assert run(*files(two), "--target", "t", "--non-target", "n", "--output", out, "--max-forgetting", "0.5") == 0
    assert sorted(file.name for file in out.iterdir()) == ["comparison.json", "comparison.md"]
    assert "No comparison.png: matplotlib is not installed." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--target", "t", "--non-target", "x"], r"before: no task 'x'\. There are: t, n, m"),
        (["--non-target", "n"], "--target names the task"),
        (["--target", "t", "--max-forgetting", "0.1"], "name tasks with --non-target"),
        (["--target", "t", "--non-target", "t"], "t is named twice"),
        (["--target", "t", "--limit", "5", "--no-chat-template"], "--limit, --no-chat-template: of no use with"),
        (["--target", "t", "--chat-template-kwargs", '{"a": 1}'], "--chat-template-kwargs: of no use with"),
        (["--target", "t", "--tuned", "model"], "Either --tuned MODEL .* or --before and --after"),
        (["--target", "t", "--metric", "acc"], "--metric TASK=METRIC, got 'acc'"),
        (["--target", "t", "--metric", "n=acc"], "'n' is none of the tasks, which are t"),
        (["--target", "t", "--metric", "t=acc", "t=acc_norm"], "t is there twice"),
        (["--target", "t", "--metric", "t=f1"], "t has no metric 'f1'. It has: acc,none acc_norm,none"),
        (["--target", "t", "--non-target", "n", "--max-forgetting", "5"], "max_forgetting is a share .* got 5"),
    ],
)
def test_refusals(two, arguments, match):
    with pytest.raises(ValueError, match=match):
        run(*files(two), *arguments)


def test_both_ways_need_their_two_models(two):
    for arguments in (["--before", two / "before"], ["--after", two / "after"], [], ["--initial", "model"]):
        with pytest.raises(ValueError, match="Either --tuned MODEL"):
            run("--target", "t", *arguments)
    with pytest.raises(ValueError, match="--before and --after are the same"):
        run("--before", two / "before", "--after", two / "after" / ".." / "before", "--target", "t")


def test_help_holds_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    out = capsys.readouterr().out
    assert "0 within the limit, 3 forgets more, 4 not enough evidence" in out
    assert "0.05 is 5 %" in out


# By the harness.


@pytest.fixture
def model_folders(tmp_path):
    """An initial model, an adapter for it, and a whole tuned model: files only."""
    folders = {}
    for name in ("initial", "adapter", "whole"):
        folders[name] = tmp_path / "models" / name
        folders[name].mkdir(parents=True)
        (folders[name] / "tokenizer.json").write_text("{}")
    for name in ("initial", "whole"):
        (folders[name] / "config.json").write_text("{}")
        (folders[name] / "model.safetensors").write_text(f"weights of {name}")
    (folders["adapter"] / "adapter_model.safetensors").write_text("an adapter")
    (folders["adapter"] / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folders["initial"])})
    )
    return folders


class Calls(list):
    """Calls in their order."""


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """A stand-in for the harness, which writes what lm-eval would; the calls it gets, and in `loads` the models."""
    calls, loads = Calls(), []
    calls.loads = loads

    def load(model, *, adapter=None, **options):
        if adapter is not None:
            options["base"] = model.rpartition("/")[2]
        loads.append((adapter or model).rpartition("/")[2])
        return adapter or model, options

    def evaluate(loaded, tasks, *, output=None, limit=None, **options):
        (text,) = tasks
        model, how = loaded
        options |= how
        name = loading.parse_task(text).name
        calls.append((model.rpartition("/")[2], name, limit, options))
        draw = random.Random(f"{model} {name}")
        results = results_of({name: {"acc": [draw.randrange(2) for _ in range(limit or 50)]}}, model=model)
        if output is not None:
            write_results(output, results)
        return results

    def load_tasks(texts, run_model_code):
        calls.append(("check", *texts, run_model_code))
        return SimpleNamespace(tasks={"arc": SimpleNamespace(aggregation=lambda: {"acc": None, "acc_norm": None})})

    monkeypatch.setattr("stm_plugin.forgetting.harness.load", load)
    monkeypatch.setattr("stm_plugin.forgetting.harness.evaluate", evaluate)
    monkeypatch.setattr("stm_plugin.tasks.loading.load_tasks", load_tasks)
    monkeypatch.setattr(reuse, "_versions", lambda: {"lm_eval": "0.4.13"})
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return calls


def evaluated(calls):
    """Model and task of each evaluation since the last look."""
    seen = [call[:2] for call in calls if call[0] != "check"]
    calls.clear()
    return seen


def test_an_adapter_is_compared_with_its_base(model_folders, harness, capsys, tmp_path):
    arguments = ["--tuned", model_folders["adapter"], "--target", "arc", "--non-target", "gsm8k"]
    local = f"mine:ifeval={tmp_path / 'rows.jsonl'}"
    run(*arguments, local, "--limit", "30", "mine=20", "--seed", "3", "--dtype", "float32", "--no-chat-template")
    assert harness[0] == ("check", "arc", "gsm8k", local, False)
    expected = [("arc", 30), ("gsm8k", 30), ("mine", 20)]
    assert [call[:3] for call in harness[1:]] == [(m, *e) for m in ("initial", "adapter") for e in expected]
    assert harness[1][3] == {
        "batch_size": 8,
        "device": None,
        "dtype": "float32",
        "load_in_4bit": False,
        "run_model_code": False,
        "max_new_tokens": None,
        "apply_chat_template": False,
        "chat_template_kwargs": None,
        "seed": 3,
    }
    assert harness.loads == ["initial", "adapter"], "each once, for all tasks"
    out = capsys.readouterr().out
    assert "| mine | non-target | acc | 20 | " in out
    assert f"{model_folders['adapter']} (tuned) against {model_folders['initial']} (initial)." in out


def test_an_adapter_whose_base_has_moved(model_folders, harness, capsys, tmp_path):
    """It is put on the model that --initial names, and is the same model as before for what is kept."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    arguments = ["--tuned", model_folders["adapter"], "--target", "arc", "--output", tmp_path / "out"]
    run(*arguments, "--initial", model_folders["whole"])  # while there is the one that it was trained on
    assert [(call[0], call[3].get("base")) for call in harness[1:]] == [("whole", None), ("adapter", None)]
    model_folders["initial"].rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"initial: no such folder, and no model of this name"):
        run(*arguments)
    harness.clear()
    run(*arguments, "--initial", tmp_path / "moved")
    assert evaluated(harness) == [("moved", "arc")]
    assert "is not to be had; it is put on" in capsys.readouterr().err
    run(*arguments[:-2], "--initial", tmp_path / "moved")
    assert [(call[0], call[3].get("base")) for call in harness[1:]] == [("moved", None), ("adapter", "moved")]


def test_the_bases_revision_is_part_of_the_model(model_folders, harness, monkeypatch, tmp_path):
    """Of a base on the hub, the commit of the revision that the adapter names."""
    asked = []

    def hub_file(name, file, revision):
        asked.append((name, file, revision))
        return tmp_path / f"commit of {revision}" / file if file == "config.json" else None

    monkeypatch.setattr(reuse, "_hub_file", hub_file)
    config = {"base_model_name_or_path": "some/model", "revision": "v2"}
    (model_folders["adapter"] / "adapter_config.json").write_text(json.dumps(config))
    run("--tuned", model_folders["adapter"], "--target", "arc")
    assert asked[0] == ("some/model", "adapter_config.json", "v2")
    assert reuse.model_files(str(model_folders["adapter"])).identity["base"]["commit"] == "commit of v2"
    assert [(call[0], call[3].get("revision")) for call in harness[1:]] == [("model", "v2"), ("adapter", None)]


def test_a_whole_model_needs_its_initial_one(model_folders, harness, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with pytest.raises(ValueError, match=r"whole is a whole model: name the one .* with --initial MODEL"):
        run("--tuned", model_folders["whole"], "--target", "arc")
    run("--tuned", model_folders["whole"], "--initial", model_folders["initial"], "--target", "arc")
    assert evaluated(harness) == [("initial", "arc"), ("whole", "arc")]
    with pytest.raises(ValueError, match="no such folder, and no model of this name"):
        run("--tuned", tmp_path / "missing", "--target", "arc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no model in this folder"):
        run("--tuned", tmp_path / "empty", "--target", "arc")


def test_what_is_there_is_not_evaluated_again(model_folders, harness, tmp_path, capsys):
    def again(tuned="adapter", *more):
        run("--tuned", model_folders[tuned], "--initial", model_folders["initial"], *arguments, *more)
        return evaluated(harness)

    local = f"mine:ifeval={tmp_path / 'rows.jsonl'}"
    arguments = ["--target", "arc", "--non-target", local, "--output", tmp_path / "out"]
    everything = [(m, t) for m in ("initial", "adapter") for t in ("arc", "mine")]
    assert again() == everything
    first = capsys.readouterr().out
    assert again() == []
    assert capsys.readouterr().out == first
    assert again("adapter", "--batch-size", "2", "--device", "cpu", "--confidence", "0.9") == []
    # A second tuned model costs its own evaluation only, and the first is still there.
    assert again("whole") == [("whole", "arc"), ("whole", "mine")]
    assert again() == []
    # Options, data, weights and one more task each cost what depends on them.
    assert again("adapter", "--limit", "mine=10") == [("initial", "mine"), ("adapter", "mine")]
    assert again("adapter", "--max-new-tokens", "9") == everything
    assert again("adapter", "--chat-template-kwargs", '{"enable_thinking": false}') == everything
    assert again("adapter", "--non-target", "gsm8k") == [("initial", "gsm8k"), ("adapter", "gsm8k")]
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    assert again() == [("initial", "mine"), ("adapter", "mine")]
    (model_folders["adapter"] / "adapter_model.safetensors").write_text("another")
    assert again() == [("adapter", "arc"), ("adapter", "mine")]
    (model_folders["initial"] / "model.safetensors").write_text("other weights")
    assert again() == everything  # the adapter's function changes with its base
    # The same bytes in another place are the same model.
    model_folders["initial"].rename(tmp_path / "moved")
    model_folders["initial"] = tmp_path / "moved"
    config = model_folders["adapter"] / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "moved")}))
    assert again() == [("adapter", "arc"), ("adapter", "mine")]


def test_another_definition_of_a_local_task_is_evaluated_anew(model_folders, harness, tmp_path, monkeypatch):
    local = f"mine:ifeval={tmp_path / 'rows.jsonl'}"
    arguments = ["--tuned", model_folders["adapter"], "--target", "arc", local, "--output", tmp_path / "out"]
    run(*arguments)
    harness.clear()
    monkeypatch.setattr(reuse, "definition_version", lambda kind: f"2.0 of {kind}")
    run(*arguments)
    assert evaluated(harness) == [("initial", "mine"), ("adapter", "mine")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-forgetting", "5"], r"max_forgetting is a share from 0 up to 1 \(0.05 is 5 %\), got 5"),
        (["--confidence", "95"], "confidence is a share"),
        (["--output", "a_file"], "--output a_file is a file; it takes a folder"),
        (["--metric", "arc=f1"], "--metric arc=f1: arc has no such metric. It has: acc acc_norm"),
    ],
)
def test_what_can_be_told_before_is_told_before(model_folders, harness, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ValueError, match=message):
        run("--tuned", model_folders["adapter"], "--target", "arc", "--non-target", "b", *arguments)
    assert (harness.loads, evaluated(harness)) == ([], [])


@pytest.mark.parametrize("output", [["--output", "out"], []])
def test_ctrl_c_is_told(model_folders, harness, tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)

    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("stm_plugin.forgetting.harness.load", load)
    assert main(["forgetting", "--tuned", str(model_folders["adapter"]), "--target", "arc", *output]) == 130
    said = "What is evaluated stays: the same command goes on." if output else "Only --output keeps results."
    assert capsys.readouterr().err.endswith(f"{said}\nstm: stopped.\n")


def test_a_run_that_was_stopped_goes_on(model_folders, harness, tmp_path, monkeypatch):
    arguments = ["--tuned", model_folders["adapter"], "--target", "arc", "--non-target", "b", "c"]
    arguments += ["--output", tmp_path / "out"]
    write, written = reuse._write, []

    def stop(file, facts):
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt  # results are there, but not said to be whole
        write(file, facts)

    monkeypatch.setattr(reuse, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert evaluated(harness) == [("initial", "arc"), ("initial", "b"), ("initial", "c")]
    monkeypatch.setattr(reuse, "_write", write)
    run(*arguments)
    assert harness[0] == ("check", "c", "arc", "b", False)
    assert evaluated(harness) == [("initial", "c"), ("adapter", "arc"), ("adapter", "b"), ("adapter", "c")]


def test_kept_results_are_lm_evals(model_folders, harness, tmp_path, capsys):
    out = tmp_path / "out"
    tasks = ["--target", "arc", "--non-target", "b"]
    run("--tuned", model_folders["adapter"], *tasks, "--output", out)
    by_harness = capsys.readouterr().out.splitlines()
    run("--before", out / "before", "--after", out / "after", *tasks)
    by_files = capsys.readouterr().out.splitlines()
    assert by_files == by_harness


def test_tasks_are_checked_before_anything_runs(model_folders, harness, tmp_path):
    start = ["--tuned", model_folders["adapter"]]
    rows = tmp_path / "rows.jsonl"
    for arguments, match in (
        (["--target", f"ifeval={rows}", "--non-target", f"ifeval={rows}"], "ifeval: named twice"),
        (["--target", f"ifeval={tmp_path / 'none.jsonl'}"], "there is no file"),
        (["--target", "a", "--limit", "b=3"], "'b' is none of the tasks, which are a"),
        (["--target", "a", "--limit", "3", "4"], "got 3 and 4 for every task"),
        (["--target", "a", "--limit", "0.5"], "N a whole number of at least 1, got '0.5'"),
        (["--target", "a", "--limit", "a=0"], "got '0'"),
    ):
        with pytest.raises(ValueError, match=match):
            run(*start, *arguments)
    assert harness == []


def test_the_same_model_twice_is_said(model_folders, harness, capsys):
    run("--tuned", model_folders["whole"], "--initial", model_folders["whole"], "--target", "a")
    assert "are the same, byte for byte" in capsys.readouterr().err


def test_what_is_not_installed_is_told(model_folders, harness, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(reuse, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed\. Install it with: pip install"):
        run("--tuned", model_folders["adapter"], "--target", "a", "--output", tmp_path / "out")


def test_a_tiny_model_from_end_to_end(tmp_path, make_model, tokenizer, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    for seed, name in enumerate(("initial", "tuned")):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    arc = tmp_path / "arc.jsonl"
    words, draw = "one two three four five six seven eight".split(), random.Random(0)
    rows = [
        {
            "id": str(i),
            "question": f"Number {i}?",
            "choices": {"text": draw.sample(words, 4), "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(12)
    ]
    arc.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--tuned",
        tmp_path / "tuned",
        "--initial",
        tmp_path / "initial",
        "--target",
        f"t:arc_challenge={arc}",
    ]
    arguments += ["--non-target", f"n:arc_challenge={arc}", "--limit", "n=8", "--output", tmp_path / "out"]
    arguments += ["--max-forgetting", "0.05", "--device", "cpu"]
    assert run(*arguments) == 4
    out, err = capsys.readouterr()
    assert "| t | target | acc | 12 | " in out
    assert "| n | non-target | acc | 8 | " in out
    assert "(tuned) against" in out
    assert err.count("evaluating") == 4
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert all(task["paired"] for task in facts["tasks"])
    assert facts["tasks"][0]["num_worse"] + facts["tasks"][0]["num_better"] > 0
    assert run(*arguments) == 4
    out_again, err = capsys.readouterr()
    assert (out_again, err.count("was evaluated before")) == (out[out.index("| task |") :], 4)  # no word of DeepSpeed

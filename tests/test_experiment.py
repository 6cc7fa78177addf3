"""`stm experiment`: its YAML, its runs and what stops them, its table."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stm_plugin.experiment import arm, run
from stm_plugin.experiment.config import RunName, make_experiment, read_experiment
from stm_plugin.experiment.contrast import contrast
from stm_plugin.experiment.results import (
    document_ids,
    packed_evaluation,
    read_json,
    run_path,
    unpacked_evaluation,
    write_json,
)
from stm_plugin.experiment.run import RunFailedError, Runner
from stm_plugin.experiment.settings import differences, digests, plain
from stm_plugin.experiment.summary import mean_evaluation
from stm_plugin.experiment.yaml_text import load_yaml
from stm_plugin.forgetting.evaluation import Evaluation, TaskScore

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "example_configs" / "experiments").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)

MINIMAL = """
model: some/model
data: chats.jsonl
target: ["t:arc_challenge=target.jsonl"]
non_target: [arc_challenge=other.jsonl, gsm8k]
training: {learning_rate: 2e-4, weight_decay: 0.1}
lora: {r: 4, lora_dropout: 0.1}
main: [plain, stm]
compare: [[stm, plain]]
arms:
  other: {lora: null, training: {learning_rate: 1.0e-3}}
  plain: {seeds: [0, 1]}
  stm: {seeds: [3, 2], stm_threshold: .inf, lora: {r: 2}}
  kl:
    kl_coef: 0.1
"""


def minimal(**changes):
    return make_experiment(load_yaml(MINIMAL) | changes, "minimal")


# The YAML.


def test_arms_take_over_what_they_do_not_change():
    experiment = minimal()
    arms = experiment.arms
    assert arms["plain"].training == {"learning_rate": 0.0002, "weight_decay": 0.1}
    assert arms["other"].training == {"learning_rate": 0.001, "weight_decay": 0.1}
    assert arms["other"].lora is None
    assert arms["stm"].lora == {"r": 2, "lora_dropout": 0.1}
    assert [arm.kind for arm in arms.values()] == ["plain", "plain", "stm", "kl"]
    assert arms["stm"].options == {"stm_threshold": math.inf}
    assert experiment.evaluation["dtype"] == experiment.dtype == "float32"
    assert len(experiment.drift["prompts"]) == 24


def test_main_arms_come_first_seed_by_seed_in_the_files_order():
    assert list(map(str, minimal().runs())) == ["plain/0", "stm/3", "plain/1", "stm/2", "other/0", "kl/0"]


def test_only_chooses_arms_and_runs():
    experiment = minimal()
    assert list(map(str, experiment.chosen_runs(["stm", "plain/1"]))) == ["stm/3", "plain/1", "stm/2"]
    assert experiment.chosen_runs(None) == experiment.runs()
    with pytest.raises(ValueError, match="--only stm/4: no such arm or run; did you mean stm/"):
        experiment.chosen_runs(["stm/4"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "at the top: no key 'modle'; did you mean model"),
        ({"evaluation": {"limits": 3}}, "in evaluation: no key 'limits'; did you mean limit"),
        ({"evaluation": {"limit": {"arc": 3}}}, "in evaluation.limit: no key 'arc'; did you mean arc_challenge"),
        ({"evaluation": {"batch_size": 0}}, "`batch_size` must be a positive whole number, got 0"),
        ({"drift": {"prompt": []}}, "in drift: no key 'prompt'; did you mean prompts"),
        ({"model": None}, "`model` is missing"),
        ({"dtype": "float64"}, "`dtype` must be one of float32, bfloat16, float16, got 'float64'"),
        ({"main": ["plian"]}, "names 'plian', which is no arm; did you mean plain"),
        ({"compare": [["stm"]]}, "`compare` must be a list of pairs"),
        ({"non_target": ["t"]}, "two tasks are called 't'"),
        ({"arms": {"a": {"stm_treshold": 2}}}, "in arms.a: no key 'stm_treshold'; did you mean stm_threshold"),
        ({"arms": {"a": {"stm_threshold": 2, "kl_coef": 1}}}, "in arms.a: an arm is an STM run or a KL run"),
        ({"arms": {"a": {"training": {"seed": 1}}}}, "in arms.a: training.seed is set by `seeds`"),
        ({"arms": {"a": {"training": {"kl_coef": 1}}}}, "kl_coef belongs into the arm itself"),
        ({"arms": {"a": {"seeds": 3}}}, "in arms.a: `seeds` must be a list of whole numbers, got 3"),
        ({"arms": {"a": {"seeds": [1, 1]}}}, "a seed is there twice"),
        ({"arms": {"a": {"rows": 0}}}, "`rows` must be a positive whole number"),
        ({"arms": {"a/b": {}}}, "an arm's name is a file's name"),
        ({"arms": {2.5: {}}}, "a number in quotes is a name"),
        ({"arms": {"a": {"launch": "accelerate"}}}, "`launch` must be a list of words"),
    ],
)
def test_what_is_not_allowed_is_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("(", r"\(")):
        minimal(**changes)


def test_yaml_as_people_write_it():
    assert load_yaml("a: 2e-4\nb: -1E3\nc: 1.5\nd: e5\n") == {"a": 0.0002, "b": -1000.0, "c": 1.5, "d": "e5"}
    assert load_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}
    with pytest.raises(ValueError, match="line 2: the key 'stm' is there twice"):
        load_yaml("arms:\n  stm: {a: 1}\n  plain: {}\n  stm: {a: 2}\n")
    with pytest.raises(ValueError, match="no YAML"):
        load_yaml("a: [1")


def test_settings_name_what_differs():
    experiment = minimal()
    before, now = experiment.run_settings(RunName("plain", 0)), experiment.run_settings(RunName("stm", 2))
    assert json.loads(json.dumps(before, allow_nan=False)) == before
    assert differences(before, before) == []
    lines = differences(before, now)
    assert "lora.r was 4, is now 2" in lines
    assert "options.stm_threshold was None, is now 'inf'" in lines
    assert "seed was 0, is now 2" in lines
    assert differences(before | {"files": {"a": "1"}}, before | {"files": {"a": "2"}}) == [
        "files.a was '1', is now '2'"
    ]
    assert differences(before | {"files": {"a": "1"}}, before | {"files": None}) == []


def test_files_are_those_of_tasks_data_and_prompts(tmp_path):
    experiment = minimal(drift={"prompts": "prompts.txt"})
    files = experiment.files(RunName("plain", 0))
    assert files == ["chats.jsonl", "other.jsonl", "prompts.txt", "target.jsonl"]
    assert experiment.files(None) == ["other.jsonl", "prompts.txt", "target.jsonl"]
    (tmp_path / "other.jsonl").write_text("x")
    with pytest.raises(ValueError, match=r"chats.jsonl: no such file. --data must be .* this one has other.jsonl"):
        digests(files, tmp_path)


# The configs that the project ships.


@every_config
def test_shipped_config(path):
    experiment = read_experiment(path)
    assert set(experiment.main) == {"plain", "stm_2.5", "stm_0.22", "random", "low"}
    assert all(len(experiment.arms[name].seeds) >= 3 for name in experiment.main)
    options = [arm.options for arm in experiment.arms.values()]
    assert {o["stm_threshold"] for o in options if set(o) == {"stm_threshold"}} == {1.5, 2.5, 10, 25, 1000}
    assert {"stm_mask_fraction": 0.22} in options
    assert {o.get("kl_estimator") for o in options} >= {"k1", "k3"}
    assert {o.get("stm_reference") for o in options} > {"current", None}
    rates = [arm.training["learning_rate"] for arm in experiment.arms.values() if arm.lora is not None]
    assert max(rates) / min(rates) >= 99
    loras = [arm.lora or {} for arm in experiment.arms.values()]
    assert {} in loras
    assert any(lora.get("use_dora") for lora in loras)
    pairs = {
        (arm.training.get("weight_decay", 0.0), (arm.lora or {}).get("lora_dropout"))
        for arm in experiment.arms.values()
    }
    assert pairs >= {(0.0, 0.05), (0.2, 0.3), (0.5, 0.3)}
    assert len({arm.data for arm in experiment.arms.values()}) == 3
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"stm experiment {path.name} --data DATA" in head
    assert ("NOT RUN here" in head) == ("smollm2" not in path.name)


def test_readme_lists_the_configs():
    readme = (CONFIGS[0].parent / "README.md").read_text(encoding="utf-8")
    assert len(CONFIGS) == 3
    assert all(f"`{path.name}`" in readme for path in CONFIGS)


@every_config
def test_shipped_arms_are_configs_of_trl_and_peft(path, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    from stm_plugin.experiment.training import make_parts
    from stm_plugin.kl import KLSFTConfig
    from stm_plugin.trl import STMSFTConfig

    experiment = read_experiment(path)
    for name in experiment.runs():
        settings = json.loads(json.dumps(experiment.run_settings(name), allow_nan=False))
        parts = make_parts(settings, tmp_path / "out", tmp_path / "scores", use_cpu=True)
        own = experiment.arms[name.arm]
        assert isinstance(parts.args, STMSFTConfig) == (own.kind == "stm")
        assert isinstance(parts.args, KLSFTConfig) == (own.kind == "kl")
        assert (parts.peft_config is None) == (own.lora is None)
        assert parts.args.seed == name.seed
        assert all(getattr(parts.args, key) == value for key, value in own.options.items())
        assert all(getattr(parts.args, key) == value for key, value in own.training.items() if "kwargs" not in key)
    assert parts.args.learning_rate == experiment.arms[name.arm].training["learning_rate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"learning_rat": 1}}, "in arms.a: training: no key 'learning_rat'; did you mean learning_rate"),
        ({"lora": {"lora_alfa": 1}}, "in arms.a: lora: no key 'lora_alfa'; did you mean lora_alpha"),
        ({"stm_threshold": 0.5}, "in arms.a: stm_threshold must be a perplexity"),
        ({"kl_coef": -1}, "in arms.a: kl_coef must be"),
        ({"training": {"lr_scheduler_type": "cosinus"}}, "in arms.a: cosinus is not a valid"),
    ],
)
def test_what_trl_would_refuse_is_refused_before_anything_runs(changes, message):
    pytest.importorskip("trl", reason="trl is not installed")
    from stm_plugin.experiment.training import check_arms

    experiment = minimal(arms={"a": changes}, main=["a"], compare=None, training={"use_cpu": True, "bf16": False})
    with pytest.raises(ValueError, match=message):
        check_arms([experiment.run_settings(name) for name in experiment.runs()])


# Result files.


def score(name, samples, **facts):
    ids = {f"{index}:hash{index * 7 % 10}": float(value) for index, value in enumerate(samples)}
    return TaskScore(name, "acc", float(np.mean(samples)), len(samples), ids, **facts)


def evaluation(name, *scores):
    return Evaluation(name, {one.task: one for one in scores}, {"lm_eval_version": "0"})


def test_packed_evaluations_come_back_whole(tmp_path):
    before = evaluation("m", score("a", [0, 1, 0.5, 1] * 3, settings={"n": "1"}, leaves=("a",)), score("b", [1, 0]))
    hub = before.tasks["b"]._replace(task="c", samples=None, stderr=0.1)
    before = before._replace(tasks=before.tasks | {"c": hub})
    write_json(packed_evaluation(before), tmp_path / "deep" / "file.json")
    facts = read_json(tmp_path / "deep" / "file.json")
    assert facts["tasks"]["b"]["samples"] == [1, 0]
    assert unpacked_evaluation(facts, document_ids(before)) == before
    with pytest.raises(ValueError, match="b was evaluated on other documents"):
        unpacked_evaluation(facts, document_ids(before) | {"b": ["x", "y"]})


def test_json_has_no_infinity_and_no_halves(tmp_path):
    path = tmp_path / "file.json"
    write_json({"a": math.inf, "b": [math.nan, (1, 2)]}, path)
    assert json.loads(path.read_text()) == {"a": "inf", "b": ["nan", [1, 2]]}
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text())["a"] == "inf"  # still the one before
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"file.json is damaged .* done again"):
        read_json(path)
    assert read_json(tmp_path / "none.json") is None
    assert plain({1: -math.inf}) == {"1": "-inf"}


# Contrasts.


def arms_of(scores, seeds):
    return {seed: evaluation("x", *(score(task, values) for task, values in scores.items())) for seed in seeds}


def test_contrast_of_an_arm_with_itself_is_undecided():
    before = evaluation("m", score("a", [1, 0] * 50))
    same = arms_of({"a": [1, 1, 0, 0] * 25}, [0, 1])
    result = contrast(before, same, same, ["a"], num_resamples=2000)
    assert result.difference == 0
    assert result.interval.low < 0 < result.interval.high  # by the two added documents alone
    assert result.verdict == "not enough evidence"
    assert (result.num_tasks, result.num_documents, result.num_seeds, result.paired_seeds) == (1, 100, (2, 2), True)


def test_contrast_by_hand():
    """One seed: the interval is that of a ratio of means, which the delta method knows."""
    draw = np.random.default_rng(5)
    before, first, second = (draw.random(400) < share for share in (0.5, 0.45, 0.3))
    result = contrast(
        evaluation("m", score("a", before), score("zero", [0, 0])),
        arms_of({"a": first, "zero": [0, 1]}, [0]),
        arms_of({"a": second, "zero": [0, 0]}, [1]),
        ["a", "zero"],
    )
    ratio = (first.mean() - second.mean()) / before.mean()
    assert result.difference == pytest.approx(ratio)
    error = np.std(first * 1.0 - second - ratio * before) / before.mean() / math.sqrt(400)
    assert result.interval == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.03)
    assert (result.verdict, result.num_tasks, result.paired_seeds) == ("higher", 1, False)
    swapped = contrast(
        evaluation("m", score("a", before)), arms_of({"a": second}, [0]), arms_of({"a": first}, [0]), ["a"]
    )
    assert swapped.verdict == "lower"


def test_seeds_that_differ_widen_the_interval():
    draw = np.random.default_rng(6)
    before, plain_arm = draw.random(2000) < 0.5, draw.random(2000) < 0.4
    better = draw.random(2000) < 0.5
    first = {0: evaluation("x", score("a", better)), 1: evaluation("x", score("a", draw.random(2000) < 0.3))}
    second = arms_of({"a": plain_arm}, [0, 1])
    initial = evaluation("m", score("a", before))
    both = contrast(initial, first, second, ["a"], num_resamples=2000)
    one = contrast(initial, {0: first[0]}, {0: second[0]}, ["a"], num_resamples=2000)
    assert one.verdict == "higher"
    assert both.verdict == "not enough evidence"
    assert both.interval.high - both.interval.low > 2 * (one.interval.high - one.interval.low)


def test_seeds_that_both_arms_have_are_drawn_together():
    """What a seed does to both arms alike takes no part in their difference."""
    draw = np.random.default_rng(7)
    before, extra = draw.random(2000) < 0.5, draw.random(2000) < 0.1
    shares = {0: 0.2, 1: 0.8}
    second = {seed: evaluation("x", score("a", draw.random(2000) < share)) for seed, share in shares.items()}
    first = {
        seed: evaluation("x", score("a", np.maximum(list(one.tasks["a"].samples.values()), extra)))
        for seed, one in second.items()
    }
    initial = evaluation("m", score("a", before))
    assert contrast(initial, first, second, ["a"], num_resamples=2000).verdict == "higher"
    others = {seed + 2: one for seed, one in second.items()}
    assert contrast(initial, first, others, ["a"], num_resamples=2000).verdict == "not enough evidence"


def test_contrast_without_documents_has_no_interval():
    before = evaluation("m", score("a", [1, 0]))
    bare = {0: before._replace(tasks={"a": before.tasks["a"]._replace(samples=None)})}
    result = contrast(before, bare, bare, ["a"])
    assert (result.interval, result.verdict) == (None, "not enough evidence")


def test_mean_evaluation_is_the_mean_of_each_document():
    seeds = [evaluation("x", score("a", values)) for values in ([1, 0, 0], [1, 1, 0])]
    pooled = mean_evaluation(seeds).tasks["a"]
    assert list(pooled.samples.values()) == [1.0, 0.5, 0.0]
    assert pooled.score == pytest.approx(0.5)


# Runs, with a stand-in for the processes.


class Stage:
    """An experiment in a folder whose processes write made-up results at once."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.output, self.said, self.commands = folder, folder / "out", [], []
        self.broken, self.seconds = set(), 60.0
        for name in ("chats", "target", "other"):
            (folder / f"{name}.jsonl").write_text(f"{name}\n")
        self.experiment = minimal()
        monkeypatch.setattr(run, "_wait", self.wait)

    def runner(self, **options):
        return Runner(self.experiment, self.folder, self.output, self.said.append, **options)

    def wait(self, command, log, append):
        self.commands.append(command)
        job = json.loads(Path(command[-1]).read_text(encoding="utf-8"))
        phases = command[command.index("stm_plugin.experiment.arm") + 1 : -1]
        if Path(job["work"]).name in self.broken:
            log.write_text("Traceback\nRuntimeError: it broke\n\n")
            return 1
        if phases[-1] == "initial":
            write_json(initial_result(job["settings"]), Path(job["result"]))
        if phases[-1] == "measure":
            write_json(run_result(job["settings"], self.seconds), Path(job["result"]))
        return 0

    def names(self):
        """What the processes were for, in order."""
        return [Path(command[-1]).parent.name for command in self.commands]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    return Stage(tmp_path, monkeypatch)


BEFORE = evaluation("m", score("t", [1, 0] * 40), score("arc_challenge", [1, 1, 0] * 40), score("gsm8k", [0, 1] * 30))
HERE = {"versions": {"torch": "2"}, "machine": {"platform": "x", "cores": 2, "gpus": []}, "commit": "abc"}


def initial_result(settings):
    return {
        "settings": settings,
        "evaluation": packed_evaluation(BEFORE),
        "documents": document_ids(BEFORE),
        "drift_answers": [[[1, 2], 1]] * 24,
        "seconds": {"total": 5.0},
        "date": "2026-01-01T00:00:00+00:00",
    } | HERE


def run_result(settings, seconds=60.0):
    """A run that forgets a lot, unless it is an STM run."""
    is_stm = settings["kind"] == "stm"
    lost = [1, 1, 0] * 40 if is_stm else [1, 0, 0] * 20 + [0, 0, 0] * 20
    after = evaluation(
        str(settings["seed"]), score("t", [1, 1] * 40), score("arc_challenge", lost), score("gsm8k", [0, 1] * 30)
    )
    facts = arm._forgetting(settings, initial_result(settings), after)
    return {
        "arm": settings["arm"],
        "seed": settings["seed"],
        "kind": settings["kind"],
        "settings": settings,
        "steps": 7,
        "masks": {"threshold": 2.5, "masked_fraction": 0.2} if is_stm else None,
        "losses": [[1, 2.0], [7, 1.0]],
        "scoring": "made" if is_stm else None,
        "seconds": {"scoring": 3.0 if is_stm else 0.0, "training": 50.0, "measuring": 7.0, "total": seconds},
        **facts,
        "evaluation": packed_evaluation(after),
        "drift": {"nats_per_token": 0.1 + settings["seed"] / 100, "tokens": 9},
        "weight_change_l2": 2.0,
        "answers_perplexity": {"mean": 4.0, "std": 1.0, "pooled": 3.0},
        "date": f"2026-01-0{settings['seed'] + 2}T00:00:00+00:00",
    } | HERE


ORDER = ["plain-0", "stm-3", "plain-1", "stm-2", "other-0", "kl-0"]


def test_runs_are_done_once_and_in_order(stage):
    assert stage.runner().run(stage.experiment.runs()) == []
    assert stage.names() == ["check", "initial", *ORDER]
    assert all(command[0] == sys.executable for command in stage.commands)
    assert not list((stage.output / "work").iterdir())
    assert stage.runner().run(stage.experiment.runs()) == []
    assert stage.names() == ["check", "initial", *ORDER]
    assert stage.said[-1] == f"6 of 6 runs are there already, in {stage.output}."
    run_path(stage.output, RunName("stm", 3)).unlink()
    stage.runner().run(stage.experiment.runs())
    assert stage.names()[-2:] == ["check", "stm-3"]


def test_a_failure_is_told_and_the_others_go_on(stage):
    stage.broken = {"stm-3"}
    assert stage.runner().run(stage.experiment.runs()) == ["stm/3"]
    assert stage.names()[2:] == ORDER
    assert any("stm-3 failed: RuntimeError: it broke" in line and "stm-3.log" in line for line in stage.said)
    assert not run_path(stage.output, RunName("stm", 3)).exists()
    stage.broken = set()
    assert stage.runner().run(stage.experiment.runs()) == []
    assert stage.names()[-1] == "stm-3"


@pytest.mark.parametrize("name", ["check", "initial"])
def test_nothing_runs_without_a_check_and_an_initial_model(stage, name):
    stage.broken = {name}
    with pytest.raises(RunFailedError, match=f"{name} failed: RuntimeError: it broke"):
        stage.runner().run(stage.experiment.runs())
    assert stage.names()[-1] == name


def test_a_changed_setting_is_named_and_refused_or_made_anew(stage):
    stage.runner().run(stage.experiment.runs())
    stage.experiment = minimal(training={"learning_rate": 1e-5, "weight_decay": 0.1})
    with pytest.raises(ValueError, match=r"plain/0: training.learning_rate was 0.0002, is now 1e-05") as caught:
        stage.runner().run(stage.experiment.runs())
    assert "other/0" not in str(caught.value)  # it has a learning rate of its own
    assert "--again" in str(caught.value)
    assert len(stage.commands) == 8
    stage.runner().run(stage.experiment.chosen_runs(["other"]))
    assert len(stage.commands) == 8
    stage.runner(again=True).run(stage.experiment.runs())
    assert stage.names()[8:] == ["check", *[name for name in ORDER if name != "other-0"]]
    (stage.folder / "chats.jsonl").write_text("others\n")
    with pytest.raises(ValueError, match=r"kl/0: files.chats.jsonl was"):
        stage.runner().run(stage.experiment.runs())


def test_it_stops_before_a_run_that_would_end_too_late(stage, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    wait = stage.wait

    def slow(command, log, append):
        clock[0] += 60 if "measure" in command else 0
        return wait(command, log, append)

    monkeypatch.setattr(run, "_wait", slow)
    assert stage.runner(minutes=2.5).run(stage.experiment.runs()) == []
    assert stage.names() == ["check", "initial", "plain-0", "stm-3"]
    assert stage.said[-1].startswith("Stopped before plain/1, which takes about 1 min: 4 runs are left.")


def test_estimates_are_of_the_same_arm_or_else_the_longest(stage):
    runner = stage.runner()
    assert runner.estimate(RunName("plain", 1)) is None
    runner.run(stage.experiment.chosen_runs(["plain/0"]))
    stage.seconds = 90.0
    runner.run(stage.experiment.chosen_runs(["stm/3"]))
    assert runner.estimate(RunName("plain", 1)) == 60
    assert runner.estimate(RunName("kl", 0)) == 90


def test_launch_trains_in_several_processes_and_measures_in_one(stage):
    stage.experiment = minimal(launch=["accelerate", "launch", "--num_processes", 2])
    stage.runner().run(stage.experiment.chosen_runs(["plain/0"]))
    train, measure = stage.commands[2:]
    assert Path(train[0]).name == "accelerate"
    assert train[1:6] == ["launch", "--num_processes", "2", "-m", "stm_plugin.experiment.arm"]
    assert train[6] == "train"
    assert measure[:4] == [sys.executable, "-m", "stm_plugin.experiment.arm", "measure"]


def test_one_at_a_time_in_a_folder(stage):
    filelock = pytest.importorskip("filelock", reason="filelock is not installed")
    stage.output.mkdir()
    with (
        filelock.FileLock(stage.output / ".lock", is_singleton=False),
        pytest.raises(ValueError, match="another stm experiment works in"),
    ):
        stage.runner().run(stage.experiment.runs())


# The command and its table.


def command(*arguments):
    parser = argparse.ArgumentParser()
    from stm_plugin.experiment import command as module

    module.add_arguments(parser)
    return module.main(parser.parse_args(list(map(str, arguments))))


@pytest.fixture
def done(stage):
    """A stage with all results but one, and its YAML."""
    stage.runner().run(stage.experiment.chosen_runs(["plain", "stm", "kl"]))
    stage.config = stage.folder / "minimal.yaml"
    stage.config.write_text(MINIMAL)
    return stage


def test_list(done, capsys):
    assert command(done.config, "--output", done.output, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["plain/0", "stm/3", "plain/1", "stm/2", "other/0", "kl/0"]
    assert lines[0].endswith("done, 60 s")
    assert lines[4].split() == ["other/0", "plain", "to", "do"]
    done.config.write_text(MINIMAL.replace("{r: 4,", "{r: 8,"))
    command(done.config, "--output", done.output, "--list")
    assert "done with other settings: lora.r was 4, is now 8" in capsys.readouterr().out.splitlines()[0]


def test_arguments_are_checked(done):
    with pytest.raises(ValueError, match="--data is missing"):
        command(done.config, "--output", done.output)
    with pytest.raises(ValueError, match="no such folder"):
        command(done.config, "--data", done.folder / "none")
    with pytest.raises(ValueError, match="--minutes must be more than 0, got 0"):
        command(done.config, "--data", done.folder, "--minutes", 0)
    with pytest.raises(ValueError, match="no such file"):
        command(done.folder / "none.yaml", "--list")
    with pytest.raises(ValueError, match="nothing has been run yet"):
        command(done.config, "--output", done.folder / "elsewhere", "--table")


def test_table(done, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert command(done.config, "--output", done.output, "--table") == 0
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == ["table.md", "results.json", "forgetting.png"]
    text = (done.output / "table.md").read_text()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert rows["initial model"][4:7] == ["0.5000", "0.6667", "0.5000"]
    # by hand: t from 1/2 to 1; arc_challenge from 2/3 to 1/6, gsm8k unchanged
    assert rows["plain"][2].startswith("+100.00 % [")
    assert rows["plain"][3].startswith("-37.50 % [")
    assert rows["plain"][1] == "-"
    assert rows["stm"][:2] == ["2", "20.00 %"]
    assert rows["stm"][3].startswith("0.00 % [")
    assert rows["stm"][-1] == "50 + 3"
    assert rows["plain"][-1] == "50"
    assert rows["plain"][-3] == "0.105 (0.1 to 0.11)"
    assert "Does stm forget less than plain? BWT 0.00 % against -37.50 %" in text
    assert "over 180 documents and 2 seeds: **yes**." in text
    assert "Does stm gain more on the target than plain?" in text
    assert "Does plain forget? BWT -37.50 %" in text
    assert "Not done: other/0." in text
    assert "mean (standard deviation) over rows: chats.jsonl 4.00 (1.00)." in text
    assert "2026-01-01 to 2026-01-05, 6 results: x, 2 cores, no GPU; torch 2, commit abc" in text
    summary = json.loads((done.output / "results.json").read_text())
    assert summary["arms"]["plain"]["bwt"]["mean"] == pytest.approx(-0.375)
    assert summary["arms"]["plain"]["bwt"]["of_seeds"] == pytest.approx([-0.375, -0.375])
    assert summary["arms"]["plain"]["verdict"] == "forgets"
    assert summary["pairs"][0]["bwt"]["verdict"] == "higher"
    assert summary["pairs"][0]["ti"]["verdict"] == "not enough evidence"


def test_table_leaves_out_results_of_other_settings(done):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = run_path(done.output, RunName("plain", 1))
    facts = read_json(path)
    facts["settings"]["files"]["other.jsonl"] = "another"
    write_json(facts, path)
    path = run_path(done.output, RunName("kl", 0))
    facts = read_json(path)
    facts["settings"]["options"]["kl_coef"] = 3
    write_json(facts, path)
    command(done.config, "--output", done.output, "--table")
    text = (done.output / "table.md").read_text()
    assert "plain/1 is left out, its settings are others: other.jsonl is another file" in text
    assert "kl/0 is left out, its settings are others: options.kl_coef was 3, is now 0.1." in text
    assert "| plain | 1 |" in text


def test_plots_show_shares_and_rates_where_arms_differ_in_them(done, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from stm_plugin.experiment.plots import write_plots
    from stm_plugin.experiment.summary import summarize

    summary = summarize(done.experiment, done.output)
    one = summary["arms"]["stm"]
    for index in (1, 2):
        rate = {"learning_rate": 1e-3 * index, "weight_decay": 0.1}
        masked = {"mean": 0.1 * index, "low": 0.1, "high": 0.2}
        summary["arms"][f"stm{index}"] = one | {"training": rate, "masked_fraction": masked}
    names = [path.name for path in write_plots(summary, tmp_path)]
    assert names == ["forgetting.png", "masked.png", "learning_rate.png"]
    first = [(tmp_path / name).read_bytes() for name in names]
    write_plots(summary, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first


# Processes.


def test_a_process_ends_with_its_parent(tmp_path):
    """Killed by SIGKILL, the parent can do nothing for it."""
    child = "import threading, time; from stm_plugin.experiment.arm import _end_with_parent as end; "
    child += "threading.Thread(target=end, daemon=True).start(); "
    child += "open('started', 'w').close(); time.sleep(60); open('survived', 'w').close()"
    parent = "import sys; from pathlib import Path; from stm_plugin.experiment.run import _wait; "
    parent += f"_wait([sys.executable, '-c', {child!r}], Path('log'), append=False)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "started").exists())
    child_pids = children(process.pid)
    assert child_pids
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, child_pids)))


def test_ctrl_c_ends_the_process_and_is_told(tmp_path):
    child = "import time; open('started', 'w'); time.sleep(60)"
    parent = "import signal, sys; from pathlib import Path; from stm_plugin.experiment.run import _wait\n"
    parent += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test in the background ignores it
    parent += f"try: _wait([sys.executable, '-c', {child!r}], Path('log'), append=False)\n"
    parent += "except KeyboardInterrupt: sys.exit(130)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "started").exists())
    child_pids = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not any(map(alive, child_pids))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The whole, with a tiny model.


TINY = """
title: tiny
model: {model}
data: chats.jsonl
rows: 8
target: ["t:arc_challenge=target.jsonl"]
non_target: [arc_challenge=other.jsonl]
evaluation: {{batch_size: 4}}
drift: {{prompts: ["Who are you?", "What is it?"], max_new_tokens: 4}}
training:
  max_steps: {steps}
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  bf16: false
  use_cpu: true
  gradient_checkpointing: false
  logging_steps: 1
lora: {{r: 2, target_modules: [q_proj, v_proj], lora_dropout: 0.1}}
compare: [[stm, plain]]
arms:
  plain: {{}}
  stm: {{stm_threshold: 5000}}
  full: {{lora: null, kl_coef: 0.1}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, make_model, tokenizer, chats):
    """A folder with a model, chats and two local tasks."""
    for package in ("trl", "lm_eval", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, first in (("target", 0), ("other", 20)):
        rows = [
            {
                "question": f"What is {number} and one?",
                "choices": {"text": [str(number + 1), "the sea", "Paris", "sorted"], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[number % 4],
            }
            for number in range(first, first + 16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "tiny.yaml").write_text(TINY.format(model=folder / "model", steps=3))
    return folder


def in_process(command, log, append):
    """A stand-in for `_wait` that does what the process would, here, where everything is imported."""
    phases = command[command.index("stm_plugin.experiment.arm") + 1 :]
    job = json.loads(Path(phases[-1]).read_text())
    Path(phases[-1]).write_text(json.dumps(job | {"watch": False}))
    arm.main(phases)
    return 0


@pytest.fixture(scope="module")
def tiny_run(tiny):
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "_wait", in_process)
    try:
        assert command(tiny / "tiny.yaml", "--data", tiny, "--output", tiny / "out", "--keep-models") == 0
    finally:
        patch.undo()
    return tiny / "out"


def test_results_of_a_whole_experiment(tiny_run):
    initial = read_json(tiny_run / "initial.json")
    assert initial["evaluation"]["tasks"]["t"]["num_samples"] == 16
    assert len(initial["drift_answers"]) == 2
    assert set(initial["settings"]["files"]) == {"other.jsonl", "target.jsonl"}
    for name in ("plain", "stm", "full"):
        facts = read_json(run_path(tiny_run, RunName(name, 0)))
        assert facts["steps"] == 3
        assert [step for step, _ in facts["losses"]] == [1, 2, 3]
        assert facts["label_tokens"] == facts["answers_perplexity"]["tokens"] > 0
        assert facts["weight_change_l2"] > 0
        assert facts["drift"]["nats_per_token"] > 0
        assert facts["seconds"]["total"] >= facts["seconds"]["training"]
        before = initial["evaluation"]["tasks"]["arc_challenge"]["score"]
        after = facts["evaluation"]["tasks"]["arc_challenge"]["score"]
        assert facts["bwt"] == pytest.approx((after - before) / before)
        assert facts["evaluation"]["tasks"]["t"]["samples"] != []
        assert facts["versions"]["trl"]
        assert facts["commit"] is None or len(facts["commit"]) >= 40
    assert (facts["masks"], facts["scoring"]) == (None, None)


def test_receipt_facts_of_a_masked_run(tiny_run):
    facts = read_json(run_path(tiny_run, RunName("stm", 0)))
    assert facts["masks"]["threshold"] == 5000
    assert 0 < facts["masks"]["masked_fraction"] < 1
    assert facts["masks"]["label_tokens"] == facts["label_tokens"]
    assert facts["scoring"] == "made"
    assert list((tiny_run / "scores").iterdir())


@pytest.mark.parametrize("name", ["plain", "full"])
def test_measures_are_those_of_the_saved_model(tiny, tiny_run, name):
    """Weight change and drift by hand, from the model that the run left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    facts = read_json(run_path(tiny_run, RunName(name, 0)))
    initial = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    saved = tiny_run / "models" / f"{name}-0"
    if name == "full":
        tuned = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, saved).merge_and_unload()
    pairs = zip(initial.parameters(), tuned.parameters(), strict=True)
    change = math.sqrt(sum(float((a - b).double().pow(2).sum()) for a, b in pairs))
    assert facts["weight_change_l2"] == pytest.approx(change, rel=1e-4)
    total, count = 0.0, 0
    for ids, start in read_json(tiny_run / "initial.json")["drift_answers"]:
        with torch.no_grad():
            p, q = (model.double()(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (initial, tuned))
        total += float((p.exp() * (p - q)).sum(-1)[start - 1 : -1].sum())
        count += len(ids) - start
    assert facts["drift"]["nats_per_token"] == pytest.approx(total / count, rel=1e-3)


def test_table_of_a_whole_experiment(tiny, tiny_run):
    assert command(tiny / "tiny.yaml", "--output", tiny_run, "--table") == 0
    text = (tiny_run / "table.md").read_text()
    assert text.count("\n| ") == 6  # head, rule, initial model, three arms
    assert "Does stm forget less than plain?" in text
    assert (tiny_run / "forgetting.png").stat().st_size > 1000


@pytest.mark.slow
def test_killed_and_started_again(tiny):
    """Real processes: SIGKILL in the middle of a run, and a start that goes on with it."""
    config, output = tiny / "killed.yaml", tiny / "killed"
    config.write_text(TINY.format(model=tiny / "model", steps=3).replace("  full: {lora: null, kl_coef: 0.1}\n", ""))
    script = "import argparse, sys; from stm_plugin.experiment import command; p = argparse.ArgumentParser(); "
    script += "command.add_arguments(p); sys.exit(command.main(p.parse_args()))"
    words = [sys.executable, "-c", script, str(config), "--data", str(tiny), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STM_HOME": str(tiny / "home")}
    process = subprocess.Popen(words, env=environment)
    plain_result, stm_result = (run_path(output, RunName(name, 0)) for name in ("plain", "stm"))
    wait_for(lambda: (output / "work" / "stm-0" / "model").exists(), 400)  # it trains
    pids = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, pids)))
    assert plain_result.exists()
    assert not stm_result.exists()
    before = plain_result.read_bytes(), plain_result.stat().st_mtime_ns
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 2 runs are there already" in done.stdout
    assert (plain_result.read_bytes(), plain_result.stat().st_mtime_ns) == before
    assert read_json(stm_result)["steps"] == 3
    assert not list((output / "work").iterdir())
    again = subprocess.run([*words, "--table"], env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "| stm |" in (output / "table.md").read_text()

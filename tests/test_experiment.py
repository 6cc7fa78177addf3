"""`stm experiment`: its YAML, its runs and what stops them, its table."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stm_plugin.experiment import arm, models, run
from stm_plugin.experiment.config import RunName, make_experiment, read_experiment
from stm_plugin.experiment.contrast import contrast
from stm_plugin.experiment.preparing import ScoringClock, preparing
from stm_plugin.experiment.results import (
    document_ids,
    model_path,
    packed_evaluation,
    read_json,
    run_path,
    unpacked_evaluation,
    write_json,
)
from stm_plugin.experiment.run import RunFailedError, Runner
from stm_plugin.experiment.settings import differences, digests, plain
from stm_plugin.experiment.summary import mean_evaluation, summarize
from stm_plugin.experiment.yaml_text import load_yaml
from stm_plugin.forgetting import reuse
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
        ({"evaluation": {"chat_template_kwargs": {"tools": []}}}, "in evaluation: 'tools' is not for"),
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
        (
            {
                "training": {"model_init_kwargs": {"dtype": "bfloat16"}},
                "main": None,
                "compare": None,
                "arms": {"a": {}},
            },
            "in arms.a: training.model_init_kwargs.dtype would train another model than the one that is measured. Set",
        ),
        (
            {"arms": {"a": {"training": {"model_init_kwargs": {"revision": "v2"}}}}},
            "in arms.a: training.model_init_kwargs.revision would train another model",
        ),
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


# What is generated, and models that other runs leave.

MORE = """
rows: 10
evaluation: {run_model_code: true}
generate:
  made: {method: self-output, samples: 4, temperature: 0.5, batch_size: 2}
  again: {method: rephrase, data: asked.jsonl, rows: null, template: how.txt, dtype: bfloat16, run_model_code: false}
main: [plain, stm, own]
arms:
  diff: {stm_strategy: difference, stm_tuned_model: plain/1, seeds: [0, 1]}
  plain: {seeds: [0, 1]}
  stm: {stm_threshold: 2.5}
  own: {data: made, title: Self-Output}
  both: {data: again, stm_strategy: hybrid, stm_tuned_model: own}
  hub: {stm_strategy: hybrid, stm_tuned_model: some/model}
"""


def more(**changes):
    return make_experiment(load_yaml(MINIMAL) | load_yaml(MORE) | changes, "more")


def test_generations_take_over_what_they_do_not_change():
    made, again = more().generate.values()
    settings = made.generate_settings(Path("data"), Path("out"))
    assert (settings.method, settings.samples, settings.rows, settings.batch_size) == ("self-output", 4, 10, 2)
    assert (settings.model, settings.dtype, settings.run_model_code) == ("some/model", "float32", True)
    assert (settings.data, settings.output) == ("data/chats.jsonl", Path("out/generated/made.jsonl"))
    assert (settings.sampling.temperature, settings.sampling.top_p) == (0.5, 0.95)
    settings = again.generate_settings(Path("data"), Path("out"))
    assert (settings.data, settings.rows, settings.dtype) == ("data/asked.jsonl", None, "bfloat16")
    assert (settings.template, settings.run_model_code, settings.num_samples) == (Path("data/how.txt"), False, 1)
    assert again.files() == ["asked.jsonl", "how.txt"]
    assert json.loads(json.dumps(again.options, allow_nan=False)) == again.options


def test_generation_by_a_server():
    given = {"method": "self-output", "endpoint": "http://localhost:1/v1", "concurrency": 3, "timeout": 5}
    generation = more(generate={"made": given, "again": given}).generate["made"]
    endpoint = generation.generate_settings(Path(), Path()).endpoint
    assert (endpoint.url, endpoint.model, endpoint.concurrency, endpoint.timeout) == (given["endpoint"], None, 3, 5)
    facts = generation.settings()
    assert facts["endpoint_model"] == "some/model"
    assert not {"endpoint", "concurrency", "timeout", "batch_size"} & set(facts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": ["made"]}, "`generate` must be a mapping of names"),
        ({"generate": {"a/b": {}}}, "in generate.a/b: the name of a data set is of letters"),
        ({"generate": {"a.b": {}}}, "in generate.a.b: the name of a data set is of letters"),
        ({"generate": {"made": {"metod": "rephrase"}}}, "in generate.made: no key 'metod'; did you mean method"),
        ({"generate": {"made": {"output": "x"}}}, "in generate.made: output is set by --output of the experiment"),
        ({"generate": {"made": {}}}, "in generate.made: `method` is missing"),
        ({"generate": {"made": {"method": "x"}}}, "in generate.made: `method` must be one of self-output, rephrase"),
        ({"generate": {"made": {"method": "rephrase", "top_p": 2}}}, "in generate.made: `top_p` must be more than 0"),
        ({"generate": {"made": {"method": "rephrase", "samples": "4"}}}, "`samples` must be a whole number, got '4'"),
        ({"generate": {"made": {"method": "rephrase", "seed": True}}}, "`seed` must be a whole number, got True"),
        ({"generate": {"made": {"method": "rephrase", "run_model_code": 1}}}, "`run_model_code` must be true or fal"),
        ({"generate": {"made": {"method": "rephrase", "dtype": "f4"}}}, "`dtype` must be one of auto, float32"),
        (
            {"generate": {"made": {"method": "rephrase", "data": "made"}}},
            "in generate.made: its data, 'made', are gen",
        ),
        ({"generate": {"made": {"method": "self-output", "template": "x"}}}, "`template` is for `method` rephrase"),
        ({"data": "made"}, "its data, 'made', are generated ones. Name the file"),
        ({"arms": {"a": {"stm_tuned_model": "plian/0"}, "plain": {}}}, "in arms.a: stm_tuned_model: plian/0: no arm"),
        ({"arms": {"a": {"stm_tuned_model": "plain/3"}, "plain": {}}}, "plain has no seed 3, it has 0."),
        ({"arms": {"a": {"stm_tuned_model": "a"}}}, "an arm cannot take its own model (a -> a)"),
        (
            {"arms": {"a": {"stm_tuned_model": "b/0"}, "b": {"stm_tuned_model": "c"}, "c": {"stm_tuned_model": "a"}}},
            "in arms.a: stm_tuned_model: an arm cannot take its own model (a -> b -> c -> a)",
        ),
        ({"arms": {"a": {"stm_reference": "b"}, "b": {"stm_tuned_model": "a"}}}, "in arms.a: stm_reference: an arm"),
        ({"arms": {"a": {"stm_reference": "plian/0"}, "plain": {}}}, "in arms.a: stm_reference: plian/0: no arm"),
    ],
)
def test_what_is_not_allowed_of_data_systems_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        more(**{"main": None, "compare": None} | changes)


def test_tuned_models_are_runs_or_what_they_were():
    experiment = more()
    names = {name: experiment.tuned_run(RunName(name, 0)) for name in experiment.arms}
    assert names == {"diff": ("plain", 1), "both": ("own", 0)} | dict.fromkeys(("plain", "stm", "own", "hub"))
    assert experiment.runs_to_keep() == {RunName("plain", 1), RunName("own", 0)}
    assert experiment.run_settings(RunName("hub", 0))["options"]["stm_tuned_model"] == "some/model"


def test_references_are_runs_or_what_they_were():
    """Those of an arm's name that are words of the option are its words."""
    names = {"other": "plain", "hub": "some/model", "current": "current", "initial": "initial"}
    arms = {"plain": {}, **{name: {"stm_reference": reference} for name, reference in names.items()}}
    experiment = more(main=None, compare=None, arms=arms)
    assert experiment.runs_to_keep() == {experiment.tuned_run(RunName("other", 0))} == {RunName("plain", 0)}
    references = {name: experiment.run_settings(RunName(name, 0))["options"]["stm_reference"] for name in names}
    assert references == names | {"other": "plain/0"}


def test_settings_hold_what_generated_data_and_tuned_models_depend_on():
    experiment = more()
    run_name = RunName("both", 0)
    before = experiment.run_settings(run_name)
    assert before["options"]["stm_tuned_model"] == "own/0"
    assert experiment.files(run_name) == ["asked.jsonl", "chats.jsonl", "how.txt", "other.jsonl", "target.jsonl"]
    changed = load_yaml(MORE)
    changed["generate"]["made"] |= {"top_p": 0.9, "batch_size": 7}
    changed["generate"]["again"]["method"] = "rephrase"
    changed["generate"]["again"]["seed"] = 5
    changed["arms"]["own"]["training"] = {"learning_rate": 1.0}
    assert differences(before, more(**changed).run_settings(run_name)) == [
        "generated.seed was 0, is now 5",
        "tuned_run.training.learning_rate was 0.0002, is now 1.0",
        "tuned_run.generated.top_p was 0.95, is now 0.9",
    ]
    now = minimal().run_settings(RunName("plain", 0))
    before = {name: value for name, value in now.items() if name not in ("generated", "tuned_run")}
    assert differences(before, now) == []  # results from before stay good


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
    assert len({arm.data for arm in experiment.arms.values()}) == 5
    assert {generation.options["method"] for generation in experiment.generate.values()} == {"self-output", "rephrase"}
    assert set(experiment.generate) < {arm.data for arm in experiment.arms.values()}
    assert {o["stm_strategy"] for o in options if o.get("stm_tuned_model") == "plain/0"} == {"difference", "hybrid"}
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
        parts = make_parts(settings, tmp_path / "model", tmp_path / "out", use_cpu=True)
        own = experiment.arms[name.arm]
        assert isinstance(parts.args, STMSFTConfig) == (own.kind == "stm")
        assert isinstance(parts.args, KLSFTConfig) == (own.kind == "kl")
        assert (parts.peft_config is None) == (own.lora is None)
        assert parts.args.seed == name.seed
        options = own.options
        for option in ("stm_tuned_model", "stm_reference"):
            if options.get(option) == "plain/0":  # of a run of the experiment, the trainer gets the folder
                options = options | {option: str(model_path(tmp_path / "out", RunName("plain", 0)))}
        assert all(getattr(parts.args, key) == value for key, value in options.items())
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
    assert pooled.stderr is None
    seeds = [evaluation("x", score("a", [1, 0], stderr=stderr)) for stderr in (0.1, 0.2)]
    assert mean_evaluation(seeds).tasks["a"].stderr == pytest.approx(0.15)


# Runs, with a stand-in for the processes.


class Stage:
    """An experiment in a folder whose processes write made-up results at once."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.output, self.said, self.commands = folder, folder / "out", [], []
        self.broken, self.seconds = set(), 60.0
        for name in ("chats", "target", "other"):
            (folder / f"{name}.jsonl").write_text(f"{name}\n")
        self.experiment, self.models = minimal(), {}
        monkeypatch.setattr(run, "_wait", self.wait)
        monkeypatch.setattr(run, "model_digest", lambda name: self.models.get(name, f"files of {name}"))

    def runner(self, **options):
        return Runner(self.experiment, self.folder, self.output, self.said.append, **options)

    def wait(self, command, log, append):
        self.commands.append(command)
        job = json.loads(Path(command[-1]).read_text(encoding="utf-8"))
        phases = command[command.index("stm_plugin.experiment.arm") + 1 : -1]
        if Path(job["work"]).name in self.broken:
            log.write_text("Traceback\nRuntimeError: it broke\n\n")
            return 1
        if "train" in phases:
            (Path(job["work"]) / "model").mkdir()
        if phases[-1] == "generate":
            data = self.output / "generated" / f"{job['generation']}.jsonl"
            write_json(RECEIPT | {"made_for": job["settings"]}, data.with_suffix(".receipt.json"))
            data.write_text("{}\n")
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


RECEIPT = {
    "method": "self-output",
    "rows": {"read": 10, "with_a_passing_sample": 4, "written": 8},
    "samples": {"generated": 40, "passed": 5, "acceptance_rate": 0.125, "without_an_answer": {}},
    "perplexity": {"before": {"mean": 4.0, "std": 2.0}, "after": {"mean": 3.0, "std": 1.5}},
    "tokens_generated": 12345,
    "seconds": {"generate": 500.0, "verify": 12.0, "total": 512.0},
} | HERE


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
        "answers_perplexity": {
            "of": {"data": settings["data"], "digest": "as ever"},
            "mean": 4.0,
            "std": 1.0,
            "pooled": 3.0,
        },
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
    command(done.config, "--output", done.output, "--list", "--only", "stm/2", "other")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["stm/2", "other/0"]
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
    with pytest.raises(ValueError, match="--only is of no use with --table"):
        command(done.config, "--output", done.output, "--table", "--only", "stm")
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
    assert rows["stm"][-2:] == ["3.0", "50"]
    assert rows["plain"][-2:] == ["-", "50"]
    assert rows["plain"][-4] == "0.105 (0.1 to 0.11)"
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


def test_table_leaves_out_results_of_other_settings(done, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = run_path(done.output, RunName("plain", 1))
    facts = read_json(path)
    facts["settings"]["files"]["other.jsonl"] = "another"
    write_json(facts, path)
    path = run_path(done.output, RunName("kl", 0))
    facts = read_json(path)
    facts["settings"]["options"]["kl_coef"] = 3
    write_json(facts, path)
    capsys.readouterr()
    command(done.config, "--output", done.output, "--table")
    text = (done.output / "table.md").read_text()
    assert "stm: plain/1 is left out, its settings are others" in capsys.readouterr().err
    assert "Not done: other/0." in text
    assert "plain/1 is left out, its settings are others: other.jsonl is another file" in text
    assert "kl/0 is left out, its settings are others: options.kl_coef was 3, is now 0.1." in text
    assert "| plain | 1 |" in text


def test_table_leaves_out_what_was_trained_or_judged_otherwise(done):
    """By another file of the same name, however it came to be there, and by another task definition."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    later = run_path(done.output, RunName("plain", 1))
    facts = read_json(later)
    facts["answers_perplexity"]["of"]["digest"] = "another"
    facts["date"] = "2026-02-01T00:00:00+00:00"
    write_json(facts, later)
    command(done.config, "--output", done.output, "--table")
    text = (done.output / "table.md").read_text()
    assert "plain/0 is left out, it was trained on another chats.jsonl than the latest run." in text
    assert "stm/3 is left out, it was trained on another chats.jsonl" in text
    assert "| plain | 1 |" in text
    facts["answers_perplexity"]["of"]["digest"] = "as ever"
    facts["evaluation"]["tasks"]["t"]["settings"] = {"version": "1.1"}
    write_json(facts, later)
    command(done.config, "--output", done.output, "--table")
    text = (done.output / "table.md").read_text()
    assert "plain/1 is left out: t was evaluated differently: version is not set before and 1.1 after" in text
    assert "| plain | 1 |" in text
    assert "| stm | 2 |" in text


def test_seeds_are_compared_with_the_initial_scores_that_there_are(done):
    """Not with those that there were when they were made."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = run_path(done.output, RunName("plain", 0))
    facts = read_json(path)
    write_json(facts | {"bwt": 9.0, "ti": 9.0}, path)
    command(done.config, "--output", done.output, "--table")
    summary = json.loads((done.output / "results.json").read_text())
    assert summary["arms"]["plain"]["bwt"]["of_seeds"] == pytest.approx([-0.375, -0.375])
    assert summary["arms"]["plain"]["ti"]["of_seeds"] == pytest.approx([1.0, 1.0])


def test_table_has_the_arms_notes_and_the_initial_models_own_name(done):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = done.output / "initial.json"
    facts = read_json(path)
    facts["evaluation"]["versions"]["model_dtype"] = "torch.float32"
    write_json(facts, path)
    for result in (done.output / "runs").glob("*/*.json"):
        facts = read_json(result)
        facts["evaluation"]["versions"]["model_dtype"] = "torch.bfloat16"
        write_json(facts, result)
    command(done.config, "--output", done.output, "--table")
    text = (done.output / "table.md").read_text()
    assert text.count("Note: model_dtype is torch.float32 before and torch.bfloat16 after.") == 1
    path = run_path(done.output, RunName("kl", 0))
    facts = read_json(path)
    facts["evaluation"]["versions"]["model_dtype"] = "torch.float32"
    write_json(facts, path)
    command(done.config, "--output", done.output, "--table")
    assert "Note on plain, stm: model_dtype is torch.float32" in (done.output / "table.md").read_text()
    assert "Initial model: some/model." in text


def test_plots_show_shares_and_rates_where_arms_differ_in_them(done, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from stm_plugin.experiment.plots import write_plots
    from stm_plugin.experiment.summary import summarize

    def with_rates(**changes):
        summary = summarize(done.experiment, done.output)
        one = summary["arms"]["stm"]
        for index in (1, 2):
            rate = {"learning_rate": 1e-3 * index, "weight_decay": 0.1}
            masked = {"mean": 0.1 * index, "low": 0.1, "high": 0.2}
            facts = {"training": rate, "masked_fraction": masked}
            facts |= {name: values[index - 1] for name, values in changes.items()}
            summary["arms"][f"stm{index}"] = one | facts
        return summary

    names = [path.name for path in write_plots(with_rates(), tmp_path)]
    assert names == ["forgetting.png", "masked.png", "learning_rate.png"]
    first = [(tmp_path / name).read_bytes() for name in names]
    write_plots(with_rates(), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert len(write_plots(with_rates(rows=[5, 6]), tmp_path)) == 2  # they differ in more than the rate
    of_zero = with_rates()
    for facts in of_zero["arms"].values():  # of a target whose initial score is 0
        facts["ti"] = facts["ti"] | {"mean": None}
    assert len(write_plots(of_zero, tmp_path)) == 3


# Data that are generated, and models that other runs take, with the same stand-in.


def with_arms(**arms):
    return more(arms=arms, main=None, compare=None)


def phases_of(stage):
    """Folder and phases of each process."""
    return [f"{Path(command[-1]).parent.name}: {' '.join(command[3:-1])}" for command in stage.commands]


def test_data_are_generated_once_before_the_first_run_that_needs_them(stage):
    stage.experiment = with_arms(plain={}, a={"data": "made"}, b={"data": "made"})
    assert stage.runner().run(stage.experiment.runs()) == []
    assert stage.names() == ["check", "initial", "plain-0", "generate-made", "a-0", "b-0"]
    assert not list((stage.output / "work").iterdir())
    assert not (stage.output / "models").exists()
    assert "made: 5 of 40 samples passed, 8 rows written, 512 s" in stage.said
    run_path(stage.output, RunName("a", 0)).unlink()
    stage.runner().run(stage.experiment.runs())
    assert stage.names()[6:] == ["check", "a-0"]
    settings = read_json(run_path(stage.output, RunName("a", 0)))["settings"]
    assert set(settings["files"]) == {"chats.jsonl", "other.jsonl", "target.jsonl"}


def test_what_could_not_be_generated_fails_its_runs_and_is_gone_on_with(stage):
    stage.experiment = with_arms(a={"data": "made"}, b={"data": "made"}, plain={})
    stage.broken = {"generate-made"}
    assert stage.runner().run(stage.experiment.runs()) == ["a/0", "b/0"]
    assert stage.names() == ["check", "initial", "generate-made", "plain-0"]
    assert any("b/0 failed: its data, made, could not be generated" in line for line in stage.said)
    samples = stage.output / "generated" / "made.samples.jsonl"
    samples.write_text("what the process that ended has left")
    stage.broken = set()
    assert stage.runner().run(stage.experiment.runs()) == []
    assert stage.names()[4:] == ["check", "generate-made", "a-0", "b-0"]
    assert samples.exists()


def test_a_changed_generation_is_named_and_refused_or_made_anew(stage):
    stage.experiment = with_arms(a={"data": "made"}, plain={})
    stage.runner().run(stage.experiment.runs())
    samples = stage.output / "generated" / "made.samples.jsonl"
    samples.write_text("of the settings before")
    made = load_yaml(MORE)["generate"]["made"] | {"seed": 3}
    stage.experiment = more(
        arms={"a": {"data": "made"}, "plain": {}}, main=None, compare=None, generate={"made": made}
    )
    with pytest.raises(ValueError, match=r"a/0: generated.seed was 0, is now 3") as caught:
        stage.runner().run(stage.experiment.runs())
    assert "generate.made: seed was 0, is now 3" in str(caught.value)
    assert "plain/0" not in str(caught.value)
    assert stage.runner(again=True).run(stage.experiment.runs()) == []
    assert stage.names()[5:] == ["check", "generate-made", "a-0"]
    assert not samples.exists()
    (stage.folder / "chats.jsonl").write_text("others\n")
    with pytest.raises(ValueError, match=r"generate.made: files.chats.jsonl was"):
        stage.runner().run(stage.experiment.chosen_runs(["a"]))


def test_a_generated_data_set_has_no_files_name(stage):
    (stage.folder / "made").write_text("x")
    stage.experiment = with_arms(plain={})
    with pytest.raises(ValueError, match=r"in generate.made: .* has a file of this name, and `data: made` could mean"):
        stage.runner().run(stage.experiment.runs())
    assert stage.commands == []


def test_time_that_generating_took_counts(stage, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    wait = stage.wait

    def slow(command, log, append):
        clock[0] += 300 if "generate" in command else 0
        return wait(command, log, append)

    monkeypatch.setattr(run, "_wait", slow)
    stage.experiment = with_arms(a={"data": "made"}, plain={})
    assert stage.runner(minutes=4).run(stage.experiment.runs()) == []
    assert stage.names() == ["check", "initial", "generate-made"]
    assert stage.said[-1] == "Stopped before a/0: 2 runs are left. Start again to go on."


def test_results_of_an_older_task_definition_are_no_ones_of_today(stage, monkeypatch):
    """Found before hours of training, not when its scores are compared."""
    stage.experiment = with_arms(plain={})
    assert stage.runner().run(stage.experiment.runs()) == []
    before, file = stage.names(), stage.output / "initial.json"
    facts = read_json(file)
    facts["evaluation"]["tasks"]["t"]["settings"] = {"version": "1.0"}
    write_json(facts, file)
    assert stage.runner().run(stage.experiment.runs()) == []
    monkeypatch.setattr(run, "definition_version", lambda kind: f"2.0 of {kind}")
    with pytest.raises(ValueError, match=r"the definition of arc_challenge was of version 1.0, is now of 2.0 of arc_"):
        stage.runner().run(stage.experiment.runs())
    assert stage.names() == before


def test_a_run_comes_after_the_one_whose_model_it_takes(stage):
    tuned = {"stm_strategy": "hybrid", "stm_tuned_model": "plain/1"}
    stage.experiment = with_arms(diff=tuned, twice=tuned | {"stm_tuned_model": "diff"}, plain={"seeds": [0, 1]})
    assert stage.runner().run(stage.experiment.chosen_runs(["twice"])) == []
    assert stage.names() == ["check", "initial", "plain-1", "diff-0", "twice-0"]
    assert [path.name for path in sorted((stage.output / "models").iterdir())] == ["diff-0", "plain-1"]
    stage.runner().run(stage.experiment.runs())
    assert stage.names()[5:] == ["check", "plain-0"]
    settings = read_json(run_path(stage.output, RunName("diff", 0)))["settings"]
    assert settings["options"]["stm_tuned_model"] == "plain/1"
    assert (settings["tuned_run"]["arm"], settings["tuned_run"]["seed"]) == ("plain", 1)
    tuned_model = {"training": {"learning_rate": 1.0}, "seeds": [0, 1]}
    stage.experiment = with_arms(diff=tuned, plain=tuned_model)
    with pytest.raises(ValueError, match=r"diff/0: tuned_run.training.learning_rate was 0.0002, is now 1.0"):
        stage.runner().run(stage.experiment.chosen_runs(["diff"]))
    assert stage.runner(again=True).run(stage.experiment.chosen_runs(["diff"])) == []
    assert stage.names()[7:] == ["check", "plain-1", "diff-0"]


def test_a_model_that_is_gone_is_trained_again_and_its_result_stays(stage):
    tuned = {"stm_strategy": "hybrid", "stm_tuned_model": "plain"}
    stage.experiment = with_arms(plain={"data": "made"}, diff=tuned)
    stage.runner().run(stage.experiment.chosen_runs(["plain"]))
    kept, result = model_path(stage.output, RunName("plain", 0)), run_path(stage.output, RunName("plain", 0))
    before = result.read_bytes(), result.stat().st_mtime_ns
    for path in (*kept.iterdir(), *(stage.output / "generated").iterdir()):
        path.unlink()
    assert stage.runner().run(stage.experiment.runs()) == []
    assert phases_of(stage)[4:] == [
        "check: check",
        "generate-made: generate",
        "plain-0: train",
        "diff-0: train measure",
    ]
    assert (result.read_bytes(), result.stat().st_mtime_ns) == before
    assert kept.is_dir()
    assert not list((stage.output / "work").iterdir())


def test_a_model_of_other_settings_is_not_taken(stage):
    tuned = {"stm_strategy": "hybrid", "stm_tuned_model": "plain"}
    stage.experiment = with_arms(plain={})
    stage.runner(keep_models=True).run(stage.experiment.runs())
    stage.experiment = with_arms(plain={"training": {"learning_rate": 1.0}})
    stage.runner(again=True).run(stage.experiment.runs())  # keeps none: the model there is still the one before
    stage.experiment = with_arms(plain={"training": {"learning_rate": 1.0}}, diff=tuned)
    stage.runner().run(stage.experiment.runs())
    assert phases_of(stage)[-2:] == ["plain-0: train", "diff-0: train measure"]


def test_a_run_fails_with_the_one_whose_model_it_takes(stage):
    stage.experiment = with_arms(plain={}, diff={"stm_strategy": "hybrid", "stm_tuned_model": "plain"})
    stage.broken = {"plain-0"}
    assert stage.runner().run(stage.experiment.runs()) == ["plain/0", "diff/0"]
    assert any("diff/0 failed: the run whose model it takes, plain/0, has failed" in line for line in stage.said)
    assert stage.names() == ["check", "initial", "plain-0"]


def test_list_of_generated_data(stage, capsys):
    config = stage.folder / "more.yaml"
    config.write_text(json.dumps(load_yaml(MINIMAL.replace(".inf", "2.5")) | load_yaml(MORE)))  # JSON is YAML
    stage.experiment = read_experiment(config)
    stage.runner().run(stage.experiment.chosen_runs(["own"]))
    command(config, "--output", stage.output, "--list")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["generate.made self-output done", "generate.again rephrase to do"]
    config.write_text(config.read_text().replace('"samples": 4', '"samples": 5'))
    command(config, "--output", stage.output, "--list")
    assert "self-output begun with other settings: samples was 4, is now 5" in capsys.readouterr().out


# What preparing data cost.


def test_each_entry_of_scores_has_its_own_seconds(tmp_path, monkeypatch):
    scores, now = tmp_path / "scores", [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def make(name, when):
        (scores / name).mkdir(parents=True)
        (scores / name / "manifest.json").write_text("{}")
        os.utime(scores / name / "manifest.json", (when, when))

    make("before", 900)
    (scores / ".late.partial").mkdir()
    clock = ScoringClock(scores, tmp_path)
    make("zz", 1003)
    make("late", 1007)
    (scores / ".other.partial").mkdir()
    now[0] = 1010.5
    assert clock.stop()
    found = {path.stem: read_json(path) for path in (tmp_path / "scoring").iterdir()}
    assert found == {
        "zz": {"seconds": 3.0, "is_whole": True},
        "late": {"seconds": 7.5, "is_whole": False},  # a part of it was there from an earlier start
    }
    assert not ScoringClock(scores, tmp_path).stop()


def test_costs_are_added_up(tmp_path):
    experiment = more()
    settings = {name: experiment.run_settings(RunName(name, 0)) for name in experiment.arms}
    for name, seconds in (("one", 3.0), ("two", 4.5)):
        write_json({"seconds": seconds, "is_whole": True}, tmp_path / "scoring" / f"{name}.json")
    for name in ("made", "again"):
        write_json(RECEIPT, tmp_path / "generated" / f"{name}.receipt.json")
    for name, seed, own in (("plain", 1, None), ("own", 0, {"seconds": 512.0, "is_whole": True})):
        facts = run_result(experiment.run_settings(RunName(name, seed))) | {"preparing": own}
        write_json(facts, run_path(tmp_path, RunName(name, seed)))

    def cost(name, *entries):
        facts = preparing(settings[name], list(entries), tmp_path)
        parts = [facts[part] for part in ("generating", "scoring", "tuned_model")]
        assert facts["seconds"] == sum(parts)
        return [*parts, facts["is_whole"]]

    assert cost("plain") == [0, 0, 0, True]
    assert cost("stm", "one") == [0, 3, 0, True]
    assert cost("diff", "one", "two") == [0, 7.5, 50, True]
    assert cost("own") == [512, 0, 0, True]
    assert cost("both", "one", "two") == [512, 7.5, 50 + 512, True]
    assert cost("stm", "unknown") == [0, 0, 0, False]
    assert cost("hub", "one", "two") == [0, 7.5, 0, False]


@pytest.fixture
def prepared(stage):
    """A stage with results of plain, STM and generated data, and what preparing them cost."""
    stage.experiment = more()
    (stage.folder / "asked.jsonl").write_text("asked\n")
    (stage.folder / "how.txt").write_text("how\n")
    stage.runner().run(stage.experiment.runs())
    costs = {"plain": (0, True), "stm": (12.04, True), "own": (512, True), "diff": (74.5, True), "hub": (7.5, False)}
    for name, (seconds, is_whole) in costs.items():
        for seed in stage.experiment.arms[name].seeds:
            path = run_path(stage.output, RunName(name, seed))
            facts = read_json(path) | {"preparing": {"seconds": seconds, "is_whole": is_whole}}
            facts["generation"] = {key: RECEIPT[key] for key in RECEIPT} if name == "own" else None
            write_json(facts, path)
    return stage


def tables_of(stage):
    from stm_plugin.experiment.summary import summarize
    from stm_plugin.experiment.tables import markdown

    return markdown(summarize(stage.experiment, stage.output))


def test_table_of_what_preparing_data_cost(prepared):
    text = tables_of(prepared)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][-2:] == ["preparing data (s)", "seconds"]
    cells = {row[0]: row[-2:] for row in rows}
    assert cells["plain"] == ["-", "50"]
    assert cells["stm"] == ["12", "50"]
    assert cells["Self-Output"] == ["512", "50"]
    assert cells["diff"] == ["74", "50"]
    assert cells["hub"] == ["> 7.5", "50"]
    assert "- Preparing data for stm took 12 s, Self-Output 512 s: **1/43**." in text
    assert (
        "made, generated (self-output): 10 problems, 4 samples each, 40 in all, of which 12.50 % passed; 8 rows, "
        "50.00 % of them with the model's own answer; 12,345 tokens generated; perplexity of the answers, mean "
        "(standard deviation) over rows: 4.00 (2.00) before, 3.00 (1.50) after." in text
    )
    assert "made 4.00 (1.00)" in text


@pytest.mark.parametrize("change", ["machine", "rows", "part", "strategy"])
def test_preparation_is_compared_only_like_with_like(prepared, change):
    path = run_path(prepared.output, RunName("stm", 0))
    facts = read_json(path)
    if change == "machine":
        facts["machine"]["cores"] = 64
    elif change == "part":
        facts["preparing"]["is_whole"] = False
    else:
        arms = {"stm": {"rows": 5} if change == "rows" else {"stm_strategy": "low"}}
        arms["stm"]["stm_threshold"] = 2.5
        prepared.experiment = more(arms=load_yaml(MORE)["arms"] | arms)
        facts["settings"] = prepared.runner().settings(RunName("stm", 0))
    write_json(facts, path)
    text = tables_of(prepared)
    assert "| stm |" in text
    assert "Preparing data for" not in text


# Processes.


def test_a_process_ends_with_its_parent(tmp_path):
    """Killed by SIGKILL, the parent can do nothing for it."""
    child = "import threading, time; from stm_plugin.experiment.arm import _end_with_parent as end; "
    child += "threading.Thread(target=end, daemon=True).start(); "
    child += "open('started', 'w').close(); time.sleep(600); open('survived', 'w').close()"
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
    child = "import time; open('started', 'w'); time.sleep(600)"
    parent = "import signal, sys; from pathlib import Path; from stm_plugin.experiment.run import _wait\n"
    parent += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test in the background ignores it
    parent += "import subprocess; wait = subprocess.Popen.wait\n"
    parent += "subprocess.Popen.wait = lambda *args: (open('waits', 'w'), wait(*args))[1]\n"
    parent += f"try: _wait([sys.executable, '-c', {child!r}], Path('log'), append=False)\n"
    parent += "except KeyboardInterrupt: sys.exit(130)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    wait_for(lambda: (tmp_path / "started").exists() and (tmp_path / "waits").exists())
    child_pids = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert not any(map(alive, child_pids))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# The whole, with a tiny model.


TINY = """
title: tiny
model: {model}
data: chats.jsonl
rows: 8
target: ["t:arc_challenge=target.jsonl"]
non_target: [arc_challenge=other.jsonl]
evaluation: {{batch_size: 4, dtype: bfloat16}}
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

SYSTEMS = """
  difference: {stm_strategy: difference, stm_threshold: 1.0e-3, stm_tuned_model: plain}
  by_plain: {stm_threshold: 5000, stm_reference: plain/0}
  own: {data: made}
generate:
  made: {method: self-output, samples: 2, max_new_tokens: 3, verifier: exact}
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
    (folder / "tiny.yaml").write_text(TINY.format(model=folder / "model", steps=3) + SYSTEMS.lstrip("\n"))
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


def test_another_model_at_the_same_place_is_told(stage):
    arms = {"plain": {"seeds": [0, 1]}, "stm": {"stm_threshold": 2, "stm_reference": "x/other"}}
    stage.experiment = minimal(arms=arms)
    stage.runner().run(stage.experiment.runs())
    model = stage.experiment.model
    settings = read_json(run_path(stage.output, RunName("stm", 0)))["settings"]
    assert settings["models"] == {name: f"files of {name}" for name in (model, "x/other")}
    stage.models = {"x/other": "merged anew"}
    with pytest.raises(ValueError, match=r"models.x/other was 'files of x/other', is now 'merged anew'") as caught:
        stage.runner().run(stage.experiment.runs())
    assert "plain/" not in str(caught.value)
    stage.models = {model: "trained anew"}
    with pytest.raises(ValueError, match=rf"the initial model: models.{model} was 'files of {model}'"):
        stage.runner().run(stage.experiment.runs())
    num_processes = len(stage.commands)
    stage.models = {model: None}  # not to be had now, which whatever needs it will tell
    assert stage.runner().run(stage.experiment.runs()) == []
    assert len(stage.commands) == num_processes
    # A result of a run that was made with another model beside one of today's is not in the table.
    path = run_path(stage.output, RunName("plain", 1))
    facts = read_json(path)
    facts["settings"]["models"][model] = "another"
    write_json(facts, path)
    facts = summarize(stage.experiment, stage.output)
    assert [note for note in facts["notes"] if "plain/1" in note] == [
        f"plain/1 is left out, its settings are others: {model} is another model than the initial model had."
    ]


def test_models_of_a_run():
    experiment = make_experiment(load_yaml(TINY.format(model="m", steps=3) + SYSTEMS.lstrip("\n")), "tiny")
    names = {str(run): experiment.models(run) for run in experiment.runs()}
    assert names["plain/0"] == names["own/0"] == names["difference/0"] == names["by_plain/0"] == ["m"]
    assert experiment.models(None) == ["m"]


def test_digests_of_models(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    first = models.model_digest(str(tmp_path))
    assert first == models.model_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("others")
    assert models.model_digest(str(tmp_path)) != first
    monkeypatch.setattr(reuse, "_hub_file", lambda *_: None)
    assert models.model_digest(str(tmp_path / "gone")) is None


def test_an_adapter_is_no_model_to_start_from(tiny, tmp_path, monkeypatch, make_model):
    from peft import LoraConfig, get_peft_model

    model = make_model()
    model.name_or_path = str(tiny / "model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter.yaml").write_text(TINY.format(model=tmp_path / "adapter", steps=3))
    monkeypatch.setattr(run, "_wait", in_process)
    with pytest.raises(ValueError, match=r"^model: .*adapter is an adapter \(of .*model\).* Merge it"):
        command(tmp_path / "adapter.yaml", "--data", tiny, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 400}, r"in arms.plain: rows: 400, but chats.jsonl has \d+. Write `rows: null`"),
        ({"model": "nowhere/model"}, "cannot load nowhere/model: give a folder or a hub id"),
        ({"target": ["t:mbpp=mbpp.jsonl"]}, r"t runs code .* asked for: evaluation: \{run_model_code: true\}"),
    ],
)
def test_what_is_told_before_anything_is_measured(tiny, tmp_path, monkeypatch, changes, message):
    (tiny / "mbpp.jsonl").write_text("{}\n")
    experiment = make_experiment(load_yaml(TINY.format(model=tiny / "model", steps=3)) | changes, "tiny")
    monkeypatch.setattr(run, "_wait", in_process)
    monkeypatch.setattr(arm, "measure_initial", None)
    with pytest.raises(ValueError, match=message):
        Runner(experiment, tiny, tmp_path / "out", print).run(experiment.runs())


def test_missing_data_leave_no_folder(tiny, tmp_path):
    experiment = make_experiment(load_yaml(TINY.format(model="m", steps=3)) | {"data": "gone.jsonl"}, "tiny")
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        Runner(experiment, tiny, tmp_path / "out", print).run(experiment.runs())
    assert not (tmp_path / "out").exists()


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
        dtypes = {one["evaluation"]["versions"]["model_dtype"] for one in (initial, facts)}
        assert dtypes == {"torch.bfloat16"}, "before and after alike"
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


def test_generated_data_of_a_whole_experiment(tiny, tiny_run):
    """The answers of random weights are all wrong, so that the human ones stay, and with them the training."""
    rows = [json.loads(line) for line in (tiny_run / "generated" / "made.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in (tiny / "chats.jsonl").read_text().splitlines()]
    assert rows == [row | {"stm_source": "ground-truth"} for row in given[:8]]
    facts, plain_facts = (read_json(run_path(tiny_run, RunName(name, 0))) for name in ("own", "plain"))
    assert facts["losses"] == plain_facts["losses"]
    assert facts["weight_change_l2"] == plain_facts["weight_change_l2"]
    receipt = read_json(tiny_run / "generated" / "made.receipt.json")
    assert receipt["samples"]["generated"] == facts["generation"]["samples"]["generated"] == 16
    assert facts["preparing"]["generating"] == pytest.approx(receipt["seconds"]["total"], abs=1e-3)
    assert facts["preparing"]["seconds"] == facts["preparing"]["generating"] > 0
    assert plain_facts["preparing"]["seconds"] == 0
    assert plain_facts["generation"] is None
    assert facts["settings"]["generated"]["run_model_code"] is False
    assert facts["answers_perplexity"]["mean"] == pytest.approx(plain_facts["answers_perplexity"]["mean"])
    assert receipt["perplexity"]["before"]["mean"] == pytest.approx(facts["answers_perplexity"]["mean"], rel=1e-4)


def test_masks_by_the_model_of_another_run(tiny_run):
    facts, stm, plain_facts = (read_json(run_path(tiny_run, RunName(n, 0))) for n in ("difference", "stm", "plain"))
    assert facts["settings"]["options"]["stm_tuned_model"] == facts["masks"]["tuned_model"] == "plain/0"
    assert 0 < facts["masks"]["masked_fraction"] < 1
    entries = {path.stem: read_json(path)["seconds"] for path in (tiny_run / "scoring").iterdir()}
    assert {path.name for path in (tiny_run / "scores").iterdir() if path.is_dir()} == set(entries)
    assert len(entries) == 2  # by the initial model, made for `stm` and found; by the tuned one
    assert facts["preparing"]["scoring"] == pytest.approx(sum(entries.values()), abs=1e-3)
    assert 0 < stm["preparing"]["scoring"] < facts["preparing"]["scoring"]
    assert facts["preparing"]["tuned_model"] == plain_facts["seconds"]["training"]
    assert stm["preparing"]["is_whole"] is facts["preparing"]["is_whole"] is True
    by_plain = read_json(run_path(tiny_run, RunName("by_plain", 0)))
    assert by_plain["settings"]["options"]["stm_reference"] == by_plain["masks"]["reference"] == "plain/0"
    assert by_plain["masks"]["masked_tokens"] != stm["masks"]["masked_tokens"]
    assert by_plain["scoring"] == "found"  # those that `difference` has made with the same model
    assert by_plain["preparing"]["tuned_model"] == plain_facts["seconds"]["training"]


def test_results_hold_no_path_of_this_machine(tiny, tiny_run):
    files = [path for path in tiny_run.rglob("*.json*") if "models" not in path.parts and "scores" not in path.parts]
    assert {"initial.json", "0.json", "made.receipt.json", "made.samples.jsonl"} <= {path.name for path in files}
    for path in files:
        text = path.read_text(encoding="utf-8").replace(str(tiny / "model"), "")  # the YAML names it so
        assert str(tiny) not in text, path
        assert str(ROOT) not in text, path


def test_a_tuned_model_that_is_gone_is_trained_again_as_it_was(tiny, tiny_run, monkeypatch):
    monkeypatch.setattr(run, "_wait", in_process)
    path, plain_path = (run_path(tiny_run, RunName(name, 0)) for name in ("difference", "plain"))
    before, plain_before = read_json(path), plain_path.stat().st_mtime_ns
    path.unlink()
    shutil.rmtree(tiny_run / "models" / "plain-0")
    assert command(tiny / "tiny.yaml", "--data", tiny, "--output", tiny_run, "--only", "difference") == 0
    after = read_json(path)
    assert after["masks"] == before["masks"]
    assert after["preparing"] == before["preparing"]
    assert after["scoring"] == "found"
    assert plain_path.stat().st_mtime_ns == plain_before
    assert (tiny_run / "models" / "plain-0").is_dir()


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
    assert text.count("\n| ") == 9  # head, rule, initial model, six arms
    assert "made, generated (self-output): 8 problems, 2 samples each, 16 in all, of which 0.00 % passed" in text
    assert "Preparing data for stm took" in text
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
    again = subprocess.run([*words, "--table"], env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "| stm |" in (output / "table.md").read_text()


def test_the_shipped_table_is_that_of_the_shipped_results():
    """`stm experiment smollm2_mbpp.yaml --output smollm2_mbpp --table` makes it anew."""
    from stm_plugin.experiment.summary import summarize
    from stm_plugin.experiment.tables import markdown

    configs = Path(__file__).resolve().parents[1] / "example_configs" / "experiments"
    folder = configs / "smollm2_mbpp"
    summary = summarize(read_experiment(configs / "smollm2_mbpp.yaml"), folder)
    assert markdown(summary) == (folder / "table.md").read_text(encoding="utf-8")
    assert "/tmp/" not in "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))

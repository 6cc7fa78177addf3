"""The command `axolotl` itself, in processes of its own: every spelling, every way to be silently plain.

Each process takes Axolotl's start of ten seconds, so what a process of its own does not change is tested elsewhere.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")

from axolotl_helpers import ENVIRONMENT, LORA, axolotl, base_model, make_config, one_process, receipt, write_config

__all__ = ["base_model", "make_config", "one_process"]

THRESHOLD = 400.0
OLD = version("axolotl").startswith("0.19.")
ON = "STM is on: "


@pytest.fixture
def run(make_config, tmp_path):
    """Write a config, give it to `axolotl train`; the finished process. `plugins` goes in as it is written."""

    def run(plugins="", *, command="train", check=True, arguments=("--launcher", "python"), environment=(), **keys):
        import yaml

        config = {"stm_threshold": THRESHOLD, "max_steps": 2} | keys
        text = yaml.safe_dump(make_config(**config)) + plugins + "\n"
        path = write_config(text, tmp_path)
        return axolotl(command, path, *arguments, cwd=tmp_path, check=check, **dict(environment))

    return run


@pytest.mark.parametrize(
    "plugins",
    [
        "plugins: stm",
        "plugins: [stm]",
        "plugins: [stm_plugin.STMPlugin]",
        "plugins:\n  - axolotl.integrations.spectrum.SpectrumPlugin\n  - stm",
    ],
)
def test_the_line_in_every_spelling(plugins, run, tmp_path):
    beside = {"spectrum_top_fraction": None}
    done = run(plugins, **beside, **LORA)
    assert done.stdout.count(ON) == 1
    facts = receipt(tmp_path / "out")
    assert 0 < facts["masked_tokens"] < facts["label_tokens"]
    assert (facts["versions"]["axolotl"], facts["threshold"]) == (version("axolotl"), THRESHOLD)


def test_the_default_threshold_is_the_papers(run, tmp_path):
    done = run("plugins: stm", stm_threshold=None, check=False)
    # Random weights find every token unlikely: the error proves which threshold was in force.
    assert done.returncode != 0
    assert re.search(
        r"Every one of the \d+ label tokens .* above stm_threshold=2\.5", re.sub(r"\s+", " ", done.stdout)
    ), done.stdout[-500:]


PLAIN = [
    ("", {}, "does not list the plugin"),
    ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", {}, "does not list the plugin"),
    ("plugins: [stm_plugn.STMPlugin]", {}, "does not list the plugin"),
    ("plugins: [stm_plugn.STMPlugin]", {"stm_threshold": None}, "'stm_plugn.STMPlugin' does not load"),
    ("plugins: [stm_plugin.STMPlugn]", {"stm_threshold": None}, "'stm_plugin.STMPlugn' does not load"),
    ("plugins: smt", {"stm_threshold": None}, "did you mean stm"),
    ("plugins: stm", {"stm_treshold": 3}, "did you mean stm_threshold"),
    ("plugins: stm", {"rl": "dpo"}, "`plugins: stm` cannot be used with `rl: dpo`"),
]


@pytest.mark.parametrize(("plugins", "keys", "message"), PLAIN, ids=lambda value: str(value)[:40])
def test_no_way_to_be_silently_plain(plugins, keys, message, run, tmp_path):
    done = run(plugins, check=False, **keys)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stdout)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(not OLD, reason="Axolotl 0.20 and newer raise by themselves")
def test_a_bare_axolotl_would_train_plain(run, tmp_path):
    """What the start-up hook is for: without it 0.19 logs the misspelt plugin, and trains."""
    done = run("plugins: [stm_plugn.STMPlugin]", environment={"STM_AXOLOTL_HOOK": "0"})
    assert "No module named 'stm_plugn'" in done.stdout
    assert ON not in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_without_the_hook_the_full_name_still_works(run, tmp_path):
    done = run("plugins: [stm_plugin.STMPlugin]", environment={"STM_AXOLOTL_HOOK": "0"})
    assert done.stdout.count(ON) == 1


@pytest.mark.parametrize(
    "arguments",
    [("accelerate", "--", "--num_processes=1", "--cpu"), ("torchrun", "--", "--nproc_per_node=1")],
    ids=lambda arguments: arguments[0],
)
def test_other_launchers(arguments, run, tmp_path):
    done = run("plugins: stm", arguments=("--launcher", *arguments))
    assert done.stdout.count(ON) == 1
    assert receipt(tmp_path / "out")["masked_tokens"] > 0


def test_preprocess_then_score_then_train(run, tmp_path):
    done = run("plugins: stm", command="preprocess", arguments=(), **LORA)
    assert ON not in done.stdout
    assert not (tmp_path / "stm-home").exists()
    done = run("plugins: stm", command="stm-score", arguments=(), **LORA)
    assert "label tokens in 12 rows; quantiles" in done.stdout
    assert "so does stm_mask_fraction: 0.22" in done.stdout
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    done = run("plugins: stm", **LORA)
    assert "Scores: found" in done.stdout
    done = run("plugins: stm", command="merge-lora", arguments=(), **LORA)
    assert ON not in done.stdout
    assert (tmp_path / "out" / "merged" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("inference", {}),
        ("quantize", {"quantization": {"weight_dtype": "int8"}}),
    ],
)
def test_other_commands_take_the_same_config_and_do_not_score(command, keys, run, tmp_path):
    run("plugins: stm", save_safetensors=None)
    arguments = ("--launcher", "python") if command == "inference" else ()
    shutil.rmtree(tmp_path / "stm-home")
    done = run("plugins: stm", command=command, arguments=arguments, check=False, **keys)
    assert ON not in done.stdout
    assert not (tmp_path / "stm-home").exists()
    if command == "inference":
        assert done.returncode == 0, done.stdout[-2000:]
    else:  # torchao quantizes on a GPU only; the config was read and the model loaded
        assert done.returncode == 0 or "torchao" in done.stdout.splitlines()[-1], done.stdout[-2000:]


def test_evaluate_does_not_score(run, tmp_path):
    done = run("plugins: stm", command="evaluate", val_set_size=0.25)
    assert ON not in done.stdout
    assert not (tmp_path / "stm-home").exists()


IN_TWO_PROCESSES = {
    "max_steps": 4,
    "num_epochs": 4,
    "micro_batch_size": 1,
    "curriculum_sampling": True,  # so that the rows of a step are the same however it is cut
    "max_memory": {"cpu": "8GiB"},  # or Axolotl places the model of rank 1 on a GPU
    "save_strategy": "steps",
    "save_steps": 4,
}


def _logged(checkpoint, *names):
    """Metrics of every step."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if "loss" in entry for name in names]


# `accelerate launch --cpu` starts one process whatever --num_processes says, and without the variable each process of
# torchrun trains as if it were alone.
TWO = {
    "arguments": ("--launcher", "torchrun", "--", "--standalone", "--nproc_per_node=2"),
    "environment": {"ACCELERATE_USE_CPU": "true"},
}
STM_OF_TWO = "plugins: [axolotl_plugins.NoPeers, stm]"


@pytest.mark.slow
def test_two_processes_equal_one(run, tmp_path):
    run("plugins: stm", **IN_TWO_PROCESSES | {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")})
    done = run(STM_OF_TWO, **TWO, **IN_TWO_PROCESSES | {"output_dir": str(tmp_path / "two")})
    assert done.stdout.count(ON) == 1
    one, two = (receipt(tmp_path / name) for name in ("one", "two"))
    assert one["mask_digest"] == two["mask_digest"]
    metrics = ("loss", "grad_norm", "stm/kept_tokens")
    one, two = (_logged(tmp_path / name / "checkpoint-4", *metrics) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_two_processes_at_inf_equal_axolotl_with_both_switches(run, tmp_path):
    keys = IN_TWO_PROCESSES | {"gradient_accumulation_steps": 2}
    run(
        "plugins: [axolotl_plugins.NoPeers, axolotl_plugins.Switches]",
        **TWO,
        **keys | {"stm_threshold": None, "output_dir": str(tmp_path / "plain")},
    )
    run(STM_OF_TWO, **TWO, **keys | {"stm_threshold": math.inf, "output_dir": str(tmp_path / "stm")})
    assert receipt(tmp_path / "stm")["masked_tokens"] == 0
    plain, stm = (_logged(tmp_path / name / "checkpoint-4", "loss", "grad_norm") for name in ("plain", "stm"))
    assert plain == stm


@pytest.mark.parametrize("kind", ["qlora", "8 bit"])
def test_quantized_training(kind, run, tmp_path):
    quantized = {
        "qlora": LORA | {"adapter": "qlora", "load_in_4bit": True},
        "8 bit": LORA | {"load_in_8bit": True},
    }[kind]
    run("plugins: stm", **quantized)
    facts = receipt(tmp_path / "out")
    assert 0 < facts["masked_tokens"] < facts["label_tokens"]
    assert facts["scores_key"]["quantization"] != "none"


# --- Start of every interpreter -------------------------------------------------------------------------------------


def test_the_installed_hook_is_there_and_leaves_other_processes_alone():
    code = (
        "import sys; print([getattr(f, '__name__', '') for f in sys.meta_path].count('STMAxolotlFinder'), "
        "{'stm_plugin', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep)
    assert done.stdout == "1 set()\n", done.stderr


def test_scripts_that_load_configs_themselves_are_served_too(make_config, tmp_path):
    path = write_config(make_config(plugins="stm", stm_threshold=math.inf), tmp_path)
    code = f"from axolotl.cli.config import load_cfg; print('PLUGINS', load_cfg({str(path)!r}).plugins)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | ENVIRONMENT
    )
    assert "PLUGINS ['stm_plugin.STMPlugin']" in done.stdout, done.stderr[-2000:]

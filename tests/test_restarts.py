"""Runs killed with SIGKILL in the middle of a step, and resumed: masks and loss curve of a run that never stopped.

This file is also the script of the processes that train with TRL; those of Axolotl are its own command.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from axolotl_helpers import LORA, axolotl_process, base_model, finish, make_config, receipt, write_config
from processes import saved_llama
from safetensors.torch import load_file

__all__ = ["base_model", "make_config"]

THRESHOLD = 1500.0
CHECKPOINT, KILLED, LAST = 8, 10, 12
"""Steps: the last checkpoint of a killed run, the last step it trains, the last of a whole run; six make an epoch."""

REPORT = "TRAINED"


def kill_when_it_reports(process):
    """Send SIGKILL to a process, and to all it has started, once it says how far it has trained; what it said."""
    said = []
    for line in process.stdout:
        said.append(line)
        if REPORT in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "".join(said)[-6000:]
    return said[-1].split(REPORT)[-1].strip()


def steps(folder):
    """What a run has logged at every step, by its last checkpoint; the times of day apart."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "learning_rate", "stm/kept_tokens", "stm/masked_fraction")
    return [{name: entry.get(name) for name in names} for entry in log if "loss" in entry]


def check_last_checkpoint(folder):
    saved = {path.name for path in folder.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{CHECKPOINT // 2}", f"checkpoint-{CHECKPOINT}"}


def final_weights(folder):
    (path,) = (Path(folder) / f"checkpoint-{LAST}").glob("*model.safetensors")
    return load_file(path)


def check_same_run(whole, resumed, reference):
    """A resumed run must have the masks of a whole one, its losses and its weights, bit for bit."""
    assert [entry["step"] for entry in steps(whole)] == list(range(1, LAST + 1))
    assert steps(resumed) == steps(whole)
    weights = final_weights(resumed)
    expected = final_weights(whole)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    if reference == "none":
        return
    facts, expected = (receipt(folder / f"checkpoint-{LAST}") for folder in (resumed, whole))
    assert {**facts, "scores_entry": None} == {**expected, "scores_entry": None}  # each has scores of its own making
    assert 0 < facts["masked_tokens"] < facts["label_tokens"]
    if reference == "initial":
        assert facts["mask_digest"] == receipt(whole)["mask_digest"] == receipt(resumed)["mask_digest"]
    else:
        assert facts["steps"] == LAST


# --- TRL ------------------------------------------------------------------------------------------------------------

CASES = [(reference, tuning) for reference in ("initial", "current", "none") for tuning in ("lora", "full")]
"""`none` is TRL's own SFTTrainer: what the host itself does of a kill and a restart."""


def train(folder, out, reference, tuning, killed=False):
    """Train in this process as a script of a user would; go on from the last checkpoint if there is one."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl_helpers import plain_trainer, stm_trainer

    class Pause(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if killed and state.global_step == KILLED:
                sys.stdout.write(f"{REPORT} {state.global_step}\n")
                sys.stdout.flush()
                signal.pause()

    # A seed of each process's own: neither the adapter nor the order may come from what the process happens to draw.
    checkpoints = list(out.glob("checkpoint-*"))
    torch.manual_seed(len(checkpoints))
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    options = {} if reference == "none" else {"stm_threshold": THRESHOLD, "stm_reference": reference}
    trainer = (plain_trainer if reference == "none" else stm_trainer)(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        json.loads((folder / "rows.json").read_text()),
        AutoTokenizer.from_pretrained(folder / "model"),
        out,
        {"peft_config": lora if tuning == "lora" else None, "callbacks": [Pause()]},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=CHECKPOINT // 2,
        **options,
    )
    trainer.train(resume_from_checkpoint=bool(checkpoints))


def main(folder, out, killed, *cases):
    torch.set_num_threads(1)
    for case in cases:
        reference, tuning = case.split()
        train(Path(folder), Path(folder) / out / case, reference, tuning, killed == "killed")


def start(folder, out, *arguments):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), out, *arguments],
        env=os.environ | {"STM_HOME": str(folder / f"home of {out}"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def runs(tokenizer, chats, tmp_path_factory):
    """Folder of whole runs, and of runs that were killed one by one and resumed by another process."""
    folder = tmp_path_factory.mktemp("restarts")
    saved_llama(folder, tokenizer, attention_dropout=0.1)
    (folder / "rows.json").write_text(json.dumps(chats))
    cases = [" ".join(case) for case in CASES]
    for case in cases:
        assert kill_when_it_reports(start(folder, "again", "killed", case)) == str(KILLED)
        check_last_checkpoint(folder / "again" / case)
    for out in ("whole", "again"):
        finish(start(folder, out, "to the end", *cases))
    return folder


@pytest.mark.parametrize(("reference", "tuning"), CASES)
def test_a_killed_run_is_the_uninterrupted_one(reference, tuning, runs):
    case = f"{reference} {tuning}"
    check_same_run(runs / "whole" / case, runs / "again" / case, reference)


# --- Axolotl --------------------------------------------------------------------------------------------------------

BY_COMMAND = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_epochs": 2,
    "save_strategy": "steps",
    "save_steps": CHECKPOINT // 2,
    "auto_resume_from_checkpoints": True,
}
TUNING = {"lora": LORA, "full": {}}


@pytest.mark.parametrize(
    ("reference", "tuning"),
    [
        ("initial", "lora"),
        *(pytest.param(reference, tuning, marks=pytest.mark.slow) for reference, tuning in CASES[1:]),
    ],
)
def test_a_killed_run_of_axolotl_is_the_uninterrupted_one(reference, tuning, make_config, tmp_path):
    """`none` is Axolotl without the plugin."""
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    own = ["stm"] if reference != "none" else []
    options = {"stm_threshold": 400.0, "stm_reference": reference} if own else {}
    config = make_config(**BY_COMMAND, **TUNING[tuning], **options)

    def command(name, out, plugins):
        keys = {"output_dir": str(tmp_path / out), "dataset_prepared_path": str(tmp_path / f"data of {out}")}
        written = write_config(config | keys | {"plugins": plugins}, tmp_path, f"{name}.yml")
        environment = {"PAUSE_AFTER": str(KILLED), "STM_HOME": str(tmp_path / f"home of {out}")}
        return axolotl_process("train", written, "--launcher", "python", cwd=tmp_path, **environment)

    killed = command("killed", "again", [*own, "axolotl_plugins.Seeded", "axolotl_plugins.Pauses"])
    assert kill_when_it_reports(killed) == str(KILLED)
    check_last_checkpoint(tmp_path / "again")
    finish(command("resumed", "again", own))
    finish(command("whole", "whole", [*own, "axolotl_plugins.Seeded"]))
    check_same_run(tmp_path / "whole", tmp_path / "again", reference)


if __name__ == "__main__":
    main(*sys.argv[1:])

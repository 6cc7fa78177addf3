"""What the tests of Axolotl share: a tiny model in a folder, configs, runs in this process or by its command."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import set_seed

IGNORE = -100

ON_A_CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "optimizer": "adamw_torch",
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_linear": True}
ENVIRONMENT = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.update(ENVIRONMENT)


@pytest.fixture(autouse=True)
def one_process():
    """Undo what one run leaves behind in the process for the next."""
    from transformers.loss import loss_utils

    gc.freeze()  # garbage is collected up to twenty times a run; what earlier runs imported need not be walked again
    before = loss_utils.ForCausalLMLoss
    yield
    # chunked_cross_entropy replaces it for good
    loss_utils.ForCausalLMLoss = loss_utils.LOSS_MAPPING["ForCausalLM"] = before


@pytest.fixture
def base_model(make_model, tokenizer, tmp_path_factory):
    """Folder of a tiny random Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(base_model, chats, tmp_path):
    """Make the mapping of a config that trains the tiny model on a few chats."""
    data = tmp_path / "chats.jsonl"
    rows = [json.dumps({"messages": chat["prompt"] + chat["completion"]}) for chat in chats]
    data.write_text("\n".join(rows))

    def make(**keys):
        config = ON_A_CPU | {
            "base_model": str(base_model),
            "chat_template": "tokenizer_default",
            "datasets": [
                {"path": str(data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
            ],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 256,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 0.01,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 3,
            "dataset_num_proc": 1,
        }
        return {name: value for name, value in (config | keys).items() if value is not None}

    return make


def load(config):
    """The validated config, as `axolotl train` loads it."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    PluginManager.get_instance().plugins.clear()  # it keeps those of every config that the process has read
    return load_cfg(DictDefault(config))


def build(config):
    """The trainer that `axolotl train` would train with, and its config."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer

    set_seed(0)  # a process of its own draws a fresh adapter from where every process starts
    cfg = load(config)
    if cfg.plugins:
        assert PluginManager.get_instance().load_datasets(cfg) is None
    return setup_model_and_trainer(cfg, load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))[0]


def train(config, callback=None):
    """Train in this process; the trainer, with what each micro-batch was and lost in `batches` and `losses`."""
    trainer = build(config)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.batches, trainer.losses = [], []
    host_step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        trainer.batches.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        loss = host_step(model, inputs, *args, **kwargs)
        trainer.losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def receipt(folder):
    return json.loads((Path(folder) / "stm.json").read_text())


def oracle(model, rows):
    """NLL of each row's label tokens in float64 from the model's own logits, NaN elsewhere; one array a row."""
    model = model.double().eval()
    scores = []
    for row in rows:
        ids, labels = torch.as_tensor(row["input_ids"]), np.asarray(row["labels"])
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        nll = np.full(len(ids), np.nan)
        for t in range(1, len(ids)):
            if labels[t] != IGNORE:
                nll[t] = -log_probs[t - 1, labels[t]].item()
        scores.append(nll)
    return scores


def axolotl_process(*arguments, cwd, **environment):
    """Start the command `axolotl` in a session of its own, which finds `axolotl_plugins`; its output in `stdout`."""
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    modules = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]))
    return subprocess.Popen(
        [str(scripts / "axolotl"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | {"PATH": path, "PYTHONPATH": modules, "COLUMNS": "200"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, check=True):
    """Wait for a command to end; the finished process, its output as text."""
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not check or process.returncode == 0, output[-6000:]
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def axolotl(*arguments, cwd, check=True, **environment):
    """Run the command `axolotl`; the finished process, its output as text."""
    return finish(axolotl_process(*arguments, cwd=cwd, **environment), check)


def write_config(config, folder, name="config.yml"):
    path = Path(folder) / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path

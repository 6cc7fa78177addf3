"""SmolLM2-135M-Instruct on MBPP through both hosts: the same masks, the same gradient; QLoRA on a real 4-bit base."""

import json
import math
import os

import numpy as np
import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")
pytest.importorskip("gguf", reason="gguf, which reads the packaged SmolLM2, is not installed")

import torch
from axolotl_helpers import IGNORE, ON_A_CPU, build, losses, one_process, receipt, weights
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from stm_plugin import STMSFTConfig, STMSFTTrainer
from stm_plugin.demo.model import find_model

__all__ = ["one_process"]

pytestmark = pytest.mark.slow

ROWS = 16
LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_linear": True}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of the model with its tokenizer as GGUF gives it, for which the expected figures hold."""
    from tokenizers.pre_tokenizers import ByteLevel

    torch.set_num_threads(os.cpu_count() or 1)
    folder = tmp_path_factory.mktemp("smollm2")
    source = find_model().path
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _axolotl_config(smollm2, tmp_path, rows, name="axolotl", **keys):
    data = tmp_path / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    dataset = {"path": str(data), "ds_type": "json"}
    if "messages" in rows[0]:
        dataset |= {"type": "chat_template", "field_messages": "messages"}
    return (
        ON_A_CPU
        | {
            "base_model": smollm2,
            "chat_template": "tokenizer_default",
            "datasets": [dataset],
            "dataset_prepared_path": str(tmp_path / f"{name}-prepared"),
            "output_dir": str(tmp_path / name),
            "sequence_len": 512,
            "micro_batch_size": ROWS,
            "gradient_accumulation_steps": 1,
            "max_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-6,
            "max_grad_norm": 0.0,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataset_num_proc": 1,
            "plugins": "stm",
        }
        | keys
    )


def _trl(smollm2, tmp_path, rows, name="trl", peft_config=None, quantization_config=None, **options):
    options = {
        "max_length": 512,
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
    } | options
    config = STMSFTConfig(output_dir=str(tmp_path / name), **options)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, quantization_config=quantization_config)
    return STMSFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        processing_class=AutoTokenizer.from_pretrained(smollm2),
    )


class KeepGradient(TrainerCallback):
    """The gradient of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {
            name: parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def _bytes(value):
    """The bits of a tensor: 4-bit weights lie in bfloat16 numbers, some of which are NaN."""
    return value.flatten().contiguous().view(torch.uint8)


def _gradient(trainer):
    keep = KeepGradient()
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


def test_both_hosts_give_the_same_masks_and_gradient(smollm2, tmp_path, mbpp):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = []
    for row in mbpp[:ROWS]:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
        start = len(prompt["input_ids"])
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * start + ids[start:]})
    ours = _gradient(build(_axolotl_config(smollm2, tmp_path, rows)))
    theirs = _gradient(_trl(smollm2, tmp_path, [{k: row[k] for k in ("input_ids", "labels")} for row in rows]))
    facts = [receipt(tmp_path / name) for name in ("axolotl", "trl")]
    assert facts[0]["mask_digest"] == facts[1]["mask_digest"]
    assert facts[0]["scores_key"] == facts[1]["scores_key"]
    assert 0 < facts[0]["masked_tokens"] < facts[0]["label_tokens"]
    assert list(ours) == list(theirs)
    difference = math.sqrt(sum(float(((ours[name] - theirs[name]).double() ** 2).sum()) for name in ours))
    norm = math.sqrt(sum(float((value.double() ** 2).sum()) for value in theirs.values()))
    assert norm > 0
    assert difference / norm <= 1e-5


def test_each_hosts_own_chat_template_path(smollm2, tmp_path, mbpp):
    chats = [{"messages": row["messages"]} for row in mbpp[:ROWS]]
    split = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in chats]
    config = _axolotl_config(smollm2, tmp_path, chats, learning_rate=0.0, chat_template_jinja=None)
    hosts = {"axolotl": build(config), "trl": _trl(smollm2, tmp_path, split, learning_rate=0.0)}
    runs = {name: trainer.stm_score() for name, trainer in hosts.items()}
    assert runs["axolotl"].receipt["label_tokens"] == 1031
    assert runs["trl"].receipt["label_tokens"] == 1047
    rows = {
        name: {
            tuple(row["input_ids"]): (row["labels"], original["labels"])
            for row, original in zip(run.masked, run.source, strict=True)
        }
        for name, run in runs.items()
    }
    assert set(rows["axolotl"]) == set(rows["trl"])
    for ids, (masked, given) in rows["axolotl"].items():
        other_masked, other_given = map(np.asarray, rows["trl"][ids])
        both = (np.asarray(given) != IGNORE) & (other_given != IGNORE)
        assert both.sum() == (other_given != IGNORE).sum() - 1
        assert (np.asarray(masked)[both] == other_masked[both]).all()


@pytest.mark.parametrize("host", ["axolotl", "trl"])
def test_qlora_learns_and_leaves_its_base_alone(host, smollm2, tmp_path, mbpp):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    chats = [{"messages": row["messages"]} for row in mbpp[:10]]
    steps = {"max_steps": 10, "learning_rate": 1e-3, "max_grad_norm": 1.0}
    if host == "axolotl":
        quantized = {"adapter": "qlora", "load_in_4bit": True}
        config = _axolotl_config(
            smollm2,
            tmp_path,
            chats,
            micro_batch_size=2,
            num_epochs=2,
            lr_scheduler="constant",
            **LORA,
            **quantized,
            **steps,
        )
        trainer = build(config)
    else:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = _trl(
            smollm2,
            tmp_path,
            chats,
            per_device_train_batch_size=2,
            lr_scheduler_type="constant",
            peft_config=lora,
            quantization_config=four_bit,
            **steps,
        )
    before = {name: value for name, value in weights(trainer).items() if "lora_" not in name}
    assert any(name.endswith(".absmax") for name in before)
    trainer.train()
    after = weights(trainer)
    changed = [name for name, value in before.items() if not torch.equal(_bytes(after[name]), _bytes(value))]
    assert not changed
    run = losses(trainer)
    assert sum(run[-5:]) < sum(run[:5])
    four_bit_nll = trainer._stm_run.nll
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    from stm_plugin import score_dataset

    columns = [name for name in ("input_ids", "labels") if name in trainer._stm_run.source.column_names]
    rows = score_dataset(base, trainer._stm_run.source.select_columns(columns), progress=False)
    full_nll = np.concatenate([row[~np.isnan(row)] for row in rows])
    assert len(full_nll) == len(four_bit_nll)
    difference = abs(full_nll - four_bit_nll)
    moved = ((full_nll > math.log(2.5)) != (four_bit_nll > math.log(2.5))).mean()
    print(
        f"QLoRA through {host}: |NLL - unquantized NLL| mean {difference.mean():.3f} nats, "
        f"max {difference.max():.2f}; masks of {moved:.2%} of the label tokens differ"
    )
    assert 0.01 < difference.mean() < 1


def test_the_example_configs_train(smollm2, tmp_path, mbpp, monkeypatch):
    import yaml
    from axolotl_helpers import axolotl

    rows = [json.dumps({"messages": row["messages"]}) for row in mbpp[:10]]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    folder = os.path.join(os.path.dirname(__file__), os.pardir, "example_configs")
    for name in ("axolotl_smollm2_lora.yml", "axolotl_smollm2_qlora.yml"):
        with open(os.path.join(folder, name)) as file:
            config = yaml.safe_load(file)
        config |= {"base_model": smollm2, "max_steps": 2, "output_dir": name.removesuffix(".yml")}
        (tmp_path / name).write_text(yaml.safe_dump(config))
        done = axolotl("train", name, "--launcher", "python", cwd=tmp_path)
        assert "STM is on" in done.stdout
        assert receipt(tmp_path / config["output_dir"])["masked_tokens"] > 0

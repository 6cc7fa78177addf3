"""What a reader would copy runs: the README's Python, the example scripts and configs, and the command-line tools."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")

ROOT = Path(__file__).resolve().parents[1]
SFT = ["-m", "stm_plugin.cli", "sft", "--use_cpu", "true"]
EXAMPLES = ROOT / "example_configs"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, make_model, tokenizer, chats):
    """A folder with a small model in `model` that knows a little of the chats in `chats.jsonl`."""
    import torch

    model = make_model(hidden_size=64, intermediate_size=128, initializer_range=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        chat = chats[step % 6]
        ids = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return tmp_path


def run(workplace, *command):
    environment = os.environ | {
        "STM_HOME": str(workplace / "home"),
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_readme_python(workplace, block):
    """Every block is a whole script that reads `chats.jsonl`; only the model's id and the device are others here."""
    block = re.sub(r'"[\w.-]+/[\w.-]*Instruct"', '"model"', block)
    script = workplace / "script.py"
    script.write_text(block.replace("output_dir=", "use_cpu=True, output_dir="), encoding="utf-8")
    outcome = run(workplace, script)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    if "STM" in block:
        assert "STM is on" in outcome.stderr


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_script(workplace, script):
    if "qlora" in script.name:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    outcome = run(workplace, script, "model", "chats.jsonl")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "STM is on" in outcome.stderr
    (receipt,) = workplace.glob("stm-*/stm.json")
    assert json.loads(receipt.read_text())["threshold"] == 2.5


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("sft_*.yaml")), ids=lambda path: path.name)
def test_stm_sft_config(workplace, config):
    outcome = run(workplace, *SFT, "--config", config, "--model_name_or_path", "model")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert (workplace / "stm-sft" / "adapter_model.safetensors").exists()
    assert json.loads((workplace / "stm-sft" / "stm.json").read_text())["masked_tokens"] > 0


def test_stm_sft_flags_quantized_lora_and_evaluation(workplace):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    flags = "--use_peft --load_in_4bit --stm_mask_fraction 0.2 --max_steps 2 --stm_strategy random --stm_seed 3"
    evaluation = "--eval_strategy steps --eval_steps 1 --dataset_test_split train"
    model = "--model_name_or_path model --dataset_name chats.jsonl --output_dir out"
    outcome = run(workplace, *SFT, *f"{flags} {evaluation} {model}".split())
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    receipt = json.loads((workplace / "out" / "stm.json").read_text())
    assert receipt["mask_fraction"] == 0.2
    assert receipt["strategy"] == "random"
    assert "nf4" in receipt["scores_key"]["quantization"] or "fp4" in receipt["scores_key"]["quantization"]


def test_stm_sft_refuses_an_unknown_option(workplace):
    outcome = run(workplace, *SFT, "--stm_treshold", "2", "--output_dir", "out")
    assert outcome.returncode != 0
    assert "stm_treshold" in outcome.stderr


def test_stm_sft_names_a_missing_split(workplace):
    arguments = "--model_name_or_path model --dataset_name chats.jsonl --output_dir out --eval_strategy epoch".split()
    outcome = run(workplace, *SFT, *arguments)
    assert outcome.returncode != 0
    assert "no split 'test', it has ['train']" in outcome.stderr

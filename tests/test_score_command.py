"""`stm score`: scores that training finds, from every kind of data and model; and a look at stored scores."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")

import datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_helpers import float64_logits, one_thread, oracle_nll, plain_trainer, scores_of, settings  # noqa: F401

from stm_plugin.cli import main
from stm_plugin.score_command import ScoreArguments
from stm_plugin.sft import make_parser
from stm_plugin.trl import STMSFTConfig, STMSFTTrainer

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--stm_mask_fraction", "0.3"]


@pytest.fixture
def workplace(tmp_path, make_model, tokenizer, chats, monkeypatch):
    """A working folder with a small model in `model` and chats in `chats.jsonl`."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stm_score(*flags, model="model", data="chats.jsonl"):
    """Run `stm score` in this process; what its JSON file holds."""
    assert main(["score", "--model_name_or_path", model, "--dataset_name", data, *FLAGS, *flags, "--json", "o"]) == 0
    return json.loads(Path("o").read_text(encoding="utf-8"))


def train(caplog, model="model", data=None, trainer=None, **options):
    """Train for a step as a script would, and say where the scores came from; the run's receipt."""
    caplog.clear()
    data = datasets.load_dataset("json", data_files="chats.jsonl", split="train") if data is None else data
    config = STMSFTConfig(**settings("out", max_steps=1, stm_mask_fraction=0.3, **options))
    run = STMSFTTrainer(model, config, train_dataset=data, **(trainer or {}))
    run.train()
    (line,) = [record.getMessage() for record in caplog.records if "STM is on" in record.getMessage()]
    receipt = json.loads(Path("out/stm.json").read_text(encoding="utf-8"))
    return line.split("Scores: ")[1].split(", in")[0], receipt


def lora():
    return {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])}


# The scores that a later run asks for.


@pytest.mark.parametrize(
    ("flags", "options", "with_lora"),
    [
        ([], {}, False),
        ([], {}, True),
        (["--use_peft", "--lora_target_modules", "all-linear"], {}, False),
        (["--max-length", "64"], {"max_length": 64, "packing": True}, False),
        (["--packing", "--max-length", "60"], {"max_length": 60, "packing": True}, True),
        (["--bf16", "true"], {"bf16": True}, True),
        (["--dtype", "bfloat16"], {"model_init_kwargs": {"dtype": "bfloat16"}}, True),
        (["--optim", "adamw_bnb_8bit", "--report_to", "wandb", "--eval_strategy", "epoch"], {}, False),
        (["--completion_only_loss", "false"], {"completion_only_loss": False}, False),
    ],
    ids=["plain", "lora later", "lora earlier", "packing later", "packing", "autocast", "bfloat16", "training", "all"],
)
def test_training_finds_the_scores(flags, options, with_lora, workplace, caplog):
    scored = stm_score(*flags)["receipt"]
    origin, receipt = train(caplog, trainer=lora() if with_lora else None, **options)
    assert origin == "found"
    assert receipt["scores_key"] == scored["scores_key"]
    assert receipt["mask_digest"] == scored["mask_digest"]


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--max-length", "60"], {}),
        (["--bf16", "true"], {}),
        (["--dtype", "bfloat16"], {}),
        (["--attn_implementation", "eager"], {}),
        (["--completion_only_loss", "false"], {}),
    ],
    ids=["max_length", "autocast", "dtype", "attention", "labels"],
)
def test_what_must_agree(flags, options, workplace, caplog):
    stm_score(*flags)
    assert train(caplog, **options)[0].startswith("made in")


def test_quantized_model(workplace, caplog):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    scored = stm_score("--load-in-4bit")["receipt"]
    assert "nf4" in scored["scores_key"]["quantization"]
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    origin, receipt = train(caplog, trainer={"quantization_config": four_bit} | lora())
    assert origin == "found"
    assert receipt["scores_key"] == scored["scores_key"]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_adapter_folder(with_tokenizer, workplace, caplog):
    base = AutoModelForCausalLM.from_pretrained("model", dtype="float32")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained("adapter")
    tokenizer = AutoTokenizer.from_pretrained("model")
    if with_tokenizer:  # one whose chats read otherwise
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "helper\\n")
        tokenizer.save_pretrained("adapter")
    scored = stm_score(model="adapter")["receipt"]
    assert scored["scores_key"]["model"] != stm_score()["receipt"]["scores_key"]["model"]
    base = AutoModelForCausalLM.from_pretrained("model", dtype="float32")
    model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
    origin, receipt = train(caplog, model=model, trainer={"processing_class": tokenizer})
    assert origin == "found"
    assert receipt["scores_key"] == scored["scores_key"]


def test_stm_sft_trains_an_adapter_further(workplace, caplog):
    base = AutoModelForCausalLM.from_pretrained("model", dtype="float32")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained("adapter")
    stm_score(model="adapter")
    flags = ["--model_name_or_path", "adapter", "--dataset_name", "chats.jsonl", "--output_dir", "out"]
    caplog.clear()
    assert main(["sft", *flags, *FLAGS, "--max_steps", "2", "--learning_rate", "0.01"]) == 0
    assert "Scores: found" in caplog.text
    before, after = (datasets_of(folder) for folder in ("adapter", "out"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def datasets_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


# Every kind of data.


def test_shares_are_those_of_full_float64_logits(workplace, tokenizer, make_model, chats):
    model = make_model()
    plain = plain_trainer(model, chats, tokenizer, workplace / "plain").train_dataset
    nll = scores_of(oracle_nll(plain, logits_of=lambda ids: float64_logits(model, ids)))
    sweep = stm_score()["sweep"]
    assert sweep["label_tokens"] == len(nll)
    (row,) = [row for row in sweep["thresholds"] if row["threshold"] == 1000]
    assert row["masked_fraction"] == pytest.approx((nll > math.log(1000)).mean(), abs=1e-9)
    assert 0.1 < row["masked_fraction"] < 0.9


def test_the_threshold_asked_for_is_in_the_table(workplace, capsys):
    flags = [flag for flag in FLAGS if flag not in ("--stm_mask_fraction", "0.3")]
    where = ["--model_name_or_path", "model", "--dataset_name", "chats.jsonl"]
    assert main(["score", *where, *flags, "--stm_threshold", "1234"]) == 0
    out = capsys.readouterr().out
    assert "       1234 " in out
    assert f"Scores: {os.environ['STM_HOME']}" in out


@pytest.mark.parametrize("kind", ["parquet", "csv", "folder", "splits"])
def test_kinds_of_data(kind, workplace, caplog):
    rows = datasets.load_dataset("json", data_files="chats.jsonl", split="train")
    if kind == "csv":
        rows = datasets.Dataset.from_list([{"text": row["completion"][0]["content"]} for row in rows])
    name = {"parquet": "data.parquet", "csv": "data.csv"}.get(kind, "saved")
    match kind:
        case "parquet":
            rows.to_parquet(name)
        case "csv":
            rows.to_csv(name)
        case "folder":
            rows.save_to_disk(name)
        case "splits":
            datasets.DatasetDict({"other": rows.select([0]), "chosen": rows}).save_to_disk(name)
    stm_score(*(["--dataset_train_split", "chosen"] if kind == "splits" else []), data=name)
    assert train(caplog, data=rows)[0] == "found"


@pytest.mark.parametrize("column", ["labels", "completion_mask", "assistant_masks"])
def test_tokenized_rows(column, workplace, caplog):
    ids = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]]
    on = [[0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 0]]
    if column == "labels":
        values = [[t if flag else -100 for t, flag in zip(*row, strict=True)] for row in zip(ids, on, strict=True)]
    else:
        values = on
    rows = datasets.Dataset.from_dict({"input_ids": ids, column: values})
    rows.save_to_disk("rows")
    scored = stm_score("--completion_only_loss", "true", data="rows")["receipt"]
    assert scored["label_tokens"] == 5
    assert train(caplog, data=rows, completion_only_loss=True)[0] == "found"


def test_a_missing_split_is_named(workplace):
    rows = datasets.load_dataset("json", data_files="chats.jsonl", split="train")
    datasets.DatasetDict({"a": rows}).save_to_disk("splits")
    with pytest.raises(ValueError, match="no split 'train', it has \\['a'\\]"):
        stm_score(data="splits")


def test_a_missing_file_is_named(workplace):
    with pytest.raises(ValueError, match=r"--dataset_name nowhere.jsonl: no such file"):
        stm_score(data="nowhere.jsonl")


def test_no_model_is_named(workplace):
    with pytest.raises(ValueError, match="No model: give --model_name_or_path"):
        main(["score", "--dataset_name", "chats.jsonl", *FLAGS])


# Only scores.


def test_nothing_else_is_written(workplace):
    before = {path.name for path in workplace.iterdir()}
    stm_score("--output_dir", "tuned", "--save_steps", "1")
    assert {path.name for path in workplace.iterdir()} - before == {"o", "stm-home"}
    assert not list(workplace.rglob("stm.json"))


def test_device_map_reaches_the_model(workplace):
    with pytest.raises(ValueError, match="device_map"):
        stm_score("--device-map", "nowhere")


def test_spellings():
    flags = "--device-map auto --load-in-4bit --tokens-per-batch 7 --dtype bfloat16 --max-length 9 --use_cpu".split()
    _, training, model, _, score = make_parser("stm score", ScoreArguments).parse_args_and_config(args=flags)
    assert (score.device_map, training.stm_tokens_per_batch, training.max_length) == ("auto", 7, 9)
    assert (model.load_in_4bit, model.dtype) == (True, "bfloat16")


def test_yaml_of_a_training_run(workplace, caplog):
    config = "model_name_or_path: model\ndataset_name: chats.jsonl\nuse_cpu: true\nbf16: false\noutput_dir: out\n"
    config += (
        "stm_mask_fraction: 0.3\nuse_peft: true\nlora_target_modules: all-linear\nmax_steps: 1\nreport_to: none\n"
    )
    Path("run.yaml").write_text(config, encoding="utf-8")
    assert main(["score", "--config", "run.yaml"]) == 0
    assert main(["sft", "--config", "run.yaml"]) == 0
    assert caplog.text.count("Scores: found") == 1
    assert caplog.text.count("Scores: made in") == 1


def in_two_processes(module, *flags):
    """Run a module's command in two processes that keep their scores in `two`; its output."""
    environment = os.environ | {"STM_HOME": "two", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", module]  # not by `accelerate launch --cpu`, which starts one process
    done = subprocess.run([*launch, *flags], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_leave_what_one_does(workplace):
    alone = Path(stm_score("--tokens-per-batch", "64")["receipt"]["scores_entry"])
    where = ["--model_name_or_path", "model", "--dataset_name", "chats.jsonl", "--tokens-per-batch", "64"]
    assert in_two_processes("stm_plugin.score_command", *where, *FLAGS).count("Scores: two") == 1
    both = workplace / "two" / "scores" / alone.name
    assert {file.name: file.read_bytes() for file in both.iterdir()} == {
        file.name: file.read_bytes() for file in alone.iterdir()
    }


def test_two_processes_train_on_the_masks_of_one(workplace):
    flags = ["--model_name_or_path", "model", "--dataset_name", "chats.jsonl", *FLAGS]
    flags += ["--max_steps", "1", "--per_device_train_batch_size", "1"]
    assert main(["sft", *flags, "--output_dir", "alone"]) == 0
    in_two_processes("stm_plugin.sft", *flags, "--output_dir", "both")
    alone, both = (json.loads(Path(name, "stm.json").read_text(encoding="utf-8")) for name in ("alone", "both"))
    assert both["mask_digest"] == alone["mask_digest"]
    states = [json.loads(Path(name, "checkpoint-1/trainer_state.json").read_text()) for name in ("alone", "both")]
    assert states[1]["epoch"] == 2 * states[0]["epoch"]  # two rows a step, not one


# A look at stored scores.


@pytest.fixture
def entry(workplace):
    return Path(stm_score()["receipt"]["scores_entry"])


def test_info(entry, capsys):
    assert main(["score", "--info", str(entry.parent), "--json", "info"]) == 0
    (facts,) = json.loads(Path("info").read_text()).values()
    assert facts["dtype"] == "torch.float32"
    assert (facts["autocast"], facts["quantization"]) == ("none", "none")
    assert facts["bytes"] == sum(file.stat().st_size for file in entry.iterdir())
    assert facts["scores"] > 100
    assert str(entry) in capsys.readouterr().out


def test_whole_scores_are_ok(entry, capsys):
    assert main(["score", "--verify", str(entry)]) == 0
    assert main(["score", f"--verify={entry.parent}"]) == 0
    assert capsys.readouterr().out.count("whole: True") == 2
    assert main(["score", "--info", str(entry)]) == 0
    assert "whole:" not in capsys.readouterr().out


def damage_shard(entry):
    (shard,) = entry.glob("shard*")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)


def damage_manifest(entry):
    file = entry / "manifest.json"
    file.write_text(file.read_text().replace("float32", "float16"))


def drop_shard(entry):
    next(entry.glob("shard*")).unlink()


def rename(entry):
    entry.rename(entry.with_name("0" * 32))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_shard, "shard-000000000000.npy"),
        (damage_manifest, "manifest.json"),
        (drop_shard, "shard-000000000000.npy"),
        (rename, "its folder should be named"),
    ],
)
def test_damage_is_found(damage, named, entry, capsys):
    damage(entry)
    assert main(["score", "--verify", str(entry.parent)]) == 1
    out = capsys.readouterr().out
    assert "damaged: " in out
    assert named in out


@pytest.mark.parametrize("action", ["--info", "--verify"])
def test_no_scores_there(action, workplace, capsys):
    assert main(["score", action, "model"]) == 1
    assert "model holds no scores" in capsys.readouterr().err


def test_what_training_would_refuse_is_shown_all_the_same(workplace, capsys, caplog):
    """Every token masked: that is when the table is needed."""
    where = ["--model_name_or_path", "model", "--dataset_name", "chats.jsonl"]
    flags = [flag for flag in FLAGS if flag not in ("--stm_mask_fraction", "0.3")]
    assert main(["score", *where, *flags, "--stm_threshold", "1.0001"]) == 0
    assert "Training with these options would stop: Every one of the" in caplog.text
    assert "stm_mask_fraction: 0.22" in capsys.readouterr().out


def test_a_share_in_yaml_serves_the_commands_that_score_now(workplace, capsys):
    lines = ["model_name_or_path: model", "stm_mask_fraction: 0.22", "use_cpu: true", "bf16: false"]
    (workplace / "run.yaml").write_text("\n".join(lines))
    assert main(["sweep", "--config", "run.yaml", "--dataset-name", "chats.jsonl"]) == 0
    assert main(["inspect", "--config", "run.yaml", "--dataset_name", "chats.jsonl", "--stm_threshold", "900"]) == 0
    assert "perplexity above 900" in capsys.readouterr().out

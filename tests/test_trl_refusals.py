"""What cannot be masked exactly is refused before the first step, weights as they were, with a message that helps."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import DataCollatorForLanguageModeling
from trl_helpers import (
    IGNORE,
    RecordingSTM,
    as_dataset,
    label_rows,
    one_thread,  # noqa: F401
    oracle_nll,
    plain_trainer,
    same_bits,
    scores_of,
    stm_trainer,
    weights,
)

from stm_plugin.options import STMOptions


def _refused(match, model, *args, error=ValueError, **options):
    """Building and training is refused; no step is made and no weight moves. The message."""
    before = weights(model)
    steps = []

    class Trainer(RecordingSTM):
        def training_step(self, *args):
            steps.append(True)
            return super().training_step(*args)

    with pytest.raises(error, match=match) as caught:
        stm_trainer(model, *args, trainer_class=Trainer, **{"stm_threshold": 1500.0, "max_steps": 2} | options).train()
    assert not steps
    assert same_bits(before, weights(model))
    return str(caught.value)


# --- Data -----------------------------------------------------------------------------------------------------------


def test_documents_in_rows_that_are_trained_whole(tokenizer, make_model, tmp_path):
    rows = [row | {"seq_lengths": [3, len(row["input_ids"]) - 3]} for row in label_rows(tokenizer, 4)]
    _refused("column seq_lengths.*Set padding_free=True", make_model(), rows, tokenizer, tmp_path, max_length=None)
    trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, max_length=None, padding_free=True)
    assert len(trainer.stm_score().plan.documents) == 8


def test_streaming(tokenizer, make_model, chats, tmp_path):
    message = _refused(
        "streaming", make_model(), as_dataset(chats).to_iterable_dataset(), tokenizer, tmp_path, max_length=None
    )
    assert "IterableDataset" in message
    assert "datasets.Dataset (streaming=False)" in message


def test_vision_data(tokenizer, tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **small),
            vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **small),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
    )
    rows = [
        {"image": Image.new("RGB", (8, 8)), "prompt": "<image> What?", "completion": f"Number {i}."} for i in range(4)
    ]
    message = _refused("vision data", model, rows, processor, tmp_path, max_length=None)
    assert "SFTTrainer" in message


@pytest.mark.parametrize("format_", ["with_transform", "set_transform"])
def test_transform(format_, tokenizer, make_model, tmp_path):
    dataset = as_dataset(label_rows(tokenizer))

    def shorten(rows):
        return {name: [row[:5] for row in values] for name, values in rows.items()}

    if format_ == "with_transform":
        dataset = dataset.with_transform(shorten)
    else:
        dataset.set_transform(shorten)
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    message = _refused("transform", make_model(), dataset, tokenizer, tmp_path, **options)
    assert "Dataset.map" in message
    assert "reset_format" in message


def test_text_that_was_not_prepared(tokenizer, make_model, tmp_path):
    rows = [{"text": "Paris"}] * 3
    message = _refused(
        "'input_ids'", make_model(), rows, tokenizer, tmp_path, dataset_kwargs={"skip_prepare_dataset": True}
    )
    assert "['text']" in message


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("change", [-1, 1])
def test_labels_of_another_length(change, prepared, tokenizer, make_model, tmp_path):
    rows = label_rows(tokenizer)
    labels = rows[2]["labels"]
    rows[2]["labels"] = labels[:change] if change < 0 else [*labels, 5]
    message = _refused(
        f"labels has {len(labels) + change} entries in row 2, where input_ids has {len(labels)}",
        make_model(),
        rows,
        tokenizer,
        tmp_path,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": prepared},
    )
    assert "1 such rows" in message
    assert "-100" in message


def test_segments_that_do_not_fill_their_row(tokenizer, make_model, tmp_path):
    rows = [row | {"seq_lengths": [4, len(row["input_ids"]) - 4]} for row in label_rows(tokenizer)]
    rows[1]["seq_lengths"][1] -= 1
    _refused(
        r"seq_lengths \(summed\) has \d+ entries in row 1",
        make_model(),
        rows,
        tokenizer,
        tmp_path,
        max_length=None,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def test_missing_values(tokenizer, make_model, tmp_path):
    rows = label_rows(tokenizer)
    rows[1]["labels"][2] = None
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    _refused("'labels' has missing values", make_model(), rows, tokenizer, tmp_path, **options)


def test_no_label_token_at_all(tokenizer, make_model, tmp_path):
    rows = [
        {"input_ids": row["input_ids"], "labels": [IGNORE] * len(row["input_ids"])} for row in label_rows(tokenizer)
    ]
    rows[0]["labels"][0] = rows[0]["input_ids"][0]  # at position 0, where nothing predicts it
    message = _refused("no label token", make_model(), rows, tokenizer, tmp_path, max_length=None)
    assert "chat template" in message


# --- Scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["high", "low", "random"])
def test_every_label_above_the_threshold(strategy, tokenizer, make_model, chats, tmp_path):
    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain").train_dataset
    smallest = math.exp(scores_of(oracle_nll(plain, make_model())).min())
    message = _refused(
        "has a perplexity above stm_threshold=1.5",
        make_model(),
        chats,
        tokenizer,
        tmp_path / "stm",
        stm_threshold=1.5,
        stm_strategy=strategy,
    )
    named = float(message.split("smallest perplexity is ")[1].split(";")[0])
    assert named == pytest.approx(smallest, rel=1e-4)
    assert "chat template" in message
    assert not (tmp_path / "stm" / "stm.json").exists()
    suggested = float(message.split("; ")[1].split(" would")[0])
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path / "next", stm_threshold=suggested, max_steps=1)
    trainer.train()
    assert 0.15 < json.loads((tmp_path / "next" / "stm.json").read_text())["masked_fraction"] <= 0.23


@pytest.mark.parametrize(
    "options", [{"stm_threshold": 1500.0}, {"stm_mask_fraction": 0.2, "stm_threshold": None}], ids=str
)
@pytest.mark.parametrize("where", ["head", "layer"])
def test_weights_with_nan(where, options, tokenizer, make_model, chats, tmp_path):
    model = make_model()
    with torch.no_grad():
        (model.lm_head if where == "head" else model.model.layers[0].mlp.down_proj).weight[0, 0] = math.nan
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"scores are NaN.*weights and dtype"):
        stm_trainer(model, chats, tokenizer, tmp_path, max_steps=1, **options).train()
    after = model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


@pytest.mark.parametrize("way", ["stm_scores_dir", "STM_HOME"])
def test_scores_folder_that_cannot_be_written(way, tokenizer, make_model, chats, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    options = {}
    if way == "STM_HOME":
        monkeypatch.setenv("STM_HOME", str(tmp_path / "file" / "home"))
    else:
        options["stm_scores_dir"] = str(tmp_path / "file" / "scores")
    with pytest.raises(ValueError, match="Scores cannot be written to") as caught:
        stm_trainer(make_model(), chats, tokenizer, tmp_path, **options)  # as early as the trainer is built
    assert str(tmp_path / "file") in str(caught.value)
    assert "Set stm_scores_dir" in str(caught.value)
    assert "STM_HOME" in str(caught.value)


def _entry(tokenizer, make_model, chats, tmp_path):
    stm_trainer(make_model(), chats, tokenizer, tmp_path / "first", stm_threshold=1500.0, max_steps=1).train()
    (entry,) = (tmp_path / "stm-home" / "scores").glob("[!.]*")
    return entry


def _rewrite(entry, change):
    """Change the manifest, with its checksum made right again."""
    from stm_plugin.scoring.store import _manifest_checksum

    content = json.loads((entry / "manifest.json").read_text())
    content.pop("checksum")
    change(content)
    (entry / "manifest.json").write_text(json.dumps(content | {"checksum": _manifest_checksum(content)}))


MANIFEST_ALONE = (
    "no manifest",
    "half a manifest",
    "another number in the manifest",
    "no JSON object",
    "another format",
)


def _damage(kind, entry):
    manifest, shard = entry / "manifest.json", next(entry.glob("shard-*.npy"))
    content = bytearray(shard.read_bytes())
    if kind == "a bit of a score":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif kind == "other scores with their checksum":
        from stm_plugin.scoring.store import ScoresKey, _shard_checksum

        key = ScoresKey(**json.loads(manifest.read_text())["key"])
        content[130] ^= 1
        shard.write_bytes(content[:-16] + _shard_checksum(key, 0, bytes(content[:-16])))
    elif kind == "a shard cut short":
        shard.write_bytes(content[:-4])
    elif kind == "no shard":
        shard.unlink()
    elif kind == "a pickled shard":
        np.save(shard, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "half a manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif kind == "another number in the manifest":
        manifest.write_text(manifest.read_text().replace('"num_scores": ', '"num_scores": 1', 1))
    elif kind == "no JSON object":
        manifest.write_text("[1]")
    elif kind == "the key of other weights":
        _rewrite(entry, lambda content: content["key"].update(model="0" * 32))
    elif kind == "the key of other data":
        _rewrite(entry, lambda content: content["key"].update(data="0" * 32))
    elif kind == "too few scores":
        _rewrite(entry, lambda content: content.update(num_scores=content["num_scores"] - 1))
    elif kind == "another format":
        _rewrite(entry, lambda content: content["key"].update(format_version=99))
    elif kind == "a shard of elsewhere":
        _rewrite(entry, lambda content: content["shards"][0].__setitem__(0, 1))


@pytest.mark.parametrize(
    "kind",
    [
        "a bit of a score",
        "other scores with their checksum",
        "a shard cut short",
        "no shard",
        "a pickled shard",
        "no manifest",
        "half a manifest",
        "another number in the manifest",
        "no JSON object",
        "the key of other weights",
        "the key of other data",
        "too few scores",
        "another format",
        "a shard of elsewhere",
    ],
)
def test_damaged_scores_are_named_and_made_again(kind, tokenizer, make_model, chats, tmp_path, caplog):
    entry = _entry(tokenizer, make_model, chats, tmp_path)
    before = {file.name: file.read_bytes() for file in entry.iterdir()}
    _damage(kind, entry)
    caplog.clear()
    with caplog.at_level("INFO"):
        stm_trainer(make_model(), chats, tokenizer, tmp_path / "second", stm_threshold=1500.0, max_steps=1).train()
    assert f"The scores in {entry} are damaged and are made again: " in caplog.text
    assert "Scores: made in " in caplog.text or kind in MANIFEST_ALONE
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == before
    receipts = [json.loads((tmp_path / name / "stm.json").read_text()) for name in ("first", "second")]
    assert receipts[0]["mask_digest"] == receipts[1]["mask_digest"]


def test_a_file_in_the_place_of_an_entry(tokenizer, make_model, chats, tmp_path):
    entry = _entry(tokenizer, make_model, chats, tmp_path)
    shutil.rmtree(entry)
    entry.write_text("")
    assert str(entry) in _refused("could not be written", make_model(), chats, tokenizer, tmp_path / "second")
    assert not (tmp_path / "second" / "stm.json").exists()


def test_drafts_of_killed_runs_are_in_nobodys_way(tokenizer, make_model, chats, tmp_path):
    entry = _entry(tokenizer, make_model, chats, tmp_path)
    draft = entry.parent / f".{entry.name}-killed"
    shutil.copytree(entry, draft)
    (draft / "manifest.json").unlink()
    shutil.rmtree(entry)
    stm_trainer(make_model(), chats, tokenizer, tmp_path / "second", stm_threshold=1500.0, max_steps=1).train()
    assert entry.is_dir()


# --- Collators ------------------------------------------------------------------------------------------------------


class _Changing:
    """A collator that replaces token ids."""

    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"][:8] for row in rows])
        return {"input_ids": ids + 1, "labels": torch.tensor([row["labels"][:8] for row in rows])}


class _Unlabelled:
    """A collator that leaves labels to others."""

    def __call__(self, rows):
        return {"input_ids": torch.tensor([row["input_ids"][:8] for row in rows])}


class _JointlyRebuilding:
    """A collator that keeps labels of a single row, and rebuilds those of several."""

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        if len(rows) > 1:
            return {"input_ids": ids, "labels": ids.clone()}
        return {"input_ids": ids, "labels": torch.tensor([rows[0]["labels"]])}


class _LeftPadding:
    """A collator that pads on the left to a fixed width and keeps labels: allowed."""

    def __init__(self, padding, width=80):
        self.padding, self.width = padding, width

    def _pad(self, row, value):
        return [value] * (self.width - len(row)) + list(row)

    def __call__(self, rows):
        ids = torch.tensor([self._pad(row["input_ids"], self.padding) for row in rows])
        labels = torch.tensor([self._pad(row["labels"], IGNORE) for row in rows])
        mask = torch.tensor([self._pad([1] * len(row["input_ids"]), 0) for row in rows])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_collator_that_rebuilds_labels(tokenizer, make_model, chats, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    message = _refused(
        "data collator DataCollatorForLanguageModeling puts labels where STM has masked",
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        {"data_collator": collator},
    )
    assert "data_collator=None" in message
    assert not (tmp_path / "stm.json").exists()


@pytest.mark.parametrize(
    ("collator", "match"),
    [
        (_Changing(), "_Changing changes the token ids"),
        (_Unlabelled(), r"_Unlabelled returns \['input_ids'\]; STM needs 'input_ids' and 'labels'"),
        (_JointlyRebuilding(), "_JointlyRebuilding puts labels where STM has masked"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_collators_that_cannot_keep_masks(collator, match, tokenizer, make_model, chats, tmp_path):
    _refused(match, make_model(), chats, tokenizer, tmp_path, {"data_collator": collator})


def test_collator_of_ones_own_that_keeps_labels(tokenizer, make_model, chats, tmp_path):
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        {"data_collator": _LeftPadding(tokenizer.pad_token_id)},
        trainer_class=RecordingSTM,
        stm_threshold=1500.0,
        max_length=80,
    )
    trainer.train()
    receipt = json.loads((tmp_path / "stm.json").read_text())
    kept = sum(int((batch["labels"] != IGNORE).sum()) for batch in trainer.batches)
    assert kept == receipt["label_tokens"] - receipt["masked_tokens"]
    assert 0 < receipt["masked_tokens"]


# --- Models and parallelism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=lambda config: type(config).__name__,
)
def test_virtual_tokens(config, tokenizer, make_model, chats, tmp_path):
    message = _refused("virtual tokens", make_model(), chats, tokenizer, tmp_path, {"peft_config": config})
    assert "'default'" in message
    assert "LoRA" in message


@pytest.mark.parametrize(
    ("switch", "named"),
    [
        ("cp_enabled", "context parallelism"),
        ("sp_enabled", "sequence parallelism"),
        ("tp_enabled", "tensor parallelism"),
        ("n_gpu", "nn.DataParallel"),
    ],
)
def test_parallelism(switch, named, tokenizer, make_model, chats, tmp_path, monkeypatch):
    """Of these none can be had with one CPU process: the check alone, on a trainer that says it is on."""
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0)
    trainer._stm_check_supported(STMOptions())
    if switch.endswith("p_enabled") and not switch.startswith("is_"):
        off = dict.fromkeys(("cp_enabled", "sp_enabled", "tp_enabled"), False)
        config = SimpleNamespace(**off | {switch: True})
        monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", config, raising=False)
    elif switch == "n_gpu":
        monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    else:
        monkeypatch.setattr(trainer, switch, True)
    with pytest.raises(ValueError, match=f"STM cannot yet score exactly under .*{named}") as caught:
        trainer._stm_check_supported(STMOptions())
    assert "one process, DDP or DeepSpeed" in str(caught.value)


def test_model_without_a_backbone(tokenizer, make_model, chats, tmp_path):
    from transformers import LlamaForCausalLM

    class NoBackbone(LlamaForCausalLM):
        base_model_prefix = "absent"

    model = NoBackbone(make_model().config)
    _refused("cannot score NoBackbone: it has no backbone", model, chats, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stm_threshold": 1.0}, "greater than 1"),
        ({"stm_threshold": math.nan}, "greater than 1"),
        ({"stm_threshold": True}, "greater than 1"),
        ({"stm_threshold": "2.5"}, "greater than 1"),
        ({"stm_mask_fraction": 0.2}, "Remove one of them"),
        ({"stm_threshold": None, "stm_mask_fraction": 1.0}, "between 0 and 1"),
        ({"stm_strategy": "middle"}, "'high', 'low', 'random'"),
        ({"stm_reference": "current", "stm_scores_dir": "scores"}, "has no effect"),
        ({"stm_reference_kwargs": {"dtype": "bfloat16"}}, "has no effect"),
        ({"stm_tokens_per_batch": 0}, "positive"),
    ],
    ids=str,
)
def test_options_are_checked_when_the_config_is_made_and_again_when_training_starts(
    options, match, tokenizer, make_model, chats, tmp_path
):
    from trl_helpers import stm_config

    with pytest.raises(ValueError, match=match):
        stm_config(tmp_path, **{"stm_threshold": 1500.0} | options)
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0)
    for name, value in options.items():
        setattr(trainer.args, name, value)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert same_bits(before, weights(trainer.model))


def test_an_error_in_training_does_not_leave_half_a_state(tokenizer, make_model, chats, tmp_path):
    """After a refusal the same trainer, put right, trains as if nothing had happened."""
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        {"peft_config": LoraConfig(r=4)},
        trainer_class=RecordingSTM,
        stm_threshold=1.5,
    )
    with pytest.raises(ValueError, match="smallest perplexity"):
        trainer.train()
    trainer.args.stm_threshold = 1500.0
    trainer.train()
    torch.manual_seed(0)
    other = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        {"peft_config": LoraConfig(r=4)},
        trainer_class=RecordingSTM,
        stm_threshold=1500.0,
    )
    other.train()
    assert trainer.train_dataset["labels"][:] == other.train_dataset["labels"][:]
    assert trainer.items == other.items

"""Runs after runs: stored scores, a second `train()`, resuming, receipts, metrics, logs and arguments."""

import copy
import json
import logging
import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig
from trl_helpers import (
    IGNORE,
    CountTokens,
    RecordingSFT,
    RecordingSTM,
    as_dataset,
    history,
    masked_rows,
    one_thread,  # noqa: F401
    oracle_nll,
    plain_config,
    plain_trainer,
    same_bits,
    settings,
    stm_config,
    stm_trainer,
    threshold_between,
    weights,
)

from stm_plugin.options import STMOptions
from stm_plugin.trl import STMSFTConfig, STMSFTTrainer

LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


def _keywords(kind, **options):
    return {"peft_config": LoraConfig(**LORA | options)} if kind == "lora" else {}


def _run(model, rows, tokenizer, folder, trainer=None, **options):
    """A finished run, and how many forward passes of its backbone were not training."""
    made = stm_trainer(model, rows, tokenizer, folder, trainer, trainer_class=RecordingSTM, **options)
    with CountTokens(made.model) as count:
        made.train()
    assert count.training.count(True) == len(made.batches)
    return made, count.training.count(False)


def _receipt(folder):
    return json.loads((Path(folder) / "stm.json").read_text())


def _labels(trainer):
    return [list(row) for row in trainer.train_dataset["labels"]]


@pytest.fixture
def plain(tokenizer, make_model, chats, tmp_path):
    return plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain").train_dataset


@pytest.fixture
def nll(plain, make_model):
    return oracle_nll(plain, make_model())


# --- Stored scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_other_thresholds_seeds_and_fresh_adapters_make_no_forward_pass(
    kind, nll, plain, tokenizer, make_model, chats, tmp_path
):
    def run(name, keywords=None, **options):
        given = _keywords(kind) if keywords is None else keywords
        return _run(make_model(), chats, tokenizer, tmp_path / name, given, max_steps=1, **options)

    first, scored = run("first", stm_threshold=threshold_between(nll))
    assert scored > 0
    for name, keywords, options in [
        ("threshold", None, {"stm_threshold": threshold_between(nll, share=0.5)}),
        ("fraction", None, {"stm_mask_fraction": 0.2}),
        ("strategy", None, {"stm_threshold": 1500.0, "stm_strategy": "random", "stm_seed": 3}),
        ("seed", None, {"stm_threshold": 1500.0, "seed": 7}),
        ("other adapter", _keywords("lora", r=8, use_dora=True), {"stm_threshold": 1500.0, "seed": 3}),
        ("no adapter", {}, {"stm_threshold": 1500.0}),
        ("batch size", None, {"stm_threshold": 1500.0, "stm_tokens_per_batch": 17, "per_device_train_batch_size": 2}),
        ("shuffled", None, {"stm_threshold": 1500.0, "shuffle_dataset": True}),
        ("packed", None, {"stm_threshold": 1500.0, "packing": True, "max_length": 1024}),
    ]:
        other, scored = run(name, keywords, **options)
        if ("use_dora" in str(keywords) and kind == "lora") or name == "other adapter":
            continue  # DoRA equals its base up to rounding only: either is right
        assert scored == 0, name
        assert other._stm_run.key == first._stm_run.key, name
    assert _labels(first) == masked_rows(plain, nll, math.log(first.args.stm_threshold))


@pytest.mark.parametrize("change", ["weights", "one weight", "buffer", "row", "label", "autocast", "chat template"])
def test_other_weights_or_data_are_scored_anew(change, tokenizer, make_model, chats, tmp_path):
    first, _ = _run(make_model(), chats, tokenizer, tmp_path / "one", stm_threshold=1500.0, max_steps=1)
    model, rows, options, tokenizer = make_model(), copy.deepcopy(chats), {}, copy.deepcopy(tokenizer)
    if change == "weights":
        model = make_model(seed=1)
    elif change == "one weight":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    elif change == "buffer":
        model.model.rotary_emb.inv_freq.mul_(0.5)
    elif change == "row":
        rows[3]["completion"][0]["content"] += "."
    elif change == "label":
        options["completion_only_loss"] = False
    elif change == "autocast":
        options["bf16"] = True
    else:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    other, scored = _run(model, rows, tokenizer, tmp_path / "two", stm_threshold=1500.0, max_steps=1, **options)
    assert scored > 0
    assert other._stm_run.key != first._stm_run.key
    again, scored = (
        _run(make_model(), chats, tokenizer, tmp_path / "three", stm_threshold=1500.0, max_steps=1)
        if (change != "chat template")
        else (first, 0)
    )
    assert scored == 0
    assert _labels(again) == _labels(first)


def test_trained_adapter_is_scored_anew(tokenizer, make_model, chats, tmp_path):
    first, _ = _run(make_model(), chats, tokenizer, tmp_path / "one", _keywords("lora"), stm_threshold=1500.0)
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    second, scored = _run(model, chats, tokenizer, tmp_path / "two", stm_threshold=1500.0)
    assert scored > 0
    assert second._stm_run.key.model != first._stm_run.key.model


def test_scores_dir_is_where_scores_go(tokenizer, make_model, chats, tmp_path):
    folder = tmp_path / "a" / "b"
    trainer, _ = _run(
        make_model(), chats, tokenizer, tmp_path / "one", stm_threshold=1500.0, stm_scores_dir=str(folder), max_steps=1
    )
    assert [entry.name for entry in folder.glob("[!.]*")] == [trainer._stm_run.key.name]
    assert not (tmp_path / "stm-home" / "scores").exists()
    _, scored = _run(make_model(), chats, tokenizer, tmp_path / "two", stm_threshold=1500.0, max_steps=1)
    assert scored > 0


# --- Training again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_second_train_keeps_the_masks_of_the_first(kind, nll, plain, tokenizer, make_model, chats, tmp_path):
    threshold = threshold_between(nll)
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path, _keywords(kind), stm_threshold=threshold)
    first, receipt = _labels(trainer), _receipt(tmp_path)
    assert first == masked_rows(plain, nll, math.log(threshold))
    with CountTokens(trainer.model) as count:
        trainer.train()
    assert False not in count.training
    assert _labels(trainer) == first
    assert _receipt(tmp_path) == receipt
    kept = [entry["stm/kept_tokens"] for entry in trainer.state.log_history if "stm/kept_tokens" in entry]
    assert sum(kept) == receipt["label_tokens"] - receipt["masked_tokens"]


def test_second_train_with_another_threshold(nll, plain, tokenizer, make_model, chats, tmp_path):
    """As in a search: the option changes, the scores stay those of the first start, and no mask is laid on a mask."""
    high, low = threshold_between(nll, share=0.2), threshold_between(nll, share=0.6)
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path, stm_threshold=low)
    trainer.args.stm_threshold = high
    with CountTokens(trainer.model) as count:
        trainer.train()
    assert False not in count.training
    assert _labels(trainer) == masked_rows(plain, nll, math.log(high))
    assert _receipt(tmp_path)["threshold"] == high
    trainer.args.stm_threshold, trainer.args.stm_strategy = math.inf, "low"
    trainer.train()
    assert _labels(trainer) == plain["labels"][:]
    trainer.args.stm_threshold = 0.5
    with pytest.raises(ValueError, match="stm_threshold must be a perplexity"):
        trainer.train()
    trainer.args.stm_threshold, trainer.args.stm_reference = 2.5, "some/model"
    with pytest.raises(ValueError, match="stm_reference changed from 'initial' to 'some/model'"):
        trainer.train()


def test_another_training_set_is_masked_by_itself(nll, tokenizer, make_model, chats, tmp_path):
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, learning_rate=0.0)
    other = plain_trainer(make_model(), chats[3:7], tokenizer, tmp_path / "other").train_dataset
    trainer.train_dataset = other
    trainer.train()
    assert _labels(trainer) == masked_rows(other, oracle_nll(other, make_model()), math.log(1500.0))
    assert _receipt(tmp_path)["rows"] == 4


@pytest.mark.parametrize("way", ["part of it in the same trainer", "in another trainer", "packed in another trainer"])
def test_masked_rows_are_never_masked_again(way, nll, tokenizer, make_model, chats, tmp_path):
    """Rows that carry STM's column have been masked, and what was masked can no longer be told from the prompt."""
    threshold = threshold_between(nll)
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path / "one", stm_threshold=threshold)
    rows = trainer.train_dataset.select(range(6))

    def again():
        if way == "part of it in the same trainer":
            trainer.train_dataset = rows
            trainer.train()
        else:
            options = {"packing": way.startswith("packed"), "stm_threshold": threshold}
            stm_trainer(make_model(seed=3), rows, tokenizer, tmp_path / "two", **options).train()

    with pytest.raises(ValueError, match="stm_masked_tokens"):
        again()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_auto_find_batch_size_scores_once_and_keeps_the_order(
    kind, nll, plain, tokenizer, make_model, chats, tmp_path
):
    threshold = threshold_between(nll)
    found = []
    for make, recording in ((plain_trainer, RecordingSFT), (stm_trainer, RecordingSTM)):
        torch.manual_seed(0)
        trainer = make(
            make_model(),
            chats,
            tokenizer,
            tmp_path / recording.__name__,
            _keywords(kind),
            trainer_class=recording,
            stm_threshold=threshold,
            stm_tokens_per_batch=1,  # so that every document goes alone
            auto_find_batch_size=True,
            per_device_train_batch_size=8,
        )
        step, failed = trainer.training_step, []

        def training_step(*args, step=step, failed=failed):
            if not failed:
                failed.append(True)
                raise RuntimeError("CUDA out of memory.")
            return step(*args)

        trainer.training_step = training_step
        with CountTokens(trainer.model) as count:
            trainer.train()
        found.append(trainer)
    assert failed
    plan = trainer._stm_run.plan
    assert plan.common_prefix > 0
    assert count.training.count(False) == len(plan) + 1  # each once, and once what all begin with
    assert _labels(trainer) == masked_rows(plain, nll, math.log(threshold))
    one, other = found
    assert one._train_batch_size == other._train_batch_size < 8
    assert [batch["input_ids"].tolist() for batch in one.batches] == [
        batch["input_ids"].tolist() for batch in other.batches
    ]
    assert one.random_states == other.random_states
    kept = history(trainer, "stm/kept_tokens")
    receipt = _receipt(tmp_path / "RecordingSTM")
    assert sum(kept for (kept,) in kept) == receipt["label_tokens"] - receipt["masked_tokens"]


def _fit_for_trl(model):
    """What SFTTrainer's `__init__` does to a model that is made later."""
    if Version(version("trl")) >= Version("1.15"):
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def _search_trainer(model, chats, tokenizer, folder, **options):
    return stm_trainer(model, chats, tokenizer, folder, trainer_class=RecordingSTM, loss_type="nll", **options)


def test_search_trials_share_scores(nll, plain, tokenizer, make_model, chats, tmp_path):
    trainer = _search_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=threshold_between(nll))
    trainer.model_init = lambda: _fit_for_trl(make_model())
    losses = []
    for share in (0.3, 0.6, 0.3):
        trainer.args.stm_threshold = threshold = threshold_between(nll, share=share)
        trainer.train()
        assert _labels(trainer) == masked_rows(plain, nll, math.log(threshold))
        losses.append(trainer.losses[-4:])
    assert losses[0] == losses[2] != losses[1]
    assert len(list((tmp_path / "stm-home" / "scores").glob("[!.]*"))) == 1


def test_search_trial_with_another_model_uses_its_own_scores(plain, tokenizer, make_model, chats, tmp_path):
    """`model_init` may choose the model by the trial. Scores of another model would be stale: its own, or an error."""
    seeds = iter([0, 5])
    trainer = _search_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0)
    trainer.model_init = lambda: _fit_for_trl(make_model(seed=next(seeds)))
    trainer.train()
    assert _labels(trainer) == masked_rows(plain, oracle_nll(plain, make_model(seed=0)), math.log(1500.0))
    outcome = _error_of(trainer.train)
    own = masked_rows(plain, oracle_nll(plain, make_model(seed=5)), math.log(1500.0))
    assert "model" in outcome if outcome else _labels(trainer) == own


@pytest.mark.parametrize("searching", [False, True])
def test_running_out_of_memory_late(searching, nll, plain, tokenizer, make_model, chats, tmp_path):
    """When memory ends in a later step, the loop starts anew with weights that have moved: scores stay the start's."""
    threshold = threshold_between(nll)
    trainer = _search_trainer(
        make_model(), chats, tokenizer, tmp_path, stm_threshold=threshold, auto_find_batch_size=True, learning_rate=0.1
    )
    if searching:
        trainer.model_init = lambda: _fit_for_trl(make_model())
    step, calls = trainer.training_step, []

    def training_step(*args):
        calls.append(True)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return step(*args)

    trainer.training_step = training_step
    trainer.train()
    assert len(calls) > 4
    assert _labels(trainer) == masked_rows(plain, nll, math.log(threshold))


def test_a_reference_is_checked_for_whatever_it_scores(plain, tokenizer, make_model, chats, tmp_path):
    """Another training set may hold tokens that the first did not: their meaning is checked, too."""
    bigger = copy.deepcopy(tokenizer)
    bigger.add_tokens(["<call>"])
    size = {"vocab_size": len(bigger)}
    make_model(seed=4, **size).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")  # without the added token
    trainer = stm_trainer(
        make_model(**size), chats, bigger, tmp_path, stm_threshold=1500.0, stm_reference=str(tmp_path / "reference")
    )
    trainer.train()
    rows = [{"text": f"add <call> {i}"} for i in range(6)]
    trainer.train_dataset = plain_trainer(make_model(**size), rows, bigger, tmp_path / "other").train_dataset
    with pytest.raises(ValueError, match="is '<call>' here and None there"):
        trainer.train()


def _error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


# --- Checkpoints and resuming ---------------------------------------------------------------------------------------


def _checkpointed(kind, tokenizer, make_model, chats, tmp_path, **options):
    """A run of six steps with a checkpoint after the third."""
    torch.manual_seed(0)
    trainer, _ = _run(
        make_model(attention_dropout=0.1),
        chats,
        tokenizer,
        tmp_path / "run",
        _keywords(kind),
        **_resumable() | options,
    )
    return trainer, str(tmp_path / "run" / "checkpoint-3")


def _resumable(**options):
    return {"stm_threshold": 1500.0, "max_steps": 6, "save_strategy": "steps", "save_steps": 3} | options


def _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path, model=None, keywords=None, **options):
    made = stm_trainer(
        model or make_model(attention_dropout=0.1),
        chats,
        tokenizer,
        tmp_path / "resumed",
        _keywords(kind) if keywords is None else keywords,
        trainer_class=RecordingSTM,
        **_resumable() | options,
    )
    with CountTokens(made.model) as count:
        made.train(resume_from_checkpoint=checkpoint)
    return made, count.training.count(False)


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 128, "gradient_accumulation_steps": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_run_is_the_uninterrupted_one(kind, options, tokenizer, make_model, chats, tmp_path):
    whole, checkpoint = _checkpointed(kind, tokenizer, make_model, chats, tmp_path, **options)
    resumed, scored = _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path, seed=42, **options)
    assert scored == 0
    assert _labels(resumed) == _labels(whole)
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert history(resumed, "loss", "stm/kept_tokens", "stm/masked_fraction") == history(
        whole, "loss", "stm/kept_tokens", "stm/masked_fraction"
    )
    assert same_bits(weights(whole.model), weights(resumed.model))
    assert _receipt(tmp_path / "resumed")["mask_digest"] == _receipt(tmp_path / "run")["mask_digest"]
    assert _receipt(tmp_path / "resumed" / "checkpoint-6") == _receipt(tmp_path / "resumed")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_with_scores_gone_makes_them_from_the_start(kind, tokenizer, make_model, chats, tmp_path):
    whole, checkpoint = _checkpointed(kind, tokenizer, make_model, chats, tmp_path)
    shutil.rmtree(tmp_path / "stm-home")
    resumed, scored = _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path)
    assert scored > 0
    assert _labels(resumed) == _labels(whole)
    assert resumed._stm_run.key == whole._stm_run.key
    assert resumed.losses == whole.losses[3:]
    assert same_bits(weights(whole.model), weights(resumed.model))
    again, scored = _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path)
    assert scored == 0
    assert again.losses == resumed.losses


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_with_the_checkpoints_own_weights(kind, tokenizer, make_model, chats, tmp_path):
    """Scores are found by the receipt; once gone, they are never made from weights that have been trained."""
    whole, checkpoint = _checkpointed(kind, tokenizer, make_model, chats, tmp_path)

    def trained():
        if kind == "full":
            return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return PeftModel.from_pretrained(make_model(attention_dropout=0.1), checkpoint, is_trainable=True)

    resumed, scored = _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path, trained(), {})
    assert scored == 0
    assert _labels(resumed) == _labels(whole)
    shutil.rmtree(tmp_path / "stm-home")
    model = trained()
    before = weights(model)
    with pytest.raises(ValueError, match=r"scores of the original start are gone .* its model differs") as error:
        _resume(kind, checkpoint, tokenizer, make_model, chats, tmp_path, model, {})
    assert "build the trainer with the model that the run started from" in str(error.value)
    assert same_bits(before, weights(model))
    assert not list((tmp_path / "stm-home" / "scores").glob("[!.]*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stm_threshold": 1600.0}, "threshold_nats"),
        ({"stm_threshold": None, "stm_mask_fraction": 0.2}, "mask_fraction|threshold_nats"),
        ({"stm_strategy": "low"}, "strategy='high', this run has 'low'"),
        ({"stm_seed": 4}, "seed=0, this run has 4"),
        ({"stm_keep_stop_tokens": True}, "keep_stop_tokens=False, this run has True"),
    ],
    ids=str,
)
def test_resuming_with_another_option_is_refused(change, named, tokenizer, make_model, chats, tmp_path):
    _, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    with pytest.raises(ValueError, match=named) as error:
        _resume("lora", checkpoint, tokenizer, make_model, chats, tmp_path, **change)
    assert checkpoint in str(error.value)
    assert "start a new run" in str(error.value)


def test_resuming_with_another_reference_is_refused(tokenizer, make_model, chats, tmp_path):
    _, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    make_model(seed=4).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    with pytest.raises(ValueError, match="reference"):
        _resume("lora", checkpoint, tokenizer, make_model, chats, tmp_path, stm_reference=str(tmp_path / "reference"))


@pytest.mark.parametrize(
    "options", [{"stm_mask_fraction": 0.25, "stm_threshold": None}, {"stm_threshold": math.inf}], ids=str
)
def test_resuming_a_fraction_or_without_masks(options, tokenizer, make_model, chats, tmp_path):
    whole, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path, **options)
    resumed, _ = _resume("lora", checkpoint, tokenizer, make_model, chats, tmp_path, **options)
    assert resumed.losses == whole.losses[3:]


def test_resuming_with_the_reference_gone(tokenizer, make_model, chats, tmp_path):
    """The reference's scores are stored, and made again only from the reference itself."""
    make_model(seed=4).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    options = {"stm_reference": str(tmp_path / "reference")}
    whole, checkpoint = _checkpointed("full", tokenizer, make_model, chats, tmp_path, **options)
    shutil.rmtree(tmp_path / "stm-home")
    resumed, _ = _resume("full", checkpoint, tokenizer, make_model, chats, tmp_path, **options)
    assert resumed.losses == whole.losses[3:]
    make_model(seed=6).save_pretrained(tmp_path / "reference")
    shutil.rmtree(tmp_path / "stm-home")
    with pytest.raises(ValueError, match="its model differs"):
        _resume("full", checkpoint, tokenizer, make_model, chats, tmp_path, **options)


@pytest.mark.parametrize("gone", [False, True])
def test_resuming_with_other_data_is_refused(gone, tokenizer, make_model, chats, tmp_path):
    _, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    if gone:
        shutil.rmtree(tmp_path / "stm-home")
    other = copy.deepcopy(chats)
    other[0]["completion"][0]["content"] += " indeed"
    with pytest.raises(ValueError, match="was trained on other rows") as error:
        _resume("lora", checkpoint, tokenizer, make_model, other, tmp_path)
    assert "max_length" in str(error.value)


def test_resuming_a_plain_run_is_refused(tokenizer, make_model, chats, tmp_path):
    trainer = plain_trainer(make_model(), chats, tokenizer, tmp_path / "run", _keywords("lora"), **_resumable())
    trainer.train()
    with pytest.raises(ValueError, match="was trained without STM"):
        _resume("lora", str(tmp_path / "run" / "checkpoint-3"), tokenizer, make_model, chats, tmp_path)


def test_plain_trainer_resumes_an_stm_run(tokenizer, make_model, chats, tmp_path):
    _, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    trainer = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", _keywords("lora"), **_resumable())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("options", [{"restore_callback_states_from_checkpoint": True}, {"bf16": True}], ids=str)
def test_resumed_run_can_be_resumed_again(options, tokenizer, make_model, chats, tmp_path):
    whole, checkpoint = _checkpointed("full", tokenizer, make_model, chats, tmp_path, max_steps=9)
    made = _resumable(max_steps=9) | options
    made.pop("bf16", None)
    _resume("full", checkpoint, tokenizer, make_model, chats, tmp_path, **made)
    second = str(tmp_path / "resumed" / "checkpoint-6")
    assert _receipt(second)["mask_digest"] == _receipt(tmp_path / "run")["mask_digest"]
    again, _ = _resume("full", second, tokenizer, make_model, chats, tmp_path, **made)
    assert again.losses == whole.losses[6:]
    assert _labels(again) == _labels(whole)


def test_same_trainer_resumes_itself(tokenizer, make_model, chats, tmp_path):
    whole, checkpoint = _checkpointed("full", tokenizer, make_model, chats, tmp_path)
    labels, losses = _labels(whole), list(whole.losses)
    for given in (True, checkpoint):
        shutil.rmtree(tmp_path / "run" / "checkpoint-6", ignore_errors=True)
        whole.train(resume_from_checkpoint=given)
        assert _labels(whole) == labels
        assert whole.losses[-3:] == losses[3:]


# --- Receipts, metrics, cards, logs ---------------------------------------------------------------------------------


def test_a_receipt_lies_in_every_saved_folder(tokenizer, make_model, chats, tmp_path):
    trainer, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    trainer.save_model(str(tmp_path / "final"))
    trainer.save_model()
    receipt = _receipt(tmp_path / "run")
    assert receipt["masked_tokens"] > 0
    for folder in (checkpoint, tmp_path / "run" / "checkpoint-6", tmp_path / "final"):
        assert _receipt(folder) == receipt
        assert not list(Path(folder).glob(".stm*")), "a draft was left behind"
    for step in (3, 6):
        state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["STMState"]["attributes"]["receipt"] == receipt


def test_save_state_carries_the_receipt(tokenizer, make_model, chats, tmp_path):
    """`trainer.save_state()`, as TRL's own scripts call it, in a run that saved no checkpoint."""
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, max_steps=1)
    trainer.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["STMState"]["attributes"]["receipt"] == _receipt(tmp_path)


@pytest.mark.parametrize("threshold", [1500.0, math.inf])
def test_saved_files_are_json(threshold, tokenizer, make_model, chats, tmp_path):
    """Not only to Python: `Infinity` is no JSON, and the hub's and other readers refuse it."""
    _checkpointed("full", tokenizer, make_model, chats, tmp_path, stm_threshold=threshold)
    for file in (tmp_path / "run").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name, file=file: pytest.fail(f"{name} in {file.name}"))


def test_nothing_is_saved_before_training(tokenizer, make_model, chats, tmp_path):
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path / "run", stm_threshold=1500.0)
    trainer.save_model(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / "stm.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 1},
        {"logging_steps": 3},
        {"logging_strategy": "epoch"},
        {"logging_strategy": "no"},
        {"logging_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"logging_steps": 1, "packing": True, "max_length": 128},
        {"logging_steps": 1, "padding_free": True, "max_length": None, "dataloader_num_workers": 2},
        {"logging_steps": 1, "num_train_epochs": 2, "eval_strategy": "epoch"},
    ],
    ids=str,
)
def test_metrics_count_every_kept_token_once(options, tokenizer, make_model, chats, tmp_path):
    keywords = {"eval_dataset": as_dataset(chats[:3])} if "eval_strategy" in options else {}
    trainer, _ = _run(make_model(), chats, tokenizer, tmp_path, keywords, stm_threshold=1500.0, **options)
    receipt = _receipt(tmp_path)
    entries = [entry for entry in trainer.state.log_history if "stm/kept_tokens" in entry]
    kept = receipt["label_tokens"] - receipt["masked_tokens"]
    assert 0 < receipt["masked_tokens"] < receipt["label_tokens"]
    assert sum(entry["stm/kept_tokens"] for entry in entries) == kept * options.get("num_train_epochs", 1)
    for entry in entries:
        assert "eval_loss" not in entry
        assert entry["stm/threshold"] == 1500.0
    if len(entries) == 1:
        assert entries[0]["stm/masked_fraction"] == pytest.approx(receipt["masked_fraction"])
    if options.get("logging_steps") == 1 and "packing" not in options:
        per_step = [(b["labels"][..., 1:] != IGNORE).sum().item() for b in trainer.batches]
        assert [entry["stm/kept_tokens"] for entry in entries] == per_step
    total = sum(e["stm/kept_tokens"] / (1 - e["stm/masked_fraction"]) for e in entries)
    assert total == pytest.approx(receipt["label_tokens"] * options.get("num_train_epochs", 1))
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_metrics_in_tensorboard(tokenizer, make_model, chats, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = _run(
        make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, report_to=["tensorboard"], logging_steps=2
    )
    found = {}
    for file in tmp_path.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in ("stm/kept_tokens", "stm/masked_fraction", "stm/threshold"):
        (tag,) = [tag for tag in found if tag.endswith(name)]
        assert found[tag] == pytest.approx([value for (value,) in history(trainer, name)])


def test_model_card_names_the_method_and_the_paper(tokenizer, make_model, chats, tmp_path):
    trainer, _ = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    trainer.create_model_card(model_name="some model")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "This model was trained with STM" in card
    assert "https://huggingface.co/papers/2501.14315" in card
    assert "Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning" in card
    assert "@article{wu2025stm" in card
    assert {"stm", "sft", "trl"} <= set(card.split("tags:\n")[1].split("\n---")[0].replace("- ", "").splitlines()[:9])
    assert {"stm", "sft", "trl"} <= {*trainer.model.model_tags}


# --- Arguments ------------------------------------------------------------------------------------------------------


@dataclass
class _OwnConfig(SFTConfig):
    own: int = 3


def test_no_args_mean_the_defaults(tokenizer, make_model, chats, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )  # TRL's default is bf16
    model = make_model()
    model.config._name_or_path = "somebody/some-model"
    with caplog.at_level("INFO", logger="stm_plugin"):
        trainer = STMSFTTrainer(model, train_dataset=as_dataset(chats), processing_class=copy.deepcopy(tokenizer))
    assert isinstance(trainer.args, STMSFTConfig)
    assert STMOptions.from_args(trainer.args) == STMOptions()
    assert trainer.args.output_dir == "some-model-SFT"
    assert caplog.text.count("no args given: STM runs with its defaults (stm_threshold=2.5).") == 1


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments, _OwnConfig])
def test_other_args_are_converted(kind, tokenizer, make_model, chats, tmp_path, caplog):
    options = {k: v for k, v in settings(tmp_path).items() if hasattr(TrainingArguments, k) or k == "output_dir"}
    args = kind(**options, hub_token="secret", seed=11, weight_decay=0.25)
    if kind is _OwnConfig:
        args.own = 5
    args.warmup_steps = 7  # changed after it was made
    expected = args.to_dict()
    with caplog.at_level("INFO", logger="stm_plugin"):
        trainer = STMSFTTrainer(
            make_model(), args, train_dataset=as_dataset(chats), processing_class=copy.deepcopy(tokenizer)
        )
    assert isinstance(trainer.args, STMSFTConfig)
    assert STMOptions.from_args(trainer.args) == STMOptions()
    assert trainer.args.hub_token == "secret"
    assert (trainer.args.seed, trainer.args.weight_decay, trainer.args.warmup_steps) == (11, 0.25, 7)
    converted = trainer.args.to_dict()
    moved = {name for name in expected if name in converted and converted[name] != expected[name]}
    plain = kind(**options, hub_token="secret", seed=11, weight_decay=0.25)
    plain_trainer_args = _args_of_sft(plain, make_model, chats, tokenizer).to_dict()
    assert {name: converted[name] for name in moved - {"warmup_steps"}} == {
        name: plain_trainer_args[name] for name in moved - {"warmup_steps"}
    }, "only what SFTTrainer itself changes may change"
    if kind is _OwnConfig:
        assert trainer.args.own == 5
    assert caplog.text.count(f"{kind.__name__} given: STM runs with its defaults (stm_threshold=2.5).") == 1


def _args_of_sft(args, make_model, chats, tokenizer):
    from trl import SFTTrainer

    return SFTTrainer(
        make_model(), args, train_dataset=as_dataset(chats), processing_class=copy.deepcopy(tokenizer)
    ).args


def test_converted_args_train(nll, plain, tokenizer, make_model, chats, tmp_path):
    trainer = STMSFTTrainer(
        make_model(),
        plain_config(tmp_path, max_steps=1),
        train_dataset=as_dataset(chats),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.args.stm_threshold = threshold_between(nll)
    trainer.train()
    assert _labels(trainer) == masked_rows(plain, nll, math.log(trainer.args.stm_threshold))


def test_saved_arguments_load_again(tokenizer, make_model, chats, tmp_path):
    _, checkpoint = _checkpointed("lora", tokenizer, make_model, chats, tmp_path)
    args = torch.load(Path(checkpoint) / "training_args.bin", weights_only=False)
    assert isinstance(args, STMSFTConfig)
    assert args.stm_threshold == 1500.0


def test_positional_and_keyword_arguments(tokenizer, make_model, chats, tmp_path):
    """The signature is SFTTrainer's."""
    import inspect

    from trl import SFTTrainer

    assert inspect.signature(STMSFTTrainer.__init__) == inspect.signature(SFTTrainer.__init__)
    rows = as_dataset(chats)
    by_name = STMSFTTrainer(
        model=make_model(), args=stm_config(tmp_path), train_dataset=rows, processing_class=copy.deepcopy(tokenizer)
    )
    by_place = STMSFTTrainer(make_model(), stm_config(tmp_path), None, rows, rows, copy.deepcopy(tokenizer))
    assert (
        by_name.train_dataset["labels"][:] == by_place.train_dataset["labels"][:] == by_place.eval_dataset["labels"][:]
    )


# --- What a run says ------------------------------------------------------------------------------------------------


def test_one_line_says_what_was_masked(tokenizer, make_model, chats, tmp_path, caplog):
    with caplog.at_level("INFO", logger="stm_plugin"):
        for name in ("one", "two"):
            _run(make_model(), chats, tokenizer, tmp_path / name, stm_threshold=1500.0, max_steps=1)
    lines = [record.getMessage() for record in caplog.records if "STM is on" in record.getMessage()]
    assert len(lines) == 2
    receipt = _receipt(tmp_path / "one")
    for line in lines:
        assert f"{receipt['masked_tokens']:,} of {receipt['label_tokens']:,} label tokens" in line
        assert f"({100 * receipt['masked_fraction']:.2f} %)" in line
        assert "perplexity above 1500.0" in line
        assert "strategy high, reference initial" in line
        assert receipt["scores_entry"] in line
        assert "eval_loss" in line
    assert "Scores: made in" in lines[0]
    assert "Scores: found" in lines[1]


@pytest.mark.parametrize("keep", [False, True])
def test_masked_stop_tokens_are_a_warning(keep, tokenizer, make_model, chats, tmp_path, caplog):
    with caplog.at_level("INFO", logger="stm_plugin"):
        _run(
            make_model(),
            chats,
            tokenizer,
            tmp_path,
            stm_threshold=500.0,
            stm_keep_stop_tokens=keep,
            max_steps=1,
            max_length=None,
        )
    receipt = _receipt(tmp_path)
    warned = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "stop tokens" in r.getMessage()
    ]
    assert receipt["stop_tokens"] == len(chats)
    if keep:
        assert receipt["stop_tokens_masked"] == 0
        assert not warned
    else:
        assert receipt["stop_tokens_masked_fraction"] > 0.05
        assert len(warned) == 1
        assert f"({receipt['stop_tokens_masked']} of {receipt['stop_tokens']})" in warned[0]
        assert "stm_keep_stop_tokens=True" in warned[0]


def test_no_warning_about_stop_tokens_that_are_kept(tokenizer, make_model, chats, tmp_path, caplog):
    with caplog.at_level("INFO", logger="stm_plugin"):
        _run(make_model(), chats, tokenizer, tmp_path, stm_threshold=math.inf, max_steps=1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

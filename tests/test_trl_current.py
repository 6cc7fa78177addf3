"""`stm_reference: current` on TRL: every step masked under its own weights, exact however the step is cut."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl_helpers import (
    IGNORE,
    NoLossArguments,
    RecordingSFT,
    RecordingSTM,
    assert_margin,
    documents_of_batches,
    float64_logits,
    history,
    label_rows,
    nll_of_row,
    one_thread,  # noqa: F401
    plain_trainer,
    same_bits,
    stm_trainer,
    weights,
)

CURRENT = {"stm_reference": "current"}
TAU = 500.0


class KeepsWhatCame(RecordingSTM):
    """Keeps each step's weights and its micro-batches as the collator made them, before they are masked."""

    def __init__(self, *args, **kwargs):
        self.steps = []
        super().__init__(*args, **kwargs)

    def _stm_setup(self):
        super()._stm_setup()
        prepare = self._stm_masking.prepare_step

        def keeping(batches, device):
            before = [{k: v.clone() for k, v in batch.items() if torch.is_tensor(v)} for batch in batches]
            self.steps.append((weights(self.model), before))
            return prepare(batches, device)

        self._stm_masking.prepare_step = keeping


def _nll(model, documents):
    model.__dict__.pop("_oracle", None)
    return [
        nll_of_row({"input_ids": ids, "labels": labels}, lambda ids: float64_logits(model, ids))
        for ids, labels in documents
    ]


def _model_of(make, state):
    """A model that no trainer has touched, with given weights."""
    model = make()
    model.load_state_dict(state)
    return model


def _check_steps(trainer, make):
    """Each step's trained labels are those that came, without what a float64 loop finds above the threshold."""
    per_step = len(trainer.batches) // len(trainer.steps)
    nats = math.log(TAU)
    kept = masked = 0
    for number, (state, came) in enumerate(trainer.steps):
        trained = documents_of_batches(trainer.batches[number * per_step : (number + 1) * per_step])
        documents = documents_of_batches(came)
        nll = _nll(_model_of(make, state), documents)
        scores = np.array([value for row in nll for value in row if not math.isnan(value)])
        assert_margin(scores, nats)
        for (ids, labels), (their_ids, theirs), values in zip(trained, documents, nll, strict=True):
            assert ids == their_ids
            assert labels == [IGNORE if value > nats else label for label, value in zip(theirs, values, strict=True)]
        kept += int((scores <= nats).sum())
        masked += int((scores > nats).sum())
    return kept, masked


LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 96, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "one token a pass": {"stm_tokens_per_batch": 1},
}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_is_masked_under_its_own_weights(layout, tuning, tokenizer, make_model, chats, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    keywords = {"peft_config": lora} if tuning == "lora" else {}
    trainer = stm_trainer(
        make_model(attention_dropout=0.2),
        chats,
        tokenizer,
        tmp_path,
        keywords,
        trainer_class=KeepsWhatCame,
        max_steps=3,
        stm_threshold=TAU,
        **CURRENT,
        **LAYOUTS[layout],
    )
    trainer.train()
    assert len(trainer.steps) == 3
    kept, masked = _check_steps(trainer, lambda: get_peft_model(make_model(), lora) if keywords else make_model())
    assert kept > 0
    assert masked > 0
    receipt = json.loads((tmp_path / "stm.json").read_text())
    assert receipt["reference"] == "current"
    trainer.save_model(tmp_path / "saved")
    receipt = json.loads((tmp_path / "saved" / "stm.json").read_text())
    assert (receipt["steps"], receipt["label_tokens"], receipt["masked_tokens"]) == (3, kept + masked, masked)
    assert receipt["normalization"] == "global"
    assert "mask_digest" not in receipt
    assert sum(value for (value,) in history(trainer, "stm/kept_tokens")) == kept
    assert all(0 < value < 1 for (value,) in history(trainer, "stm/masked_fraction"))


def test_the_fraction_is_of_each_step(tokenizer, make_model, chats, tmp_path):
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        trainer_class=KeepsWhatCame,
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        stm_mask_fraction=0.25,
        **CURRENT,
    )
    trainer.train()
    for number, (state, came) in enumerate(trainer.steps):
        model = _model_of(make_model, state)
        nll = [value for row in _nll(model, documents_of_batches(came)) for value in row if not math.isnan(value)]
        batches = trainer.batches[2 * number : 2 * number + 2]
        labels = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        assert labels == len(nll) - math.floor(0.25 * len(nll))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_masks_it_is_sft_bit_for_bit(layout, tokenizer, make_model, chats, tmp_path):
    runs = []
    for make, recording in ((plain_trainer, RecordingSFT), (stm_trainer, RecordingSTM)):
        lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
        torch.manual_seed(0)
        trainer = make(
            make_model(attention_dropout=0.1),
            chats,
            tokenizer,
            tmp_path / recording.__name__,
            {"peft_config": lora},
            trainer_class=recording,
            max_steps=6,
            stm_threshold=math.inf,
            **CURRENT,
            **LAYOUTS[layout],
        )
        trainer.train()
        runs.append(trainer)
    plain, live = runs
    assert plain.losses == live.losses
    assert plain.random_states == live.random_states
    assert plain.items == live.items
    assert same_bits(weights(plain.model), weights(live.model))


def test_a_streaming_data_set(tokenizer, make_model, chats, tmp_path):
    stream = Dataset.from_list(chats).to_iterable_dataset()
    trainer = stm_trainer(
        make_model(),
        stream,
        tokenizer,
        tmp_path,
        trainer_class=KeepsWhatCame,
        max_steps=3,
        stm_threshold=TAU,
        **CURRENT,
    )
    trainer.train()
    kept, masked = _check_steps(trainer, make_model)
    assert kept > 0
    assert masked > 0


def test_evaluation_is_not_masked(tokenizer, make_model, chats, tmp_path):
    options = {"max_steps": 1, "learning_rate": 0.0, "stm_threshold": TAU}
    plain = plain_trainer(
        make_model(), chats, tokenizer, tmp_path / "plain", {"eval_dataset": Dataset.from_list(chats)}, **options
    )
    live = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path / "stm",
        {"eval_dataset": Dataset.from_list(chats)},
        **options,
        **CURRENT,
    )
    live.train()
    assert live.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tokenizer, make_model, chats, tmp_path):
    options = {"stm_threshold": TAU, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3} | CURRENT
    whole = stm_trainer(make_model(), chats, tokenizer, tmp_path / "whole", **options)
    whole.train()
    resumed = stm_trainer(make_model(seed=9), chats, tokenizer, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(whole, "loss") == history(resumed, "loss")
    assert same_bits(weights(whole.model), weights(resumed.model))
    first, second = (
        json.loads((tmp_path / name / "checkpoint-8" / "stm.json").read_text()) for name in ("whole", "resumed")
    )
    assert first == second
    assert first["steps"] == 8


def test_a_checkpoint_of_another_reference_is_refused(tokenizer, make_model, chats, tmp_path):
    options = {"stm_threshold": TAU, "save_strategy": "steps", "save_steps": 2}
    stm_trainer(make_model(), chats, tokenizer, tmp_path / "initial", **options).train()
    live = stm_trainer(make_model(), chats, tokenizer, tmp_path / "live", **options, **CURRENT)
    with pytest.raises(ValueError, match="reference='initial', this run has 'current'"):
        live.train(resume_from_checkpoint=str(tmp_path / "initial" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stm_scores_dir": "scores"}, "has no effect while stm_reference is 'current'"),
        ({"stm_reference_kwargs": {"dtype": "float32"}}, "has no effect while stm_reference is 'current'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, tokenizer, make_model, chats, tmp_path):
    with pytest.raises(ValueError, match=message):
        stm_trainer(make_model(), chats, tokenizer, tmp_path, **CURRENT, **options)


def test_there_is_nothing_to_score_ahead(tokenizer, make_model, chats, tmp_path):
    with pytest.raises(ValueError, match="nothing to score"):
        stm_trainer(make_model(), chats, tokenizer, tmp_path, **CURRENT).stm_score()


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {name: value for name, value in batch.items() if name != "labels"},
        lambda batch: batch | {"shift_labels": batch["labels"].roll(-1)},
    ],
    ids=["no labels", "shifted labels"],
)
def test_batches_that_train_other_labels_are_refused(change, tokenizer, make_model, chats, tmp_path):
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, max_steps=1, **CURRENT)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: change(dict(collate(rows)))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="masks the 'labels' of each batch"):
        trainer.train()
    assert same_bits(before, weights(trainer.model))


@pytest.mark.parametrize(
    "first",
    [
        False,
        True,
    ],
)
def test_a_loss_that_takes_no_count_is_refused_where_nothing_is_kept(first, tokenizer, make_model, tmp_path):
    """It would divide zero by zero, a label at position 0 or not; where every micro-batch keeps a token, it trains."""
    rows = label_rows(tokenizer, 4)
    for row in rows:
        row["labels"][0] = row["input_ids"][0] if first else IGNORE
    nll = _nll(make_model(), [(row["input_ids"], row["labels"]) for row in rows])
    lowest = [min(value for value in row if not math.isnan(value)) for row in nll]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "loss_type": "nll"} | CURRENT

    def trainer(nats):
        model = NoLossArguments.like(make_model())
        return stm_trainer(model, rows, tokenizer, tmp_path, stm_threshold=math.exp(nats), **options)

    refused = trainer(max(lowest) - 0.01)
    with pytest.raises(ValueError, match="takes no count of tokens"):
        refused.train()
    trained = trainer(max(lowest) + 0.01)
    trained.train()
    assert json.loads((tmp_path / "stm.json").read_text())["normalization"] == "host"
    assert math.isfinite(history(trained, "loss")[0][0])


def test_a_step_without_label_tokens_masks_nothing(tokenizer, make_model, tmp_path):
    """A share of no tokens is no tokens."""
    rows = label_rows(tokenizer, 4)
    for row in rows[2:]:
        row["labels"] = [-100] * len(row["labels"])
    options = {"stm_threshold": None, "stm_mask_fraction": 0.2, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 2, "max_length": None, "max_steps": 2, "logging_steps": 1}
    trainer = stm_trainer(make_model(), rows, tokenizer, tmp_path, stm_reference="current", **options)
    trainer.train()
    masked = [entry["stm/masked_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    assert masked[0] > 0
    assert masked[1] == 0


def test_the_reference_may_change_to_one_that_is_scored_ahead_and_not_back(tokenizer, make_model, chats, tmp_path):
    options = {"trainer_class": RecordingSTM, "stm_threshold": TAU, "max_steps": 2} | CURRENT
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, **options)
    trainer.train()
    trainer.args.stm_reference = "initial"
    trainer.train()
    assert all("stm_masked_tokens" not in batch for batch in trainer.batches), "masked live again"
    receipt = json.loads((tmp_path / "stm.json").read_text())
    assert receipt["reference"] == "initial"
    masked = sum(row["stm_masked_tokens"] for row in trainer.train_dataset)
    assert 0 < masked == receipt["masked_tokens"] < receipt["label_tokens"]
    trainer.args.stm_reference = "current"
    with pytest.raises(ValueError, match="stm_reference changed to 'current' after the training set was masked"):
        trainer.train()


def test_masked_stop_tokens_are_warned_of_once(tokenizer, make_model, chats, tmp_path, caplog):
    """The tiny model finds the end of a turn as unlikely as anything."""
    options = {"stm_reference": "current", "stm_threshold": 2.5, "max_steps": 3, "logging_steps": 1}
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, **options)
    trainer.train()
    assert trainer._stm_state.receipt["stop_tokens_masked_fraction"] > 0.05
    assert caplog.text.count("the model may not learn to stop") == 1
    caplog.clear()
    options |= {"stm_keep_stop_tokens": True}
    stm_trainer(make_model(), chats, tokenizer, tmp_path / "kept", **options).train()
    assert "the model may not learn to stop" not in caplog.text

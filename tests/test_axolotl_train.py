"""`plugins: stm` in Axolotl, in this process: what is masked, and that all else stays as it was."""

import copy
import json
import math

import numpy as np
import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")

import torch
from axolotl_helpers import (
    IGNORE,
    LORA,
    base_model,
    build,
    load,
    losses,
    make_config,
    one_process,
    oracle,
    receipt,
    train,
    weights,
)

__all__ = ["base_model", "make_config", "one_process"]

THRESHOLD = 400.0
STM = {"plugins": "stm", "stm_threshold": THRESHOLD}


def _labels(trainer):
    return {tuple(row["input_ids"]): np.asarray(row["labels"]) for row in trainer.train_dataset}


def _check_masks(config, make_model, tokenizer):
    """Train with STM; its labels must be a plain run's without what a float64 loop finds above the threshold."""
    plain = build(config | {"plugins": None, "stm_threshold": None})
    trainer = train(config)
    rows = list(plain.train_dataset)
    scores = oracle(copy.deepcopy(plain.model), rows)
    given = np.concatenate(scores)
    assert np.nanmin(abs(given - math.log(THRESHOLD))) > 1e-4
    masked = _labels(trainer)
    assert len(masked) == len(rows)
    for row, nll in zip(rows, scores, strict=True):
        expected = np.where(nll > math.log(THRESHOLD), IGNORE, np.asarray(row["labels"]))
        assert masked[tuple(row["input_ids"])].tolist() == expected.tolist()
    facts = receipt(config["output_dir"])
    assert facts["label_tokens"] == int((~np.isnan(given)).sum())
    assert facts["masked_tokens"] == int((given > math.log(THRESHOLD)).sum())
    assert 0 < facts["masked_tokens"] < facts["label_tokens"]
    return trainer, facts


def _counted(trainer, facts, packed=False):
    """Kept tokens of all batches that reached the model; in a pack, those at a document's start are not counted."""
    kept = 0
    for batch in trainer.batches:
        labels = batch["labels"][:, 1:] != IGNORE
        if packed:
            labels &= batch["position_ids"][:, 1:] != 0
        kept += int(labels.sum())
    return kept


DATASETS = {
    "chat_template": {},
    "roles_to_train": {"roles_to_train": ["user", "assistant"]},
    "train_on_eos": {"train_on_eos": "all"},
}


@pytest.mark.parametrize("kind", DATASETS)
def test_masks_of_chats(kind, make_config, make_model, tokenizer):
    config = make_config(**STM)
    config["datasets"][0] |= DATASETS[kind]
    trainer, facts = _check_masks(config, make_model, tokenizer)
    kept = facts["label_tokens"] - facts["masked_tokens"]
    assert _counted(trainer, facts) == kept
    assert sum(entry.get("stm/kept_tokens", 0) for entry in trainer.state.log_history) == kept


def test_masks_of_spans_chosen_by_train_detail(make_config, make_model, tokenizer, chats, tmp_path):
    rows = []
    for chat in chats:
        question, answer = copy.deepcopy(chat["prompt"] + chat["completion"])
        middle = len(answer["content"]) // 2
        details = [
            {"begin_offset": 0, "end_offset": middle - 1, "train": False},
            {"begin_offset": middle, "end_offset": len(answer["content"]) - 1, "train": True},
        ]
        rows.append({"messages": [question, answer | {"train_detail": details}]})
    path = tmp_path / "spans.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = make_config(**STM)
    config["datasets"][0] |= {"path": str(path), "message_field_training_detail": "train_detail"}
    whole = build(make_config(dataset_prepared_path=str(tmp_path / "whole")))
    _, facts = _check_masks(config, make_model, tokenizer)
    assert facts["label_tokens"] < sum((np.asarray(row["labels"]) != IGNORE).sum() for row in whole.train_dataset)


@pytest.mark.parametrize("kind", ["completion", "alpaca"])
@pytest.mark.parametrize("packing", [False, True])
def test_masks_of_other_formats(kind, packing, make_config, make_model, tokenizer, chats, tmp_path):
    texts = [(chat["prompt"][0]["content"], chat["completion"][0]["content"]) for chat in chats]
    rows = {
        "completion": [{"text": f"{question} {answer}"} for question, answer in texts],
        "alpaca": [{"instruction": question, "input": "", "output": answer} for question, answer in texts],
    }[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = {"path": str(path), "ds_type": "json", "type": kind}
    config = make_config(datasets=[dataset], sample_packing=packing, **STM)
    trainer, facts = _check_masks(config, make_model, tokenizer)
    first_labels = sum(row["labels"][0] != IGNORE for row in trainer.train_dataset)
    assert facts["unscored_label_tokens"] == (first_labels if packing else 0)
    if kind == "completion":
        assert first_labels == len(chats)


@pytest.mark.parametrize(
    "keys",
    [
        LORA,
        LORA | {"peft_use_dora": True},
        LORA | {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"chunked_cross_entropy": True},
        {"group_by_length": True},
        {"pad_to_sequence_len": True},
        {"val_set_size": 0.25, "eval_sample_packing": False},
        {"sample_packing": True, "eval_sample_packing": True, "val_set_size": 0.25},
        {"neftune_noise_alpha": 5},
        {"train_on_inputs": True},
    ],
    ids=lambda keys: "+".join(name for name in keys if name not in LORA or keys == LORA)[:60],
)
def test_masks_beside_other_options(keys, make_config, make_model, tokenizer):
    config = make_config(**STM, **keys)
    trainer, _ = _check_masks(config, make_model, tokenizer)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    if trainer.eval_dataset is not None:
        plain = build(config | {"plugins": None, "stm_threshold": None})
        assert [row["labels"] for row in trainer.eval_dataset] == [row["labels"] for row in plain.eval_dataset]


FUSED = {
    "liger": ("axolotl.integrations.liger.LigerPlugin", "liger_fused_linear_cross_entropy"),
    "cut cross entropy": ("axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin", "cut_cross_entropy"),
}


@pytest.mark.parametrize("kernel", FUSED)
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_fused_losses_get_the_labels_they_ask_for(kernel, packing, make_config):
    """Both kernels train the labels of the batch that are not -100, so that is where the masks must be."""
    plugin, key = FUSED[kernel]
    on_a_gpu = {"bf16": True} if kernel == "cut cross entropy" else {}
    cfg = load(make_config(plugins=[plugin, "stm"], stm_threshold=THRESHOLD, **{key: True}, **on_a_gpu))
    assert cfg.plugins == [plugin, "stm_plugin.STMPlugin"]
    assert cfg[key] is True
    trainer = build(make_config(**STM, sample_packing=packing))
    trainer.train_dataset = trainer.stm_score().masked
    for batch in trainer._stm_train_dataloader():
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].shape == batch["input_ids"].shape
        kept = batch["labels"] != IGNORE
        assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
        assert "shift_labels" not in batch
    kept = sum(int((batch["labels"] != IGNORE).sum()) for batch in trainer._stm_train_dataloader())
    facts = trainer._stm_run.receipt
    assert kept == facts["label_tokens"] - facts["masked_tokens"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of Liger and Cut Cross Entropy need a GPU")
@pytest.mark.parametrize("kernel", FUSED)
def test_training_with_fused_losses(kernel, make_config, tmp_path):
    plugin, key = FUSED[kernel]
    # the mapping of a config that trains on a GPU, in bfloat16
    config = make_config(stm_threshold=THRESHOLD, bf16=True, num_epochs=2)
    plain = train(config | {"plugins": ["stm"], "output_dir": str(tmp_path / "plain")})
    fused = train(config | {"plugins": [plugin, "stm"], key: True, "output_dir": str(tmp_path / "fused")})
    assert receipt(tmp_path / "plain")["mask_digest"] == receipt(tmp_path / "fused")["mask_digest"]
    assert losses(fused) == pytest.approx(losses(plain), rel=0.02)


def test_test_datasets_are_not_masked(make_config, make_model, tokenizer):
    config = make_config(**STM)
    config["test_datasets"] = [config["datasets"][0] | {"split": "train"}]
    trainer, facts = _check_masks(config, make_model, tokenizer)
    assert (
        sum((np.asarray(row["labels"])[1:] != IGNORE).sum() for row in trainer.eval_dataset) == facts["label_tokens"]
    )


def test_packs_that_reach_the_model_hold_the_receipts_tokens(make_config, make_model, tokenizer):
    config = make_config(sample_packing=True, sequence_len=300, micro_batch_size=1, **STM)
    trainer, facts = _check_masks(config, make_model, tokenizer)
    assert facts["unscored_label_tokens"] == 0
    assert any(int((batch["position_ids"] == 0).sum()) > 1 for batch in trainer.batches)
    assert _counted(trainer, facts, packed=True) == facts["label_tokens"] - facts["masked_tokens"]
    logged = [entry for entry in trainer.state.log_history if "stm/kept_tokens" in entry]
    assert sum(entry["stm/kept_tokens"] for entry in logged) == facts["label_tokens"] - facts["masked_tokens"]
    masked = sum(
        entry["stm/kept_tokens"] * entry["stm/masked_fraction"] / (1 - entry["stm/masked_fraction"])
        for entry in logged
    )
    assert round(masked) == facts["masked_tokens"]


# --- All else as it was ---------------------------------------------------------------------------------------------


def _same_training(plain, masked):
    assert losses(plain) == losses(masked)
    ours, theirs = weights(masked), weights(plain)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_an_infinite_threshold_trains_bit_for_bit_as_without(tuning, packing, make_config, tmp_path):
    config = make_config(sample_packing=packing, num_epochs=4, **tuning)
    plain = train(config)
    stm = train(config | {"plugins": "stm", "stm_threshold": math.inf, "output_dir": str(tmp_path / "stm")})
    assert plain.state.global_step >= 8
    _same_training(plain, stm)
    facts = receipt(tmp_path / "stm")
    assert facts["threshold"] == "inf"
    assert facts["masked_tokens"] == 0
    assert facts["normalization"] == "global"
    assert not (tmp_path / "out" / "stm.json").exists()


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_under_accumulation_it_equals_axolotl_with_both_switches(packing, make_config, tmp_path):
    config = make_config(sample_packing=packing, gradient_accumulation_steps=3, num_epochs=4, micro_batch_size=1)
    plain = build(config)
    plain.model_accepts_loss_kwargs = True
    plain.args.average_tokens_across_devices = True
    plain.train()
    stm = train(config | {"plugins": "stm", "stm_threshold": math.inf, "output_dir": str(tmp_path / "stm")})
    _same_training(plain, stm)


def test_the_trainer_class_stays_its_hosts(make_config):
    trainer = build(make_config(**STM))
    assert type(trainer).__name__ == "AxolotlTrainer"
    assert type(trainer).__mro__[2].__module__ == "axolotl.core.trainers.base"
    assert type(trainer.data_collator).__module__.startswith("axolotl.")


def test_a_trainer_class_of_ones_own_is_kept(make_config, tmp_path, monkeypatch):
    (tmp_path / "own_trainer.py").write_text(
        "from axolotl.core.trainers.base import AxolotlTrainer\nclass OwnTrainer(AxolotlTrainer): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trainer = build(make_config(trainer_cls="own_trainer.OwnTrainer", **STM))
    assert type(trainer).__name__ == "OwnTrainer"
    trainer.train()
    assert trainer._stm_run.receipt["masked_tokens"] > 0


def test_a_trainer_with_a_loop_of_its_own_is_refused(make_config, tmp_path, monkeypatch):
    (tmp_path / "looping_trainer.py").write_text(
        "from axolotl.core.trainers.base import AxolotlTrainer\n"
        "class LoopingTrainer(AxolotlTrainer):\n"
        "    def train(self, *args, **kwargs): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"LoopingTrainer trains: its `train` is not that of"):
        build(make_config(trainer_cls="looping_trainer.LoopingTrainer", **STM))


OWN_LOSSES = """
import torch.nn.functional as F
from axolotl.core.trainers.base import AxolotlTrainer

class Mean(AxolotlTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

class Passed(AxolotlTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

class Unmasked(AxolotlTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
"""


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("name", "normalization"), [("Mean", "host"), ("Passed", "global")])
def test_a_loss_of_the_trainers_own_is_averaged_as_it_takes_a_count(
    name, normalization, own_losses, make_config, tmp_path
):
    keys = {
        "trainer_cls": f"own_losses.{name}",
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "micro_batch_size": 1,
    }
    masked = train(make_config(plugins="stm", stm_threshold=math.inf, output_dir=str(tmp_path / "stm"), **keys))
    assert masked._stm_run.receipt["normalization"] == normalization
    switched = {} if normalization == "host" else {"plugins": ["axolotl_plugins.Switches"]}
    plain = train(make_config(output_dir=str(tmp_path / "plain"), **keys, **switched))
    assert losses(masked) == losses(plain)


def test_a_loss_over_other_labels_is_refused(own_losses, make_config):
    with pytest.raises(
        ValueError, match=r"Unmasked trains: its `compute_loss` is not one over the `labels`.*no token has"
    ):
        build(make_config(trainer_cls="own_losses.Unmasked", **STM))


def test_mamba_whose_trainer_takes_token_ids_for_labels_is_refused(make_config, tokenizer, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    MambaForCausalLM(MambaConfig(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="AxolotlMambaTrainer trains: its `compute_loss`"):
        build(make_config(base_model=str(tmp_path / "mamba"), attn_implementation="eager", **STM))


def test_evaluation_is_averaged_as_without(make_config):
    plain, trainer = build(make_config()), build(make_config(**STM))
    seen = []

    def compute_loss(self, *args, **kwargs):
        seen.append((self.args.average_tokens_across_devices, self.model_accepts_loss_kwargs))
        return host_loss(self, *args, **kwargs)

    host_loss, type(trainer).compute_loss = type(trainer).compute_loss, compute_loss
    rows = trainer.train_dataset.select(range(4))
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    assert set(seen) == {(plain.args.average_tokens_across_devices, plain.model_accepts_loss_kwargs)}
    assert (trainer.args.average_tokens_across_devices, trainer.model_accepts_loss_kwargs) == (True, True)


def test_the_router_loss_that_is_summed_is_told_of(make_config, tokenizer, tmp_path, caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.1))
    model.save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    for accumulation, times in ((1, 0), (4, 1)):
        caplog.clear()
        keys = {"base_model": str(tmp_path / "mixtral"), "gradient_accumulation_steps": accumulation}
        build(make_config(**STM, **keys))
        assert caplog.text.count("router_aux_loss_coef: 0.025") == times


def test_simulated_quantization_has_scores_of_its_own(make_config, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    keys = {"qat": {"weight_dtype": "int4", "group_size": 32}}
    quantized = train(make_config(**STM, **keys, max_steps=1, output_dir=str(tmp_path / "qat")))
    plain = train(make_config(**STM, max_steps=1, output_dir=str(tmp_path / "plain")))
    assert quantized._stm_run.key.model != plain._stm_run.key.model
    assert quantized._stm_run.receipt["mask_digest"] != plain._stm_run.receipt["mask_digest"]


def test_the_receipt_of_live_masks_says_at_the_end_what_was_masked(make_config, tmp_path):
    from axolotl.integrations.base import PluginManager

    config = make_config(**STM, stm_reference="current", max_steps=2)
    cfg, trainer = load(config), build(config)
    trainer.train()
    PluginManager.get_instance().post_train(cfg, trainer.model)
    assert receipt(tmp_path / "out")["steps"] == 2
    assert receipt(tmp_path / "out")["label_tokens"] > 0


def test_a_run_that_was_never_masked_ends_with_an_error(make_config):
    from axolotl.integrations.base import PluginManager

    cfg = load(make_config(**STM))
    trainer = build(make_config(**STM))
    with pytest.raises(RuntimeError, match="has trained without Selective Token Masking"):
        PluginManager.get_instance().post_train(cfg, trainer.model)
    trainer = build(make_config(**STM))
    trainer.train()
    PluginManager.get_instance().post_train(cfg, trainer.model)


def test_scoring_ahead_leaves_no_receipt(make_config, tmp_path):
    build(make_config(**STM)).stm_score()
    assert not (tmp_path / "out" / "stm.json").exists()


def test_prepared_data_is_shared_with_plain_runs_and_never_changed(make_config, tmp_path):
    config = make_config()
    build(config)
    prepared = tmp_path / "prepared"
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    assert before
    trainer = train(config | STM)
    assert trainer._stm_run.receipt["masked_tokens"] > 0
    after = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    assert after == before
    again = build(config)
    assert "stm_masked_tokens" not in again.train_dataset.column_names
    assert (
        sum((np.asarray(row["labels"])[1:] != IGNORE).sum() for row in again.train_dataset)
        == (trainer._stm_run.receipt["label_tokens"])
    )


def test_another_threshold_seed_or_adapter_makes_no_second_pass(make_config, monkeypatch):
    import stm_plugin.scoring.engine

    train(make_config(**STM, **LORA))
    monkeypatch.setattr(stm_plugin.scoring.engine, "Scorer", lambda *args, **kwargs: pytest.fail("scored again"))
    train(make_config(**STM | {"stm_threshold": 100.0}, **LORA | {"lora_r": 8}, seed=7, sample_packing=True))


def test_a_resumed_run_has_the_masks_and_losses_of_its_start(make_config, tmp_path):
    config = make_config(**STM, **LORA, save_strategy="steps", save_steps=3, num_epochs=2)
    whole = train(config)
    start = receipt(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert receipt(checkpoint) == start
    resumed = build(config | {"resume_from_checkpoint": str(checkpoint), "output_dir": str(tmp_path / "resumed")})
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert receipt(tmp_path / "resumed")["mask_digest"] == start["mask_digest"]
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_an_adapter_that_is_trained_further_is_part_of_the_reference(make_config, tmp_path):
    first = train(make_config(**LORA, num_epochs=3))
    first.model.save_pretrained(tmp_path / "adapter")
    trainer = train(make_config(**STM, **LORA, lora_model_dir=str(tmp_path / "adapter")))
    rows = [dict(row) for row in trainer._stm_run.source]
    scores = oracle(copy.deepcopy(first.model), rows)
    for row, nll in zip(trainer.train_dataset, scores, strict=True):
        kept = np.asarray(row["labels"])[~np.isnan(nll)] != IGNORE
        assert kept.tolist() == (nll[~np.isnan(nll)] <= math.log(THRESHOLD)).tolist()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stm_threshold": 1.0}, "greater than 1"),
        ({"stm_threshold": "2.5"}, "greater than 1"),
        ({"stm_threshold": 2.5, "stm_mask_fraction": 0.2}, "Remove one of them"),
        ({"stm_mask_fraction": 1.5}, "between 0 and 1"),
        ({"stm_strategy": "middle"}, "must be one of"),
        ({"stm_treshold": 2.5}, "did you mean stm_threshold"),
        ({"use_eaft": True}, "`plugins: stm` cannot be used with `use_eaft: true`"),
        ({"rl": "dpo"}, "`plugins: stm` cannot be used with `rl: dpo`"),
        ({"streaming": True}, "`stm_reference: initial` cannot be used with `streaming: true`"),
        ({"stm_reference": "current", "stm_scores_dir": "scores"}, "has no effect while stm_reference is 'current'"),
        (
            {"stm_reference": "current", "stm_reference_kwargs": {"dtype": "float32"}},
            "has no effect while stm_reference is 'current'",
        ),
        (
            {"stm_reference": "current", "kd_trainer": True},
            "`plugins: stm` cannot be used with `kd_trainer: true`",
        ),
    ],
)
def test_bad_configs_are_refused_before_anything_is_loaded(keys, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(make_config(plugins="stm", **keys))
    assert not (tmp_path / "prepared").exists()


def test_every_option_passes_through_the_schema(make_config, tmp_path):
    given = {
        "stm_mask_fraction": 0.3,
        "stm_strategy": "random",
        "stm_seed": 5,
        "stm_keep_stop_tokens": True,
        "stm_scores_dir": str(tmp_path / "scores"),
        "stm_tokens_per_batch": 512,
    }
    trainer = train(make_config(plugins="stm", **given))
    facts = receipt(tmp_path / "out")
    assert facts["masked_tokens"] <= 0.3 * facts["label_tokens"]
    assert (facts["strategy"], facts["seed"], facts["keep_stop_tokens"]) == ("random", 5, True)
    assert facts["scores_entry"].startswith(str(tmp_path / "scores"))
    assert trainer.args.stm_tokens_per_batch == 512


def test_another_model_as_reference(make_config, make_model, tokenizer, tmp_path):
    make_model(seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    reference = {"stm_reference": str(tmp_path / "other"), "stm_reference_kwargs": {"dtype": "float32"}}
    trainer = train(make_config(**STM, **reference))
    scores = oracle(make_model(seed=5), [dict(row) for row in trainer._stm_run.source])
    facts = receipt(tmp_path / "out")
    assert facts["masked_tokens"] == int(sum((nll > math.log(THRESHOLD)).sum() for nll in scores))


@pytest.mark.parametrize("strategy", ["difference", "hybrid"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_strategies_by_two_models(strategy, packing, make_config, make_model, tokenizer, tmp_path):
    make_model(seed=5).save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    options = {"stm_strategy": strategy, "stm_tuned_model": str(tmp_path / "tuned"), "sample_packing": packing}
    trainer = train(make_config(**STM, **options))
    rows = [dict(row) for row in trainer._stm_run.source]
    masked = 0
    for nll, tuned_nll in zip(oracle(make_model(), rows), oracle(make_model(seed=5), rows), strict=True):
        before, after = np.exp(np.float64(nll)), np.exp(np.float64(tuned_nll))
        if strategy == "difference":
            masked += int((after - before > THRESHOLD).sum())
        else:
            masked += int(((before > THRESHOLD) | (after > before)).sum())
    facts = receipt(tmp_path / "out")
    assert 0 < facts["masked_tokens"] == masked < facts["label_tokens"]
    assert (facts["strategy"], facts["tuned_model"]) == (strategy, str(tmp_path / "tuned"))


@pytest.mark.parametrize(
    "keys",
    [{}, {"sample_packing": True}, {"gradient_accumulation_steps": 2}, LORA],
    ids=["rows", "packed", "accumulated", "lora"],
)
def test_live_perplexity_of_the_first_step_masks_what_the_initial_one_does(keys, make_config, tmp_path):
    options = {"max_steps": 1, "learning_rate": 0.0, "num_epochs": 2} | keys
    initial = train(make_config(**STM, **options))
    live = train(make_config(**STM, **options, stm_reference="current", output_dir=str(tmp_path / "live")))
    assert len(live.batches) == len(initial.batches)
    for one, other in zip(initial.batches, live.batches, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])
    assert losses(live) == losses(initial)
    facts = receipt(tmp_path / "live")
    assert facts["reference"] == "current"
    assert 0 < live._stm_masking.totals.masked_tokens < live._stm_masking.totals.label_tokens
    assert not (tmp_path / "live" / "scores").exists()


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_live_totals_are_those_of_the_metrics(packing, make_config, tmp_path):
    keys = {"sample_packing": True, "sequence_len": 300, "micro_batch_size": 1} if packing else {}
    trainer = train(make_config(**STM, **keys, stm_reference="current"))
    plain = build(make_config(dataset_prepared_path=str(tmp_path / "plain"), **keys))
    trainer.save_model(tmp_path / "saved")
    facts = receipt(tmp_path / "saved")
    assert facts["label_tokens"] == sum(
        int((np.asarray(row["labels"])[1:] != IGNORE).sum()) for row in plain.train_dataset
    )
    kept = facts["label_tokens"] - facts["masked_tokens"]
    assert 0 < _counted(trainer, facts, packing) == kept < facts["label_tokens"]
    assert sum(entry.get("stm/kept_tokens", 0) for entry in trainer.state.log_history) == kept


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_live_perplexity_at_inf_trains_bit_for_bit_as_without(packing, make_config, tmp_path):
    config = make_config(sample_packing=packing, num_epochs=3, **LORA)
    live = {"plugins": "stm", "stm_threshold": math.inf, "stm_reference": "current"}
    _same_training(train(config), train(config | live | {"output_dir": str(tmp_path / "live")}))


def test_a_config_without_the_plugin_is_untouched_by_it(make_config, tmp_path):
    trainer = train(make_config())
    assert type(trainer).__mro__[0].__module__ == "axolotl.core.trainers.base"
    assert not (tmp_path / "out" / "stm.json").exists()


def test_stm_keys_without_the_plugin_are_refused(make_config):
    with pytest.raises(ValueError, match="plugins: stm"):
        build(make_config(stm_threshold=2.5))


def test_scoring_ahead_leaves_the_scores_where_training_finds_them(make_config, tmp_path, monkeypatch):
    from axolotl_helpers import write_config
    from click.testing import CliRunner

    import stm_plugin.scoring.engine
    from stm_plugin.axolotl.score import stm_score

    config = make_config(**STM, **LORA)
    done = CliRunner().invoke(stm_score, [str(write_config(config, tmp_path))], catch_exceptions=False)
    assert done.exit_code == 0
    assert "label tokens in 12 rows; quantiles of their perplexity" in done.output
    assert "so does stm_mask_fraction: 0.22" in done.output
    monkeypatch.setattr(stm_plugin.scoring.engine, "Scorer", lambda *args, **kwargs: pytest.fail("scored again"))
    trainer = train(config)
    assert trainer.state.global_step > 0

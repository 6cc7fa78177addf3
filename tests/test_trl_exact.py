"""Bit for bit `SFTTrainer` where nothing is masked; randomness left alone; exact losses and gradients otherwise."""

import copy
import json
import math
import random
from importlib.metadata import version

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from packaging.version import Version
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel
from trl_helpers import (
    IGNORE,
    CountTokens,
    NoLossArguments,
    RecordingSFT,
    RecordingSTM,
    all_masked_row,
    assert_margin,
    cut,
    documents_of_batches,
    float64_logits,
    history,
    kept_gradient,
    label_rows,
    masked_rows,
    nll_of_row,
    one_thread,  # noqa: F401
    oracle_nll,
    plain_trainer,
    same_bits,
    scores_of,
    stm_trainer,
    threshold_between,
    weights,
)

LOSSES = ["nll"] if Version(version("trl")) >= Version("1.15") else ["chunked_nll", "nll"]
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
METRICS = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens")


def _lora(**options):
    return {"peft_config": LoraConfig(**LORA | options)}


def _pair(tokenizer, make_model, tmp_path, rows, keywords=dict, **options):
    """A plain and an STM trainer of the same set-up, both after `train()`."""
    pair = []
    for make, recording in ((plain_trainer, RecordingSFT), (stm_trainer, RecordingSTM)):
        model = make_model(attention_dropout=0.1)
        torch.manual_seed(0)  # TRL 1.9 draws the adapter before it sets its own seed
        trainer = make(
            model, rows, tokenizer, tmp_path / recording.__name__, keywords(), trainer_class=recording, **options
        )
        trainer.train()
        pair.append(trainer)
    return pair


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {}),
        (
            "full",
            {"packing": True, "max_length": 96, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        ),
        ("full", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("full", {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2}),
        ("full", {"neftune_noise_alpha": 5.0}),
        ("lora", {}),
        ("lora", {"packing": True, "max_length": 96, "per_device_train_batch_size": 2, "dataloader_num_workers": 2}),
        ("lora", {"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
        ("lora", {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "gradient_checkpointing": True}),
        ("lora", {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}),
        ("lora", {"padding_free": True, "max_length": None, "neftune_noise_alpha": 5.0}),
        ("lora", {"bf16": True}),
        ("lora", {"data_seed": 9}),
        ("lora", {"accelerator_config": {"use_seedable_sampler": False}}),
    ],
    ids=str,
)
def test_without_masks_it_is_sft_bit_for_bit(kind, options, tokenizer, make_model, chats, tmp_path):
    rows = chats[:9]
    keywords = _lora if kind == "lora" else dict
    plain, masked = _pair(
        tokenizer, make_model, tmp_path, rows, keywords, max_steps=20, stm_threshold=math.inf, **options
    )
    assert len(history(plain, "loss")) == 20
    assert history(plain, *METRICS) == history(masked, *METRICS)
    assert plain.losses == masked.losses
    assert plain.random_states == masked.random_states
    assert plain.items == masked.items
    assert same_bits(weights(plain.model), weights(masked.model))
    receipt = json.loads((tmp_path / "RecordingSTM" / "stm.json").read_text())
    assert receipt["masked_tokens"] == 0


@pytest.mark.parametrize("threshold", [math.inf, 500.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"dataloader_num_workers": 2},
        {"packing": True, "max_length": 96, "shuffle_dataset": True},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"auto_find_batch_size": True},
        {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_data_order_and_random_states_are_those_of_sft(options, threshold, tokenizer, make_model, chats, tmp_path):
    plain, masked = _pair(
        tokenizer, make_model, tmp_path, chats, _lora, num_train_epochs=2, stm_threshold=threshold, **options
    )
    assert len(plain.batches) == len(masked.batches) > 1
    for one, other in zip(plain.batches, masked.batches, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one if k != "labels" and torch.is_tensor(one[k]))
    assert plain.random_states == masked.random_states


class _Drawing:
    """Left of a trainer: a sampler that draws its order when it is built, as Axolotl's multipack sampler does."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.randperm(len(self.train_dataset)).tolist()


class _DrawingSFT(_Drawing, RecordingSFT):
    pass


class _DrawingSTM(_Drawing, RecordingSTM):
    pass


def test_a_sampler_that_draws_when_it_is_built_draws_the_same(tokenizer, make_model, chats, tmp_path):
    runs = []
    for make, recording in ((plain_trainer, _DrawingSFT), (stm_trainer, _DrawingSTM)):
        trainer = make(
            make_model(), chats, tokenizer, tmp_path, trainer_class=recording, stm_threshold=500.0, num_train_epochs=2
        )
        trainer.train()
        runs.append(([batch["input_ids"].tolist() for batch in trainer.batches], trainer.random_states))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("scores", ["made", "found"])
def test_global_generators_are_left_alone(scores, tokenizer, make_model, chats, tmp_path):
    """Python's, NumPy's and torch's generators are after `train()` what they are after SFTTrainer's."""
    if scores == "found":
        stm_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=500.0, max_steps=1).train()
    states = []
    for make in (plain_trainer, stm_trainer):
        trainer = make(make_model(), chats, tokenizer, tmp_path, stm_threshold=500.0, max_steps=2)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        trainer.train()
        states.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert states[0] == states[1]


def test_scoring_is_in_eval_mode_and_training_flags_come_back(tokenizer, make_model, chats, tmp_path):
    model = make_model(attention_dropout=0.5)
    model.model.layers[0].mlp.eval()  # a flag of one's own, which SFTTrainer's model.train() would set
    trainer = stm_trainer(model, chats, tokenizer, tmp_path, stm_threshold=500.0, max_steps=1)
    flags, seen = [], []
    original = trainer._stm_mask
    trainer._stm_mask = lambda *args: (flags.append(_flags(model)), original(*args), seen.append(_flags(model)))
    with CountTokens(model) as count:
        trainer.train()
    assert flags == seen
    assert False in count.training
    assert count.training[-1] is True


def _flags(model):
    return [module.training for module in model.modules()]


# --- Losses and gradients -------------------------------------------------------------------------------------------


def _with_empty_rows(tokenizer, make_model, count=4):
    """Rows of which the first is masked whole at the threshold returned, and the others in part."""
    rows = label_rows(tokenizer, count)
    double = make_model()
    nats = math.log(threshold_between(oracle_nll(rows, double)))
    rows[0] = all_masked_row(
        rows[0], lambda row: nll_of_row(row, lambda ids: float64_logits(double, ids)), nats + 0.01
    )
    assert_margin(scores_of(oracle_nll(rows, double)), nats)
    masked = masked_rows(rows, oracle_nll(rows, double), nats)
    assert {*masked[0]} == {IGNORE}
    assert all({*row} != {IGNORE} for row in masked[1:])
    return rows, masked, math.exp(nats)


def _assert_same_gradient(found, expected, tolerance=2e-5):
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3, "a gradient of zero would prove nothing"
    for name, gradient in found.items():
        difference = float((gradient.double() - expected[name]).abs().max())
        assert difference < tolerance * scale, (name, difference, scale)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("layout", ["padded", "padding_free", "bfd"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_is_that_of_the_kept_tokens_over_the_whole_step(
    kind, layout, loss_type, tokenizer, make_model, tmp_path
):
    """Accumulation over two micro-batches, one of them without any kept token."""
    rows, masked, threshold = _with_empty_rows(tokenizer, make_model, count=2)
    model = make_model()
    keywords = {}
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, LoraConfig(**LORA | {"lora_dropout": 0.0, "init_lora_weights": False}))
        plain_model = copy.deepcopy(model)  # its scores are other ones: only the gradient is looked at here
        nll = oracle_nll(rows, plain_model)
        threshold = threshold_between(nll, share=0.5)
        rows[0] = all_masked_row(
            rows[0],
            lambda row: nll_of_row(row, lambda ids: float64_logits(plain_model, ids)),
            math.log(threshold) + 0.01,
        )
        nll = oracle_nll(rows, plain_model)
        assert_margin(scores_of(nll), math.log(threshold))
        masked = masked_rows(rows, nll, math.log(threshold))
        assert {*masked[0]} == {IGNORE}
    else:
        plain_model = copy.deepcopy(model)
    layouts = {
        "padded": {"max_length": None},
        "padding_free": {"padding_free": True, "max_length": None},
        "bfd": {"packing": True, "max_length": 16},
    }
    trainer = stm_trainer(
        model,
        rows,
        tokenizer,
        tmp_path,
        keywords,
        trainer_class=RecordingSTM,
        stm_threshold=threshold,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        loss_type=loss_type,
        logging_nan_inf_filter=False,
        **layouts[layout],
    )
    trainer.train()
    documents = documents_of_batches(trainer.batches)
    assert len(trainer.batches) == 2
    starts = {tuple(row["input_ids"]): labels for row, labels in zip(rows, masked, strict=True)}
    for ids, labels in documents:
        assert labels[1:] == starts[tuple(ids)][1:]
    kept = [sum(label != IGNORE for label in labels[1:]) for _, labels in documents]
    assert min(kept) == 0 < max(kept)
    expected, loss = kept_gradient(plain_model, documents)
    assert [float(items) for items in trainer.items] == [sum(kept)] * 2
    assert sum(trainer.losses) == pytest.approx(loss, rel=1e-5)
    assert 0.0 in trainer.losses
    assert history(trainer, "loss")[0][0] == pytest.approx(loss, rel=1e-5)
    assert history(trainer, "stm/kept_tokens") == [(sum(kept),)]
    _assert_same_gradient(trainer.gradients[0], expected)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_does_not_depend_on_the_cut_of_the_step(loss_type, tokenizer, make_model, tmp_path):
    rows, masked, threshold = _with_empty_rows(tokenizer, make_model)
    expected, loss = kept_gradient(
        make_model(), [(row["input_ids"], labels) for row, labels in zip(rows, masked, strict=True)]
    )
    for name, options in {
        "4 x 1": {"per_device_train_batch_size": 4},
        "1 x 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "3 + 1": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        "packed 1 x 2": {
            "packing": True,
            "max_length": 40,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
        },
        "packed 4": {"packing": True, "max_length": 80, "per_device_train_batch_size": 4},
    }.items():
        trainer = stm_trainer(
            make_model(),
            rows,
            tokenizer,
            tmp_path / name,
            trainer_class=RecordingSTM,
            stm_threshold=threshold,
            max_grad_norm=0.0,
            loss_type=loss_type,
            **{"max_length": None} | options,
        )
        trainer.train()
        assert len(trainer.gradients) == 1
        _assert_same_gradient(trainer.gradients[0], expected)
        assert history(trainer, "loss")[0][0] == pytest.approx(loss, rel=1e-5), name


@pytest.mark.parametrize("loss_type", [*LOSSES, "dft"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_with_nothing_kept_is_a_finite_zero(accumulation, loss_type, tokenizer, make_model, tmp_path):
    rows, _, threshold = _with_empty_rows(tokenizer, make_model)
    empty, some = rows[:2]
    trainer = stm_trainer(
        make_model(),
        [some] * accumulation + [empty] * accumulation + [some] * accumulation,
        tokenizer,
        tmp_path,
        trainer_class=RecordingSTM,
        stm_threshold=threshold,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        optim="sgd",
        loss_type=loss_type,
        logging_nan_inf_filter=False,
    )
    before = []
    step = trainer.training_step
    trainer.training_step = lambda *args: (before.append(weights(trainer.model)), step(*args))[1]
    trainer.train()
    losses = history(trainer, "loss")
    assert [loss for (loss,) in losses][1] == 0.0
    assert losses[0][0] > 0
    assert losses[2][0] > 0
    assert all(math.isfinite(value) for value in trainer.losses)
    assert trainer.losses[accumulation : 2 * accumulation] == [0.0] * accumulation
    empty_gradient = trainer.gradients[1]
    assert empty_gradient.keys() == trainer.gradients[0].keys(), (
        "the loss of the empty step was cut off from the graph"
    )
    assert all(not gradient.any() for gradient in empty_gradient.values())
    assert same_bits(before[accumulation], before[2 * accumulation]), "SGD moved weights on nothing"
    assert not same_bits(before[0], before[accumulation])
    assert float(trainer.items[accumulation]) == 1
    assert history(trainer, "stm/kept_tokens", "stm/masked_fraction")[1] == (0, 1.0)


def test_masking_comes_before_the_count(tokenizer, make_model, chats, tmp_path):
    """`num_items_in_batch` is the number of kept tokens of the whole step, not that of its label tokens."""
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        trainer_class=RecordingSTM,
        stm_threshold=1500.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    found = [float(items) for items in trainer.items]
    kept = [int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in trainer.batches]
    steps = [sum(kept[i : i + 2]) for i in range(0, len(kept), 2)]
    assert found == [count for count in steps for _ in range(2)]
    masked = json.loads((tmp_path / "stm.json").read_text())
    assert sum(kept) == masked["label_tokens"] - masked["masked_tokens"] < masked["label_tokens"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_loss_is_that_of_each_document_alone(strategy, tokenizer, make_model, chats, tmp_path):
    """So that what is scored (documents alone) is what is trained, in both stacks."""
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        trainer_class=RecordingSTM,
        stm_threshold=1500.0,
        packing=True,
        packing_strategy=strategy,
        max_length=96,
        max_steps=1,
        max_grad_norm=0.0,
    )
    trainer.train()
    documents = documents_of_batches(trainer.batches)
    rows = {tuple(row["input_ids"][a:b]) for row in trainer.train_dataset for a, b in cut(row)}
    assert all(tuple(ids) in rows for ids, _ in documents)
    expected, loss = kept_gradient(make_model(), documents)
    assert trainer.losses[0] == pytest.approx(loss, rel=1e-5)
    _assert_same_gradient(trainer.gradients[0], expected)


def _gpt2(tokenizer):
    """A model whose class does not say `ForCausalLM`: transformers counts labels at position 0 for it, too."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("kind", ["no loss arguments", "gpt2"])
def test_normalization_says_what_the_gradient_is(kind, loss_type, tokenizer, make_model, tmp_path):
    """Whatever the host's switches are for a model: where the receipt says `global`, the gradient is."""

    def make():
        if kind == "gpt2":
            return _gpt2(tokenizer)
        return NoLossArguments.like(make_model())

    rows, masked, threshold = _with_empty_rows(tokenizer, make)
    assert any(labels[0] != IGNORE for labels in masked), "no row trains its position 0"
    expected, loss = kept_gradient(make(), [(row["input_ids"], new) for row, new in zip(rows, masked, strict=True)])
    try:
        trainer = stm_trainer(
            make(),
            rows,
            tokenizer,
            tmp_path,
            trainer_class=RecordingSTM,
            stm_threshold=threshold,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_grad_norm=0.0,
            loss_type=loss_type,
            logging_nan_inf_filter=False,
        )
        trainer.train()
    except ValueError:
        return
    assert all(math.isfinite(value) for value in trainer.losses), "a micro-batch with nothing kept is no zero"
    assert 0.0 in trainer.losses
    if json.loads((tmp_path / "stm.json").read_text())["normalization"] == "global":
        _assert_same_gradient(trainer.gradients[0], expected)
        assert sum(trainer.losses) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_router_loss_stays_where_nothing_is_kept(loss_type, tokenizer, make_model, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def make():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                initializer_range=0.3,
                pad_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                output_router_logits=True,
                router_aux_loss_coef=0.5,
            )
        )

    def logits(ids):  # in float32, since torch has no grouped matrix product of experts in float64
        with torch.no_grad():
            return make().eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    rows = label_rows(tokenizer, 2)
    nats = math.log(threshold_between(oracle_nll(rows, logits_of=logits)))
    rows[0] = all_masked_row(rows[0], lambda row: nll_of_row(row, logits), nats + 0.01)
    nll = oracle_nll(rows, logits_of=logits)
    assert_margin(scores_of(nll), nats)
    trainer = stm_trainer(
        make(),
        rows,
        tokenizer,
        tmp_path,
        trainer_class=RecordingSTM,
        stm_threshold=math.exp(nats),
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        loss_type=loss_type,
        router_aux_loss_coef=0.5,
        logging_nan_inf_filter=False,
    )
    trainer.train()
    assert [list(labels) for labels in trainer.train_dataset["labels"]] == masked_rows(rows, nll, nats)
    model = make().eval()
    router = [
        0.5 * float(model(input_ids=torch.tensor([row["input_ids"]]), output_router_logits=True).aux_loss)
        for row in rows
    ]
    kept = scores_of(nll[1:])[scores_of(nll[1:]) <= nats].mean()
    assert trainer.losses == pytest.approx([router[0], router[1] + kept], rel=1e-4)
    gates = [name for name, gradient in trainer.gradients[0].items() if gradient.any()]
    assert any("gate" in name for name in gates)
    assert not any("lm_head" in name for name in gates)


def test_average_tokens_across_devices_is_switched_on(tokenizer, make_model, chats, tmp_path, caplog):
    with caplog.at_level("INFO", logger="stm_plugin"):
        trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, average_tokens_across_devices=False)
    assert trainer.args.average_tokens_across_devices is True
    assert caplog.text.count("average_tokens_across_devices") == 1


def test_low_perplexity_of_the_model_is_that_of_training(tokenizer, make_model, chats, tmp_path):
    """The first step's loss per kept token stays below log(threshold): what is kept is what the model finds likely."""
    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path).train_dataset
    threshold = threshold_between(oracle_nll(plain, make_model()), share=0.6)
    trainer = stm_trainer(
        make_model(), chats, tokenizer, tmp_path, per_device_train_batch_size=12, stm_threshold=threshold
    )
    trainer.train()
    assert 0 < history(trainer, "loss")[0][0] < math.log(threshold)

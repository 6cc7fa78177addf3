"""Scores are those of the function that is about to train: adapters, quantization, autocast, dtypes, references."""

import contextlib
import copy
import gc
import json
import math
import weakref
from importlib.metadata import version

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl_helpers import (
    IGNORE,
    CountTokens,
    RecordingSFT,
    RecordingSTM,
    float64_logits,
    history,
    label_rows,
    masked_rows,
    one_thread,  # noqa: F401
    oracle_nll,
    plain_trainer,
    same_bits,
    scores_of,
    stm_trainer,
    threshold_between,
    weights,
)

from stm_plugin import score_dataset

LORA = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def _scores(trainer):
    """The scores a trainer used, one for each label token in the order of its data set."""
    run = trainer._stm_run
    return run.nll.astype(np.float64)


def _plain_rows(tokenizer, make_model, chats, tmp_path):
    return plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", max_length=None).train_dataset


def _check(trainer, model, plain, tolerance=5e-5):
    """A trainer's scores are the float64 ones of a model, and its labels what follows from them."""
    nll = oracle_nll(plain, model)
    assert np.abs(_scores(trainer) - scores_of(nll)).max() < tolerance
    expected = masked_rows(plain, nll, math.log(trainer.args.stm_threshold))
    assert [list(row) for row in trainer.train_dataset["labels"]] == expected
    return nll


def _train(model, rows, tokenizer, folder, trainer=None, **options):
    made = stm_trainer(
        model,
        rows,
        tokenizer,
        folder,
        trainer,
        trainer_class=RecordingSTM,
        **{"max_length": None, "max_steps": 2} | options,
    )
    made.train()
    return made


def _adapter(model, seed=1, **options):
    """A model with an adapter that does something, as one that has been trained."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**LORA | {"init_lora_weights": False} | options))


@pytest.mark.parametrize(
    "lora",
    [
        None,
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_initial_scores_are_those_of_the_start(lora, tokenizer, make_model, chats, tmp_path):
    """Full fine-tuning and every fresh adapter; dropout is on while training and off while scoring."""
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    start = make_model(attention_dropout=0.3)
    threshold = threshold_between(oracle_nll(plain, start))
    keywords = {} if lora is None else {"peft_config": LoraConfig(**LORA | lora)}
    trainer = _train(make_model(attention_dropout=0.3), chats, tokenizer, tmp_path, keywords, stm_threshold=threshold)
    _check(trainer, start, plain, tolerance=2e-4 if lora and "init_lora_weights" in lora else 5e-5)
    assert len(history(trainer, "loss")) == 2


@pytest.mark.parametrize("given", ["object", "path", "saved model"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=str,
)
def test_a_loaded_adapter_counts(options, given, tokenizer, make_model, chats, tmp_path):
    """Further training of an adapter: scores are base plus adapter; the base alone would mask other tokens."""
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    adapted = _adapter(make_model(), **options)
    if "modules_to_save" in options:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
    nll = oracle_nll(plain, adapted)
    threshold = threshold_between(nll)
    of_base = masked_rows(plain, oracle_nll(plain, make_model()), math.log(threshold))
    adapted.__dict__.pop("_oracle")
    adapted.save_pretrained(tmp_path / "adapter")
    if given == "object":
        model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    elif given == "path":
        make_model().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    else:
        model = adapted
    trainer = _train(model, chats, tokenizer, tmp_path / "stm", stm_threshold=threshold)
    _check(trainer, adapted if given != "saved model" else _again(make_model, tmp_path), plain, tolerance=1e-4)
    assert [list(row) for row in trainer.train_dataset["labels"]] != of_base


def _again(make_model, tmp_path):
    return PeftModel.from_pretrained(make_model(), tmp_path / "adapter")


def test_two_adapters_of_which_one_is_active(tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)

    def build():
        model = _adapter(make_model(), seed=1)
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(**LORA | {"init_lora_weights": False}))
        model.set_adapter("other")
        return model

    threshold = threshold_between(oracle_nll(plain, build()))
    trainer = _train(build(), chats, tokenizer, tmp_path, stm_threshold=threshold)
    _check(trainer, build(), plain, tolerance=1e-4)
    first = build()
    first.set_adapter("default")
    assert np.abs(_scores(trainer) - scores_of(oracle_nll(plain, first))).max() > 0.1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_model_given_as_path(kind, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    threshold = threshold_between(oracle_nll(plain, make_model()))
    keywords = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    trainer = _train(str(tmp_path / "model"), chats, tokenizer, tmp_path, keywords, stm_threshold=threshold)
    _check(trainer, make_model(), plain)
    by_object = _train(make_model(), chats, tokenizer, tmp_path / "object", stm_threshold=threshold)
    assert trainer._stm_run.key == by_object._stm_run.key


def test_adapter_of_the_head(tokenizer, make_model, chats, tmp_path):
    if Version(version("trl")) >= Version("1.15"):
        pytest.skip("TRL 1.15 and newer refuse an adapter on lm_head")
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    model = _adapter(make_model(), target_modules=["lm_head", "q_proj"])
    threshold = threshold_between(oracle_nll(plain, model))
    model.__dict__.pop("_oracle")
    start = copy.deepcopy(model)
    trainer = _train(model, chats, tokenizer, tmp_path, stm_threshold=threshold, loss_type="nll")
    _check(trainer, start, plain, tolerance=1e-4)


def test_vision_language_model_on_text(tokenizer, make_model, chats, tmp_path):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    def make():
        torch.manual_seed(0)
        small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
        text = make_model().config
        return LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=319)
        )

    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    threshold = threshold_between(oracle_nll(plain, make()))
    for name, keywords in {"full": {}, "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj"])}}.items():
        trainer = _train(make(), chats, tokenizer, tmp_path / name, keywords, stm_threshold=threshold)
        _check(trainer, make(), plain)


def test_tied_embeddings(tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    threshold = threshold_between(oracle_nll(plain, make_model(tie_word_embeddings=True)))
    trainer = _train(make_model(tie_word_embeddings=True), chats, tokenizer, tmp_path, stm_threshold=threshold)
    _check(trainer, make_model(tie_word_embeddings=True), plain)


def test_neftune_noise_is_off_while_scoring(tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    threshold = threshold_between(oracle_nll(plain, make_model()))
    trainer = _train(make_model(), chats, tokenizer, tmp_path, stm_threshold=threshold, neftune_noise_alpha=50.0)
    _check(trainer, make_model(), plain)
    quiet = _train(make_model(), chats, tokenizer, tmp_path / "quiet", stm_threshold=threshold)
    assert quiet.losses[0] != trainer.losses[0], "NEFTune did nothing: the test says nothing"
    assert quiet._stm_run.key == trainer._stm_run.key


def test_scoring_ahead_leaves_no_noise_behind(tokenizer, make_model, chats, tmp_path):
    runs = []
    for name in ("ahead", "alone"):
        options = {"stm_threshold": 400.0, "neftune_noise_alpha": 5.0, "max_steps": 2}
        trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path / name, trainer_class=RecordingSTM, **options)
        if name == "ahead":
            trainer.stm_score()
            assert not trainer.is_in_train
            assert not trainer.model.get_input_embeddings()._forward_hooks
        trainer.train()
        assert not trainer.model.get_input_embeddings()._forward_hooks
        runs.append(trainer)
    assert runs[0].losses == runs[1].losses
    assert same_bits(weights(runs[0].model), weights(runs[1].model))


def test_the_training_set_is_evaluated_unmasked(tokenizer, make_model, chats, tmp_path, caplog):
    trainer = stm_trainer(make_model(), chats, tokenizer, tmp_path, stm_threshold=400.0, learning_rate=0.0)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer._stm_run.masks.num_masked > 0
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == before
    assert "the loss leaves their masked tokens out" not in caplog.text
    some = trainer.train_dataset.select(range(len(trainer.train_dataset)))
    assert trainer.evaluate(some)["eval_loss"] != before
    trainer.evaluate({"some": some})
    assert caplog.text.count("the loss leaves their masked tokens out") == 2


# --- Losses of one's own --------------------------------------------------------------------------------------------


def _mean_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def _summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_a_loss_function_that_takes_no_count_is_not_called_global(tokenizer, make_model, chats, tmp_path, caplog):
    found = {}
    for function in (_mean_loss, _summed_loss):
        options = {"stm_threshold": 400.0, "max_steps": 1, "loss_type": "nll"}
        trainer = {"compute_loss_func": function}
        run = stm_trainer(make_model(), chats, tokenizer, tmp_path / function.__name__, trainer=trainer, **options)
        run.train()
        found[function.__name__] = run._stm_run.receipt["normalization"]
    assert found == {"_mean_loss": "host", "_summed_loss": "global"}
    assert caplog.text.count("its own averaging stays") == 1
    trainer = {"compute_loss_func": _mean_loss}
    row = {"input_ids": [5, 6], "labels": [IGNORE, 6]}  # of one label, which will be masked
    rows = [*label_rows(tokenizer, 3), row]
    run = stm_trainer(
        make_model(), rows, tokenizer, tmp_path / "all", trainer=trainer, stm_mask_fraction=0.9, loss_type="nll"
    )
    with pytest.raises(ValueError, match="rows keep no token; a micro-batch of them would divide by zero"):
        run.train()


# --- Autocast and dtypes --------------------------------------------------------------------------------------------


def _bf16_oracle(model):
    """Full logits of one document under CPU autocast, in eval mode: what SFTTrainer's own forward makes of it."""
    model.eval()

    def logits(ids):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    return logits


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bf16_autocast_is_that_of_training(kind, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    mixed = scores_of(oracle_nll(plain, logits_of=_bf16_oracle(make_model())))
    exact = scores_of(oracle_nll(plain, make_model()))
    keywords = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    trainer = _train(
        make_model(), chats, tokenizer, tmp_path, keywords, stm_threshold=1500.0, bf16=True, stm_tokens_per_batch=1
    )
    ours = np.abs(_scores(trainer) - mixed)
    without = np.abs(exact - mixed)
    assert without.mean() > 0.005, "autocast moves nothing here: the test says nothing"
    assert ours.mean() < without.mean() / 10
    assert ours.max() < without.max() / 4
    receipt = json.loads((tmp_path / "stm.json").read_text())
    assert receipt["autocast"] == receipt["scores_key"]["autocast"] == "torch.bfloat16"
    assert receipt["dtype"] == ["torch.float32"]
    plain_key = _train(make_model(), chats, tokenizer, tmp_path / "other", stm_threshold=1500.0)._stm_run.key
    assert trainer._stm_run.key != plain_key
    assert trainer._stm_run.key.model == plain_key.model


def test_the_default_of_sft_is_bf16_autocast(tokenizer, make_model, chats, tmp_path):
    """`SFTConfig` turns bf16 on by itself; scores without it would not be those of training."""
    from trl_helpers import settings

    from stm_plugin.trl import STMSFTConfig, STMSFTTrainer

    rows = _plain_rows(tokenizer, make_model, chats, tmp_path)
    options = settings(tmp_path, stm_threshold=1500.0, max_steps=1)
    del options["bf16"]
    trainer = STMSFTTrainer(
        make_model(),
        STMSFTConfig(**options),
        train_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    assert trainer.args.bf16 is True
    assert trainer._stm_run.key.autocast == "torch.bfloat16"


@pytest.mark.parametrize("bf16", [False, True])
def test_model_in_bfloat16(bf16, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    halved = make_model().to(torch.bfloat16).eval()

    def logits(ids):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            found = halved(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        assert found.dtype == torch.bfloat16
        return found.float()

    expected = scores_of(oracle_nll(plain, logits_of=logits))
    exact = scores_of(oracle_nll(plain, make_model()))
    trainer = _train(
        make_model().to(torch.bfloat16),
        chats,
        tokenizer,
        tmp_path,
        stm_threshold=1500.0,
        bf16=bf16,
        stm_tokens_per_batch=1,
    )
    assert np.abs(exact - expected).mean() > 0.005
    assert np.abs(_scores(trainer) - expected).mean() < np.abs(exact - expected).mean() / 10
    receipt = json.loads((tmp_path / "stm.json").read_text())
    assert receipt["dtype"] == ["torch.bfloat16"]
    assert receipt["autocast"] == ("torch.bfloat16" if bf16 else "none")


# --- QLoRA ----------------------------------------------------------------------------------------------------------


def _quantization(compute=torch.float32, double=True):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=double,
    )


@pytest.fixture
def saved_model(tokenizer, make_model, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _packed_bytes(model):
    """Every byte of the 4-bit weights and of what it takes to unpack them, read from the modules themselves."""
    from bitsandbytes.nn import Linear4bit

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            parts = {"weight": module.weight.data, "absmax": state.absmax, "code": state.code}
            if state.nested:
                parts |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
            found |= {f"{name}.{part}": tensor.detach().clone() for part, tensor in parts.items()}
            assert not getattr(state, "packing_format_for_cpu", False), f"{name} was packed for inference"
    assert found
    return found


def _quantized_oracle(saved_model, compute, double):
    """Full logits of the quantized model; its 4-bit layers stay in train mode, lest they are packed anew."""
    from bitsandbytes.nn import Linear4bit

    model = AutoModelForCausalLM.from_pretrained(saved_model, quantization_config=_quantization(compute, double))
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True

    def logits(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    return logits


@pytest.mark.parametrize(
    ("given", "compute", "double"),
    [
        ("quantization_config", torch.float32, True),
        ("model_init_kwargs", torch.float32, True),
        ("object", torch.float32, True),
        ("object", torch.bfloat16, False),
        ("object", torch.bfloat16, True),
    ],
    ids=str,
)
def test_qlora_scores_are_those_of_the_quantized_model(
    given, compute, double, saved_model, tokenizer, make_model, chats, tmp_path
):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    expected = scores_of(oracle_nll(plain, logits_of=_quantized_oracle(saved_model, compute, double)))
    whole = scores_of(oracle_nll(plain, make_model(hidden_size=64, intermediate_size=128)))
    keywords, options, model = {"peft_config": LoraConfig(**LORA)}, {}, saved_model
    if given == "quantization_config":
        keywords["quantization_config"] = _quantization(compute, double)
    elif given == "model_init_kwargs":
        options["model_init_kwargs"] = {"quantization_config": _quantization(compute, double)}
    else:
        model = AutoModelForCausalLM.from_pretrained(
            saved_model, quantization_config=_quantization(compute, double), dtype=torch.float32
        )
    trainer = stm_trainer(
        model,
        chats,
        tokenizer,
        tmp_path / "stm",
        keywords,
        trainer_class=RecordingSTM,
        stm_threshold=1500.0,
        stm_tokens_per_batch=1,
        max_length=None,
        max_steps=5,
        **options,
    )
    before = _packed_bytes(trainer.model)
    trainer.train()
    assert same_bits(before, _packed_bytes(trainer.model)), "training went on with other base weights"
    assert len(trainer.losses) == 5
    ours, of_whole = np.abs(_scores(trainer) - expected), np.abs(whole - expected)
    assert of_whole.mean() > 0.1, "quantization moves nothing here: the test says nothing"
    assert ours.max() < (1e-4 if compute == torch.float32 else of_whole.mean() / 2)
    receipt = json.loads((tmp_path / "stm" / "stm.json").read_text())
    assert "nf4" in receipt["scores_key"]["quantization"]
    assert "bitsandbytes" in receipt["versions"]


@pytest.mark.parametrize("bf16", [False, True])
def test_qlora_without_masks_is_sft_bit_for_bit(bf16, saved_model, tokenizer, chats, tmp_path):
    """Scoring leaves no trace in the base, though bitsandbytes packs 4-bit weights anew in eval mode on CPUs."""
    runs = []
    for make, recording in ((plain_trainer, RecordingSFT), (stm_trainer, RecordingSTM)):
        torch.manual_seed(0)
        keywords = {"peft_config": LoraConfig(**LORA), "quantization_config": _quantization(torch.bfloat16)}
        trainer = make(
            saved_model,
            chats,
            tokenizer,
            tmp_path / recording.__name__,
            keywords,
            trainer_class=recording,
            stm_threshold=math.inf,
            max_steps=5,
            bf16=bf16,
        )
        trainer.train()
        runs.append((trainer.losses, _packed_bytes(trainer.model), trainer.random_states))
    assert runs[0][0] == runs[1][0]
    assert same_bits(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_qlora_second_seed_finds_the_scores(saved_model, tokenizer, chats, tmp_path):
    keys = []
    for seed in (1, 2):
        keywords = {"peft_config": LoraConfig(**LORA), "quantization_config": _quantization()}
        trainer = stm_trainer(
            saved_model, chats, tokenizer, tmp_path / str(seed), keywords, stm_threshold=1500.0, seed=seed, max_steps=1
        )
        with CountTokens(trainer.model) as count:
            trainer.train()
        keys.append((trainer._stm_run.key, False in count.training))
    assert keys[0][0] == keys[1][0]
    assert [scored for _, scored in keys] == [True, False]


def test_qlora_key_knows_how_it_is_quantized(saved_model, tokenizer, chats, tmp_path):
    keys = set()
    for index, config in enumerate(
        [None, _quantization(), _quantization(torch.bfloat16), _quantization(double=False)]
    ):
        keywords = {"peft_config": LoraConfig(**LORA), "quantization_config": config}
        trainer = stm_trainer(
            saved_model, chats, tokenizer, tmp_path / str(index), keywords, stm_threshold=1500.0, max_steps=1
        )
        trainer.train()
        keys.add(trainer._stm_run.key)
    assert len(keys) == 4


# --- Another model as the reference ---------------------------------------------------------------------------------


@pytest.fixture
def reference(tokenizer, make_model, tmp_path):
    make_model(seed=5, hidden_size=64).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    return str(tmp_path / "reference")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_reference_scores_are_the_references(kind, reference, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    other = make_model(seed=5, hidden_size=64)
    threshold = threshold_between(oracle_nll(plain, other))
    keywords = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    trainer = _train(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        keywords,
        stm_threshold=threshold,
        stm_reference=reference,
        bf16=False,
    )
    _check(trainer, other, plain)
    of_start = masked_rows(plain, oracle_nll(plain, make_model()), math.log(threshold))
    assert [list(row) for row in trainer.train_dataset["labels"]] != of_start
    receipt = json.loads((tmp_path / "stm.json").read_text())
    assert receipt["reference"] == reference


@pytest.mark.parametrize("kind", ["lora", "dora", "module saved whole"])
def test_reference_may_be_an_adapter(kind, reference, tokenizer, make_model, chats, tmp_path):
    """Compared with its weights merged into the base: DoRA's magnitudes and saved modules count, too."""
    options = {"dora": {"use_dora": True}, "module saved whole": {"modules_to_save": ["lm_head"]}}.get(kind, {})
    torch.manual_seed(3)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(reference), LoraConfig(**LORA | options))
    for weight in adapter.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    adapter.save_pretrained(tmp_path / "adapter")
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    expected = scores_of(oracle_nll(plain, adapter.merge_and_unload()))
    assert np.abs(expected - scores_of(oracle_nll(plain, make_model()))).max() > 0.1
    name = str(tmp_path / "adapter")
    trainer = _train(make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, stm_reference=name, bf16=False)
    assert np.abs(_scores(trainer) - expected).max() < 5e-5
    assert json.loads((tmp_path / "stm.json").read_text())["reference"] == name
    by_path = score_dataset(name, trainer._stm_run.source, progress=False)
    rows = np.concatenate([nll[~np.isnan(nll)] for nll in by_path])
    assert np.abs(rows - expected).max() < 5e-5


def test_reference_under_bf16_training_keeps_its_own_dtype(reference, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    trainer = _train(
        make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, stm_reference=reference, bf16=True
    )
    expected = scores_of(oracle_nll(plain, make_model(seed=5, hidden_size=64)))
    assert np.abs(_scores(trainer) - expected).max() < 5e-5
    assert json.loads((tmp_path / "stm.json").read_text())["autocast"] == "none"


def test_reference_in_another_dtype_and_the_receipt_says_so(reference, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    trainer = _train(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        stm_threshold=1500.0,
        stm_reference=reference,
        stm_reference_kwargs={"dtype": "bfloat16"},
        stm_tokens_per_batch=1,
    )
    halved = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16).eval()

    def logits(ids):
        with torch.no_grad():
            return halved(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    expected = scores_of(oracle_nll(plain, logits_of=logits))
    exact = scores_of(oracle_nll(plain, make_model(seed=5, hidden_size=64)))
    assert np.abs(_scores(trainer) - expected).mean() < np.abs(exact - expected).mean() / 10
    assert json.loads((tmp_path / "stm.json").read_text())["dtype"] == ["torch.bfloat16"], "the dtype of the scores"


def test_reference_in_four_bits(saved_model, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    expected = scores_of(oracle_nll(plain, logits_of=_quantized_oracle(saved_model, torch.float32, True)))
    trainer = _train(
        make_model(),
        chats,
        tokenizer,
        tmp_path / "stm",
        stm_threshold=1500.0,
        stm_reference=saved_model,
        stm_reference_kwargs={"quantization_config": _quantization()},
        stm_tokens_per_batch=1,
    )
    assert np.abs(_scores(trainer) - expected).max() < 1e-4
    assert "nf4" in trainer._stm_run.key.quantization


def test_config_with_reference_kwargs_is_json(tmp_path):
    """TensorBoard writes the config as JSON when training begins."""
    from trl_helpers import stm_config

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for keywords in ({"dtype": torch.bfloat16}, {"quantization_config": _quantization()}):
        config = stm_config(tmp_path, stm_reference="some/model", stm_reference_kwargs=keywords)
        json.loads(config.to_json_string())
        assert config.stm_reference_kwargs == keywords


def test_reference_is_freed_before_the_first_step(reference, tokenizer, make_model, chats, tmp_path, monkeypatch):
    made = []
    load = AutoModelForCausalLM.from_pretrained

    def loading(*args, **kwargs):
        model = load(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    trainer = stm_trainer(
        make_model(), chats, tokenizer, tmp_path, stm_threshold=1500.0, stm_reference=reference, max_steps=1
    )
    alive, step = [], trainer.training_step

    def training_step(*args):
        gc.collect()
        alive.append([ref() is not None for ref in made])
        return step(*args)

    trainer.training_step = training_step
    trainer.train()
    assert alive == [[False]]


def test_reference_leaves_the_model_in_training_alone(reference, tokenizer, make_model, chats, tmp_path):
    trainer = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path,
        stm_threshold=1500.0,
        stm_reference=reference,
        max_steps=1,
        learning_rate=0.0,
    )
    with CountTokens(trainer.model) as count:
        trainer.train()
    assert count.calls == 1
    assert same_bits(weights(trainer.model), weights(make_model()))


def _with_another_token(tokenizer, token_id):
    """A tokenizer that differs in the meaning of one id."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    token = next(token for token, index in vocabulary.items() if index == token_id)
    vocabulary["surprise"] = vocabulary.pop(token)
    core["model"]["merges"] = [pair for pair in core["model"]["merges"] if token not in (*pair, "".join(pair))]
    return token, PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def test_reference_with_another_tokenizer_is_refused(reference, tokenizer, make_model, chats, tmp_path):
    plain = _plain_rows(tokenizer, make_model, chats, tmp_path)
    used = sorted({token for row in plain["input_ids"] for token in row})
    unused = [token for token in range(3, len(tokenizer)) if token not in used]
    for token_id, allowed in ((used[len(used) // 2], False), (unused[-1], True)):
        token, other = _with_another_token(tokenizer, token_id)
        other.save_pretrained(reference)
        options = {"stm_threshold": 1500.0, "stm_reference": reference, "max_length": None, "max_steps": 1}
        if allowed:
            stm_trainer(make_model(), chats, tokenizer, tmp_path, **options).train()
        else:
            with pytest.raises(ValueError, match=f"id {token_id} is '{token}' here and 'surprise' there") as error:
                stm_trainer(make_model(), chats, tokenizer, tmp_path, **options)
            assert reference in str(error.value)
            assert "'initial'" in str(error.value)


def test_reference_with_a_smaller_vocabulary_is_refused(reference, tokenizer, make_model, chats, tmp_path):
    bigger = copy.deepcopy(tokenizer)
    bigger.add_tokens(["<call>"])
    rows = [{"text": f"add <call> {i}"} for i in range(6)]
    with pytest.raises(ValueError, match=rf"id {len(tokenizer)} is '<call>' here and None there"):
        stm_trainer(
            make_model(vocab_size=len(bigger)), rows, bigger, tmp_path, stm_threshold=1500.0, stm_reference=reference
        )


@pytest.mark.parametrize("broken", ["nowhere", "no weights"])
def test_reference_that_cannot_be_loaded(broken, reference, tokenizer, make_model, chats, tmp_path):
    from pathlib import Path

    name = reference if broken == "no weights" else str(tmp_path / "nowhere")
    for file in Path(reference).glob("*.safetensors"):
        file.unlink()
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r"stm_reference='.*' is neither 'initial' nor a model that can be loaded"):
        stm_trainer(model, chats, tokenizer, tmp_path, stm_threshold=1500.0, stm_reference=name, max_steps=1).train()
    assert same_bits(before, weights(model))


def test_float64_oracle_is_the_models_own_loss(tokenizer, make_model, chats, tmp_path):
    """The oracle itself, against the loss that transformers computes."""
    row = _plain_rows(tokenizer, make_model, chats, tmp_path)[0]
    loss = make_model().double()(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
    assert float(loss) == pytest.approx(
        scores_of(oracle_nll([row], make_model())).mean(), rel=1e-6
    )  # transformers casts logits to float32
    assert float64_logits(make_model(), row["input_ids"]).dtype == torch.float64

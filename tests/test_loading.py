"""Adapters on their bases: what peft and transformers load wrongly without an error is refused or right."""

import json
import shutil

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stm_plugin.loading import Source, base_of, is_adapter, load_causal_lm, tokenizer_source, with_adapter

IDS = torch.arange(3, 20)[None]


def _logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def _save_adapter(folder, base, **options):
    """An adapter with weights drawn at random; its model's logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | options))
    torch.manual_seed(3)
    for weight in tuned.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    tuned.save_pretrained(folder)
    return _logits(tuned)


def _change_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(dict(change(name, weight) for name, weight in load_file(file).items()), file)


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "r": 2}], ids=["lora", "dora", "rs"])
def test_an_adapter_is_what_was_saved(options, base, tmp_path):
    expected = _save_adapter(tmp_path / "adapter", base, **options)
    name = str(tmp_path / "adapter")
    assert (is_adapter(name), is_adapter(base), base_of(name)) == (True, False, Source(base, base_of(name).revision))
    assert torch.equal(_logits(load_causal_lm(name, {"dtype": "auto"})), expected)
    assert not torch.equal(_logits(load_causal_lm(base, {"dtype": "auto"})), expected)
    moved = shutil.move(base, tmp_path / "moved")
    assert torch.equal(_logits(load_causal_lm(name, {}, base=Source(str(moved)))), expected)


def test_virtual_tokens_are_placed(base, tmp_path):
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(_logits(load_causal_lm(str(tmp_path / "adapter"), {})), _logits(tuned))


def test_weights_that_peft_does_not_find_are_an_error(base, tmp_path):
    """Such as those that a compiled model was saved with: peft warns, and the adapter does nothing."""
    _save_adapter(tmp_path / "adapter", base)
    _change_weights(
        tmp_path / "adapter", lambda name, weight: (name.replace(".layers.", "._orig_mod.layers."), weight)
    )
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        nothing = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(_logits(nothing), _logits(AutoModelForCausalLM.from_pretrained(base)))
    with pytest.raises(ValueError, match=r"adapter is an adapter that does not fit its base .*missing adapter keys"):
        load_causal_lm(str(tmp_path / "adapter"), {})


def test_weights_that_have_no_place_are_an_error(base, make_model, tmp_path):
    """Such as those of layers that the base has not."""
    _save_adapter(tmp_path / "adapter", base)
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"does not fit its base '.*short': the model has no place for .*layers.1"):
        load_causal_lm(str(tmp_path / "adapter"), {}, base=Source(str(tmp_path / "short")))


def test_weights_of_another_shape_are_an_error(base, make_model, tmp_path):
    _save_adapter(tmp_path / "adapter", base)
    make_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"does not fit its base '.*wide': .*size mismatch"):
        load_causal_lm(str(tmp_path / "adapter"), {}, base=Source(str(tmp_path / "wide")))


@pytest.mark.parametrize("inner", ["loaded from its folder", "of peft"])
def test_an_adapter_on_an_adapter_is_refused(inner, base, tmp_path):
    """They have the same name, so that the inner one's weights would be lost."""
    _save_adapter(tmp_path / "inner", base)
    _save_adapter(tmp_path / "outer", base, target_modules=["q_proj"])
    load = load_causal_lm if inner == "of peft" else AutoModelForCausalLM.from_pretrained
    model = load(str(tmp_path / "inner"), {}) if inner == "of peft" else load(str(tmp_path / "inner"))
    with pytest.raises(ValueError, match=r"outer is an adapter on a model that is one with an adapter itself. Merge"):
        with_adapter(model, str(tmp_path / "outer"))


def test_a_model_is_not_put_on_another(base, tmp_path):
    with pytest.raises(ValueError, match=r"base is no adapter that could be put on other: it has no adapter_config"):
        load_causal_lm(base, {}, base=Source("other"))


def test_an_adapter_that_names_no_base(base, tmp_path):
    _save_adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=r"adapter_config.json does not say which model it is for"):
        load_causal_lm(str(tmp_path / "adapter"), {})


def test_the_bases_revision_is_the_one_that_the_adapter_names(base, tmp_path, monkeypatch):
    _save_adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "some/model", "revision": "v2"}))
    assert base_of(str(tmp_path / "adapter")) == Source("some/model", "v2")
    asked, model = [], AutoModelForCausalLM.from_pretrained(base)

    def from_pretrained(name, **keywords):
        asked.append((name, keywords))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_causal_lm(str(tmp_path / "adapter"), {"dtype": "auto", "revision": "of the adapter"})
    assert asked == [("some/model", {"dtype": "auto", "revision": "v2"})]


def test_tokens_that_training_added_get_embeddings(base, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer) + 2)
    model.save_pretrained(tmp_path / "bigger")
    expected = _save_adapter(tmp_path / "adapter", tmp_path / "bigger", modules_to_save=["embed_tokens", "lm_head"])
    tuned = load_causal_lm(str(tmp_path / "adapter"), {}, base=Source(base), num_tokens=len(tokenizer) + 2)
    assert torch.allclose(_logits(tuned), expected, atol=1e-5)
    with pytest.raises(ValueError, match="size mismatch"):
        load_causal_lm(str(tmp_path / "adapter"), {}, base=Source(base))


def test_the_tokenizer_is_the_adapters_if_it_brings_one(base, tokenizer, tmp_path):
    _save_adapter(tmp_path / "adapter", base)
    name = str(tmp_path / "adapter")
    assert tokenizer_source(name).name == base
    assert tokenizer_source(name, base=Source("other", "v1")) == Source("other", "v1")
    assert tokenizer_source(base) == Source(base, None)
    tokenizer.save_pretrained(name)
    assert tokenizer_source(name) == Source(name, None)

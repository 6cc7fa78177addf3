"""What function a model computes, as a hash: the same hash only for the same scores."""

import copy
import json
import os
import subprocess
import sys
from itertools import combinations
from operator import attrgetter
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from stm_plugin.scoring.fingerprint import (
    effective_tensors,
    model_fingerprint,
    quantization,
    take_over_dtypes,
    weight_dtypes,
    weights_dtype,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
}
IA3_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
IDS = torch.arange(20)[None] * 4 % 97


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are fastest on one thread, by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings)).eval()


def lora(model, seed=0, **settings):
    """The model with a fresh adapter."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": "all-linear"} | settings)).eval()


class OtherLinear(torch.nn.Linear):
    """With the weights of a linear layer, another function."""

    def forward(self, value):
        return super().forward(value).round()


def with_other_layers(model, **settings):
    """The model with other layers in the place of its first block's output projections."""
    linear = model.model.layers[0].mlp.down_proj
    other = OtherLinear(linear.in_features, linear.out_features, bias=False)
    other.weight = linear.weight
    vars(other).update(settings)
    model.model.layers[0].mlp.down_proj = other
    return model


def test_layers_that_compute_more_than_their_weights_tell():
    """As those of quantization-aware and fp8 training, whose weights and config are the plain model's."""
    found = [
        llama(),
        with_other_layers(llama()),
        with_other_layers(llama(), config="int4", enabled=True),
        with_other_layers(llama(), config="int4", enabled=False),
        with_other_layers(llama(), config="int8", enabled=True),
    ]
    fingerprints = list(map(model_fingerprint, found))
    assert len(set(fingerprints)) == len(found)
    assert model_fingerprint(with_other_layers(llama())) == fingerprints[1]
    assert model_fingerprint(lora(with_other_layers(llama()), target_modules=["down_proj"])) == fingerprints[1]


def stirred(model, part=".lora_B.", scale=0.3):
    """Give the parameters with a part in their name random values, as training would."""
    generator = torch.Generator().manual_seed(7)
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in f".{name}.":
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale)
                changed += 1
    assert changed, f"no parameter with {part} in its name"
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


BASE = model_fingerprint(llama())


def test_it_is_128_bits_and_the_same_again():
    assert len(BASE) == 32
    assert int(BASE, 16) >= 0
    model = llama()
    assert model_fingerprint(model) == model_fingerprint(model) == model_fingerprint(copy.deepcopy(model)) == BASE
    logits(model)
    model.train()
    assert model_fingerprint(model) == BASE
    assert model_fingerprint(llama(seed=1)) != BASE


def test_it_is_the_same_in_another_process():
    """Whatever Python's hash seed, which orders sets (PEFT's `target_modules`)."""
    script = (
        "import torch\n"
        "from peft import IA3Config, get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from stm_plugin.scoring.fingerprint import model_fingerprint\n"
        "torch.manual_seed(0)\n"
        f"model = LlamaForCausalLM(LlamaConfig(**{SIZES!r}))\n"
        "print(model_fingerprint(model))\n"
        f"config = IA3Config(target_modules={IA3_TARGETS!r}, feedforward_modules={IA3_TARGETS[-2:]!r})\n"
        "print(model_fingerprint(get_peft_model(model, config)))\n"
    )
    outputs = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    config = IA3Config(target_modules=IA3_TARGETS, feedforward_modules=IA3_TARGETS[-2:])
    torch.manual_seed(0)
    assert outputs == [BASE, model_fingerprint(get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config))]


# Weights and settings.


def test_every_weight_counts_to_the_last_bit():
    model = llama()
    seen = {BASE}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert len(tensors) > 20
    assert any("inv_freq" in name for name in tensors)
    for index, tensor in enumerate(tensors.values()):
        bits = tensor.data.view(-1).view(torch.int32)
        position = (index * 977) % bits.numel()
        bits[position] ^= 1
        seen.add(model_fingerprint(model))
        bits[position] ^= 1
    assert len(seen) == 1 + len(tensors)
    assert model_fingerprint(model) == BASE


def test_swapped_weights_count():
    """The same bytes under other names, and in another shape."""
    model = llama()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.gate_proj.weight, second.gate_proj.weight = second.gate_proj.weight, first.gate_proj.weight
    assert model_fingerprint(model) != BASE
    model = llama()
    projection = model.model.layers[0].self_attn.k_proj.weight
    projection.data = projection.data.reshape(projection.shape[::-1])
    assert model_fingerprint(model) != BASE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_counts(dtype):
    assert model_fingerprint(llama().to(dtype)) != BASE
    assert (model_fingerprint(llama().to(dtype).float()) == BASE) == (dtype == torch.float64)


def test_the_same_bytes_as_another_dtype_count():
    model = llama().bfloat16()
    fingerprint = model_fingerprint(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(torch.float16)
    assert model_fingerprint(model) != fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"tie_word_embeddings": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_function_count(settings):
    assert model_fingerprint(llama(**settings)) != BASE


def test_settings_that_no_weight_shows_count():
    """The same weights with another scale on the logits, on the attention or on the positions."""
    seen = set()
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16))
    for name, value in [
        ("final_logit_softcapping", 30.0),
        ("final_logit_softcapping", 5.0),
        ("attn_logit_softcapping", 7.0),
        ("sliding_window", 4),
        ("query_pre_attn_scalar", 99),
        ("logit_scale", 0.5),
        ("logits_scaling", 3.0),
    ]:
        setattr(model.config, name, value)
        seen.add(model_fingerprint(model))
    assert len(seen) == 7


def test_an_attention_that_computes_something_else_counts():
    """Where PyTorch's SDPA takes Gemma 2 at all (transformers 5.16 does), it drops the soft cap on attention."""
    outcomes = {}
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=2.0)
        try:
            model = Gemma2ForCausalLM._from_config(config, attn_implementation=implementation).eval()
        except ValueError as error:
            pytest.skip(f"this transformers refuses it: {str(error)[:90]} …")
        outcomes[implementation] = model_fingerprint(model), logits(model)
    (one, ours), (other, theirs) = outcomes.values()
    assert one != other or torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_name_or_path", "/another/folder"),
        ("pad_token_id", 3),
        ("eos_token_id", [1, 2]),
        ("bos_token_id", 9),
        ("use_cache", False),
        ("attention_dropout", 0.4),
        ("architectures", ["Other"]),
        ("transformers_version", "1.2.3"),
        ("torch_dtype", "bfloat16"),
        ("output_hidden_states", True),
        ("initializer_range", 0.9),
    ],
)
def test_settings_that_leave_the_function_alone_do_not_count(name, value):
    model = llama()
    setattr(model.config, name, value)
    assert model_fingerprint(model) == BASE


def test_saved_and_loaded(tmp_path):
    for name in ("one", "two"):
        llama().save_pretrained(tmp_path / name)
        assert model_fingerprint(LlamaForCausalLM.from_pretrained(tmp_path / name)) == BASE


def test_tied_weights():
    tied = llama(tie_word_embeddings=True)
    fingerprint = model_fingerprint(tied)
    assert fingerprint == model_fingerprint(lora(tied))
    untied = copy.deepcopy(tied)
    with torch.no_grad():
        tied.model.embed_tokens.weight[3, 3] += 1
        untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
        untied.lm_head.weight[3, 3] += 1
    assert len({fingerprint, model_fingerprint(tied), model_fingerprint(untied)}) == 3


def test_weights_dtype():
    """Of what the function depends on: a fresh LoRA in float32, PEFT's default, does not make a model mixed."""
    assert weights_dtype(llama()) == "torch.float32"
    half = lora(llama().bfloat16(), modules_to_save=["lm_head"])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16, torch.float32}
    half.base_model.model.lm_head.modules_to_save.bfloat16()
    assert weights_dtype(half) == "torch.bfloat16"
    assert weights_dtype(stirred(half)) == "torch.bfloat16,torch.float32"


# LoRA.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 8, "lora_alpha": 99},
        {"use_rslora": True},
        {"lora_dropout": 0.3},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_a_fresh_lora_is_its_base(settings):
    model = lora(llama(), seed=len(settings) + 1, **settings)
    assert model_fingerprint(model) == BASE
    assert torch.equal(logits(model), logits(llama()))


def test_a_fresh_lora_by_other_ways_is_its_base():
    by_transformers = llama()
    by_transformers.add_adapter(LoraConfig(r=3, target_modules=["q_proj"]))
    assert model_fingerprint(by_transformers) == BASE
    injected = inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), llama())
    assert model_fingerprint(injected) == BASE


def test_a_fresh_lora_on_the_parameters_of_experts_is_its_base():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    base = model_fingerprint(model)
    before = logits(model)
    settings = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    adapted = lora(model, **settings)
    assert torch.equal(logits(adapted), before)
    assert model_fingerprint(adapted) == base
    stirred(adapted)
    assert model_fingerprint(adapted) != base


def test_an_adapter_that_does_something_counts():
    model = stirred(lora(llama()))
    trained = model_fingerprint(model)
    assert trained != BASE
    seen = {BASE, trained}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with torch.no_grad():
                parameter.view(-1)[0] += 1
            seen.add(model_fingerprint(model))
    assert len(seen) == 2 + sum(".lora_" in name for name, _ in model.named_parameters())
    model.base_model.model.model.layers[1].mlp.down_proj.scaling["default"] *= 2
    assert model_fingerprint(model) not in seen


def test_a_bias_of_an_otherwise_fresh_lora_counts():
    model = lora(llama(), lora_bias=True)
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].bias[5] = 1.0
    assert not torch.equal(logits(model), logits(llama()))
    assert model_fingerprint(model) != BASE


def test_one_layer_of_many_counts():
    model = lora(llama())
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.o_proj.lora_B["default"].weight[0, 0] = 0.1
    fingerprint = model_fingerprint(model)
    assert fingerprint != BASE
    with torch.no_grad():  # what an idle pair holds is of no matter
        model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight[0, 0] += 1
    assert model_fingerprint(model) == fingerprint


@pytest.mark.parametrize("alpha", [1, 6, 24])
def test_a_loaded_adapter_is_what_it_was(tmp_path, alpha):
    trained = stirred(lora(llama(), lora_alpha=alpha))
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert model_fingerprint(loaded) == model_fingerprint(trained)
    by_transformers = llama()
    by_transformers.load_adapter(str(tmp_path))
    assert torch.allclose(logits(by_transformers), logits(trained))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == alpha
    config["lora_alpha"] = alpha + 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = PeftModel.from_pretrained(llama(), tmp_path)
    assert len({BASE, model_fingerprint(trained), model_fingerprint(other)}) == 3


def test_fresh_dora_shares_one_fingerprint_over_seeds():
    """It equals its base up to rounding only, so it may differ from the base, but not from itself."""
    fresh = {model_fingerprint(lora(llama(), seed=seed, use_dora=True)) for seed in range(3)}
    assert len(fresh) == 1
    model = lora(llama(), use_dora=True)
    assert torch.allclose(logits(model), logits(llama()), atol=1e-4)
    assert model_fingerprint(stirred(model, "lora_magnitude_vector", scale=0.1)) not in fresh | {BASE}


# Every state of an adapter against what it computes.


def with_second_adapter(model, seed=1):
    torch.manual_seed(seed)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return stirred(model, ".lora_B.second.")


def on(model, *calls):
    for call, *arguments in calls:
        attrgetter(call)(model)(*arguments)
    return model


def ia3(model, part=None):
    torch.manual_seed(0)
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = get_peft_model(model, config).eval()
    return adapted if part is None else stirred(adapted, part)


def loha(model, **settings):
    torch.manual_seed(0)
    config = LoHaConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    return stirred(get_peft_model(model, config).eval(), ".hada_w2_b.")


def adalora(model, **settings):
    torch.manual_seed(0)
    config = AdaLoraConfig(**{"target_modules": ["q_proj"], "total_step": 10, "tinit": 1, "tfinal": 1} | settings)
    return stirred(get_peft_model(model, config).eval(), ".lora_E.")


def with_second_head(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return stirred(model, ".modules_to_save.second.")


STATES = {
    "base": llama,
    "fresh lora": lambda: lora(llama()),
    "lora": lambda: stirred(lora(llama())),
    "lora disabled": lambda: on(stirred(lora(llama())), ("base_model.disable_adapter_layers",)),
    "lora, alpha": lambda: stirred(lora(llama(), lora_alpha=24)),
    "lora merged": lambda: on(stirred(lora(llama())), ("merge_adapter",)),
    "lora merged and unmerged": lambda: on(stirred(lora(llama())), ("merge_adapter",), ("unmerge_adapter",)),
    "lora merged and unloaded": lambda: stirred(lora(llama())).merge_and_unload(),
    "lora unloaded": lambda: stirred(lora(llama())).unload(),
    "two loras, first": lambda: with_second_adapter(stirred(lora(llama()))),
    "two loras, second": lambda: on(with_second_adapter(stirred(lora(llama()))), ("set_adapter", "second")),
    "two loras, both": lambda: on(
        with_second_adapter(stirred(lora(llama()))), ("base_model.set_adapter", ["default", "second"])
    ),
    "two loras, none": lambda: on(with_second_adapter(stirred(lora(llama()))), ("base_model.disable_adapter_layers",)),
    "fresh dora": lambda: lora(llama(), use_dora=True),
    "dora": lambda: stirred(lora(llama(), use_dora=True)),
    "dora disabled": lambda: on(stirred(lora(llama(), use_dora=True)), ("base_model.disable_adapter_layers",)),
    "dora merged": lambda: on(stirred(lora(llama(), use_dora=True)), ("merge_adapter",)),
    "head saved": lambda: lora(llama(), modules_to_save=["lm_head"]),
    "head changed": lambda: stirred(lora(llama(), modules_to_save=["lm_head"]), ".modules_to_save."),
    "head changed, disabled": lambda: on(
        stirred(lora(llama(), modules_to_save=["lm_head"]), ".modules_to_save."),
        ("base_model.disable_adapter_layers",),
    ),
    "norm saved": lambda: lora(llama(), modules_to_save=["input_layernorm"]),
    "norm changed": lambda: stirred(lora(llama(), modules_to_save=["input_layernorm"]), ".modules_to_save."),
    "tokens fresh": lambda: lora(llama(), trainable_token_indices=[4, 8, 12]),
    "tokens changed": lambda: stirred(lora(llama(), trainable_token_indices=[4, 8, 12]), "trainable_tokens_delta"),
    "tokens changed, disabled": lambda: on(
        stirred(lora(llama(), trainable_token_indices=[4, 8, 12]), "trainable_tokens_delta"),
        ("base_model.disable_adapter_layers",),
    ),
    "embedding lora": lambda: stirred(lora(llama(), target_modules=["embed_tokens"]), ".lora_embedding_A."),
    "embedding lora, changed": lambda: stirred(
        stirred(lora(llama(), target_modules=["embed_tokens"]), ".lora_embedding_A."), ".lora_embedding_B."
    ),
    "ia3 fresh": lambda: ia3(llama()),
    "ia3": lambda: ia3(llama(), "ia3_l"),
    "ia3 disabled": lambda: on(ia3(llama(), "ia3_l"), ("base_model.disable_adapter_layers",)),
    "ia3 merged": lambda: on(ia3(llama(), "ia3_l"), ("merge_adapter",)),
    "loha": lambda: loha(llama()),
    "loha, alpha": lambda: loha(llama(), alpha=32),
    "loha, not active": lambda: on(
        loha(llama()), ("add_adapter", "second", LoHaConfig(r=2, target_modules=["k_proj"])), ("set_adapter", "second")
    ),
    "loha disabled": lambda: on(loha(llama()), ("base_model.disable_adapter_layers",)),
    "adalora": lambda: adalora(llama()),
    "adalora, alpha": lambda: adalora(llama(), lora_alpha=32),
    "adalora disabled": lambda: on(adalora(llama()), ("base_model.disable_adapter_layers",)),
    "two heads, first": lambda: with_second_head(lora(llama(), modules_to_save=["lm_head"])),
    "two heads, second": lambda: on(
        with_second_head(lora(llama(), modules_to_save=["lm_head"])), ("set_adapter", "second")
    ),
}


@pytest.fixture(scope="module")
def states():
    """Fingerprint and logits of every state."""
    outcomes = {}
    for name, make in STATES.items():
        model = make()
        outcomes[name] = model_fingerprint(model), logits(model)
    return outcomes


def test_no_two_functions_share_a_fingerprint(states):
    """The rule that keeps stale scores out: equal hashes, equal logits."""
    wrong = [
        f"{one} / {other}"
        for one, other in combinations(states, 2)
        if states[one][0] == states[other][0] and not torch.allclose(states[one][1], states[other][1], atol=1e-4)
    ]
    assert wrong == []


def test_states_whose_entry_is_the_base_model_s(states):
    same = {name for name, (fingerprint, _) in states.items() if fingerprint == BASE}
    assert same >= {
        "base",
        "fresh lora",
        "lora disabled",
        "lora unloaded",
        "two loras, none",
        "dora disabled",
        "head saved",
        "head changed, disabled",
        "norm saved",
    }
    assert states["two loras, first"][0] == states["lora"][0]
    assert states["lora merged"][0] == states["lora merged and unloaded"][0]


def test_the_logits_of_the_states_do_differ(states):
    """The test above would be blind if a stirred adapter did nothing."""
    for name in ("lora", "lora, alpha", "two loras, both", "dora", "head changed", "norm changed", "tokens changed"):
        assert (states[name][1] - states["base"][1]).abs().max() > 0.01, name
    for name in ("embedding lora, changed", "ia3", "loha", "adalora", "two heads, second"):
        assert (states[name][1] - states["base"][1]).abs().max() > 0.01, name
    for name in ("lora", "loha", "adalora"):
        assert (states[f"{name}, alpha"][1] - states[name][1]).abs().max() > 0.01, name


def test_effective_tensors_are_named_as_without_adapters():
    """Each once: of a module saved with an adapter, the copy in use and not the original as well."""
    plain = [name for name, _ in effective_tensors(llama())]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"} <= set(plain)
    assert any("inv_freq" in name for name in plain)
    adapted = lora(llama(), modules_to_save=["lm_head"])
    assert sorted(name for name, _ in effective_tensors(adapted)) == sorted(plain)
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("trained_adapter", ["none", "fresh", "trained"])
def test_dtypes_that_are_taken_over(trained_adapter, is_tied):
    """Those of the base alone, whatever adapters are on it or on the other model, trained or fresh."""
    settings = {"modules_to_save": ["lm_head"]} if not is_tied else {}
    trained = llama(tie_word_embeddings=is_tied).bfloat16()
    if trained_adapter != "none":
        trained = lora(trained, init_lora_weights=trained_adapter == "fresh", **settings).bfloat16()
    trained.get_submodule("model" if trained_adapter == "none" else "base_model.model.model").norm.float()
    tuned = lora(llama(seed=1, tie_word_embeddings=is_tied), init_lora_weights=False, **settings)
    take_over_dtypes(tuned, weight_dtypes(trained))
    found = {name: weight.dtype for name, weight in tuned.named_parameters()}
    expected = {
        name: torch.float32 if "lora_" in name or name.endswith("model.norm.weight") else torch.bfloat16
        for name in found
    }
    assert found == expected
    assert (tuned.get_input_embeddings().weight is tuned.get_output_embeddings().weight) == is_tied


def test_hashing_leaves_the_model_as_it_was():
    model = stirred(lora(llama(), modules_to_save=["lm_head"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    model_fingerprint(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in model.modules()] == flags


# Quantized weights.


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Load one tiny Llama with bitsandbytes' 4-bit weights in some variant."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra 'qlora', is not installed")
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)

    def load(**settings):
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | settings
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")

    return load


def test_quantization_counts(quantized):
    model = quantized()
    assert quantization(llama()) == "none"
    assert json.loads(quantization(model))["bnb_4bit_quant_type"] == "nf4"
    assert model_fingerprint(model) == model_fingerprint(quantized()) == model_fingerprint(lora(model)) != BASE
    assert quantization(lora(model)) == quantization(model)
    variants = [
        quantized(),
        quantized(bnb_4bit_quant_type="fp4"),
        quantized(bnb_4bit_use_double_quant=True),
        quantized(bnb_4bit_compute_dtype=torch.float32),
    ]
    assert weights_dtype(model) == "torch.float32"  # of what is not packed
    assert len({quantization(variant) for variant in variants}) == 4
    assert len({model_fingerprint(variant) for variant in variants}) == 4


def test_every_part_of_a_packed_weight_counts(quantized):
    model = quantized()
    seen = {model_fingerprint(model)}
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data.view(-1)[17] ^= 1
    seen.add(model_fingerprint(model))
    layer.weight.quant_state.absmax.view(-1).view(torch.int32)[3] ^= 1
    seen.add(model_fingerprint(model))
    assert len(seen) == 3

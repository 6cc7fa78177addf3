"""Scores against a model's own logits in float64: one document at a time, nothing padded, sliced or cached."""

import copy
import functools
import random

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
import torch.nn.functional as F
import transformers

from stm_plugin.scoring import nll as scoring
from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.nll import causal_lm, eval_mode, score, score_dataset, token_nll
from stm_plugin.scoring.plan import ScorePlan

VOCAB_SIZE = 251

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 12},
    "Gemma2": {"head_dim": 12, "sliding_window": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 12, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "Olmo2": {},
    "Granite": {"logits_scaling": 5.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25, "use_qk_norm": False},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "Qwen3Moe": {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "FalconH1": {
        "head_dim": 12,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.3,
        "ssm_multipliers": [0.5, 0.5, 0.5, 0.5, 0.5],
    },
    "GPT2": {"n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are fastest on one thread, by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(family="Llama", seed=0, **settings):
    """A tiny random model whose every weight matters, norms and biases too."""
    name = family.partition(",")[0]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    model_class = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES | FAMILIES[family] | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
    return model


@pytest.fixture(scope="module")
def llama():
    """For tests that leave it as it is."""
    return make_model()


LENGTHS = [1, 2, 3, 5, 8, 13, 21, 37, 37, 11, 2, 29]


def make_rows(lengths=LENGTHS, seed=0, share=0.7):
    """Ids, and labels of which a share is on; position 0 is labelled in most documents."""
    rng = np.random.default_rng(seed)
    input_ids = [rng.integers(0, VOCAB_SIZE, length).tolist() for length in lengths]
    labels = [[token if rng.random() < share else -100 for token in row] for row in input_ids]
    return input_ids, labels


def joined(rows):
    return [value for row in rows for value in row]


def make_documents(packed=False, **settings):
    input_ids, labels = make_rows(**settings)
    if not packed:
        return Documents.from_rows(input_ids, labels)
    return Documents.from_rows(
        [joined(input_ids), input_ids[3]], [joined(labels), labels[3]], [[len(row) for row in input_ids], [5]]
    )


def naive_nll(model, documents):
    """`-log p(label_t | ids before t)` of all label tokens in order: one document, full logits, plain log-softmax."""
    nll = []
    offsets = documents.document_offsets.tolist()
    for document in range(len(documents)):
        ids = documents.input_ids[offsets[document] : offsets[document + 1]].tolist()
        labels = documents.labels[offsets[document] : offsets[document + 1]].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = logits.log_softmax(-1)
        nll += [-log_probs[t - 1, label].item() for t, label in enumerate(labels) if t > 0 and label != -100]
    return np.array(nll)


def in_float64(model):
    """The same function in float64."""
    model = copy.deepcopy(model).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default kernel takes no float64
    return model


def our_nll(model, documents, tokens_per_batch=64, **keywords):
    plan = ScorePlan.of(documents)
    scores = score(model, plan, tokens_per_batch=tokens_per_batch, progress=False, **keywords)
    assert scores.dtype == np.float32
    assert scores.shape == (plan.num_scores,)
    return plan.spread(scores)


def check_within_budget(ours, naive, truth, slack):
    """No further from the truth than twice the naive loop in the same dtype, and a little."""
    assert np.isfinite(truth).all()
    assert truth.std() > 0.3, "scores that are nearly uniform would hide a shift"
    budget = 2 * np.abs(naive - truth).max() + slack
    assert np.abs(ours - truth).max() <= budget
    assert budget < 0.1 * truth.std(), "a budget that admits anything"


# Exactness.


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_model_s_own(family):
    model = make_model(family)
    documents = make_documents()
    truth, naive = naive_nll(in_float64(model), documents), naive_nll(model, documents)
    for tokens_per_batch in (1, 75, 4096):
        check_within_budget(our_nll(model, documents, tokens_per_batch), naive, truth, slack=2e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Cohere"])
def test_scores_in_bfloat16(family):
    """Logits in the head's own bfloat16, then float32: as near the truth, on average too, as the naive loop."""
    model = make_model(family, initializer_range=0.1).bfloat16()
    documents = make_documents()
    truth, naive = naive_nll(in_float64(model), documents), naive_nll(model, documents)
    for tokens_per_batch in (40, 4096):
        ours = our_nll(model, documents, tokens_per_batch)
        assert np.abs(ours - truth).max() <= 2 * np.abs(naive - truth).max() + 1e-2
        assert np.abs(ours - truth).mean() <= 1.5 * np.abs(naive - truth).mean() + 1e-3
    assert np.abs(naive - truth).mean() < 0.1 * truth.std()


def test_one_document_alone_is_bit_equal_to_the_naive_loop_in_bfloat16():
    """No more or less rounding than the model's own: the logits are cast to float32, not computed in it."""
    model = make_model("Gemma2").bfloat16()
    documents = make_documents(lengths=[23], share=1.0)
    assert np.allclose(our_nll(model, documents), naive_nll(model, documents), atol=1e-5, rtol=0)


def test_scores_under_autocast(llama):
    documents = make_documents()

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    with autocast():
        naive = naive_nll(llama, documents)
    truth = naive_nll(in_float64(llama), documents)
    ours = our_nll(llama, documents, autocast=autocast)
    assert np.abs(ours - truth).mean() <= 1.5 * np.abs(naive - truth).mean() + 1e-3
    assert np.abs(ours - truth).max() > 1e-3, "autocast did nothing"
    assert np.allclose(our_nll(llama, documents), truth, atol=1e-4)
    alone = make_documents(lengths=[31])
    with autocast():
        naive = naive_nll(llama, alone)
    assert np.allclose(our_nll(llama, alone, autocast=autocast), naive, atol=1e-4)


def test_the_settings_of_each_head_matter():
    """Else a head without its scaling or soft cap would pass for the model's own."""
    documents = make_documents(lengths=[21])
    for family, name, off in [
        ("Gemma2", "final_logit_softcapping", None),
        ("Gemma3", "final_logit_softcapping", None),
        ("Granite", "logits_scaling", 1.0),
        ("Cohere", "logit_scale", 1.0),
        ("FalconH1", "lm_head_multiplier", 1.0),
    ]:
        with_it = our_nll(make_model(family), documents)
        assert np.abs(with_it - our_nll(make_model(family, **{name: off}), documents)).mean() > 0.1, family


def test_any_budget_gives_the_same_scores(llama):
    documents = make_documents(lengths=[*LENGTHS, 36, 36, 35, 4, 4, 4], seed=2)
    truth = naive_nll(in_float64(llama), documents)
    for tokens_per_batch in (1, 36, 37, 72, 73, 100, 1000, 10**9):
        assert np.abs(our_nll(llama, documents, tokens_per_batch) - truth).max() < 1e-4


def test_labels_other_than_the_ids(llama):
    documents = Documents.from_rows([[5, 6, 7, 8]], [[-100, 200, -100, 100]])
    with torch.no_grad():
        log_probs = llama(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    assert np.allclose(our_nll(llama, documents), [-log_probs[0, 200], -log_probs[2, 100]], atol=1e-5)


# Traps.


def test_a_shift_by_one_would_show(llama):
    """Neighbouring scores differ, so that the exactness tests above would fail for a score of another position."""
    documents = make_documents(share=1.0)
    truth = naive_nll(in_float64(llama), documents)
    assert np.median(np.abs(np.diff(truth))) > 0.5


def test_packed_documents_see_nothing_of_each_other(llama):
    packed, single = make_documents(packed=True), make_documents()
    ours = our_nll(llama, packed)
    alone = our_nll(llama, single)
    assert np.allclose(ours[: len(alone)], alone, atol=1e-5)
    assert np.allclose(ours[: len(alone)], naive_nll(in_float64(llama), single), atol=1e-4)
    assert np.allclose(ours[len(alone) :], naive_nll(in_float64(llama), packed)[len(alone) :], atol=1e-4)
    input_ids, labels = make_rows()
    wrapped = Documents.from_rows([joined(input_ids)], [joined(labels)])
    leaking = our_nll(llama, wrapped, 4096)
    assert np.abs(leaking - naive_nll(in_float64(llama), wrapped)).max() < 1e-4
    assert leaking.shape != alone.shape or np.abs(leaking - alone).max() > 0.5, "the boundary does not matter"


def test_padding_changes_nothing(llama):
    """A short document beside a long one, whatever token pads it: token 0 is an ordinary one here."""
    short, long = make_documents(lengths=[4], seed=1, share=1.0), make_documents(lengths=[33], seed=2, share=1.0)
    both = Documents.of(
        np.concatenate([short.input_ids, long.input_ids]),
        np.concatenate([short.labels, long.labels]),
        np.array([0, 4, 37]),
        np.array([0, 4, 37]),
    )
    assert np.allclose(
        our_nll(llama, both, 4096), np.concatenate([our_nll(llama, short), our_nll(llama, long)]), atol=1e-5
    )


def test_dropout_is_off_while_scoring():
    documents = make_documents()
    gpt2 = make_model("GPT2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    for model in (make_model(attention_dropout=0.5), gpt2):
        truth = naive_nll(in_float64(model), documents)
        model.train()
        with torch.no_grad():
            ids = torch.tensor([make_rows()[0][7]])
            assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits), "no dropout to turn off"
        for _ in range(2):
            assert np.abs(our_nll(model, documents) - truth).max() < 1e-4
        assert model.training


def test_noise_on_embeddings_is_off_while_scoring():
    """NEFTune is a forward hook that looks at the training flag of the embedding."""
    model = make_model()
    documents = make_documents()
    truth = naive_nll(model, documents)

    def add_noise(module, args, output):
        return output + torch.ones_like(output) if module.training else output

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    model.train()
    assert np.abs(our_nll(model, documents) - truth).max() < 1e-4
    hook.remove()


def test_gradient_checkpointing_is_no_matter():
    model = make_model()
    documents = make_documents()
    truth = naive_nll(model, documents)
    model.gradient_checkpointing_enable()
    model.train()
    assert np.abs(our_nll(model, documents) - truth).max() < 1e-4


def with_lora(model, **settings):
    """The model with an adapter that does something."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "lora_magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapted


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=lambda settings: next(iter(settings)) + str(next(iter(settings.values()))),
)
def test_an_adapter_is_scored_as_it_stands(settings, llama):
    model = with_lora(make_model(), **settings).train()
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.7)
    input_ids, labels = make_rows()
    documents = Documents.from_rows(input_ids, labels)
    truth = naive_nll(in_float64(model), documents)
    assert np.abs(truth - naive_nll(llama, documents)).mean() > 0.1, "the adapter does nothing"
    assert np.abs(our_nll(model, documents) - truth).max() < 2e-4
    with model.disable_adapter():
        assert np.abs(our_nll(model, documents) - naive_nll(llama, documents)).max() < 2e-4


def test_an_adapter_loaded_by_transformers_is_scored_as_it_stands(tmp_path, llama):
    model = with_lora(make_model())
    documents = make_documents()
    model.save_pretrained(tmp_path)
    loaded = make_model()
    loaded.load_adapter(str(tmp_path))
    assert np.abs(our_nll(loaded, documents) - naive_nll(in_float64(model), documents)).max() < 2e-4


def test_a_mixed_adapter_is_scored_or_refused():
    """PEFT's class for adapters of several kinds: the right scores, or an error that says what is wrong."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config, mixed=True)
    documents = make_documents(lengths=[17, 8])
    try:
        ours = our_nll(model, documents)
    except ValueError as error:
        assert "PeftMixedModel" in str(error)  # noqa: PT017
    else:
        assert np.allclose(ours, naive_nll(model, documents), atol=1e-4)


def test_an_activated_lora_is_refused():
    """Where it starts to act depends on the row, which PEFT's own wrapper works out."""
    model = with_lora(make_model(), alora_invocation_tokens=[7, 9])
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        our_nll(model, make_documents())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_refused(kind):
    """Their positions shift, and the model without them is another function: no score is better than a wrong one."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    model = peft.get_peft_model(make_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="virtual tokens"):
        our_nll(model, make_documents())


def test_a_model_without_a_backbone_is_refused():
    class Alone(transformers.LlamaForCausalLM):
        base_model_prefix = "no_such_part"

    model = Alone(make_model().config)
    with pytest.raises(
        ValueError, match=r"^STM cannot score Alone: it has no backbone apart from its language-model h"
    ):
        our_nll(model, make_documents())


def test_a_forward_that_goes_past_the_backbone_is_scored_or_refused():
    """OPT's runs `model.decoder`, not `model`: with `model` standing aside, its head would see other hidden states."""
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "init_std": 0.3}
    torch.manual_seed(0)
    config = transformers.OPTConfig(**settings, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    model = transformers.OPTForCausalLM(config).eval()
    documents = make_documents()
    try:
        ours = our_nll(model, documents)
    except ValueError as error:
        assert str(error).startswith("STM cannot score OPTForCausalLM")  # noqa: PT017
    else:
        assert np.allclose(ours, naive_nll(model, documents), atol=1e-4)


def test_a_config_that_asks_for_tuples(llama):
    model = make_model()
    model.config.return_dict = False
    documents = make_documents(lengths=[9, 4])
    assert np.allclose(our_nll(model, documents), our_nll(llama, documents), atol=1e-5)


# Memory.


@pytest.fixture
def head_rows():
    """Count the rows that reach a model's head, call by call."""
    hooks = []

    def watch(model):
        rows = []

        def count(module, args):
            rows.append(args[0].flatten(0, -2).shape[0])

        hooks.append(causal_lm(model).get_output_embeddings().register_forward_pre_hook(count))
        return rows

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("rows_per_slice", [1, 7, 8, 10_000])
def test_logits_are_sliced_and_never_made_for_other_positions(monkeypatch, llama, head_rows, rows_per_slice):
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", rows_per_slice * VOCAB_SIZE + VOCAB_SIZE - 1)
    monkeypatch.setattr(scoring, "LABELS_PER_SLICE_ON_CPU", 1)
    monkeypatch.setattr(scoring, "LOGITS_PER_SOFTMAX", 3 * VOCAB_SIZE)
    documents = make_documents(share=0.4)
    truth = naive_nll(in_float64(llama), documents)
    rows = head_rows(llama)
    ours = our_nll(llama, documents, 4096)
    assert sum(rows) == documents.num_label_tokens
    assert max(rows) <= rows_per_slice
    assert np.abs(ours - truth).max() < 1e-4


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_autocast_copies_the_head_once_a_batch(monkeypatch, llama, head_rows, trained):
    """Not once a slice, as it does of its own with a frozen weight; and the weight stays as it was."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr():
                copies.append(kwargs["dtype"])
            return function(*args, **(kwargs or {}))

    copies = []
    model = copy.deepcopy(llama).requires_grad_(trained)
    weight = model.get_output_embeddings().weight
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", 3 * VOCAB_SIZE)
    monkeypatch.setattr(scoring, "LABELS_PER_SLICE_ON_CPU", 1)
    documents = make_documents(share=0.4)
    rows = head_rows(model)
    with Copies():
        our_nll(model, documents, 24, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    num_batches = len(ScorePlan.of(documents).batches(24))
    assert copies == [torch.bfloat16] * num_batches
    assert len(rows) > num_batches > 1
    assert weight.requires_grad == trained


@pytest.mark.parametrize(("labels", "largest"), [(1, 2), (4, 4), (5, 5), (6, 6), (7, 6), (192, 6)])
def test_a_cpu_takes_more_labels_at_a_time_of_a_large_vocabulary(monkeypatch, llama, head_rows, labels, largest):
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", 2 * VOCAB_SIZE)
    monkeypatch.setattr(scoring, "LABELS_PER_SLICE_ON_CPU", labels)
    rows = head_rows(llama)
    our_nll(llama, make_documents(lengths=[40], share=1.0), 4096)
    assert max(rows) == largest


def test_a_vocabulary_beyond_the_budget_still_goes_row_by_row(monkeypatch, llama, head_rows):
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", VOCAB_SIZE // 3)
    rows = head_rows(llama)
    documents = make_documents(lengths=[5], share=1.0)
    our_nll(llama, documents)
    assert rows == [1, 1, 1, 1]


def test_the_default_budget():
    """64 MiB of float32, and on a CPU 192, as the documentation says."""
    assert scoring.LOGITS_PER_SLICE * 4 == 64 * 2**20


def test_only_documents_with_labels_reach_the_model(llama):
    """Nor does what follows the last label token."""
    seen = []
    hook = llama.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    documents = Documents.from_rows(
        [[1, 2, 3, 4, 5, 6], [7] * 30, [8], [9, 9]], [[-100, -100, 3, -100, -100, -100], [-100] * 30, [8], [9, -100]]
    )
    our_nll(llama, documents)
    hook.remove()
    assert seen == [(1, 2, 48)]


def test_token_nll_is_its_naive_equivalent(llama):
    torch.manual_seed(3)
    hidden_states, labels = torch.randn(9, 48), torch.randint(0, VOCAB_SIZE, (9,))
    with torch.no_grad():
        found = token_nll(llama, hidden_states, labels)
        expected = -llama.lm_head(hidden_states).double().log_softmax(-1)[range(9), labels]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nll_in_parts_of_every_length_is_torchs(dtype, monkeypatch):
    """Bit for bit: the memory that is kept from part to part holds nothing over."""
    monkeypatch.setattr(scoring, "LOGITS_PER_SLICE", 7 * VOCAB_SIZE)
    monkeypatch.setattr(scoring, "LABELS_PER_SLICE_ON_CPU", 7)
    monkeypatch.setattr(scoring, "LOGITS_PER_SOFTMAX", 3 * VOCAB_SIZE)
    torch.manual_seed(3)
    model = make_model().to(dtype)
    hidden_states, labels = 5 * torch.randn(17, 48, dtype=dtype), torch.randint(0, VOCAB_SIZE, (17,))
    with torch.no_grad():
        found = token_nll(model, hidden_states, labels)
        logits = torch.cat([model.lm_head(part) for part in hidden_states.split(7 * 4 // dtype.itemsize)])
    assert torch.equal(found, F.cross_entropy(logits.float(), labels, reduction="none"))


def test_no_gradient_is_kept(llama):
    documents = make_documents(lengths=[9])
    with torch.enable_grad():
        our_nll(llama, documents)
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert torch.is_grad_enabled()


def test_a_model_that_sees_what_comes_after_is_refused():
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    documents = make_documents(lengths=[9, 5])
    torch.manual_seed(0)
    for name in ("Bert", "RoFormer"):
        config = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=64, max_position_embeddings=64)
        with pytest.raises(ValueError, match="with is_decoder=False in its config"):
            our_nll(transformers.AutoModelForCausalLM.from_config(config).eval(), documents)
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64, is_decoder=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert np.allclose(our_nll(model, documents), naive_nll(model, documents), atol=1e-5)


def test_dynamic_rotary_embeddings_are_scored_as_far_as_they_stay():
    """Beyond the length of their training, they change with the longest document so far."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(rope_parameters=rope, max_position_embeddings=48)
    documents = make_documents(lengths=[48, 9, 30])
    assert np.allclose(our_nll(model, documents), naive_nll(in_float64(model), documents), atol=1e-4)
    before = model.model.rotary_emb.inv_freq.clone()
    with pytest.raises(ValueError, match=r"documents of 49 tokens with dynamic rotary embeddings.*beyond 48"):
        our_nll(model, make_documents(lengths=[49, 9]))
    assert torch.equal(before, model.model.rotary_emb.inv_freq)


# What scoring leaves behind.


def test_training_flags_and_weights_stay():
    model = with_lora(make_model(attention_dropout=0.1), lora_dropout=0.1).train()
    model.base_model.model.model.layers[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    assert len(set(flags.values())) == 2
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    our_nll(model, make_documents())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad


def test_everything_is_put_back_after_an_error_too():
    model = make_model().train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    documents = Documents.from_rows([[1, 2, 3]], [[-100, 2, VOCAB_SIZE + 5]])  # an id the head does not have
    with pytest.raises((IndexError, RuntimeError)):
        our_nll(model, documents)
    assert [module.training for module in model.modules()] == flags
    assert all("forward" not in vars(module) for module in model.modules())
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        our_nll(model, make_documents())
    assert [module.training for module in model.modules()] == flags
    assert all("forward" not in vars(module) for module in model.modules())


def test_eval_mode_by_itself():
    model = make_model().train()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_random_states_stay():
    model = with_lora(make_model(attention_dropout=0.5), lora_dropout=0.5).train()
    documents = make_documents()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()
    our_nll(model, documents)
    after = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_a_forward_that_a_host_put_on_an_instance_is_used_and_stays():
    """As accelerate, TRL and Liger do it, on the model and on its backbone."""
    model, plain = make_model(), make_model()
    documents = make_documents(lengths=[17, 8])
    calls = []

    def counted(name, forward, *args, **keywords):
        calls.append(name)
        output = forward(*args, **keywords)
        if name == "model":
            output.logits = output.logits * 0.4
        else:
            output["last_hidden_state"] = output["last_hidden_state"] * 2
        return output

    model.forward = functools.partial(counted, "model", model.forward)
    model.model.forward = functools.partial(counted, "backbone", model.model.forward)
    mine = model.forward, model.model.forward
    expected = naive_nll(model, documents)
    assert np.abs(expected - naive_nll(plain, documents)).max() > 0.1
    calls.clear()
    ours = our_nll(model, documents)
    assert set(calls) == {"model", "backbone"}
    assert np.allclose(ours, expected, atol=1e-4)
    assert (model.forward, model.model.forward) == mine
    assert vars(model)["forward"] is mine[0]
    assert vars(model.model)["forward"] is mine[1]


def test_a_forward_hook_on_the_backbone_runs_once():
    """PyTorch's own hooks too are part of the function; the pass through the head must not run them again."""
    model = make_model()
    documents = make_documents(lengths=[17, 8])

    def double(module, args, output):
        output["last_hidden_state"] = output["last_hidden_state"] * 2

    model.model.register_forward_hook(double)
    assert np.allclose(our_nll(model, documents), naive_nll(model, documents), atol=1e-4)


# 4-bit weights.


@pytest.fixture(scope="module")
def load_4bit(tmp_path_factory):
    """Load a tiny Llama in NF4."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra 'qlora', is not installed")
    folder = tmp_path_factory.mktemp("llama")
    make_model(hidden_size=64, intermediate_size=128, initializer_range=0.1).save_pretrained(folder)

    def load(**settings):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **settings
        )
        return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")

    return load


def packed_bytes(model):
    """The bytes of all 4-bit weights and their scales, without asking for a state dict (which may repack them)."""
    import bitsandbytes

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            nested = [] if state.state2 is None else [state.state2.absmax, state.offset]
            found[name] = [
                part.detach().contiguous().view(-1).view(torch.uint8).tolist()
                for part in (module.weight.data, state.absmax, state.code, *nested)
            ]
            assert not getattr(state, "packing_format_for_cpu", False), name
    assert len(found) == 14
    return found


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_4bit_weights_stay_byte_for_byte(load_4bit, double_quant, adapter):
    model = load_4bit(bnb_4bit_use_double_quant=double_quant)
    if adapter:
        model = with_lora(model, target_modules=["q_proj", "down_proj"], lora_dropout=0.3)
    model.train()
    before = packed_bytes(model)
    documents = make_documents()
    ours = our_nll(model, documents)
    assert packed_bytes(model) == before
    assert all(module.training for module in model.modules())
    assert np.array_equal(our_nll(model, documents), ours)
    assert packed_bytes(model) == before
    for module in model.modules():  # what training computes, without its dropout
        module.training = not isinstance(module, torch.nn.Dropout)
    naive = naive_nll(model, documents)
    assert np.abs(ours - naive).max() < 0.3
    assert np.abs(ours - naive).mean() < 0.02


def test_4bit_layers_keep_their_training_flag_while_scoring(load_4bit):
    """bitsandbytes repacks its weights in eval mode on CPUs with AVX512-BF16 only: so look at the flags."""
    import bitsandbytes

    model = with_lora(load_4bit(), target_modules=["q_proj"], lora_dropout=0.3).train()
    with eval_mode(model):
        for name, module in model.named_modules():
            assert module.training == isinstance(module, bitsandbytes.nn.Linear4bit), name
    model.eval()
    with eval_mode(model):
        assert any(module.training for module in model.modules())
    assert not any(module.training for module in model.modules())


# Shares and data sets.


def test_scores_do_not_depend_on_the_order_of_rows(llama):
    """Bit for bit, because the batches are the same."""
    input_ids, labels = make_rows()
    order = np.random.default_rng(0).permutation(len(input_ids))
    plans = [
        ScorePlan.of(Documents.from_rows([input_ids[i] for i in rows], [labels[i] for i in rows]))
        for rows in (range(len(input_ids)), order)
    ]
    scores = [score(llama, plan, tokens_per_batch=50, progress=False) for plan in plans]
    assert np.array_equal(*scores)


def test_nothing_to_score(llama):
    for rows in ([], [[5]], [[5, 6]]):
        assert our_nll(llama, Documents.from_rows(rows, [[-100] * len(row) for row in rows])).shape == (0,)


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


def test_score_dataset_gives_each_row_its_scores(datasets, llama):
    input_ids, labels = make_rows()
    dataset = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels}).shuffle(seed=3)
    scores = score_dataset(llama, dataset, tokens_per_batch=64, progress=False)
    assert len(scores) == len(dataset)
    truth = naive_nll(in_float64(llama), Documents.from_dataset(dataset)).tolist()
    for row, nll in zip(dataset, scores, strict=True):
        assert nll.dtype == np.float32
        assert len(nll) == len(row["input_ids"])
        for t, label in enumerate(row["labels"]):
            if t > 0 and label != -100:
                assert abs(nll[t] - truth.pop(0)) < 1e-4
            else:
                assert np.isnan(nll[t])
    assert truth == []


def test_score_dataset_and_mask_labels_fit_together(datasets, llama):
    from stm_plugin import mask_labels

    input_ids, labels = make_rows()
    dataset = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels})
    for row, nll in zip(dataset, score_dataset(llama, dataset, progress=False), strict=True):
        masked = mask_labels(row["labels"], nll, threshold=20.0)
        assert masked == [
            -100 if t > 0 and label != -100 and np.exp(np.float64(nll[t])) > 20 else label
            for t, label in enumerate(row["labels"])
        ]


def test_score_dataset_of_packed_rows(datasets, llama):
    input_ids, labels = make_rows(lengths=[5, 0, 9, 3])
    packed = datasets.Dataset.from_dict(
        {"input_ids": [joined(input_ids)], "labels": [joined(labels)], "seq_lengths": [[5, 0, 9, 3]]}
    )
    single = datasets.Dataset.from_dict({"input_ids": input_ids, "labels": labels})
    (scores,) = score_dataset(llama, packed, progress=False)
    expected = np.concatenate(score_dataset(llama, single, progress=False))
    assert np.allclose(scores, expected, atol=1e-5, equal_nan=True)


def test_score_dataset_loads_a_model_by_its_path(datasets, tmp_path):
    make_model(attention_dropout=0.5).bfloat16().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    dataset = datasets.Dataset.from_dict({"input_ids": make_rows()[0]})
    by_path = score_dataset(str(tmp_path), dataset, progress=False)
    given = score_dataset(model, dataset, progress=False)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(by_path, given, strict=True))


def test_score_dataset_of_no_rows(datasets, llama):
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}).filter(lambda row: False)
    assert score_dataset(llama, dataset, progress=False) == []


def test_progress_is_shown_when_asked_for(llama, capfd):
    documents = make_documents()
    our_nll(llama, documents)
    assert "STM" not in capfd.readouterr().err
    score(llama, ScorePlan.of(documents), tokens_per_batch=64, progress=True)
    assert "STM: scoring" in capfd.readouterr().err


# --- What a model's own loss does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [False, True])
def test_loss_facts_of_a_mixture_of_experts(router):
    from transformers import MixtralConfig, MixtralForCausalLM

    from stm_plugin.scoring.nll import loss_facts

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=router,
    )
    assert loss_facts(MixtralForCausalLM(config)) == (True, True)


def test_loss_facts_see_a_loss_that_takes_no_count_and_one_that_shifts_nothing(make_model, monkeypatch):
    import torch.nn.functional as F

    from stm_plugin.scoring.nll import loss_facts

    model = make_model()
    assert loss_facts(model) == (True, True)

    def mean_of_all(logits, labels, vocab_size, **kwargs):
        return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

    monkeypatch.setattr(type(model), "loss_function", staticmethod(mean_of_all))
    assert loss_facts(model) == (False, False)

    def mean_of_shifted(logits, labels, vocab_size, **kwargs):
        return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))

    monkeypatch.setattr(type(model), "loss_function", staticmethod(mean_of_shifted))
    assert loss_facts(model) == (False, True)

"""What the rows of a batch begin with is computed once, and the scores are what they are without that."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
import transformers
from test_scoring import FAMILIES, VOCAB_SIZE, in_float64, make_model, naive_nll, our_nll, with_lora

from stm_plugin.scoring import plan as plan_module
from stm_plugin.scoring import prefix
from stm_plugin.scoring.documents import Documents
from stm_plugin.scoring.nll import Scorer, causal_lm
from stm_plugin.scoring.plan import ScorePlan
from stm_plugin.scoring.prefix import Backbone, most_to_share, shared_prefix

FALL_BACK = ["FalconH1"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    """For tests that leave it as it is."""
    return make_model()


def make_documents(num_shared, lengths, num_prompt=None, seed=0):
    """Rows that begin with the same tokens and are of some lengths; labels are on after the prompt."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB_SIZE, num_shared).tolist()
    num_prompt = num_shared if num_prompt is None else num_prompt
    rows = []
    for index, length in enumerate(lengths):
        rest = rng.integers(0, VOCAB_SIZE, length).tolist()
        if num_shared < length:  # so that no row goes on as another does
            rest[num_shared] = index
        rows.append((common + rest[num_shared:])[:length])
    labels = [[-100] * num_prompt + row[num_prompt:] for row in rows]
    return Documents.from_rows(rows, labels)


@pytest.fixture
def passed():
    """Shapes of the ids that pass a model's embedding, call by call."""
    hooks = []

    def watch(model):
        shapes = []

        def note(module, args):
            shapes.append(tuple(args[0].shape))

        hooks.append(causal_lm(model).get_input_embeddings().register_forward_pre_hook(note))
        return shapes

    yield watch
    for hook in hooks:
        hook.remove()


# Exactness.


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")[: 1 + (family != "Gemma2")]],
)
def test_scores_are_the_model_s_own(family, attention, passed):
    """Prefixes shorter and longer than each sliding window, rows that go on with one token or many."""
    window = {"Mistral": 7, "Qwen2": 5, "Gemma2": 6, "Gemma3": 6}.get(family, 99)
    model = make_model(family, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    exact = in_float64(model)
    for num_shared, lengths in [(4, [5, 9, 15, 15]), (9, [10, 10, 10, 30]), (23, [24, 40, 31]), (40, [45, 41, 42])]:
        documents = make_documents(num_shared, lengths)
        truth, naive = naive_nll(exact, documents), naive_nll(model, documents)
        shapes = passed(model)
        ours = our_nll(model, documents, 4096)
        num_common = min(num_shared, window) - 1
        expected = [(1, num_common), (len(lengths), max(lengths) - 1 - num_common)]
        assert shapes == ([(len(lengths), max(lengths) - 1)] if family in FALL_BACK else expected)
        assert np.abs(ours - truth).max() <= 2 * np.abs(naive - truth).max() + 1e-5
        assert np.median(np.abs(np.diff(truth))) > 0.05, "a shift by one would not show"


def small(name, **settings):
    """A tiny random model of a family that names its sizes in its own way."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | {"initializer_range": 0.3} | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_positions_and_rotations_of_other_kinds():
    """Rotary ones of a part of each head, slopes; and rotations that the longest row decides: not to be shared."""
    by_length = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
    dynamic = by_length | {"rope_type": "dynamic", "factor": 8.0}
    longrope = by_length | {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [9.0] * 6}
    limits = {"max_position_embeddings": 16, "original_max_position_embeddings": 16, "pad_token_id": None}
    documents = make_documents(12, [30, 20, 15])
    for model, can_share in [
        (small("GPTNeoX", intermediate_size=64, rotary_pct=0.5), True),
        (small("Bloom", n_layer=2, n_head=4), True),
        (small("Llama", intermediate_size=64, rope_parameters=dynamic, max_position_embeddings=16), False),
        (small("Phi3", intermediate_size=64, rope_parameters=longrope, **limits), False),
    ]:
        assert (most_to_share(model) > 0) == can_share
        exact = in_float64(model)
        input_ids = documents.input_ids[None, :30].astype(np.int64).repeat(2, axis=0)
        input_ids[1, 20:] = 7
        with torch.no_grad():
            whole = exact.base_model(input_ids=torch.from_numpy(input_ids), use_cache=False)[0]
            rest = Backbone(exact).last_hidden_states(input_ids, 12)
        assert torch.allclose(rest, whole[:, 12:], atol=1e-5) == can_share, "refused for no reason, or wrong"
        if can_share:
            assert np.abs(our_nll(model, documents, 4096) - our_nll(model, documents, 1)).max() < 1e-4


@pytest.mark.parametrize(
    ("num_shared", "lengths", "num_prompt", "expected"),
    [
        (0, [20, 20, 20], 5, 0),  # nothing in common
        (10, [20, 20, 20], 15, 10),
        (10, [20, 20, 20], 5, 4),  # labels in the prefix: it ends before what predicts the first of them
        (10, [20, 20, 20], 1, 0),
        (10, [20, 20, 20], 0, 0),
        (30, [20, 25, 29], 15, 14),  # each begins as the next
        (30, [31, 31], 30, 29),
        (20, [20, 20, 20], 12, 0),  # one document three times is scored once
        (10, [20], 10, 0),
        (1, [40, 40], 20, 0),  # not worth it
        (5, [40, 40], 20, 5),
    ],
)
def test_how_much_is_shared(num_shared, lengths, num_prompt, expected, llama, passed):
    documents = make_documents(num_shared, lengths, num_prompt)
    shapes = passed(llama)
    ours = our_nll(llama, documents, 4096)
    assert shapes[:-1] == [(1, expected)] * (expected > 0)
    plan = ScorePlan.of(documents)
    assert shapes[-1] == (len(plan), plan.lengths.max() - expected)
    truth = naive_nll(in_float64(llama), documents)
    assert len(ours) == len(truth) == documents.num_label_tokens
    assert np.abs(ours - truth).max() < 1e-4


def test_labels_that_differ_where_the_ids_do_not(llama, passed):
    """Rows of the same ids, each with labels of its own; the last token of each passes on its own."""
    row = np.random.default_rng(0).integers(0, VOCAB_SIZE, 20).tolist()
    labels = [[-100] * 19 + [label] for label in (3, 4, 5)] + [[-100] * 15 + row[15:]]
    documents = Documents.from_rows([row] * 4, labels)
    shapes = passed(llama)
    ours = our_nll(llama, documents, 4096)
    assert shapes == [(1, 14), (4, 5)]
    assert np.abs(ours - naive_nll(in_float64(llama), documents)).max() < 1e-4
    shapes.clear()
    assert np.abs(our_nll(llama, Documents.from_rows([row] * 3, labels[:3]), 4096) - ours[:3]).max() < 1e-4
    assert shapes == [(1, 18), (3, 1)]


def test_an_adapter_and_autocast(passed):
    model = with_lora(make_model(), use_dora=True, lora_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    flags = [module.training for module in model.modules()]
    documents = make_documents(20, [30, 25, 22])
    random_state = torch.get_rng_state()
    shapes = passed(model)
    ours = our_nll(model, documents, 4096)
    assert shapes == [(1, 19), (3, 10)]
    assert np.abs(ours - naive_nll(in_float64(model), documents)).max() < 1e-4
    rounded = our_nll(model, documents, 4096, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert 1e-3 < np.abs(ours - rounded).max()
    assert np.abs(ours - rounded).mean() < 0.1
    assert torch.equal(random_state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is False


# From batch to batch.


def test_a_prefix_of_all_batches_runs_once(passed):
    """In the order of lengths; a batch of one row goes on from it too, and scores do not depend on who scored what."""
    model = make_model()
    documents = make_documents(20, [40, 39, 38, 30, 29, 28, 27])
    plan = ScorePlan.of(documents)
    assert plan.common_prefix == 19
    batches = plan.batches(80)
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    shapes = passed(model)
    scorer = Scorer(model, plan)
    at_once = scorer.score(batches)
    assert shapes == [(1, 19), (2, 20), (2, 18), (2, 9), (1, 7)]
    ours = plan.spread(np.concatenate(at_once))
    assert np.abs(ours - naive_nll(in_float64(model), documents)).max() < 1e-4
    for first in range(4):
        alone = Scorer(model, plan).score(batches[first:])
        assert all(np.array_equal(one, other) for one, other in zip(at_once[first:], alone, strict=True))
    shapes.clear()
    scorer.score(batches[::-1])
    assert shapes == [(1, 7), (2, 9), (2, 18), (2, 20)]


def test_a_longer_prefix_of_one_batch(passed):
    """It is taken where it saves enough beyond the common one, which then runs again."""
    model = make_model()
    rng = np.random.default_rng(0)
    common, own = rng.integers(0, VOCAB_SIZE, 20).tolist(), rng.integers(0, VOCAB_SIZE, 30).tolist()
    rows = [common + own + rng.integers(0, VOCAB_SIZE, 20).tolist() for _ in range(3)]
    rows += [[*common, index, *rng.integers(0, VOCAB_SIZE, 30).tolist()] for index in range(3)]
    documents = Documents.from_rows(rows, [[-100] * (len(row) - 5) + row[-5:] for row in rows])
    plan = ScorePlan.of(documents)
    shapes = passed(model)
    batches = [range(2, 3), range(3), range(3, 6)]
    scores = Scorer(model, plan).score(batches)
    assert shapes == [(1, 20), (1, 49), (1, 50), (3, 19), (1, 20), (3, 30)]
    assert np.abs(plan.spread(np.concatenate(scores[1:])) - naive_nll(in_float64(model), documents)).max() < 1e-4


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize(("family", "options"), [("Llama", {}), ("Mistral", {"sliding_window": 20})])
def test_out_of_memory_leaves_a_kept_prefix_as_it_was(family, options, number, passed, monkeypatch):
    """Raised by hand, as no CPU has it, where keys and values of a batch are joined on: 2 layers, 2 of each."""
    model = make_model(family, **options)
    documents = make_documents(20, [40, 39, 38, 30, 29, 28])
    plan = ScorePlan.of(documents)
    batches = plan.batches(160)
    assert [len(batch) for batch in batches] == [4, 2]
    joined, cat = [], torch.cat

    def join(tensors, *args, **keywords):
        if keywords.get("dim") == -2 and tensors[0].numel() and len(tensors[0]) == 4:
            joined.append(len(tensors[0]))
            if len(joined) == number:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return cat(tensors, *args, **keywords)

    monkeypatch.setattr(torch, "cat", join)
    shapes = passed(model)
    scores = Scorer(model, plan).score(batches)
    assert shapes == [(1, 19), (4, 20), (2, 20), (2, 18), (2, 9)]
    assert len(joined) == number
    assert np.abs(plan.spread(np.concatenate(scores)) - naive_nll(in_float64(model), documents)).max() < 1e-4


@pytest.mark.parametrize("tokens_per_block", [1, 50, 2**20])
@pytest.mark.parametrize(
    ("num_shared", "lengths", "num_prompt", "expected"),
    [
        (10, [20, 15, 18], 15, 10),
        (10, [20, 15, 18], 5, 4),
        (10, [20, 15, 18], 1, 0),
        (0, [20, 15, 18], 5, 0),
        (30, [20, 25, 29], 15, 14),
        (14, [20, 15, 18], 14, 13),
        (10, [20], 15, 0),
        (10, [], 15, 0),
    ],
)
def test_the_common_prefix_of_a_plan(num_shared, lengths, num_prompt, expected, tokens_per_block, monkeypatch):
    monkeypatch.setattr(plan_module, "_TOKENS_PER_BLOCK", tokens_per_block)
    assert ScorePlan.of(make_documents(num_shared, lengths, num_prompt)).common_prefix == expected


# What is not shared.


def test_shared_prefix():
    ids = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 1, 9], [5, 6, 7, 8, 0]])
    assert [shared_prefix(ids, limit) for limit in range(5)] == [0, 1, 2, 3, 3]
    assert shared_prefix(ids[::2], 4) == 4
    assert shared_prefix(ids[:1], 4) == 0
    assert shared_prefix(ids + np.arange(3)[:, None], 4) == 0


def test_a_prefix_has_to_save_enough(monkeypatch):
    ids = np.arange(100) + np.zeros((4, 1), np.int64)
    ids[:, 8:] += np.arange(4)[:, None]
    monkeypatch.setattr(prefix, "LEAST_SAVING", 0.06)
    assert shared_prefix(ids, 90) == 8
    monkeypatch.setattr(prefix, "LEAST_SAVING", 0.061)
    assert shared_prefix(ids, 90) == 0


def test_masks_take_no_more_than_they_may(monkeypatch):
    ids = np.zeros((4, 100), np.int64)
    monkeypatch.setattr(prefix, "MASK_BYTES", 4 * 4 * 60 * 100)
    assert [shared_prefix(ids, limit) for limit in (40, 39)] == [40, 0]


def test_a_prefix_takes_no_more_memory_than_it_may(monkeypatch, llama, passed):
    """A longer one is shared as far as that goes; and one that takes more than was thought is not shared at all."""
    documents = make_documents(30, [40, 36, 35])
    bytes_per_token = 2 * 2 * 2 * 12 * 4
    monkeypatch.setattr(prefix, "PREFIX_BYTES", 4 * (10 * bytes_per_token + 1))  # a CPU takes a quarter
    assert most_to_share(llama) == 10
    shapes = passed(llama)
    ours = our_nll(llama, documents, 4096)
    assert shapes == [(1, 10), (3, 29)]
    assert np.abs(ours - naive_nll(in_float64(llama), documents)).max() < 1e-4
    shapes.clear()
    input_ids = np.zeros((2, 15), np.int64)
    with torch.no_grad():
        assert Backbone(llama).last_hidden_states(input_ids, 11).shape == (2, 15, 48)
        assert Backbone(llama).last_hidden_states(input_ids, 10).shape == (2, 5, 48)
    assert shapes == [(1, 11), (2, 15), (1, 10), (2, 5)]


def test_a_prefix_is_kept_once(llama):
    """Neither once for each row, nor with what follows it in each layer."""
    caches = []

    def note(module, args, keywords, output):
        caches.append((keywords.get("past_key_values"), len(output.last_hidden_state)))

    hook = llama.model.register_forward_hook(note, with_kwargs=True)
    input_ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (5, 30))
    input_ids[:, :20] = input_ids[0, :20]
    with torch.no_grad():
        llama.model(input_ids=torch.from_numpy(input_ids[:1]), past_key_values=None)
        Backbone(llama).last_hidden_states(input_ids, 20)
    hook.remove()
    cache = caches[-1][0]
    for layer in cache.layers:
        assert layer.keys.shape == (5, 2, 20, 12)
        assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == 2 * 20 * 12 * 4


@pytest.mark.parametrize("kind", ["no cache", "a tuple", "another kind", "of another length", "another class"])
def test_a_cache_unlike_what_is_known_is_not_used(kind, llama):
    model = make_model()
    inner = model.model.forward

    def forward(*args, **keywords):
        assert keywords.get("past_key_values") is None
        output = inner(*args, **keywords)
        if keywords["use_cache"]:
            if kind == "no cache":
                output["past_key_values"] = None
            elif kind == "a tuple":
                return output.to_tuple()
            elif kind == "another kind":
                output.past_key_values.layers[1].__class__ = type(
                    "OtherLayer", (transformers.cache_utils.DynamicLayer,), {}
                )
            elif kind == "of another length":
                output.past_key_values.crop(-1)
            else:
                output.past_key_values.__class__ = type("OtherCache", (transformers.DynamicCache,), {})
        return output

    model.model.forward = forward
    documents = make_documents(20, [30, 25, 22])
    assert np.array_equal(our_nll(model, documents, 4096), our_nll_whole(llama, documents))


def our_nll_whole(model, documents):
    """Scores with nothing shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "PREFIX_BYTES", 0)
        return our_nll(model, documents, 4096)


def test_what_cannot_go_on_from_a_prefix():
    """Models of images too, code that transformers does not know, attention of other kinds, states of other kinds."""
    assert most_to_share(make_model()) > 1000
    assert most_to_share(make_model("FalconH1")) == 0
    assert most_to_share(small("Mamba", state_size=4)) == 0
    rwkv = transformers.RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=48, num_hidden_layers=2)
    assert most_to_share(transformers.RwkvForCausalLM(rwkv)) == 0
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6}
    gemma4 = transformers.Gemma4TextConfig(**sizes, vocab_size_per_layer_input=VOCAB_SIZE)
    assert most_to_share(transformers.Gemma4ForCausalLM(gemma4)) == 0
    assert most_to_share(make_model("Mistral", sliding_window=1)) == 0
    strange = make_model()
    strange.model.__class__ = type("Strange", (transformers.LlamaModel,), {})
    assert most_to_share(strange) == 0
    other = make_model()
    other.config._attn_implementation = "flex_attention"
    assert most_to_share(other) == 0


def test_processes_in_step_share_nothing(llama, passed):
    documents = make_documents(20, [30, 25, 22])
    shapes = passed(llama)
    in_step = our_nll(llama, documents, 4096, agree=lambda counts: counts)
    assert shapes == [(3, 29)]
    assert np.abs(in_step - our_nll(llama, documents, 4096)).max() < 1e-4

"""Drift and weight change against naive computations on tiny random models."""

import copy
import math

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stm_plugin.measures import drift, weight_change
from stm_plugin.measures.drift import TokenRow, greedy_answers, measure_drift
from stm_plugin.measures.weight_change import adapter_change_norm, change_norm

VOCAB_SIZE = 300
STOP_ID = 2
ROWS = [TokenRow([5, 17, 42, 99, 250, 7], 2), TokenRow([1, 2, 3, 4], 3), TokenRow(list(range(20, 60)), 1)]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=STOP_ID,
        pad_token_id=0,
        initializer_range=0.5,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


class WordTokenizer:
    """Stands in for a tokenizer without a chat template: one id for each word, its length."""

    chat_template = None
    pad_token_id = None
    eos_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [10 + len(word) for word in text.split()]}


def naive_kl(initial: LlamaForCausalLM, tuned: LlamaForCausalLM, row: TokenRow) -> float:
    """KL in float64, one position and one vocabulary entry at a time, softmax written out."""
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits[0].tolist() for model in (initial, tuned)]
    total = 0.0
    for target in range(row.num_prompt_tokens, len(row.input_ids)):
        log_probs = []
        for one in logits:
            values = one[target - 1]
            log_normalizer = max(values) + math.log(sum(math.exp(v - max(values)) for v in values))
            log_probs.append([v - log_normalizer for v in values])
        total += sum(math.exp(a) * (a - b) for a, b in zip(*log_probs, strict=True))
    return total


def trained_adapter(model: LlamaForCausalLM, **options: object) -> object:
    """A LoRA adapter with random weights in place of a trained one."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peft_model


def test_drift_equals_a_naive_float64_loop() -> None:
    initial, tuned = tiny_llama(0), tiny_llama(1)
    measured = measure_drift(initial, tuned, ROWS)
    for row, result in zip(ROWS, measured.rows, strict=True):
        expected = naive_kl(initial, tuned, row)
        assert expected > 0.1
        assert result.sum_nats == pytest.approx(expected, rel=1e-9)
        assert result.num_tokens == len(row.input_ids) - row.num_prompt_tokens
    assert measured.mean == pytest.approx(sum(r.sum_nats for r in measured.rows) / measured.num_tokens, rel=1e-12)


def test_drift_is_pooled_over_tokens_not_averaged_over_rows() -> None:
    measured = measure_drift(tiny_llama(0), tiny_llama(1), ROWS)
    row_means = [row.sum_nats / row.num_tokens for row in measured.rows]
    assert measured.mean != pytest.approx(sum(row_means) / len(row_means), rel=1e-3)


def test_drift_has_a_direction() -> None:
    first, second = tiny_llama(0), tiny_llama(1)
    assert measure_drift(first, second, ROWS).mean != pytest.approx(measure_drift(second, first, ROWS).mean, rel=1e-3)


def test_drift_of_a_model_with_itself_is_zero_and_leaves_its_mode() -> None:
    model = tiny_llama(0).train()
    assert measure_drift(model, copy.deepcopy(model), ROWS).sum_nats == 0.0
    assert model.training


def test_drift_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny_llama(0), tiny_llama(1)
    whole = measure_drift(*models, ROWS)
    monkeypatch.setattr(drift, "_POSITIONS_PER_CHUNK", 7)
    for ours, expected in zip(measure_drift(*models, ROWS).rows, whole.rows, strict=True):
        assert ours.sum_nats == pytest.approx(expected.sum_nats, rel=1e-12)


@pytest.mark.parametrize("row", [TokenRow([1, 2, 3], 0), TokenRow([1, 2, 3], 3)])
def test_drift_refuses_rows_without_prompt_or_answer(row: TokenRow) -> None:
    with pytest.raises(ValueError, match=r"row 0 has \d prompt tokens of 3"):
        measure_drift(tiny_llama(0), tiny_llama(1), [row])


def test_drift_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row, got none"):
        measure_drift(tiny_llama(0), tiny_llama(1), [])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_answers_equal_an_argmax_loop(batch_size: int) -> None:
    model = tiny_llama(3)
    prompts = ["a bb ccc", "dddd", "eeeee f gg hhh iiii", "jj"]
    rows = greedy_answers(model, WordTokenizer(), prompts, max_new_tokens=12, batch_size=batch_size)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = WordTokenizer()(prompt)["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                ids = [*ids, model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
            if ids[-1] == STOP_ID:
                break
        assert row.input_ids == ids
        assert row.num_prompt_tokens == len(prompt.split())


def test_an_answer_ends_with_its_first_stop_token() -> None:
    model = tiny_llama(3)
    full = greedy_answers(model, WordTokenizer(), ["a bb ccc"], max_new_tokens=12)[0]
    third = full.input_ids[full.num_prompt_tokens + 2]
    assert third not in full.input_ids[full.num_prompt_tokens : full.num_prompt_tokens + 2]
    model.generation_config.eos_token_id = [third, 299]
    # A second, shorter answer in the batch must not lengthen or shorten the first.
    stopped = greedy_answers(model, WordTokenizer(), ["a bb ccc", "jj"], max_new_tokens=12)[0]
    assert stopped.input_ids == full.input_ids[: full.num_prompt_tokens + 3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "modules_to_save"],
)
def test_adapter_change_equals_that_of_the_merged_model(options: dict[str, object]) -> None:
    initial = tiny_llama(0)
    peft_model = trained_adapter(copy.deepcopy(initial), **options)
    measured = adapter_change_norm(peft_model)
    merged = peft_model.merge_and_unload()
    difference = torch.cat(
        [
            (tuned - before).double().flatten()
            for before, tuned in zip(initial.parameters(), merged.parameters(), strict=True)
        ]
    )
    assert difference.norm().item() > 0.1
    assert measured == pytest.approx(difference.norm().item(), rel=1e-5)
    assert change_norm(initial, merged) == pytest.approx(difference.norm().item(), rel=1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(use_dora: bool) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    assert adapter_change_norm(get_peft_model(tiny_llama(0), config)) == pytest.approx(0.0, abs=1e-5)


def test_tied_weights_count_once() -> None:
    initial = tiny_llama(0)
    initial.config.tie_word_embeddings = True
    initial.lm_head.weight = initial.model.embed_tokens.weight
    tuned = copy.deepcopy(initial)
    with torch.no_grad():
        tuned.lm_head.weight[3, 4] += 0.25
    assert change_norm(initial, tuned) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' moves base weights into the adapter"),
        ({"bias": "all"}, "trained biases of the base model"),
        ({"trainable_token_indices": [1, 2]}, "single trained tokens"),
    ],
    ids=["pissa", "bias", "tokens"],
)
def test_adapters_whose_change_is_unknown_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_change_norm(trained_adapter(tiny_llama(0), **options))


def test_a_merged_adapter_is_refused() -> None:
    peft_model = trained_adapter(tiny_llama(0))
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its base"):
        adapter_change_norm(peft_model)


def test_models_with_other_parameters_are_refused() -> None:
    small, large = tiny_llama(0), tiny_llama(0)
    large.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(ValueError, match=r"shape \(300, 32\) in one model and \(308, 32\)"):
        change_norm(small, large)
    with pytest.raises(ValueError, match="only one of them has"):
        change_norm(small, small.model)


def test_the_norm_is_summed_in_float64() -> None:
    # 2**24 + 1 squares of 1: float32 cannot hold the count.
    ones = torch.ones(2**24 + 1)
    assert weight_change._squared_sum(ones) == 2**24 + 1

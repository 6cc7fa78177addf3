"""Drift, weight change, self-BLEU and perplexity against naive computations on tiny random models."""

import copy
import json
import math
import os
from collections import Counter

import pytest

pytest.importorskip("torch", reason="torch is not installed")

import numpy as np
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from stm_plugin.answers import TokenRow, greedy_answers
from stm_plugin.measures import drift, weight_change
from stm_plugin.measures.diversity import sample_answers, self_bleu
from stm_plugin.measures.drift import Drift, RowDrift, measure_drift
from stm_plugin.measures.inputs import as_chats
from stm_plugin.measures.intervals import ratio_interval
from stm_plugin.measures.perplexity import answer_tokens, common_rows, measure_perplexity, perplexity_summary
from stm_plugin.measures.weight_change import adapter_change_norm, change_norm, checkpoint_change_norm

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
        ({"ensure_weight_tying": True}, "tied layers that are trained"),
    ],
    ids=["pissa", "bias", "tokens", "tied"],
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


# Drift: prompts, vocabularies, intervals.


def test_a_chat_is_answered_from_its_last_message_on(make_model, tokenizer) -> None:
    request, reply = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}
    prompts = ["Add 1 and 2.", [request], [request, reply, request]]
    text, chat, longer = greedy_answers(make_model(), tokenizer, prompts, max_new_tokens=3)
    assert text == chat
    rendered = tokenizer.apply_chat_template(prompts[2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert longer.input_ids[: longer.num_prompt_tokens] == rendered
    assert len(rendered) > 2 * text.num_prompt_tokens


def test_a_chat_needs_a_chat_template() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        greedy_answers(tiny_llama(0), WordTokenizer(), [[{"role": "user", "content": "a"}]], max_new_tokens=1)


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("repetition_penalty", 50.0),
        ("no_repeat_ngram_size", 1),
        ("suppress_tokens", "first"),
        ("begin_suppress_tokens", "first"),
        ("bad_words_ids", "second"),
        ("forced_eos_token_id", 5),
        ("min_new_tokens", 12),
        ("max_time", 1e-9),
        ("stop_strings", ["a"]),
        ("num_beams", 3),
        ("do_sample", True),
        ("exponential_decay_length_penalty", (1, 9.0)),
        ("num_return_sequences", 2),
    ],
)
def test_greedy_answers_know_no_option_of_the_model(option: str, value: object, is_adapter: bool) -> None:
    """But for what ends an answer: one does so early, the other at the limit."""
    model = tiny_llama(3)
    prompts = ["a bb ccc", "jj"]
    if is_adapter:
        model = trained_adapter(model)
    ids = greedy_answers(model, WordTokenizer(), prompts, max_new_tokens=12)[0].input_ids[-12:]
    model.generation_config.eos_token_id = next(token for token in ids[3:] if token not in ids[:3])
    plain = greedy_answers(model, WordTokenizer(), prompts, max_new_tokens=12)
    lengths = [len(row.input_ids) - row.num_prompt_tokens for row in plain]
    assert 3 < lengths[0] < lengths[1] == 12
    value = {"first": ids[:1], "second": [[ids[1]]]}.get(value, value) if isinstance(value, str) else value
    setattr(model.generation_config, option, value)
    config = model.generation_config
    assert greedy_answers(model, WordTokenizer(), prompts, max_new_tokens=12) == plain
    assert model.generation_config is config
    assert getattr(config, option) == value


def test_drift_refuses_another_vocabulary() -> None:
    larger = tiny_llama(0)
    larger.resize_token_embeddings(VOCAB_SIZE + 8)
    with pytest.raises(ValueError, match="vocabularies of 300 and 308 tokens"):
        measure_drift(tiny_llama(0), larger, ROWS)


def test_an_interval_is_that_of_the_ratio_under_redrawn_prompts() -> None:
    # Of two prompts, 1/4 of the draws take the first twice, 1/2 both, 1/4 the second twice: ratios 10, 1 and 0.
    assert ratio_interval([10, 0], [1, 9]) == (0, 10)
    assert ratio_interval([10, 0], [1, 9], confidence=0.4) == (1, 1)
    assert Drift([RowDrift(10, 1), RowDrift(0, 9)]).interval() == (0, 10)


def test_an_interval_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(5, 2, 50)
    whole = ratio_interval(values, np.ones(50), seed=3)
    monkeypatch.setattr("stm_plugin.measures.intervals._DRAWS_PER_BLOCK", 50 * 999)
    assert ratio_interval(values, np.ones(50), seed=3) == whole
    low, high = whole
    half = 1.96 * values.std() / math.sqrt(50)  # the normal interval, which a mean of 50 is near to
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_one_prompt_has_no_interval() -> None:
    assert Drift([RowDrift(1.0, 2)]).interval() is None


# Weight change: quantized bases, saved models.


def four_bit(model: LlamaForCausalLM, folder: str) -> LlamaForCausalLM:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model.save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


def dequantized(quantized: LlamaForCausalLM, like: LlamaForCausalLM) -> LlamaForCausalLM:
    """A plain model of the weights that a 4-bit one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(like)
    with torch.no_grad():
        for name, weight in quantized.named_parameters():
            values = dequantize_4bit(weight.data, weight.quant_state) if hasattr(weight, "quant_state") else weight
            plain.get_parameter(name).copy_(values)
    return plain


def direct_norm(initial: torch.nn.Module, tuned: torch.nn.Module) -> float:
    pairs = zip(initial.parameters(), tuned.parameters(), strict=True)
    return torch.cat([(after - before).detach().double().flatten() for before, after in pairs]).norm().item()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapter_change_on_a_quantized_base_equals_that_of_the_dequantized_one(use_dora: bool, tmp_path) -> None:
    base = tiny_llama(0)
    quantized = four_bit(copy.deepcopy(base), str(tmp_path))
    plain = dequantized(quantized, base)
    assert direct_norm(base, plain) > 0.1  # what quantizing did is not part of the change
    tuned = trained_adapter(quantized, use_dora=use_dora)
    measured = adapter_change_norm(tuned)
    twin = trained_adapter(copy.deepcopy(plain), use_dora=use_dora)
    twin.load_state_dict({name: value for name, value in tuned.state_dict().items() if "lora_" in name}, strict=False)
    assert measured == pytest.approx(direct_norm(plain, twin.merge_and_unload()), rel=1e-5)


def test_a_quantized_initial_model_counts_as_what_it_stands_for(tmp_path) -> None:
    base, tuned = tiny_llama(0), tiny_llama(1)
    quantized = four_bit(copy.deepcopy(base), str(tmp_path))
    expected = direct_norm(dequantized(quantized, base), tuned)
    assert change_norm(quantized, tuned) == pytest.approx(expected, rel=1e-6)
    assert change_norm(quantized, quantized) == 0


@pytest.mark.parametrize("size", ["10GB", "40KB"], ids=["whole", "shards"])
def test_saved_models_are_compared_without_loading_them(size: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    initial, tuned = tiny_llama(0), tiny_llama(1)
    initial.save_pretrained(tmp_path / "initial")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size=size)
    num_files = len(list((tmp_path / "tuned").glob("*.safetensors")))
    assert num_files == 1 if size == "10GB" else num_files > 2
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    measured = checkpoint_change_norm(str(tmp_path / "initial"), str(tmp_path / "tuned"))
    assert measured == pytest.approx(direct_norm(initial, tuned), rel=1e-6)


def test_models_saved_under_other_names_are_loaded(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    initial = tiny_llama(0)
    initial.config.tie_word_embeddings = True
    initial.tie_weights()
    tuned = copy.deepcopy(initial)
    with torch.no_grad():
        tuned.lm_head.weight[3, 4] += 0.25
    initial.save_pretrained(tmp_path / "initial")
    tuned.save_pretrained(tmp_path / "tuned")
    for name in ("tuned", "initial"):  # a head beside the embedding that it is tied to
        file = tmp_path / name / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, file, {"format": "pt"})
        measured = checkpoint_change_norm(str(tmp_path / "initial"), str(tmp_path / "tuned"))
        assert measured == pytest.approx(0.25, rel=1e-5)


def test_models_saved_in_quantized_form_are_refused(tmp_path) -> None:
    initial = tiny_llama(0)
    four_bit(initial, str(tmp_path / "initial")).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="tuned is saved in quantized form"):
        checkpoint_change_norm(str(tmp_path / "initial"), str(tmp_path / "tuned"))


def test_a_model_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*nowhere: give a folder or a hub id"):
        checkpoint_change_norm(str(tmp_path / "nowhere"), str(tmp_path))


# Self-BLEU.


def naive_bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """Sentence BLEU of words: clipped n-gram precisions, halved anew for each order without a match."""
    logs, misses = [], 0
    for order in range(1, min(4, len(hypothesis)) + 1):
        found, *known = (
            Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            for words in (hypothesis, *references)
        )
        matches = sum(min(count, max(some[ngram] for some in known)) for ngram, count in found.items())
        if not matches and order == 1:
            return 0.0
        misses += not matches
        logs.append(math.log((matches or 0.5**misses) / sum(found.values())))
    nearest = min((abs(len(words) - len(hypothesis)), len(words)) for words in references)[1]
    return 100 * math.exp(min(0, 1 - nearest / len(hypothesis)) + sum(logs) / len(logs))


SAMPLES = [
    ["the cat sat on the mat", "the cat sat on a red mat today", "a dog ran"],
    ["one two three four five", "one two three four six", "one two three four five six seven"],
    ["completely different words", "nothing here matches at all"],
]


def test_self_bleu_is_each_sample_against_the_others() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    measured = self_bleu(SAMPLES)
    for texts, score in zip(SAMPLES, measured.prompts, strict=True):
        words = [text.split() for text in texts]
        expected = [naive_bleu(words[i], words[:i] + words[i + 1 :]) for i in range(len(words))]
        assert score == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert 0 == measured.prompts[2] < measured.prompts[0] < measured.prompts[1] < 100
    assert measured.mean == pytest.approx(sum(measured.prompts) / 3)
    assert measured.num_samples == 8


def test_self_bleu_equals_sacrebleu_by_hand() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    texts = ["Let $x=2$, so x^2 = 4.", "So, x^2 = 4 (as $x = 2$).", "The answer: 4."]
    by_hand = [
        sacrebleu.sentence_bleu(texts[0], [texts[1], texts[2]]).score,
        sacrebleu.sentence_bleu(texts[1], [texts[0], texts[2]]).score,
        sacrebleu.sentence_bleu(texts[2], [texts[0], texts[1]]).score,
    ]
    assert self_bleu([texts]).mean == pytest.approx(sum(by_hand) / 3, rel=1e-12)
    assert 5 < self_bleu([texts]).mean < 60


@pytest.mark.parametrize("text", ["The answer is 4, since 2 + 2 = 4.", "yes", "a b", "x\n\n  y"])
@pytest.mark.parametrize("k", [2, 5])
def test_self_bleu_of_identical_samples_is_100(text: str, k: int) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    assert self_bleu([[text] * k]).mean == pytest.approx(100, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one prompt, got none"),
        ([["a", "b"], ["a"]], "prompt 1 has 1 where self-BLEU needs a list of at least two samples"),
        ([["a", "b"], []], "prompt 1 has 0"),
        (["ab"], "prompt 0 has one text"),
        ([["a", "b"], ["a", " \n"]], "sample 1 of prompt 1 is empty"),
    ],
)
def test_samples_without_a_self_bleu_are_refused(samples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        self_bleu(samples)


# Samples.


def test_samples_follow_the_seed_and_leave_the_random_state(make_model, tokenizer) -> None:
    model, prompts = make_model(initializer_range=0.05), ["Add 1 and 2.", "What?"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [sample_answers(model, tokenizer, prompts, 3, max_new_tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert runs[0] == runs[1] != runs[2]
    assert [len(texts) for texts in runs[0]] == [3, 3]
    assert len({text for texts in runs[0] for text in texts}) == 6


def test_samples_are_drawn_from_the_cut_distribution_whatever_the_models_own_settings(make_model, tokenizer) -> None:
    model = make_model(initializer_range=0.05)
    model.generation_config.top_k = 1
    model.generation_config.min_p = 0.9
    temperature, top_p, number = 0.7, 0.8, 3000
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt])).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(-1).numpy()
    order = np.argsort(-probabilities)
    inside = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
    expected = Counter()
    for token in inside:
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] += probabilities[token] / probabilities[inside].sum()
    (texts,) = sample_answers(
        model,
        tokenizer,
        ["What?"],
        number,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=1,
        batch_size=1000,
    )
    drawn = Counter(texts)
    assert set(drawn) <= set(expected)
    assert len(expected) > 20
    distance = sum(abs(drawn[text] / number - share) for text, share in expected.items()) / 2
    assert distance < 0.5 * math.sqrt(len(expected) / number) + 0.02


def test_samples_near_temperature_0_are_the_greedy_answer(make_model, tokenizer) -> None:
    model, prompts = make_model(), ["Add 1 and 2.", "What is the capital of France?"]
    rows = greedy_answers(model, tokenizer, prompts, max_new_tokens=8)
    greedy = [tokenizer.decode(r.input_ids[r.num_prompt_tokens :], skip_special_tokens=True) for r in rows]
    for sharp in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        texts = sample_answers(model, tokenizer, prompts, 2, max_new_tokens=8, batch_size=3, **sharp)
        assert texts == [[text] * 2 for text in greedy]


@pytest.mark.parametrize("options", [{"k": 0}, {"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(options: dict, make_model, tokenizer) -> None:
    with pytest.raises(ValueError, match="at least 1, a temperature above 0 and top_p above 0 and at most 1, got k="):
        sample_answers(make_model(), tokenizer, ["a"], **({"k": 2} | options))


# Perplexity.


def naive_row_perplexity(model: LlamaForCausalLM, tokenizer, prompt: list, completion: list) -> tuple[float, int]:
    """`exp` of the mean NLL of what the chat template renders after the prompt, token by token in float64."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    with torch.no_grad():
        log_probs = model.double().eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    nll = [-log_probs[t - 1, ids[t]].item() for t in range(len(before), len(ids))]
    return math.exp(sum(nll) / len(nll)), len(nll)


def test_perplexity_is_over_each_rows_answer_alone(make_model, tokenizer, chats) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    model = make_model()
    as_messages = [{"messages": row["prompt"] + row["completion"], "task_id": i} for i, row in enumerate(chats[:5])]
    measured = measure_perplexity(model, tokenizer, {"first": as_messages, "second": chats[5:]})
    for name, rows in (("first", chats[:5]), ("second", chats[5:])):
        summary = measured[name]
        expected = [naive_row_perplexity(copy.deepcopy(model), tokenizer, **row) for row in rows]
        values, counts = map(np.array, zip(*expected, strict=True))
        assert summary.rows == pytest.approx(values, rel=1e-4)
        assert summary.num_tokens == counts.sum()
        assert summary.mean == pytest.approx(values.sum() / len(rows), rel=1e-4)
        assert summary.std == pytest.approx(math.sqrt(((values - values.mean()) ** 2).sum() / len(rows)), rel=1e-3)
        assert summary.pooled == pytest.approx(math.exp((np.log(values) * counts).sum() / counts.sum()), rel=1e-4)
        assert summary.quantiles[0.5] == pytest.approx(np.median(values), rel=1e-4)


def test_earlier_answers_of_a_chat_are_context(make_model, tokenizer, chats) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    first, second = (chats[i]["prompt"] + chats[i]["completion"] for i in (0, 1))
    model = make_model()
    summary = measure_perplexity(model, tokenizer, {"chat": [{"messages": first + second}]})["chat"]
    expected, count = naive_row_perplexity(model, tokenizer, first + second[:1], second[1:])
    assert summary.rows == pytest.approx([expected], rel=1e-4)
    assert summary.num_tokens == count


MAX_LENGTH = 46


def test_columns_that_a_chat_template_is_given() -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "id": 1}
    chat = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    tools = [{"type": "function"}]
    silent = {"tools": [], "chat_template_kwargs": None}
    assert as_chats([row, row | silent], "x") == [chat, chat]
    # All rows have the columns of any: `datasets` goes by the first.
    assert as_chats([row, row | {"tools": tools}], "x") == [chat | {"tools": None}, chat | {"tools": tools}]
    kwargs = [{"chat_template_kwargs": {"enable_thinking": value}} for value in (True, False)]
    assert as_chats([row | some for some in kwargs], "x") == [chat | some for some in kwargs]
    for rows, message in [
        (
            [row, row | kwargs[0]],
            r"x: all rows must have the same keys in 'chat_template_kwargs', .*row 0 has \[\], row 1",
        ),
        ([row | {"chat_template_kwargs": ["a"]}], "x, row 0: 'chat_template_kwargs' must be a mapping"),
        ([row | {"chat_template_kwargs": {"tokenize": True}}], "x, row 0: 'tokenize' is not for"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_chats(rows, "x")


def test_rows_are_tokenized_as_for_training_and_nothing_else_changes(tokenizer, chats, tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from accelerate.state import AcceleratorState, PartialState
    from trl_helpers import plain_trainer

    trainer = plain_trainer(tiny_llama(0), chats, tokenizer, tmp_path, max_length=MAX_LENGTH)
    for kind in (AcceleratorState, PartialState):
        monkeypatch.setitem(kind._shared_state, "of", "the caller's trainer")
    state = dict(trainer.accelerator.state._shared_state), dict(PartialState._shared_state)
    before = str(vars(tokenizer))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (prepared,) = answer_tokens({"chats": chats}, tokenizer, max_length=MAX_LENGTH).values()
    assert torch.equal(torch.rand(3), expected)
    assert (dict(trainer.accelerator.state._shared_state), dict(PartialState._shared_state)) == state
    assert str(vars(tokenizer)) == before
    assert 0 < len(prepared) < len(chats)  # the cut leaves some rows without an answer
    for column in ("input_ids", "labels"):
        assert list(prepared[column]) == list(trainer.train_dataset[column])


def test_a_row_that_is_cut_away_in_one_set_is_left_out_of_all(make_model, tokenizer, chats) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    long = [{"prompt": [{"role": "user", "content": "word " * 80}], "completion": chats[0]["completion"]}, chats[1]]
    data = {"short": chats[:2], "long": long}
    alone = measure_perplexity(make_model(), tokenizer, data, max_length=90)
    paired = measure_perplexity(make_model(), tokenizer, data, max_length=90, paired=True)
    assert [len(summary.rows) for summary in alone.values()] == [2, 1]
    second = measure_perplexity(make_model(), tokenizer, {"short": chats[1:2]}, max_length=90)
    assert paired["short"].rows == paired["long"].rows == second["short"].rows  # to the last bit
    assert paired["short"].rows == pytest.approx(alone["short"].rows[1:])  # scored beside another row
    with pytest.raises(ValueError, match="long: no row has an answer token within max_length=5"):
        measure_perplexity(make_model(), tokenizer, {"long": long}, max_length=5)


def test_scores_that_are_nan_are_refused(make_model, tokenizer, chats) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="scores are NaN"):
        measure_perplexity(model, tokenizer, {"chats": chats})


def test_summary_of_scores() -> None:
    nan = math.nan
    nll = [np.array([nan, 1.0, 3.0], np.float32), np.array([nan, nan], np.float32), np.array([nan, 4.0], np.float32)]
    summary = perplexity_summary(nll)
    assert summary.rows == pytest.approx([math.exp(2), math.exp(4)])
    assert (summary.num_tokens, summary.sum_nats) == (3, 8)
    assert summary.pooled == pytest.approx(math.exp(8 / 3))
    assert summary.mean == pytest.approx((math.exp(2) + math.exp(4)) / 2)
    assert summary.std == pytest.approx((math.exp(4) - math.exp(2)) / 2)
    with pytest.raises(ValueError, match="no answer token"):
        perplexity_summary(nll[1:2])


def chat(request: str, answer: str, **fields: object) -> dict:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def test_common_rows_are_those_that_ask_the_same() -> None:
    data = {
        "a": [chat("1", "x"), chat("2", "x"), chat("3", "x"), chat("2", "again")],
        "b": [chat("3", "y"), chat("1", "y"), {"prompt": chat("2", "")["messages"][:1], "completion": [{}]}],
        "c": [chat("2", "z"), chat("4", "z"), chat("3", "z")],
    }
    common = common_rows(data)
    assert common == {
        "a": [data["a"][1], data["a"][2]],
        "b": [data["b"][2], data["b"][0]],
        "c": [data["c"][0], data["c"][2]],
    }
    assert {name: rows[:1] for name, rows in common.items()} == common_rows(data, limit=1)
    with pytest.raises(ValueError, match="no prompt is in all of a, d"):
        common_rows({"a": data["a"], "d": [chat("5", "x")]})


def test_common_rows_by_a_field() -> None:
    data = {"a": [chat("1", "x", task=7), chat("2", "x", task=8)], "b": [chat("other words", "y", task=8)]}
    assert common_rows(data, "task") == {"a": data["a"][1:], "b": data["b"]}
    with pytest.raises(ValueError, match="c, row 0: has no field 'task'"):
        common_rows(data | {"c": [chat("1", "x")]}, "task")


MBPP_FILES = {
    "ground truth": "mbpp_train.jsonl",
    "rephrased": "mbpp_train_rephrase_llama3_8b.jsonl",
    "self-output": "mbpp_train_self_output_llama3_8b.jsonl",
}


@pytest.mark.slow
def test_smollm2_orders_the_papers_data_as_the_paper_does(mbpp) -> None:
    """60 MBPP problems that are in all three files, as the paper has them for Llama 3: 4.83, 1.69 and 1.16."""
    pytest.importorskip("trl", reason="trl is not installed")
    pytest.importorskip("gguf", reason="gguf, which reads the packaged SmolLM2, is not installed")
    from conftest import SHARED_DATA
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stm_plugin.demo.model import find_model

    torch.set_num_threads(os.cpu_count() or 1)
    data = {"ground truth": mbpp}
    for name in ("rephrased", "self-output"):
        lines = (SHARED_DATA / MBPP_FILES[name]).read_text(encoding="utf-8").splitlines()
        data[name] = [json.loads(line) for line in lines]
    folder = find_model().path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common = common_rows(data, limit=60)
    assert {len(rows) for rows in common.values()} == {60}
    measured = measure_perplexity(model, AutoTokenizer.from_pretrained(folder), common)
    truth, rephrased, own = (measured[name] for name in MBPP_FILES)
    assert own.mean < rephrased.mean < truth.mean
    assert own.quantiles[0.5] < rephrased.quantiles[0.5] < truth.quantiles[0.5]

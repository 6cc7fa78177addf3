"""`stm_strategy: difference` and `hybrid`: what two models' scores mask, against naive loops in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm_plugin.options import STMOptions
from stm_plugin.selection import deciding_scores, mask_labels

IGNORE = -100
scores = st.lists(
    st.tuples(
        st.floats(0, 20, width=32) | st.sampled_from([0.0, math.inf]),
        st.floats(0, 20, width=32) | st.sampled_from([0.0, math.inf]),
    ),
    max_size=12,
)


def naive(nll, tuned_nll, strategy, threshold):
    """The definitions, token by token, as perplexities in float64."""
    masked = []
    for one, other in zip(nll, tuned_nll, strict=True):
        before, after = np.exp(np.float64([one, other]))
        if strategy == "difference":
            masked.append(after > before and after - before > threshold)
        else:
            masked.append(before > threshold or other > one)  # exp would round tiny differences away
    return masked


def near(nll, tuned_nll, strategy, threshold):
    """Whether a token's float32 score cannot say on which side of the threshold it lies."""
    for one, other in zip(nll, tuned_nll, strict=True):
        before, after = np.exp(np.float64([one, other]))
        value = before if strategy == "hybrid" else after - before if np.isfinite(before) else math.inf
        if np.isfinite(value) and abs(value - threshold) <= 1e-5 * max(value, threshold):
            return True
    return False


@pytest.mark.parametrize("strategy", ["difference", "hybrid"])
@given(pairs=scores, threshold=st.sampled_from([1.5, 2.5, 10.0, 1e4]))
def test_what_is_masked_is_the_definition(strategy, pairs, threshold):
    nll, tuned_nll = (np.array(side, dtype=np.float32) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    if near(nll, tuned_nll, strategy, threshold):
        return
    decided = deciding_scores(nll, tuned_nll, strategy)
    assert decided.dtype == np.float32
    assert (decided.astype(np.float64) > math.log(threshold)).tolist() == naive(nll, tuned_nll, strategy, threshold)


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0, 2.5])
def test_a_difference_may_be_below_one(threshold):
    nll = np.log(np.float32([1.0, 2.0, 2.0, 7.0, 3.0]))
    tuned = np.log(np.float32([1.3, 2.6, 1.9, 9.0, 3.0]))
    labels = [9, 5, 6, 7, 8]
    expected = [9] + [
        IGNORE if 1 < threshold + 1 < 1 + after - before else label
        for label, before, after in zip(labels[1:], [2.0, 2.0, 7.0, 3.0], [2.6, 1.9, 9.0, 3.0], strict=True)
    ]
    assert mask_labels(labels, nll, tuned_nll=tuned, strategy="difference", threshold=threshold) == expected


@pytest.mark.parametrize("strategy", ["difference", "hybrid"])
def test_an_infinite_threshold_masks_nothing(strategy):
    nll, tuned = np.float32([0, 1, 2, 3]), np.float32([0, 4, 1, 9])
    assert mask_labels([1, 2, 3, 4], nll, tuned_nll=tuned, strategy=strategy, threshold=math.inf) == [1, 2, 3, 4]


def test_hybrid_masks_what_high_masks_and_what_became_more_perplexing():
    nll = np.log(np.float32([1, 3.0, 1.2, 1.2, 2.4]))
    tuned = np.log(np.float32([1, 1.1, 1.3, 1.1, 2.4]))
    assert mask_labels([1, 2, 3, 4, 5], nll, tuned_nll=tuned, strategy="hybrid") == [1, IGNORE, IGNORE, 4, 5]


def test_the_score_of_a_difference_is_its_logarithm_even_where_both_are_large():
    nll, tuned = np.float32([800.0, 0.0, 1e-3, 5.0]), np.float32([801.0, 1e-3, 0.0, 5.0])
    decided = deciding_scores(nll, tuned, "difference")
    assert decided[0] == pytest.approx(800 + math.log(math.e - 1), rel=1e-6)
    assert decided[1] == pytest.approx(math.log(math.expm1(float(np.float32(1e-3)))), rel=1e-6)
    assert (decided[2:] < math.log(1e-300)).all(), "no difference exceeds any threshold"


@pytest.mark.parametrize(
    ("strategy", "tuned", "message"),
    [
        ("difference", None, "needs the scores of a tuned model"),
        ("high", np.zeros(3, np.float32), "has no use for the scores of a tuned model"),
        ("hybrid", np.zeros(2, np.float32), "of the same tokens"),
        ("hybrid", np.float32([0, math.nan, 0]), "NaN"),
    ],
)
def test_scores_that_do_not_belong_to_the_strategy(strategy, tuned, message):
    with pytest.raises(ValueError, match=message):
        deciding_scores(np.zeros(3, np.float32), tuned, strategy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stm_strategy": "difference"}, "Set stm_tuned_model to its path or id"),
        ({"stm_tuned_model": "tuned"}, "stm_tuned_model='tuned' has no effect while stm_strategy is 'high'"),
        ({"stm_strategy": "hybrid", "stm_tuned_model": ""}, "must be the path or id of a model or adapter, got ''"),
        ({"stm_strategy": "hybrid", "stm_tuned_model": 3}, "must be the path or id of a model or adapter, got 3"),
        (
            {"stm_strategy": "hybrid", "stm_tuned_model": "t", "stm_mask_fraction": 0.2},
            "stm_mask_fraction=0.2 has no meaning for stm_strategy='hybrid'",
        ),
        (
            {"stm_strategy": "difference", "stm_tuned_model": "t", "stm_reference": "current"},
            "stm_reference is 'current'. Set stm_reference to 'initial'",
        ),
        (
            {"stm_strategy": "hybrid", "stm_tuned_model": "t", "stm_reference": "some/model"},
            "stm_reference is 'some/model'. Set stm_reference to 'initial'",
        ),
        ({"stm_strategy": "hybrid", "stm_tuned_model": "t", "stm_threshold": 1.0}, "a number greater than 1"),
        (
            {"stm_strategy": "difference", "stm_tuned_model": "t", "stm_threshold": 0.0},
            "a difference of perplexities, a number greater than 0",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        STMOptions(**options).check()


def test_good_options():
    for options in ({"stm_threshold": 0.5}, {"stm_mask_fraction": 0.2}, {}):
        STMOptions(stm_strategy="difference", stm_tuned_model="tuned", **options).check()
    STMOptions(stm_strategy="hybrid", stm_tuned_model="tuned", stm_threshold=3.0).check()


# --- Through TRL's trainer ------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("trl", reason="trl is not installed")

from peft import LoraConfig, get_peft_model
from trl_helpers import (
    CountTokens,
    RecordingSTM,
    one_thread,  # noqa: F401
    oracle_nll,
    plain_trainer,
    stm_trainer,
)

from stm_plugin.cli import main
from stm_plugin.inspection.scored import read_scored

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def tuned(tokenizer, make_model, tmp_path):
    """A tuned model's folder, and the model itself: the initial one with a changed last layer."""
    model = make_model()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.model.layers[-1].parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "tuned"), model


def train(model, rows, tokenizer, folder, trainer=None, **options):
    options = {"max_length": None, "max_steps": 2} | options
    made = stm_trainer(model, rows, tokenizer, folder, trainer, trainer_class=RecordingSTM, **options)
    made.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return made


def expected_labels(plain, nll, tuned_nll, strategy, threshold):
    """Final labels by the naive loop, and the share that is masked."""
    rows, count, total = [], 0, 0
    for row, ones, others in zip(plain, nll, tuned_nll, strict=True):
        labels = list(row["labels"]) if "labels" in row else list(row["input_ids"])
        positions = [t for t, value in enumerate(ones) if not math.isnan(value)]
        masked = naive([ones[t] for t in positions], [others[t] for t in positions], strategy, threshold)
        for t, is_masked in zip(positions, masked, strict=True):
            if is_masked:
                labels[t] = IGNORE
        rows.append(labels)
        count, total = count + sum(masked), total + len(positions)
    return rows, count / total


@pytest.mark.parametrize(("strategy", "threshold"), [("difference", 40.0), ("hybrid", 300.0)])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_labels_are_the_naive_loops(strategy, threshold, kind, tuned, tokenizer, make_model, chats, tmp_path):
    path, tuned_model = tuned
    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", max_length=None).train_dataset
    keywords = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    options = {"stm_threshold": threshold, "stm_strategy": strategy, "stm_tuned_model": path}
    trainer = train(make_model(), chats, tokenizer, tmp_path / "run", keywords, **options)
    nll, tuned_nll = oracle_nll(plain, make_model()), oracle_nll(plain, tuned_model)
    labels, share = expected_labels(plain, nll, tuned_nll, strategy, threshold)
    assert 0.05 < share < 0.95
    assert [list(row) for row in trainer.train_dataset["labels"]] == labels
    receipt = json.loads((tmp_path / "run" / "stm.json").read_text())
    assert (receipt["strategy"], receipt["tuned_model"]) == (strategy, path)
    assert receipt["tuned_scores_key"]["model"] != receipt["scores_key"]["model"]
    assert receipt["tuned_scores_key"]["data"] == receipt["scores_key"]["data"]
    assert receipt["masked_fraction"] == pytest.approx(share)
    data = read_scored(tmp_path / "run")
    assert data.masks().num_masked == receipt["masked_tokens"]
    assert np.abs(data.tuned_nll - trainer._stm_run.tuned_nll).max() == 0


def test_an_adapter_as_tuned_model(tokenizer, make_model, chats, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(**LORA | {"init_lora_weights": False}))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", max_length=None).train_dataset
    options = {"stm_strategy": "hybrid", "stm_tuned_model": str(tmp_path / "adapter"), "stm_threshold": 3e3}
    trainer = train(make_model(), chats, tokenizer, tmp_path / "run", **options)
    tuned_nll = oracle_nll(plain, adapted.merge_and_unload())
    labels, share = expected_labels(plain, oracle_nll(plain, make_model()), tuned_nll, "hybrid", 3e3)
    assert 0.05 < share < 0.95
    assert [list(row) for row in trainer.train_dataset["labels"]] == labels


def test_scores_are_kept_and_thresholds_applied_when_read(
    tuned, tokenizer, make_model, chats, tmp_path, capsys, monkeypatch
):
    path, _ = tuned
    options = {"stm_strategy": "difference", "stm_tuned_model": path}
    trainer = train(make_model(), chats, tokenizer, tmp_path / "first", stm_threshold=40.0, **options)
    model = make_model()
    with CountTokens(model) as passes:
        made = stm_trainer(
            model, chats, tokenizer, tmp_path / "second", max_length=None, stm_mask_fraction=0.2, **options
        )
        run = made.stm_score()
    assert passes.calls == 0, "both models' scores are there"
    assert 0.15 < run.receipt["masked_fraction"] <= 0.2
    assert run.key == trainer._stm_run.key
    high = stm_trainer(make_model(), chats, tokenizer, tmp_path / "third", max_length=None, stm_threshold=40.0)
    assert high.stm_score().key == run.key, "the initial model's scores are those of every strategy"
    source = str(tmp_path / "first")
    for strategy in ("difference", "hybrid", "high", "low"):
        for command in (["sweep", source], ["inspect", source, "--random", "1"]):
            assert main([*command, "--stm_strategy", strategy]) == 0
        assert main(["report", source, "--stm_strategy", strategy, "--out", str(tmp_path / f"{strategy}.html")]) == 0
    capsys.readouterr()
    assert main(["sweep", source, "--json", "--thresholds", "40"]) == 0
    swept = json.loads(capsys.readouterr().out)
    assert swept["thresholds"][0]["masked_tokens"] == trainer._stm_run.receipt["masked_tokens"]
    (tmp_path / "third").mkdir(exist_ok=True)
    high.train()
    high.save_model(str(tmp_path / "third"))
    assert main(["inspect", str(tmp_path / "third"), "--stm_strategy", "hybrid"]) == 1
    assert "which this run did not make" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_masks_and_makes_the_tuned_scores_again(tuned, tokenizer, make_model, chats, tmp_path):
    import shutil

    path, _ = tuned
    options = {
        "stm_strategy": "difference",
        "stm_tuned_model": path,
        "stm_threshold": 40.0,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = train(make_model(), chats, tokenizer, tmp_path / "run", max_steps=4, **options)
    shutil.rmtree(whole._stm_run.receipt["tuned_scores_entry"])
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = stm_trainer(make_model(), chats, tokenizer, tmp_path / "run", max_length=None, max_steps=4, **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert again._stm_run.receipt["mask_digest"] == whole._stm_run.receipt["mask_digest"]
    assert all(
        torch.equal(one, other)
        for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    other = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path / "run",
        max_length=None,
        max_steps=4,
        **options | {"stm_strategy": "high", "stm_tuned_model": None},
    )
    with pytest.raises(ValueError, match="trained with strategy='difference', this run has 'high'"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_tuned_model_that_is_the_initial_one_is_refused(tokenizer, make_model, chats, tmp_path):
    make_model().save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    made = stm_trainer(
        make_model(),
        chats,
        tokenizer,
        tmp_path / "run",
        max_length=None,
        stm_strategy="hybrid",
        stm_tuned_model=str(tmp_path / "same"),
    )
    with pytest.raises(ValueError, match="computes exactly what the model in training does"):
        made.train()


@pytest.mark.parametrize("norms", ["torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_tuned_model_computes_in_dtypes_and_attention_of_the_one_in_training(
    attention, norms, tokenizer, make_model, chats, tmp_path
):
    """In bfloat16, rounding alone would decide about many tokens: those that the change hardly touches.

    Hosts make norms float32, those of a quantized model for one, and train such a model with autocast.
    """
    from transformers import AutoModelForCausalLM

    make_model().save_pretrained(tmp_path / "initial")
    other = make_model()
    with torch.no_grad():  # the row of a token that is nowhere
        other.lm_head.weight[1] += 50.0 * torch.sign(other.lm_head.weight[1])
    tokenizer.save_pretrained(tmp_path / "initial")
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    keywords = {"dtype": torch.bfloat16, "attn_implementation": attention}
    initial, tuned_model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, **keywords) for name in ("initial", "other")
    )
    autocast = norms == "torch.float32"
    if autocast:
        for module in [*initial.modules(), *tuned_model.modules()]:
            if type(module).__name__.endswith("Norm"):
                module.float()
    options = {"stm_strategy": "hybrid", "stm_threshold": 1e30, "stm_tuned_model": Path(tmp_path / "other")}
    made = stm_trainer(
        initial, chats, tokenizer, tmp_path / "run", max_length=None, stm_tokens_per_batch=1, bf16=autocast, **options
    )
    run = made.stm_score()
    assert run.tuned_key.dtype == run.key.dtype == ",".join(sorted({"torch.bfloat16", norms}))
    assert json.loads(made.args.to_json_string())["stm_tuned_model"] == str(tmp_path / "other")
    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", max_length=None).train_dataset

    def logits_of(model):
        def logits(ids):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

        return logits

    ours = [oracle_nll(plain, logits_of=logits_of(model)) for model in (initial, tuned_model)]
    flat = [np.array([value for row in nll for value in row if not math.isnan(value)], np.float32) for nll in ours]
    assert run.masks.num_masked == int((flat[1] > flat[0]).sum())


def test_what_is_said_of_masks_by_two_models(tuned, tokenizer, make_model, chats, tmp_path, capsys, caplog):
    path, _ = tuned
    options = {"stm_strategy": "difference", "stm_tuned_model": path, "stm_threshold": 40.0}
    with caplog.at_level("INFO"):
        trainer = train(make_model(), chats, tokenizer, tmp_path / "run", **options)
    said = f"those whose perplexity under {path} exceeds the initial model's by more than 40.0"
    assert said in caplog.text
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"whose perplexity under {path} exceeds the initial model's by more than 40 (" in capsys.readouterr().out
    assert main(["sweep", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    median = float(np.exp(np.quantile(trainer._stm_run.nll.astype(np.float64), 0.5, method="lower")))
    assert f"50% {median:.3g}" in text
    assert "(difference)" in text


def test_a_tuned_model_that_cannot_be_used(tuned, tokenizer, make_model, chats, tmp_path):
    options = {"stm_strategy": "hybrid", "max_length": None}
    with pytest.raises(ValueError, match=r"stm_tuned_model='.*nowhere' is not a model that can be loaded"):
        stm_trainer(
            make_model(), chats, tokenizer, tmp_path / "a", stm_tuned_model=str(tmp_path / "nowhere"), **options
        )
    path, _ = tuned
    wide = make_model(hidden_size=64)
    get_peft_model(wide, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": path}))
    made = stm_trainer(
        make_model(), chats, tokenizer, tmp_path / "c", stm_tuned_model=str(tmp_path / "adapter"), **options
    )
    with pytest.raises(ValueError, match=r"stm_tuned_model=.*adapter' .* an adapter that does not fit its base"):
        made.train()
    swapped = json.loads((tmp_path / "tuned" / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (tmp_path / "tuned" / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"stm_tuned_model=.* has another tokenizer than the model in training"):
        stm_trainer(make_model(), chats, tokenizer, tmp_path / "b", stm_tuned_model=path, **options)


def test_a_tuned_model_in_four_bits_like_the_one_in_training(tokenizer, make_model, chats, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    get_peft_model(base, LoraConfig(**LORA | {"init_lora_weights": False})).save_pretrained(tmp_path / "adapter")

    def loaded():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )

    trainer = train(
        loaded(),
        chats,
        tokenizer,
        tmp_path / "run",
        {"peft_config": LoraConfig(**LORA)},
        stm_strategy="hybrid",
        stm_tuned_model=str(tmp_path / "adapter"),
        stm_threshold=300.0,
        stm_tokens_per_batch=1,
    )
    run = trainer._stm_run
    assert run.tuned_key.quantization == run.key.quantization != "none"
    from peft import PeftModel

    plain = plain_trainer(make_model(), chats, tokenizer, tmp_path / "plain", max_length=None).train_dataset
    oracle = PeftModel.from_pretrained(loaded(), str(tmp_path / "adapter")).eval()
    for module in oracle.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True  # or its weights would be packed anew, and give other numbers

    def logits(ids):
        with torch.no_grad():
            return oracle(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    flat = [value for row in oracle_nll(plain, logits_of=logits) for value in row if not math.isnan(value)]
    assert np.abs(run.tuned_nll - np.array(flat)).max() < 1e-4

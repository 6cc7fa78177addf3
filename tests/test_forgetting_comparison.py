"""TI, BWT, their intervals and the verdict, against naive loops, closed forms and the paper's own figures."""

import json
import math
import random
import re

import numpy as np
import pytest
from forgetting_helpers import results_of, write_results

from stm_plugin.forgetting.bootstrap import (
    Interval,
    paired_changes,
    percentile_interval,
    relative_change,
    standard_error,
)
from stm_plugin.forgetting.comparison import EXIT_STATUS, FORGETS, UNDECIDED, WITHIN, compare
from stm_plugin.forgetting.evaluation import NOT_THE_MEAN, Evaluation, TaskScore, evaluation_of, read_evaluation
from stm_plugin.forgetting.tables import as_json, markdown, percent, sentences, table
from stm_plugin.tasks import KINDS, definition

PAPER_BEFORE = {"mbpp": 0.5106, "math": 0.281, "arc": 0.7466, "gsm8k": 0.5845}
PAPER_AFTER = {"mbpp": 0.5106, "math": 0.298, "arc": 0.7585, "gsm8k": 0.5641}
PAPER_COUNTS = {"mbpp": 500, "math": 5000, "arc": 1172, "gsm8k": 1319}


def evaluation(scores, counts=None, model="model", **more):
    """An evaluation without samples."""
    counts = counts or {}
    tasks = {task: TaskScore(task, "acc", score, counts.get(task, 0), **more) for task, score in scores.items()}
    return Evaluation(model, tasks, {})


def sampled(**tasks):
    """An evaluation from scores of documents."""
    return evaluation_of(results_of({task: {"acc": list(values)} for task, values in tasks.items()}))


def answers(rng, num, before, worse, better):
    """Right (1) and wrong (0) answers before and after, with exact shares; in a random order."""
    right = round(num * before)
    lost, won = round(num * worse), round(num * better)
    pairs = [(1, 0)] * lost + [(1, 1)] * (right - lost) + [(0, 1)] * won + [(0, 0)] * (num - right - won)
    rng.shuffle(pairs)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# TI and BWT.


@pytest.mark.parametrize("counts", [{}, PAPER_COUNTS])
def test_the_papers_raw_scores_give_its_values(counts):
    before, after = evaluation(PAPER_BEFORE, counts), evaluation(PAPER_AFTER, counts)
    comparison = compare(before, after, ["mbpp"], ["math", "arc", "gsm8k"])
    assert f"{comparison.ti.value:.2%} {comparison.bwt.value:.2%}" == "0.00% 1.38%"
    assert (comparison.bwt.interval is None) == (not counts)
    assert comparison.verdict == UNDECIDED
    assert not any(task.paired for task in comparison.tasks)
    assert "BWT (mean relative change of the scores on the non-target tasks): +1.38 %" in markdown(comparison)


def test_ti_and_bwt_are_means_of_ratios_of_means():
    rng = np.random.default_rng(3)
    tables = [
        {task: rng.random(size) for task, size in zip("abcde", (7, 12, 30, 5, 9), strict=True)} for _ in range(2)
    ]
    comparison = compare(*(sampled(**one) for one in tables), ["a", "b"], ["c", "d", "e"])

    def naive(tasks):
        total = 0.0
        for task in tasks:
            before = sum(tables[0][task]) / len(tables[0][task])
            after = sum(tables[1][task]) / len(tables[1][task])
            total += (after - before) / before
        return total / len(tasks)

    assert comparison.ti.value == pytest.approx(naive("ab"), rel=1e-12)
    assert comparison.bwt.value == pytest.approx(naive("cde"), rel=1e-12)
    assert [task.task for task in comparison.tasks] == list("abcde")
    assert [task.is_target for task in comparison.tasks] == [True, True, False, False, False]


# Intervals.


def naive_ratios(before, after, num, seed):
    """Resampled relative changes, document by document, with the two that are added."""
    mean = sum(before) / len(before)
    pairs = [*zip(before, after, strict=True), (mean, mean - 1), (mean, mean + 1)]
    draw = random.Random(seed)
    for _ in range(num):
        drawn = [draw.choice(pairs) for _ in pairs]
        first, second = sum(pair[0] for pair in drawn), max(0, sum(pair[1] for pair in drawn))
        yield (second - first) / first if first else (0 if second == 0 else math.inf)


def test_relative_change_of_nothing():
    change = relative_change(np.array([0.0, 0.0, 0.5, 0.5]), np.array([0.0, 0.2, 0.0, 0.75]))
    assert change.tolist() == [0.0, math.inf, -1.0, 0.5]


def test_percentiles_stand_infinite_values():
    values = np.array([*range(990), *[math.inf] * 10], dtype=float)
    assert percentile_interval(values, 0.9) == Interval(49.0, 950.0)
    assert percentile_interval(values, 0.99) == Interval(4.0, math.inf)


@pytest.mark.parametrize("fractional", [False, True])
def test_paired_interval_is_that_of_a_naive_bootstrap(fractional):
    draw = random.Random(1)
    before, after = answers(draw, 60, 0.5, 0.15, 0.05)
    if fractional:
        before = [value * draw.random() for value in before]
        after = [value * draw.random() for value in after]
    ratios = np.array(list(naive_ratios(before, after, 20_000, 2)))
    comparison = compare(sampled(a=before), sampled(a=after), ["a"], [], num_resamples=20_000)
    expected = percentile_interval(ratios, 0.95)
    assert comparison.ti.interval == pytest.approx(expected, abs=0.02)  # some five errors of the quantiles
    assert comparison.tasks[0].interval == comparison.ti.interval
    other = compare(sampled(a=before), sampled(a=after), ["a"], [], num_resamples=20_000, confidence=0.6)
    assert other.ti.interval == pytest.approx(percentile_interval(ratios, 0.6), abs=0.01)


def test_paired_interval_of_many_documents_is_that_of_the_normal_approximation():
    before, after = answers(random.Random(4), 20_000, 0.6, 0.08, 0.05)
    b, a = np.array(before), np.array(after)
    ratio = a.mean() / b.mean()
    error = (a - ratio * b).std() / len(b) ** 0.5 / b.mean()  # delta method
    interval = compare(sampled(a=before), sampled(a=after), ["a"], []).ti.interval
    assert interval == pytest.approx((ratio - 1 - 1.96 * error, ratio - 1 + 1.96 * error), abs=0.15 * error)


def test_interval_of_bwt_takes_tasks_as_independent():
    draw = random.Random(5)
    tasks = {"a": answers(draw, 5000, 0.5, 0.1, 0.05), "b": answers(draw, 3000, 0.3, 0.05, 0.05)}
    comparison = compare(*(sampled(**{t: p[i] for t, p in tasks.items()}) for i in (0, 1)), [], ["a", "b"])
    widths = [task.interval.high - task.interval.low for task in comparison.tasks]
    assert comparison.bwt.interval.high - comparison.bwt.interval.low == pytest.approx(
        math.hypot(*widths) / 2, rel=0.04
    )
    # Were the same numbers drawn for both tasks, equal tasks would have BWT's interval as their own.
    twins = compare(sampled(a=tasks["a"][0], b=tasks["a"][0]), sampled(a=tasks["a"][1], b=tasks["a"][1]), [], "ab")
    width = twins.tasks[0].interval.high - twins.tasks[0].interval.low
    assert twins.bwt.interval.high - twins.bwt.interval.low == pytest.approx(width / 2**0.5, rel=0.04)


def test_pairing_makes_the_interval_narrower():
    before, after = answers(random.Random(6), 1000, 0.5, 0.02, 0.02)
    paired = compare(sampled(a=before), sampled(a=after), ["a"], []).tasks[0]
    unpaired = compare(evaluation({"a": 0.5}, {"a": 1000}), evaluation({"a": 0.5}, {"a": 1000}), ["a"], []).tasks[0]
    assert paired.paired
    assert not unpaired.paired
    assert unpaired.note.startswith("not paired")
    assert (paired.num_worse, paired.num_better, unpaired.num_worse) == (20, 20, None)
    assert unpaired.interval.high - unpaired.interval.low > 3 * (paired.interval.high - paired.interval.low)


def test_unpaired_interval_is_that_of_the_normal_approximation():
    before, after = (TaskScore("a", "acc", score, 0, stderr=error) for score, error in ((0.6, 0.004), (0.5, 0.003)))
    comparison = compare(*(Evaluation("m", {"a": score}, {}) for score in (before, after)), ["a"], [])
    error = math.hypot(0.003 / 0.6, 0.5 * 0.004 / 0.6**2)
    assert comparison.ti.interval == pytest.approx((-1 / 6 - 1.96 * error, -1 / 6 + 1.96 * error), abs=0.1 * error)


def test_standard_errors():
    assert standard_error(0.3, 0, 0.02) == 0.02
    assert standard_error(0.3, 10_000, None) == pytest.approx((0.21 / 10_000) ** 0.5, rel=1e-3)
    assert standard_error(1.0, 20, 0.0) == pytest.approx(
        (22 / 24 * 2 / 24 / 24) ** 0.5
    )  # of 20 right, none is certain
    assert standard_error(0.3, 0, None) is None
    assert standard_error(42.0, 100, None) is None


def test_a_score_that_is_no_mean_has_no_error_by_its_count():
    before = Evaluation("m", {"a": TaskScore("a", "f1", 0.6, 100, why_no_samples=NOT_THE_MEAN)}, {})
    comparison = compare(before, before, [], ["a"])
    assert comparison.bwt.interval is None
    assert comparison.why == "there is no interval without the documents' scores or a standard error of a"
    assert "no interval: the metric is not the mean" in comparison.notes[0]


def test_few_documents_without_a_change_are_no_certainty():
    few = compare(sampled(a=[1, 0] * 10), sampled(a=[1, 0] * 10), [], ["a"], max_forgetting=0.05)
    many = compare(sampled(a=[1, 0] * 500), sampled(a=[1, 0] * 500), [], ["a"], max_forgetting=0.05)
    assert few.bwt.value == many.bwt.value == 0
    assert few.verdict == UNDECIDED
    assert few.bwt.interval.low < -0.2
    assert many.verdict == WITHIN
    # 1 of 10 lost, seen on 20 documents, often shows no change at all: the interval must not exclude it.
    assert few.bwt.interval.low < -0.1


def test_intervals_depend_on_the_seed_and_on_no_other_task():
    before, after = answers(random.Random(7), 200, 0.5, 0.1, 0.05)
    one = compare(sampled(a=before), sampled(a=after), ["a"], [])
    two = compare(sampled(b=after, a=before), sampled(b=before, a=after), ["b"], ["a"])
    assert one.tasks[0].interval == two.tasks[1].interval
    assert one == compare(sampled(a=before), sampled(a=after), ["a"], [])
    assert one.ti.interval != compare(sampled(a=before), sampled(a=after), ["a"], [], seed=1).ti.interval


def test_resamples_are_cut_into_parts_that_fit(monkeypatch):
    before, after = (np.random.default_rng(seed).random(50) for seed in (0, 1))
    monkeypatch.setattr("stm_plugin.forgetting.bootstrap._CELLS_PER_CHUNK", 300)
    changes = paired_changes(before, after, 4003, np.random.default_rng(2))
    assert len(changes) == 4003
    assert np.isfinite(changes).all()
    assert changes.mean() == pytest.approx(after.mean() / before.mean() - 1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("worse", "better"), [(0.05, 0.0), (0.06, 0.06), (0.15, 0.05)])
@pytest.mark.parametrize("num", [20, 100, 400])
def test_95_of_100_intervals_hold_the_true_value(num, worse, better):
    rng = np.random.default_rng(8)
    right, hits, runs = 0.5, 0, 1000
    for _ in range(runs):
        counts = rng.multinomial(num, [right - worse, worse, better, 1 - right - better])
        before, after = np.repeat([1.0, 1, 0, 0], counts), np.repeat([1.0, 0, 1, 0], counts)
        low, high = percentile_interval(paired_changes(before, after, 1000, rng), 0.95)
        hits += low <= (better - worse) / right <= high
    assert hits / runs >= 0.93


# A score of 0.


def test_a_zero_before_score_is_reported_and_left_out():
    before, after = sampled(a=[0] * 30, b=[1, 0] * 50), sampled(a=[1] * 30, b=[1, 0, 0, 0] * 25)
    comparison = compare(before, after, [], ["a", "b"])
    zero = comparison.tasks[0]
    assert (zero.change, zero.interval, zero.before, zero.after) == (None, None, 0.0, 1.0)
    assert (zero.num_worse, zero.num_better) == (0, 30)
    assert comparison.bwt.value == pytest.approx(-0.5)
    assert comparison.bwt.num_tasks == 1
    assert comparison.notes[0] == "a: the initial score is 0, so no ratio to it is defined; left out of BWT."
    assert "| a | non-target | acc | 30 | 0.0000 | 1.0000 | undefined | - | 0 / 30 |" in table(comparison)


def test_nothing_but_zero_before_scores():
    comparison = compare(sampled(a=[0] * 9), sampled(a=[1] * 9), [], ["a"], max_forgetting=0.1)
    assert (comparison.bwt.value, comparison.bwt.interval) == (None, None)
    assert (comparison.verdict, comparison.exit_status) == (UNDECIDED, 4)
    assert comparison.why == "the initial model scores 0 on every non-target task"


def test_json_holds_no_infinity_and_no_nan():
    comparison = compare(sampled(a=[0] * 9, b=[1, 0]), sampled(a=[1] * 9, b=[1, 1]), ["a"], ["b"])
    endless = comparison.bwt._replace(interval=Interval(-0.5, math.inf))
    facts = as_json(comparison._replace(bwt=endless))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["bwt"] == {"value": 1.0, "interval": [-0.5, "inf"], "num_tasks": 1}
    assert facts["ti"] == {"value": None, "interval": None, "num_tasks": 0}
    assert facts["tasks"][0]["change"] is None
    assert "+inf" in table(comparison._replace(bwt=endless))


# Verdicts.


@pytest.mark.parametrize(
    ("worse", "better", "num", "limit", "verdict", "status"),
    [
        (0.10, 0.01, 2000, 0.05, FORGETS, 3),
        (0.10, 0.01, 2000, None, FORGETS, 0),
        (0.10, 0.01, 2000, 0.50, WITHIN, 0),
        (0.01, 0.01, 2000, 0.05, WITHIN, 0),
        (0.01, 0.01, 2000, 0.0, UNDECIDED, 4),
        (0.01, 0.01, 2000, None, UNDECIDED, 0),
        (0.01, 0.10, 2000, 0.0, WITHIN, 0),
        (0.10, 0.05, 40, 0.05, UNDECIDED, 4),
    ],
)
def test_verdict_and_exit_status(worse, better, num, limit, verdict, status):
    before, after = answers(random.Random(9), num, 0.5, worse, better)
    comparison = compare(sampled(a=before), sampled(a=after), [], ["a"], max_forgetting=limit)
    low, high = comparison.bwt.interval
    bound = -(limit or 0)
    assert verdict == (FORGETS if high < bound else WITHIN if low >= bound else UNDECIDED)
    assert (comparison.verdict, comparison.exit_status) == (verdict, status)
    assert comparison.verdict in sentences(comparison)[-1]


def test_statuses_are_apart_from_errors():
    assert EXIT_STATUS == {WITHIN: 0, FORGETS: 3, UNDECIDED: 4}


def test_as_many_documents_as_it_asks_for_decide():
    before, after = answers(random.Random(10), 100, 0.5, 0.06, 0.06)
    comparison = compare(sampled(a=before), sampled(a=after), [], ["a"], max_forgetting=0.05)
    words = comparison.why.split(" about ")[1].split()
    factor, asked = float(words[0]), int(words[words.index("documents") + 3].replace(",", ""))
    assert asked == pytest.approx(100 * factor, rel=0.11)
    error = (0.06 + 0.06 + 0.02) ** 0.5 / 102**0.5 / 0.5  # of the ratio, with the two added documents
    assert factor == pytest.approx((1.96 * error / 0.05) ** 2, rel=0.15)
    times = math.ceil(factor * 1.2)
    more = compare(sampled(a=before * times), sampled(a=after * times), [], ["a"], max_forgetting=0.05)
    fewer = compare(sampled(a=before * (times // 3)), sampled(a=after * (times // 3)), [], ["a"], max_forgetting=0.05)
    assert (fewer.verdict, more.verdict) == (UNDECIDED, WITHIN)


def test_a_value_at_the_limit_names_no_number():
    comparison = compare(sampled(a=[1, 0] * 30), sampled(a=[0, 1] * 30), [], ["a"], max_forgetting=0)
    assert comparison.why.endswith("too close to it to say how many documents would decide")


def test_a_task_that_the_mean_hides_is_named():
    draw = random.Random(11)
    lost, won = answers(draw, 1000, 0.5, 0.2, 0), answers(draw, 1000, 0.5, 0, 0.3)
    comparison = compare(sampled(a=lost[0], b=won[0]), sampled(a=lost[1], b=won[1]), [], "ab", max_forgetting=0.05)
    assert comparison.verdict == WITHIN
    assert [note for note in comparison.notes if note.startswith("a alone falls below")]
    assert not [note for note in comparison.notes if note.startswith("b ")]


def test_without_non_target_tasks():
    comparison = compare(sampled(a=[1, 0]), sampled(a=[1, 1]), ["a"], [])
    assert (comparison.verdict, comparison.why) == (UNDECIDED, "no non-target task was named")


# What cannot be compared.


def test_missing_tasks():
    with pytest.raises(ValueError, match=r"the tuned model has no score of b\. It has: a\."):
        compare(sampled(a=[1], b=[1]), sampled(a=[1]), ["a"], ["b"])
    with pytest.raises(ValueError, match="There is no task to compare"):
        compare(sampled(a=[1]), sampled(a=[1]), [], [])


@pytest.mark.parametrize(("target", "non_target"), [("a", "a"), ("aa", ""), ("", "aba")])
def test_a_task_counts_once(target, non_target):
    with pytest.raises(ValueError, match="a is named twice"):
        compare(sampled(a=[1], b=[1]), sampled(a=[1], b=[1]), target, non_target)


def test_other_documents():
    before = results_of({"a": {"acc": [1, 0, 1]}})
    after = results_of({"a": {"acc": [1, 0, 1]}}, docs={"a": ["0", "1", "another"]})
    with pytest.raises(ValueError, match="different documents: 1 of 3 before are not among those after, and 1 of 3"):
        compare(evaluation_of(before), evaluation_of(after), ["a"], [])


def test_another_limit():
    with pytest.raises(ValueError, match=r"a was evaluated on 3 documents before and 2 after.*--limit"):
        compare(sampled(a=[1, 0, 1]), sampled(a=[1, 0]), ["a"], [])
    with pytest.raises(ValueError, match="500 documents before and 400 after"):
        compare(evaluation({"a": 0.5}, {"a": 500}), evaluation({"a": 0.5}, {"a": 400}), ["a"], [])


def test_lower_is_better():
    results = results_of({"a": {"word_perplexity": [3.0, 2.0]}})
    results["higher_is_better"]["a"]["word_perplexity"] = False
    with pytest.raises(ValueError, match="word_perplexity of a is better when lower"):
        compare(evaluation_of(results), evaluation_of(results), ["a"], [])


@pytest.mark.parametrize("said", [{}, {"a": {}}, {"a": {"word_perplexity": None}}], ids=["nothing", "less", "null"])
def test_results_that_do_not_say_which_way_is_better(said):
    lower, other = (results_of({"a": {metric: [3.0, 2.0]}}) for metric in ("word_perplexity", "quality"))
    lower["higher_is_better"] = other["higher_is_better"] = said
    with pytest.raises(ValueError, match="word_perplexity of a is better when lower"):
        compare(evaluation_of(lower), evaluation_of(lower), ["a"], [])
    (note,) = compare(evaluation_of(other), evaluation_of(other), ["a"], []).notes
    assert note == "a: the results do not say whether a higher quality is better; taken as if it were."


def test_a_group_with_a_part_that_is_better_when_lower():
    results = group_results()
    results["higher_is_better"] |= {"mmlu": {"acc": None}, "mmlu_art": {"acc": False}}
    with pytest.raises(ValueError, match="acc of mmlu is better when lower"):
        compare(evaluation_of(results), evaluation_of(results), ["mmlu"], [])
    results["higher_is_better"]["mmlu_art"] = {"acc": True}
    assert compare(evaluation_of(results), evaluation_of(results), ["mmlu"], []).notes == ()


def test_other_metrics_and_settings():
    one, two = results_of({"a": {"acc": [1, 0]}}), results_of({"a": {"acc_norm": [1, 0]}})
    with pytest.raises(ValueError, match=r"a has acc before and acc_norm after.*--metric"):
        compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    for name in ("system_instruction", "fewshot_as_multiturn"):
        one, two = results_of({"a": {"acc": [1, 0]}}), results_of({"a": {"acc": [1, 0]}})
        one[name], two[name] = None, "Be brief." if name == "system_instruction" else True
        one["lm_eval_version"] = "0.4.12"
        with pytest.raises(ValueError, match=f"differently: {name} is not set before and .*(Be brief.|true).* after"):
            compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    one = results_of({"a": {"acc": [1, 0]}})
    two = results_of({"a": {"acc": [1, 0]}}, generation_kwargs={"do_sample": True})
    for of_one, of_two in ((one, two), (two, one)):
        with pytest.raises(
            ValueError, match=r"differently: generation_kwargs is .*not set.*Evaluate both models alike"
        ):
            compare(evaluation_of(of_one), evaluation_of(of_two), ["a"], [])
    one["lm_eval_version"] = "0.4.12"  # which may have known no such setting
    compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    for key, value, name in (("n-shot", 5, "num_fewshot"), ("versions", 2.0, "version")):
        two = results_of({"a": {"acc": [1, 0]}})
        two[key]["a"] = value
        with pytest.raises(ValueError, match=f"differently: {name} is .* before and {value} after"):
            compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    two = results_of({"a": {"acc": [1, 0]}}, generation_kwargs={"max_gen_toks": 64}, output_type="multiple_choice")
    with pytest.raises(ValueError, match='output_type is "generate_until" before and "multiple_choice" after'):
        compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    two = results_of({"a": {"acc": [1, 0]}}) | {"chat_template": ""}
    with pytest.raises(ValueError, match="chat template is applied before and not applied after"):
        compare(evaluation_of(one | {"chat_template": "{{ messages }}"}), evaluation_of(two), ["a"], [])


def test_what_does_not_make_two_things_is_no_difference():
    one, two = results_of({"a": {"acc": [1, 0]}}), results_of({"a": {"acc": [1, 0]}}, model="models/tuned")
    two["configs"]["a"]["doc_to_text"] = "<function prompt at 0x7f0087654321>"
    two["lm_eval_version"] = "0.4.11"
    for sample in two["samples"]["a"]:
        sample["prompt_hash"] = "another"
    comparison = compare(evaluation_of(one), evaluation_of(two), ["a"], [])
    assert comparison.notes == (
        "lm_eval_version is 0.4.13 before and 0.4.11 after.",
        "a: the prompts differ, as with another chat template (or one that names the date).",
    )
    assert (comparison.before_model, comparison.after_model) == ("models/initial", "models/tuned")


def test_arguments_out_of_range():
    one = sampled(a=[1, 0])
    for name, value in (("max_forgetting", 5), ("max_forgetting", -0.1), ("confidence", 95), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name} is .*got {value}"):
            compare(one, one, ["a"], [], **{name: value})
    with pytest.raises(ValueError, match="at least 1000 resamples, got 10"):
        compare(one, one, ["a"], [], num_resamples=10)
    with pytest.raises(ValueError, match="ratios of scores of at least 0"):
        compare(evaluation({"a": -1.0}), evaluation({"a": -2.0}), ["a"], [])


# Results of lm-eval.


def test_the_default_metric_is_the_first_and_others_can_be_named():
    results = results_of({"gsm8k": {"exact_match,strict-match": [1, 0, 0], "exact_match,flexible-extract": [1, 1, 0]}})
    assert evaluation_of(results).tasks["gsm8k"].metric == "exact_match,strict-match"
    for name in ("exact_match", "exact_match,strict-match"):
        score = evaluation_of(results, {"gsm8k": name}).tasks["gsm8k"]
        assert [*score.samples.values()] == [1, 0, 0]
    score = evaluation_of(results, {"gsm8k": "exact_match,flexible-extract"}).tasks["gsm8k"]
    assert (score.metric, score.num_samples, [*score.samples.values()]) == (
        "exact_match,flexible-extract",
        3,
        [1, 1, 0],
    )
    assert score.stderr == pytest.approx(1 / 3)
    with pytest.raises(
        ValueError, match=r"gsm8k has no metric 'acc'\. It has: exact_match,strict-match exact_match,fl"
    ):
        evaluation_of(results, {"gsm8k": "acc"})
    with pytest.raises(ValueError, match=r"no task 'arc'\. There are: gsm8k"):
        evaluation_of(results, {"arc": "acc"})


def test_filter_none_is_not_named_and_truth_values_count():
    results = results_of({"ifeval": {"prompt_level_strict_acc": [True, False, np.True_], "acc_norm": [1, 1, 1]}})
    score = evaluation_of(results).tasks["ifeval"]
    assert (score.metric, score.score) == ("prompt_level_strict_acc", pytest.approx(2 / 3))
    assert [*score.samples.values()] == [1.0, 0.0, 1.0]
    assert all(key.startswith(f"{i}:") and len(key) == 66 for i, key in enumerate(score.samples))


def test_several_values_a_document_are_not_paired_but_compared():
    values = [[True, False, True], [True], [False, False]]
    results = results_of({"ifeval": {"inst_level_strict_acc": values}})
    score = evaluation_of(results).tasks["ifeval"]
    assert (score.score, score.num_samples, score.samples, score.stderr) == (0.5, 3, None, None)
    comparison = compare(evaluation_of(results), evaluation_of(results), ["ifeval"], [])
    assert "several values" in comparison.notes[0]
    error = 0.5 / 7**0.5  # of 3 documents, with 2 successes and 2 failures added
    assert comparison.ti.interval.low == pytest.approx(-2 * error / 0.5, abs=0.35)


def test_a_metric_that_is_no_mean_is_not_paired():
    results = results_of({"a": {"f1": [1, 0, 1, 1]}})
    results["results"]["a"]["f1,none"] = 0.857
    score = evaluation_of(results).tasks["a"]
    assert (score.samples, score.why_no_samples) == (None, NOT_THE_MEAN)


@pytest.mark.parametrize("samples", ["none", "several values", "not the mean", "a group"])
def test_a_corpus_metric_without_a_standard_error_has_no_interval(samples):
    """F1 of a few positives among many documents says less than their number; lm-eval's N/A is not replaced."""
    values = [[1, 0], [0, 1]] * 500 if samples == "several values" else [1.0, 0.0] * 500
    both = [results_of({"cb": {"f1": values}, "b": {"f1": values}}) for _ in range(2)]
    for results, score in zip(both, (0.7368, 0.4762), strict=True):
        results["results"]["cb"] |= {"f1,none": score, "f1_stderr,none": "N/A"}
        if samples == "none":
            results["samples"] = None
        if samples == "a group":
            results["samples"] = None
            for name in ("results", "higher_is_better"):
                results[name]["all"] = {key.replace("f1", "acc"): one for key, one in results[name]["cb"].items()}
            results["group_subtasks"]["all"] = ["cb", "b"]
    task = "all" if samples == "a group" else "cb"
    comparison = compare(*map(evaluation_of, both), [], [task], max_forgetting=0.05)
    assert (comparison.bwt.interval, comparison.exit_status) == (None, 4)
    assert "and there is no standard error above 0" in comparison.notes[0]
    for results in both:
        results["results"][task] |= {key: 0.2 for key in results["results"][task] if "stderr" in key}
    low, high = compare(*map(evaluation_of, both), [], [task], max_forgetting=0.05).bwt.interval
    assert low < -0.7 < 0 < high


@pytest.mark.parametrize("kind", KINDS)
def test_local_tasks_count_successes(kind):
    """Where all documents have the same value, lm-eval's standard error is 0, and their number says what it is."""
    metric = re.search(r"^  - metric: (\S+)$", definition(kind).read_text(), re.MULTILINE)[1]
    both = [results_of({kind: {metric: [1, 0] * 100}}) for _ in range(2)]
    for results, score in zip(both, (1.0, 0.8), strict=True):
        results["results"][kind] |= {f"{metric},none": score, f"{metric}_stderr,none": 0.0}
        results["samples"] = None
    assert compare(*map(evaluation_of, both), [], [kind], max_forgetting=0.05).exit_status == 3


def test_a_score_that_is_no_number():
    for value in (math.nan, math.inf, "N/A"):
        results = results_of({"a": {"acc": [1, 0]}})
        results["results"]["a"]["acc,none"] = value
        with pytest.raises(ValueError, match=r"a has no score, acc,none is"):
            evaluation_of(results)
    results = results_of({"a": {"acc": [1, 0]}})
    results["samples"]["a"][1]["acc"] = math.nan
    with pytest.raises(ValueError, match="document 1 of a has the score nan"):
        evaluation_of(results)
    assert evaluation_of(results_of({"a": {"acc": [1]}}) | {"samples": None}).tasks["a"].samples is None


def group_results():
    results = results_of({"mmlu_law": {"acc": [1, 0, 0]}, "mmlu_art": {"acc": [1]}})
    results["results"]["mmlu"] = {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.2, "sample_len": 4}
    results["results"]["no_score"] = {"alias": "no_score"}
    results["group_subtasks"] |= {"mmlu": ["mmlu_arts"], "mmlu_arts": ["mmlu_law", "mmlu_art"], "no_score": ["mmlu"]}
    results["higher_is_better"]["mmlu"] = {"acc": True}
    return results


def test_a_group_pools_the_documents_of_its_tasks():
    evaluated = evaluation_of(group_results())
    assert list(evaluated.tasks) == ["mmlu_law", "mmlu_art", "mmlu"]
    group = evaluated.tasks["mmlu"]
    assert (group.num_samples, sorted(group.samples.values())) == (4, [0, 0, 1, 1])
    assert group.leaves == ("mmlu_law", "mmlu_art")
    with pytest.raises(ValueError, match=r"no_score has no score of its own\. Name its tasks instead: mmlu"):
        evaluation_of(group_results(), tasks=["no_score"])
    with pytest.raises(ValueError, match="mmlu and mmlu_art share the task mmlu_art, which would count twice"):
        compare(evaluated, evaluated, ["mmlu"], ["mmlu_art"])
    with pytest.raises(ValueError, match="mmlu_law and mmlu share the task mmlu_law, which would count twice"):
        compare(evaluated, evaluated, ["mmlu_law"], ["mmlu"])
    unweighted = group_results()
    unweighted["results"]["mmlu"]["acc,none"] = 2 / 3
    assert evaluation_of(unweighted).tasks["mmlu"].why_no_samples == NOT_THE_MEAN


def test_files_say_what_the_results_in_memory_say(tmp_path):
    results = results_of({"a": {"acc": [1, 0, 1]}, "b": {"exact_match,x": [1, 1], "exact_match,y": [0, 1]}})
    file = write_results(tmp_path, results)
    expected = evaluation_of(results | {"chat_template": "{{ messages }}"})
    for path in (file, str(file), tmp_path, file.parent):
        assert read_evaluation(path) == expected
    assert read_evaluation(file, {"b": "exact_match,y"}, ["b"]).tasks["b"].score == 0.5
    with pytest.raises(ValueError, match=r"results_.*json: b has no metric 'acc'"):
        read_evaluation(file, {"b": "acc"})


def test_of_several_files_the_newest_that_has_a_task_counts(tmp_path):
    write_results(tmp_path, results_of({"a": {"acc": [1, 1]}, "b": {"acc": [1, 0]}}), "2026-11-26T10-00-00.000000")
    write_results(tmp_path, results_of({"a": {"acc": [0, 0]}}), "2026-11-27T09-00-00.000000")
    evaluated = read_evaluation(tmp_path, tasks=["b", "a"])
    assert {task: score.score for task, score in evaluated.tasks.items()} == {"b": 0.5, "a": 0.0}
    write_results(tmp_path, results_of({"a": {"acc": [0, 0]}}, model="models/other"))
    with pytest.raises(
        ValueError, match=r"results of several models: models/other .*, models/initial .*Name the file"
    ):
        read_evaluation(tmp_path)


def test_without_samples_files(tmp_path):
    file = write_results(tmp_path, results_of({"a": {"acc": [1, 0, 1, 1]}}), samples=False)
    score = read_evaluation(file).tasks["a"]
    assert (score.samples, score.num_samples, score.stderr) == (None, 4, pytest.approx(0.25))
    assert score.why_no_samples == "the results hold no samples"


def test_what_is_no_result_of_lm_eval(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_evaluation(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no results_\*\.json of lm-eval in this folder"):
        read_evaluation(tmp_path)
    for text, match in (("{", "not a JSON file"), ("[1]", "no results of lm-eval"), ("{}", "no results of lm-eval")):
        (tmp_path / "results_x.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            read_evaluation(tmp_path)
    with pytest.raises(ValueError, match="these results: no results of lm-eval"):
        evaluation_of({})
    file = write_results(tmp_path / "cut", results_of({"a": {"acc": [1, 0]}}))
    samples = next(file.parent.glob("samples_*"))
    samples.write_text(samples.read_text()[:-20])
    with pytest.raises(ValueError, match=r"samples_a_.*: line 2 is not JSON"):
        read_evaluation(file)


def test_what_lm_evals_own_tracker_writes_is_read(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.loggers import EvaluationTracker

    results = results_of({"a": {"acc": [np.float32(0.25), 0.5]}, "b": {"acc": [np.True_, False]}})
    expected = evaluation_of(results | {"chat_template": None})
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args(
        "hf", "pretrained=models/initial,dtype=float32", None, None, False
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    assert read_evaluation(tmp_path) == expected


# Tables.


def test_shares_as_text():
    assert [percent(share) for share in (0.013845, -0.5, 0.0, -0.00001, None, math.inf)] == [
        *("+1.38 %", "-50.00 %", "0.00 %", "0.00 %", "-", "+inf"),
    ]


def test_the_table_and_the_sentences():
    draw = random.Random(12)
    one, two = answers(draw, 400, 0.5, 0.1, 0.2), answers(draw, 600, 0.5, 0.1, 0.01)
    comparison = compare(sampled(t=one[0], n=two[0]), sampled(t=one[1], n=two[1]), ["t"], ["n"], max_forgetting=0.05)
    rows = table(comparison).splitlines()
    assert rows[0] == ("| task |  | metric | documents | before | after | change | 95 % interval | worse / better |")
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| t | target | acc | 400 | 0.5000 | 0.6000 | +20.00 % | ")
    assert rows[3].startswith("| n | non-target | acc | 600 | 0.5000 | 0.4100 | -18.00 % | -2")
    assert rows[3].endswith(" | 60 / 6 |")
    assert rows[5].startswith("| **BWT** | 1 task |")
    said = sentences(comparison)
    assert said[1] == "Target task t: acc 0.5000 -> 0.6000."
    assert said[-1].startswith(
        "Verdict: forgets. The tuned model loses more than 5 % of its score on the non-target tasks, on average: "
        "the whole 95 % interval of BWT lies below -5 %."
    )
    assert markdown(comparison).count("10,000 resamples") == 1


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra 'report', is not installed")
    from stm_plugin.forgetting.plots import write_plot

    comparison = compare(sampled(a=[0, 0], b=[1, 0] * 9), sampled(a=[1, 1], b=[1, 1] * 9), ["a"], ["b"])
    files = [write_plot(comparison, tmp_path / f"{i}.png") for i in range(2)]
    assert files[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert files[0].read_bytes() == files[1].read_bytes()

"""What the result files of an experiment say, arm by arm: the figures of its table, as JSON can hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..forgetting.bootstrap import Interval
from ..forgetting.comparison import Comparison, compare
from ..forgetting.evaluation import Evaluation
from ..options import REFERENCE_INITIAL
from .config import Arm, Experiment, RunName
from .contrast import Contrast, contrast
from .preparing import preparing_of
from .results import INITIAL_NAME, Facts, read_json, run_path, unpacked_evaluation
from .settings import LOOKED_UP, differences, task_name

CONFIDENCE = 0.95


def summarize(experiment: Experiment, output: Path) -> Facts:
    """Everything that the table shows, from the result files alone.

    Args:
        experiment: The experiment, for the order of the arms and for what is to be compared.
        output: Folder of the results.

    Raises:
        ValueError: If there is no result.
    """
    initial = read_json(output / INITIAL_NAME)
    if initial is None:
        raise ValueError(f"{output} has no {INITIAL_NAME}: nothing has been run yet. Run it without --table first.")
    before = unpacked_evaluation(initial["evaluation"], initial["documents"])
    target, non_target = ([task_name(task) for task in initial["settings"][key]] for key in ("target", "non_target"))
    results, notes = _results(experiment, output, initial, before)
    evaluations = {
        arm: {seed: _evaluation(result, initial) for seed, result in by_seed.items()}
        for arm, by_seed in results.items()
    }
    arms = {
        name: _arm_summary(experiment.arms[name], by_seed, before, evaluations[name], target, non_target)
        for name, by_seed in results.items()
    }
    pairs = []
    for first, second in experiment.compare:
        if first in arms and second in arms:
            both = evaluations[first], evaluations[second]
            measures = {
                name: _contrast_facts(contrast(before, *both, tasks, confidence=CONFIDENCE))
                for name, tasks in (("bwt", non_target), ("ti", target))
            }
            pairs.append({"first": first, "second": second, **measures})
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "model": initial["settings"]["model"],
        "target": target,
        "non_target": non_target,
        "initial": {name: _score_facts(before, name) for name in (*target, *non_target)},
        "arms": arms,
        "pairs": pairs,
        "generated": _generated(arms),
        "preparation": _preparation(experiment, arms, results),
        "missing": [str(run) for run in experiment.runs() if not run_path(output, run).exists()],
        "notes": notes,
        "confidence": CONFIDENCE,
        "drift_prompts": len(initial["drift_answers"]),
        "environments": _environments([initial, *(run for runs in results.values() for run in runs.values())]),
    }


def _results(
    experiment: Experiment, output: Path, initial: Facts, before: Evaluation
) -> tuple[dict[str, dict[int, Facts]], list[str]]:
    """Results by arm and seed, each with its TI and BWT from today's initial scores; which are left out, and why."""
    results: dict[str, dict[int, Facts]] = {}
    notes = []
    target, non_target = ([task_name(task) for task in initial["settings"][key]] for key in ("target", "non_target"))
    for run in sorted(experiment.runs(), key=lambda run: (list(experiment.arms).index(run.arm), run.seed)):
        result = read_json(run_path(output, run))
        if result is None:
            continue
        changes = differences(result["settings"], experiment.run_settings(run))
        now = {name: value for name, value in initial["settings"].items() if name not in LOOKED_UP}
        changes += differences({name: result["settings"].get(name) for name in now}, now)
        for name in LOOKED_UP:
            changes += _others(name, initial["settings"].get(name) or {}, result["settings"].get(name) or {})
        if changes:
            notes.append(f"{run} is left out, its settings are others: {'; '.join(dict.fromkeys(changes))}.")
            continue
        try:
            alone = compare(before, _evaluation(result, initial), target, non_target, num_resamples=1000)
        except ValueError as error:
            notes.append(f"{run} is left out: {error}")
            continue
        results.setdefault(run.arm, {})[run.seed] = result | {"ti": alone.ti.value, "bwt": alone.bwt.value}
    return _of_same_data(results, notes), notes


def _evaluation(result: Facts, initial: Facts) -> Evaluation:
    return unpacked_evaluation(result["evaluation"], initial["documents"])


def _of_same_data(results: dict[str, dict[int, Facts]], notes: list[str]) -> dict[str, dict[int, Facts]]:
    """The results whose training data, of whatever name, are those of the latest result of that name."""
    latest: dict[str, tuple[str, str]] = {}
    for result in (result for by_seed in results.values() for result in by_seed.values()):
        data, digest = _data_of(result)
        latest[data] = max(latest.get(data, ("", "")), (result["date"], digest))
    kept: dict[str, dict[int, Facts]] = {}
    for arm, by_seed in results.items():
        for seed, result in by_seed.items():
            data, digest = _data_of(result)
            if digest == latest[data][1]:
                kept.setdefault(arm, {})[seed] = result
            else:
                notes.append(
                    f"{RunName(arm, seed)} is left out, it was trained on another {data} than the latest run."
                )
    return kept


def _data_of(result: Facts) -> tuple[str, str]:
    """Name of the data that a run was trained on, and their SHA-256."""
    of = result["answers_perplexity"]["of"]
    return of["data"], of["digest"]


def _others(what: str, before: Mapping[str, str | None], after: Mapping[str, str | None]) -> list[str]:
    """What stood behind the names when the initial model was measured, and was something else for a run."""
    pairs = {name: (digest, after.get(name)) for name, digest in before.items()}
    return [
        f"{name} is another {what.removesuffix('s')} than the initial model had"
        for name, (one, other) in pairs.items()
        if one != other and (what == "files" or None not in (one, other))
    ]


def _arm_summary(
    arm: Arm,
    results: Mapping[int, Facts],
    before: Evaluation,
    evaluations: Mapping[int, Evaluation],
    target: Sequence[str],
    non_target: Sequence[str],
) -> Facts:
    runs = list(results.values())
    pooled = compare(before, mean_evaluation(list(evaluations.values())), target, non_target, confidence=CONFIDENCE)
    masks = [run["masks"] for run in runs if run["masks"] is not None]
    return {
        "title": arm.title,
        "kind": arm.kind,
        "options": runs[0]["settings"]["options"],
        "training": runs[0]["settings"]["training"],
        "lora": runs[0]["settings"]["lora"],
        "data": arm.data,
        "rows": arm.rows,
        "dtype": arm.dtype,
        "seeds": sorted(results),
        "threshold": masks[0].get("threshold") if masks else None,
        "masked_fraction": spread([mask["masked_fraction"] for mask in masks]),
        "ti": _mean_facts(pooled, "ti", runs),
        "bwt": _mean_facts(pooled, "bwt", runs),
        "verdict": pooled.verdict,
        "why": pooled.why,
        "tasks": {
            change.task: {"score": change.after, "change": change.change, "interval": _ends(change.interval)}
            for change in pooled.tasks
        },
        "drift": spread([run["drift"]["nats_per_token"] for run in runs]),
        "weight_change_l2": spread([run["weight_change_l2"] for run in runs]),
        "training_seconds": spread([run["seconds"]["training"] for run in runs]),
        "preparing_seconds": spread([preparing_of(run)["seconds"] for run in runs]),
        "preparing_is_whole": all(preparing_of(run)["is_whole"] for run in runs),
        "generation": runs[0].get("generation"),
        "samples_per_row": (runs[0]["settings"].get("generated") or {}).get("samples"),
        "steps": runs[0]["steps"],
        "answers_perplexity": {name: runs[0]["answers_perplexity"][name] for name in ("mean", "std", "pooled")},
        "final_loss": [run["losses"][-1][1] if run["losses"] else None for run in runs],
        "notes": list(pooled.notes),
    }


def _generated(arms: Mapping[str, Facts]) -> dict[str, Facts]:
    """What there is to say of each generated data set, under the title of the first plain arm that trains on it."""
    generated: dict[str, Facts] = {}
    for arm in sorted(arms.values(), key=lambda arm: arm["kind"] != "plain"):
        if arm["generation"] is not None and arm["data"] not in generated:
            generated[arm["data"]] = arm["generation"] | {
                "title": arm["title"],
                "samples_per_row": arm["samples_per_row"],
            }
    return generated


def _preparation(
    experiment: Experiment, arms: Mapping[str, Facts], results: Mapping[str, Mapping[int, Facts]]
) -> list[Facts]:
    """What preparing data took for STM and for each generated data set of the same rows, on the same machine.

    STM is the first arm that masks by the initial model's perplexities alone, and whose scoring was measured whole.
    """
    pairs = []
    for name, generated in _generated(arms).items():
        if not generated["seconds"]["total"] > 0:
            continue
        options = experiment.generate[name].options
        for arm_name, arm in arms.items():
            run = next(iter(results[arm_name].values()))
            same = (experiment.arms[arm_name].data, experiment.arms[arm_name].rows) == (
                options["data"],
                options["rows"],
            )
            strategy = arm["options"].get("stm_strategy", "high")
            own = arm["options"].get("stm_reference", REFERENCE_INITIAL) == REFERENCE_INITIAL and strategy == "high"
            measured = arm["preparing_is_whole"] and arm["preparing_seconds"]["mean"] > 0
            if same and arm["kind"] == "stm" and own and measured and run["machine"] == generated["machine"]:
                seconds = {"stm_seconds": arm["preparing_seconds"]["mean"], "seconds": generated["seconds"]["total"]}
                pairs.append({"stm": arm["title"], "title": generated["title"], **seconds})
                break
    return pairs


def mean_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several seeds of an arm: the mean of each score, and of each document's.

    Its documents are those of one model, so an interval of it covers the choice of documents and not that of seeds.
    """
    if len(evaluations) == 1:
        return evaluations[0]
    tasks = {}
    for name, score in evaluations[0].tasks.items():
        others = [evaluation.tasks[name] for evaluation in evaluations]
        samples = None
        if all(other.samples is not None for other in others):
            samples = {
                key: float(np.mean([(other.samples or {})[key] for other in others])) for key in score.samples or {}
            }
        stderrs = [other.stderr for other in others if other.stderr is not None]
        tasks[name] = score._replace(
            score=float(np.mean([other.score for other in others])),
            samples=samples,
            stderr=float(np.mean(stderrs)) if len(stderrs) == len(others) else None,  # the documents are the same
        )
    return evaluations[0]._replace(tasks=tasks)


def spread(values: Sequence[Any]) -> Facts | None:
    """Mean, lowest and highest of numbers; None where there are none, or one is infinite or no number."""
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values):
        return None
    return {"mean": float(np.mean(numbers)), "low": min(numbers), "high": max(numbers)}


def _mean_facts(pooled: Comparison, name: str, runs: Sequence[Facts]) -> Facts:
    mean = getattr(pooled, name)
    return {"mean": mean.value, "interval": _ends(mean.interval), "of_seeds": [run[name] for run in runs]}


def _contrast_facts(result: Contrast) -> Facts:
    return result._asdict() | {"interval": _ends(result.interval), "num_seeds": list(result.num_seeds)}


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _score_facts(evaluation: Evaluation, task: str) -> Facts:
    score = evaluation.tasks[task]
    return {"score": score.score, "metric": score.metric, "documents": score.num_samples}


def _environments(results: Sequence[Facts]) -> list[Facts]:
    """Where and with what the results were made, each once, with how many they are."""
    found: list[Facts] = []
    for result in results:
        facts = {name: result[name] for name in ("versions", "machine", "commit")}
        for one in found:
            if {name: one[name] for name in facts} == facts:
                one["results"] += 1
                one["dates"] = [min(one["dates"][0], result["date"]), max(one["dates"][1], result["date"])]
                break
        else:
            found.append(facts | {"results": 1, "dates": [result["date"], result["date"]]})
    return found

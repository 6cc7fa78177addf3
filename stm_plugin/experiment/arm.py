"""What the processes of `stm experiment` do: measure the initial model, generate data, train a run, measure it.

    python -m stm_plugin.experiment.arm check|initial|generate|train|measure... JOB.json

Each ends when its parent does: the parent holds the other end of its standard input.
"""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generating import Generation, receipt_path, with_keys
from .models import model_folder
from .preparing import generation_facts, preparing
from .results import (
    INITIAL_NAME,
    Facts,
    document_ids,
    environment,
    packed_evaluation,
    read_json,
    settings_digest,
    unpacked_evaluation,
    write_json,
)
from .settings import Settings, task_name, with_folder

logger = logging.getLogger("stm_plugin.experiment.arm")  # also where this is the main module

if TYPE_CHECKING:
    from ..forgetting.evaluation import Evaluation
    from ..measures.drift import Drift
    from ..measures.inputs import Prompts


def main(arguments: list[str]) -> None:
    """Do the phases that a command line names, of the job that it ends with."""
    *phases, file = arguments
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    if job.get("watch"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    from ..logs import show_log_lines

    show_log_lines()
    do = {
        "check": check,
        "initial": measure_initial,
        "generate": generate,
        "train": train_run,
        "measure": measure_run,
    }
    for phase in phases:
        do[phase](job)


def _end_with_parent() -> None:
    """Wait for the end of standard input, which comes when the parent is gone, and leave at once.

    Not through `sys.stdin`, whose lock a thread that waits would hold while the interpreter ends.
    """
    while os.read(0, 1):
        pass
    os._exit(1)


def check(job: Facts) -> None:
    """Raise ValueError for an adapter as the model, or settings that TRL, peft, STM, lm-eval or generation refuse."""
    from transformers import AutoConfig

    from ..forgetting.harness import parse_task
    from ..loading import base_of, is_adapter
    from ..measures.inputs import not_found
    from .training import check_arms

    settings, data = job["settings"][0], Path(job["data"])
    model = model_folder(settings["model"])
    if is_adapter(model):
        raise ValueError(
            f"model: {model} is an adapter (of {base_of(model).name}), and every arm starts from a whole model. Merge "
            "it into its base (`merge_and_unload`), save the result, and name that folder."
        )
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise not_found(model, error) from None
    for task in _tasks(settings, data):
        if parse_task(task).kind == "mbpp" and not settings["evaluation"]["run_model_code"]:
            raise ValueError(
                f"{task_name(task)} runs code that the model writes, in a contained process, which must be asked for: "
                "evaluation: {run_model_code: true}."
            )
    check_arms(job["settings"])
    for arm in job["settings"]:
        _check_rows(arm, data)
    for name, options in job["generate"].items():
        _check_generation(Generation(name, options), data)


def _check_rows(settings: Settings, data: Path) -> None:
    """Raise ValueError for more rows than the file of a run has; what is generated has as many as come out."""
    from ..measures.inputs import read_rows

    if settings["generated"] is None and settings["rows"] is not None:
        num_rows = len(read_rows(data / settings["data"]))
        if settings["rows"] > num_rows:
            raise ValueError(
                f"in arms.{settings['arm']}: rows: {settings['rows']}, but {settings['data']} has {num_rows}. Write "
                "`rows: null` for all of them."
            )


def _check_generation(generation: Generation, data: Path) -> None:
    """Raise ValueError for data, a template or a verifier that do not go together."""
    from ..generation.data import problems_of, read_data
    from ..generation.prompts import read_template
    from ..generation.verifiers import make_verifier

    settings = generation.generate_settings(data, Path())
    try:
        rows = read_data(settings.data, settings.rows)
        problems_of(rows, generation.options["data"])
        make_verifier(settings.verifier, rows, run_model_code=settings.run_model_code)
        if settings.template is not None:
            read_template(settings.template)
    except ValueError as error:
        raise ValueError(f"in generate.{generation.name}: {with_keys(str(error))}") from None


def measure_initial(job: Facts) -> None:
    """Evaluate the initial model and let it answer the prompts that drift is measured on; writes `initial.json`."""
    from ..answers import greedy_answers
    from ..measures.inputs import load_model

    settings, data = job["settings"], Path(job["data"])
    started = time.monotonic()
    initial = load_model(model_folder(settings["model"]), dtype=settings["dtype"])
    drift = settings["drift"]
    prompts, template_kwargs = _prompts(settings, data)
    answers = greedy_answers(
        initial.model, initial.tokenizer, prompts, drift["max_new_tokens"], drift["batch_size"], template_kwargs
    )
    model = _in_dtype(initial.model, settings["evaluation"]["dtype"])
    evaluation = _evaluate(model, initial.tokenizer, settings, data, settings["model"], Path(job["work"]))
    facts = {
        "settings": settings,
        "evaluation": packed_evaluation(evaluation),
        "documents": document_ids(evaluation),
        "drift_answers": [[row.input_ids, row.num_prompt_tokens] for row in answers],
        "seconds": {"total": round(time.monotonic() - started, 1)},
    }
    write_json(facts | environment(), Path(job["output"]) / INITIAL_NAME)


def generate(job: Facts) -> None:
    """Generate a data set, or go on with it; its receipt then says what it was made for."""
    from ..generation.run import generate_data

    generation, data, output = Generation(job["generation"], job["options"]), Path(job["data"]), Path(job["output"])
    options = generation.options
    model = model_folder(options["model"])
    settings = generation.generate_settings(data, output, model)
    receipt = generate_data(settings, logger.info)
    failed = receipt["samples"]["without_an_answer"]
    if sum(failed.values()) > receipt["samples"]["refused"] and settings.endpoint is not None:
        reasons = ", ".join(f"{reason} ({number} times)" for reason, number in failed.items())
        raise RuntimeError(f"requests got no answer: {reasons}. Start again to ask again.")
    names = {model: options["model"], settings.data: options["data"], str(settings.output): settings.output.name}
    if settings.template is not None:
        names[str(settings.template)] = options["template"]
    named: Facts = _named(receipt, names)
    write_json(named | {"made_for": job["settings"]}, receipt_path(output, generation.name))


def _named(value: Any, names: Mapping[str, str]) -> Any:
    """A value with names in the place of this machine's paths."""
    if isinstance(value, dict):
        return {key: _named(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def train_run(job: Facts) -> None:
    """Train a run into the job's folder."""
    from .training import train

    train(job["settings"], Path(job["data"]), Path(job["work"]), Path(job["output"]))


def measure_run(job: Facts) -> None:
    """Measure the model that `train_run` left, and write the run's result."""
    import gc

    gc.collect()  # a trainer is a cycle: its model goes only now
    settings, data, output, work = (job["settings"], *(Path(job[key]) for key in ("data", "output", "work")))
    started = time.monotonic()
    trained = json.loads((work / "train.json").read_text(encoding="utf-8"))
    initial_facts = read_json(output / INITIAL_NAME)
    assert initial_facts is not None, "the initial model is measured before any run"
    perplexity = _answers_perplexity(settings, data, output, trained.pop("max_length"))
    drift, weight_change, evaluation = _measure(settings, data, work, initial_facts)
    seconds = trained.pop("seconds")
    entries = trained.pop("scores_entries")
    facts = {
        "arm": settings["arm"],
        "seed": settings["seed"],
        "kind": settings["kind"],
        "settings": settings,
        **trained,
        "seconds": seconds
        | {"measuring": round(time.monotonic() - started, 1), "total": round(time.time() - job["started"], 1)},
        "preparing": preparing(settings, entries, output),
        "generation": generation_facts(settings, output),
        **_forgetting(settings, initial_facts, evaluation),
        "evaluation": packed_evaluation(evaluation),
        "drift": {
            "nats_per_token": drift.mean,
            "tokens": drift.num_tokens,
            "nats_per_token_of_each_prompt": [row.sum_nats / row.num_tokens for row in drift.rows],
        },
        "weight_change_l2": weight_change,
        "answers_perplexity": perplexity,
    }
    write_json(facts | environment(), Path(job["result"]))


def _measure(settings: Settings, data: Path, work: Path, initial_facts: Facts) -> tuple["Drift", float, "Evaluation"]:
    """Drift, weight change and scores of a trained model."""
    from ..answers import TokenRow
    from ..loading import Source
    from ..measures.drift import measure_drift
    from ..measures.inputs import load_model
    from ..measures.weight_change import adapter_change_norm, change_norm

    path = model_folder(settings["model"])
    dtype = settings["training_dtype"]  # a coarser one would lose what full fine-tuning changes
    initial = load_model(path, dtype=dtype)
    tuned: Any = load_model(str(work / "model"), base=Source(path), dtype=dtype).model
    if settings["lora"] is None:
        weight_change = change_norm(initial.model, tuned)
    else:
        weight_change = adapter_change_norm(tuned)
    answers = [TokenRow(ids, count) for ids, count in initial_facts["drift_answers"]]
    drift = measure_drift(initial.model, tuned, answers)
    tokenizer = initial.tokenizer
    del initial
    tuned = _in_dtype(tuned, settings["evaluation"]["dtype"])
    name = f"{settings['arm']}/{settings['seed']}"
    return drift, weight_change, _evaluate(tuned, tokenizer, settings, data, name, work)


def _in_dtype(model: Any, dtype: str) -> Any:
    """A model, cast to a dtype."""
    import torch

    return model.to(getattr(torch, dtype))


def _evaluate(model: Any, tokenizer: Any, settings: Settings, data: Path, name: str, work: Path) -> "Evaluation":
    """Scores of a model in memory on all tasks."""
    from ..forgetting.evaluation import evaluation_of
    from ..forgetting.harness import evaluate

    options = settings["evaluation"]
    results = evaluate(
        model,
        _tasks(settings, data),
        tokenizer=tokenizer,
        output=work / "evaluation",
        limit=options["limit"],
        batch_size=options["batch_size"],
        run_model_code=options["run_model_code"],
        max_new_tokens=options["max_new_tokens"],
        chat_template_kwargs=options["chat_template_kwargs"],
    )
    names = [task_name(task) for task in (*settings["target"], *settings["non_target"])]
    return evaluation_of(results, options["metrics"], names)._replace(model=name)


def _forgetting(settings: Settings, initial_facts: Facts, evaluation: "Evaluation") -> Facts:
    """TI and BWT of a run, with all that belongs to them."""
    from ..forgetting.comparison import compare
    from ..forgetting.tables import as_json

    before = unpacked_evaluation(initial_facts["evaluation"], initial_facts["documents"])
    target, non_target = ([task_name(task) for task in settings[key]] for key in ("target", "non_target"))
    comparison = as_json(compare(before, evaluation, target, non_target))
    return {"ti": comparison["ti"]["value"], "bwt": comparison["bwt"]["value"], "comparison": comparison}


def _answers_perplexity(settings: Settings, data: Path, output: Path, max_length: int | None) -> Facts:
    """Perplexity of the run's training answers under the initial model; made once for each data set."""
    from ..measures.inputs import load_model
    from ..measures.perplexity import measure_perplexity
    from .training import training_file, training_rows

    content = training_file(settings, data, output).read_bytes()
    key = {name: settings[name] for name in ("model", "dtype", "data", "rows")} | {
        "digest": hashlib.sha256(content).hexdigest(),
        "max_length": max_length,
        "model_digest": settings["models"][settings["model"]],
    }
    path = output / "perplexity" / f"{settings_digest(key)}.json"
    facts = read_json(path)
    if facts is None:
        started = time.monotonic()
        initial = load_model(model_folder(settings["model"]), dtype=settings["dtype"])
        rows = {settings["data"]: training_rows(settings, data, output)}
        (found,) = measure_perplexity(initial.model, initial.tokenizer, rows, max_length=max_length).values()
        facts = {
            "of": key,
            "mean": found.mean,
            "std": found.std,
            "quantiles": found.quantiles,
            "pooled": found.pooled,
            "rows": len(found.rows),
            "tokens": found.num_tokens,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(facts, path)
    return facts


def _tasks(settings: Settings, data: Path) -> list[str]:
    return [with_folder(task, data) for task in (*settings["target"], *settings["non_target"])]


def _prompts(settings: Settings, data: Path) -> "Prompts":
    from ..measures.inputs import read_prompts

    prompts = settings["drift"]["prompts"]
    kwargs = settings["evaluation"]["chat_template_kwargs"]
    return read_prompts(data / prompts if isinstance(prompts, str) else prompts, kwargs)


if __name__ == "__main__":
    main(sys.argv[1:])

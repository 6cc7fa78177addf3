"""lm-eval as a library: tasks of the hub and local ones on a model, an adapter, or a model in memory."""

import copy
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._compat import missing_extra
from ..loading import Source, base_of, device_of, is_adapter, load_causal_lm, tokenizer_source
from ..tasks.loading import LoadedTasks, Task, load_tasks, parse_task, quiet

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "Task", "evaluate", "evaluate_lm", "load", "parse_task"]


class LoadedModel(NamedTuple):
    """A model in memory, as the results name it.

    Attributes:
        model: The model, with its adapter if it is one.
        tokenizer: Its tokenizer.
        described: What it was loaded from.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    described: dict[str, str]


def evaluate(
    model: "PreTrainedModel | LoadedModel | str | Path",
    tasks: Sequence[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    output: Path | None = None,
    limit: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: Any = "auto",
    load_in_4bit: bool = False,
    run_model_code: bool = False,
    max_new_tokens: int | None = None,
    apply_chat_template: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates a model by lm-eval's own HFLM, greedily; log-probabilities are taken in float32.

    Args:
        model: Folder or hub id, of an adapter too; or a model in memory, PEFT's too, or what `load` returns, which is
            evaluated as it stands and left as it was.
        tasks: Tasks, as `parse_task` reads them.
        tokenizer: The tokenizer, its folder or hub id. By default the adapter's, if it brings one, or the model's.
        adapter: Folder or hub id of an adapter for `model`.
        revision: That of `model` on the hub; None for the newest.
        output: Folder for results and samples in lm-eval's own format; None writes nothing.
        limit: Most rows of each task, the first ones; or a number for each task by its name.
        batch_size: Rows that go through the model at once.
        device: Where the model goes; by default a GPU if there is one.
        dtype: Dtype of the weights, as `from_pretrained` takes it; `auto` is the checkpoint's.
        load_in_4bit: Whether to load the base model in 4 bits (NF4).
        run_model_code: Whether code that the model writes may be run, contained (see `stm_plugin.sandbox`); the local
            `mbpp` task needs it.
        max_new_tokens: Longest answer in tokens, of all tasks that generate; by default each task's own.
        apply_chat_template: Whether prompts become a user's message where the tokenizer has a chat template.
        chat_template_kwargs: What the chat template is given beside the messages.
        seed: Seed of what lm-eval draws, such as few-shot examples. The caller's random state stays.

    Returns:
        lm-eval's results, with `samples`.

    Raises:
        ImportError: lm-eval, or what a task needs, is not installed.
        ValueError: A task, its rows, or an option is not allowed; or a task or the model cannot be loaded.
    """
    _check_options(limit, batch_size, max_new_tokens, output)
    if isinstance(model, LoadedModel):
        if tokenizer is not None:
            raise ValueError(
                "a model that `load` returned has its tokenizer: leave tokenizer= out, or give it to `load`."
            )
        model, tokenizer, described = model
    else:
        described = {"pretrained": _name_of(model)}
    in_memory = not isinstance(model, str | Path)
    if in_memory:
        _check_model_in_memory(tokenizer, adapter or revision, dtype, load_in_4bit)
    from ..randomness import preserved_random_state

    with preserved_random_state(), quiet():
        loaded = load_tasks(tasks, run_model_code)  # before the model, so that it is not loaded for nothing
        _check_limit_names(limit, loaded)
        from lm_eval.models.huggingface import HFLM

        from ..scoring.nll import eval_mode

        loaded_model: Any = model
        if not in_memory:
            loaded_model, tokenizer, described = load(
                str(model),
                tokenizer=tokenizer,
                adapter=adapter,
                revision=revision,
                device=device,
                dtype=dtype,
                load_in_4bit=load_in_4bit,
            )
        with eval_mode(loaded_model):
            lm = HFLM(
                pretrained=loaded_model,
                backend="causal",
                tokenizer=copy.deepcopy(_tokenizer(tokenizer)),  # lm-eval may give it a padding token
                batch_size=batch_size,
                softmax_dtype="float32",
            )
            templated = apply_chat_template and lm.tokenizer.chat_template is not None
            if chat_template_kwargs:
                if not templated:
                    raise ValueError(
                        f"chat_template_kwargs {dict(chat_template_kwargs)} are for a chat template, and prompts are "
                        "plain text here. Leave one of the two out."
                    )
                lm.chat_template_args = dict(chat_template_kwargs)  # as an argument, lm-eval 0.4.11 loses them
                described = described | {"chat_template_kwargs": json.dumps(chat_template_kwargs, sort_keys=True)}
            with eval_mode(loaded_model):  # again: HFLM has put all of it into plain eval mode
                return _run(
                    lm,
                    loaded,
                    described,
                    output=output,
                    limit=limit,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    apply_chat_template=templated,
                    seed=seed,
                )


def evaluate_lm(
    lm: "LM",
    tasks: Sequence[str],
    *,
    name: str,
    output: Path | None = None,
    limit: int | Mapping[str, int] | None = None,
    run_model_code: bool = False,
    max_new_tokens: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates one of lm-eval's own models, such as its vLLM; otherwise as `evaluate`.

    Args:
        lm: The model.
        tasks: Tasks, as `parse_task` reads them.
        name: The model's name in the results.
        output: As in `evaluate`, and so are the others.
        limit: See there.
        run_model_code: See there.
        max_new_tokens: See there.
        apply_chat_template: See there.
        seed: See there.

    Returns:
        lm-eval's results, with `samples`.

    Raises:
        ImportError: lm-eval, or what a task needs, is not installed.
        ValueError: A task, its rows, or an option is not allowed; or a task cannot be loaded.
    """
    _check_options(limit, 1, max_new_tokens, output)
    from ..randomness import preserved_random_state

    with preserved_random_state(), quiet():
        loaded = load_tasks(tasks, run_model_code)
        _check_limit_names(limit, loaded)
        return _run(
            lm,
            loaded,
            {"pretrained": name},
            output=output,
            limit=limit,
            batch_size=None,
            max_new_tokens=max_new_tokens,
            apply_chat_template=apply_chat_template,
            seed=seed,
        )


def _run(
    lm: "LM",
    loaded: LoadedTasks,
    described: dict[str, str],
    *,
    output: Path | None,
    limit: int | Mapping[str, int] | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    apply_chat_template: bool,
    seed: int,
) -> dict[str, Any]:
    """Lets lm-eval work, and writes what it found."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    rows = None
    if isinstance(limit, Mapping):
        rows = {name: list(range(min(most, len(loaded.tasks[name].eval_docs)))) for name, most in limit.items()}
    tracker = EvaluationTracker(output_path=None if output is None else str(output))
    results: Any = simple_evaluate(
        model=lm,
        model_args=described,
        tasks=loaded.specs,
        task_manager=loaded.manager,
        batch_size=batch_size,
        limit=None if isinstance(limit, Mapping) else limit,
        samples=rows,
        evaluation_tracker=tracker,
        apply_chat_template=apply_chat_template,
        gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
        confirm_run_unsafe_code=loaded.runs_code,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None, "lm-eval returns results in the first process only, and there is one"
    for name, row_ids in (rows or {}).items():  # lm-eval 0.4.11 counts all rows here
        results["n-samples"][name]["effective"] = len(row_ids)
    results |= asdict(tracker.general_config_tracker)  # the chat template among it; lm-eval has it in files only
    results = _plain(results)
    if output is not None:
        _save(tracker, results, output)
    return dict(results)


def _save(tracker: Any, results: dict[str, Any], output: Path) -> None:
    """Writes results and samples by lm-eval's own tracker, which only logs what goes wrong.

    Raises:
        OSError: A file is not there afterwards.
    """
    samples = results["samples"]
    tracker.save_results_aggregated(
        results={key: value for key, value in results.items() if key != "samples"}, samples=samples
    )
    date = getattr(tracker, "date_id", "")  # none if it failed before the first file
    for name, rows in samples.items() if date else ():
        tracker.save_results_samples(task_name=name, samples=[dict(row) for row in rows])
    folder = output / str(results["model_name_sanitized"])
    for name in (f"results_{date}.json", *(f"samples_{name}_{date}.jsonl" for name in samples)):
        if not (folder / name).is_file():
            raise OSError(f"lm-eval could not write {folder / name}: is the folder writable, and the disk not full?")


def load(
    model: str,
    *,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: Any = "auto",
    load_in_4bit: bool = False,
) -> LoadedModel:
    """Loads a model for several evaluations; arguments as for `evaluate`.

    Raises:
        ImportError: bitsandbytes is needed and not installed.
        ValueError: The model cannot be loaded, or there is no such device.
    """
    from transformers import AutoTokenizer

    from ..randomness import preserved_random_state

    device = device_of(device)
    source, base = Source(model, revision), None
    name = model
    if adapter is not None:
        name, revision, base = str(adapter), None, source
    described = {"pretrained": source.name}
    try:
        if adapter is None and is_adapter(name, revision):
            base = base_of(name, revision)
        if base is not None:
            described = {"pretrained": base.name, "peft": name}
        own: Any = tokenizer
        if own is None:
            of_tokenizer = tokenizer_source(name, revision, base)
            own = AutoTokenizer.from_pretrained(of_tokenizer.name, revision=of_tokenizer.revision)
        own = _tokenizer(own)
        keywords: dict[str, Any] = {"dtype": dtype, "revision": revision}
        if load_in_4bit:
            keywords |= {"quantization_config": _four_bit(dtype), "device_map": {"": device}}
        with preserved_random_state():
            loaded = load_causal_lm(name, keywords, base=base, num_tokens=len(own))
        if not load_in_4bit and not getattr(loaded, "is_quantized", False):
            loaded.to(device)
    except (OSError, ValueError) as error:
        names = " with adapter ".join(described.values())
        raise ValueError(f"the model {names} cannot be loaded from a folder or the hub: {error}") from error
    return LoadedModel(loaded, own, described)


def _four_bit(dtype: Any) -> Any:
    """What loads a model in 4 bits, as QLoRA does."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_extra("bitsandbytes", "qlora")
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _tokenizer(tokenizer: Any) -> Any:
    """A tokenizer, loaded if it is given by its folder or id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer


def _name_of(model: Any) -> str:
    """What the results call a model."""
    return str(model if isinstance(model, str | Path) else model.config.name_or_path or type(model).__name__)


def _check_options(
    limit: int | Mapping[str, int] | None, batch_size: int, max_new_tokens: int | None, output: Path | None
) -> None:
    """Raises ValueError for numbers below 1 and for an output that is no folder."""
    numbers = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    numbers |= (
        {f"limit of {name}": most for name, most in limit.items()} if isinstance(limit, Mapping) else {"limit": limit}
    )
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a whole number, at least 1, got {number!r}.")
    if output is not None and (output.suffix == ".json" or output.is_file()):
        raise ValueError(
            f"output is a folder, for one file of results and one of samples for each task; got {output}."
        )


def _check_model_in_memory(tokenizer: Any, adapter: Any, dtype: Any, load_in_4bit: bool) -> None:
    """Raises ValueError for what a model in memory cannot be given any more, or lacks."""
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: give tokenizer=.")
    if adapter is not None or dtype != "auto" or load_in_4bit:
        raise ValueError(
            "a model in memory is evaluated as it stands: adapter, revision, dtype and load_in_4bit are for one that "
            "is loaded."
        )


def _check_limit_names(limit: int | Mapping[str, int] | None, loaded: LoadedTasks) -> None:
    """Raises ValueError for a limit of a task that is not evaluated."""
    for name in limit.keys() - loaded.tasks.keys() if isinstance(limit, Mapping) else ():
        raise ValueError(f"limit names the task {name!r}; the tasks are {', '.join(sorted(loaded.tasks))}.")


def _plain(value: Any) -> Any:
    """The same without what JSON cannot hold, or does not hold still: numbers that are none, functions."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return f"{value.__module__}.{value.__qualname__}" if callable(value) and hasattr(value, "__qualname__") else value

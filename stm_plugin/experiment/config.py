"""An experiment's YAML: what is trained, on what, with which settings, and what is measured.

Shared settings stand at the top; an arm names what it does differently. Nothing heavy is loaded for it: whether the
values suit TRL and peft is checked by `training.check_arms`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..demo.prompts import GENERAL_PROMPTS
from ..measures.inputs import check_template_kwargs
from ..options import REFERENCE_CURRENT, REFERENCE_INITIAL, option_names
from .checks import NAME, check_keys, is_count, nearest
from .generating import Generation, make_generations
from .settings import Settings, plain, task_file, task_name
from .yaml_text import load_yaml

KL_OPTIONS = ("kl_coef", "kl_estimator")
DTYPES = ("float32", "bfloat16", "float16")

_SHARED = ("title", "model", "dtype", "data", "rows", "training", "lora", "seeds", "launch")
_TOP = (*_SHARED, "target", "non_target", "evaluation", "drift", "generate", "main", "compare", "arms")
_OF_AN_ARM = ("title", "dtype", "data", "rows", "training", "lora", "seeds", "launch")
_EVALUATION: dict[str, Any] = {
    "limit": None,
    "batch_size": 8,
    "max_new_tokens": None,
    "chat_template_kwargs": None,
    "dtype": None,
    "metrics": {},
    "run_model_code": False,
}
_DRIFT: dict[str, Any] = {"prompts": None, "max_new_tokens": 48, "batch_size": 8}
_SET_BY_US = {
    "output_dir": "--output",
    "seed": "`seeds`",
    "data_seed": "`seeds`",
}
_NOT_MEASURED_SO = ("dtype", "torch_dtype", "revision", "quantization_config", "load_in_4bit", "load_in_8bit")
"""Keys of `training.model_init_kwargs` that would make the trained model another than the one that is measured."""


class RunName(NamedTuple):
    """One training run.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
    """

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Arm:
    """One way to train, with the shared settings filled in.

    Attributes:
        name: Its key in the YAML.
        title: What tables call it.
        dtype: Dtype that the model is loaded in for training.
        data: File of the training chats, relative to the data folder, or the name of a data set that is generated.
        rows: How many rows of it, from the start; None for all.
        training: Fields of TRL's `SFTConfig`.
        lora: Fields of peft's `LoraConfig`; None for full fine-tuning.
        options: STM options, or those of the KL penalty; none for plain fine-tuning.
        seeds: Seeds of adapter, dropout and order.
        launch: Words before `-m` that start the training, such as `accelerate launch`; none for this Python.
    """

    name: str
    title: str
    dtype: str
    data: str
    rows: int | None
    training: dict[str, Any]
    lora: dict[str, Any] | None
    options: dict[str, Any]
    seeds: tuple[int, ...]
    launch: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`stm`, `kl` or `plain`."""
        return next((name.partition("_")[0] for name in self.options), "plain")


@dataclass(frozen=True)
class Experiment:
    """A whole experiment.

    Attributes:
        name: The file's name without its ending.
        title: What the table calls it.
        model: Folder or hub id of the initial model.
        dtype: Dtype that the model is loaded in, where an arm does not say otherwise.
        target: Tasks that the training data are for, in the syntax of `forgetting.harness`.
        non_target: Tasks that the model should go on solving.
        evaluation: Keywords of the evaluation.
        drift: Prompts (or their file) and length of the answers that drift is measured on.
        generate: Data sets to generate, by name.
        arms: The arms by name, in the file's order.
        main: Names of the arms that are run first.
        compare: Pairs of arms; the table says whether the first forgets less than the second.
    """

    name: str
    title: str
    model: str
    dtype: str
    target: tuple[str, ...]
    non_target: tuple[str, ...]
    evaluation: dict[str, Any]
    drift: dict[str, Any]
    generate: dict[str, Generation]
    arms: dict[str, Arm]
    main: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]

    def runs(self) -> list[RunName]:
        """All runs in their order: the main arms' first seeds, their second ones and so on, then the other arms."""
        places = [
            (arm.name not in self.main, index, place, RunName(arm.name, seed))
            for place, arm in enumerate(self.arms.values())
            for index, seed in enumerate(arm.seeds)
        ]
        return [run for *_, run in sorted(places, key=lambda entry: entry[:3])]

    def chosen_runs(self, only: Sequence[str] | None) -> list[RunName]:
        """The runs that `ARM` and `ARM/SEED` name, in their order; all of them for None.

        Raises:
            ValueError: For a name that no run has.
        """
        runs = self.runs()
        if not only:
            return runs
        names = {*self.arms, *map(str, runs)}
        for name in only:
            if name not in names:
                raise ValueError(f"--only {name}: no such arm or run{nearest(name, names)}.")
        return [run for run in runs if run.arm in only or str(run) in only]

    def initial_settings(self) -> Settings:
        """What the measures of the initial model depend on, but for the files' contents."""
        return plain(
            {
                "model": self.model,
                "dtype": self.dtype,
                "target": self.target,
                "non_target": self.non_target,
                "evaluation": self.evaluation,
                "drift": self.drift,
            }
        )

    def run_settings(self, run: RunName) -> Settings:
        """What a run's result depends on, but for the files' contents."""
        return self.initial_settings() | self._own_settings(run)

    def _own_settings(self, run: RunName) -> Settings:
        """What is not the same for all runs, that of the run whose model this one takes included."""
        arm, generation, tuned = self.arms[run.arm], self.generation_of(run), self.tuned_run(run)
        options = arm.options if tuned is None else arm.options | {_tuned_option(arm): str(tuned)}
        own = {
            "arm": run.arm,
            "seed": run.seed,
            "kind": arm.kind,
            "training_dtype": arm.dtype,
            "data": arm.data,
            "rows": arm.rows,
            "training": arm.training,
            "lora": arm.lora,
            "options": options,
            "launch": arm.launch,
            "generated": None if generation is None else generation.settings(),
            "tuned_run": None if tuned is None else self._own_settings(tuned),
        }
        settings: Settings = plain(own)
        return settings

    def generation_of(self, run: RunName) -> Generation | None:
        """The data set that is generated for a run to train on; None for a file of the data folder."""
        return self.generate.get(self.arms[run.arm].data)

    def tuned_run(self, run: RunName) -> RunName | None:
        """The run whose trained model is a run's `stm_tuned_model`, or its `stm_reference`; None where none is."""
        return _tuned_run(self.arms[run.arm], self.arms)

    def runs_to_keep(self) -> set[RunName]:
        """Runs whose trained models others take."""
        return {tuned for run in self.runs() if (tuned := self.tuned_run(run)) is not None}

    def models(self, run: RunName | None) -> list[str]:
        """Folders and hub ids of the models that a run takes; None for those of the initial model's measures."""
        names = {self.model}
        if run is not None:
            generation, tuned, options = self.generation_of(run), self.tuned_run(run), self.arms[run.arm].options
            names |= {options[name] for name in ("stm_reference", "stm_tuned_model") if options.get(name) is not None}
            names -= {REFERENCE_INITIAL, REFERENCE_CURRENT}
            if tuned is not None:
                names = names - {options[_tuned_option(self.arms[run.arm])]} | set(self.models(tuned))
            names |= set() if generation is None else {generation.options["model"]}
        return sorted(names)

    def files(self, run: RunName | None) -> list[str]:
        """Names of the files that a run reads from the data folder; None for those of the initial model's measures."""
        names = [task_file(task) for task in (*self.target, *self.non_target)]
        if isinstance(self.drift["prompts"], str):
            names.append(self.drift["prompts"])
        if run is not None:
            generation, tuned = self.generation_of(run), self.tuned_run(run)
            names += [self.arms[run.arm].data] if generation is None else generation.files()
            names += [] if tuned is None else self.files(tuned)
        return sorted({name for name in names if name is not None})


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's YAML.

    Raises:
        ValueError: For no such file, no YAML, or a key or value that is not allowed, saying where.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {what}. It takes the YAML of an experiment (see example_configs/experiments).")
    try:
        given = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        return make_experiment(given, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def make_experiment(given: Any, name: str) -> Experiment:
    """Check an experiment as a mapping, and fill in what arms share.

    Args:
        given: What the YAML holds.
        name: Name of the experiment.

    Raises:
        ValueError: For a key or value that is not allowed.
    """
    check_keys(given, _TOP, "at the top")
    for key in ("model", "data", "target", "non_target", "arms"):
        if not given.get(key):
            raise ValueError(f"at the top: `{key}` is missing.")
    evaluation, drift = (
        _checked(given.get(key) or {}, defaults, f"in {key}")
        for key, defaults in (("evaluation", _EVALUATION), ("drift", _DRIFT))
    )
    dtype = _dtype(given.get("dtype", "float32"), "at the top")
    evaluation["dtype"] = _dtype(evaluation["dtype"] or dtype, "in evaluation")
    check_template_kwargs(evaluation["chat_template_kwargs"] or {}, "in evaluation")
    if drift["prompts"] is None:
        drift["prompts"] = list(GENERAL_PROMPTS)
    if not isinstance(given["arms"], Mapping):
        raise ValueError("at the top: `arms` must be a mapping of names to what each arm does differently.")
    arms = {arm: _arm(arm, changes, given, dtype) for arm, changes in given["arms"].items()}
    for arm in arms.values():
        _check_tuned_runs(arm, arms)
    shared = {
        "model": str(given["model"]),
        "dtype": dtype,
        "data": str(given["data"]),
        "rows": given.get("rows"),
        "run_model_code": evaluation["run_model_code"],
    }
    generate = make_generations(given.get("generate"), shared)
    target, non_target = (_tasks(given[key], key) for key in ("target", "non_target"))
    names = [task_name(task) for task in (*target, *non_target)]
    for task in names:
        if names.count(task) > 1:
            raise ValueError(f"at the top: two tasks are called {task!r}. Write NAME:KIND=FILE to rename one.")
    check_keys(evaluation["metrics"], names, "in evaluation.metrics")
    if isinstance(evaluation["limit"], Mapping):
        check_keys(evaluation["limit"], names, "in evaluation.limit")
    pairs = [tuple(pair) if isinstance(pair, list) else (pair,) for pair in given.get("compare") or []]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("at the top: `compare` must be a list of pairs of arms, such as [[stm, plain]].")
    main = tuple(given.get("main") or arms)
    for name_of_arm in (*main, *(arm for pair in pairs for arm in pair)):
        if name_of_arm not in arms:
            raise ValueError(
                f"at the top: `main` or `compare` names {name_of_arm!r}, which is no arm{nearest(name_of_arm, arms)}."
            )
    return Experiment(
        name=name,
        title=str(given.get("title") or name),
        model=str(given["model"]),
        dtype=dtype,
        target=target,
        non_target=non_target,
        evaluation=evaluation,
        drift=drift,
        generate=generate,
        arms=arms,
        main=main,
        compare=tuple((first, second) for first, second in pairs),
    )


def _arm(name: Any, changes: Any, shared: Mapping[str, Any], dtype: str) -> Arm:
    where = f"in arms.{name}"
    if not isinstance(name, str) or re.fullmatch(NAME, name) is None:
        raise ValueError(
            f"{where}: an arm's name is a file's name, of letters, digits and . _ + -, got {name!r} (a number in "
            "quotes is a name)."
        )
    changes = {} if changes is None else changes
    check_keys(changes, [*_OF_AN_ARM, *option_names(), *KL_OPTIONS], where)
    options = {key: value for key, value in changes.items() if key not in _OF_AN_ARM}
    if len({key.partition("_")[0] for key in options}) > 1:
        raise ValueError(f"{where}: an arm is an STM run or a KL run, it cannot have both: {', '.join(options)}.")
    training = _merged(shared.get("training"), changes.get("training"), f"{where}: `training`") or {}
    for key in training:
        if key in _SET_BY_US:
            raise ValueError(f"{where}: training.{key} is set by {_SET_BY_US[key]}. Remove it.")
        if key.startswith(("stm_", "kl_")):
            raise ValueError(f"{where}: {key} belongs into the arm itself, not into `training`.")
    for key in training.get("model_init_kwargs") or {}:
        if key in _NOT_MEASURED_SO:
            instead = "Set `dtype`" if "dtype" in key else "Remove it, or name a folder that has that model"
            raise ValueError(
                f"{where}: training.model_init_kwargs.{key} would train another model than the one that is "
                f"measured. {instead}."
            )
    lora = shared.get("lora")
    if "lora" in changes:
        lora = None if changes["lora"] is None else _merged(lora, changes["lora"], f"{where}: `lora`")
    seeds = changes.get("seeds", shared.get("seeds", [0]))
    if not isinstance(seeds, list) or not seeds or not all(is_count(seed, 0) for seed in seeds):
        raise ValueError(f"{where}: `seeds` must be a list of whole numbers, got {seeds!r}.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: a seed is there twice in {seeds!r}.")
    rows = changes.get("rows", shared.get("rows"))
    if rows is not None and not is_count(rows, 1):
        raise ValueError(f"{where}: `rows` must be a positive whole number, or null for all, got {rows!r}.")
    launch = changes.get("launch", shared.get("launch")) or []
    if not isinstance(launch, list) or not all(isinstance(word, str | int) for word in launch):
        raise ValueError(f"{where}: `launch` must be a list of words, such as [accelerate, launch], got {launch!r}.")
    return Arm(
        name=name,
        title=str(changes.get("title") or name),
        dtype=_dtype(changes.get("dtype", dtype), where),
        data=str(changes.get("data", shared["data"])),
        rows=rows,
        training=training,
        lora=lora,
        options=options,
        seeds=tuple(seeds),
        launch=tuple(map(str, launch)),
    )


def _tuned_option(arm: Arm) -> str:
    """The option of an arm that may name a run. Where there is a tuned model, the reference is the initial one."""
    return "stm_reference" if arm.options.get("stm_tuned_model") is None else "stm_tuned_model"


def _tuned_run(arm: Arm, arms: Mapping[str, Arm]) -> RunName | None:
    """The run that an arm's `stm_tuned_model` or `stm_reference` names, as ARM/SEED or, for its first seed, ARM.

    Raises:
        ValueError: If there is no such run.
    """
    option = _tuned_option(arm)
    given = arm.options.get(option)
    if not isinstance(given, str) or (option == "stm_reference" and given in (REFERENCE_INITIAL, REFERENCE_CURRENT)):
        return None
    if given in arms:
        return RunName(given, arms[given].seeds[0])
    match = re.fullmatch(rf"({NAME})/([0-9]+)", given)
    if match is None:
        return None
    name, seed, where = match[1], int(match[2]), f"in arms.{arm.name}: {option}: {given}"
    if name not in arms:
        raise ValueError(f"{where}: no arm {name!r}{nearest(name, arms)}. (A folder of this name is ./{given}.)")
    if seed not in arms[name].seeds:
        raise ValueError(f"{where}: {name} has no seed {seed}, it has {', '.join(map(str, arms[name].seeds))}.")
    return RunName(name, seed)


def _check_tuned_runs(arm: Arm, arms: Mapping[str, Arm]) -> None:
    """Raise ValueError for an arm whose tuned model is no run, or, by however many steps, its own."""
    path = [arm.name]
    while (run := _tuned_run(arms[path[-1]], arms)) is not None:
        if run.arm in path:
            circle, option = " -> ".join([*path, run.arm]), _tuned_option(arm)
            raise ValueError(f"in arms.{arm.name}: {option}: an arm cannot take its own model ({circle}).")
        path.append(run.arm)


def _checked(given: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_keys(given, defaults, where)
    values = {**defaults, **given}
    counts = {"batch_size": False, "max_new_tokens": defaults["max_new_tokens"] is None}
    for key, may_be_none in counts.items():
        if not is_count(values[key], 1) and not (may_be_none and values[key] is None):
            raise ValueError(f"{where}: `{key}` must be a positive whole number, got {values[key]!r}.")
    limits = values.get("limit")
    for limit in limits.values() if isinstance(limits, Mapping) else [limits]:
        if limit is not None and not is_count(limit, 1):
            raise ValueError(f"{where}: `limit` must be a number of documents, or one by task, got {limit!r}.")
    if not isinstance(values.get("run_model_code", False), bool):
        raise ValueError(f"{where}: `run_model_code` must be true or false, got {values['run_model_code']!r}.")
    prompts = values.get("prompts")
    if prompts is not None and not isinstance(prompts, str | list):
        raise ValueError(f"{where}: `prompts` must be a file's name or a list of prompts, got {prompts!r}.")
    return values


def _merged(shared: Any, own: Any, where: str) -> dict[str, Any] | None:
    for part in (shared, own):
        if part is not None and not isinstance(part, Mapping):
            raise ValueError(f"{where}: a mapping is needed, got {part!r}.")
    return None if shared is None and own is None else {**(shared or {}), **(own or {})}


def _tasks(given: Any, key: str) -> tuple[str, ...]:
    tasks = [given] if isinstance(given, str) else given
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"at the top: `{key}` must be a list of tasks, got {given!r}.")
    return tuple(tasks)


def _dtype(given: Any, where: str) -> str:
    if given not in DTYPES:
        raise ValueError(f"{where}: `dtype` must be one of {', '.join(DTYPES)}, got {given!r}.")
    return str(given)

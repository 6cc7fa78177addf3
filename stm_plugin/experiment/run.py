"""Doing an experiment's runs: one process after another, each of which can be stopped and started again.

A run's result is a file that appears when the run is done; what is there is not done again. Whatever ends a run
before that leaves nothing but its folder below `work`, which the next start empties. Data sets that are generated are
gone on with; a run that takes another run's trained model comes after it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tasks import definition_version
from .config import Experiment, RunName
from .generating import Generation, generated_path, receipt_path, settings_path
from .models import model_digest
from .results import INITIAL_NAME, Facts, model_path, read_json, run_path, write_json
from .settings import LOOKED_UP, Settings, differences, digests, task_kind, task_name

_MODULE = "stm_plugin.experiment.arm"
_SECONDS_TO_STOP = 10
INITIAL = "the initial model"
_SETTINGS_NAME = "experiment_settings.json"
"""In a kept model's folder: the settings of its run."""


class RunFailedError(RuntimeError):
    """A process ended without its result; the message has its last line and the name of its log."""


@dataclass(frozen=True)
class Runner:
    """Does the runs of an experiment.

    Attributes:
        experiment: The experiment.
        data: Folder of the data; None where files are not looked at.
        output: Folder of the results.
        say: Takes one line of progress at a time.
        minutes: No run is started that would end later than this; None for no limit.
        again: Whether results with other settings than now are made anew; otherwise they are an error.
        keep_models: Whether all trained models are kept, below `models`; those that another run takes always are.
    """

    experiment: Experiment
    data: Path | None
    output: Path
    say: Callable[[str], None]
    minutes: float | None = None
    again: bool = False
    keep_models: bool = False
    _models: dict[str, str | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Digests of models, each looked up once."""

    def settings(self, run: RunName | None) -> Settings:
        """Settings of a run, or of the initial model's measures, with what is behind the names in them."""
        experiment = self.experiment
        settings = experiment.initial_settings() if run is None else experiment.run_settings(run)
        return settings | self._looked_up(experiment.files(run), experiment.models(run))

    def _looked_up(self, files: Sequence[str], models: Sequence[str]) -> Settings:
        """Digests of files and models by their names."""
        if self.data is None:
            return dict.fromkeys(LOOKED_UP)
        found = digests(files, self.data)
        for name in models:
            if name not in self._models:
                self._models[name] = model_digest(name)
        return {"files": found, "models": {name: self._models[name] for name in models}}

    def result(self, run: RunName | None) -> Facts | None:
        """The result that is there; None where there is none."""
        return read_json(self.output / INITIAL_NAME if run is None else run_path(self.output, run))

    def changes(self, run: RunName | None) -> list[str] | None:
        """What differs between a result's settings, or the tasks' definitions, and today's; None without a result."""
        result = self.result(run)
        if result is None:
            return None
        lines = differences(result["settings"], self.settings(run))
        for task in (*self.experiment.target, *self.experiment.non_target):
            name, kind = task_name(task), task_kind(task)
            score = result["evaluation"]["tasks"].get(name)
            if kind is not None and score is not None:
                now = definition_version(kind)
                then = score["settings"].get("version", now)
                if then != now:
                    lines.append(f"the definition of {kind} was of version {then}, is now of {now}")
        return lines

    def generation_settings(self, generation: Generation) -> Settings:
        """Settings of a data set that is generated, with what is behind the names in them."""
        return generation.settings() | self._looked_up(generation.files(), [generation.options["model"]])

    def generation_changes(self, generation: Generation) -> list[str] | None:
        """What differs between the settings that a data set was begun with and today's; None where it was not."""
        begun = read_json(settings_path(self.output, generation.name))
        return None if begun is None else differences(begun["settings"], self.generation_settings(generation))

    def is_generated(self, generation: Generation) -> bool:
        """Whether a data set is there, with today's settings."""
        receipt = read_json(receipt_path(self.output, generation.name))
        if receipt is None or not generated_path(self.output, generation.name).exists():
            return False
        return "made_for" in receipt and not differences(receipt["made_for"], self.generation_settings(generation))

    def run(self, runs: Sequence[RunName]) -> list[str]:
        """Do the runs that have no result yet, after the measures of the initial model.

        Returns:
            Names of the runs that failed.

        Raises:
            ValueError: If another `stm experiment` works in the folder; if a result was made with other settings; or
                if settings are refused.
            RunFailedError: If the initial model could not be measured.
        """
        from filelock import FileLock, Timeout

        self.say("Looking at data and models ...")
        for run in (None, *runs):
            self.settings(run)  # files that are missing are told before there is a folder
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / ".lock", timeout=0):
                return self._run(runs)
        except Timeout:
            raise ValueError(f"another stm experiment works in {self.output}. Wait for it, or stop it.") from None

    def _run(self, runs: Sequence[RunName]) -> list[str]:
        started = time.monotonic()
        self._check_names()
        found = {run: self.changes(run) for run in (None, *runs)}
        to_do = self._to_do(runs, found)
        wanted = [self.experiment.generation_of(run) for run in to_do]
        generations = {generation.name: generation for generation in wanted if generation is not None}
        changed = {INITIAL if run is None else str(run): changes for run, changes in found.items() if changes}
        for name, generation in generations.items():
            if changes := self.generation_changes(generation):
                changed[f"generate.{name}"] = changes
        if changed and not self.again:
            raise ValueError(_told(changed))
        num_done = sum(run not in to_do for run in runs)
        self.say(f"{num_done} of {len(runs)} runs are there already, in {self.output}.")
        if to_do:
            settings = [self.settings(run) for run in to_do]
            options = {name: generation.options for name, generation in generations.items()}
            self._process("check", ["check"], settings=settings, generate=options)
            shutil.rmtree(self.output / "work" / "check", ignore_errors=True)
        if found[None] is None or found[None]:
            self.say(f"{INITIAL} is measured ...")
            result = self._result("initial", ["initial"], None, settings=self.settings(None))
            self.say(f"{INITIAL}: {_scores(result)}, {result['seconds']['total']:.0f} s")
        failed: set[RunName | str] = set()
        for index, run in enumerate(to_do):
            if self._is_too_late(run, started, len(to_do) - index):
                break
            try:
                if self._prepare(run, failed) and self._is_too_late(run, started, len(to_do) - index):
                    break
                estimate = self.estimate(run)
                about = "" if estimate is None else f", about {_duration(estimate)}"
                self.say(f"{run} ({index + 1} of {len(to_do)}{about}) ...")
                result = self._train_and_measure(run)
            except RunFailedError as error:
                self.say(str(error))
                failed.add(run)
            else:
                self.say(f"{run}: {_scores(result)}, {result['seconds']['total']:.0f} s")
        return [str(run) for run in to_do if run in failed]

    def _check_names(self) -> None:
        """Raise ValueError for a data set to generate that has the name of a file."""
        for name in self.experiment.generate:
            if self.data is not None and (self.data / name).exists():
                raise ValueError(
                    f"in generate.{name}: {self.data} has a file of this name, and `data: {name}` could mean either. "
                    "Rename one of them."
                )

    def _to_do(self, runs: Sequence[RunName], found: dict[RunName | None, list[str] | None]) -> list[RunName]:
        """Runs that have no result of today's settings, and before each the run whose model it takes.

        Args:
            runs: The runs that are wanted.
            found: Changes of each run; those of runs that are found to be needed are added.
        """
        to_do: list[RunName] = []

        def add(run: RunName) -> None:
            found.setdefault(run, self.changes(run))
            if run in to_do or found[run] == []:
                return
            tuned = self.experiment.tuned_run(run)
            if tuned is not None:
                add(tuned)
            to_do.append(run)

        for run in runs:
            add(run)
        return to_do

    def _is_too_late(self, run: RunName, started: float, num_left: int) -> bool:
        """Whether a run would end after the time that there is, which is then said."""
        if self.minutes is None:
            return False
        left, estimate = 60 * self.minutes - (time.monotonic() - started), self.estimate(run)
        if left > 0 and (estimate is None or estimate <= left):
            return False
        about = "" if estimate is None else f", which takes about {_duration(estimate)}"
        self.say(f"Stopped before {run}{about}: {num_left} runs are left. Start again to go on.")
        return True

    def _prepare(self, run: RunName, failed: set[RunName | str]) -> bool:
        """See to it that a run's generated data and its tuned model are there.

        Args:
            run: The run.
            failed: Runs that failed, and names of data sets that could not be generated; such a one is added.

        Returns:
            Whether there was anything to do.

        Raises:
            RunFailedError: If they cannot be had.
        """
        did_something = False
        generation = self.experiment.generation_of(run)
        if generation is not None and not self.is_generated(generation):
            if generation.name in failed:
                raise RunFailedError(f"{run} failed: its data, {generation.name}, could not be generated.")
            try:
                self._generate(generation)
            except RunFailedError:
                failed.add(generation.name)
                raise
            did_something = True
        tuned = self.experiment.tuned_run(run)
        if tuned is not None and not self._is_kept(tuned):
            if tuned in failed:
                raise RunFailedError(f"{run} failed: the run whose model it takes, {tuned}, has failed.")
            self._prepare(tuned, failed)
            self.say(f"{tuned}: trained again, for {run} takes its model ...")
            self._train_again(tuned)
            did_something = True
        return did_something

    def _generate(self, generation: Generation) -> None:
        name, settings = generation.name, self.generation_settings(generation)
        if self.generation_changes(generation):
            for path in (generated_path(self.output, name), *self.output.glob(f"generated/{name}.*.json*")):
                path.unlink(missing_ok=True)
        write_json({"settings": settings}, settings_path(self.output, name))
        self.say(f"{name}: generated, or gone on with ...")
        process = f"generate-{name}"
        self._process(process, ["generate"], generation=name, options=generation.options, settings=settings)
        shutil.rmtree(self.output / "work" / process, ignore_errors=True)
        receipt = read_json(receipt_path(self.output, name))
        if receipt is None or not self.is_generated(generation):
            raise RunFailedError(f"{process} failed: it left no data set (its log is {self._log(process)})")
        samples, rows = receipt["samples"], receipt["rows"]
        self.say(
            f"{name}: {samples['passed']:,} of {samples['generated']:,} samples passed, "
            f"{rows['written']:,} rows written, {receipt['seconds']['total']:.0f} s"
        )
        for reason, number in samples["without_an_answer"].items():
            self.say(f"{name}: {number:,} requests got no answer: {reason}")

    def _train_again(self, run: RunName) -> None:
        """Train a run whose result is there, for its model alone."""
        name = f"{run.arm}-{run.seed}"
        launch = self.experiment.arms[run.arm].launch
        settings = self.settings(run)
        work = self._process(name, ["train"], launch=launch, log=f"{name}.model", settings=settings)
        self._keep(run, work)
        shutil.rmtree(work, ignore_errors=True)

    def _is_kept(self, run: RunName) -> bool:
        """Whether the model of a run is there, trained with today's settings."""
        kept = read_json(model_path(self.output, run) / _SETTINGS_NAME)
        return kept is not None and not differences(kept["settings"], self.settings(run))

    def _keep(self, run: RunName, work: Path) -> None:
        """Keep the model that a process left in its folder."""
        kept = model_path(self.output, run)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        write_json({"settings": self.settings(run)}, work / "model" / _SETTINGS_NAME)
        os.replace(work / "model", kept)

    def estimate(self, run: RunName) -> float | None:
        """Seconds that a run may take: as its arm's other seeds, or as the longest run; None before any is done."""
        seconds = {}
        for other in self.experiment.runs():
            try:
                result = self.result(other)
            except ValueError:
                continue
            if result is not None:
                seconds[other] = float(result["seconds"]["total"])
        of_arm = [value for other, value in seconds.items() if other.arm == run.arm]
        return max(of_arm or seconds.values(), default=None)

    def _train_and_measure(self, run: RunName) -> Facts:
        name = f"{run.arm}-{run.seed}"
        launch = self.experiment.arms[run.arm].launch
        facts: dict[str, Any] = {"settings": self.settings(run), "started": time.time()}
        if launch:  # by several processes; what they leave is measured by one
            self._process(name, ["train"], launch=launch, **facts)
            return self._result(name, ["measure"], run, goes_on=True, **facts)
        return self._result(name, ["train", "measure"], run, **facts)

    def _result(self, name: str, phases: Sequence[str], run: RunName | None, **options: Any) -> Facts:
        """Do phases of which the last leaves a result, in a process of their own.

        Raises:
            RunFailedError: If it left none.
        """
        path = self.output / INITIAL_NAME if run is None else run_path(self.output, run)
        before = _version(path)
        work = self._process(name, phases, result=str(path), **options)
        made = self.result(run)
        if made is None or _version(path) == before:
            raise RunFailedError(f"{name} failed: it left no result (its log is {self._log(name)})")
        if run is not None and (work / "model").is_dir():
            if self.keep_models or run in self.experiment.runs_to_keep():
                self._keep(run, work)
        shutil.rmtree(work, ignore_errors=True)
        return made

    def _process(
        self,
        name: str,
        phases: Sequence[str],
        *,
        launch: Sequence[str] = (),
        goes_on: bool = False,
        log: str | None = None,
        **facts: Any,
    ) -> Path:
        """Do phases in a process of their own.

        Args:
            name: Of its folder below `work`.
            phases: What `arm` is to do.
            launch: Words that start it.
            goes_on: Whether it takes what an earlier process has left in the folder.
            log: Name of its log, if not `name`.
            **facts: What `arm` is to know.

        Returns:
            The folder.

        Raises:
            RunFailedError: If it failed.
        """
        work, log_path = self.output / "work" / name, self._log(log or name)
        if not goes_on:
            shutil.rmtree(work, ignore_errors=True)
        for folder in (work, log_path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        job = {"data": str(self.data), "output": str(self.output), "work": str(work), "watch": True}
        (work / "job.json").write_text(json.dumps(job | facts), encoding="utf-8")
        command = [*_found(launch), *([] if launch else [sys.executable]), "-m", _MODULE, *phases]
        status = _wait([*command, str(work / "job.json")], log_path, append=goes_on)
        if status != 0:
            raise RunFailedError(f"{name} failed: {_last_line(log_path)} (all of it is in {log_path})")
        return work

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.log"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"


def _version(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that takes its place, as `write_json` has it; None where there is none."""
    if not path.exists():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def _wait(command: Sequence[str], log: Path, *, append: bool) -> int:
    """Exit status of a process whose output goes into a file; it ends with us, also where we are killed."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that wait in a busy loop make a run several times slower as soon as another process takes part of a core.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with log.open("ab" if append else "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written to: it ends when we do, and the process with it
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that Ctrl-C comes to us alone
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_SECONDS_TO_STOP)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _found(launch: Sequence[str]) -> list[str]:
    """The words that start a training, with the path of the first: beside this Python, or wherever there is one."""
    if not launch:
        return []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return [shutil.which(launch[0], path=path) or launch[0], *launch[1:]]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def _scores(result: Facts) -> str:
    return ", ".join(f"{name} {score['score']:.4f}" for name, score in result["evaluation"]["tasks"].items())


def _told(changed: dict[str, list[str]]) -> str:
    lines = [f"  {name}: {'; '.join(changes)}" for name, changes in changed.items()]
    return "\n".join(
        [
            "results were made with other settings than now:",
            *lines,
            "Put the settings back, choose another --output, or make these results anew with --again.",
        ]
    )

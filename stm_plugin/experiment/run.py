"""Doing an experiment's runs: one process after another, each of which can be stopped and started again.

A run's result is a file that appears when the run is done; what is there is not done again. Whatever ends a run
before that leaves nothing but its folder below `work`, which the next start empties.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Experiment, RunName
from .results import INITIAL_NAME, Facts, read_json, run_path
from .settings import Settings, differences, digests

_MODULE = "stm_plugin.experiment.arm"
_SECONDS_TO_STOP = 10
INITIAL = "the initial model"


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
        keep_models: Whether trained models are kept, below `models`.
    """

    experiment: Experiment
    data: Path | None
    output: Path
    say: Callable[[str], None]
    minutes: float | None = None
    again: bool = False
    keep_models: bool = False

    def settings(self, run: RunName | None) -> Settings:
        """Settings of a run, or of the initial model's measures, with the digests of the files that they read."""
        experiment = self.experiment
        settings = experiment.initial_settings() if run is None else experiment.run_settings(run)
        files = None if self.data is None else digests(experiment.files(run), self.data)
        return settings | {"files": files}

    def result(self, run: RunName | None) -> Facts | None:
        """The result that is there; None where there is none."""
        return read_json(self.output / INITIAL_NAME if run is None else run_path(self.output, run))

    def changes(self, run: RunName | None) -> list[str] | None:
        """What differs between a result's settings and today's; None where there is no result."""
        result = self.result(run)
        return None if result is None else differences(result["settings"], self.settings(run))

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

        self.output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.output / ".lock", timeout=0):
                return self._run(runs)
        except Timeout:
            raise ValueError(f"another stm experiment works in {self.output}. Wait for it, or stop it.") from None

    def _run(self, runs: Sequence[RunName]) -> list[str]:
        started = time.monotonic()
        found = {run: self.changes(run) for run in (None, *runs)}
        changed = {run: changes for run, changes in found.items() if changes}
        if changed and not self.again:
            raise ValueError(_told(changed))
        to_do = [run for run in runs if found[run] is None or found[run]]
        self.say(f"{len(runs) - len(to_do)} of {len(runs)} runs are there already, in {self.output}.")
        if to_do:
            self._process("check", ["check"], None, settings=[self.settings(run) for run in to_do])
        if found[None] is None or found[None]:
            self.say(f"{INITIAL}: measured ...")
            result = self._process("initial", ["initial"], None, settings=self.settings(None))
            self.say(f"{INITIAL}: {_scores(result)}, {result['seconds']['total']:.0f} s")
        failed: list[str] = []
        for index, run in enumerate(to_do):
            estimate = self.estimate(run)
            left = None if self.minutes is None else 60 * self.minutes - (time.monotonic() - started)
            if left is not None and (left <= 0 or (estimate is not None and estimate > left)):
                about = "" if estimate is None else f", which takes about {estimate / 60:.0f} min"
                self.say(f"Stopped before {run}{about}: {len(to_do) - index} runs are left. Start again to go on.")
                break
            about = "" if estimate is None else f", about {estimate / 60:.0f} min"
            self.say(f"{run} ({index + 1} of {len(to_do)}{about}) ...")
            try:
                result = self._train_and_measure(run)
            except RunFailedError as error:
                self.say(str(error))
                failed.append(str(run))
            else:
                self.say(f"{run}: {_scores(result)}, {result['seconds']['total']:.0f} s")
        return failed

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
        launch = list(self.experiment.arms[run.arm].launch)
        facts: dict[str, Any] = {"settings": self.settings(run), "started": time.time()}
        if launch:  # by several processes; what they leave is measured by one
            self._process(name, ["train"], run, launch=launch, **facts)
            return self._process(name, ["measure"], run, keep_work=True, **facts)
        return self._process(name, ["train", "measure"], run, **facts)

    def _process(
        self,
        name: str,
        phases: Sequence[str],
        run: RunName | None,
        *,
        launch: Sequence[str] = (),
        keep_work: bool = False,
        **facts: Any,
    ) -> Facts:
        """Do phases in a process of their own; what they leave is their result, if that is their last one.

        Raises:
            RunFailedError: If it ended otherwise.
        """
        work, log = self.output / "work" / name, self.output / "logs" / f"{name}.log"
        if not keep_work:
            shutil.rmtree(work, ignore_errors=True)
        for folder in (work, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        result = self.output / INITIAL_NAME if run is None else run_path(self.output, run)
        before = result.stat().st_mtime_ns if result.exists() else None
        job = {"data": str(self.data), "output": str(self.output), "work": str(work), "result": str(result)}
        (work / "job.json").write_text(json.dumps(job | {"watch": True} | facts), encoding="utf-8")
        command = [*_found(launch), *([] if launch else [sys.executable]), "-m", _MODULE, *phases]
        status = _wait([*command, str(work / "job.json")], log, append=keep_work)
        if status != 0:
            raise RunFailedError(f"{name} failed: {_last_line(log)} (all of it is in {log})")
        if phases[-1] not in ("initial", "measure"):
            if phases[-1] == "check":
                shutil.rmtree(work, ignore_errors=True)
            return {}
        made = self.result(run)
        if made is None or (before is not None and result.stat().st_mtime_ns == before):
            raise RunFailedError(f"{name} failed: it left no result (its log is {log})")
        if self.keep_models and (work / "model").is_dir():
            kept = self.output / "models" / name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            os.replace(work / "model", kept)
        shutil.rmtree(work, ignore_errors=True)
        return made


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


def _told(changed: dict[RunName | None, list[str]]) -> str:
    lines = [f"  {INITIAL if run is None else run}: {'; '.join(changes)}" for run, changes in changed.items()]
    return "\n".join(
        [
            "results were made with other settings than now:",
            *lines,
            "Put the settings back, choose another --output, or make these results anew with --again.",
        ]
    )

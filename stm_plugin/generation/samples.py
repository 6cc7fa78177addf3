"""The file of all samples: what has been generated stays, whatever ends the process that generates.

    {"settings": {...}}                                                       what the samples depend on
    {"ground_truth_perplexity": [...]}                                        of the human answer of each row
    {"row": 0, "sample": 3, "text": ..., "num_tokens": ..., "finish": ...}    an answer, as soon as it is there
    {"row": 0, "sample": 3, "verdict": ..., "perplexity": ...}                what became of it

A line may also have `seconds`, spent since the line before, by phase. Lines are appended, each straight to the disk:
at most the last is torn, and counts as not written. At the end the file has one line for each sample.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..experiment.settings import Settings, differences
from ..tasks.code_answers import PASSED
from .engines import STOP

Key = tuple[int, int]
"""Row, and which of its samples."""

_OF_VERIFIER = ("verifier", "verifier_source")
"""Settings on which verdicts depend, but no texts and perplexities."""


class Sample(NamedTuple):
    """An answer that was generated.

    Attributes:
        row: Index of the row that it is for.
        sample: Which of the row's samples it is, from 0.
        text: The answer.
        num_tokens: New tokens, that which ends the turn included.
        finish: `engines.STOP` or `engines.LENGTH`.
        verdict: `PASSED`, or why it did not pass; None before it is judged.
        perplexity: Under the model that scores; None for an empty answer, and before it is judged.
    """

    row: int
    sample: int
    text: str
    num_tokens: int
    finish: str
    verdict: str | None = None
    perplexity: float | None = None

    @property
    def key(self) -> Key:
        """Row, and which of its samples."""
        return self.row, self.sample

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read in it."""
        return not self.text.strip()

    @property
    def is_verified(self) -> bool:
        """Whether it may be chosen: whole, not empty, and passed by the verifier."""
        return self.verdict == PASSED and self.finish == STOP and not self.is_empty and self.perplexity is not None


class SamplesFile:
    """Samples on disk, for one process at a time.

    Samples of other settings are refused, but for what leaves them as good as they are: another verifier, whose
    verdicts take the place of those there; more samples of each row; and more rows behind the same ones.

    Args:
        path: The file; it is made, or gone on with.
        settings: What the samples and verdicts depend on, as JSON can hold it.
        digest_of: The digest (`data` in the settings) of so many of the rows, from the first.

    Attributes:
        samples: What has been generated.
        ground_truth: Perplexity of each row's human answer; of the first ones only before it is there for all.
        seconds: Seconds spent so far, by phase, over all starts.

    Raises:
        ValueError: If it was made with other settings, or is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path, settings: Settings, digest_of: Callable[[int], str] = lambda _: "") -> None:
        self.path, self.settings, self._digest_of = path, settings, digest_of
        self.samples: dict[Key, Sample] = {}
        self.ground_truth: list[float] = []
        self.seconds: dict[str, float] = {}
        self._not_written: dict[str, float] = {}
        whole, before = self._read()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, whole)
        if before is None:
            self._append([{"settings": settings}])
        elif before != settings:
            if any(before.get(name) != settings.get(name) for name in _OF_VERIFIER):
                self.samples = {key: sample._replace(verdict=None) for key, sample in self.samples.items()}
            self.tidy()

    def _read(self) -> tuple[int, Settings | None]:
        """Take what is there; how many bytes of it are whole lines, and the settings that it was made with."""
        before: Settings | None = None
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                if number == 1:
                    before = dict(record["settings"])
                else:
                    self._take(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, is damaged ({type(error).__name__}: {error}). Start anew with "
                    "--again; or, of samples, remove the line, and what it held is generated again."
                ) from None
            if before is not None and number == 1 and (changes := self._changes(before)):
                raise ValueError(_told(self.path, changes))
        return whole, before

    def _changes(self, before: Settings) -> list[str]:
        """What differs between settings so much that samples of the one are none of the other."""
        now = self.settings
        usable = before | {name: now[name] for name in _OF_VERIFIER if name in now}
        if 0 < before.get("samples", 0) < now.get("samples", 0):
            usable["samples"] = now["samples"]
        rows = before.get("rows", 0)
        if 0 < rows < now.get("rows", 0) and self._digest_of(rows) == before.get("data"):
            usable |= {"rows": now["rows"], "data": now["data"]}
        return differences(usable, now)

    def _take(self, record: dict[str, Any]) -> None:
        for phase, seconds in record.get("seconds", {}).items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if "ground_truth_perplexity" in record:
            self.ground_truth = record["ground_truth_perplexity"]
        if "row" in record:
            key = record["row"], record["sample"]
            facts = {name: value for name, value in record.items() if name in Sample._fields}
            self.samples[key] = Sample(**facts) if "text" in facts else self.samples[key]._replace(**facts)

    def add(self, sample: Sample) -> None:
        """Keep an answer that has just been generated."""
        self.samples[sample.key] = sample
        facts = sample._asdict()
        self._append([{name: facts[name] for name in ("row", "sample", "text", "num_tokens", "finish")}])

    def judge(self, samples: Iterable[Sample]) -> None:
        """Keep verdicts and perplexities of answers that are there already."""
        samples = list(samples)
        self.samples.update({sample.key: sample for sample in samples})
        names = ("row", "sample", "verdict", "perplexity")
        self._append([{name: getattr(sample, name) for name in names} for sample in samples])

    def set_ground_truth(self, perplexities: Sequence[float]) -> None:
        """Keep the perplexity of each row's human answer."""
        self.ground_truth = list(perplexities)
        self._append([{"ground_truth_perplexity": self.ground_truth}])

    def spent(self, phase: str, seconds: float) -> None:
        """Count time; it is written with what is kept next."""
        for counts in (self.seconds, self._not_written):
            counts[phase] = counts.get(phase, 0.0) + seconds

    def in_order(self) -> list[Sample]:
        """All samples, by row and number."""
        return [self.samples[key] for key in sorted(self.samples)]

    def tidy(self) -> None:
        """Write the file anew: one line for each sample, in order. What is kept afterwards is appended as before."""
        records: list[dict[str, Any]] = [{"settings": self.settings}, {"seconds": self.seconds}]
        if self.ground_truth:
            records.append({"ground_truth_perplexity": self.ground_truth})
        records += [sample._asdict() for sample in self.in_order()]
        write_lines(records, self.path)
        self._not_written.clear()
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def close(self) -> None:
        """Write the time that is not written yet, and let go of the file."""
        try:
            if self._not_written:
                self._append([{}])
        finally:
            os.close(self._file)

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        if not records:
            return
        if self._not_written:
            records = [records[0] | {"seconds": self._not_written}, *records[1:]]
        data, length = _lines(records), os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except BaseException:  # a full disk, say: what is written next must not follow a torn line
            os.ftruncate(self._file, length)
            raise
        self._not_written = {}
        os.fsync(self._file)


def write_lines(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write JSON lines so that a reader finds all of them or what was there before."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _told(path: Path, changes: Sequence[str]) -> str:
    lines = [f"  {change}" for change in changes]
    return "\n".join(
        [
            f"the samples in {path} were made with other settings than now:",
            *lines,
            "Put the settings back, choose another --output, or start anew with --again.",
        ]
    )

"""Scores on disk: one folder for each key, made of shards that verify themselves, usable once its manifest is written.

    ROOT/KEY/shard-000000000000.npy   float32 NLL in nats from that place in the plan's order on; then the token budget
                                      that it was made with, and a checksum
    ROOT/KEY/manifest.json            key, number of scores, every shard with its checksum and budget; written last
    ROOT/.KEY.partial/                an entry that is still being made, by whoever holds ROOT/.KEY.lock

Thresholds are applied when scores are read, so they are no part of the key.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from ..constants import SCORES_FORMAT_VERSION

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_CHECKSUM_BYTES = 16
_BUDGET_BYTES = 8


class ScoresError(ValueError):
    """Stored scores that must not be used, or that cannot be stored."""


class ScoresBusyError(ScoresError):
    """Scores that another process is making."""


@dataclass(frozen=True)
class ScoresKey:
    """What scores depend on.

    Attributes:
        model: Fingerprint of the model's function.
        quantization: How its weights are quantized.
        dtype: Dtypes of its floating-point weights, joined by commas.
        autocast: Dtype of the forward's autocast, or `none`.
        data: Fingerprint of the token ids and label positions.
        format_version: Layout of the store.
    """

    model: str
    quantization: str
    dtype: str
    autocast: str
    data: str
    format_version: int = SCORES_FORMAT_VERSION

    @property
    def name(self) -> str:
        """Folder name of the entry: 128 bits in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


class Interval(NamedTuple):
    """Places `start` to `stop` (exclusive) of the plan's order."""

    start: int
    stop: int


class Shard(NamedTuple):
    """What is to be known of a shard beside its scores.

    Attributes:
        checksum: 128-bit hash of its content and place, in hexadecimal.
        tokens_per_batch: Token budget that it was made with; memory may have forced a smaller one than was asked for.
    """

    checksum: str
    tokens_per_batch: int


@dataclass(frozen=True)
class EntryReport:
    """What a scores folder holds.

    Attributes:
        path: The folder.
        key: Its key; None where the manifest cannot be read.
        num_scores: Scores that its manifest promises.
        num_bytes: Bytes of its files.
        tokens_per_batch: Token budget that it was made with.
        faults: What is wrong with it, in words; empty for a sound entry.
    """

    path: Path
    key: ScoresKey | None
    num_scores: int
    num_bytes: int
    tokens_per_batch: int | None
    faults: list[str]


def default_root() -> Path:
    """Where scores are kept by default: `scores` in `$STM_HOME`, or in `~/.cache/stm_plugin`."""
    return cache_home() / "scores"


def cache_home() -> Path:
    """The folder that holds everything this package keeps between runs."""
    return Path(os.environ.get("STM_HOME") or "~/.cache/stm_plugin").expanduser()


class ScoreStore:
    """Entries below a root folder.

    Args:
        root: The folder; None for the default one. Made where it is missing.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None):
        self.root = Path(root).expanduser() if root is not None else default_root()

    def check_usable(self) -> None:
        """Raise ScoresError for a root that can neither take scores nor has any."""
        if not any(self.root.glob(f"*/{MANIFEST}")):
            self.check_writable()

    def check_writable(self) -> None:
        """Raise ScoresError unless an entry can be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise ScoresError(
                f"Scores cannot be written to {self.root} ({error}). Set stm_scores_dir (or the environment variable "
                "STM_HOME) to a folder that can be written."
            ) from error

    def path(self, key: ScoresKey) -> Path:
        """Folder of a key's entry, whether or not it exists."""
        return self.root / key.name

    def read(self, key: ScoresKey, num_scores: int) -> np.ndarray | None:
        """Scores of a key, or None where there is no entry.

        Args:
            key: The entry's key.
            num_scores: Scores that the data asks for.

        Returns:
            NLL in nats, shape `(num_scores,)`, float32.

        Raises:
            ScoresError: For an entry that is damaged or contradicts its key, naming it and what is wrong.
        """
        path = self.path(key)
        if not path.exists():
            return None
        found = _read_entry(path, key, num_scores)
        if found.faults:
            raise _unusable(path, found.faults[0])
        return found.scores

    @contextmanager
    def writing(
        self, key: ScoresKey, num_scores: int, tokens_per_batch: int, *, patience: float = -1
    ) -> Iterator["Draft"]:
        """Make an entry, or what is missing of it, while nobody else does; waits for whoever is at it.

        What a run that was stopped has left is taken up, and so is what is sound of a damaged entry.

        Args:
            key: The entry's key.
            num_scores: Scores that the data asks for.
            tokens_per_batch: Token budget of the batches, for the record.
            patience: Seconds to wait for another process; -1 for as long as it takes.

        Raises:
            ScoresBusyError: If another process is still at it after that.
            ScoresError: If it cannot be written.
        """
        self.check_writable()
        path, lock = self.path(key), FileLock(self.root / f".{key.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.info("Another process is making the scores in %s; this one waits for it.", path)
            try:
                held = lock.acquire(timeout=patience)
            except Timeout:
                raise ScoresBusyError(f"Another process is still making the scores in {path}.") from None
        with held:  # `with lock` would acquire it once more, and release it once
            draft = Draft(path, key, num_scores, tokens_per_batch)
            with _write_errors(path):
                draft.recover()
            yield draft


class Draft:
    """An entry that is being made: its shards are written as they come, the manifest last.

    Attributes:
        scores: NLL in nats in the plan's order, shape `(num_scores,)`, float32; zero where it is missing.
        missing: The intervals still to be made, in order.
    """

    def __init__(self, path: Path, key: ScoresKey, num_scores: int, tokens_per_batch: int):
        self.path, self.key = path, key
        self._folder = path if path.exists() else path.with_name(f".{path.name}.partial")
        self._shards: dict[Interval, Shard] = {}
        self._tokens_per_batch = tokens_per_batch
        self._sound = False
        self.scores = np.zeros(num_scores, np.float32)
        self.missing = [Interval(0, num_scores)] if num_scores else []

    def recover(self) -> None:
        """Take up what is there and sound; remove what is not."""
        if self._folder == self.path:
            found = _read_entry(self.path, self.key, len(self.scores))
            self._sound = not found.faults
            for fault in found.faults:
                logger.warning("The scores in %s are damaged and are made again: %s.", self.path, fault)
        else:
            self._folder.mkdir(exist_ok=True)
            found = _read_shards(self._folder, self.key, len(self.scores))
        self.scores, self._shards = found.scores, found.shards
        ends = [Interval(0, 0), *self._shards, Interval(len(self.scores), len(self.scores))]
        gaps = [Interval(before.stop, after.start) for before, after in pairwise(ends)]
        self.missing = [gap for gap in gaps if gap.start < gap.stop]
        if not self._sound:
            kept = {_shard_name(interval) for interval in self._shards} | {MANIFEST}
            for file in self._folder.iterdir():
                if file.name not in kept:
                    file.unlink()

    def put(self, start: int, scores: np.ndarray, tokens_per_batch: int | None = None) -> None:
        """Write a shard.

        Args:
            start: Its first place in the plan's order.
            scores: NLL in nats, shape `(n,)`, float32.
            tokens_per_batch: Token budget that it was made with; None for the entry's own.

        Raises:
            ScoresError: If it cannot be written; what was there stays sound.
        """
        interval = Interval(start, start + len(scores))
        content, shard = _shard_content(self.key, start, scores, tokens_per_batch or self._tokens_per_batch)
        with _write_errors(self.path):
            _write_whole(self._folder / _shard_name(interval), content)
        self.scores[interval.start : interval.stop] = scores
        self._shards[interval] = shard

    def finish(self) -> None:
        """Write the manifest: from here on the entry can be read.

        Raises:
            ScoresError: If it cannot be written.
        """
        if self._sound:
            return
        content = {
            "key": asdict(self.key),
            "num_scores": len(self.scores),
            "unit": "nats",
            "tokens_per_batch": self._tokens_per_batch,
            "shards": [[*interval, *shard] for interval, shard in sorted(self._shards.items())],
        }
        whole = content | {"checksum": _manifest_checksum(content)}
        with _write_errors(self.path):
            _write_whole(self._folder / MANIFEST, (json.dumps(whole) + "\n").encode())
            if self._folder != self.path:
                os.rename(self._folder, self.path)


def entries(folder: str | os.PathLike[str], *, verify: bool = True) -> list[EntryReport]:
    """What the entries of a folder hold, and what is wrong with them: one entry, or all below a root.

    Args:
        folder: The folder.
        verify: Whether to read the shards too; else the manifests alone.

    Raises:
        ScoresError: If there is none.
    """
    folder = Path(folder).expanduser().resolve()
    paths = [folder] if _looks_like_an_entry(folder) else sorted(filter(_looks_like_an_entry, folder.glob("*")))
    if not paths:
        raise ScoresError(f"{folder} holds no scores: it has no {MANIFEST}, and no folder in it has one.")
    return [_report(path, verify) for path in paths]


class _Found(NamedTuple):
    """Sound shards in order, without overlap; their scores, zero elsewhere; and what is wrong."""

    scores: np.ndarray
    shards: dict[Interval, Shard]
    faults: list[str]


def _looks_like_an_entry(folder: Path) -> bool:
    return not folder.name.startswith(".") and ((folder / MANIFEST).exists() or any(folder.glob("shard-*.npy")))


def _report(path: Path, verify: bool) -> EntryReport:
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    try:
        manifest = _read_manifest(path)
        key = ScoresKey(**manifest["key"])
    except _FaultError as fault:
        return EntryReport(path, None, 0, num_bytes, None, [str(fault)])
    faults = _read_entry(path, key, manifest["num_scores"]).faults if verify else []
    if key.name != path.name:
        faults.insert(0, f"its folder should be named {key.name}")
    return EntryReport(path, key, manifest["num_scores"], num_bytes, manifest["tokens_per_batch"], faults)


def _read_entry(path: Path, key: ScoresKey, num_scores: int) -> _Found:
    try:
        manifest = _read_manifest(path)
    except _FaultError as fault:
        found = _read_shards(path, key, num_scores)
        return found._replace(faults=[str(fault), *found.faults])
    for name, expected in asdict(key).items():
        if manifest["key"].get(name) != expected:
            mismatch = f"its {name} is {manifest['key'].get(name)!r}, expected {expected!r}"
            return _read_shards(path, key, num_scores, {})._replace(faults=[mismatch])
    if manifest["num_scores"] != num_scores:
        mismatch = f"it holds {manifest['num_scores']} scores, the data has {num_scores} label tokens"
        return _read_shards(path, key, num_scores, {})._replace(faults=[mismatch])
    expected = {Interval(*shard[:2]): Shard(*shard[2:]) for shard in manifest["shards"]}
    found = _read_shards(path, key, num_scores, expected)
    num_found = sum(interval.stop - interval.start for interval in found.shards)
    if not found.faults and num_found != num_scores:
        return found._replace(faults=[f"its shards hold {num_found} scores, expected {num_scores}"])
    return found


def _read_shards(
    folder: Path, key: ScoresKey, num_scores: int, expected: dict[Interval, Shard] | None = None
) -> _Found:
    """The sound shards of those expected, or of all that are there."""
    if expected is None:
        names = sorted(file.name for file in folder.glob("shard-*.npy"))
    else:
        names = [_shard_name(interval) for interval in sorted(expected)]
    found = _Found(np.zeros(num_scores, np.float32), {}, [])
    end = 0
    for name in names:
        try:
            interval, scores, shard = _read_shard(folder / name, key)
        except _FaultError as fault:
            found.faults.append(f"{name} {fault}")
            continue
        if expected is not None and expected.get(interval) != shard:
            found.faults.append(f"{name} is not the shard that {MANIFEST} lists")
        elif interval.start < end or interval.stop > num_scores:
            found.faults.append(f"{name} holds scores {interval.start} to {interval.stop}, which have no place")
        else:
            found.scores[interval.start : interval.stop] = scores
            found.shards[interval] = shard
            end = interval.stop
    return found


def _read_shard(file: Path, key: ScoresKey) -> tuple[Interval, np.ndarray, Shard]:
    try:
        start = int(file.stem.removeprefix("shard-"))
        content = memoryview(file.read_bytes())
    except OSError as error:
        raise _FaultError(f"cannot be read ({error})") from error
    except ValueError as error:
        raise _FaultError("has a name that gives no place") from error
    checked, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if _shard_checksum(key, start, checked) != checksum:
        raise _FaultError("has been altered, cut short or taken from another entry (its checksum differs)")
    array, budget = checked[:-_BUDGET_BYTES], checked[-_BUDGET_BYTES:]
    try:
        scores = np.lib.format.read_array(io.BytesIO(array), allow_pickle=False)
    except ValueError as error:
        raise _FaultError(f"holds no array of numbers ({error})") from error
    if scores.dtype != np.float32 or scores.ndim != 1:
        raise _FaultError(f"holds {scores.dtype} of shape {scores.shape}")
    shard = Shard(checksum.hex(), int.from_bytes(budget, "little"))
    return Interval(start, start + len(scores)), scores, shard


def read_key(entry: Path) -> ScoresKey:
    """The key of an entry.

    Raises:
        ScoresError: If its manifest is damaged or of another format.
    """
    try:
        return ScoresKey(**_read_manifest(entry)["key"])
    except _FaultError as fault:
        raise _unusable(entry, str(fault)) from fault


def _unusable(path: Path, fault: str) -> ScoresError:
    return ScoresError(
        f"The scores in {path} cannot be used: {fault}. Delete that folder to have them made again, or set "
        "stm_scores_dir to another one."
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        checksum = content.pop("checksum")
        format_version = content["key"]["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _FaultError(f"its {MANIFEST} is missing or damaged ({error!r})") from error
    if format_version != SCORES_FORMAT_VERSION:
        raise _FaultError(f"it has format version {format_version}, this is {SCORES_FORMAT_VERSION}")
    if checksum != _manifest_checksum(content):
        raise _FaultError(f"its {MANIFEST} has been altered (its checksum differs)")
    if set(content["key"]) != {field.name for field in fields(ScoresKey)}:
        raise _FaultError(f"the key in its {MANIFEST} has other parts than it should")
    return content


class _FaultError(Exception):
    """What is wrong with a file, in words that follow its name."""


def _shard_name(interval: Interval) -> str:
    return f"shard-{interval.start:012d}.npy"


def _shard_content(key: ScoresKey, start: int, scores: np.ndarray, tokens_per_batch: int) -> tuple[bytes, Shard]:
    buffer = io.BytesIO()
    np.save(buffer, scores.astype("<f4"), allow_pickle=False)
    buffer.write(tokens_per_batch.to_bytes(_BUDGET_BYTES, "little"))
    checksum = _shard_checksum(key, start, buffer.getvalue())
    buffer.write(checksum)
    return buffer.getvalue(), Shard(checksum.hex(), tokens_per_batch)


def _shard_checksum(key: ScoresKey, start: int, content: bytes | memoryview) -> bytes:
    """128-bit hash of a shard's content and of where it belongs."""
    digest = xxhash.xxh3_128(f"{key.name} {start}".encode())
    digest.update(content)
    return digest.digest()


def _manifest_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(f".{file.name}.draft")
    try:
        with draft.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ScoresError(
            f"Scores could not be written to {path} ({error}). What was scored before is kept; set stm_scores_dir (or "
            "the environment variable STM_HOME) to a folder with room that can be written, or make room and start "
            "again."
        ) from error

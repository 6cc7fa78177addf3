"""Scores on disk: one folder for each key, written whole or not at all, verified before use.

    ROOT/KEY/manifest.json        key, counts, shards, checksums; its own checksum last
    ROOT/KEY/shard-00000.npy      float32 NLL in nats, in the plan's order

Thresholds are applied when scores are read, so they are no part of the key.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .constants import SCORES_FORMAT_VERSION

MANIFEST = "manifest.json"


class ScoresError(ValueError):
    """Stored scores that must not be used, or that cannot be stored."""


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
        manifest = self._read_manifest(path)
        for name, expected in asdict(key).items():
            if manifest["key"].get(name) != expected:
                raise _unusable(path, f"its {name} is {manifest['key'].get(name)!r}, expected {expected!r}")
        if manifest["num_scores"] != num_scores:
            raise _unusable(path, f"it holds {manifest['num_scores']} scores, the data has {num_scores} label tokens")
        parts = [self._read_shard(path, shard) for shard in manifest["shards"]]
        scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if len(scores) != num_scores:
            raise _unusable(path, f"its shards hold {len(scores)} scores, expected {num_scores}")
        return scores

    def write(self, key: ScoresKey, scores: np.ndarray) -> Path:
        """Write an entry, whole or not at all; an entry that another process finished meanwhile stays.

        Args:
            key: The entry's key.
            scores: NLL in nats in the plan's order, shape `(num_scores,)`, float32.

        Returns:
            The entry's folder.

        Raises:
            ScoresError: If it cannot be written.
        """
        self.check_writable()
        path = self.path(key)
        draft = Path(tempfile.mkdtemp(prefix=f".{key.name}-", dir=self.root))
        try:
            shard = self._write_shard(draft, 0, scores)
            content = {"key": asdict(key), "num_scores": len(scores), "unit": "nats", "shards": [shard]}
            (draft / MANIFEST).write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=2) + "\n")
            _sync(draft / MANIFEST)
            draft.chmod(0o755)
            os.rename(draft, path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not (path / MANIFEST).exists():
                raise ScoresError(f"Scores could not be written to {path} ({error}).") from error
        return path

    def _write_shard(self, folder: Path, index: int, scores: np.ndarray) -> dict[str, Any]:
        file = folder / f"shard-{index:05d}.npy"
        content = io.BytesIO()
        np.save(content, scores.astype("<f4"), allow_pickle=False)
        file.write_bytes(content.getbuffer())  # np.save to a file passes over a disk that is full at the end
        _sync(file)
        return {"file": file.name, "num_scores": len(scores), "xxh3_128": _file_hash(content.getbuffer())}

    def _read_shard(self, path: Path, shard: dict[str, Any]) -> np.ndarray:
        try:
            content = (path / shard["file"]).read_bytes()
        except OSError as error:
            raise _unusable(path, f"{shard['file']} cannot be read ({error})") from error
        if _file_hash(content) != shard["xxh3_128"]:
            raise _unusable(path, f"{shard['file']} has been altered or cut short (its checksum differs)")
        try:
            scores = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except ValueError as error:
            raise _unusable(path, f"{shard['file']} holds no array of numbers ({error})") from error
        if scores.dtype != np.float32 or scores.shape != (shard["num_scores"],):
            raise _unusable(path, f"{shard['file']} holds {scores.dtype} of shape {scores.shape}")
        return scores

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads((path / MANIFEST).read_text())
            checksum = content.pop("checksum")
            format_version = content["key"]["format_version"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(path, f"its {MANIFEST} is missing or damaged ({error!r})") from error
        if format_version != SCORES_FORMAT_VERSION:
            raise _unusable(path, f"it has format version {format_version}, this is {SCORES_FORMAT_VERSION}")
        if checksum != _checksum(content):
            raise _unusable(path, f"its {MANIFEST} has been altered (its checksum differs)")
        return content


def read_key(entry: Path) -> ScoresKey:
    """The key of an entry.

    Raises:
        ScoresError: If its manifest is damaged or of another format.
    """
    return ScoresKey(**ScoreStore(entry.parent)._read_manifest(entry)["key"])


def _unusable(path: Path, fault: str) -> ScoresError:
    return ScoresError(
        f"The scores in {path} cannot be used: {fault}. Delete that folder to have them made again, or set "
        "stm_scores_dir to another one."
    )


def _checksum(content: dict[str, Any]) -> str:
    return _file_hash(json.dumps(content, sort_keys=True).encode())


def _file_hash(content: bytes | memoryview) -> str:
    return xxhash.xxh3_128(content).hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

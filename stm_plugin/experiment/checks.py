"""Checks of what a YAML says: keys that are allowed, and what a misspelt one may have meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""What an arm may be called: it is the name of files."""


def check_keys(given: Any, allowed: Iterable[str], where: str) -> None:
    """Raise ValueError for what is no mapping, or has a key that is not allowed, naming the nearest that is."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: a mapping is needed, got {given!r}.")
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise ValueError(f"{where}: no key {key!r}{nearest(key, allowed)}.")


def nearest(name: Any, names: Iterable[str]) -> str:
    """`; did you mean X` with the name that is closest; nothing where there are no names."""
    matches = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.0)
    return f"; did you mean {matches[0]}" if matches else ""


def is_count(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

"""The address of a server that generates, and the key for it; neither may give a secret away."""

import os
import re
from urllib.parse import urlsplit

from .engines import EngineError

OPENAI_KEY = "OPENAI_API_KEY"
"""The variable that has the key where none is named; it is OpenAI's, and sent to no other host."""
_OPENAI_HOST = "openai.com"


def check_url(url: str) -> None:
    """Check the address of an API.

    Raises:
        EngineError: If it is no URL of http or https, or has a name and a password in it. What may be a password is
            not repeated.
    """
    host = re.split(r"[/?#]", url.partition("://")[2] or url)[0]
    if "@" in host:
        raise EngineError(
            "the URL of an endpoint must not have a name or a password in it (what is before the @): it is written "
            "into receipts. Put the key into an environment variable, and name that with --api-key-env."
        )
    if not _is_url(url):
        got = "one with an @" if "@" in url else repr(url)
        raise EngineError(f"an endpoint is a URL such as http://localhost:8000/v1, got {got}.")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def find_key(url: str, variable: str | None) -> str | None:
    """The key for a server.

    Args:
        url: Its address.
        variable: Environment variable that has the key; None for `OPENAI_KEY`, of which only OpenAI's own hosts get
            to know.

    Returns:
        The key; None where there is none to send.

    Raises:
        EngineError: If the variable that is named is not set.
    """
    if variable is None:
        host = urlsplit(url).hostname or ""
        is_openai = host == _OPENAI_HOST or host.endswith(f".{_OPENAI_HOST}")
        return os.environ.get(OPENAI_KEY) if is_openai else None
    key = os.environ.get(variable)
    if key is None or not key.strip():
        raise EngineError(f"--api-key-env {variable}: this environment variable is not set, or empty.")
    return key


def clean_key(key: str | None) -> str | None:
    """A key without the blanks and line breaks around it; None where nothing is left.

    Raises:
        EngineError: If it has characters that no header can have. The key is not repeated.
    """
    key = (key or "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise EngineError(
            "the API key has blanks, line breaks or other characters in it that no key has. See to the environment "
            "variable that holds it."
        )
    return key or None

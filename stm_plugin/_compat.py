"""Facts about upstream versions, and errors for what is not installed. The only place for either."""

import sys
import warnings
from importlib.metadata import version
from typing import Any

from packaging.version import Version

TRL_VERSIONS = ("1.9.0", "1.16.0")
"""First and last release of TRL that the tests run against."""


def check_trl_version() -> None:
    """Warn when the installed TRL is newer than what was tested; raise ImportError when it is older."""
    installed, (first, last) = Version(version("trl")), map(Version, TRL_VERSIONS)
    if installed < first:
        raise ImportError(f"stm-plugin needs trl>={first}, found {installed}: pip install -U 'trl>={first},<={last}'.")
    if installed > last and installed.release[:2] != last.release[:2]:
        warnings.warn(f"stm-plugin was tested with TRL {first} to {last}, found {installed}.", stacklevel=3)


class MissingExtraError(ImportError):
    """A package that only some users need is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error for a package that only some users need."""
    return MissingExtraError(f'{package} is not installed. Install it with: pip install "stm-plugin[{extra}]"')


def counts_predicted_labels(trainer: Any) -> bool:
    """Whether the host counts the labels that are predicted, so not those at position 0.

    transformers (5.17) counts those too for models whose own loss does not shift labels, though TRL's does.
    """
    return bool(getattr(trainer, "_loss_shifts_labels", True))


def repacks_weights_in_eval_mode(module: Any) -> bool:
    """Whether a forward in eval mode changes the module's weights.

    bitsandbytes (0.50) packs 4-bit weights anew for CPUs with AVX512-BF16 when a `Linear4bit` runs in eval mode; it
    rounds their scales to bfloat16, and training afterwards goes on with the rounded ones. Can go once it does not.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)

"""What stands in a config under `plugins:` and `stm_...`, before Axolotl reads it. Loads neither torch nor Axolotl."""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, MutableMapping
from importlib.metadata import entry_points
from itertools import zip_longest
from typing import Any

from ..options import nearest_option, option_names

PLUGIN_NAME = "stm_plugin.STMPlugin"
"""The one name under which the plugin is registered, whatever a config calls it."""

ENTRY_POINTS = "axolotl.plugins"
_SPELLINGS = ("stm", PLUGIN_NAME, "stm_plugin.axolotl.plugin.STMPlugin", "stm_plugin.axolotl.STMPlugin")
ADD_THE_LINE = "Add the line\n\n    plugins: stm\n\nto the config (beside other plugins: `plugins: [stm, ...]`)"


def reads_plugin_names(prepare_plugins: Callable[[Any], None]) -> Callable[[Any], None]:
    """Axolotl's `prepare_plugins`, preceded by the reading of names and followed by a look at what was loaded.

    Args:
        prepare_plugins: Registers the plugins of a config that has not been validated yet.

    Returns:
        The same, which also takes `plugins: stm` and raises ValueError rather than train without a plugin that names
        stm.
    """

    @functools.wraps(prepare_plugins)
    def prepare(cfg: Any) -> None:
        resolve_plugins(cfg)
        check_active(cfg)
        check_command_line(cfg, sys.argv)
        try:
            prepare_plugins(cfg)
        except Exception as error:
            check_loads(cfg.get("plugins") or [], error)
            raise
        check_loads(cfg.get("plugins") or [])

    return prepare


def resolve_plugins(cfg: MutableMapping[str, Any]) -> None:
    """Turn the `plugins` of a config into a list of full names, each once; ours is `stm_plugin.STMPlugin`.

    Raises:
        ValueError: For an entry that is no name, or a bare name that nothing installed has.
    """
    given = cfg.get("plugins")
    if not given:
        return
    if not isinstance(given, str | list | tuple):
        raise ValueError(f"`plugins` must be a name or a list of names, got {given!r}. For STM: `plugins: stm`.")
    names = list(dict.fromkeys(_resolve(name) for name in ([given] if isinstance(given, str) else given)))
    if names != given:
        cfg["plugins"] = names


def is_active(cfg: Mapping[str, Any]) -> bool:
    """Whether a config lists the plugin."""
    given = cfg.get("plugins") or []
    return any(isinstance(name, str) and _is_ours(name) for name in ([given] if isinstance(given, str) else given))


def check_active(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for STM options in a config that does not list the plugin, or for unknown ones in any."""
    given = [str(name) for name in cfg if str(name).startswith("stm_") and cfg[name] is not None]
    if given and not is_active(cfg):
        raise ValueError(
            f"The config sets {', '.join(given)}, but does not list the plugin: it would train without Selective "
            f"Token Masking. {ADD_THE_LINE}, or remove the stm_ options."
        )
    for name in given:
        if name not in option_names():
            raise ValueError(
                f"{name} is no STM option; did you mean {nearest_option(name)}? Options: {', '.join(option_names())}."
            )


def check_command_line(cfg: Mapping[str, Any], arguments: list[str]) -> None:
    """Raise ValueError for an STM option on the command line that did not reach the config: Axolotl drops it."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, has_value, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if (
            flag.startswith("--")
            and name in option_names()
            and not _is_set(cfg.get(name), value if has_value else following)
        ):
            raise ValueError(
                f"Axolotl passes {flag} on to nothing: set {name} in the config, which has {cfg.get(name)!r}."
            )


def _is_set(value: Any, text: str) -> bool:
    """Whether a config has what the command line says; of a flag without a value, anything, or else what is on."""
    has_no_value = not text or text.startswith("--")
    if isinstance(value, bool) and (has_no_value or text.lower() not in ("true", "false", "1", "0")):
        return value  # what follows is no value but, say, the config's name
    if value is None or has_no_value:
        return value is not None
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()


def check_loads(names: list[str], cause: Exception | None = None) -> None:
    """Raise ValueError for a plugin that names stm and cannot be loaded, which Axolotl 0.19 skips with a log line."""
    for name in names:
        if "stm" not in name.lower():
            continue
        module_name, _, class_name = name.replace(":", ".").rpartition(".")
        try:
            getattr(importlib.import_module(module_name), class_name)
        except Exception as first_error:
            try:
                getattr(importlib.import_module(f"axolotl.integrations.{module_name}"), class_name)
            except Exception:
                raise ValueError(
                    f"The plugin {name!r} does not load ({first_error}), so the run would train without it. For "
                    "Selective Token Masking write `plugins: stm`."
                ) from (cause or first_error)


def _resolve(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"`plugins` must hold names, got {name!r}. For STM: `plugins: stm`.")
    name = name.strip()
    if _is_ours(name):
        return PLUGIN_NAME
    if "." in name or ":" in name:
        return name
    installed = {point.name: point.value.replace(":", ".") for point in entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        known = sorted({*installed, "stm"})
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"`plugins` names {name!r}, which no installed package declares"
            f"{f'; did you mean {near[0]}?' if near else '.'} Short names: {', '.join(known)}; other plugins go by "
            "module and class, as in "
            "axolotl.integrations.liger.LigerPlugin."
        )
    return installed[name]


def _is_ours(name: str) -> bool:
    return name.strip().replace(":", ".") in _SPELLINGS

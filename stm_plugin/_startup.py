"""Lets Axolotl's `plugins:` read the names of entry points.

`stm_plugin_startup.pth`, which every interpreter start runs, puts a finder of a few lines before Python's own. It
comes here as soon as Axolotl's reading of configs is imported, and does nothing in any other process.
`STM_AXOLOTL_HOOK=0` in the environment turns it off.
"""

import sys
from typing import Any

_FINDER = "STMAxolotlFinder"


def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
    """The spec that the other finders have for a module that defines `prepare_plugins`, which is wrapped in it."""
    for finder in sys.meta_path:
        other = None if getattr(finder, "__name__", "") == _FINDER else getattr(finder, "find_spec", None)
        spec = None if other is None else other(name, path, target)
        if spec is not None:
            try:
                _wrap_after_loading(spec.loader)
            except Exception:  # a loader of another kind: leave it as it is
                pass
            return spec
    return None


def _wrap_after_loading(loader: Any) -> None:
    exec_module = loader.exec_module

    def exec_and_wrap(module: Any) -> None:
        del loader.exec_module  # a loader may serve other modules after this one
        exec_module(module)
        if hasattr(module, "prepare_plugins"):
            from .axolotl.names import reads_plugin_names

            module.prepare_plugins = reads_plugin_names(module.prepare_plugins)

    loader.exec_module = exec_and_wrap

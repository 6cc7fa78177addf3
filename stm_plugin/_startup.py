"""Run at every interpreter start (`stm_plugin_startup.pth`): lets Axolotl's `plugins:` read the names of entry points.

Does nothing in a process that does not import Axolotl's reading of configs, and imports nothing but `sys`.
`STM_AXOLOTL_HOOK=0` in the environment turns it off.
"""

import sys

_READS_PLUGINS = ("axolotl.cli.config", "axolotl.utils.config")


class AxolotlConfigFinder:
    """Finds the modules of Axolotl that define `prepare_plugins` as Python would, and wraps that function in them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """The spec that the other finders have for one of those modules; None for any other."""
        if name not in _READS_PLUGINS:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is cls else getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                try:
                    _wrap_after_loading(spec.loader)
                except Exception:  # a loader of another kind: leave it as it is
                    pass
                return spec
        return None


def _wrap_after_loading(loader):  # type: ignore[no-untyped-def]
    exec_module = loader.exec_module

    def exec_and_wrap(module):  # type: ignore[no-untyped-def]
        del loader.exec_module  # a loader may serve other modules after this one
        exec_module(module)
        if hasattr(module, "prepare_plugins"):
            from stm_plugin.axolotl.names import reads_plugin_names

            module.prepare_plugins = reads_plugin_names(module.prepare_plugins)

    loader.exec_module = exec_and_wrap


if AxolotlConfigFinder not in sys.meta_path:
    sys.meta_path.insert(0, AxolotlConfigFinder)

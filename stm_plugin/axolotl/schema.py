"""The STM options in Axolotl's config schema; every default is None, since 0.21 merges it into every config."""

import dataclasses
import typing
from typing import Any

from pydantic import BaseModel, Field, create_model

from ..options import STMOptions, option_names


def _fields() -> dict[str, Any]:
    types = typing.get_type_hints(STMOptions)
    return {
        option.name: (types[option.name] | None, Field(default=None, description=option.metadata["help"]))
        for option in dataclasses.fields(STMOptions)
    }


STMArgs: type[BaseModel] = create_model("STMArgs", __module__=__name__, **_fields())
STMArgs.__doc__ = "Fields that `plugins: stm` adds to Axolotl's config."


def options_of(cfg: Any) -> STMOptions:
    """The checked STM options of a config.

    Raises:
        ValueError: For an option with a value that is not allowed.
    """
    given = {name: cfg.get(name) for name in option_names()}
    options = STMOptions(**{name: _plain(value) for name, value in given.items() if value is not None})
    options.check()
    return options


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value

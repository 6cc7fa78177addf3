"""Data sets that an experiment generates: what its YAML says under `generate`, and where their files are.

generated/NAME.jsonl           the data set, as `stm generate` writes it
generated/NAME.samples.jsonl   all samples
generated/NAME.receipt.json    the receipt; with `made_for` once the data set is done
generated/NAME.settings.json   the settings that it was begun with
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..generation.engines import Sampling
from ..generation.settings import Endpoint, GenerateSettings
from ..measures.inputs import DTYPES
from .checks import check_keys
from .settings import Settings, plain

_SET_BY_US = {"output": "--output of the experiment", "again": "--again of the experiment"}
_ENDPOINT = {"endpoint": "url", "endpoint_model": "model"}
_OF_ENDPOINT = [option.name for option in fields(Endpoint) if option.name not in _ENDPOINT.values()]
_OF_SAMPLING = [option.name for option in fields(Sampling)]
_OF_SETTINGS = [
    option.name for option in fields(GenerateSettings) if option.name not in ("sampling", "endpoint", *_SET_BY_US)
]
_KEYS = (*_OF_SETTINGS, *_OF_SAMPLING, *_ENDPOINT, *_OF_ENDPOINT)

_WHOLE = ("samples", "max_new_tokens", "seed", "batch_size", "rows", "concurrency", "max_retries")
_NUMBERS = ("temperature", "top_p", "timeout")
_SWITCHES = ("load_in_4bit", "run_model_code")
_MAPPINGS = ("chat_template_kwargs",)

_NOT_THE_RESULT = ("batch_size", "device", "endpoint", *_OF_ENDPOINT)
"""Options that change how samples are had, and of which `stm generate` goes on with others' samples."""


@dataclass(frozen=True)
class Generation:
    """A data set to generate.

    Attributes:
        name: What arms call it.
        options: Options of `stm generate` by the names of its flags, all of them, as JSON can hold them. Files are
            relative to the data folder.
    """

    name: str
    options: dict[str, Any]

    def settings(self) -> Settings:
        """What the data set depends on, but for the files' contents."""
        options = {name: value for name, value in self.options.items() if name not in _NOT_THE_RESULT}
        has_endpoint = self.options["endpoint"] is not None
        return options | {
            "samples": self.generate_settings(Path(), Path()).num_samples,
            "endpoint_model": (self.options["endpoint_model"] or self.options["model"]) if has_endpoint else None,
        }

    def files(self) -> list[str]:
        """Names of the files that it is made from, in the data folder."""
        return [self.options[key] for key in ("data", "template") if self.options[key] is not None]

    def generate_settings(self, data: Path, output: Path, model: str | None = None) -> GenerateSettings:
        """What `generate_data` takes.

        Args:
            data: The data folder.
            output: Folder of the experiment's results.
            model: Where the model is, if not where its name says.

        Raises:
            ValueError: For a value that is not allowed.
        """
        options = self.options
        own = {key: options[key] for key in _OF_SETTINGS} | {
            "model": model or options["model"],
            "data": str(data / options["data"]),
            "template": None if options["template"] is None else data / options["template"],
        }
        endpoint = None
        if options["endpoint"] is not None:
            names = {key: key for key in _OF_ENDPOINT} | _ENDPOINT
            endpoint = Endpoint(**{name: options[key] for key, name in names.items()})
        sampling = Sampling(**{key: options[key] for key in _OF_SAMPLING})
        return GenerateSettings(**own, output=generated_path(output, self.name), sampling=sampling, endpoint=endpoint)


def generated_path(output: Path, name: str) -> Path:
    """The file of a generated data set."""
    return output / "generated" / f"{name}.jsonl"


def receipt_path(output: Path, name: str) -> Path:
    """The file of its receipt."""
    return generated_path(output, name).with_suffix(".receipt.json")


def settings_path(output: Path, name: str) -> Path:
    """The file of the settings that it was begun with."""
    return generated_path(output, name).with_suffix(".settings.json")


def make_generations(given: Any, shared: Mapping[str, Any]) -> dict[str, Generation]:
    """Check what stands under `generate`, and fill in what it takes over from the experiment.

    Args:
        given: What the YAML holds there; None for nothing.
        shared: The experiment's values of `model`, `dtype`, `data`, `rows` and `run_model_code`.

    Raises:
        ValueError: For a key or value that is not allowed.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            "at the top: `generate` must be a mapping of names to options of `stm generate`, such as "
            f"{{self_output: {{method: self-output}}}}, got {given!r}."
        )
    return {name: _generation(name, options, shared, given) for name, options in given.items()}


def _generation(name: Any, given: Any, shared: Mapping[str, Any], names: Mapping[str, Any]) -> Generation:
    where = f"in generate.{name}"
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name) is None:
        raise ValueError(f"{where}: the name of a data set is of letters, digits and _ + -, got {name!r}.")
    given = {} if given is None else given
    if isinstance(given, Mapping):
        for key in given:
            if key in _SET_BY_US:
                raise ValueError(f"{where}: {key} is set by {_SET_BY_US[key]}. Remove it.")
    check_keys(given, _KEYS, where)
    options = {**_defaults(), **shared, **given}
    if options["method"] is None:
        raise ValueError(f"{where}: `method` is missing.")
    if options["data"] in names:
        raise ValueError(
            f"{where}: its data, {options['data']!r}, are generated ones. Name the file of human answers with `data`."
        )
    _check_kinds(options, where)
    generation = Generation(name, plain(options))
    try:
        generation.generate_settings(Path(), Path())
    except ValueError as error:
        raise ValueError(f"{where}: {with_keys(str(error))}") from None
    return generation


def with_keys(message: str) -> str:
    """An error of `stm generate` that names keys of the YAML in the place of flags."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda flag: f"`{flag[1].replace('-', '_')}`", message)


def _defaults() -> dict[str, Any]:
    settings = GenerateSettings(method="self-output", model="", data="", output=Path("any.jsonl"))
    own = {key: getattr(settings, key) for key in _OF_SETTINGS}
    of_endpoint = {key: getattr(Endpoint(""), key) for key in _OF_ENDPOINT}
    return own | vars(Sampling()) | of_endpoint | {"method": None, "endpoint": None, "endpoint_model": None}


def _check_kinds(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a value of the wrong kind, such as a number in quotes."""
    may_be_none = {key for key, value in _defaults().items() if value is None} - {"method"}
    for key, value in options.items():
        if value is None and key in may_be_none:
            continue
        if key in _SWITCHES:
            fits, need = isinstance(value, bool), "true or false"
        elif key in _WHOLE:
            fits, need = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        elif key in _NUMBERS:
            fits, need = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        elif key in _MAPPINGS:
            fits, need = isinstance(value, dict), "a mapping"
        elif key == "dtype":
            fits, need = value in DTYPES, f"one of {', '.join(DTYPES)}"
        else:
            fits, need = isinstance(value, str) and value != "", "text"
        if not fits:
            raise ValueError(f"{where}: `{key}` must be {need}, got {value!r}.")

"""The Axolotl example configs pass Axolotl's own validation with nothing lost, and say where they come from."""

import os
from pathlib import Path

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed")

import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.config import merge_input_args
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset

EXAMPLES = Path(__file__).resolve().parents[1] / "example_configs"
CONFIGS = sorted(EXAMPLES.glob("axolotl_*.yml"))
CAPABILITIES = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
ENVIRONMENT = {"torch_version": "2.13.0"}

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)


def validated(given):
    """A config as Axolotl trains with it; ValueError for a key that its schema, which ignores unknown ones, lacks."""
    cfg = DictDefault(given)
    prepare_plugins(cfg)
    _, schema = merge_input_args()
    unknown = sorted(set(given) - set(schema.model_fields))
    unknown += sorted({key for dataset in given["datasets"] for key in dataset} - set(SFTDataset.model_fields))
    if unknown:
        raise ValueError(f"no keys of Axolotl: {', '.join(unknown)}")
    return validate_config(cfg, capabilities=CAPABILITIES, env_capabilities=ENVIRONMENT)


def read(config):
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def test_there_are_configs():
    assert CONFIGS


@every_config
def test_passes_axolotls_validation_with_every_value_kept(config):
    given = read(config)
    kept = validated(given)
    assert kept["plugins"] == ["stm_plugin.STMPlugin"]
    for key, value in given.items():
        if key == "datasets":
            assert [{name: entry[name] for name in row} for row, entry in zip(value, kept[key], strict=True)] == value
        elif key != "plugins":
            assert kept[key] == value, key
    options = {key for key in given if key.startswith("stm_")}
    assert options in ({"stm_threshold"}, {"stm_mask_fraction"})


@pytest.mark.parametrize("key", ["lora_apha", "datasets.field_message"])
def test_a_misspelt_key_would_be_seen(key):
    given = read(CONFIGS[0])
    where, _, name = key.rpartition(".")
    (given[where][0] if where else given)[name] = 32
    with pytest.raises(ValueError, match=f"no keys of Axolotl: {name}"):
        validated(given)


@every_config
def test_header_says_whose_numbers_and_how_to_run(config):
    text = config.read_text(encoding="utf-8")
    header = " ".join(line.removeprefix("# ") for line in text[: text.index("\nbase_model:")].splitlines())
    assert all(line.startswith("# ") for line in text[: text.index("\nbase_model:")].splitlines())
    assert "arXiv 2501.14315" in header or "Numbers: ours" in header
    assert f"axolotl train {config.name}" in header


@every_config
def test_output_folder_is_named_after_the_file(config):
    expected = config.stem.replace("axolotl_", "stm_").replace("_", "-")
    assert read(config)["output_dir"] == expected


def test_readme_lists_every_file():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".yaml", ".yml"}]
    assert not [name for name in files if f"`{name}`" not in readme]

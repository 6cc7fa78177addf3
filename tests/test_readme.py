"""The README's options and file tree are those of the code."""

from dataclasses import fields
from pathlib import Path

from stm_plugin.options import STMOptions

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def options_table():
    rows = [(f"`{option.name}`", f"`{option.default}`", option.metadata["help"]) for option in fields(STMOptions)]
    return "\n".join(
        " | ".join(["", *row, ""]).strip() for row in [("option", "default", "meaning"), ("---",) * 3, *rows]
    )


def test_options_table():
    assert options_table() in README, f"the README's options should read:\n{options_table()}"


def test_file_tree_names_every_module():
    package = ROOT / "stm_plugin"
    modules = [path for folder in (".", "scoring", "masking") for path in (package / folder).glob("*.py")]
    named = [path.name for path in modules if path.name != "__init__.py"]
    named += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [name for name in named if f" {name} " not in README] == []

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
    modules = [path.name for path in (ROOT / "stm_plugin").glob("*.py") if path.name != "__init__.py"]
    packages = [f"{path.parent.name}/" for path in (ROOT / "stm_plugin").glob("*/__init__.py")]
    missing = [name for name in modules + packages if name not in README]
    assert not missing

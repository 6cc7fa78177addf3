"""What importing costs, what is public, and which module may know which host."""

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stm_plugin"
MODULES = sorted(PACKAGE.rglob("*.py"))

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "datasets",
    "peft",
    "accelerate",
    "axolotl",
    "matplotlib",
    "pyarrow",
    "pandas",
}
LIGHT_MODULES = [
    "",
    ".constants",
    ".options",
    ".selection",
    ".scoring.documents",
    ".scoring.plan",
    ".scoring.store",
    ".masking.masks",
    ".masking.receipt",
    ".scoring.document_store",
    ".inspection.scored",
    ".inspection.sweep_command",
    ".inspection.inspect_command",
    ".report.command",
    ".sandbox",
    ".tasks.loading",
    ".forgetting.command",
    ".measures.command",
    ".experiment.command",
    ".generation.command",
    ".generation.settings",
    ".cli",
]


def imported_by(statement: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter has after a statement."""
    script = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_but_itself():
    names = imported_by("import stm_plugin")
    assert not names & (HEAVY | {"numpy", "xxhash"})
    assert "stm_plugin" in names


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_load_no_host(module):
    assert not imported_by(f"import stm_plugin{module}") & HEAVY


def test_mask_labels_loads_no_host():
    use = "from stm_plugin import mask_labels\nassert mask_labels([1, 2], [0.0, 3.0]) == [1, -100]"
    assert not imported_by(use) & HEAVY


def test_the_check_above_can_fail():
    assert "numpy" in imported_by("import numpy")
    assert "numpy" in imported_by("import stm_plugin.selection")
    pytest.importorskip("torch", reason="torch is not installed")
    assert imported_by("import stm_plugin, torch") & HEAVY == {"torch"}


# Public names.

PUBLIC = ["STMPlugin", "STMSFTConfig", "STMSFTTrainer", "mask_labels", "score_dataset"]


def test_public_names_are_frozen():
    import stm_plugin

    assert sorted(stm_plugin.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(stm_plugin))
    assert isinstance(stm_plugin.__version__, str)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_there(name):
    if name != "mask_labels":
        pytest.importorskip("torch", reason="torch is not installed")
    if name == "STMPlugin":
        pytest.importorskip("axolotl", reason="axolotl is not installed")
    if name.startswith("STMSFT"):
        pytest.importorskip("trl", reason="trl is not installed")
    stm_plugin = importlib.import_module("stm_plugin")
    value = getattr(stm_plugin, name)
    assert value.__name__ == name
    assert value.__doc__
    assert getattr(stm_plugin, name) is value


def test_other_names_are_not():
    import stm_plugin

    with pytest.raises(AttributeError, match="module 'stm_plugin' has no attribute 'STMTrainer'"):
        stm_plugin.STMTrainer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'STMTrainer'"):
        exec("from stm_plugin import STMTrainer")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_can_be_imported(path):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("trl", reason="trl is not installed")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for part, extra, packages in (
        ("stm_plugin.demo", "demo", ("matplotlib", "gguf")),
        ("stm_plugin.tasks", "forgetting", ("lm_eval",)),
    ):
        for package in packages if name.startswith(part) else ():
            pytest.importorskip(package, reason=f"{package}, of the extra {extra!r}, is not installed")
    if name == "stm_plugin.axolotl.plugin":
        pytest.importorskip("axolotl", reason="axolotl is not installed")
    importlib.import_module(name)


# Boundaries.


def imports_of(source: str) -> set[str]:
    """Top-level names of all absolute imports anywhere in some code, those within functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def modules_that_import(package: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE)) for path in MODULES if package in imports_of(path.read_text(encoding="utf-8"))
    }


def test_imports_are_found_wherever_they_are():
    source = "import a.b\nfrom c.d import e\nfrom . import f\nfrom .g import h\ndef i():\n    import j as k\n"
    source += "import importlib\nimportlib.import_module('l.m')\n"
    assert imports_of(source) == {"a", "c", "j", "importlib", "l"}
    assert len(MODULES) > 15


def test_only_the_trainers_and_those_who_train_know_trl():
    found = {name for name in modules_that_import("trl") if not name.startswith(("demo/", "experiment/"))}
    assert found <= {"trl.py", "kl.py", "sft.py", "measures/perplexity.py"}
    assert "trl.py" in found


def test_only_the_axolotl_package_knows_axolotl():
    assert modules_that_import("axolotl") == {"axolotl/plugin.py", "axolotl/score.py", "axolotl/trainer.py"}


def siblings_of(source: str, package: str) -> set[str]:
    """Names of the package's own modules that some code imports as it is imported itself."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_modules_import_one_another_in_no_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: siblings_of(path.read_text(encoding="utf-8"), name.rpartition(".")[0]) & modules.keys()
        for name, path in modules.items()
    }
    assert "stm_plugin.masking.host" in graph["stm_plugin.masking.ahead"]
    assert "stm_plugin.masking.mixin" in graph["stm_plugin.axolotl.trainer"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_compat_compares_versions():
    found = {path.name for path in MODULES if "Version(" in path.read_text(encoding="utf-8")}
    assert found == {"_compat.py"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("constants.py", set()),
        ("options.py", {"difflib", "math", "dataclasses", "numbers", "typing"}),
        ("selection.py", {"hashlib", "math", "typing", "numpy"}),
    ],
)
def test_pure_modules_import_little(module, allowed):
    assert imports_of((PACKAGE / module).read_text(encoding="utf-8")) <= allowed


def test_only_the_mask_knows_the_number_of_the_ignore_index():
    """One IGNORE_INDEX: no bare -100 in logic."""
    bare = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.UnaryOp)
                and isinstance(node.op, ast.USub)
                and isinstance(node.operand, ast.Constant)
                and node.operand.value == 100
            ):
                bare.add(str(path.relative_to(PACKAGE)))
    assert bare == {"constants.py"}


def test_nothing_pickles():
    for package in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
        assert modules_that_import(package) == set()
    for path in MODULES:
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8")

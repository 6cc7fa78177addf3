"""What a config may hold under `plugins:` and `stm_...`, and what happens at interpreter start. Needs no Axolotl."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stm_plugin.axolotl import conflicts, names
from stm_plugin.axolotl.names import (
    PLUGIN_NAME,
    check_active,
    check_command_line,
    check_loads,
    is_active,
    reads_plugin_names,
    resolve_plugins,
)

ROOT = Path(__file__).resolve().parents[1]
LIGER = "axolotl.integrations.liger.LigerPlugin"


@pytest.mark.parametrize(
    "given",
    [
        "stm",
        " stm ",
        ["stm"],
        ("stm",),
        PLUGIN_NAME,
        [PLUGIN_NAME],
        ["stm_plugin:STMPlugin"],
        ["stm_plugin.axolotl.plugin.STMPlugin"],
        ["stm", PLUGIN_NAME, "stm"],
    ],
)
def test_every_spelling_becomes_the_one_name_once(given):
    cfg = {"plugins": given}
    assert is_active(cfg)
    resolve_plugins(cfg)
    assert cfg["plugins"] == [PLUGIN_NAME]


def test_other_plugins_stay_where_they_are():
    cfg = {"plugins": [LIGER, "stm", "my.module:Plugin"]}
    resolve_plugins(cfg)
    assert cfg["plugins"] == [LIGER, PLUGIN_NAME, "my.module:Plugin"]


@pytest.mark.parametrize("cfg", [{}, {"plugins": None}, {"plugins": []}, {"plugins": [LIGER]}])
def test_configs_without_the_plugin_are_left_alone(cfg):
    before = dict(cfg)
    resolve_plugins(cfg)
    check_active(cfg)
    assert cfg == before
    assert not is_active(cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("smt", "names 'smt', which no installed package declares; did you mean stm?"),
        (["stn"], "did you mean stm"),
        (["liger"], "Short names: "),
        ({"stm": True}, "must be a name or a list of names"),
        ([{"stm": True}], "must hold names"),
        ([7], "must hold names"),
    ],
)
def test_what_is_no_name_is_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_plugins({"plugins": given})


def test_entry_points_of_others_are_found(tmp_path, monkeypatch):
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[axolotl.plugins]\nother = other_package.plugins:OtherPlugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = {"plugins": ["other", "stm"]}
    resolve_plugins(cfg)
    assert cfg["plugins"] == ["other_package.plugins.OtherPlugin", PLUGIN_NAME]


@pytest.mark.parametrize("plugins", [{}, {"plugins": [LIGER]}, {"plugins": ["stm_plugn.STMPlugin"]}])
def test_options_without_the_plugin_name_the_missing_line(plugins):
    with pytest.raises(ValueError, match=r"sets stm_threshold, stm_seed, but does not list(.|\n)*plugins: stm"):
        check_active({"stm_threshold": 2.5, "stm_seed": 1, **plugins})


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(ValueError, match="stm_treshold is no STM option; did you mean stm_threshold"):
        check_active({"plugins": "stm", "stm_treshold": 2.5})


def test_options_that_are_unset_need_no_plugin():
    check_active({"stm_threshold": None})


@pytest.mark.parametrize("name", ["stm_plugn.STMPlugin", "stm_plugin.STMPlugn", "stm_plugin.nowhere:STMPlugin"])
def test_a_name_of_ours_that_does_not_load_is_an_error(name):
    with pytest.raises(ValueError, match=rf"{name}' does not load(.|\n)*write `plugins: stm`"):
        check_loads([LIGER, name])


def test_a_plugin_that_only_contains_stm_and_loads_is_let_be(tmp_path, monkeypatch):
    (tmp_path / "lstm_tools.py").write_text("class Plugin: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_loads(["lstm_tools.Plugin"])


def test_prepare_plugins_is_called_with_what_was_read():
    seen = []
    reads_plugin_names(lambda cfg: seen.append(dict(cfg)))({"plugins": "axolotl.x.Y"})
    assert seen == [{"plugins": ["axolotl.x.Y"]}]


def test_errors_of_prepare_plugins_come_through():
    def prepare(cfg):
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        reads_plugin_names(prepare)({"plugins": [LIGER]})
    with pytest.raises(ValueError, match="does not load") as error:
        reads_plugin_names(prepare)({"plugins": ["stm_plugn.STMPlugin"]})
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("cfg", "both"),
    [
        ({"rl": "dpo"}, ["plugins: stm", "rl: dpo"]),
        ({"rl": "orpo", "orpo_alpha": 0.1}, ["plugins: stm", "rl: orpo"]),
        ({"orpo_alpha": 0.1}, ["plugins: stm", "orpo_alpha: 0.1"]),
        ({"reward_model": True}, ["plugins: stm", "reward_model: true"]),
        ({"process_reward_model": True}, ["plugins: stm", "process_reward_model: true"]),
        ({"pretraining_dataset": [{"path": "x"}]}, ["stm_reference: initial", "pretraining_dataset"]),
        ({"streaming": True}, ["stm_reference: initial", "streaming: true"]),
        ({"use_eaft": True}, ["plugins: stm", "use_eaft: true"]),
        ({"use_dft": True}, ["plugins: stm", "use_dft: true"]),
        ({"kd_trainer": True}, ["plugins: stm", "kd_trainer: true"]),
        ({"plugins": ["stm", "axolotl.integrations.kd.KDPlugin"]}, ["plugins: stm", "integrations.kd.KDPlugin"]),
        ({"plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"]}, ["plugins: stm", "DiffusionPlugin"]),
        ({"diffusion_lm": {"from_causal_lm": True}}, ["plugins: stm", "diffusion_lm"]),
        ({"processor_type": "AutoProcessor"}, ["plugins: stm", "processor_type: AutoProcessor"]),
        ({"use_pose": True}, ["plugins: stm", "use_pose: true"]),
        ({"plugins": ["diffusion.DiffusionPlugin"]}, ["plugins: stm", "diffusion.DiffusionPlugin"]),
        ({"plugins": ["kd:KDPlugin"]}, ["plugins: stm", "kd:KDPlugin"]),
        ({"expert_parallel_size": 2}, ["plugins: stm", "expert_parallel_size: 2"]),
        ({"context_parallel_size": 2}, ["plugins: stm", "context_parallel_size: 2"]),
        ({"tensor_parallel_size": 4}, ["plugins: stm", "tensor_parallel_size: 4"]),
        ({"qat": {"fake_quant_after_n_steps": 9}}, ["plugins: stm", "fake_quant_after_n_steps: 9"]),
    ],
)
def test_conflicts_name_both_keys(cfg, both):
    with pytest.raises(ValueError, match="cannot be used with") as error:
        conflicts.check_conflicts(cfg)
    assert all(name in str(error.value) for name in both)


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"rl": None, "streaming": False, "context_parallel_size": 1},
        {"plugins": ["stm", LIGER], "liger_rms_norm": True},
        {"stm_reference": "other/model", "streaming": True},
        {"qat": {"weight_dtype": "int4", "fake_quant_after_n_steps": 0}},
    ],
)
def test_no_conflict_where_there_is_none(cfg):
    conflicts.check_conflicts(cfg)


@pytest.mark.parametrize("argument", ["--stm-threshold", "--stm_threshold=3"])
def test_an_option_on_the_command_line_that_axolotl_drops_is_refused(argument):
    with pytest.raises(ValueError, match="set stm_threshold in the config"):
        check_command_line({"plugins": ["stm"]}, ["axolotl", "train", "c.yml", argument, "3"])
    check_command_line({"plugins": ["stm"], "stm_threshold": 3}, ["c.yml", argument])
    check_command_line({}, ["c.yml", "--learning-rate", "stm_threshold"])


@pytest.mark.parametrize("arguments", [["--stm-threshold", "900"], ["--stm_threshold=900"], ["--stm-strategy", "low"]])
def test_an_option_that_differs_from_the_config_is_refused(arguments):
    cfg = {"plugins": ["stm"], "stm_threshold": 400.0, "stm_strategy": "high", "stm_report": True}
    with pytest.raises(ValueError, match=r"on to nothing: set stm_\w+ in the config, which has (400\.0|'high')"):
        check_command_line(cfg, ["axolotl", "train", "c.yml", *arguments])
    check_command_line(cfg, ["c.yml", "--stm-threshold", "400", "--stm_strategy=high", "--stm-report", "true"])
    check_command_line(cfg, ["c.yml", "--stm-report", "--stm-threshold=4e2"])
    check_command_line(cfg, ["axolotl", "train", "--stm-report", "c.yml"])
    for given in (["--stm-report", "c.yml"], ["c.yml", "--stm-report"], ["c.yml", "--stm-report=true"]):
        with pytest.raises(ValueError, match="set stm_report in the config, which has False"):
            check_command_line(cfg | {"stm_report": False}, given)


# --- Interpreter start ----------------------------------------------------------------------------------------------


def _python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


HAS_HOOK = "any(getattr(finder, '__name__', '') == 'STMAxolotlFinder' for finder in sys.meta_path)"
LINE = (ROOT / "stm_plugin_startup.pth").read_text()


def test_the_startup_line_loads_nothing():
    code = f"import sys, os; before = set(sys.modules)\n{LINE}\nprint(sorted(set(sys.modules) - before))"
    assert _python(code) == "[]\n"


def test_the_environment_turns_the_hook_off():
    code = f"import sys\n{LINE}\nprint({HAS_HOOK})"
    assert _python(code) == "True\n"
    assert _python(code, STM_AXOLOTL_HOOK="0") == "False\n"


@pytest.mark.parametrize(
    "accident",
    [
        "import sys; sys.path.clear()",  # uninstalled by hand
        "import sys; sys.modules['stm_plugin'] = None",
        "import sys; sys.modules['stm_plugin._startup'] = None",
    ],
)
def test_no_accident_breaks_an_import(accident, tmp_path):
    _fake_axolotl(tmp_path)
    code = f"{LINE}\n{accident}\nsys.path.append({str(tmp_path)!r})\nimport axolotl.cli.config\nprint('done')"
    assert "done" in _python(code)


def test_a_broken_package_breaks_no_interpreter_start(tmp_path):
    (tmp_path / "stm_plugin").mkdir()
    (tmp_path / "stm_plugin" / "__init__.py").write_text("def (")
    assert "done" in _python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LINE}\nprint('done')")


def test_the_startup_line_is_one_line():
    # site executes a line of a .pth file only if it starts with "import"
    assert LINE.startswith("import ")
    assert LINE.count("\n") == 1


def _fake_axolotl(folder, body="def prepare_plugins(cfg): cfg['seen'] = cfg.get('plugins')\n"):
    for name in ("axolotl", "axolotl/cli", "axolotl/utils"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    (folder / "axolotl/cli/config.py").write_text(body)
    (folder / "axolotl/utils/config.py").write_text("x = 1\n")


def test_the_hook_wraps_what_it_is_for_and_nothing_else(tmp_path):
    _fake_axolotl(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LINE}\n{LINE}\n"
        "import axolotl.cli.config, axolotl.utils.config, json\n"
        "cfg = {'plugins': 'my.Plugin'}; axolotl.cli.config.prepare_plugins(cfg)\n"
        "print(cfg['seen'], json.__spec__.loader.exec_module.__name__, sys.meta_path[0].__name__)\n"
        "print(sum(f.__class__ is type and f.__name__ == 'STMAxolotlFinder' for f in sys.meta_path))\n"
        "print(axolotl.cli.config.__spec__.origin, hasattr(axolotl.utils.config, 'prepare_plugins'))"
    )
    out = _python(code).split("\n")
    assert out[0] == "['my.Plugin'] exec_module STMAxolotlFinder"
    assert out[1] == "1"
    assert out[2] == f"{tmp_path}/axolotl/cli/config.py False"


def test_an_axolotl_that_is_missing_or_broken_fails_as_it_would(tmp_path):
    code = "try: import axolotl.cli.config\nexcept Exception as e: print(type(e).__name__, e)"
    assert _python(f"{LINE}\n{code}") == _python(code)
    _fake_axolotl(tmp_path, "raise RuntimeError('broken')")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert _python(f"{path}{LINE}\n{code}") == _python(path + code) == "RuntimeError broken\n"


def test_finders_and_loaders_of_other_kinds_are_let_be(tmp_path):
    _fake_axolotl(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{LINE}\n"
        "import importlib.util\n"
        "class Legacy: find_module = staticmethod(lambda name, path=None: None)\n"
        "class Slotted:\n"
        "    __slots__ = ()\n"
        "    def create_module(self, spec): return None\n"
        "    def exec_module(self, module): module.own = 1\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'axolotl.utils.config': return importlib.util.spec_from_loader(name, Slotted())\n"
        "sys.meta_path[1:1] = [Legacy, Finder]\n"
        "import axolotl.cli.config, axolotl.utils.config\n"
        "print(axolotl.utils.config.own, axolotl.cli.config.prepare_plugins.__wrapped__ is not None)\n"
        "print('exec_module' in vars(axolotl.cli.config.__loader__))"
    )
    assert _python(code) == "1 True\nFalse\n"


def test_names_loads_neither_torch_nor_axolotl():
    assert names.__name__ == "stm_plugin.axolotl.names"
    code = (
        "import sys; import stm_plugin.axolotl.names, stm_plugin.axolotl.conflicts\n"
        "print(sorted({'torch', 'axolotl', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_the_hook_comes_with_the_package_and_leaves_with_it(editable, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    requires.append("editables>=0.5")  # what hatchling asks for besides if `-e` is given
    try:
        subprocess.run([*pip, "install", *requires], check=True, capture_output=True, timeout=300)
    except subprocess.SubprocessError:
        pytest.skip("needs a package index for the build backend")
    install = [*pip, "install", "--no-deps", "--no-build-isolation", *(["-e"] if editable else []), ROOT]
    done = subprocess.run(install, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    code = f"import sys; print({HAS_HOOK})"

    def has_hook():
        return subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert has_hook() == "True\n"
    subprocess.run([*pip, "uninstall", "-y", "stm-plugin"], check=True, capture_output=True)
    assert has_hook() == "False\n"
    assert not list((tmp_path / "env").rglob("stm_plugin*"))

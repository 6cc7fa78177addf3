"""Verifiers: verdicts on answers written by hand and on the human answers of data sets, and what is refused."""

import hashlib
import importlib.util
import json
import os
import sys
from fractions import Fraction
from threading import Barrier

import pytest
from conftest import SHARED_DATA

from stm_plugin import sandbox
from stm_plugin.generation.verifiers import EMPTY, MAX_VERDICT, PASSED, VERIFIERS, make_verifier, reference_answer

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify, of the extra 'forgetting', is not installed"
)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="model-written code is run on Linux and macOS only")


def asked(answer="-", /, **fields):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]} | fields


TESTS = asked(test_list=["assert double(2) == 4", "assert double(SOME) == 6"], test_setup_code="SOME = 3")
MATH = asked(solution=r"So $\boxed{\frac{1}{2}}$.")
NUMBER = asked(answer="6 + 6 = <<6+6=12>>12\n#### 12")
CHOICE = asked(choices={"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}, answerKey="B")
ROWS = {"tests": TESTS, "math": MATH, "number": NUMBER, "choice": CHOICE}


def data(name, count):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs the rows at {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


# Numbers.


def number_row(number):
    return asked(answer=f"Because.\n#### {number}")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("12", "6 + 6\n#### 12"),
        ("12", "So the answer is 12."),
        ("12", "It is 12.0"),
        ("12", "**12**"),
        ("12", r"$\boxed{12}$"),
        ("12", "#### 12\nThat took 3 steps."),
        ("12", "Step by step. #### 12.\n"),
        ("12", "#### Step 1: add\nIt is 12"),
        ("12", "#### 1. Add\nIt is 12 apples"),
        ("12", "24/2 is\n24/2"),
        ("1,200", "It costs $1200.00"),
        ("1200", "It costs $1,200"),
        ("1200", r"It costs \$1{,}200"),
        ("1234567", "1,234,567"),
        ("-5", "It is -5 degrees"),
        ("-5", "It is −5"),
        ("-5", "It is -$5"),
        ("5", "10-5"),
        ("5", "- 5"),
        ("0.5", "half, so .5"),
        ("0.5", r"\frac{1}{2}"),
        ("2.50", "$2.5"),
        ("50", "50%"),
        ("50%", "#### 50"),
        ("$12", "12"),
        ("3", "1,2,3"),
        ("2000", "1,2000"),
    ],
)
def test_right_numbers(reference, answer):
    assert make_verifier("number", [number_row(reference)]).verify(answer, number_row(reference)) == PASSED


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("12", "It is 12, no:\n#### 13", "wrong: 13 is not 12"),
        ("12", "#### 13\nI take it back: 12.\n#### 14", "wrong: 14 is not 12"),
        ("12", "12 apples in 3 bags", "wrong: 3 is not 12"),
        ("12", "-12", "wrong: -12 is not 12"),
        ("12", "12.5", "wrong: 12.5 is not 12"),
        ("12", "1200", "wrong: 1200 is not 12"),
        ("200", "1,200", "wrong: 1,200 is not 200"),
        ("200", "1{,}200", "wrong: 1,200 is not 200"),
        ("4", "#### 3/4", "wrong: 3/4 is not 4"),
        ("4", r"\frac{3}{4}", "wrong: 3/4 is not 4"),
        ("12", "twelve", "no number"),
        ("3", "She sold 3 million", "no number"),
        ("1", "about 1e+3", "no number"),
        ("2", "2^10", "no number"),
        ("12", "12/0", "no number"),
        ("12", "9" * 5000, "no number"),  # Python reads no more than 4300 digits
    ],
)
def test_wrong_numbers(reference, answer, verdict):
    assert make_verifier("number", [number_row(reference)]).verify(answer, number_row(reference)) == verdict


def test_numbers_as_gsm8k_has_them():
    """Every human answer passes with its own row, and with another row if Python says that the numbers are equal."""
    rows = data("gsm8k", 400)
    verifier = make_verifier(None, rows)
    assert verifier.name == "number"
    answers = [row["messages"][-1]["content"] for row in rows]
    assert verifier.verify_all(list(zip(answers, rows, strict=True))) == [PASSED] * len(rows)
    numbers = [Fraction(answer.split("####")[1].strip().replace(",", "")) for answer in answers]
    for shift in (1, 7):
        verdicts = verifier.verify_all(list(zip(answers, rows[shift:], strict=False)))
        assert [verdict == PASSED for verdict in verdicts] == [
            mine == other for mine, other in zip(numbers, numbers[shift:], strict=False)
        ]


# Choices.


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        " (B)\n",
        "B.",
        "**B**",
        "B) because it is",
        "B. It is so.\nThat is why.",
        "- B. It is so.",
        "Option B",
        "The answer is B.",
        "The answer is (B) it is so",
        "The correct answer is: **B) it is so**",
        "**Answer:** B",
        "**Answer**: B",
        "answer: B - it is so",
        "the correct option is 'B'.",
        "The answer to the question is B because A is not.",
        r"The answer is $\boxed{B}$.",
        r"The answer is \(B\).",
        r"The answer is $\boxed{\text{B}}$.",
        "A. a\nB. b\nC. c\nD. d\nThe answer is B",
        "The answer is A. No: the answer is B.",
        "The answer should be option B, as A is not.",
        "A planet does it.\n\nB.",
    ],
)
def test_right_choices(answer):
    assert make_verifier("choice", [CHOICE]).verify(answer, CHOICE) == PASSED


@pytest.mark.parametrize(
    ("key", "answer", "verdict"),
    [
        ("B", "C", "wrong: C is not B"),
        ("B", "B. b\nThe answer is C.", "wrong: C is not B"),
        ("B", "The answer is B. No: the answer is C.", "wrong: C is not B"),
        ("A", "A planet rotates.", "no choice"),
        ("A", "The answer is: A planet rotates.", "no choice"),
        ("A", "The answer is A, B and C.", "no choice"),
        ("A", "A, B and C are.", "no choice"),
        ("A", "A: the planet", "no choice"),  # A as in question and answer
        ("B", "The answer is not B.", "no choice"),
        ("B", "The wrong answer is B.", "no choice"),
        ("B", "The answer is b", "no choice"),
        ("B", "The answer is Being.", "no choice"),
        ("B", "A. a\nB. b\nC. c", "no choice"),
        ("A", "The answer is: A. a\nB. b\nC. c", "no choice"),
        ("A", "The answer is either A or B.", "no choice"),
        ("3", "The answer is 3 metres", "no choice"),
        ("3", "The answer is 3.5", "no choice"),
        ("3", "The answer is 3,000", "no choice"),
        ("3", "The answer is 30", "no choice"),
        ("3", "The answer is 3 - 1", "no choice"),
        ("3", "The answer is 3.", PASSED),
        ("3", "1", "wrong: 1 is not 3"),
    ],
)
def test_other_choices(key, answer, verdict):
    labels = ["1", "2", "3", "4"] if key.isdigit() else ["A", "B", "C", "D"]
    row = asked(choices={"text": list("abcd"), "label": labels}, answerKey=key)
    assert make_verifier("choice", [row]).verify(answer, row) == verdict


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", [" ", "\n", "(*", "- ", "#", "-", "answer to ", "answer: ", "#### ", "9", "1,234"])
def test_what_a_model_repeats_for_ever_is_soon_judged(part):
    row = CHOICE | NUMBER
    for name in ("choice", "number"):
        verifier = make_verifier(name, [row])
        assert verifier.verify(f"x{part * 20000}x", row) != PASSED


def test_choices_as_arc_has_them():
    """Of each row's choices, given in three ways, the one of its key passes alone."""
    rows = data("arc_challenge", 300)
    verifier = make_verifier(None, rows)
    assert verifier.name == "choice"
    for form in ("{}", "({}) {}", "The correct answer is {}. {}"):
        for row in rows:
            labels, texts = row["choices"]["label"], row["choices"]["text"]
            verdicts = [
                verifier.verify(form.format(label, text), row) for label, text in zip(labels, texts, strict=True)
            ]
            assert [verdict == PASSED for verdict in verdicts] == [label == row["answerKey"] for label in labels]


# Mathematics.


@needs_math_verify
def test_math():
    verifier = make_verifier(None, [MATH])
    assert verifier.name == "math"
    jobs = {
        r"$\boxed{0.5}$": PASSED,
        "It is 1/2": PASSED,
        r"$\boxed{2}$": r"wrong: not equal to \frac{1}{2}",
        "half": r"wrong: not equal to \frac{1}{2}",
        "": EMPTY,
    }
    assert verifier.verify_all([(answer, MATH) for answer in jobs]) == list(jobs.values())


@needs_math_verify
def test_human_answers_of_math():
    rows = data("math_validation", 25)
    verifier = make_verifier(None, rows)
    assert verifier.verify_all([(reference_answer(row), row) for row in rows]) == [PASSED] * len(rows)


def test_math_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"math-verify is not installed.*stm-plugin\[forgetting\]"):
        make_verifier("math", [MATH])


# Unit tests.

GOOD = "```python\ndef double(n):\n    return 2 * n\n```"


@needs_posix
def test_unit_tests():
    verifier = make_verifier(None, [TESTS], run_model_code=True)
    assert verifier.name == "tests"
    jobs = {
        GOOD: PASSED,
        f"Here:\n{GOOD}\nIt doubles.": PASSED,
        "def double(n): return n + n": PASSED,
        "```python\ndef double(n):\n    return n\n```": "failed: AssertionError",
        "": EMPTY,
        " \n\t": EMPTY,
        "I cannot.": "failed: SyntaxError: invalid syntax",
        "raise SystemExit(0)": "ended early",
        "import sys\nprint('passed')\nraise ValueError('a\\nb' * 400)": "failed: ",
    }
    verdicts = verifier.verify_all([(answer, TESTS) for answer in jobs])
    assert verdicts[:-1] == list(jobs.values())[:-1]
    assert verdicts[-1].startswith("failed: ")
    assert len(verdicts[-1]) <= MAX_VERDICT
    assert verifier.verify_all([]) == []


@needs_posix
def test_an_empty_answer_never_passes_whatever_its_tests():
    row = asked(test_list=["assert True"])
    verifier = make_verifier("tests", [row], run_model_code=True)
    assert verifier.verify_all([("", row), ("x = 1", row)]) == [EMPTY, PASSED]


@needs_posix
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0, 1])(0)) < 2, reason="needs two cores")
def test_unit_tests_run_beside_each_other(monkeypatch):
    contained, both = sandbox.run_code, Barrier(2, timeout=60)

    def run_code(code, name):
        both.wait()  # raises where the other one is not begun before this one has ended
        return contained(code, name=name)

    monkeypatch.setattr(sandbox, "run_code", run_code)
    row = asked(test_list=["assert True"])
    verifier = make_verifier("tests", [row], run_model_code=True)
    assert verifier.verify_all([("x = 1", row), ("1 / 0", row)]) == [
        PASSED,
        "failed: ZeroDivisionError: division by zero",
    ]


@needs_posix
def test_human_answers_of_mbpp():
    rows = data("mbpp_validation", 12)
    verifier = make_verifier(None, rows, run_model_code=True)
    answers = [row["messages"][-1]["content"] for row in rows]
    assert verifier.verify_all(list(zip(answers, rows, strict=True))) == [PASSED] * len(rows)
    shifted = verifier.verify_all(list(zip(answers, [*rows[1:], rows[0]], strict=True)))
    assert PASSED not in shifted


def test_code_is_not_run_unless_asked_for():
    for name in ("tests", None):
        with pytest.raises(
            ValueError, match=r"runs code that the model writes.*--run-model-written-code, .*run_model_code=True"
        ):
            make_verifier(name, [TESTS])


# The row's own answer.


@pytest.mark.parametrize(
    "row",
    [
        asked(" Paris.\n"),
        {"prompt": "q", "completion": "Paris."},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "Paris."}]},
    ],
)
def test_exact(row):
    verifier = make_verifier("exact", [row])
    assert verifier.verify_all([("Paris.\n\n", row), ("paris.", row), ("Paris", row), ("", row)]) == [
        PASSED,
        "wrong",
        "wrong",
        EMPTY,
    ]


# A function of the user's own.


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "my_own_checks.py").write_text(
        "import sys\nimport numpy\n"
        "class Checks:\n"
        "    @staticmethod\n"
        "    def short(answer, row):\n        return len(answer) < row['limit']\n"
        "def raises(answer, row):\n    raise KeyError('two\\nlines')\n"
        "def leaves(answer, row):\n    sys.exit(3)\n"
        "def talks(answer, row):\n    return 'passed'\n"
        "def silent(answer, row):\n    pass\n"
        "def yes(answer, row):\n    return True\n"
        "def numpys(answer, row):\n    return numpy.array([1.0])[0] == 1\n"
        "def changes(answer, row):\n    row['messages'][0]['content'] = ''\n    return True\n"
        "async def late(answer, row):\n    return True\n"
        "NUMBER = 3\n",
        encoding="utf-8",
    )
    (tmp_path / "my_broken_checks.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("my_own_checks", None)


def verdict(name, answer="an answer", /, **fields):
    row = asked(**fields)
    return make_verifier(name, [row]).verify(answer, row)


def test_own_functions(own):
    assert verdict("my_own_checks:Checks.short", limit=10) == PASSED
    assert verdict("my_own_checks:Checks.short", limit=9) == "wrong"
    assert verdict("my_own_checks.yes") == PASSED
    assert verdict("my_own_checks:numpys") == PASSED
    assert verdict("my_own_checks:yes", " \n") == EMPTY


def test_what_an_own_function_does_amiss_is_a_verdict(own):
    assert verdict("my_own_checks:raises") == r"error: KeyError: 'two\nlines'"
    assert verdict("my_own_checks:leaves") == "error: SystemExit: 3"
    assert verdict("my_own_checks:talks") == "error: returned str, not True or False"
    assert verdict("my_own_checks:silent") == "error: returned NoneType, not True or False"
    assert verdict("my_own_checks:Checks.short") == "error: KeyError: 'limit'"


def test_the_source_of_an_own_function_shows_that_it_has_changed(own, tmp_path):
    def source(name, row=asked()):  # noqa: B008
        return make_verifier(name, [row]).source

    (tmp_path / "my_names.py").write_text("from my_own_checks import yes\nfrom operator import eq\n")
    before, elsewhere = source("my_own_checks:yes"), source("my_names:yes")
    assert before == hashlib.sha256((tmp_path / "my_own_checks.py").read_bytes()).hexdigest()
    assert source("my_names:eq") != elsewhere != before
    with (tmp_path / "my_own_checks.py").open("a") as file:
        file.write("NUMBER = 4\n")
    assert source("my_own_checks:yes") != before
    assert source("my_names:yes") != elsewhere
    assert source("math:gcd") is None  # built in
    assert source(None, NUMBER) is None
    sys.modules.pop("my_names")


@pytest.mark.filterwarnings("ignore:coroutine 'late' was never awaited")
def test_a_coroutine_is_no_verdict(own):
    assert verdict("my_own_checks:late") == "error: returned coroutine, not True or False"


def test_an_own_function_cannot_change_the_row(own):
    row = asked()
    assert make_verifier("my_own_checks:changes", [row]).verify("a", row) == PASSED
    assert row == asked()


def test_verdicts_are_one_short_line(own, monkeypatch):
    make_verifier("my_own_checks:yes", [asked()])

    def raises(answer, row):
        raise ValueError("a\nb\x1b[0m\u2028" + "c" * 500)

    monkeypatch.setattr(sys.modules["my_own_checks"], "yes", raises)
    found = verdict("my_own_checks:yes")
    assert found.startswith("error: ValueError: a b [0m ccc")
    assert len(found) == MAX_VERDICT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nubmer", "no verifier 'nubmer': name tests, math, number, choice, exact, or .*did you mean number"),
        ("", "no verifier ''"),
        (":f", "no verifier ':f'"),
        ("my_own_checks:", "no verifier 'my_own_checks:'"),
        ("my_own_checks:nothing", "my_own_checks has no function 'nothing'"),
        ("my_own_checks:NUMBER", "my_own_checks has no function 'NUMBER'"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: .*no_such_module.*PYTHONPATH"),
        ("my_broken_checks:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_functions_that_are_not_there(own, name, message):
    with pytest.raises(ValueError, match=message):
        make_verifier(name, [asked()])


# What is chosen, and what is refused.


def test_the_form_of_the_rows_chooses(monkeypatch):
    assert make_verifier(None, [NUMBER, NUMBER]).name == "number"
    assert make_verifier(None, [CHOICE]).name == "choice"
    absent = dict.fromkeys(("test_list", "test_setup_code", "solution", "choices", "answerKey"))
    assert make_verifier(None, [absent | NUMBER]).name == "number"  # as a data set fills what a row lacks
    assert list(VERIFIERS) == ["tests", "math", "number", "choice", "exact"]


def test_no_form_fits():
    with pytest.raises(ValueError, match="the form of no verifier") as error:
        make_verifier(None, [NUMBER, CHOICE])
    for part in (
        "tests: row 0 has no `test_list`",
        "math: row 0 has no `solution`",
        "number: row 1 has no `answer` that ends in '#### NUMBER'",
        "choice: row 0 has no `choices`",
        "--verifier",
        "verifier=",
        "exact",
        "package.module:function",
    ):
        assert part in str(error.value)


def test_several_forms_fit():
    with pytest.raises(ValueError, match=r"several verifiers, math and number\. Name one with --verifier"):
        make_verifier(None, [NUMBER | MATH])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("tests", asked(), r"'tests' needs of each row `test_list`.*: row 1 has no `test_list` of asserts"),
        ("tests", asked(test_list=[]), "no `test_list` of asserts"),
        ("tests", asked(test_list="assert True"), "no `test_list` of asserts"),
        ("tests", asked(test_list=["assert True"], test_setup_code=1), "`test_setup_code` that is not text"),
        ("math", asked(solution="1/2"), r"row 1 has no `solution` with a \\boxed"),
        ("math", asked(solution=r"\boxed{}"), "no `solution`"),
        ("number", asked(answer="12"), "row 1 has no `answer` that ends in '#### NUMBER'"),
        ("number", asked(answer="#### 12\nOr so."), "no `answer`"),
        ("number", asked(answer="#### twelve"), "no `answer`"),
        ("number", asked(answer="#### 1/0"), "no `answer`"),
        ("number", asked(answer=12), "no `answer`"),
        ("choice", asked(choices=["a", "b"], answerKey="A"), "row 1 has no `choices` with `label`"),
        ("choice", CHOICE | {"answerKey": "E"}, "`answerKey` 'E', which is none of its labels"),
        ("choice", CHOICE | {"answerKey": None}, "`answerKey` None"),
        ("exact", {"prompt": "q"}, "row 1 has no answer of its own: its chat: needs `messages`"),
        ("exact", asked(" "), "its own answer is not text, or empty"),
        ("exact", {"prompt": [], "completion": []}, "its own answer is not text, or empty"),
    ],
)
def test_rows_that_lack_what_the_verifier_needs(name, row, message):
    good = ROWS.get(name, asked("Paris."))
    with pytest.raises(ValueError, match=message):
        make_verifier(name, [good, row, row], run_model_code=True)


def test_no_rows():
    with pytest.raises(ValueError, match="no row"):
        make_verifier("number", [])

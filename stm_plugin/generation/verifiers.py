"""Whether a generated answer is right: by the row's tests, its reference answer, or a function of the user's own."""

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..measures.inputs import Row, as_chat
from ..tasks.code_answers import PASSED as PASSED
from ..tasks.code_answers import fault_of_tests

Job = tuple[str, Row]
"""An answer with the row that it is for."""

EMPTY = "empty"
"""The verdict on an answer without any text, whatever verifies it."""
MAX_VERDICT = 200
"""Longest verdict, in characters."""

_NUMBER = r"((?<![\w)\]}])[-−])?(?:\\?[$€£])?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(/\d+)?"
"""Sign, decimal number perhaps with thousands separators, denominator."""
_NUMBERS = re.compile(_NUMBER)
_BEFORE_EXPONENT = re.compile(r"(?:\^\{?|\d[eE][-+]?)$")
_SCALE = re.compile(r"[eE][-+]?\d|\s?(?:hundred|thousand|million|billion|trillion)\b|\^")
_MARKED = re.compile(rf"####[ \t]*{_NUMBER}[.%]?[ \t]*$", re.MULTILINE)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")

_MARKUP = re.compile(r"\\(?:boxed|text|textbf|mathrm)\b|\\[()\[\]]|[*_$\"“”'’`{}]")
_SAYS = (
    r"(?i:(?<!wrong )(?<!incorrect )\b(?:answer|choice|option)(?: to [^.:\n]{0,80}?| here)?"
    r"(?: (?:is|would be|should be|must be)\b ?:?| ?:)\s?(?:(?:option|choice|letter) )?)"
)
"""What comes before the label in a sentence such as "The correct answer is: (B)"."""


class Verifier:
    """Says of answers whether they are right.

    A verdict is `PASSED`, or one of `empty`, `wrong`, `no number`, `no choice`, `failed`, `ended early`, `timed out`,
    `killed` and `error`, perhaps with `: ` and details behind it. It is one line of at most `MAX_VERDICT` characters.

    Attributes:
        name: One of `VERIFIERS`, or the path of a function of the user's own.
        source: Hash of the files that such a function is in, by which a change of it shows; None for one of
            `VERIFIERS`, and where there is no such file.
    """

    def __init__(self, name: str, judge: Callable[[Sequence[Job]], list[str]], source: str | None = None):
        self.name, self.source = name, source
        self._judge = judge

    def verify(self, answer: str, row: Row) -> str:
        """The verdict on one answer (see `verify_all`)."""
        return self.verify_all([(answer, row)])[0]

    def verify_all(self, jobs: Sequence[Job]) -> list[str]:
        """The verdicts on answers, in order; unit tests run as many at a time as there are cores.

        Whether an answer is whole is the caller's to know: one that was cut may pass.

        Raises:
            SandboxError: The system cannot run code contained (any more); nothing is known about the answers.
            RuntimeError: math_verify cannot be started.
        """
        verdicts = iter(self._judge([job for job in jobs if job[0].strip()]))
        return [_one_line(next(verdicts)) if answer.strip() else EMPTY for answer, _ in jobs]


def make_verifier(name: str | None, rows: Sequence[Row], *, run_model_code: bool = False) -> Verifier:
    """The verifier for some rows.

    Args:
        name: One of `VERIFIERS`, or a function `(answer: str, row: Mapping) -> bool` of the user's own as
            `package.module:function` or `package.module.function`, which is called in the calling thread, one answer
            after the other; its module may lie in the current folder. None takes `tests`, `math`, `number` or
            `choice` by the form of the rows.
        rows: All rows that answers will be for.
        run_model_code: Whether code that the model writes may be run, contained.

    Raises:
        ValueError: There is no such verifier, a row lacks what it needs, none or several fit where none is named, or
            it runs code and that is not allowed.
        ImportError: What the verifier needs is not installed.
        SandboxError: It runs code, and the system cannot contain it.
    """
    if not rows:
        raise ValueError("there is no row to verify answers for.")
    name = _fitting(rows) if name is None else name
    if name not in _FORMS:
        function = _function(name)
        return Verifier(name, _one_by_one(_own_judge(function)), _source_of(function, name))
    form = _FORMS[name]
    fault = _first_fault(form, rows)
    if fault:
        raise ValueError(f"the verifier {name!r} needs of each row {form.needs}: {fault}.")
    if name == "tests":
        _check_code_may_run(run_model_code)
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        from .._compat import missing_extra

        raise missing_extra("math-verify", "forgetting")
    return Verifier(name, form.judge)


def reference_answer(row: Row) -> str:
    """The row's own answer: the text of its last message, or its completion.

    Raises:
        ValueError: The row has none, or one that is not text.
    """
    completion = as_chat(row, "its chat")["completion"]
    text = completion[-1].get("content") if isinstance(completion, list) and completion else completion
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its own answer is not text, or empty")
    return text


# What is chosen.


def _fitting(rows: Sequence[Row]) -> str:
    """The one verifier whose form all rows have.

    Raises:
        ValueError: None is, or several are.
    """
    faults = {name: _first_fault(_FORMS[name], rows) for name in ("tests", "math", "number", "choice")}
    fitting = [name for name, fault in faults.items() if fault is None]
    if len(fitting) == 1:
        return fitting[0]
    how = (
        f"Name one with --verifier, in Python verifier=: {', '.join(_FORMS)} (compares with the row's own answer), or "
        "a function of your own as package.module:function."
    )
    if fitting:
        raise ValueError(f"the rows have the form of several verifiers, {' and '.join(fitting)}. {how}")
    lacks = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
    raise ValueError(f"the rows have the form of no verifier ({lacks}). {how}")


def _check_code_may_run(run_model_code: bool) -> None:
    from ..sandbox import isolation

    if not run_model_code:
        raise ValueError(
            "the verifier 'tests' runs code that the model writes, in a contained process, which must be asked for: "
            "by --run-model-written-code, in Python run_model_code=True."
        )
    isolation()  # an error where nothing can be contained


def _function(path: str) -> Callable[..., Any]:
    """The user's own function at a dotted path.

    Raises:
        ValueError: There is none.
    """
    module_name, name = _parts(path)
    if not module_name or not name:
        near = difflib.get_close_matches(path, _FORMS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"there is no verifier {path!r}: name {', '.join(_FORMS)}, or a function of your own as "
            f"package.module:function{hint}"
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # for good: the module may import its neighbours when it is called
    try:
        function: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"the module of the verifier {path!r} cannot be imported: {type(error).__name__}: {error}. It must be "
            "installed, in the current folder, or in one that PYTHONPATH names."
        ) from error
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"the verifier {path!r}: {module_name} has no function {name!r}.")
    return function


def _parts(path: str) -> tuple[str, str]:
    """Module and name of a dotted path."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    return module, name


def _source_of(function: Callable[..., Any], path: str) -> str | None:
    """Hash of the file of a function's module, and of the one that the function is from if that is another."""
    files = set()
    for thing in (sys.modules.get(_parts(path)[0]), inspect.unwrap(function)):
        try:
            files.add(inspect.getsourcefile(thing))  # type: ignore[arg-type]
        except TypeError:  # built in, or an object that can be called
            continue
    digest = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file and Path(file).is_file()]
    return " ".join(sorted(digest)) or None


# The forms of rows, and why a row has not one.


def _first_fault(form: "_Form", rows: Sequence[Row]) -> str | None:
    """The first row that lacks what a verifier needs, and why; None where all have it."""
    for index, row in enumerate(rows):
        fault = form.fault(row)
        if fault is not None:
            return f"row {index} {fault}"
    return None


def _math_fault(row: Row) -> str | None:
    from ..tasks.math_answers import boxed

    solution = row.get("solution")
    return None if isinstance(solution, str) and boxed(solution) else r"has no `solution` with a \boxed{}"


def _number_fault(row: Row) -> str | None:
    return "has no `answer` that ends in '#### NUMBER'" if _reference_number(row) is None else None


def _choice_fault(row: Row) -> str | None:
    choices = row.get("choices")
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label for label in labels):
        return "has no `choices` with `label`"
    key = row.get("answerKey")
    return None if key in labels else f"has the `answerKey` {key!r}, which is none of its labels {labels}"


def _exact_fault(row: Row) -> str | None:
    try:
        reference_answer(row)
    except ValueError as error:
        return f"has no answer of its own: {str(error).rstrip('.')}"
    return None


# Verdicts.


def _one_by_one(judge: Callable[[str, Row], str]) -> Callable[[Sequence[Job]], list[str]]:
    return lambda jobs: [judge(answer, row) for answer, row in jobs]


def _tests(jobs: Sequence[Job]) -> list[str]:
    from ..tasks.code_answers import run_tests

    return run_tests(jobs)


def _math(answer: str, row: Row) -> str:
    from ..tasks.math_answers import boxed, same_answer

    return PASSED if same_answer(answer, row["solution"]) else f"wrong: not equal to {boxed(row['solution'])}"


def _number(answer: str, row: Row) -> str:
    """Compares the number behind the answer's last `####`, or else its last number."""
    text = _FRACTION.sub(r"\1/\2", answer.replace("{,}", ","))
    matches = list(_MARKED.finditer(text)) or list(_NUMBERS.finditer(text))
    found = _value(matches[-1]) if matches else None
    if found is None or _is_part_of_another(text, *matches[-1].span()):
        return "no number"
    wanted = _reference_number(row)
    return PASSED if found == wanted else f"wrong: {_shown(matches[-1])} is not {wanted}"


def _is_part_of_another(text: str, start: int, end: int) -> bool:
    """Whether a number is a mantissa, an exponent, or counts millions, so that its value is not the number's."""
    return bool(_SCALE.match(text, end) or _BEFORE_EXPONENT.search(text[max(0, start - 4) : start]))


def _reference_number(row: Row) -> Fraction | None:
    """The number behind the last `####` of the row's `answer`; None where it does not end in one."""
    answer = row.get("answer")
    text = answer.rstrip() if isinstance(answer, str) else ""
    match = _MARKED.search(text, text.rfind("####")) if "####" in text else None
    return _value(match) if match is not None and match.end() == len(text) else None


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number as `_NUMBER` finds it; None for a division by 0, or more digits than Python reads."""
    sign, number, denominator = match.groups()
    try:
        value = Fraction(number.replace(",", "")) / Fraction((denominator or "/1")[1:])
    except (ValueError, ZeroDivisionError):
        return None
    return -value if sign else value


def _shown(match: re.Match[str]) -> str:
    sign, number, denominator = match.groups()
    return f"{sign or ''}{number[:50]}{denominator or ''}"


def _choice(answer: str, row: Row) -> str:
    label = _label_in(answer, row["choices"]["label"])
    if label is None:
        return "no choice"
    return PASSED if label == row["answerKey"] else f"wrong: {label} is not {row['answerKey']}"


def _label_in(answer: str, labels: Sequence[str]) -> str | None:
    """The choice that an answer names: in its last "the answer is X", or else the only X that starts a line.

    A label counts where it stands as one: not the article in "A planet", not the quantity in "3 metres", not one of
    several in "A, B", nor the first of a list of all choices.
    """
    # Runs of spaces and empty lines, which models write for ever, would make the search below take as long.
    lines = (" ".join(line.split()) for line in _MARKUP.sub("", answer).splitlines())
    text = "\n".join(line for line in lines if line)
    one = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    several = rf",(?!\w| ?(?:(?:and|or) )?(?:{one})\b)"
    ends = rf"(?!\w)(?= ?(?:$|[)\]:;]|\.(?!\w)|{several}|[-–—(](?! ?\d)|(?i:because|since|as)\b))"
    line_start = re.compile(rf"^(?:[>#-]+ ?)?(?i:(?:option|choice|letter) )?[(\[]?({one})(?! ?:){ends}", re.MULTILINE)
    said = list(re.finditer(rf"{_SAYS}[(\[]?({one}){ends}", text, re.MULTILINE))
    named = {said[-1][1], *line_start.findall(text, said[-1].end())} if said else set(line_start.findall(text))
    return str(named.pop()) if len(named) == 1 else None


def _exact(answer: str, row: Row) -> str:
    return PASSED if answer.strip() == reference_answer(row).strip() else "wrong"


def _own_judge(function: Callable[..., Any]) -> Callable[[str, Row], str]:
    """A user's function as a judge; what it raises, or returns instead of True or False, is a verdict."""

    def judge(answer: str, row: Row) -> str:
        try:
            result = function(answer, copy.deepcopy(row))  # what it changes there is no one else's
        except (Exception, SystemExit) as error:
            return f"error: {type(error).__name__}: {error}"
        if not isinstance(result, bool | np.bool_):
            return f"error: returned {type(result).__name__}, not True or False"
        return PASSED if result else "wrong"

    return judge


def _one_line(verdict: str) -> str:
    """A verdict without line breaks and other characters that cannot be shown, cut where it is long."""
    shown = "".join(character if character.isprintable() else " " for character in verdict)
    return " ".join(shown.split())[:MAX_VERDICT]


class _Form(NamedTuple):
    """What a verifier needs of a row, in words; why a row lacks it, or None; and its verdicts."""

    needs: str
    fault: Callable[[Row], str | None]
    judge: Callable[[Sequence[Job]], list[str]]


_FORMS = {
    "tests": _Form(
        "`test_list`, asserts in Python, and perhaps `test_setup_code` and `test_imports`", fault_of_tests, _tests
    ),
    "math": _Form(r"`solution` with its result in \boxed{}", _math_fault, _one_by_one(_math)),
    "number": _Form("`answer` that ends in '#### NUMBER'", _number_fault, _one_by_one(_number)),
    "choice": _Form("`choices` with `label`, and `answerKey`", _choice_fault, _one_by_one(_choice)),
    "exact": _Form(
        "an answer of its own, in `messages`, or `prompt` and `completion`", _exact_fault, _one_by_one(_exact)
    ),
}

VERIFIERS: dict[str, str] = {name: form.needs for name, form in _FORMS.items()}
"""What each verifier needs of a row."""

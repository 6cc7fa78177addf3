"""Training chats made from the running Python's own standard library: "write this function" -> the human's code.

The modules are read as text and parsed with `ast`; none of them is imported. The same Python release always yields
the same functions in the same order (742 to 799 of them for Python 3.13 to 3.11).
"""

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MIN_DOCSTRING_CHARS = 20
MAX_DOCSTRING_CHARS = 400
MIN_SOURCE_CHARS = 100
MAX_SOURCE_CHARS = 1500

# Test suites, an editor, a code converter, demos, jokes and generated text: not library code.
SKIPPED_PACKAGES = frozenset(
    {
        "antigravity",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "this",
        "turtledemo",
    }
)

_PROMPT = "Write this Python function. Answer with the code only.\n\n{stub}"

Message = dict[str, str]
Chat = dict[str, list[Message]]


class StdlibFunction(NamedTuple):
    """One public top-level function of the standard library.

    Attributes:
        module: Dotted name of the module that defines it.
        name: Name of the function.
        signature: Its source up to the body, decorators included.
        docstring: Its docstring as written, quotes included, at the indentation of the body.
        code: Its whole source without the docstring.
    """

    module: str
    name: str
    signature: str
    docstring: str
    code: str


def stdlib_functions() -> list[StdlibFunction]:
    """Lists the public, documented, top-level functions of the running Python's standard library.

    Kept are functions with a docstring of 20 to 400 characters and 100 to 1,500 characters of source. Private and
    test modules and functions are left out, and so is the second of two functions with the same source.

    Returns:
        The functions, sorted by module path and then by position in the file.

    Raises:
        FileNotFoundError: This Python has no standard library source on disk (an embedded or frozen build).
    """
    root = Path(sysconfig.get_path("stdlib"))
    functions: list[StdlibFunction] = []
    seen: set[str] = set()
    for path in _public_module_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for function in _functions_of(path.read_text(encoding="utf-8"), module):
            if function.code not in seen:
                seen.add(function.code)
                functions.append(function)
    if not functions:
        raise FileNotFoundError(
            f"no Python source of the standard library in {root}. The demo makes its training data from it: "
            "run it with a Python that has its standard library as .py files."
        )
    return functions


def training_chats(num_rows: int, seed: int) -> list[Chat]:
    """Makes the demo's training set: the first `num_rows` of a seeded shuffle of `stdlib_functions()`.

    Args:
        num_rows: How many chats to return, at least 1.
        seed: Seed of the shuffle.

    Returns:
        Chats `{"prompt": [user message], "completion": [assistant message]}`, as TRL's SFT trainer takes them.

    Raises:
        ValueError: `num_rows` is below 1 or above the number of functions there are.
    """
    functions = stdlib_functions()
    if not 1 <= num_rows <= len(functions):
        raise ValueError(
            f"got {num_rows} rows; this Python's standard library yields 1 to {len(functions)}. Change --rows."
        )
    random.Random(seed).shuffle(functions)
    return [as_chat(function) for function in functions[:num_rows]]


def as_chat(function: StdlibFunction) -> Chat:
    """Turns a function into a chat.

    The request shows signature and docstring. The answer is the function's source as its author wrote it, less the
    docstring: repeating it would only train copying from the prompt.
    """
    stub = f"{function.signature}\n{function.docstring}"
    return {
        "prompt": [{"role": "user", "content": _PROMPT.format(stub=stub)}],
        "completion": [{"role": "assistant", "content": function.code}],
    }


def _public_module_files(root: Path) -> Iterator[Path]:
    """Yields the source files of public standard library modules below `root`, in a fixed order."""
    for name in sorted(sys.stdlib_module_names):
        single = root / f"{name}.py"
        files = [single] if single.is_file() else sorted((root / name).rglob("*.py"))
        for path in files:
            if all(_is_public(part) for part in path.relative_to(root).with_suffix("").parts):
                yield path


def _is_public(part: str) -> bool:
    """Tells whether one part of a module's path is public library code."""
    return part == "__init__" or not (part in SKIPPED_PACKAGES or part.startswith(("_", "test_")))


def _functions_of(source: str, module: str) -> Iterator[StdlibFunction]:
    """Yields the functions of one module that fit the demo."""
    lines = source.split("\n")  # not splitlines(): a form feed ends no line for `ast`
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith(("_", "test")):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or not MIN_DOCSTRING_CHARS <= len(docstring) <= MAX_DOCSTRING_CHARS:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        doc = node.body[0]
        doc_end, end = doc.end_lineno or 0, node.end_lineno or 0
        shares_a_line = doc.lineno == node.lineno or (len(node.body) > 1 and node.body[1].lineno == doc_end)
        if len(node.body) == 1 or shares_a_line:
            continue
        if MIN_SOURCE_CHARS <= len("\n".join(lines[first - 1 : end])) <= MAX_SOURCE_CHARS:
            signature = lines[first - 1 : doc.lineno - 1]
            yield StdlibFunction(
                module=module,
                name=node.name,
                signature="\n".join(signature),
                docstring="\n".join(lines[doc.lineno - 1 : doc_end]),
                code="\n".join([*signature, *lines[doc_end:end]]),
            )

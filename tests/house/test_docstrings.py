"""Docstrings of functions and methods say what they do: the first word is a verb (CONTRIBUTING.md)."""

import ast

import pytest

from tests.support import ROOT


FOLDERS = ("modeling_nrccr", "datasets_scripts", "benchmarks", "examples")
NO_VERBS = set(
    "the a an of what whether which where how as those all one each from by with for in raises".split()
)  # a word of a list, not a grammar: what such sentences began with
NOUNS_ARE_RIGHT = {"property", "cached_property", "fixture"}


def wrong_beginnings(source: str) -> list[tuple[int, str]]:
    """Return the line of each docstring that begins with no verb, and its first line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not (text := ast.get_docstring(node)):
            continue
        decorators = {part for of in node.decorator_list for part in ast.unparse(of).partition("(")[0].split(".")}
        word = text.split()[0]
        if not decorators & NOUNS_ARE_RIGHT and (word[0] == "`" or word.lower().rstrip(",:;.") in NO_VERBS):
            found.append((node.body[0].lineno, text.splitlines()[0]))
    return found


def test_docstrings_begin_with_a_verb():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in wrong_beginnings(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, 'begin with a verb ("Return", "Load", "Map `(n, d)` to ..."):\n' + "\n".join(wrong)


@pytest.mark.parametrize("text", ["The rows.", "`(n, d)` to `(n, k)`.", "Raises ValueError.", "All: of it."])
def test_other_beginnings_are_found(text):
    assert wrong_beginnings(f'\ndef call():\n    """{text}"""\n') == [(3, text)]


@pytest.mark.parametrize(
    "source",
    [
        'def call():\n    """Map `(n, d)` to `(n, k)`."""',
        'async def call():\n    """\n    Return the rows.\n    """',
        'class Rows:\n    """The rows."""\n    @property\n    def first(self):\n        """The first."""',
        '@pytest.fixture(scope="module")\ndef rows():\n    """The rows."""',
        "def call():\n    return 1",
    ],
)
def test_right_beginnings_pass(source):
    assert wrong_beginnings(source) == []

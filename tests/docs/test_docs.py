"""What the pages tell a reader to type, open or click is there: commands, flags, recipes, modules, files, links."""

import argparse
import ast
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from modeling_nrccr.cli.main import COMMANDS
from tests.house.test_glossary import flags  # noqa: F401  (of each command, as `--help` shows them)
from tests.support import ROOT


PLACES = ("", "benchmarks", "docs", "docs/study", "modeling_nrccr/recipes", "modeling_nrccr/space")
PAGES = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in (ROOT / place).glob("*.md"))
PAGES.remove("CHANGELOG.md")  # says what was
PAGES.remove("model_card.md")  # a template
FOLDERS = "benchmarks|datasets_scripts|docs|examples|modeling_nrccr|tests"
A_PATH = re.compile(rf"(?<![\w/.:-])(?:{FOLDERS})/[\w./*-]*")
STANDS_FOR_ANY = re.compile(r"\b(?:X|NAME|STUDY)\b")
DOTTED = re.compile(r"(?<![\w/.-])(?:modeling_nrccr|datasets_scripts)(?:\.\w+)+(?![\w/])")
OF_OTHERS = {"nproc_per_node", "cpu", "quiet", "version"}  # torchrun's, accelerate's
TRAINING = {"train": "run", "add-language": "add_language", "train-translator": "translator"}
LONGEST = 99  # signs of a line of code: no page scrolls sideways for it


class Parsed(Exception):
    """The command could begin its work."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and text of each block of code."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(language, text) for language, text in found]


def prose(page: str) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(page: str) -> list[str]:
    """Return what stands in backticks in the text."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of each command of the page's blocks, without what is set before it (`NAME=value`)."""
    for language, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, ";"]:
                if word.strip("();<>|&"):
                    words += [word] if words or not re.match(r"\w+=", word) else []
                else:
                    yield from [words] if words else []
                    words = []


def of_ours(words: list[str]) -> list[str] | None:
    """Return what stands after `nrccr`, however it is started; None for another command."""
    if Path(words[0]).name == "nrccr":
        return words[1:]
    if "examples/train.py" in words:
        return ["train", *words[words.index("examples/train.py") + 1 :]]
    if "modeling_nrccr" in words and words[words.index("modeling_nrccr") - 1] == "-m":
        return words[words.index("modeling_nrccr") + 1 :]
    return None


TYPED = [(page, shlex.join(of_ours(words))) for page in PAGES for words in commands(page) if of_ours(words)]


def test_commands_are_found():
    assert len({words.split()[0] for _, words in TYPED}) > 10


@pytest.mark.parametrize("page, line", [pytest.param(*typed, id=": ".join(typed)) for typed in dict.fromkeys(TYPED)])
def test_what_is_typed_is_taken(page, line, monkeypatch):
    """Parsed by the command itself, which is stopped there: flags, arguments, recipes, values."""
    name, *arguments = shlex.split(line)

    def stop(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    assert name in COMMANDS
    monkeypatch.setenv("NRCCR_DEBUG", "1")  # errors as they are
    monkeypatch.setenv("NRCCR_WORKER", "1")  # starts no processes
    if name in TRAINING:
        module = importlib.import_module(f"modeling_nrccr.training.{TRAINING[name]}")
        monkeypatch.setattr(module, "parse_arguments", stop(module.parse_arguments))
    else:
        for parse in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(argparse.ArgumentParser, parse, stop(getattr(argparse.ArgumentParser, parse)))
    with pytest.raises(Parsed):
        importlib.import_module(f"modeling_nrccr.cli.{COMMANDS[name][0]}").main(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_are_of_a_command(page, flags):  # noqa: F811
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    known = set().union(*flags.values(), OF_OTHERS, re.findall(r'add_argument\(\s*"--(\w+)"', sources))
    for span in spans(page):
        of_command = re.match(r"nrccr ([\w-]+)", span)
        assert not of_command or of_command[1] in {*COMMANDS, "X"}, span
        taken = flags[of_command[1]] if of_command and of_command[1] in flags else known
        assert set(re.findall(r"(?:^|\s)--(\w+)", span)) <= taken | {"debug", "help"}, span


@pytest.mark.parametrize("page", PAGES)
def test_modules_targets_and_extras_are_there(page):
    setup = (ROOT / "setup.py").read_text()
    for words in commands(page):
        if "-m" in words[:2] and Path(words[0]).name.startswith("python"):
            module = words[words.index("-m") + 1]
            path = ROOT / module.replace(".", "/")
            ours = re.match(rf"(?:{FOLDERS})\b", module)
            assert not ours or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        if words[0] == "make":
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in words[1:]), words
    text = (ROOT / page).read_text(encoding="utf-8")
    for extra in ",".join(re.findall(r"\.\[([\w,]+)\]", text)).split(","):
        assert not extra or f'"{extra}": ' in setup, extra
    assert "modeling_nrccr[" not in text  # on no index: `pip install ".[lora]"`, in a checkout


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_there(page):
    for text in [*spans(page), *(word for words in commands(page) for word in words)]:
        for path in A_PATH.findall(text):
            assert any(ROOT.glob(STANDS_FOR_ANY.sub("*", path.rstrip("./")))), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def anchors(page: Path) -> set[str]:
    """Return what GitHub calls the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(str(page.resolve().relative_to(ROOT))), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_python_names_are_there(page):
    names = [name for span in spans(page) for name in DOTTED.findall(span)]
    for language, text in blocks(page):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and re.match(rf"(?:{FOLDERS})\b", node.module):
                    names += [f"{node.module}:{alias.name}" for alias in node.names]
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_code_are_short(page):
    lines = [line for language, text in blocks(page) if language in ("bash", "python") for line in text.splitlines()]
    assert not [line for line in lines if len(line) > LONGEST]

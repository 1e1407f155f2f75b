"""List what can be chosen by a name: losses, engines, data, adapters, encoders, indexes, recipes, languages:

    nrccr list
    nrccr list losses
    nrccr list languages

What is yours is named in the same places, as my_module:MyClass. `languages` are those into which and from which an
engine translates that needs no more than Debian's packages; a Transformers model or a chat server brings its own.
"""

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from .common import command, parser


PACKAGE = __package__.rpartition(".")[0]
RECIPES = Path(__file__).parents[1] / "recipes"  # `recipes.settings` has it too, and is slow to import
REGISTRIES = {  # heading: module, name of the registry in it, the setting
    "losses": ("training.losses", "LOSSES", "losses: {NAME: WEIGHT}"),
    "engines": ("translation.engines", "ENGINES", "translator: NAME"),
    "data": ("data.load", "BUILDERS", "data: NAME"),
    "adapters": ("adapter_settings", "ADAPTERS", "adapter: {kind: NAME}"),
    "encoders": ("loading.encoders", "ENCODERS", "text_encoder: NAME, vision_encoder: NAME"),
    "indexes": ("retrieval.index", "INDEXES", "an address: a folder, NAME.db or http://..."),
}
HEADINGS = (*REGISTRIES, "recipes", "languages")


@command()
def main(argv: list[str] | None = None):
    options = parser("list", __doc__)
    options.add_argument("what", nargs="?", choices=HEADINGS, help="default: all names, without what they are")
    what = options.parse_args(argv).what
    if what is None:
        for heading in HEADINGS:
            print(f"{heading}: {', '.join(entries(heading))}")
        print("\n`nrccr list HEADING` says what each is.")
        return
    found = entries(what)
    width = max(map(len, found))
    for name, line in found.items():
        print(f"{name:<{width}}  {line}".rstrip())
    if what in REGISTRIES:
        print(f"\nWritten as {REGISTRIES[what][2]}; your own as my_module:MyClass.")


def entries(heading: str) -> dict[str, str]:
    """Return the names below a heading, and a line on each. Nothing that is slow is imported: files are read."""
    if heading == "recipes":
        return {path.relative_to(RECIPES).with_suffix("").as_posix(): comment(path) for path in recipe_files()}
    if heading == "languages":
        return languages()
    module, registry, _ = REGISTRIES[heading]
    tree = parse(f"{PACKAGE}.{module}")
    (call,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == registry
    ]
    package = f"{PACKAGE}.{module}".rpartition(".")[0]
    return {name: describe(entry, package) for name, entry in ast.literal_eval(call.args[1]).items()}


@lru_cache
def parse(module: str) -> ast.Module:
    """Return the syntax tree of a module, which is not imported."""
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))


def describe(entry: str, package: str) -> str:
    """Return the first sentence of the docstring of `module:attribute`."""
    module, _, attribute = entry.partition(":")
    (found,) = [
        node
        for node in parse(importlib.util.resolve_name(module, package)).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == attribute
    ]
    return first_sentence(ast.get_docstring(found) or "")


def first_sentence(text: str) -> str:
    """Return it in one line, without the marks of Markdown's links."""
    text = " ".join(text.partition("\n\n")[0].split())
    text = re.sub(r"\[`?([^]`]+)`?\](\([^)]*\))?", r"\1", text)
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def recipe_files() -> list[Path]:
    return sorted(path for path in RECIPES.rglob("*.yaml"))


def comment(path: Path) -> str:
    """Return the first sentence of the comment that a YAML file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return first_sentence(" ".join(lines))


def languages() -> dict[str, str]:
    """Return the languages of Apertium's and FreeDict's packages, their names, and what they are paired with."""
    from ..data.names import language_name
    from ..translation.pairs import languages

    lines = {}
    for code, engines in languages().items():
        paired = (f"{engine} with {', '.join(others)}" for engine, others in engines.items())
        lines[code] = "; ".join((language_name(code), *paired))
    return lines

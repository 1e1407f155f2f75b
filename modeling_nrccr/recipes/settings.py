"""Reads recipes: fields of a YAML file that are flags too."""

import json
from argparse import SUPPRESS
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from .limits import check_numbers


RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of the recipes that this package has, such as `demo` and `paper/vatex`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Return the YAML file of a recipe, by its name or path. Raises ValueError where there is none."""
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: there is no such file of a recipe")
        return Path(name)
    names = recipe_names()
    if str(name) not in names:
        nearest = get_close_matches(str(name), names, n=1)
        hint = f" (do you mean {nearest[0]}?)" if nearest else ""
        raise ValueError(f"unknown recipe {str(name)!r}{hint}: there are {', '.join(names)}, or name a YAML file")
    return RECIPES / f"{name}.yaml"


def least_of(options: object) -> dict[str, float]:
    """Return the least number that each field takes: 0 of fractions, else 1, or its default where that is less; or as
    `LEAST` of its class says."""
    defaults = {part.name: part.default for part in fields(options) if part.init}
    least = {name: 0 if isinstance(value, float) else 1 for name, value in defaults.items()}
    least |= {name: min(1, value) for name, value in defaults.items() if isinstance(value, int)}
    return least | getattr(options, "LEAST", {})


def read_settings(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML file, over those of the file beside it that it names under `extends`."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    extended = settings.pop("extends", None)
    return (read_settings(path.parent / extended) if extended else {}) | settings


def check_names(names: Iterable[str], known: Iterable[str], classes: Sequence[type], where: str):
    """Raise ValueError for a field that has a new name, or that nobody knows. `where` begins the message."""
    renamed = {old: new for part in classes for old, new in getattr(part, "RENAMED", {}).items()}
    for name in sorted(set(names) - set(known)):
        if name in renamed:
            dashes = "--" if where == "--" and renamed[name] in known else ""
            raise ValueError(f"{where}{name} is now {dashes}{renamed[name]}")
        nearest = get_close_matches(name, known, n=1)
        hint = f" (do you mean {nearest[0]}?)" if nearest else ""
        raise ValueError(f"{where}{name} is no field{hint}; `--help_all` lists those that there are")


def fields_parser(classes: Sequence[type], name: str | None = None):
    """Return the parser of the fields of dataclasses, which raises ValueError for what it cannot read."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(tuple(classes), prog=name, allow_abbrev=False)

    def error(message: str):
        raise ValueError(message)

    parser.error = error
    return parser


def parse_fields(
    classes: Sequence[type], arguments: Sequence[str] = (), recipe: str | None = None, name: str | None = None, **given
) -> tuple:
    """
    Return an instance of each dataclass: the fields of the recipe, then those `given`, then the flags.

    Args:
        arguments: flags. A field `base` with `init=False` is the argument without a flag.
        recipe: its name or YAML file; `--recipe` wins; default: that of the first dataclass.
        name: of the command, for `--help`.

    Raises:
        ValueError: for a field that nobody knows, or a number that would do nothing.
    """
    from transformers import TrainingArguments

    arguments, parser = list(arguments), fields_parser(classes, name)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    dests, flags = set(), set()
    for action in parser._actions:
        dests.add(action.dest)
        flags |= {flag.lstrip("-").replace("-", "_") for flag in action.option_strings}
    positional = [part.name for part in fields(classes[0]) if not part.init]
    asked = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    check_names(asked, flags, classes, "--")
    check_names(given, {*dests, *positional}, classes, "")
    for part in positional:
        parser.add_argument(part, nargs="?" if part in given else None)
    parser.set_defaults(**given | ({} if recipe is None else {"recipe": str(recipe)}))
    path = find_recipe(parser.parse_known_args(arguments)[0].recipe)
    settings = read_settings(path)
    check_names(settings, dests, classes, f"{path}: ")
    parser.set_defaults(**settings | given)
    reading = {"look_for_args_file": False, "return_remaining_strings": True}
    *parsed, surplus = parser.parse_args_into_dataclasses(arguments, **reading)
    if surplus:
        raise ValueError(f"{' '.join(surplus)}: nothing takes this; `--help` lists the options")
    for part in positional:
        setattr(parsed[0], part, getattr(parsed[-1], part))
    parsed = parsed[: len(classes)]
    for options in parsed:
        if not isinstance(options, TrainingArguments):  # which checks its own
            check_numbers(options, least_of(options))
        if str(getattr(options, "resume_from_checkpoint", None)).lower() in ("false", "no", "0", ""):
            options.resume_from_checkpoint = None
    return tuple(parsed)


def given_flags(classes: Sequence[type], arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the flags alone say, without the recipe and the defaults."""
    parser = fields_parser(classes)
    for action in parser._actions:
        action.default = SUPPRESS
    return vars(parser.parse_known_args(list(arguments))[0])


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return the flags that say what `settings` do."""
    flags = []
    for name, value in settings.items():
        value = json.dumps(value) if isinstance(value, dict) else value
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(str(getattr(part, "value", part)) for part in values)] if value is not None else []
    return flags

"""Fields of a YAML file that are flags too."""

import json
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .limits import check_numbers
from .mappings import read_mapping


RECIPES = Path(__file__).parent


def option(default, help: str):
    return field(default=default, metadata={"help": help})


def least_of(options: object) -> dict[str, float]:
    """The least number that each field takes: 0 of fractions, else 1, or its default where that is less; or as `LEAST`
    of its class says."""
    defaults = {part.name: part.default for part in fields(options)}
    least = {name: 0 if isinstance(value, float) else 1 for name, value in defaults.items()}
    least |= {name: min(1, value) for name, value in defaults.items() if isinstance(value, int)}
    return least | getattr(options, "LEAST", {})


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, over those of the file beside it that it names under `extends`."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    extended = settings.pop("extends", None)
    return merge(read_settings(path.parent / extended) if extended else {}, settings)


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `own` over those of `base`. Losses that are not named are off; what is not said of the
    adapter is as it was."""
    both = [settings["adapter"] for settings in (base, own) if settings.get("adapter")]
    return base | own | ({"adapter": both[0] | both[-1]} if both else {})


def parse_fields(classes: Sequence[type], arguments: list[str], default_config: Path, **settings) -> tuple:
    """
    An instance of each dataclass: the fields of the YAML file after `--config`, then `settings`, then the flags.

    Raises:
        ValueError: for a field that nobody knows, or a number that would do nothing.
    """
    parser = HfArgumentParser(tuple(classes))
    named = ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config", type=Path, default=default_config)
    named.add_argument("--adapter")
    given = named.parse_known_args(arguments)[0]
    path = given.config
    settings = merge(read_settings(path), settings)
    if given.adapter:
        adapter = merge(settings, {"adapter": read_mapping(given.adapter, "adapter")})
        arguments = [*arguments, *as_flags({"adapter": adapter["adapter"]})]
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    renamed = {old: new for part in classes for old, new in getattr(part, "RENAMED", {}).items()}
    for old in (*settings, *flags):
        if new := renamed.get(old.removeprefix("--")):
            raise ValueError(f"{old} is now {new}")
    known = {action.dest for action in parser._actions}
    if unknown := settings.keys() - known:
        raise ValueError(f"{path}: unknown fields {', '.join(sorted(unknown))}; `--help` lists those that there are")
    parser.set_defaults(**settings)
    parsed = parser.parse_args_into_dataclasses(arguments)
    for options in parsed:
        if not isinstance(options, TrainingArguments):  # which checks its own
            check_numbers(options, least_of(options))
        if str(getattr(options, "resume_from_checkpoint", None)).lower() in ("false", "no", "0", ""):
            options.resume_from_checkpoint = None
    return parsed


def given_flags(classes: Sequence[type], arguments: list[str]) -> dict[str, Any]:
    """What the flags alone say, without the YAML file and the defaults."""
    parser = HfArgumentParser(tuple(classes))
    for action in parser._actions:
        action.default = SUPPRESS
    return vars(parser.parse_known_args(arguments)[0])


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The other way round."""
    flags = []
    for name, value in settings.items():
        value = json.dumps(value) if isinstance(value, dict) else value
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(str(getattr(part, "value", part)) for part in values)] if value is not None else []
    return flags

"""Fields of a YAML file that are flags too."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def option(default, help: str):
    return field(default=default, metadata={"help": help})


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, over those of the file beside it that it names under `extends`."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    extended = settings.pop("extends", None)
    return (read_settings(path.parent / extended) if extended else {}) | settings


def parse_fields(classes: Sequence[type], arguments: list[str], default_config: Path, **settings) -> tuple:
    """
    An instance of each dataclass: the fields of the YAML file after `--config`, then `settings`, then the flags.

    Raises:
        ValueError: for a field that nobody knows.
    """
    parser = HfArgumentParser(tuple(classes))
    named = ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config", type=Path, default=default_config)
    path = named.parse_known_args(arguments)[0].config
    settings = read_settings(path) | settings
    known = {action.dest for action in parser._actions}
    if unknown := settings.keys() - known:
        raise ValueError(f"{path}: unknown fields {', '.join(sorted(unknown))}; `--help` lists those that there are")
    parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(arguments)

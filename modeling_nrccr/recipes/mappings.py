"""Settings that are a mapping: `losses` and `adapter`, in YAML, in Python and on the command line."""

import json
from collections.abc import Mapping
from typing import Any


def read_mapping(value: Mapping[str, Any] | str | None, name: str) -> dict[str, Any]:
    """
    Return what a mapping says, whichever way it came: as one, or as text, `a=1,b=true` or JSON.

    Args:
        value: None is an empty one.
        name: of the setting, for messages.

    Raises:
        ValueError: for a text that is neither.
    """
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    try:
        if value.lstrip().startswith("{"):
            return json.loads(value)
        parts = [part.split("=") for part in value.split(",") if part.strip()]
        return {key.strip(): read_value(text.strip()) for key, text in parts}
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: write it as a=1,b=2, or as JSON") from error


def read_value(text: str) -> Any:
    """Return a number, true or false, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text

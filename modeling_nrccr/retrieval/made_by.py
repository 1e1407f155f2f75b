"""What an index keeps of the model that its pictures were encoded by, so that a search need not be told."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def remember(model: str, languages: Sequence[str] = ()) -> dict[str, Any]:
    """
    Return what an index keeps of the model that its pictures were encoded by: `{"model": NAME, "languages": [...]}`.

    Args:
        model: folder, which becomes an absolute path, or hub id.
        languages: as `--language` takes them.
    """
    specs = [spec.partition("=") for spec in languages]
    return {
        "model": absolute(model),
        "languages": [f"{code}={absolute(source)}" if source else code for code, _, source in specs],
    }


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder that is there; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def check_made_by(made_by: Any) -> dict[str, Any] | None:
    """Return what an index says of its model. Raises ValueError for what [`remember`] never gives."""
    if made_by is None:
        return None
    if not isinstance(made_by, dict) or set(made_by) != {"model", "languages"}:
        raise ValueError(f"its made_by is {str(made_by)[:80]}")
    if not isinstance(made_by["languages"], list) or not all(
        isinstance(name, str) for name in (made_by["model"], *made_by["languages"])
    ):
        raise ValueError(f"its made_by is {str(made_by)[:80]}")
    return made_by

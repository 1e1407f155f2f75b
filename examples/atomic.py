"""Writes small files at once or not at all."""

import os
from pathlib import Path


def write_file(path: str | Path, content: str | bytes):
    """Replaces `path`, whose folder must be there; text is written as UTF-8."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, path)

"""Which checkpoints are whole: a run may be killed at any moment, and half a checkpoint must never be loaded."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from .files import write_file


logger = logging.get_logger(__name__)

MARKER = "complete.json"


def mark_complete(directory: str | Path):
    """Writes the names and sizes of all files in `directory`, last and atomically, once they are on the disk."""
    directory, sizes = Path(directory), {}
    mark_incomplete(directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    write_file(directory / MARKER, json.dumps(sizes, indent=1) + "\n")


def mark_incomplete(directory: str | Path):
    Path(directory, MARKER).unlink(missing_ok=True)


def is_complete(directory: str | Path) -> bool:
    """Whether every file that `mark_complete` saw is there, as long as it was: half deleted is not complete either."""
    directory = Path(directory)
    try:
        sizes = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole `checkpoint-*` of a run, None where there is none; warns of those that it passes over."""
    for directory in reversed(sort_checkpoints(str(output_dir))):
        if is_complete(directory):
            return directory
        logger.warning(f"{directory} is not complete (the run was killed while it was written): passed over")
    return None


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, best: str | None):
    """Keeps the best, the last and at most `limit` checkpoints of a run (None: all), all of them complete."""
    if not limit:
        return
    for directory in sort_checkpoints(str(output_dir)):
        if not is_complete(directory):
            shutil.rmtree(directory)
    rotate_checkpoints(str(output_dir), limit, best, use_mtime=True)


def checkpoint_directory(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")

"""Which checkpoints are whole: a run may be killed at any moment, and half a checkpoint must never be loaded."""

import json
import os
import shutil
from pathlib import Path
from zlib import crc32

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from ..files import write_file


logger = logging.get_logger(__name__)

MARKER = "complete.json"


def mark_complete(directory: str | Path):
    """Writes names, sizes and checksums of all files in `directory`, atomically, once these are on the disk."""
    directory, files = Path(directory), {}
    mark_incomplete(directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            files[path.relative_to(directory).as_posix()] = [path.stat().st_size, crc32_of(path)]
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    write_file(directory / MARKER, json.dumps(files, indent=1) + "\n")


def mark_incomplete(directory: str | Path):
    Path(directory, MARKER).unlink(missing_ok=True)


def marked_files(directory: Path) -> dict[str, list[int]]:
    """Return the size, and checksum where the mark has it, of each file that `mark_complete` saw."""
    marked = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    return {name: value if isinstance(value, list) else [value] for name, value in marked.items()}


def is_complete(directory: str | Path) -> bool:
    """Tell whether every file that `mark_complete` saw is there, as long as it was: half deleted is not complete
    either."""
    directory = Path(directory)
    try:
        return all((directory / name).stat().st_size == size for name, (size, *_) in marked_files(directory).items())
    except (OSError, ValueError):
        return False


def damage(directory: str | Path) -> str | None:
    """Return what is wrong with a checkpoint; None where it can be resumed from. All of it is read."""
    directory = Path(directory)
    if not is_complete(directory):
        return "is not complete (the run was killed while it was written, or a file is missing)"
    for name, (_, *checksum) in marked_files(directory).items():
        if checksum and crc32_of(directory / name) != checksum[0]:
            return f"is damaged ({name} is not what was written)"
    try:
        TrainerState.load_from_json(str(directory / "trainer_state.json"))
        with safe_globals():
            for path in (*directory.glob("*.pt"), *directory.glob("*.pth")):
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything
        return f"is damaged ({type(error).__name__} where its state is read)"
    return None


def crc32_of(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            checksum = crc32(part, checksum)
    return checksum


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest whole `checkpoint-*` of a run, None where there is none. Warns of those that it passes
    over."""
    for directory in reversed(sort_checkpoints(str(output_dir))):
        if (reason := damage(directory)) is None:
            return directory
        logger.warning(f"{directory} {reason}: passed over")
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

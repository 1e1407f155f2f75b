"""Writes folders that are whole or not there, and leave nothing of what was there before."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


DAY = 24 * 60 * 60  # seconds after which nobody is writing a folder any more: its run was killed


@contextmanager
def replacing_folder(folder: str | Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """
    Opens an empty folder that takes the place of `folder` once the block has ended without an error; else `folder`
    stays as it was.

    Args:
        is_ours: whether a file in `folder` may be replaced, being of an earlier run.
        what: is written, for the message.

    Raises:
        ValueError: `folder` holds other files, which would be lost; before the block.
    """
    folder = Path(folder).absolute()
    old = folder.with_name(f".{folder.name}-old.tmp")
    new = folder.with_name(f".{folder.name}-{os.getpid()}-new.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not folder.exists():  # a run was killed between the two steps below
        os.replace(old, folder)
    for leftover in folder.parent.glob(f".{folder.name.replace('[', '[[]')}-*-new.tmp"):
        if time.time() - leftover.stat().st_mtime > DAY:
            shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name another folder for {what}")
    if others := [path.name for path in sorted(folder.iterdir()) if not is_ours(path)] if folder.exists() else []:
        raise ValueError(
            f"{folder} holds {others[0]}, which is no part of {what}: name another folder, or move it away"
        )
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)

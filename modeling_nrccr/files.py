"""Files that are replaced as a whole or not at all, and folders that one run at a time writes."""

import ctypes
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"
SUFFIX = ".tmp"  # of what is not whole yet; the name begins with a dot, so that no walk through a folder meets it
DAY = 24 * 60 * 60  # seconds
AT_CWD, RENAME_EXCHANGE = -100, 2  # of renameat2


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """
    Opens a file that takes the place of `path` (whose folder must be there) once all of it is on the disk. Whatever
    fails leaves what was there, and nothing else. The position at the end is taken for the size.

    Raises:
        OSError: it cannot be written, which some disks say only when a file is synced or closed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with open(partial, "xb") as file:
            yield file
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        if (found := partial.stat().st_size) != size:
            raise OSError(errno.EIO, f"the disk took {found} of {size} bytes")
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes):
    """Replaces `path`, whose folder must be there; text is written as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def cannot_write(path: str | Path, error: Exception) -> OSError:
    """Return the error to raise in place of `error`: of its kind, with the file and a remedy."""
    kind = type(error) if isinstance(error, OSError) and type(error).__module__ == "builtins" else OSError
    reason = getattr(error, "strerror", None) or str(error)
    found = kind(f"{path} cannot be written ({reason}): make room, or name another folder; what was there stays")
    found.errno = getattr(error, "errno", None)
    return found


def sync(path: Path):
    """Puts a file, or the names in a folder, on the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folder, some network disks sync none
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def is_leftover(path: Path) -> bool:
    """Tell whether a file that is not whole, or that nothing names, is of a run that was killed: it is a day old."""
    try:
        return time.time() - path.stat().st_mtime > DAY
    except FileNotFoundError:  # another process was faster
        return False


def hold(folder: Path) -> int | None:
    """
    Holds a folder for this process alone, until the returned descriptor is closed or the process ends, so that what
    a killed run left can be told from what another run writes.

    Returns:
        The descriptor; None if another process holds the folder, it is gone, or the system holds no folders.
    """
    number = None
    with suppress(OSError):  # gone, held by another; some network disks hold nothing
        number = os.open(folder, os.O_RDONLY)
        if fcntl is not None and os.path.samestat(os.fstat(number), os.stat(folder)):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(folder)
            return number
    if number is not None:
        os.close(number)
    return None


@contextmanager
def replacing_folder(folder: str | Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """
    Opens an empty folder that takes the place of `folder`, at once, when the block has ended without an error; else
    `folder` stays as it was.

    Args:
        is_ours: whether a file in `folder` may be replaced, being of an earlier run.
        what: is written, for the message.

    Raises:
        ValueError: `folder` holds other files, which would be lost; before the block.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    old, new = (folder.with_name(f".{folder.name}-{end}{SUFFIX}") for end in ("old", secrets.token_hex(4)))
    if old.exists() and not folder.exists():  # a run was killed where folders cannot be exchanged at once
        os.replace(old, folder)
    for leftover in folder.parent.glob(f".{escape(folder.name)}-*{SUFFIX}"):
        number = hold(leftover) if leftover != old else None  # which may be one's for a moment, below
        if number is not None or is_leftover(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
        if number is not None:
            os.close(number)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name another folder for {what}")
    if others := [path.name for path in sorted(folder.iterdir()) if not is_ours(path)] if folder.exists() else []:
        raise ValueError(
            f"{folder} holds {others[0]}, which is no part of {what}: name another folder, or move it away"
        )
    new.mkdir()
    if (number := hold(new)) is None and not new.exists():  # taken for a leftover before it was held
        new.mkdir()
        number = hold(new)
    try:
        yield new
        for path in [*new.rglob("*"), new]:
            sync(path)
        if folder.exists():
            exchange(new, folder, old)
        else:
            os.replace(new, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # which has what was there before, once it is exchanged
        if number is not None:
            os.close(number)


def exchange(new: Path, folder: Path, spare: Path):
    """Gives two folders each other's names; where the system cannot do so at once, `spare` is one's for a moment."""
    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        rename = None
    if rename is None or rename(AT_CWD, os.fsencode(new), AT_CWD, os.fsencode(folder), RENAME_EXCHANGE):
        os.replace(folder, spare)
        os.replace(new, folder)
        os.replace(spare, new)


@contextmanager
def writing_weights(folder: str | Path):
    """
    Wraps a `save_pretrained(folder)`. safetensors writes whole files or none, but readable by their owner alone: they
    get the mode of `config.json`, which is by umask.

    Raises:
        OSError: instead of safetensors' own error.
    """
    try:
        yield
    except SafetensorError as error:
        raise cannot_write(folder, error) from error
    if (config := Path(folder, "config.json")).exists():
        for path in Path(folder).glob("*.safetensors"):
            shutil.copymode(config, path)


@contextmanager
def writing(folder: str | Path, timeout: float = 0) -> Iterator[Path]:
    """
    Holds the right to write `folder`, which is made: one run has it at a time, in all of its nested calls. A run that
    is killed loses it.

    Raises:
        TimeoutError: another run still has it after `timeout` seconds.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK_FILE, is_singleton=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        raise TimeoutError(
            f"another run is writing {folder}: wait until it has ended, or name another folder"
        ) from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield folder
    finally:
        lock.release()


def is_utf8(name: str | os.PathLike) -> bool:
    """Tell whether a name can be written into a file; names of old archives often cannot."""
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str | os.PathLike) -> str:
    r"""Write the name of a file as it can be shown and stored: what is not UTF-8, a line break or an escape sequence
    is written with backslashes (`caf\xe9.jpg`)."""
    # "\\udc": by which Python stands for what is not UTF-8
    escapes = (c if c.isprintable() else repr(c)[1:-1].replace("\\udc", "\\x") for c in os.fspath(name))
    return "".join(escapes)

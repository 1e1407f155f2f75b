"""Pictures that caption files name: found in the folders of the user alone, told apart by file and by content."""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path


TAIL = 4096  # bytes at the end of a file, which differ where its size alone does not


def visible_files(folder: str | Path) -> Iterator[str]:
    """Yield the files in and below a folder, sorted; without what is hidden, such as macOS's `._a.mp4`."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def shown(name: str) -> str:
    """Write a file's name for a message: with escapes where it looks like another one."""
    looks_itself = name.isprintable() and "  " not in name and name == unicodedata.normalize("NFC", name).strip()
    return name if looks_itself else ascii(name)


def spellings(name: str) -> list[str]:
    """Return a name as it is, and as it would be where accents are stored otherwise: composed, or as letters with
    marks (older macOS)."""
    return list(dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]))


def find_pictures(
    folders: Iterable[str | Path], names: Iterable[str], where: Callable[[str], str] = lambda name: ""
) -> dict[str, str]:
    """
    Find the path of each named picture: in the first of `folders` that has it, else anywhere below them; without those
    that are nowhere. `where`: the place of a name, for messages.

    Raises:
        ValueError: for a name that is below them twice, leads out of all of them, or is no regular file.
    """
    folders, names = [os.fspath(folder) for folder in folders], list(dict.fromkeys(names))
    roots, real_folder = [Path(os.path.realpath(folder)) for folder in folders], lru_cache(os.path.realpath)

    def checked(name: str, path: str) -> str:
        parent, last = os.path.split(path)
        real = Path(os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(parent), last))
        if not any(real.is_relative_to(root) for root in roots):
            raise ValueError(
                f"{where(name)}{shown(name)} leads to {real}, out of {' and '.join(folders)}: put the picture there, "
                "or name the folder that has it (image_dir)"
            )
        if not os.path.isfile(path):
            raise ValueError(f"{where(name)}{shown(name)} is a pipe or a device, no regular file: leave it out")
        return path

    files = {}
    for name in names:
        for path in (os.path.join(folder, spelling) for spelling in spellings(name) for folder in folders):
            if is_file(path):
                files[name] = checked(name, path)
                break
    wanted = {spelling: name for name in names if name not in files for spelling in spellings(name)}
    for path in (path for folder in (folders if wanted else ()) for path in visible_files(folder)):
        if (name := wanted.get(os.path.basename(path))) is not None:
            if not os.path.samefile(files.setdefault(name, checked(name, path)), path):
                raise ValueError(f"{shown(name)} is both {files[name]} and {path}: name it by its path, or remove one")
    return files


def is_file(path: str) -> bool:
    """Tell whether there is something that is no folder; what no file can be called is nothing."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def equal_pictures(pictures: Mapping[Hashable, str]) -> dict[Hashable, str]:
    """Tell which of many files are equal byte for byte: a digest, by key, of each that has an equal. Few are read in
    full. `pictures`: paths by key."""

    def digest(path: str, last: int | None = None) -> str:
        with open(path, "rb") as file:
            if last is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()

    found = dict.fromkeys(pictures)
    for tell in (os.path.getsize, lambda path: digest(path, TAIL), digest):
        by_answer = {}
        for key in found:
            try:
                by_answer.setdefault((found[key], tell(pictures[key])), []).append(key)
            except OSError:  # of what cannot be read, which is said where it is
                continue
        found = {key: answer for answer, keys in by_answer.items() if len(keys) > 1 for key in keys}
    return {key: content for key, (_, content) in found.items()}

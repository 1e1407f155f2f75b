"""What a bug report needs to know of a machine: versions, extras, devices; nothing private."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement

from .wheels import cache_folder


OURS = "modeling_nrccr"
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub")
VARIABLES = ("NRCCR_", "HF_", "TRANSFORMERS_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "XDG_CACHE_HOME")


def describe_environment() -> dict[str, str | list[str]]:
    """Return what `nrccr env` prints. Of variables the names alone: a value may be a token."""
    installed, lacking = find_extras()
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: installed_version(name) or "not installed" for name in (OURS, *LIBRARIES)},
        "extras": installed,
        "extras that lack something": lacking,
        "devices": find_devices(),
        "variables that are set": sorted(name for name in os.environ if name.startswith(VARIABLES)),
        "cache": describe_folder(cache_folder()),
    }


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, without importing it; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_extras(name: str = OURS) -> tuple[list[str], list[str]]:
    """Return the extras of a distribution that are installed; and the others, each with what it lacks."""
    try:
        of_ours = distribution(name)
    except PackageNotFoundError:  # it runs from a checkout
        return [], []
    requirements = [Requirement(text) for text in of_ours.requires or ()]
    whole, lacking = [], []
    for extra in of_ours.metadata.get_all("Provides-Extra") or ():
        missing = []
        for part in requirements:
            if part.marker and not part.marker.evaluate({"extra": ""}) and part.marker.evaluate({"extra": extra}):
                found = installed_version(part.name)
                if found is None:
                    missing.append(part.name)
                elif not part.specifier.contains(found, prereleases=True):
                    missing.append(f"{part.name}{part.specifier}, which is {found}")
        if missing:
            lacking.append(f"{extra} ({', '.join(missing)})")
        else:
            whole.append(extra)
    return whole, lacking


def find_devices() -> list[str]:
    """Return the devices that torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())]
    return devices + ["mps"] * torch.backends.mps.is_available()


def describe_folder(folder: Path) -> str:
    """Return how large a folder is, and how much room there is; not where it is, which may name a person."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.lstat(os.path.join(parent, name)).st_size)
            except OSError:  # it is gone again
                continue
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return f"{sum(sizes) / 1e9:.2f} GB in {len(sizes):,} files, {free / 1e9:.0f} GB free"

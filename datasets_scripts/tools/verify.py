"""Checks a folder of data: counts against the expected ones, what is missing, where to get it, and its terms."""

import importlib
import inspect
import io
import textwrap
from collections.abc import Iterable
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm

from ..reading.columns import CAPTION_FEATURES
from ..reading.debian import FetchError


NAMES_SHOWN = 5  # of broken pictures


def builder_names() -> list[str]:
    """Return the modules of `datasets_scripts` that hold a builder named as they are."""
    files = sorted(Path(__file__).parents[1].glob("*.py"))
    return [file.stem for file in files if f"class {_class_name(file.stem)}(" in file.read_text(encoding="utf-8")]


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def find_builder(name: str) -> type[datasets.GeneratorBasedBuilder]:
    """Return the builder that the module of its name holds. Raises ValueError for an unknown name."""
    if name not in builder_names():
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(builder_names())}")
    return getattr(importlib.import_module(f"datasets_scripts.{name}"), _class_name(name))


def builder_options(builder: type[datasets.GeneratorBasedBuilder], options: dict) -> dict:
    """Return the options that are given and that the builder's configuration has. Raises ValueError for another."""
    given = {key: value for key, value in options.items() if value is not None}
    known = builder.BUILDER_CONFIG_CLASS.__dataclass_fields__
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{builder.__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return given


def verify(
    name: str, data_dir: str | None = None, configs: Iterable[str] = (), decode: bool = False, **options
) -> tuple[list[str], list[str]]:
    """
    Read the data set `name` in a folder.

    Args:
        configs: Those with known counts by default, else the first.
        decode: Open every picture too.
        options: Of the configuration, such as `image_dir`; None is as good as absent.

    Returns:
        A table of what was counted, and what is amiss, a line each.

    Raises:
        ValueError: for an unknown data set, or an option that it has not.
    """
    builder_class = find_builder(name)
    expected = getattr(builder_class, "EXPECTED", {})
    configs = list(configs or expected or list(builder_class.builder_configs)[:1] or [None])
    options = builder_options(builder_class, options)
    table, problems = [], []
    for config in configs:
        table += ["", f"{name} {config or ''}".rstrip()]
        try:
            builder = builder_class(config_name=config, data_dir=data_dir, **options)
            streams = builder.as_streaming_dataset()
            lines, found = _check_splits(streams, expected.get(config), decode)
            table += lines
            problems += [f"{config}: {line}" for line in found]
        except (ValueError, OSError, FetchError) as error:
            problems.append(f"{config}: {error}")
    return table[1:], problems


def _check_splits(streams: dict, expected: dict | None, decode: bool) -> tuple[list[str], list[str]]:
    table, problems = [f"  {'split':<18} {'items':>15} {'captions':>17}   media"], []
    for split in dict.fromkeys([*(expected or {}), *streams]):
        items, captions, media, broken = _count(streams[split], split, decode) if split in streams else (0, 0, "", [])
        counts = []
        for what, found, wanted in zip(
            ("items", "captions"), (items, captions), (expected or {}).get(split, (None,) * 2)
        ):
            counts.append(f"{found}" if wanted is None else f"{found} of {wanted}")
            if wanted not in (None, found):
                problems.append(f"{split}: {found} {what}, expected {wanted}")
        table.append(f"  {split:<18} {counts[0]:>15} {counts[1]:>17}   {media}")
        if broken:
            shown = "; ".join(broken[:NAMES_SHOWN])
            problems.append(f"{split}: {len(broken)} pictures cannot be opened: {shown}")
    return table, problems


def _count(stream: datasets.IterableDataset, split: str, decode: bool) -> tuple[int, int, str, list[str]]:
    """Count items and captions; return them, the kind of media, and pictures that cannot be opened (if `decode`)."""
    media = [column for column in stream.features if column not in CAPTION_FEATURES]
    if "image" in media:
        stream = stream.cast_column("image", datasets.Image(decode=False))
    first = next(iter(stream))
    given = [column for column in media if first[column] is not None]
    decode = decode and "image" in given
    items, broken, captions = set(), [], 0
    # features and videos may be large: not read
    for row in tqdm(stream.select_columns(["image_id", *(["image"] if decode else [])]), desc=split, disable=None):
        captions += 1
        if decode and row["image_id"] not in items and (reason := _why_broken(row["image"])):
            broken.append(f"{row['image_id']} ({reason})")
        items.add(row["image_id"])
    return len(items), captions, ", ".join(given) or "none", broken


def _why_broken(image: dict) -> str | None:
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def where_and_terms(builder: type[datasets.GeneratorBasedBuilder]) -> str:
    """Return what a data set is, where it comes from, and under which terms."""
    lines = [inspect.cleandoc(builder.__doc__ or "")]
    for label, attribute in (("From", "HOMEPAGE"), ("Terms", "LICENSE")):
        if text := getattr(builder, attribute, ""):
            lines.append(textwrap.fill(f"{label}: {text}", 110))
    return "\n".join(lines)

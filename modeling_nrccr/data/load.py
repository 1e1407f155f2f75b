"""Loads and translates the caption data sets that commands train and test on."""

import glob
import json
import random
import time
from pathlib import Path

import datasets
from PIL import Image
from transformers.utils import logging

from datasets_scripts.reading.columns import CAPTION_FEATURES
from datasets_scripts.reading.debian import FetchError, find_data
from datasets_scripts.reading.splits import check_ids

from ..media import load_image
from ..registry import Registry
from ..translation.base import Translator
from ..translation.cache import load_engine
from ..translation.columns import add_translations
from ..translation.engines import split_engines
from .collator import MEDIA_COLUMNS


logger = logging.get_logger(__name__)
BUILDERS = Registry(
    "data set",
    {
        "tuxpaint": "datasets_scripts.tuxpaint:Tuxpaint",
        "cldr_emoji": "datasets_scripts.cldr_emoji:CldrEmoji",
        "caption_files": "datasets_scripts.caption_files:CaptionFiles",
        "multi30k": "datasets_scripts.multi30k:Multi30k",
        "xm3600": "datasets_scripts.xm3600:Xm3600",
        "msrvtt_cn": "datasets_scripts.msrvtt_cn:MsrvttCn",
        "vatex": "datasets_scripts.vatex:Vatex",
        "mscoco": "datasets_scripts.mscoco:Mscoco",
        "animated_emoji": "datasets_scripts.animated_emoji:AnimatedEmoji",
        "scenes": "datasets_scripts.scenes:Scenes",
    },
)
PARQUET = "parquet"  # no builder: what was translated before

TRANSLATION_RECORD = "translation.json"  # beside the Parquet files: what was translated, by which engines


def find_font(data_dir: str | None = None) -> Path | None:
    """Find a font with the letters of most languages, which Pillow's own lacks; None where it cannot be had."""
    if data_dir is not None and not Path(data_dir, "usr").is_dir():
        data_dir = None  # it holds something else than Debian packages
    try:
        (folder,) = find_data({"fonts-dejavu-core": "usr/share/fonts/truetype/dejavu"}, data_dir)
    except (FetchError, FileNotFoundError) as error:
        logger.warning(f"search.png will lack accents: {error}")
        return None
    return folder / "DejaVuSans.ttf"


class StillPicture(datasets.Image):
    """A column of pictures that are read as [`load_image`] reads them all: damaged metadata cost none."""

    def decode_example(self, value: dict, token_per_repo_id=None) -> Image.Image:
        return load_image(value)

    def __eq__(self, other) -> bool:  # a column like any of pictures, to what compares or joins data sets
        return isinstance(other, datasets.Image) and vars(self) == vars(other)


def find_source(name: str, data_dir: str | None) -> tuple[str, str | None]:
    """Return the name and the folder of a data set: of a file of captions, or of a folder that has one or that
    `nrccr translate` wrote, as of names that are known."""
    path = Path(name)
    if name.partition("+")[0].partition(":")[0] in (*BUILDERS, "parquet") or not path.exists():
        return name, data_dir
    if path.is_file():
        return f"caption_files:{path.name}", str(path.parent)
    return "parquet" if (path / TRANSLATION_RECORD).is_file() else "caption_files", name


def load_caption_dataset(
    name: str = "tuxpaint+cldr_emoji",
    language: str = "gl",
    split_seed: int = 0,
    target_captions: str = "translated",
    data_dir: str | None = None,
    source_language: str = "en",
    visual_feature: str | None = None,
    media_dir: str | None = None,
    strict: bool = True,
    dataset_options: dict | None = None,
) -> datasets.DatasetDict:
    """Return splits `train`, `validation`, `test` (and others) of one or several of `BUILDERS`, joined by "+", with
    the builders' columns; `my_module:MyBuilder` is one of your own. What stands before the language in a
    configuration's name comes after a colon: `multi30k:task1`; and which file of a folder with several is meant:
    `caption_files:captions.csv`. `visual_feature`, `media_dir`: see [`BenchmarkConfig`]. `strict`: a row
    whose media are not there is an error; else it is left out, and counted. `dataset_options`:
    more options of the builder. `parquet`: what `nrccr translate` wrote into `data_dir`. A file of captions, or the
    folder of either: its path.

    Raises ValueError for an unknown name or language, and where [`check_ids`] does.
    """
    parts, (name, data_dir) = [], find_source(name, data_dir)
    for part in name.split("+"):
        part, variant = BUILDERS.split(part)
        if part == PARQUET:
            parts.append(read_translated(data_dir, source_language, language, split_seed, target_captions))
            continue
        builder_class = BUILDERS[part]
        options = {"seed": split_seed, "target": target_captions, "source_language": source_language}
        options["target_language"] = language
        options |= {"visual_feature": visual_feature, "media_dir": media_dir, "image_dir": media_dir}
        options |= {"missing": "error" if strict else "skip"} | (dataset_options or {})
        known = builder_class.BUILDER_CONFIG_CLASS.__dataclass_fields__
        options = {key: value for key, value in options.items() if key in known}
        # a builder of any two languages takes them as options, the others as the name of a configuration
        own = None if "target_language" in options else language
        if variant and "caption_file" in known:
            options["caption_file"], variant = variant, ""
        config = "-".join(filter(None, (variant, own))) or None
        builder = builder_class(config_name=config, data_dir=data_dir, **options)
        builder.download_and_prepare()
        parts.append(builder.as_dataset())
    splits = dict.fromkeys(split for part in parts for split in part)
    joined = {
        split: datasets.concatenate_datasets([part[split] for part in parts if split in part]) for split in splits
    }
    for split, rows in joined.items():
        if isinstance(rows.features.get("image"), datasets.Image):
            joined[split] = rows.cast_column("image", StillPicture())
    check_ids(joined)
    return datasets.DatasetDict(joined)


def read_translated(
    data_dir: str | None, source_language: str, target_language: str, seed: int, target: str
) -> datasets.DatasetDict:
    """Return what `nrccr translate` wrote into a folder. Raises ValueError for other languages or another split."""
    if data_dir is None or not list(Path(data_dir).glob("data/*.parquet")):
        raise ValueError(
            f"parquet needs data_dir, a folder that `nrccr translate` wrote; {data_dir} has no data/*.parquet"
        )
    if target != "translated":
        raise ValueError(f"{data_dir} is translated; {target} captions are in the data that it was made of")
    files = {}
    for file in sorted(Path(data_dir).glob("data/*.parquet")):  # by name: of a folder's, `[` and `*` are a pattern
        files.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(glob.escape(str(file)))
    dataset = datasets.load_dataset("parquet", data_files=files)
    for split, rows in dataset.items():
        if missing := CAPTION_FEATURES.keys() - set(rows.column_names):
            raise ValueError(f"{data_dir}, {split} lacks the columns {', '.join(sorted(missing))}")
        for column, language in (("source_language", source_language), ("target_language", target_language)):
            if other := set(rows[column]) - {language}:
                raise ValueError(f"{data_dir}, {split}: {column} is {', '.join(map(str, other))}, not {language}")
    record = Path(data_dir, TRANSLATION_RECORD)
    split_seed = json.loads(record.read_text(encoding="utf-8"))["split_seed"] if record.exists() else seed
    if split_seed != seed:  # a model that says otherwise would be tested on what it was trained on
        raise ValueError(f"{data_dir} was split by seed {split_seed}, not {seed}: --split_seed {split_seed}")
    return dataset


def dataset_languages(name: str) -> list[str]:
    """Return the target languages that every part of a data set has, in the order of its first part's configurations;
    none where a part leaves them to the user."""
    languages = None
    for part in name.split("+"):
        part, variant = BUILDERS.split(part)
        builder = None if part == PARQUET else BUILDERS[part]
        is_open = builder is None or "target_language" in builder.BUILDER_CONFIG_CLASS.__dataclass_fields__
        configs = [] if is_open else builder.builder_configs
        prefix = f"{variant}-" if variant else ""
        found = [config.removeprefix(prefix) for config in configs if config.startswith(prefix)]
        languages = found if languages is None else [language for language in languages if language in found]
    return languages


def translated_by(dataset: datasets.DatasetDict, translator: str) -> Translator | None:
    """
    Return the engine whose translations the data brought, where none is wanting (the released files have Google's) or
    none is wanted (`translator="none"`).
    """
    for split, rows in dataset.items():
        wanted = ("target_caption", "back_translation") if split == "train" else ("source_caption",)
        if translator != "none" and any(rows.data.column(column).null_count for column in wanted):
            return None
    engine = Translator()
    origins = set(dataset["train"]["target_origin"]) if "train" in dataset else set()
    engine.name = ", ".join(sorted(origins - {None})) or "none"
    return engine


def query_origin(rows: datasets.Dataset) -> str:
    """Return who wrote the target captions of a split, for reports."""
    origins = set(rows["target_origin"]) if "target_origin" in rows.column_names else {"human"}
    if origins == {"grammar"}:
        return "written by a grammar, not by people (synthetic)"
    engines = sorted(str(origin) for origin in origins - {"human"})
    return f"translated by {', '.join(engines)}, not all by people" if engines else "written by people"


def load_translated_dataset(
    name: str,
    source_language: str,
    language: str,
    split_seed: int,
    target_captions: str,
    translator: str,
    data_dir: str | None,
    **media,
) -> tuple[datasets.DatasetDict, Translator]:
    """Load a data set as [`load_caption_dataset`] does, translated both ways. Return it and the translator; the time
    of each part is logged. Of several engines, joined by ',', each gives the training captions once, in rows of its
    own; the first one gives all else. Raises ValueError for an empty split, and for rows without media."""
    start = time.perf_counter()
    dataset = load_caption_dataset(name, language, split_seed, target_captions, data_dir, source_language, **media)
    for split, rows in dataset.items():
        for column in MEDIA_COLUMNS:
            if column in rows.column_names and rows.data.column(column).null_count:
                raise ValueError(
                    f"{name}, {split}: rows without {column}; put pictures into the folder `images` of data_dir, "
                    "videos into `videos`, features into `FeatureData`, or name the folder (media_dir, visual_feature)"
                )
    if empty := [split for split in ("train", "validation", "test") if not len(dataset.get(split, ()))]:
        raise ValueError(f"{name} has no {' and no '.join(empty)} split here: see docs/datasets.md")
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in dataset.items())
    logger.info(f"data: {name}, {source_language} -> {language}: {sizes} ({time.perf_counter() - start:.0f} s)")
    if engine := translated_by(dataset, translator):
        logger.info(f"not translated here; the data came with translations by {engine.name}")
        return dataset, engine
    start = time.perf_counter()
    pairs = [(source_language, language), (language, source_language)]
    engines = [load_engine(spec, pairs, data_dir) for spec in split_engines(translator)]
    train = datasets.DatasetDict(train=dataset["train"])
    dataset = add_translations(dataset, engines[0], source_language, language)
    for other in engines[1:]:
        more = add_translations(train, other, source_language, language)
        dataset["train"] = datasets.concatenate_datasets([dataset["train"], more["train"]])
    engines[0].name = ", ".join(engine.name for engine in engines)
    logger.info(f"translated by {engines[0].name} ({time.perf_counter() - start:.0f} s)")
    return dataset, engines[0]


def balance(languages: list[list[dict]], seed: int = 0) -> list[dict]:
    """Mix the rows of several languages, as many of each: those of which there are fewer come again, drawn by the
    seed."""
    size, draw = max(map(len, languages)), random.Random(seed)
    rows = []
    for of_language in languages:
        again, rest = divmod(size, len(of_language))
        rows += of_language * again + draw.sample(of_language, rest)
    draw.shuffle(rows)
    return rows

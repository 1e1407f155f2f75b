"""Loads and translates the caption data sets that the examples train and test on."""

import time
from pathlib import Path

import datasets

from datasets_scripts.cldr_emoji import CldrEmoji
from datasets_scripts.debian import FetchError, apertium_root, find_data
from datasets_scripts.tuxpaint import Tuxpaint
from modeling_nrccr.translation import Translator, add_translations, load_translator


LANGUAGES = {
    "ca": "Catalan", "cs": "Czech", "de": "German", "en": "English", "eo": "Esperanto", "es": "Spanish",
    "fr": "French", "gl": "Galician",
}  # fmt: skip
BUILDERS = {"tuxpaint": Tuxpaint, "cldr_emoji": CldrEmoji}


def language_name(code: str) -> str:
    return LANGUAGES.get(code, code)


def find_font(data_dir: str | None = None) -> Path | None:
    """A font with the letters of most languages, which Pillow's own lacks; None where it cannot be had."""
    try:
        (folder,) = find_data({"fonts-dejavu-core": "usr/share/fonts/truetype/dejavu"}, data_dir)
    except (FetchError, FileNotFoundError) as error:
        print(f"search.png will lack accents: {error}")
        return None
    return folder / "DejaVuSans.ttf"


def load_caption_dataset(
    name: str = "tuxpaint+cldr_emoji",
    target_language: str = "gl",
    seed: int = 0,
    target: str = "translated",
    data_dir: str | None = None,
) -> datasets.DatasetDict:
    """Splits `train`, `validation`, `test` of one or several builders, joined by "+", with the builders' columns.

    Raises ValueError for an unknown name or language.
    """
    parts = []
    for part in name.split("+"):
        if part not in BUILDERS:
            raise ValueError(f"unknown data set {part!r} in {name!r}: known are {', '.join(BUILDERS)}, joined by '+'")
        builder = BUILDERS[part](config_name=target_language, data_dir=data_dir, seed=seed, target=target)
        builder.download_and_prepare()
        parts.append(builder.as_dataset())
    return datasets.DatasetDict(
        {split: datasets.concatenate_datasets([part[split] for part in parts]) for split in parts[0]}
    )


def load_translated_dataset(
    name: str,
    source_language: str,
    target_language: str,
    seed: int,
    target: str,
    translator: str,
    data_dir: str | None,
) -> tuple[datasets.DatasetDict, Translator]:
    """The same, translated both ways, and the translator; the time of each part is printed."""
    start = time.perf_counter()
    dataset = load_caption_dataset(name, target_language, seed, target, data_dir)
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in dataset.items())
    print(f"data: {name}, {source_language} -> {target_language}: {sizes} ({time.perf_counter() - start:.0f} s)")
    start = time.perf_counter()
    pairs = [(source_language, target_language), (target_language, source_language)]
    root = apertium_root(pairs, data_dir=data_dir) if translator == "apertium" else None
    engine = load_translator(translator, root=root)
    dataset = add_translations(dataset, engine, source_language, target_language)
    print(f"translated by {engine.name} ({time.perf_counter() - start:.0f} s)")
    return dataset, engine

"""Publishes captions and ids of a data set, never its media, as Parquet with a dataset card."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..reading.columns import CAPTION_FEATURES
from .verify import builder_options, find_builder


CARD = """---
{metadata}
---

# {name}: captions and ids

{description}

No pictures, videos or features are in here, only captions and the ids of what they describe: `image_id` is the
collection and the file's name in it. Get the media from their owners: {homepage}.

| configuration | split | items | captions |
|---|---|---:|---:|
{table}

Columns: `image_id`, `caption_id`, `source_caption`, `target_caption`, `back_translation`, `source_language`,
`target_language`, `target_origin` (`human`, the name of a translation engine, or null) and `reference_source_caption`.
`target_caption` of training and `source_caption` of the other splits are null until machine translation fills them, so
that human translations cannot pass for translated ones; human source captions of validation and test are kept apart in
`reference_source_caption`.

## Terms

{license}

{citation}
"""


def write_captions(builder: datasets.GeneratorBasedBuilder, folder: Path) -> tuple[list[tuple], set[str]]:
    """Write Parquet files of a builder's captions by split; return configuration, split, items, captions of each, and
    the languages."""
    counts, languages = [], set()
    for split, stream in builder.as_streaming_dataset().items():
        columns = {name: feature for name, feature in builder.info.features.items() if name in CAPTION_FEATURES}
        rows = list(stream.select_columns(list(columns)))
        dataset = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        counts.append((builder.config.name, split, len(set(dataset["image_id"])), len(dataset)))
        for row in rows:
            if row["source_caption"] or row["reference_source_caption"]:
                languages.add(row["source_language"])
            if row["target_caption"]:
                languages.add(row["target_language"])
    return counts, languages


def write_upload(name: str, folder: Path, configs: Iterable[str], license: str | None = None, **options) -> Path:
    """Write a folder as it is uploaded: `CONFIG/SPLIT-*.parquet` and `README.md`. It appears whole, or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    builder_class = find_builder(name)
    options = builder_options(builder_class, options)
    configs = list(configs) or list(builder_class.builder_configs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        counts, languages = [], set()
        unfinished = Path(scratch) / folder.name
        for config in configs:
            builder = builder_class(config_name=config, **options)
            new_counts, new_languages = write_captions(builder, unfinished / builder.config.name)
            counts += new_counts
            languages |= new_languages
        license = license or getattr(builder_class, "LICENSE_ID", "other")
        card = make_card(name, builder, counts, sorted(languages), license)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    return folder


def make_card(name: str, builder, counts: list[tuple[str, str, int, int]], languages: list[str], license: str) -> str:
    """Return the dataset card, whose metadata says which files are which split of which configuration."""
    files = {}
    for config, split, _, _ in counts:
        files.setdefault(config, []).append({"split": split, "path": f"{config}/{split}-*.parquet"})
    metadata = DatasetCardData(
        language=languages,
        license=license,
        pretty_name=f"{name}: captions and ids",
        task_categories=["text-to-image", "image-to-text", "translation"],
        configs=[{"config_name": config, "data_files": data_files} for config, data_files in files.items()],
    )
    table = "\n".join(
        f"| {config} | {split} | {items:,} | {captions:,} |" for config, split, items, captions in counts
    )
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        description=builder.info.description,
        homepage=builder.info.homepage or "see the terms below",
        table=table,
        license=builder.info.license or "see the source",
        citation=f"```bibtex\n{builder.info.citation}\n```" if builder.info.citation else "",
    )
    return str(DatasetCard(card))


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder of [`write_upload`] and return its address."""
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    message = "Upload captions and ids"
    api.upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset", commit_message=message)
    return str(url)


def publish(
    name: str,
    configs: Iterable[str] = (),
    repo_id: str | None = None,
    dry_run: str | Path | None = None,
    data_dir: str | None = None,
    private: bool = False,
    license: str | None = None,
) -> tuple[list[tuple[str, int]], str, str]:
    """
    Write what is uploaded of a data set, and upload it.

    Args:
        name, configs, data_dir, license: As of `write_upload`.
        repo_id: Where to, such as me/multi30k-captions.
        dry_run: A new folder, which is written, and nothing is uploaded.

    Returns:
        Each file and its bytes; the folder, or the address on the Hub; the terms of the captions.

    Raises:
        ValueError: As `write_upload`, or where neither `repo_id` nor `dry_run` is given.
    """
    if not (repo_id or dry_run):
        raise ValueError("name --repo_id, or a folder to look at first: --dry_run FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_upload(name, Path(dry_run or Path(scratch, "upload")), configs, license, data_dir=data_dir)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
        where = str(dry_run or push(folder, repo_id, private))
    return sizes, where, getattr(find_builder(name), "LICENSE", "") or "see the source"

"""The columns that every builder yields, and the base of builders whose pictures have captions in two languages."""

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .debian import data_fingerprint, find_data
from .splits import group_key, split_of


CAPTION_FEATURES = {
    name: datasets.Value("string")
    for name in (
        "image_id",
        "caption_id",
        "source_caption",
        "target_caption",
        "back_translation",
        "source_language",
        "target_language",
        "target_origin",
        "reference_source_caption",
    )
}
TARGETS = ("translated", "human")


def clean_caption(text: str) -> str:
    """Write a caption with single spaces and composed accents (NFC), as engines and tokenizers know them."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def caption_texts(captions: Any, place: str) -> list[str]:
    """Check that a data set has a list of captions here. Raises ValueError that names the place."""
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"{place}: must be a list of texts, not {str(captions)[:40]!r}; fetch the file again")
    return captions


def caption_columns(
    image_id: str,
    source_caption: str | None,
    human_caption: str | None,
    target_language: str,
    split: str,
    target: str,
    caption_id: str | None = None,
    source_language: str = "en",
) -> dict[str, str | None]:
    """
    Return one row without its picture, under the rule that keeps human translations out of what is called
    machine-translated: with `target="translated"`, training has no target caption and validation and test no source
    caption until translation fills them. Validation and test target captions are always human; their human English is
    kept apart. `caption_id`: where a picture has several captions, or the data names them itself.
    """
    source_caption, human_caption = (text and clean_caption(text) for text in (source_caption, human_caption))
    is_train, is_human = split == "train", target == "human"
    target_caption = human_caption if not is_train or is_human else None
    return {
        "image_id": image_id,
        "caption_id": caption_id or f"{image_id}#0",
        "source_caption": source_caption if is_train or is_human else None,
        "target_caption": target_caption,
        "back_translation": None,
        "source_language": source_language,
        "target_language": target_language,
        "target_origin": None if target_caption is None else "human",
        "reference_source_caption": None if is_train else source_caption,
    }


def png_bytes(image: Image.Image) -> bytes:
    """Write a picture as an RGBA PNG: transparency is kept, the processor puts it on white."""
    buffer = io.BytesIO()
    image.convert("RGBA").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@dataclass
class CaptionedPictureConfig(datasets.BuilderConfig):
    """
    BuilderConfig of builders with English and human target captions; its name is the target language.

    Args:
        seed (`int`, defaults to 0): of the group-wise split, see [`split_of`].
        target (`str`, defaults to `"translated"`): `"translated"`, or `"human"` for the upper bound that trains on
            human target captions.
    """

    seed: int = 0
    target: str = "translated"


def language_configs(languages: str) -> list[CaptionedPictureConfig]:
    return [CaptionedPictureConfig(name=language, version="1.0.0") for language in languages.split()]


class CaptionBuilder(datasets.GeneratorBasedBuilder):
    """
    Base of all builders: columns, empty splits, and what `verify` and `push_to_hub` tell. Rows are read whole and
    checked in `_split_generators`, which puts them by split into `_rows`: while they are written, datasets would hide
    the message of an error.
    """

    MEDIA = {"image": datasets.Image()}
    SPLITS = ("train", "validation", "test")  # there even where they are empty
    EXPECTED: dict[str, dict[str, tuple[int, int | None]]] = {}  # configuration -> split -> (pictures, captions)
    HOMEPAGE = LICENSE = CITATION = ""
    LICENSE_ID = "other"  # of the captions, as the Hub names licences

    _rows: dict[str, list[dict]]

    def _info(self) -> datasets.DatasetInfo:
        target = getattr(self.config, "target", TARGETS[0])
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        if (missing := getattr(self.config, "missing", "error")) not in ("error", "skip"):
            raise ValueError(f"missing must be error or skip, got {missing!r}")
        return datasets.DatasetInfo(
            description=" ".join((self.__doc__ or "").split()),
            features=datasets.Features({**CAPTION_FEATURES, **self.MEDIA}),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
        )

    def _generate_examples(self, split: str):
        yield from enumerate(self._rows[split])

    def as_dataset(self, split=None, **kwargs):
        """Read the built data as in `datasets`, which cannot read an empty split: a small folder may have one, and it
        is there, empty."""
        dataset = super().as_dataset(split, **kwargs)
        if split is not None:
            return dataset
        empty = {name: [] for name in self.info.features}
        names = dict.fromkeys([*self.SPLITS, *dataset])
        return datasets.DatasetDict(
            {
                name: dataset[name] if name in dataset else datasets.Dataset.from_dict(empty, self.info.features)
                for name in names
            }
        )


class CaptionedPictureBuilder(CaptionBuilder):
    """
    Base of the builders over Debian packages. A subclass names its `PACKAGES` (package -> path) and yields its
    pictures. `data_dir`: a folder with the packages' contents (`usr/...`), used as it is; without it they are fetched.
    """

    BUILDER_CONFIG_CLASS = CaptionedPictureConfig
    PACKAGES: dict[str, str]

    def __init__(self, *args, data_dir: str | Path | None = None, hash: str | None = None, **kwargs):
        if data_dir is not None:
            data_dir = str(Path(data_dir).expanduser())
        # datasets caches by options; the state of the data belongs to them.
        super().__init__(*args, data_dir=data_dir, hash=hash or data_fingerprint(self.PACKAGES, data_dir), **kwargs)

    def _paths(self) -> list[Path]:
        return find_data(self.PACKAGES, self.config.data_dir)

    def _media(self, png: bytes) -> dict:
        """Make the media column of a row from what `_pictures` yields last."""
        return {"image": {"path": None, "bytes": png}}

    def _pictures(self, paths: list[Path], left_out: Counter) -> Iterator[tuple[str, str, str, bytes]]:
        """
        Yield `(image_id, English caption, target caption, PNG bytes)` in a fixed order; count in `left_out`, by
        reason, what has no picture or no caption. `paths`: where each of `PACKAGES` lies.
        """
        raise NotImplementedError

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        language, seed = self.config.name, self.config.seed
        left_out, groups, captions = Counter(), {}, {}
        rows = {"train": [], "validation": [], "test": []}
        # Read here and not while writing, where datasets would hide the message of an error.
        for image_id, english, human, media in self._pictures(self._paths(), left_out):
            if image_id in captions:
                raise ValueError(
                    f"{self.name} {language}: {image_id} is there twice, as {captions[image_id]!r} and {english!r}; "
                    "remove one of the two files"
                )
            captions[image_id] = english
            group = group_key(english)
            groups[group] = split = split_of(group, seed)
            row = caption_columns(image_id, english, human, language, split, self.config.target)
            rows[split].append({**row, **self._media(media)})
        sizes = ", ".join(f"{name} {len(of_split)}" for name, of_split in rows.items())
        reasons = "".join(f"; left out, {reason}: {count}" for reason, count in sorted(left_out.items()))
        total = sum(map(len, rows.values()))
        what = f"{self.name} {language}, seed {seed}: {total} pictures in {len(groups)} groups"
        print(f"{what}: {sizes}{reasons}", flush=True)
        self._rows = rows
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in rows if rows[name]]


def no_captions_error(folder: Path, language: str, available: Iterable[str]) -> ValueError:
    """Return the error for a language that the data lacks."""
    return ValueError(f"{folder} has no {language!r} captions; it has: {', '.join(sorted(available)) or 'none'}")

"""
Crossmodal-3600: 3,600 pictures with captions written by native speakers in 36 languages. A test set only.

    from datasets_scripts.xm3600 import Xm3600
    builder = Xm3600(config_name="sw", data_dir="xm3600")    # holds captions.jsonl and images/
    builder.download_and_prepare()
    dataset = builder.as_dataset()["test"]
"""

import json
from collections.abc import Iterable
from pathlib import Path

from .reading.columns import caption_columns, caption_texts, clean_caption
from .reading.text_files import TextFilesBuilder, TextFilesConfig, read_text_lines


LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
).split()
FILES = ("captions.jsonl", "captions.jsonl.gz")
PICTURES = 3600


class Xm3600(TextFilesBuilder):
    """
    Crossmodal-3600 (Thapliyal et al., 2022): captions by native speakers, about two a picture, none translated.
    `data_dir`: the folder with `captions.jsonl` (of `captions.zip`) and the pictures in `images` (of `images.tgz`).
    """

    BUILDER_CONFIGS = [TextFilesConfig(name=language, version="1.0.0") for language in LANGUAGES]
    SPLITS = ("test",)
    EXPECTED = {language: {"test": (PICTURES, None)} for language in LANGUAGES}
    HOMEPAGE = "https://google.github.io/crossmodal-3600/"
    LICENSE_ID = "cc-by-4.0"
    LICENSE = "Captions: CC BY 4.0 (Google LLC). Pictures: of Open Images, terms of each in image_attributions.csv."
    CITATION = (
        "@inproceedings{ThapliyalCrossmodal2022, author={Ashish Thapliyal and Jordi Pont-Tuset and Xi Chen and Radu "
        "Soricut}, title={{Crossmodal-3600: A Massively Multilingual Multimodal Evaluation Dataset}}, "
        "booktitle={EMNLP}, year={2022}}"
    )

    @staticmethod
    def _state_files(data_dir: Path, options: dict) -> Iterable[str]:
        return FILES

    def _read(self, dl_manager) -> dict[str, list[dict]]:
        folder = self.config.data_dir
        if folder is None:
            raise ValueError(f"xm3600 needs data_dir: the folder with captions.jsonl and images, from {self.HOMEPAGE}")
        path = next((path for name in FILES if (path := Path(folder, name)).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder} has no captions.jsonl: unpack captions.zip of {self.HOMEPAGE} there")
        rows, lines = [], {}
        for number, line in read_text_lines(path):
            if line.strip():
                key, captions = self._parse(f"{path}, line {number}", line)
                if key in lines:
                    raise ValueError(f"{path}, line {number}: {key} is in line {lines[key]} already")
                lines[key] = number
                rows += [(key, k, caption) for k, caption in enumerate(captions)]
        if not rows:
            raise ValueError(f"{path} has no captions in {self.config.name}")
        return {"test": [self._row(*row) for row in rows]}

    def _parse(self, where: str, line: str) -> tuple[str, list[str]]:
        """Read a picture's key and its captions in the configuration's language."""
        try:
            record = json.loads(line)
            key, captions = record["image/key"], record.get(self.config.name, {"caption": []})["caption"]
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not readable as JSON ({error}); fetch the file again") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: not as published, with image/key and {self.config.name}: {{caption: [...]}} ({error!r})"
            ) from error
        captions = list(map(clean_caption, caption_texts(captions, f"{where}, {self.config.name}")))
        if not all(captions):
            raise ValueError(f"{where}: caption {captions.index('')} in {self.config.name} has no text")
        return key, captions

    def _row(self, key: str, k: int, caption: str) -> dict:
        image_id = f"xm3600/{key}"
        columns = caption_columns(
            image_id, None, caption, self.config.name, "test", self.config.target, caption_id=f"{image_id}#{k}"
        )
        return {**columns, "picture": f"{key}.jpg"}

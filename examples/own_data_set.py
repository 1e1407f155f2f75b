"""
Read a data set of your own: here pictures with text files beside them, `fox.png`, `fox.en.txt` and `fox.gl.txt`.

    python examples/own_data_set.py pictures --language gl

Whatever trains or tests takes it by its name, where Python finds this file:

    PYTHONPATH=examples nrccr train --data own_data_set:Sidecars --data_dir pictures --language gl
"""

import argparse
from pathlib import Path

import datasets

from datasets_scripts.reading.builder import fingerprint
from datasets_scripts.reading.columns import CaptionBuilder, CaptionedPictureConfig, caption_columns
from datasets_scripts.reading.splits import group_key, split_of
from modeling_nrccr.data.load import load_caption_dataset


class Sidecars(CaptionBuilder):
    """Pictures, and what people wrote of each in two languages."""

    BUILDER_CONFIG_CLASS = CaptionedPictureConfig  # its name is the language; it has `seed` and `target`

    def __init__(self, *args, data_dir: str, **kwargs):
        folder = Path(data_dir).expanduser().absolute()
        kwargs.setdefault("hash", fingerprint(folder, folder))  # datasets keeps what it built, of these files
        super().__init__(*args, data_dir=str(folder), **kwargs)

    def _split_generators(self, dl_manager):
        language, self._rows = self.config.name, {split: [] for split in self.SPLITS}
        for picture in sorted(Path(self.config.data_dir).glob("*.png")):
            english = picture.with_suffix(".en.txt").read_text(encoding="utf-8")
            human = picture.with_suffix(f".{language}.txt").read_text(encoding="utf-8")
            split = split_of(group_key(english), self.config.seed)  # captions that are alike stay on one side
            row = caption_columns(picture.stem, english, human, language, split, self.config.target)
            self._rows[split].append({**row, "image": {"path": str(picture), "bytes": None}})
        return [datasets.SplitGenerator(name, {"split": name}) for name, rows in self._rows.items() if rows]


def load(data_dir: str, language: str) -> datasets.DatasetDict:
    """Return the splits, as training gets them: human target captions in validation and test alone."""
    return load_caption_dataset("own_data_set:Sidecars", language, data_dir=data_dir)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data_dir", help="folder of pictures and texts")
    options.add_argument("--language", default="gl", help="code of the language beside English")
    for split, rows in load(**vars(options.parse_args())).items():
        print(f"{split}: {len(rows)} rows")
        print(*(f"  {row['image_id']}: {row['source_caption'] or row['target_caption']}" for row in rows), sep="\n")


if __name__ == "__main__":
    main()

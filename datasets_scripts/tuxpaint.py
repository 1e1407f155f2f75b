"""
Tux Paint's stamps: pictures with a sentence in English and its human translations.

    from datasets_scripts.tuxpaint import Tuxpaint
    builder = Tuxpaint(config_name="gl")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .reading.columns import CaptionedPictureBuilder, language_configs, no_captions_error, png_bytes


def read_captions(path: Path) -> tuple[str, dict[str, str]]:
    """Read a stamp's text: line 1 is English, then `LANGUAGE.utf8=caption`. Languages come as BCP 47 (`pt-BR`)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); repair it or remove it and its picture") from error
    captions = {}
    for line in lines[1:]:
        name, is_caption, caption = line.partition(".utf8=")
        if is_caption and caption.strip():
            captions[name.strip().replace("_", "-")] = " ".join(caption.split())
    return " ".join(lines[0].split()) if lines else "", captions


class Tuxpaint(CaptionedPictureBuilder):
    """Stamps of Tux Paint (Debian `tuxpaint-stamps-default`, GPL-2+) with human captions in many languages."""

    PACKAGES = {"tuxpaint-stamps-default": "usr/share/tuxpaint/stamps"}
    BUILDER_CONFIGS = language_configs(
        "gl ca es af am an ar be bg cs da de el eo eu fi fr ga gd gu he hi hr hu hy id is it ja ka km ko lv ml ms nb "
        "nl nn pl pt pt-BR ro ru sk sl sq sr sv th tr uk vi zh-CN zh-TW zu"
    )

    def _pictures(self, paths: list[Path], left_out: Counter) -> Iterator[tuple[str, str, str, bytes]]:
        (stamps,) = paths
        language, available, found = self.config.name, set(), 0
        files = sorted(file for file in stamps.rglob("*.png") if file.relative_to(stamps).parts[0] != "symbols")
        for file in tqdm(files, desc=f"{self.name} {language}", disable=None):
            text = file.with_suffix(".txt")
            if not text.exists():
                left_out["without a text file"] += 1
                continue
            english, captions = read_captions(text)
            available.update(captions)
            if not english or language not in captions:
                left_out["without an English caption" if not english else f"without a caption in {language}"] += 1
                continue
            found += 1
            image_id = f"stamps/{file.relative_to(stamps).with_suffix('').as_posix()}"
            yield image_id, english, captions[language], self._read(file)
        if not found:
            raise no_captions_error(stamps, language, available)

    @staticmethod
    def _read(file: Path) -> bytes:
        try:
            with Image.open(file) as image:
                image.load()
                return file.read_bytes() if image.mode == "RGBA" else png_bytes(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is not a readable picture ({error}); remove it or fetch it again") from error

"""
Emoji: the pictures of Noto Color Emoji with their Unicode CLDR names in English and about 80 other languages.

    from datasets_scripts.cldr_emoji import CldrEmoji
    builder = CldrEmoji(config_name="gl")
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import ctypes
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont, features
from tqdm.auto import tqdm

from .reading.columns import CaptionedPictureBuilder, language_configs, no_captions_error, png_bytes
from .reading.debian import FetchError, fetch_packages


FONT_SIZE = 109  # the one size of the font's bitmaps
PICTURE_SIZE = (136, 128)
_CLDR_CODES = {"nb": "no"}
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_HAIR = range(0x1F9B0, 0x1F9B4)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)


def from_code_points(text: str) -> str:
    """Return the characters of "1F600" or "1f468-200d-1f33e". Raises ValueError where it is no such text."""
    return "".join(chr(int(point, 16)) for point in text.split("-"))


def reason_to_leave_out(emoji: str) -> str | None:
    """Say why a sequence shows no thing of its own (skin tone, flag of a place, keycap, component); None for the
    rest."""
    points = [ord(character) for character in emoji]
    if any(point in _SKIN_TONES for point in points):
        return "skin tones"
    if any(point in _REGIONAL_INDICATORS or point in _TAGS for point in points):
        return "flags of places"
    if 0x20E3 in points or all(point < 0x80 or point in _HAIR for point in points):
        return "keycaps, components, ASCII"
    return None


def read_names(annotations: Path, language: str) -> dict[str, str]:
    """Read the names (`tts`) of a CLDR language by sequence, from `annotations` and `annotationsDerived` beside it."""
    names = {}
    for folder in (annotations, annotations.with_name("annotationsDerived")):
        file = folder / f"{_CLDR_CODES.get(language, language).replace('-', '_')}.xml"
        if not file.exists():
            continue
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file} is not readable as XML ({error}); fetch it again") from error
        for annotation in root.iter("annotation"):
            name = " ".join((annotation.text or "").split())
            if annotation.get("type") == "tts" and name and name != "↑↑↑":  # the mark for "as in the parent language"
                names.setdefault(annotation.get("cp"), name)
    return names


def find_name(names: dict[str, str], emoji: str) -> str | None:
    """Return a name as the sequence stands, else without U+FE0F, which CLDR leaves out."""
    return names.get(emoji) or names.get(emoji.replace("\ufe0f", ""))


def enable_raqm(data_dir: str | Path | None = None) -> None:
    """
    Give Pillow its Raqm layout, which emoji sequences need. That needs the system's FriBiDi, which a bare machine
    lacks. Pillow looks for it once, when its font module is loaded: put it there and load that module again.
    """
    if features.check("raqm"):
        return
    pattern = "usr/lib/*/libfribidi.so.0"
    libraries = list(Path(data_dir).glob(pattern)) if data_dir else []
    if not libraries:
        libraries = list(fetch_packages(["libfribidi0"]).glob(pattern))
    if libraries:
        ctypes.CDLL(str(libraries[0]))
        sys.modules.pop("PIL._imagingft", None)
        ImageFont.core = importlib.import_module("PIL._imagingft")
    if not features.check("raqm"):
        raise FetchError("Pillow cannot draw emoji sequences here: install the Debian package libfribidi0")


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def draw_emoji(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draw the picture of a sequence, RGBA; None where the font has none, or only its parts, side by side."""
    if font.getlength(emoji) > 1.5 * PICTURE_SIZE[0]:
        return None
    image = Image.new("RGBA", PICTURE_SIZE)
    ImageDraw.Draw(image).text((0, 0), emoji, font=font, embedded_color=True)
    return image if image.getbbox() else None


class CldrEmoji(CaptionedPictureBuilder):
    """Noto Color Emoji (OFL) with their names in Unicode CLDR (Unicode licence), by Debian packages."""

    PACKAGES = {
        "unicode-cldr-core": "usr/share/unicode/cldr/common/annotations",
        "fonts-noto-color-emoji": "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    }
    BUILDER_CONFIGS = language_configs(
        "gl ca es af am ar as az be bg bn bs cs cy da de el et eu fa fi fr ga gd gu he hi hr hu hy id is it ja ka kk "
        "km kn ko ky lo lt lv mk ml mn mr ms my nb ne nl nn or pa pl ps pt ro ru sd si sk sl so sq sr sv sw ta te th "
        "tk tr uk ur uz vi yue zh zh-Hant zu"
    )

    def _pictures(self, paths: list[Path], left_out: Counter) -> Iterator[tuple[str, str, str, bytes]]:
        annotations, font_file = paths
        language = self.config.name
        english, target = read_names(annotations, "en"), read_names(annotations, language)
        if not target or not english:
            raise no_captions_error(
                annotations, language if english else "en", [file.stem for file in annotations.glob("*.xml")]
            )
        enable_raqm(self.config.data_dir)
        font = load_font(font_file)
        for emoji in tqdm(sorted(english), desc=f"{self.name} {language}", disable=None):
            if reason := reason_to_leave_out(emoji):
                left_out[reason] += 1
            elif (image := draw_emoji(emoji, font)) is None:
                left_out["not in the font"] += 1
            elif (name := find_name(target, emoji)) is None:
                left_out[f"without a name in {language}"] += 1
            else:
                image_id = "emoji/" + "-".join(f"{ord(character):04X}" for character in emoji)
                yield image_id, find_name(english, emoji), name, png_bytes(image)

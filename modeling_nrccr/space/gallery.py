"""The pictures and clips that the Space searches, by id: drawn and read where Debian's packages put them."""

from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image

from datasets_scripts import cldr_emoji, tuxpaint
from datasets_scripts.reading.debian import find_data

from ..media import load_image


class Gallery:
    """
    Pictures `emoji/1F600` and `stamps/animals/cat`, clips `clips/1f600`, each with names by people.

    Args:
        clips: folder of animated WebP files, named by their code points.
        data_dir: folder with the contents of the Debian packages (`usr/...`); by default as installed, or fetched.

    Raises:
        datasets_scripts.debian.FetchError: A package is not installed, and not to be had.
    """

    def __init__(self, clips: str | Path, data_dir: str | Path | None = None):
        self.clips, self.data_dir = Path(clips), data_dir
        self.annotations, font = find_data(cldr_emoji.CldrEmoji.PACKAGES, data_dir)
        cldr_emoji.enable_raqm(data_dir)
        self.font = cldr_emoji.load_font(font)
        self.emoji_names = lru_cache(lambda language: cldr_emoji.read_names(self.annotations, language))
        self.captions = lru_cache(lambda path: tuxpaint.read_captions(path))

    @cached_property
    def stamps(self) -> Path:
        (folder,) = find_data(tuxpaint.Tuxpaint.PACKAGES, self.data_dir)
        return folder

    def emoji_ids(self) -> list[str]:
        return [
            f"emoji/{'-'.join(f'{ord(character):04X}' for character in emoji)}"
            for emoji in sorted(self.emoji_names("en"))
            if not cldr_emoji.reason_to_leave_out(emoji) and cldr_emoji.draw_emoji(emoji, self.font)
        ]

    def stamp_ids(self) -> list[str]:
        """Return the ids of the stamps with an English caption."""
        paths = (path.relative_to(self.stamps).with_suffix("") for path in sorted(self.stamps.rglob("*.png")))
        ids = [f"stamps/{path.as_posix()}" for path in paths if path.parts[0] != "symbols"]
        return [id for id in ids if self.name(id, "en")]

    def clip_ids(self) -> list[str]:
        return [f"clips/{path.stem}" for path in sorted(self.clips.glob("*.webp"))]

    def name(self, id: str, language: str) -> str | None:
        """Return what people call a picture; None where nobody has said it in that language."""
        kind, _, key = id.partition("/")
        if kind == "stamps":
            text = self.stamps / f"{key}.txt"
            english, captions = self.captions(text) if text.exists() else ("", {})
            return english or None if language == "en" else captions.get(language)
        return cldr_emoji.find_name(self.emoji_names(language), cldr_emoji.from_code_points(key))

    def picture(self, id: str) -> Image.Image:
        """Return a picture; of a clip, its frame `clips/1f600#3`. Raises OSError or ValueError where it is gone."""
        kind, _, key = id.partition("/")
        if kind == "stamps":
            return load_image(self.stamps / f"{key}.png")
        if kind == "clips":
            return load_image(self.frame_file(*key.split("#")))
        image = cldr_emoji.draw_emoji(cldr_emoji.from_code_points(key), self.font)
        if image is None:
            raise ValueError(f"the emoji font here has no {key}: build the Space with the release that it runs on")
        return image

    def clip_file(self, id: str) -> Path:
        return self.clips / f"{id.partition('/')[2]}.webp"

    def frame_file(self, clip: str, frame: int | str) -> Path:
        """Return the file of a frame, which was taken out when the Space was built: decoding a clip takes a fifth of a
        second."""
        return self.clips / "frames" / f"{clip}-{frame}.webp"

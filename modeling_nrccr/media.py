"""Still pictures as files: which suffixes they have, how one is read, and which a folder holds."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pillow goes by content, not by suffix; formats that start other programs (EPS runs Ghostscript) are kept out.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Vision towers look at 512 pixels or less; a batch of phone or panorama pictures in full would take gigabytes.
MAX_SIDE = 2048
OPENING = Lock()  # of threads that prepare batches: Python's warning filters are one for all


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture upright in 8-bit RGB, its transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        # Pillow's convert() clips 16-bit and float values at 255, which leaves a white picture
        values = np.asarray(image, dtype=np.float32)
        full_scale = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        if image.mode == "F" and values.max() <= 1:
            full_scale = 1
        image = Image.fromarray((values * (255 / full_scale)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """
    Decodes a picture (the first frame of an animation) to upright RGB of at most `MAX_SIDE` pixels a side.

    Raises:
        PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError: before decoding, if it has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
        OSError and others: if it is corrupt; Pillow's decoders raise many kinds.
    """
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=IMAGE_FORMATS)
    with opened as image:
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # decodes a large JPEG at a half, a quarter or an eighth
        image = to_rgb(image)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def list_images(folder: str | Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, what: str = "pictures") -> list[Path]:
    """
    The pictures (or `what` else) under `folder`, sorted, by suffix; hidden files and folders are left out.

    Raises:
        ValueError: if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"The gallery {str(folder)!r} is not a folder.")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise ValueError(f"No {what} under {str(folder)!r}: looked for files that end in {', '.join(suffixes)}.")
    return paths

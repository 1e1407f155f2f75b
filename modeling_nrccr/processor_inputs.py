"""What a processor is given, before anything is made of it: rows, texts and arrays of pixels."""

import re
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image


def as_rows(rows: Any, one: type | tuple[type, ...] = ()) -> list | None:
    """Return rows as a list; of a single one, which is of the type `one` or cannot be walked through, a list of one
    row."""
    if rows is None or isinstance(rows, list):
        return rows
    if isinstance(rows, one) or not isinstance(rows, Iterable):
        return [rows]
    return list(rows)


HALF = re.compile("[\ud800-\udfff]")  # of a UTF-16 pair


def text_problem(text: Any) -> str | None:
    """Return what is wrong with a caption or query, as the rest of a sentence that names it; None: nothing is."""
    if not isinstance(text, str) or not text.strip():
        return f"is {reprlib.repr(text)}: a text that is not blank is needed"
    if not text.isascii() and (half := HALF.search(text)):
        return f"holds {half[0]!r} at character {half.start()}, half of a UTF-16 pair: send whole characters"
    return None


def check_texts(texts: Sequence[str]):
    """Raise ValueError that names the first row of what no text encoder should read."""
    for row, text in enumerate(texts):
        if problem := text_problem(text):
            raise ValueError(f"text row {row} {problem}, or leave the row out")


def clean_text(text: str) -> str:
    """Return a text as the captions of every data set are: composed letters (NFC), one blank between words, none
    around them."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def picture_of(array: np.ndarray | torch.Tensor, channels: str | None = None) -> Image.Image:
    """
    Return an array or tensor of `(height, width)`, `(height, width, channels)` or `(channels, height, width)` as a
    picture.

    Args:
        array: whole numbers of 0 to 255, of 16 bits of 0 to 65535, or floats of 0 to 1 or of 0 to 255.
        channels: "channels_first" or "channels_last"; by default last, where that many may be channels.

    Raises:
        ValueError: for another shape, or for values beyond these.
    """
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).numpy(force=True)
    values = np.asarray(array)
    if values.dtype.kind not in "buif":
        raise ValueError(f"{type(array).__name__} is no picture, path or array of numbers")
    if values.ndim == 3 and channels is None:
        first, *_, last = values.shape
        channels = "channels_first" if last > 4 or (first in (1, 3) and last not in (1, 3)) else "channels_last"
    if values.ndim == 3 and channels == "channels_first":
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[-1] > 4):
        raise ValueError(f"it has shape {tuple(np.shape(array))}, not (height, width, 3) or (3, height, width)")
    if values.dtype != np.uint8:
        low, high = values.min(), values.max()
        full_scale = 1 if high <= 1 and values.dtype.kind in "bf" else 255
        if values.dtype == np.uint16 or (values.dtype.kind in "ui" and high > 255):
            full_scale = 65535
        if not (low >= 0 and high <= full_scale):  # also where one is no number
            raise ValueError(f"its values are {low:g} to {high:g}: give 0 to 255, or 0 to 1, before normalisation")
        values = np.rint(values * (255 / full_scale)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.shape[2:] == (1,) else values))


def is_rescaled(image: Any) -> bool:
    """Tell whether a picture is an array of floats of 0 to 1, for which `do_rescale=False` is meant."""
    if isinstance(image, torch.Tensor):
        return image.is_floating_point() and bool((image <= 1).all())
    return isinstance(image, np.ndarray) and image.dtype.kind == "f" and bool((image <= 1).all())

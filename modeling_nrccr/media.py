"""Pictures as files, by one rule: which a folder holds, which of them move, and how a still one is read."""

import io
import os
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError
from transformers.utils import logging


try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()  # for what opens pictures without this file too, such as `datasets`


logger = logging.get_logger(__name__)

# Pillow goes by content, not by suffix; formats that start other programs (EPS runs Ghostscript) are kept out.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
if pillow_heif is not None:
    IMAGE_FORMATS += ("HEIF",)
Image.init()
IMAGE_SUFFIXES = tuple(
    sorted(suffix for suffix, name in Image.registered_extensions().items() if name in (*IMAGE_FORMATS, "MPO"))
)
MOVING_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")  # the frames of others are pages, sizes or depths of one picture
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
HEIF_REMEDY = 'pip install "modeling_nrccr[heic]"'
# Vision towers look at 512 pixels or less; a batch of phone or panorama pictures in full would take gigabytes.
MAX_SIDE = 2048
MAX_BYTES = 2**30  # of memory to decode a picture: what Pillow allows (89 megapixels), in three copies of four bytes
BYTES_A_PIXEL = 12
ORIENTATION = 0x0112  # of EXIF
# of TIFF, that bear on the pixels: sizes, strips, tiles, colours, how they are packed; not names and dates
TIFF_TAGS = {
    *range(254, 269),
    *range(273, 285),
    290,
    291,
    292,
    293,
    317,
    320,
    *range(322, 326),
    332,
    338,
    339,
    347,
    *range(512, 522),
    *range(529, 533),
}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ------------------------------------------------------------------------------------------------------ one picture


def orientation(image: Image.Image) -> int:
    """Read how the camera was held, from 1 to 8; 1 where that cannot be read, whatever is wrong with the metadata."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # parsers of broken metadata raise anything
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any picture upright and into 8-bit RGB, its transparency composited on white."""
    image.load()
    if (turn := TURNS.get(orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":
        # Pillow's convert() clips 16-bit and float values at 255, which leaves a white picture
        image = Image.fromarray(to_8_bit(np.asarray(image, dtype=np.float32), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()  # of its orientation too: what is upright is not turned again
    return image


def to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale the values of a 16-bit, integer or float picture, of shape `(height, width)`, by the range they are in."""
    values = np.nan_to_num(values, nan=0, posinf=np.finfo(np.float32).max, neginf=0)
    largest = values.max()
    if mode == "F" and np.quantile(values, 0.95) <= 1:  # of light, of which some may be brighter than white
        full_scale = 1
    elif mode.startswith("I;16"):
        full_scale = 65535
    else:
        full_scale = next((scale for scale in (255, 65535) if largest <= scale), largest)
    return (values * np.float32(255 / full_scale)).clip(0, 255).astype(np.uint8)


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG is its first picture: a table of others (of stereo, brightness or depth) is not read, nor its errors.
    `is_sequential`: decoded as it is read, not kept in full as coefficients first."""

    def _open(self):
        super()._open()
        header = b"\xff\xda" + (6 + 2 * self.layers).to_bytes(2) + bytes([self.layers])  # of a scan of all components
        self.fp.seek(-(8 + 2 * self.layers), os.SEEK_CUR)
        self.is_sequential = "progressive" not in self.info and self.fp.read(5) == header


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF whose other metadata are damaged is turned all the same."""

    def load_end(self):
        try:
            super().load_end()
        except Exception:  # the pixels are there by now
            pass


FACTORIES = {name: Image.OPEN[name][0] for name in IMAGE_FORMATS} | {"JPEG": _Jpeg, "TIFF": _Tiff}


def picture_format(header: bytes) -> str | None:
    """Tell which of `IMAGE_FORMATS` the first 16 bytes of a file are of; None: no picture that is read here."""
    return next(iter(_formats(header)), None)


def _formats(header: bytes) -> list[str]:
    return [name for name in IMAGE_FORMATS if len(header) == 16 and Image.OPEN[name][1](header) is True]


def _is_heif(header: bytes) -> bool:
    return header[4:8] == b"ftyp" and header[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")


def _open_picture(stream: BinaryIO, name: str) -> Image.Image:
    """Open by content, without a look at the pixels. Not `Image.open`: that judges by the size in the header, which
    says little of what a JPEG takes at a fraction of it, and by rules that are one for all threads."""
    header = stream.read(16)
    problem = f"cannot identify image file {name}"
    for format in _formats(header):
        stream.seek(0)
        try:
            return FACTORIES[format](stream)
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error) as error:
            problem = f"cannot identify image file {name} ({format}: {error})"
    if pillow_heif is None and _is_heif(header):
        problem = f"{name} is HEIC, which is not read here: {HEIF_REMEDY}"
    raise UnidentifiedImageError(problem)


def _check_memory(image: Image.Image, pixels: int):
    """Refuse a picture that takes more than `MAX_BYTES` to decode. `pixels`: how many there are in the file."""
    needed = image.width * image.height * BYTES_A_PIXEL
    if isinstance(image, _Jpeg) and not image.is_sequential:
        most = max(h * v for _, h, v, _ in image.layer)
        needed += int(2 * pixels * sum(h * v / most for _, h, v, _ in image.layer))
    if needed > MAX_BYTES:
        raise Image.DecompressionBombError(
            f"it has {pixels:,} pixels, which take {needed / 1e9:.1f} GB to decode, more than the "
            f"{MAX_BYTES / 1e9:.1f} allowed: save it smaller, or leave it out"
        )


def _decode(stream: BinaryIO, name: str, max_pixels: int | None) -> Image.Image:
    with _open_picture(stream, name) as image:
        pixels = image.width * image.height
        if max_pixels is not None and pixels > max_pixels:
            raise Image.DecompressionBombError(f"it has {pixels:,} pixels, more than the {max_pixels:,} allowed")
        image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # decodes a large JPEG at a half, a quarter or an eighth
        _check_memory(image, pixels)
        image = to_rgb(image)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _without_metadata(content: bytes, format: str) -> bytes | None:
    """Keep of a picture, which Pillow or its decoder refuses for other things too, what bears on its pixels; None: of
    a format in which they refuse it for its pixels alone."""
    if format == "AVIF":
        return re.sub(rb"(infe.{8})Exif", rb"\1none", content, flags=re.DOTALL)  # an item of no known kind
    if format == "PNG":
        return b"".join(_png_chunks(content))
    if format == "TIFF":
        return _bare_tiff(bytearray(content), "little" if content.startswith(b"II") else "big")
    return None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    yield content[:8]
    at = 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        name = content[at + 4 : at + 8]
        is_whole = zlib.crc32(content[at + 4 : end - 4]).to_bytes(4) == content[end - 4 : end]
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and is_whole):
            yield content[at:end]
        at = end


def _bare_tiff(content: bytearray, order: str) -> bytes:
    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], order)

    start = number(4, 4) + 2
    for entry in range(start, min(start + 12 * number(start - 2, 2), len(content) - 11), 12):
        if number(entry, 2) not in TIFF_TAGS:  # is made one byte of value 0
            content[entry + 2 : entry + 12] = (1).to_bytes(2, order) + (1).to_bytes(4, order) + bytes(4)
    return bytes(content)


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises ValueError for a pipe, a device or a folder, which could be waited for
    forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file, but a folder, a pipe or a device: leave it out")
    return open(path, "rb")


def load_image(source: str | Path | bytes | BinaryIO | dict, max_pixels: int | None = None) -> Image.Image:
    """
    Decode a picture (the first frame of an animation) to upright RGB of at most `MAX_SIDE` pixels a side. Damaged
    metadata cost nothing; damaged pixels are an error.

    Args:
        source: a file, its bytes, a stream that can be sought, or what a `datasets.Image(decode=False)` column holds.
        max_pixels: a bound on the pixels in the file, for pictures of strangers. None: only what decoding takes is
            bounded (`MAX_BYTES`), so that a JPEG of 200 megapixels is read at a quarter of its size.

    Raises:
        PIL.Image.DecompressionBombError: before decoding, if it is larger than that.
        PIL.UnidentifiedImageError: if it is of none of `IMAGE_FORMATS`.
        OSError, ValueError and others: if it is corrupt (Pillow's decoders raise many kinds), or no regular file.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, (str, Path)):
        with open_file(source) as stream:
            return _load(stream, repr(str(source)), partial(_decode, max_pixels=max_pixels))
    return _load(source, "in memory", partial(_decode, max_pixels=max_pixels))


def count_pixels(content: bytes) -> int:
    """Read from the header of a picture's file how many pixels it has. Raises as [`load_image`] does."""
    return _load(io.BytesIO(content), "in memory", _count)


def _count(stream: BinaryIO, name: str) -> int:
    with _open_picture(stream, name) as image:
        return image.width * image.height


def _load(stream: BinaryIO, name: str, read: Callable[[BinaryIO, str], Any]) -> Any:
    try:
        return read(stream, name)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # of pixels, or of what stands beside them
        stream.seek(0)
        content = stream.read()
        bare = _without_metadata(content, picture_format(content[:16]))
        if bare is None:
            raise
        try:
            return read(io.BytesIO(bare), name)
        except Exception:
            raise error from None


def is_clip(path: str | Path) -> bool:
    """Tell by content whether a file is to be read as a video: of several frames, or no picture at all; a file that is
    neither goes by its suffix. Raises ValueError as [`open_file`] does."""
    with open_file(path) as stream:
        header = stream.read(16)
        format = picture_format(header)
        if format in MOVING_FORMATS:
            stream.seek(0)
            try:
                with _open_picture(stream, str(path)) as image:
                    return getattr(image, "n_frames", 1) > 1
            except Exception:  # of a broken one, whose reader says what is amiss
                return False
    if format is not None or _is_heif(header):
        return False
    is_video = header[4:8] == b"ftyp" or header[:4] in (b"\x1a\x45\xdf\xa3", b"OggS", b"RIFF")
    return is_video or Path(path).suffix.lower() not in (*IMAGE_SUFFIXES, *HEIF_SUFFIXES)


# --------------------------------------------------------------------------------------------------------- a folder


class Found(NamedTuple):
    """What a folder holds: `files`, sorted; `others`, how many of each suffix are not read; and `left_out`, the names
    below the folder (what is not UTF-8 in them escaped) and the reasons of what is but cannot be."""

    files: list[Path]
    others: Counter
    left_out: list[tuple[str, str]]


def walk(folder: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> Found:
    """
    Find the files under `folder` that end in one of `suffixes`. Links to folders elsewhere are followed, once; what is
    hidden (`.git`, and macOS's `._a.jpg`) is passed over.

    Raises:
        ValueError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"The gallery {str(folder)!r} is not a folder.")
    root, found, linked = Path(os.path.realpath(folder)), Found([], Counter(), []), set()

    def leave_out(path: str, reason: str):
        name = os.path.relpath(path, folder)
        found.left_out.append((os.fsencode(name).decode("utf-8", "backslashreplace"), reason))

    def is_wanted(path: str) -> bool:
        if not os.path.islink(path):
            return True
        target = Path(os.path.realpath(path))
        if target.is_relative_to(root) or any(target.is_relative_to(other) for other in linked):
            leave_out(path, "a link to a folder that is read at its own place")
            return False
        linked.add(target)
        return True

    def unreadable(error: OSError):
        leave_out(error.filename, f"the folder cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if is_wanted(os.path.join(parent, name))]
        for name in names:
            suffix, path = os.path.splitext(name)[1].lower(), os.path.join(parent, name)
            if name.startswith("."):
                continue
            if suffix not in suffixes:
                found.others[suffix or "without a suffix"] += 1
            elif (reason := _why_left_out(path)) is not None:
                leave_out(path, reason)
            else:
                found.files.append(Path(path))
    found.files.sort()
    return found


def _why_left_out(path: str) -> str | None:
    try:
        path.encode()
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "a pipe or a device, no regular file"
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it (`convmv -f latin1 -t utf8`)"
    except OSError as error:
        return f"a broken link ({os.readlink(path)})" if os.path.islink(path) else str(error.strerror)
    return None


def describe_others(others: Counter) -> str:
    """Say what a folder holds that is not read, with the remedy where there is one: "41 of kinds that are not read
    (.heic 38: pip install ..., .raw 3)"."""
    is_wanting = pillow_heif is None
    kinds = ", ".join(
        f"{suffix} {count}" + (f": {HEIF_REMEDY}" if is_wanting and suffix in HEIF_SUFFIXES else "")
        for suffix, count in others.most_common()
    )
    return f"{others.total():,} of kinds that are not read ({kinds})"


def list_images(folder: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES, what: str = "pictures") -> list[Path]:
    """
    List the pictures (or `what` else) under `folder`, sorted; see [`walk`]. A warning says what is not read.

    Raises:
        ValueError: if there is no such folder or no picture in it.
    """
    files, others, left_out = walk(folder, suffixes)
    if not files:
        raise ValueError(
            f"No {what} under {str(folder)!r}: looked for files that end in {', '.join(suffixes)}"
            + (f"; it holds {describe_others(others)}" if others else "")
            + "".join(f"; {name}: {reason}" for name, reason in left_out[:5])
            + "."
        )
    if left_out:
        logger.warning(
            f"Left out {len(left_out)}: "
            + "; ".join(f"{name} ({reason})" for name, reason in left_out[:5])
            + ("; ..." if len(left_out) > 5 else "")
        )
    return files

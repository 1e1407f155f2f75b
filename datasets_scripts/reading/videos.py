"""Frames of videos: PyAV decodes what FFmpeg knows, Pillow animated WebP and GIF; bounded, whatever the file holds."""

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .features import sample_positions


VIDEO_SUFFIXES = (
    ".3g2",
    ".3gp",
    ".asf",
    ".avi",
    ".divx",
    ".dv",
    ".f4v",
    ".flv",
    ".m2ts",
    ".m2v",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpe",
    ".mpeg",
    ".mpg",
    ".mts",
    ".mxf",
    ".ogm",
    ".ogv",
    ".qt",
    ".rm",
    ".rmvb",
    ".ts",
    ".vob",
    ".webm",
    ".wmv",
)
MOVING_SUFFIXES = (".apng", ".avif", ".avifs", ".gif", ".png", ".webp")  # of pictures that may be videos
MAX_FRAMES = 50_000  # 28 minutes at 30 frames a second
MAX_PIXELS = 4096 * 2304
MAX_SECONDS = 3600.0


def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of pictures, as Pillow knows them."""
    Image.init()
    return frozenset(Image.registered_extensions()) - set(VIDEO_SUFFIXES)


TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


def read_frames(
    video: str | Path | bytes | dict,
    num_frames: int = 8,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
) -> list[Image.Image]:
    """
    Read `num_frames` pictures of a video, sampled uniformly (the middle one of each of as many equal parts), in order;
    all of them where the video has fewer. A still picture is a video of one frame.

    Args:
        video: a path, the bytes of a file, or what a `datasets.Video(decode=False)` column holds.
        max_frames, max_pixels, max_seconds: a video with more frames, larger ones, or of longer duration is refused
            before it is decoded.

    Raises:
        ValueError: no video, a broken one, one without frames, or one over a limit; names the file.
        ImportError: PyAV is needed and missing.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    name, stream = _open(video)
    limits = {"frames": max_frames, "pixels a frame": max_pixels, "seconds": max_seconds}
    with stream:
        header = stream.read(16)
        stream.seek(0)
        try:
            read = _read_animation if _is_animation(header) else _read_stream
            frames = read(name, stream, num_frames, limits)
        except (Refused, ImportError):
            raise
        except Exception as error:  # decoders of broken files raise anything
            raise ValueError(
                f"{name} cannot be decoded as a video ({error}); fetch it again, or leave it out"
            ) from error
    if not frames:
        raise ValueError(f"{name} has no video frames; leave it out")
    return frames


class Refused(ValueError):
    """The video is over a limit."""


def _open(video: str | Path | bytes | dict) -> tuple[str, io.BufferedIOBase]:
    if isinstance(video, dict):
        video = video["bytes"] if video.get("bytes") is not None else video["path"]
    if isinstance(video, bytes):
        return f"a video of {len(video)} bytes", io.BytesIO(video)
    try:
        if not stat.S_ISREG(os.stat(video).st_mode):  # a pipe would be waited for forever
            raise ValueError(f"{video} is no regular file, but a folder, a pipe or a device: leave it out")
        return str(video), open(video, "rb")
    except OSError as error:
        raise ValueError(f"{video} cannot be opened: {error.strerror}") from error


def _is_animation(header: bytes) -> bool:
    """Tell whether it is of what Pillow reads: WebP (of which PyAV sees the first picture at best), GIF, AVIF, and
    still pictures."""
    starts = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
    is_webp = header[:4] == b"RIFF" and header[8:12] == b"WEBP"
    return is_webp or header[4:12] in (b"ftypavif", b"ftypavis") or header.startswith(starts)


def _check(name: str, limits: dict[str, float], **found: float | None):
    for key, value in found.items():
        what = key.replace("_", " ")
        if value is not None and value > limits[what]:
            raise Refused(
                f"{name} has {value:,.9g} {what}, more than the {limits[what]:,.9g} allowed: cut it, or raise the "
                f"limit (max_{what.split()[0]})"
            )


def _read_animation(name: str, stream: io.BufferedIOBase, num_frames: int, limits: dict) -> list[Image.Image]:
    with Image.open(stream) as image:
        total = getattr(image, "n_frames", 1)
        if total > 1:  # a still picture is bounded by Pillow, and decoded by what reads pictures
            _check(name, limits, pixels_a_frame=image.width * image.height)
        _check(name, limits, frames=total)
        frames = []
        for position in sample_positions(total, num_frames):
            image.seek(position)
            frames.append(image.copy())  # 16-bit or transparent as it is: the processor makes all pictures RGB
        return frames


@contextmanager
def _video_stream(stream: io.BufferedIOBase, name: str) -> Iterator:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'PyAV is needed to read {name}: `pip install "modeling_nrccr[video]"`, or av alone'
        ) from error
    stream.seek(0)
    # "pipe" alone: playlists, which name other files and addresses, are not followed
    with av.open(stream, container_options={"protocol_whitelist": "pipe"}) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        video = container.streams.video[0]
        if video.codec_context is None:
            raise ValueError(f"it is {container.format.long_name}, for which FFmpeg here has no decoder")
        yield container, video


def _read_stream(name: str, stream: io.BufferedIOBase, num_frames: int, limits: dict) -> list[Image.Image]:
    total = _count_frames(name, stream, limits)
    while total:
        frames, seen = _decode(name, stream, sample_positions(total, num_frames), limits)
        if seen is None:
            return frames
        total = seen  # packets without a picture: sample among the pictures that there are
    return []


def _count_frames(name: str, stream: io.BufferedIOBase, limits: dict) -> int:
    """Count the frames by the packets, without decoding: what a container says of its length need not be so."""
    total, end = 0, 0.0
    with _video_stream(stream, name) as (container, video):
        context = video.codec_context
        seconds = container.duration / 1e6 if container.duration else None
        _check(name, limits, seconds=seconds, pixels_a_frame=context.width * context.height)
        for packet in container.demux(video):
            total += packet.size > 0
            if packet.pts is not None:
                seconds = float((packet.pts - (video.start_time or 0)) * packet.time_base)
                end = max(end, seconds)
            _check(name, limits, frames=total, seconds=seconds)
        length = float(video.duration * video.time_base) if video.duration else container.duration / 1e6
        # of a variable rate, some containers count the ticks: it goes on to the end all the same
        if total < 0.9 * video.frames and end < 0.9 * length - 0.1:
            raise ValueError(f"it is truncated: {total} of {video.frames} frames, {end:.1f} of {length:.1f} s")
    return total


def _decode(name: str, stream: io.BufferedIOBase, positions: list[int], limits: dict):
    """Decode the frames at `positions`, and None; or fewer, and how many there are, where the video ends before the
    last."""
    frames, wanted, seen = [], set(positions), 0
    with _video_stream(stream, name) as (container, video):
        for frame in container.decode(video):
            if seen in wanted:
                _check(name, limits, pixels_a_frame=frame.width * frame.height)
                image = frame.to_image()
                turn = _turn(frame)
                frames.append(image if turn is None else image.transpose(turn))
            seen += 1
            if len(frames) == len(wanted):
                return frames, None
    return frames, seen


def _turn(frame) -> Image.Transpose | None:
    """Return what brings a frame upright: its display matrix turns and mirrors, by quarters. None: nothing does."""
    side = [part for part in frame.side_data if part.type.name == "DISPLAYMATRIX"]
    if not side:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side[0]))  # x becomes a x + c y, and y becomes b x + d y
    signs = (a > 0) - (a < 0), (b > 0) - (b < 0), (c > 0) - (c < 0), (d > 0) - (d < 0)
    return TURNS.get((signs[0], 0, 0, signs[3]) if abs(a) > abs(b) else (0, signs[1], signs[2], 0))

"""Small folders in the formats of upstream, which the tests of the builders write and break."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from datasets_scripts.reading.videos import read_frames


def write_lines(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_binary_features(folder: Path, items: Mapping[str, int], dim: int = 3, frames: bool = True) -> np.ndarray:
    """The released layout: items with so many frames; row r of `feature.bin` holds r, r + 0.25, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {item: [f"{item}_{i}" for i in range(count)] if frames else [item] for item, count in items.items()}
    rows = [name for names in ids.values() for name in names]
    matrix = np.arange(len(rows), dtype="<f4")[:, None] + np.arange(dim, dtype="<f4") / 4
    matrix.tofile(folder / "feature.bin")
    (folder / "shape.txt").write_text(f"{len(rows)} {dim}\n")
    (folder / "id.txt").write_text(" ".join(rows))
    if frames:
        (folder / "video2frames.txt").write_text(str(ids))
    return matrix


def write_released(folder: Path, collection: str, splits: Mapping[str, list[str]], language: str = "zh", k: int = 2):
    """Caption files of the released layout, with machine translation by "google"."""
    text = folder / "TextData"
    for split, items in splits.items():
        tags = {"": "enc", f"_{language}": language}
        tags |= {f"_google_{tag}": tag for tag in (f"enc2{language}", f"enc2{language}2enc", f"{language}2enc")}
        for name, tag in tags.items():
            lines = [f"{item}#{tag}#{i} {tag} of {item} {i}" for item in items for i in range(k)]
            write_lines(text / f"{collection}{split}{name}.caption.txt", lines)


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def colours(count: int, size: tuple[int, int] = (32, 24)) -> list[Image.Image]:
    """Plain pictures, each of its own grey: frame i of n has the value 255 i / (n - 1)."""
    return [Image.new("RGB", size, (255 * i // max(count - 1, 1),) * 3) for i in range(count)]


def write_webp(path: Path, count: int, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = colours(count, size)
    first.save(path, save_all=True, append_images=others, duration=40, lossless=True)
    return path


def write_video(path: Path, count: int, size: tuple[int, int] = (32, 24), codec: str = "mpeg4") -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for image in colours(count, size):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def greys(video, **limits) -> list[int]:
    """The mean value of each frame that is read."""
    return [round(np.asarray(frame.convert("L")).mean()) for frame in read_frames(video, **limits)]

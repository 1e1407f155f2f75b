"""
Pre-extracted visual features, memory-mapped: the released layout (`feature.bin`), `.npy` arrays with an id file, and
the shards that `nrccr features` writes. What is not asked for is not read.

    features = open_features("FeatureData/i3d")
    features["video7"]      # float32, of shape (num_frames, dim)
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.features.features import register_feature
from datasets.table import array_cast
from safetensors import SafetensorError, safe_open


FLOAT32 = np.dtype("<f4")
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ENTRY = re.compile(rf"\s*({_STRING}\s*:\s*[\[(]\s*(?:{_STRING}\s*,?\s*)*[\])])\s*(?:,|$)")


def read_ids(file: Path) -> list[str]:
    """Read ids separated by white space. Raises ValueError where one is there twice."""
    try:
        ids = file.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    if len(set(ids)) != len(ids):
        seen = set()
        twice = next(name for name in ids if name in seen or seen.add(name))
        raise ValueError(f"{file}: the id {twice!r} occurs twice")
    return ids


def read_frame_ids(file: Path) -> Iterator[tuple[str, list[str]]]:
    """
    Yield the items of a `video2frames.txt` with the ids of their frames. It is one Python dict literal of many
    megabytes, evaluated entry by entry: the syntax tree of the whole would take fifty times its size.
    """
    text = file.read_text(encoding="utf-8").strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(f"{file} is no dict of item -> list of ids: it is not in braces")
    body, position = text[1:-1].strip(), 0
    while position < len(body):
        entry = _ENTRY.match(body, position)
        if entry is None:
            raise ValueError(
                f"{file} is no dict of item -> list of ids: {body[position : position + 60]!r} is no entry"
            )
        ((item, ids),) = ast.literal_eval(f"{{{entry[1]}}}").items()
        if not ids:
            raise ValueError(f"{file}: {item!r} has no frames")
        yield item, ids
        position = entry.end()


class FeatureReader:
    """Features by id. `dim`: their width; `path`: the folder, for messages."""

    path: Path
    dim: int

    def ids(self) -> Iterable[str]:
        raise NotImplementedError

    def __contains__(self, item: str) -> bool:
        raise NotImplementedError

    def _read(self, item: str) -> np.ndarray:
        raise NotImplementedError

    def __getitem__(self, item: str) -> np.ndarray:
        """Read an item's features, float32, of shape `(num_frames, dim)`."""
        if item not in self:
            raise KeyError(f"{self.path} has no features of {item!r}")
        feats = np.array(self._read(item), dtype=np.float32, ndmin=2)
        if not len(feats):
            raise ValueError(f"{self.path}: {item!r} has no frames; extract its features again, or leave it out")
        return feats


class BinaryFeatures(FeatureReader):
    """
    The released layout: `feature.bin` (float32, row-major), `shape.txt` (rows, width), `id.txt` (an id a row) and,
    where an item has several rows (frames), `video2frames.txt`, a Python dict literal of the ids of each item's rows.
    """

    def __init__(self, path: Path):
        self.path = path
        rows, self.dim = self._shape(path / "shape.txt")
        binary = path / "feature.bin"
        size, expected = binary.stat().st_size, rows * self.dim * FLOAT32.itemsize
        if size != expected:
            what = "is truncated" if size < expected else "is too long, or its rows have another width"
            raise ValueError(
                f"{binary} {what}: {size} bytes, but shape.txt says {rows} rows of width {self.dim}, which are "
                f"{expected} bytes; fetch the folder again"
            )
        ids = read_ids(path / "id.txt")
        if len(ids) != rows:
            raise ValueError(f"{path / 'id.txt'} has {len(ids)} ids, but shape.txt says {rows} rows")
        self.matrix = np.memmap(binary, dtype=FLOAT32, mode="r", shape=(rows, self.dim))
        row_of = {name: row for row, name in enumerate(ids)}
        frames = path / "video2frames.txt"
        self.rows = self._frames(frames, row_of) if frames.exists() else row_of

    @staticmethod
    def _shape(file: Path) -> tuple[int, int]:
        text = file.read_text(encoding="utf-8").split()
        if len(text) != 2 or not all(part.isdecimal() and int(part) for part in text):
            raise ValueError(f"{file} holds {' '.join(text)!r}, not two numbers: rows and width")
        return int(text[0]), int(text[1])

    @staticmethod
    def _frames(file: Path, row_of: dict[str, int]) -> dict[str, range | list[int]]:
        rows = {}
        for item, ids in read_frame_ids(file):
            if unknown := next((name for name in ids if name not in row_of), None):
                raise ValueError(f"{file}: frame {unknown!r} of {item!r} is not in id.txt")
            numbers = [row_of[name] for name in ids]
            run = range(numbers[0], numbers[0] + len(numbers))
            rows[item] = run if numbers == list(run) else numbers  # runs are the rule, and small
        return rows

    def ids(self) -> Iterable[str]:
        return self.rows

    def __contains__(self, item: str) -> bool:
        return item in self.rows

    def _read(self, item: str) -> np.ndarray:
        rows = self.rows[item]
        return self.matrix[rows.start : rows.stop] if isinstance(rows, range) else self.matrix[rows]


class ArrayFeatures(FeatureReader):
    """
    `.npy` arrays of shape `(rows, dim)` or `(rows, num_frames, dim)`, each with a text file of its rows' ids:
    `X.id.txt` for `X.npy`, or as released: `train_id.txt` for `train-resnet152-avgpool.npy`, `test_id_2016.txt` for
    `test_2016_flickr-resnet152-avgpool.npy`, `id.txt` for the only one.
    """

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        self.arrays, self.places = [], {}
        for file in files:
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{file} is not readable as an array of numbers: {error}") from error
            if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"{file} has shape {array.shape} of {array.dtype}, not (rows, width) of floats")
            self.dim = getattr(self, "dim", array.shape[-1])
            if array.shape[-1] != self.dim:
                raise ValueError(f"{file} has rows of width {array.shape[-1]}, {files[0].name} of width {self.dim}")
            id_file = self._id_file(file, len(files))
            ids = read_ids(id_file)
            if len(ids) != len(array):
                raise ValueError(f"{id_file} has {len(ids)} ids, but {file.name} has {len(array)} rows")
            self.places |= {name: (len(self.arrays), row) for row, name in enumerate(ids)}
            self.arrays.append(array)

    @staticmethod
    def _id_file(file: Path, count: int) -> Path:
        prefix = file.stem.split("-")[0]  # train-resnet152-avgpool, test_2016_flickr-resnet152-avgpool
        split, _, rest = prefix.partition("_")
        names = [f"{file.stem}.id.txt", f"{prefix}_id.txt", f"{split}_id_{rest.split('_')[0]}.txt"]
        names += ["id.txt"] if count == 1 else []
        for name in names:
            if (file.parent / name).exists():
                return file.parent / name
        raise ValueError(f"{file} has no file with the ids of its rows: one of {', '.join(names)} in its folder")

    def ids(self) -> Iterable[str]:
        return self.places

    def __contains__(self, item: str) -> bool:
        return item in self.places

    def _read(self, item: str) -> np.ndarray:
        array, row = self.places[item]
        return self.arrays[array][row]


class ShardFeatures(FeatureReader):
    """
    Shards of `nrccr features`: safetensors with `visual_feats` (all frames, dim), and the items' ids and
    frame counts in their header; or Parquet with the columns `image_id` and `visual_feats`.
    """

    def __init__(self, path: Path, files: list[Path]):
        self.path, self.files, self.places, self.open = path, files, {}, {}
        for shard, file in enumerate(files):
            try:
                dim, items = read_shard_index(file)
            except (SafetensorError, pa.ArrowException, KeyError, ValueError, OSError) as error:
                raise ValueError(f"{file} is no shard of nrccr features: {error}; remove it") from error
            self.dim = getattr(self, "dim", dim)
            if dim != self.dim:
                raise ValueError(f"{file} has rows of width {dim}, {files[0].name} of width {self.dim}")
            for item, place in items.items():
                if item in self.places:
                    other = files[self.places[item][0]]
                    raise ValueError(f"{file}: {item!r} is in {other.name} too; remove one of the two shards")
                self.places[item] = (shard, place)

    def ids(self) -> Iterable[str]:
        return self.places

    def __contains__(self, item: str) -> bool:
        return item in self.places

    def _read(self, item: str) -> np.ndarray:
        shard, place = self.places[item]
        file = self.files[shard]
        if file.suffix == ".safetensors":
            if shard not in self.open:
                self.open[shard] = safe_open(file, "np").get_slice("visual_feats")
            return self.open[shard][place[0] : place[1]] if place[0] < place[1] else np.empty((0, self.dim))
        if shard not in self.open:
            self.open[shard] = pq.ParquetFile(file, memory_map=True)
        group, row = place
        column = self.open[shard].read_row_group(group, columns=["visual_feats"])["visual_feats"]
        return np.reshape(column[row].as_py(), (-1, self.dim))

    def __getstate__(self):
        return self.__dict__ | {"open": {}}  # handles stay with their process


def read_shard_index(file: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Read the width of a shard, and where each item lies: rows `(start, end)`, or `(row group, row)`."""
    if file.suffix == ".safetensors":
        with safe_open(file, "np") as shard:
            metadata, (rows, dim) = shard.metadata() or {}, shard.get_slice("visual_feats").get_shape()
        ids, counts = json.loads(metadata["image_ids"]), json.loads(metadata["num_frames"])
        ends = np.cumsum(counts).tolist()
        if len(ids) != len(counts) or (ends or [0])[-1] != rows:
            raise ValueError(f"its header names {len(ids)} items, {sum(counts)} frames; it holds {rows}")
        return dim, {item: (end - count, end) for item, end, count in zip(ids, ends, counts)}
    shard = pq.ParquetFile(file, memory_map=True)
    items = {}
    for group in range(shard.num_row_groups):
        ids = shard.read_row_group(group, columns=["image_id"])["image_id"].to_pylist()
        items |= {item: (group, row) for row, item in enumerate(ids)}
    return int(shard.schema_arrow.metadata[b"dim"]), items


@lru_cache(maxsize=16)
def _open(path: str) -> FeatureReader:
    folder = Path(path)
    if (folder / "feature.bin").exists() or (folder / "shape.txt").exists():
        for name in ("feature.bin", "shape.txt", "id.txt"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} has no {name}: fetch the folder again")
        return BinaryFeatures(folder)
    if shards := sorted(file for file in folder.glob("*") if file.suffix in (".safetensors", ".parquet")):
        return ShardFeatures(folder, shards)
    if arrays := sorted(folder.glob("*.npy")):
        return ArrayFeatures(folder, arrays)
    raise FileNotFoundError(
        f"{folder} holds no features: feature.bin with shape.txt and id.txt, .npy arrays with their ids, or shards of "
        "nrccr features (safetensors, Parquet) are read"
    )


def open_features(path: str | Path) -> FeatureReader:
    """
    Open the features by id of a folder in any of the layouts of this module. A folder is opened once a process.

    Raises:
        FileNotFoundError: it holds no features.
        ValueError: a file is broken, or does not fit the others; the message names it.
    """
    return _open(str(Path(path).expanduser().resolve()))


def sample_positions(total: int, count: int) -> list[int]:
    """Choose `count` of `total` frames, uniformly: the middle one of each of `count` equal parts; all if there are
    fewer."""
    if total <= count:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass
class VisualFeats:
    """
    Column of `datasets`: a row holds where its features lie (folder and id); reading the row reads them, as float32 of
    shape `(num_frames, dim)`. Parquet and Arrow hold the reference only.

    Args:
        max_frames (`int`, defaults to 0): of longer sequences, so many frames, sampled uniformly; 0: all.
    """

    max_frames: int = 0
    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "float32"
    pa_type: ClassVar[Any] = pa.struct({"path": pa.string(), "id": pa.string()})
    _type: str = field(default="VisualFeats", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: dict) -> dict:
        if not isinstance(value, dict) or value.keys() != {"path", "id"}:
            raise ValueError(f"visual_feats holds where features lie, {{'path', 'id'}}, not {type(value).__name__}")
        return value

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return array_cast(storage, self.pa_type)

    def decode_example(self, value: dict, token_per_repo_id=None) -> np.ndarray:
        feats = open_features(value["path"])[value["id"]]
        if self.max_frames and len(feats) > self.max_frames:
            feats = feats[sample_positions(len(feats), self.max_frames)]
        return feats


with warnings.catch_warnings():  # "experimental": that is how a column type of one's own is made known
    warnings.simplefilter("ignore", UserWarning)
    register_feature(VisualFeats, "VisualFeats")

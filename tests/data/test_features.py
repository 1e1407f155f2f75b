"""Pre-extracted features in every layout: what is read, and what is refused, by name."""

import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from datasets_scripts.reading.features import VisualFeats, open_features, sample_positions
from tests.support.upstream_formats import write_binary_features, write_lines


def test_the_released_layout(tmp_path):
    matrix = write_binary_features(tmp_path / "f", {"a": 2, "b": 1, "c": 3})
    features = open_features(tmp_path / "f")
    assert features.dim == 3 and list(features.ids()) == ["a", "b", "c"] and "d" not in features
    np.testing.assert_array_equal(features["c"], matrix[3:])
    (tmp_path / "f/video2frames.txt").write_text(
        "{'a': ['c_2', 'a_0'], \"b's\": ('b_0',),\n}"
    )  # any order, any quotes
    write_binary_features(tmp_path / "g", {"x": 1, "y": 1}, frames=False)
    np.testing.assert_array_equal(open_features(tmp_path / "g")["y"], [[1, 1.25, 1.5]])
    (tmp_path / "h").mkdir()
    for name in ("feature.bin", "shape.txt", "id.txt", "video2frames.txt"):
        (tmp_path / "h" / name).write_bytes((tmp_path / "f" / name).read_bytes())
    other = open_features(tmp_path / "h")
    np.testing.assert_array_equal(other["a"], matrix[[5, 0]])
    assert list(other.ids()) == ["a", "b's"]
    with pytest.raises(KeyError, match="has no features of 'c'"):
        other["c"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("feature.bin", b"\0" * 70, r"feature\.bin is truncated: 70 bytes, but shape.txt says 6 rows of width 3"),
        ("feature.bin", b"\0" * 96, r"feature\.bin is too long, or its rows have another width: 96 bytes"),
        ("shape.txt", b"6 4\n", r"feature\.bin is truncated"),
        ("shape.txt", b"six 3\n", r"shape\.txt holds 'six 3', not two numbers"),
        ("id.txt", b"a b c", r"id\.txt has 3 ids, but shape\.txt says 6 rows"),
        ("id.txt", b"a b c d a e", r"id\.txt: the id 'a' occurs twice"),
        ("id.txt", b"a b c d e \xff", r"id\.txt is not UTF-8"),
        ("video2frames.txt", b"{'a': ['a_0', 'a_9']}", r"video2frames\.txt: frame 'a_9' of 'a' is not in id\.txt"),
        ("video2frames.txt", b"{'a': []}", r"video2frames\.txt: 'a' has no frames"),
        ("video2frames.txt", b"{'a': __import__('os').getcwd()}", r"video2frames\.txt is no dict .* is no entry"),
        ("video2frames.txt", b"['a_0']", r"it is not in braces"),
    ],
)
def test_a_broken_folder_names_the_file(tmp_path, name, content, message):
    write_binary_features(tmp_path, {"a": 2, "b": 1, "c": 3})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_features(tmp_path)


def test_arrays_with_their_ids(tmp_path):
    train, test = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 4, 3), np.float16)
    np.save(tmp_path / "train-resnet152-avgpool.npy", train)
    np.save(tmp_path / "test_2016_flickr-resnet152-avgpool.npy", test)
    write_lines(tmp_path / "train_id.txt", ["a", "b"])
    write_lines(tmp_path / "test_id_2016.txt", ["c"])
    features = open_features(tmp_path)
    np.testing.assert_array_equal(features["b"], [[3, 4, 5]])
    assert features["c"].shape == (4, 3) and features["c"].dtype == np.float32


@pytest.mark.parametrize(
    "array, ids, message",
    [
        (np.ones((2, 3), np.float32), ["a"], r"x\.id\.txt has 1 ids, but x\.npy has 2 rows"),
        (np.ones((2, 3), np.int64), ["a", "b"], r"x\.npy has shape \(2, 3\) of int64"),
        (np.array([{}], dtype=object), ["a"], r"x\.npy is not readable as an array of numbers"),
        (np.ones((2, 3), np.float32), None, r"x\.npy has no file with the ids of its rows: one of x\.id\.txt"),
    ],
)
def test_broken_arrays(tmp_path, array, ids, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    if ids:
        write_lines(tmp_path / "x.id.txt", ids)
    with pytest.raises(ValueError, match=message):
        open_features(tmp_path)
    if ids == ["a", "b"]:
        return
    np.save(tmp_path / "y.npy", np.ones((1, 7), np.float32))
    write_lines(tmp_path / "y.id.txt", ["c"])
    np.save(tmp_path / "x.npy", np.ones((1, 3), np.float32))
    write_lines(tmp_path / "x.id.txt", ["a"])
    with pytest.raises(ValueError, match=r"y\.npy has rows of width 7, x\.npy of width 3"):
        open_features(tmp_path)


def test_100_gigabytes_cost_no_memory(tmp_path):
    """A sparse file; id lists as long as those of real sets are measured in docs/datasets.md."""
    rows, dim = 1000, 25_000_000
    with (tmp_path / "feature.bin").open("wb") as file:
        file.truncate(rows * dim * 4)
    (tmp_path / "shape.txt").write_text(f"{rows} {dim}")
    (tmp_path / "id.txt").write_text(" ".join(f"v{i}" for i in range(rows)))
    program = f"""
import resource
from datasets_scripts.reading.features import open_features
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
features = open_features({str(tmp_path)!r})
assert features["v999"].shape == (1, {dim}) and features["v500"][0, 5] == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 20_000  # kilobytes


def test_a_column_holds_references_and_reads_features(tmp_path):
    write_binary_features(tmp_path / "f", {"a": 5, "b": 1})
    types = datasets.Features({"name": datasets.Value("string"), "visual_feats": VisualFeats(max_frames=2)})
    place = {"path": str(tmp_path / "f")}
    rows = [{"name": name, "visual_feats": place | {"id": name}} for name in "ab"] + [
        {"name": "c", "visual_feats": None}
    ]
    dataset = datasets.Dataset.from_list(rows, features=types)
    np.testing.assert_array_equal(dataset[0]["visual_feats"][:, 0], [1, 3])
    assert dataset[1]["visual_feats"].shape == (1, 3) and dataset[2]["visual_feats"] is None
    dataset.to_parquet(tmp_path / "x.parquet")
    assert pq.read_table(tmp_path / "x.parquet")["visual_feats"][0].as_py() == place | {"id": "a"}
    again = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(again[0]["visual_feats"], dataset[0]["visual_feats"])
    with pytest.raises(ValueError, match="visual_feats holds where features lie"):
        types["visual_feats"].encode_example(np.ones((2, 3)))


def test_frames_are_sampled_from_the_middle_of_equal_parts():
    assert sample_positions(10, 2) == [2, 7] and sample_positions(9, 3) == [1, 4, 7]
    assert sample_positions(2, 8) == [0, 1] and len(set(sample_positions(101, 100))) == 100


def test_shards_survive_pickling_and_refuse_what_is_none(tmp_path):
    header = {"image_ids": '["a", "b"]', "num_frames": "[2, 1]"}
    feats = np.arange(9, dtype=np.float32).reshape(3, 3)
    save_file({"visual_feats": feats}, tmp_path / "features-00000.safetensors", metadata=header)
    column = pa.array([feats[:1].tolist()], pa.list_(pa.list_(pa.float32())))
    table = pa.table({"image_id": ["c"], "visual_feats": column}).replace_schema_metadata({"dim": "3"})
    pq.write_table(table, tmp_path / "features-00001.parquet")
    features = open_features(tmp_path)
    np.testing.assert_array_equal(features["b"], feats[2:])
    again = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(again["a"], feats[:2])
    np.testing.assert_array_equal(again["c"], feats[:1])
    for i, (broken, message) in enumerate(
        [
            ({"image_ids": '["d"]', "num_frames": "[2]"}, "its header names 1 items, 2 frames; it holds 3"),
            ({}, r"features-00002\.safetensors is no shard"),
            (header, "'a' is in features-00000.safetensors too"),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({"visual_feats": feats}, folder / "features-00000.safetensors", metadata=header)
        save_file({"visual_feats": feats}, folder / "features-00002.safetensors", metadata=broken)
        with pytest.raises(ValueError, match=message):
            open_features(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no features"):
        open_features(tmp_path / "none")

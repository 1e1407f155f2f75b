"""VATEX: official JSON and the released layout, splits by id lists, and what broken files say."""

import datasets
import numpy as np
import pytest

from datasets_scripts.vatex import Vatex
from tests.support.upstream_formats import (
    write_binary_features,
    write_json,
    write_lines,
    write_released,
    write_webp,
)


TRAINING, VALIDATION = "vatex_training_v1.0.json", "vatex_validation_v1.0.json"


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def videos(*items: str, k: int = 2) -> list[dict]:
    return [
        {
            "videoID": item,
            "enCap": [f"a {item} {i}" for i in range(k)],
            "chCap": [f"一个 {item} {i}" for i in range(k)],
        }
        for item in items
    ]


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "vatex"
    write_json(folder / TRAINING, videos("t1_000001_000011", "t2_000001_000011"))
    write_json(folder / VALIDATION, videos("v1", "v2", "v3"))
    return folder


def build(folder, **options):
    options.setdefault("config_name", "zh")
    builder = Vatex(data_dir=folder, cache_dir=folder.parent / "cache", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_official_files_without_id_lists_have_no_test_split(official, capsys):
    dataset = build(official)
    assert [len(dataset[split]) for split in ("train", "validation", "test")] == [4, 6, 0]
    out = capsys.readouterr().out
    assert "no id lists of validation and test" in out and "no test split" in out
    assert "train 2 videos, 4 captions (expected 25,991)" in out
    row = dataset["train"][1]
    assert row.pop("video") is None
    assert row == {
        "image_id": "t1_000001_000011",
        "caption_id": "t1_000001_000011#enc#1",
        "source_caption": "a t1_000001_000011 1",
        "target_caption": None,
        "back_translation": None,
        "source_language": "en",
        "target_language": "zh",
        "target_origin": None,
        "reference_source_caption": None,
    }


def test_human_captions_and_english_stay_where_they_belong(official):
    (official / "validation_ids.txt").write_text("v1\n")
    np.save(official / "tst_names.npy", np.array(["v3.mp4", "v2.mp4"]))
    dataset = build(official)
    assert set(dataset["test"]["image_id"]) == {"v2", "v3"} and set(dataset["validation"]["image_id"]) == {"v1"}
    row = dataset["test"][0]
    assert (row["source_caption"], row["target_caption"], row["target_origin"]) == (None, "一个 v2 0", "human")
    assert row["reference_source_caption"] == "a v2 0" and row["caption_id"] == "v2#zh#0"
    human = build(official, target="human")
    assert human["train"][0]["target_caption"] == "一个 t1_000001_000011 0"
    assert human["train"][0]["source_caption"] == "a t1_000001_000011 0"


def test_the_released_layout_with_its_translations(tmp_path):
    folder = tmp_path / "vatex"
    write_released(folder, "vatex", {"train": ["t1", "t2"], "val": ["v1"], "test": ["x1"]})
    matrix = write_binary_features(folder / "FeatureData/i3d_kinetics", {"t1": 2, "t2": 1, "v1": 3, "x1": 1})
    dataset = build(folder)
    row = dataset["train"][3]
    np.testing.assert_array_equal(row["visual_feats"], matrix[2:3])
    assert (row["source_caption"], row["target_caption"]) == ("enc of t2 1", "enc2zh of t2 1")
    assert (row["back_translation"], row["target_origin"]) == ("enc2zh2enc of t2 1", "google")
    row = dataset["test"][0]
    assert (row["source_caption"], row["target_caption"]) == ("zh2enc of x1 0", "zh of x1 0")
    assert (row["reference_source_caption"], row["target_origin"]) == ("enc of x1 0", "human")
    human = build(folder, target="human")["train"][0]
    assert (human["target_caption"], human["target_origin"], human["back_translation"]) == (
        "zh of t1 0",
        "human",
        None,
    )
    # what is read is decided by the files, not by an earlier run
    write_released(folder, "vatex", {"train": ["t1"], "val": ["v1"], "test": ["x1"]})
    assert len(build(folder)["train"]) == 2


def test_streaming_and_parquet(official, tmp_path):
    write_binary_features(
        official / "FeatureData/i3d", {item: 1 for item in ("t1_000001_000011", "t2_000001_000011", "v1", "v2", "v3")}
    )
    builder = Vatex(config_name="zh", data_dir=official, cache_dir=tmp_path / "cache")
    rows = list(builder.as_streaming_dataset()["validation"])
    assert len(rows) == 6 and rows[0]["visual_feats"].shape == (1, 3)
    builder.download_and_prepare(tmp_path / "parquet", file_format="parquet")
    table = datasets.Dataset.from_parquet(
        str(next((tmp_path / "parquet").glob("*train*.parquet"))), cache_dir=str(tmp_path / "c")
    )
    assert table[0]["caption_id"] == "t1_000001_000011#enc#0" and table[0]["visual_feats"].shape == (1, 3)


def test_videos_from_a_folder(official, tmp_path):
    for name in ("t1_000001_000011", "v1", "v2", "v3"):
        write_webp(official / "videos/some" / f"{name}.webp", 2)
        (official / "videos/some" / f"._{name}.mp4").touch()  # macOS keeps there what other systems have no place for
    with pytest.raises(
        ValueError, match=r"vatex_training_v1\.0\.json, caption t2_000001_000011#0: .* has no video in"
    ):
        build(official)
    dataset = build(official, missing="skip")
    assert [len(dataset[split]) for split in ("train", "validation")] == [2, 6]
    assert dataset["train"][0]["video"]["path"].endswith("videos/some/t1_000001_000011.webp")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no video of any of the 5 items"):
        build(official, media_dir=empty, missing="skip")


@pytest.mark.parametrize(
    "name, lines, message",
    [
        ("train", ["t1#enc#0 a", "t1#enc#0 b"], r"train\.caption\.txt, line 2: caption t1#0 is there already: .*1"),
        ("train", ["t1#enc#0 a", "t1#enc#1"], r"train\.caption\.txt, line 2: caption t1#1 has no text"),
        ("train", ["t1#enc#0 a", ""], r"train\.caption\.txt, line 2: '' is no caption id"),
        ("train", ["t1 a"], r"train\.caption\.txt, line 1: 't1' is no caption id"),
        ("train", ["t1#zh#0 a"], "line 1: t1#zh#0 is of 'zh', the file's name says enc or en"),
        ("train_google_enc2zh", ["t1#zh#0 a", ""], r"line 1: t1#zh#0 is of 'zh', the file's name says enc2zh"),
        ("train_google_enc2zh", ["t1#enc2zh#0 a"], r"enc2zh\.caption\.txt has no t1#enc2zh#1, which .*, line 2"),
        ("test_zh", [], r"vatextest_zh\.caption\.txt is empty"),
        ("test_zh", ["y1#zh#0 a"], r"vatextest_google_zh2enc\.caption\.txt has no y1#zh2enc#0"),
    ],
)
def test_broken_caption_files_name_file_and_line(tmp_path, name, lines, message):
    folder = tmp_path / "vatex"
    write_released(folder, "vatex", {"train": ["t1"], "val": ["v1"], "test": ["x1"]})
    write_lines(folder / f"TextData/vatex{name}.caption.txt", lines)
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_wrong_encoding_and_missing_features_name_file_and_line(tmp_path):
    folder = tmp_path / "vatex"
    write_released(folder, "vatex", {"train": ["t1", "t2"], "val": ["v1"], "test": ["x1"]})
    write_binary_features(folder / "FeatureData/i3d", {"t1": 2, "v1": 3, "x1": 1})
    with pytest.raises(ValueError, match=r"train\.caption\.txt, line 3: t2 has no features in .*i3d"):
        build(folder)
    assert len(build(folder, missing="skip")["train"]) == 2
    assert len(build(folder, visual_feature="none")["train"]) == 4
    write_binary_features(folder / "FeatureData/resnet", {"t1": 2})
    with pytest.raises(ValueError, match="several features: i3d, resnet; choose one by visual_feature="):
        build(folder)
    with pytest.raises(FileNotFoundError, match="i3e is no folder of features"):
        build(folder, visual_feature="i3e")
    file = folder / "TextData/vatextest_zh.caption.txt"
    file.write_bytes(file.read_bytes() + "x1#zh#7 中文\n".encode("gb18030"))
    with pytest.raises(ValueError, match=r"vatextest_zh\.caption\.txt, line 3: not UTF-8"):
        build(folder, visual_feature="none")


def test_several_engines_or_collections_must_be_chosen_from(tmp_path):
    folder = tmp_path / "vatex"
    write_released(folder, "vatex", {"train": ["t1"], "val": ["v1"], "test": ["x1"]})
    write_lines(folder / "TextData/vatextrain_baidu_enc2zh.caption.txt", ["t1#enc2zh#0 b0", "t1#enc2zh#1 b1"])
    with pytest.raises(ValueError, match="several engines: baidu, google; choose one by engine="):
        build(folder)
    row = build(folder, engine="baidu")["train"][0]
    assert (row["target_caption"], row["target_origin"], row["back_translation"]) == ("b0", "baidu", None)
    write_released(folder, "small", {"train": ["t1"]})
    with pytest.raises(ValueError, match="several collections: small, vatex"):
        build(folder, engine="google")
    assert len(build(folder, engine="google", collection="vatex")["test"]) == 2


@pytest.mark.parametrize(
    "name, data, message",
    [
        (TRAINING, [{"videoID": "a", "enCap": ["x"]}], r"training_v1\.0\.json, \[0\] has no 'chCap'"),
        (TRAINING, {}, "is no list of videos"),
        (VALIDATION, videos("a", "a"), r"vatex_validation_v1\.0\.json, \[1\]: a is there already"),
        (VALIDATION, [{"videoID": "a", "enCap": [" "], "chCap": []}], r"\[0\]: caption a#0 has no text"),
        (VALIDATION, [{"videoID": "a", "enCap": "words", "chCap": []}], r"\[0\], enCap: must be a list.*words"),
        (VALIDATION, [{"videoID": "a", "enCap": [], "chCap": None}], r"\[0\], chCap: must be a list of texts.*None"),
        (VALIDATION, [{"videoID": "a", "enCap": ["x", None], "chCap": []}], r"\[0\], enCap: must be a list of texts"),
    ],
)
def test_broken_official_files(official, name, data, message):
    write_json(official / name, data)
    with pytest.raises(ValueError, match=message):
        build(official)


def test_videos_in_no_list_are_told(official, capsys):
    (official / "validation_ids.txt").write_text("v1\n")
    (official / "test_ids.txt").write_text("v2.mp4\n")
    assert len(build(official)["test"]) == 2
    assert "1 of 3 items are in no split and left out, such as v3" in capsys.readouterr().out


def test_broken_json_lists_and_folders(official, tmp_path):
    (official / "validation_ids.txt").write_text("v1\n")
    (official / "test_ids.txt").write_text("v2\nv9\n")
    with pytest.raises(ValueError, match=r"test_ids\.txt, line 2: v9 is not in .*vatex_validation"):
        build(official)
    (official / "test_ids.txt").write_text("v2\nv1\n")
    with pytest.raises(ValueError, match=r"test_ids\.txt, line 2: v1 is in .*validation_ids\.txt too"):
        build(official)
    (official / "test_ids.txt").write_text("v2\nv2\n")
    with pytest.raises(ValueError, match=r"test_ids\.txt, line 2: v2 is in line 1 already"):
        build(official)
    file = official / TRAINING
    file.write_text('[\n{"videoID": ')
    with pytest.raises(ValueError, match=r"vatex_training_v1\.0\.json, line 2: no JSON"):
        build(official)
    file.write_bytes(b'[\n\n"\xff"]')
    with pytest.raises(ValueError, match=r"vatex_training_v1\.0\.json, line 3: not UTF-8"):
        build(official)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vatex_training\*\.json"):
        build(official)
    with pytest.raises(ValueError, match="Vatex needs data_dir, a folder with the released caption files"):
        Vatex(config_name="zh")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        Vatex(config_name="zh", data_dir=tmp_path / "nowhere")

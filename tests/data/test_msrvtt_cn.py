"""MSR-VTT-CN: official JSON with the released Chinese files, the released layout, and the two splits."""

import datasets
import numpy as np
import pytest

from datasets_scripts.msrvtt_cn import MsrvttCn
from tests.support.upstream_formats import write_binary_features, write_json, write_lines, write_released


SPLITS = {"train": ["video0", "video1"], "validate": ["video2"], "test": ["video3", "video4"]}


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def info(splits, sentences=2) -> dict:
    """As upstream: sentences in no order, `sen_id` unique in a file."""
    videos = [{"video_id": video, "split": split, "id": 0} for split, items in splits.items() for video in items]
    captions = [
        {"sen_id": 10 * k + i, "video_id": video["video_id"], "caption": f"{video['video_id']} says {k}."}
        for k in range(sentences)
        for i, video in enumerate(videos)
    ]
    return {"info": {}, "videos": videos, "sentences": captions[::-1]}


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "msrvtt"
    held_out = {split: SPLITS[split] for split in ("train", "validate")}
    write_json(folder / "train_val_videodatainfo.json", info(held_out))
    write_json(folder / "test_videodatainfo.json", info({"test": SPLITS["test"]}))
    for name, split in (("train", "train"), ("val", "validate"), ("test", "test")):
        lines = [f"{video}#zh#{k} {video} 说 {k}" for video in SPLITS[split] for k in range(2)]
        write_lines(folder / f"TextData/msrvtt10kcn{name}_zh.caption.txt", lines)
    return folder


def build(folder, config_name="zh", **options):
    builder = MsrvttCn(config_name=config_name, data_dir=folder, cache_dir=folder.parent / "cache", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_official_files(official, capsys):
    dataset = build(official)
    assert [len(dataset[split]) for split in ("train", "validation", "test")] == [4, 2, 4]
    assert "train 2 videos, 4 captions (expected 6,513)" in capsys.readouterr().out
    row = dataset["train"][1]
    assert (row["caption_id"], row["source_caption"], row["target_caption"]) == (
        "video0#enc#1",
        "video0 says 1.",
        None,
    )
    row = dataset["test"][3]
    assert (row["caption_id"], row["target_caption"]) == ("video4#zh#1", "video4 说 1")
    assert (row["source_caption"], row["reference_source_caption"]) == (None, "video4 says 1.")
    assert build(official, target="human")["train"][2]["target_caption"] == "video1 说 0"


def test_released_translations_beside_official_files_are_used(official):
    for tag in ("enc2zh", "enc2zh2enc"):
        lines = [f"{video}#{tag}#{k} {tag} {video} {k}" for video in SPLITS["train"] for k in range(2)]
        write_lines(official / f"TextData/msrvtt10kcntrain_google_{tag}.caption.txt", lines)
    row = build(official)["train"][3]
    assert (row["target_caption"], row["target_origin"]) == ("enc2zh video1 1", "google")
    assert row["back_translation"] == "enc2zh2enc video1 1"


def test_the_released_layout(tmp_path):
    folder = tmp_path / "msrvtt10kcn"
    write_released(folder, "msrvtt10kcn", {"train": ["video0"], "val": ["video2"], "test": ["video3"]})
    write_binary_features(folder / "FeatureData/resnext101-resnet152", {"video0": 2, "video2": 3, "video3": 70})
    dataset = build(folder)
    assert dataset["train"][0]["target_caption"] == "enc2zh of video0 0"
    feats = dataset["test"][0]["visual_feats"]
    assert feats.shape == (64, 3) and feats[0, 0] == 5  # of 70 frames: as many as the published head reads
    assert len(build(folder, max_frames=0)["test"][0]["visual_feats"]) == 70


def test_1ka_has_one_caption_a_video_and_leaves_the_rest_alone(official):
    write_lines(
        official / "MSRVTT_JSFUSION_test.csv",
        ["key,vid_key,video_id,sentence", "ret0,msr4,video4,Video4 says  1", 'ret1,msr3,video3,"video3, says 0"'],
    )
    dataset = build(official, "1ka-zh")
    assert dataset["test"]["caption_id"][:] == ["video3#zh#0", "video4#zh#1"]
    assert len(dataset["train"]) == 4 and len(dataset["validation"]) == 2
    write_lines(official / "MSRVTT_train.9k.csv", ["video_id", "video0", "video1", "video2"])
    dataset = build(official, "1ka-zh")
    assert len(dataset["train"]) == 6 and len(dataset["validation"]) == 0  # nothing is left of it


@pytest.mark.parametrize(
    "lines, message",
    [
        (["key,video_id,sentence", "0,video3,no such caption"], "'no such caption' of video3 is none of its captions"),
        (["key,video_id,sentence", "0,video3,video3 says 0", "1,video3,x"], "line 3: video3 is there already"),
        (["key,video", "0,video3"], "line 1: no column video_id, but key, video"),
        (
            ["key,video_id,sentence", "0,video0,video0 says 0"],
            "the training split: video0 is in .*JSFUSION_test.csv too",
        ),
    ],
)
def test_broken_lists(official, lines, message):
    write_lines(official / "MSRVTT_JSFUSION_test.csv", lines)
    with pytest.raises(ValueError, match=message):
        build(official, "1ka-zh")


def test_what_is_missing_is_named(official):
    with pytest.raises(FileNotFoundError, match=r"has no MSRVTT_JSFUSION_test\.csv or"):
        build(official, "1ka-zh")
    (official / "TextData/msrvtt10kcntest_zh.caption.txt").unlink()
    with pytest.raises(
        ValueError, match="has no zh captions of the test videos; MsrvttCn needs the released caption files"
    ):
        build(official)
    for file in (official / "TextData").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no Chinese captions \(\*train_zh"):
        build(official)
    for file in official.glob("*.json"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no captions; MsrvttCn needs"):
        build(official)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("sentences"), "is no videodatainfo with videos"),
        (lambda d: d["videos"][0].update(split="dev"), "is no videodatainfo .*'dev'"),
        (lambda d: d["sentences"][1].update(video_id="video9"), r"sentences\[1\] is of video9, which is not among"),
        (lambda d: d["sentences"][0].update(caption=" "), r"sentences\[0\]: caption video4#1 has no text"),
        (
            lambda d: d["sentences"].append(d["sentences"][0]),
            r"sentences\[4\]: sen_id 11 of video4 is that of sentences\[0\]",
        ),
    ],
)
def test_broken_official_files(official, change, message):
    data = info({"test": SPLITS["test"]})
    change(data)
    write_json(official / "test_videodatainfo.json", data)
    with pytest.raises(ValueError, match=rf"test_videodatainfo\.json.*{message}"):
        build(official)


def test_two_files_with_the_same_videos(official):
    write_json(official / "videodatainfo_2017.json", info({"train": ["video0"]}))
    with pytest.raises(ValueError, match=r"caption video0#\d is there already"):
        build(official)


def test_features_by_item_row(official):
    np.testing.assert_array_equal(
        write_binary_features(
            official / "FeatureData/clip", {v: 1 for vs in SPLITS.values() for v in vs}, frames=False
        )[4],
        build(official)["test"][2]["visual_feats"][0],
    )

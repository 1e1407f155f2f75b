"""MSCOCO: COCO-CN's text, STAIR's JSON, Karpathy's split, the released layout, pictures of 2014 and 2017."""

import datasets
import numpy as np
import pytest
from PIL import Image

from datasets_scripts.mscoco import Mscoco
from tests.support.upstream_formats import write_json, write_lines, write_released


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


PICTURES = {"train": (1, 2), "val": (3, 4)}


def name(part: str, number: int) -> str:
    return f"COCO_{part}2014_{number:012}"


def coco(part: str, caption: str, count: int = 2) -> dict:
    images = [{"id": number, "file_name": f"{name(part, number)}.jpg"} for number in PICTURES[part]]
    annotations = [
        {"id": 10 * number + k, "image_id": number, "caption": caption.format(number, k)}
        for k in range(count)
        for number in PICTURES[part]
    ]
    return {"images": images, "annotations": annotations[::-1]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "coco"
    for part in PICTURES:
        write_json(folder / f"annotations/captions_{part}2014.json", coco(part, "picture {} has {}\n"))
        write_json(folder / f"stair_captions_v1.2_{part}.json", coco(part, "写真{}の{}"))
    write_lines(folder / "coco-cn_train.txt", [name("train", 1), name("val", 4)])
    write_lines(folder / "coco-cn_val.txt", [name("train", 2)])
    write_lines(folder / "coco-cn_test.txt", [name("val", 3)])
    written = [
        f"{name('train', 1)}#0\t图 一",
        f"{name('val', 4)}#0\t图四",
        f"{name('train', 2)}#0\t图二",
        f"{name('val', 3)}#0\t图三",
        f"{name('val', 3)}#1\t又 图三",
    ]
    write_lines(folder / "imageid.human-written-caption.txt", written)
    return folder


def build(folder, language, **options):
    builder = Mscoco(config_name=language, data_dir=folder, cache_dir=folder.parent / "cache", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def test_coco_cn(folder, capsys):
    dataset = build(folder, "zh")
    assert [len(dataset[split]) for split in ("train", "validation", "test")] == [4, 1, 2]
    assert "train 2 images, 4 captions (expected 18,341)" in capsys.readouterr().out
    row = dataset["train"][0]
    assert (row["caption_id"], row["source_caption"]) == ("COCO_train2014_000000000001#enc#0", "picture 1 has 0")
    assert row["image"] is None and row["target_caption"] is None
    row = dataset["test"][1]
    assert (row["target_caption"], row["caption_id"]) == ("又 图三", "COCO_val2014_000000000003#zh#1")
    assert (row["source_caption"], row["reference_source_caption"]) == (None, "picture 3 has 1")
    human = build(folder, "zh", target="human")["train"]
    assert [(row["source_caption"], row["target_caption"]) for row in human] == [
        ("picture 1 has 0", "图 一"),
        ("picture 4 has 0", "图四"),
    ]


def test_stair_without_and_with_karpathys_split(folder, capsys):
    dataset = build(folder, "ja")
    assert [len(dataset[split]) for split in ("train", "validation", "test")] == [4, 4, 0]
    assert "there is no test split" in capsys.readouterr().out
    assert dataset["validation"][3]["target_caption"] == "写真4の1"
    splits = {"train": ("train", 1), "restval": ("val", 4), "val": ("train", 2), "test": ("val", 3)}
    images = [{"split": split, "filename": f"{name(*item)}.jpg"} for split, item in splits.items()]
    write_json(folder / "dataset_coco.json", {"images": images})
    dataset = build(folder, "ja")
    assert set(dataset["train"]["image_id"]) == {name("train", 1), name("val", 4)}
    assert set(dataset["test"]["image_id"]) == {name("val", 3)} and len(dataset["validation"]) == 2


def test_pictures_and_their_names_of_2017(folder):
    (folder / "images").mkdir()
    for number in (1, 2, 3, 4):
        file = f"{number:012}.jpg" if number > 2 else f"{name('train', number)}.jpg"
        Image.new("RGB", (4, 4), (0, 40 * number, 0)).save(folder / "images" / file)
    dataset = build(folder, "zh")
    assert np.asarray(dataset["test"][0]["image"])[0, 0, 1] == pytest.approx(120, abs=3)
    (folder / "images/000000000003.jpg").unlink()
    message = (
        r"captions_val2014\.json, caption COCO_val2014_000000000003#0: .*3 has no image in .*images, nor have 0 others"
    )
    with pytest.raises(ValueError, match=message):
        build(folder, "zh")


def test_arrays_of_the_released_layout(tmp_path):
    items = {"train": [name("train", 1)], "val": [name("train", 2)], "test": [name("val", 3)]}
    folder = tmp_path / "mscoco"
    write_released(folder, "mscoco", items, "ja")
    (folder / "TextData/mscocotrain.caption.txt").rename(folder / "TextData/mscocotrain_en.caption.txt")
    (folder / "TextData/mscocotest_ja.caption.txt").rename(folder / "TextData/mscocotest_ja_2016.caption.txt")
    for i, (split, ids) in enumerate(items.items()):
        (folder / "FeatureData/resnet_152").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"FeatureData/resnet_152/{split}-resnet_152-avgpool.npy", np.full((1, 3), i, np.float32))
        write_lines(folder / f"FeatureData/resnet_152/{split}_id.txt", ids)
    dataset = build(folder, "ja")
    row = dataset["train"][0]
    assert (row["target_caption"], row["visual_feats"].tolist()) == (f"enc2ja of {name('train', 1)} 0", [[0, 0, 0]])
    assert dataset["test"][0]["visual_feats"].tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("images"), "captions_val2014.json has no 'images'"),
        (lambda d: d["annotations"][0].update(image_id=9), r"annotations\[0\] is of picture 9, which is not among"),
        (
            lambda d: d["annotations"][0].update(caption=""),
            r"annotations\[0\]: caption COCO_val2014_0+4#1 has no text",
        ),
        (
            lambda d: d["annotations"].append(d["annotations"][0]),
            r"annotations\[4\]: id 41 is that of annotations\[0\]",
        ),
    ],
)
def test_broken_json(folder, change, message):
    data = coco("val", "picture {} has {}")
    change(data)
    write_json(folder / "annotations/captions_val2014.json", data)
    with pytest.raises(ValueError, match=message):
        build(folder, "zh")


def test_broken_coco_cn(folder):
    file = folder / "imageid.human-written-caption.txt"
    whole = file.read_text()
    for change, message in (
        (
            f"{name('val', 3)}#1\t再来\n",
            r"caption\.txt, line 6: caption COCO_val2014_0+3#1 is there already: .*line 5",
        ),
        (f"{name('val', 3)}#2\t\n", r"caption\.txt, line 6: caption .*#2 has no text"),
    ):
        file.write_text(whole + change)
        with pytest.raises(ValueError, match=message):
            build(folder, "zh")
    (folder / "coco-cn_test.txt").unlink()
    file.write_text(whole)
    with pytest.raises(FileNotFoundError, match=r"has no coco-cn_test\.txt"):
        build(folder, "zh")

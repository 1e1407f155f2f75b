"""A user's own CSV or JSONL of `image,caption` beside a folder of pictures."""

import csv
import gzip
import json
import logging
import os
import unicodedata

import datasets
import numpy as np
import pytest
from PIL import Image

from datasets_scripts.caption_files import CaptionFiles
from datasets_scripts.reading.splits import group_key, split_of
from modeling_nrccr.training import run as train
from modeling_nrccr.translation.base import Translator
from modeling_nrccr.translation.columns import add_translations
from modeling_nrccr.translation.engines import ENGINES
from tests.training.test_train_example import encoders  # noqa: F401


pytestmark = pytest.mark.usefixtures("no_bars")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    (root / "images" / "animals").mkdir(parents=True)
    for i, name in enumerate(["animals/fox.png", "animals/cat.jpg", "dog.png"]):
        Image.new("RGB", (5 + i, 4)).save(root / "images" / name)
    return root


ROWS = (
    'image,caption\nanimals/fox.png,"A fox, asleep."\nanimals/cat.jpg,A cat.\ndog.png,A  dog.\nanimals/fox.png,Fox\n'
)


def build(folder, text=None, name="captions.csv", **options):
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    builder = CaptionFiles(data_dir=folder, cache_dir=folder.parent / "cache", **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def all_rows(dataset):
    return {row["caption_id"]: row | {"split": split} for split in dataset for row in dataset[split]}


def test_csv(folder):
    rows = all_rows(build(folder, ROWS, source_language="en", target_language="sw"))
    assert sorted(rows) == [
        "pictures/animals/cat.jpg#0",
        "pictures/animals/fox.png#0",
        "pictures/animals/fox.png#1",
        "pictures/dog.png#0",
    ]
    for caption_id, caption, width in (("animals/fox.png#0", "A fox, asleep.", 5), ("dog.png#0", "A dog.", 7)):
        row = rows[f"pictures/{caption_id}"]
        is_train = row["split"] == "train"
        assert row["source_caption" if is_train else "reference_source_caption"] == caption
        assert row["reference_source_caption" if is_train else "source_caption"] is None
        assert (row["source_language"], row["target_language"], row["target_caption"]) == ("en", "sw", None)
        assert row["image"].size == (width, 4) and row["target_origin"] is None


def test_jsonl_with_human_captions_and_splits(folder, capsys):
    lines = [
        {
            "file_name": "animals/fox.png",
            "caption": "A fox.",
            "target_caption": "Un raposo.",
            "split": "train",
            "n": 1,
        },
        {"file_name": "dog.png", "caption": "A dog.", "target_caption": "Un can.", "split": "dev", "caption_id": "d"},
        {"file_name": "animals/cat.jpg", "caption": "A cat.", "split": "test"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    dataset = build(folder, text, "metadata.jsonl")
    assert "metadata.jsonl: columns that are not read: n" in capsys.readouterr().out
    assert dataset["train"][0]["target_caption"] is None and dataset["train"][0]["target_origin"] is None
    (row,) = dataset["validation"]
    assert row["target_caption"] == "Un can." and row["source_caption"] is None and row["caption_id"] == "d"
    assert row["target_origin"] == "human" and row["reference_source_caption"] == "A dog."
    assert dataset["test"][0]["target_caption"] is None
    human = build(folder, target="human")
    assert human["train"][0]["target_caption"] == "Un raposo."
    lines[0].pop("target_caption")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: no target_caption, which target='human'"):
        build(folder, "\n".join(map(json.dumps, lines)), "metadata.jsonl", target="human")


def test_splits_keep_groups_and_pictures_together(folder):
    rows = [("image", "caption", "group")]
    for i in range(60):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(folder / f"{i}.png")
        rows += [(f"{i}.png", f"thing {i}", f"g{i // 2}" if i >= 40 else ""), (f"{i}.png", f"pair {i % 20}", "")]
    text = "\n".join(map(",".join, rows))
    splits = []
    for seed in (0, 1):
        dataset = build(folder, text, seed=seed)
        side = {}
        for caption_id, row in all_rows(dataset).items():
            number = int(caption_id.split("/")[1].split(".")[0])
            side.setdefault(number, set()).add(row["split"])
        assert len(side) == 60 and all(len(of_picture) == 1 for of_picture in side.values())
        for i in range(20):  # "pair 3" is said of 3, 23 and 43, and 43 is in a group with 42
            assert side[i] == side[i + 20] == side[i + 40]
            assert side[i + 40] == side[(i ^ 1) + 40]
        assert {name: len(dataset[name]) > 0 for name in dataset} == dict.fromkeys(
            ("train", "validation", "test"), True
        )
        splits.append(side)
    assert splits[0] != splits[1]


def test_a_lone_caption_falls_where_other_builders_put_it(folder):
    for seed in range(4):
        for row in all_rows(build(folder, ROWS.rsplit("animals/fox", 1)[0], seed=seed)).values():
            caption = row["source_caption"] or row["reference_source_caption"]
            assert row["split"] == split_of(group_key(caption), seed)


BROKEN = [
    ("image,text\nfox.png,x\n", r"captions\.csv, line 2: no column 'caption'; it has 'image', 'text'"),
    ("image;caption\nfox.png;x\n", r"line 2: no column 'image'; it has 'image;caption'"),
    ("image,caption\n", r"captions\.csv has no rows"),
    ("", r"captions\.csv has no rows"),
    ("image,caption\ndog.png,x\ndog.png, \n", r"captions\.csv, line 3: caption is empty"),
    ("image,caption\ndog.png,a dog, asleep\n", r"line 2: more fields than the first line has.*in quotes"),
    ("image,caption\ndog.png\n", r"line 2: fewer fields"),
    ('image,caption\ndog.png,"a dog\n', r"captions\.csv, line 2: not readable as CSV"),
    ("image,caption\ndog.png,café\n".encode("latin-1"), r"captions\.csv, line 2: not UTF-8 .*iconv -f LATIN1"),
    ("image,caption\ndog.png,x\n".encode("utf-16-le"), r"captions\.csv, line 1: not UTF-8, but UTF-16"),
    ("image,caption,caption\ndog.png,x,y\n", r"line 1: the column 'caption' is there twice"),
    ('image,caption\n\ndog.png,a\nanimals/cat.jpg,"b\ndog.png,"c"\n', r"captions\.csv, line 4: not readable as CSV"),
    ('image,caption\ndog.png,"a\nb"\nanimals/cat.jpg,\n', r"captions\.csv, line 4: caption is empty"),
    ("image,caption,split\ndog.png,a,train\ndog.png,b,test\n", r"line 3: dog\.png is in test, and in line 2 in train"),
    ("image,caption,split\ndog.png,a,tset\n", r"line 2: split is 'tset', not train, validation or test"),
    ("image,caption,caption_id\ndog.png,a,1\ndog.png,b,1\n", r"captions\.csv, line 3: 1 is in line 2 already"),
]


@pytest.mark.parametrize("text, message", BROKEN)
def test_what_is_amiss_is_named_with_its_line(folder, text, message):
    with pytest.raises(ValueError, match=message):
        build(folder, text)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "dog.png", "caption": "x"', r"captions\.jsonl, line 2: not readable as JSON"),
        ('["dog.png", "x"]', r"line 2: must be an object with image and caption, not '\[\"dog"),
        ('{"image": "dog.png", "caption": ["x"]}', r"line 2: caption must be text, not \['x'\]"),
        ('{"image": "dog.png", "caption": null}', r"line 2: caption is empty"),
        (r'{"image": "dog.png", "caption": "a \ud83d"}', r"line 2: caption holds '.ud83d', half a character"),
    ],
)
def test_broken_jsonl(folder, line, message):
    with pytest.raises(ValueError, match=message):
        build(folder, '{"image": "dog.png", "caption": "x"}\n' + line + "\n", "captions.jsonl")


@pytest.mark.parametrize(
    "name, content",
    [
        ("captions.tsv", ROWS.replace('"', "").replace(",", "\t", 1).encode()),
        ("captions.csv", gzip.compress(ROWS.encode())),
        ("captions.csv.gz", gzip.compress(ROWS.encode())),
        ("captions.csv.gz", ROWS.encode()),
        ("captions.csv", ROWS.encode("utf-16")),
        ("captions.csv", ROWS.replace("\n", "\r\n").encode("utf-8-sig")),
    ],
)
def test_files_of_captions_in_many_forms(folder, name, content):
    if name.endswith(".tsv"):
        content = "\n".join(
            "\t".join(line)
            for line in csv.reader(ROWS.splitlines())  # commas need no quotes there
        ).encode()
    rows = all_rows(build(folder, content, name))
    captions = {row["source_caption"] or row["reference_source_caption"] for row in rows.values()}
    assert captions == {"A fox, asleep.", "A cat.", "A dog.", "Fox"}


def test_names_are_identifiers(folder):
    """Blanks of all kinds tell files apart; accents stored in the other way do not."""
    names = ["a\u202fb.png", "a b.png", "a  b.png", "a\xa0b.png", unicodedata.normalize("NFD", "árbore.png")]
    for i, name in enumerate(names):
        Image.new("RGB", (9 + i, 4)).save(folder / "images" / name)
    lines = [f"{name},thing {i}" for i, name in enumerate([*names[:4], "árbore.png"])]
    rows = all_rows(build(folder, "\n".join(["image,caption", *lines])))
    assert sorted(row["image"].width for row in rows.values()) == [9, 10, 11, 12, 13]
    with pytest.raises(FileNotFoundError, match=r"has no pictures of 'c\\u202fd.png'"):
        build(folder, "image,caption\nc\u202fd.png,x\n")
    (folder / "FeatureData").mkdir()
    np.save(folder / "FeatureData/f.npy", np.ones((1, 3), np.float32))
    (folder / "FeatureData/f.id.txt").write_text(unicodedata.normalize("NFD", "árbore"))
    (row,) = all_rows(build(folder, "image,caption\nárbore.png,x\n", visual_feature=folder / "FeatureData")).values()
    assert row["visual_feats"].shape == (1, 3)


def test_a_picture_is_one_however_it_is_called(folder):
    (folder / "images" / "link.png").symlink_to(folder / "images" / "dog.png")
    names = [
        "dog.png",
        "./dog.png",
        "images/dog.png",
        str(folder / "images/dog.png"),
        "animals/../dog.png",
        "link.png",
    ]
    text = "\n".join(["image,caption", *(f"{name},caption {i}" for i, name in enumerate(names))])
    rows = all_rows(build(folder, text))
    assert {row["image_id"] for row in rows.values()} == {"pictures/dog.png"} and len(rows) == 6
    assert len({row["split"] for row in rows.values()}) == 1
    with pytest.raises(ValueError, match=r"line 3: dog\.png is in test, and in line 2 in train"):
        build(folder, "image,caption,split\ndog.png,a,train\n./dog.png,b,test\n")
    # and one by its content
    (folder / "copy.png").write_bytes((folder / "images/dog.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"line 3: copy\.png is in test, and in line 2 the equal picture dog\.png in train"
    ):
        build(folder, "image,caption,split\ndog.png,a,train\ncopy.png,b,test\n")
    for i in range(30):
        for name in ("one", "two"):
            Image.new("RGB", (2, 2), (i, 0, 0)).save(folder / f"{name}{i}.png")
    text = "\n".join(["image,caption", *(f"{name}{i}.png,{name} {i}" for i in range(30) for name in ("one", "two"))])
    side = {row["image_id"]: row["split"] for row in all_rows(build(folder, text)).values()}
    assert all(side[f"pictures/one{i}.png"] == side[f"pictures/two{i}.png"] for i in range(30))
    assert set(side.values()) == {"train", "validation", "test"}


def test_files_outside_the_folder_are_refused(folder, tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    for name in ("../../secret.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "out/secret.png"):
        with pytest.raises(ValueError, match=r"captions\.csv, line 2: .*secret\.png, out of .*images and .*image_dir"):
            build(folder, f"image,caption\n{name},x\n")
    for name in ("secret.png", str(tmp_path / "secret.png")):  # the user says where
        assert len(all_rows(build(folder, f"image,caption\n{name},x\n", image_dir=tmp_path))) == 1
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ValueError, match=r"line 2: pipe\.png is a pipe or a device, no regular file"):
        build(folder, "image,caption\npipe.png,x\n")


def test_captions_are_composed(folder):
    text = unicodedata.normalize("NFD", "image,caption,target_caption,split\ndog.png,a café,unha árbore,test\n")
    (row,) = all_rows(build(folder, text)).values()
    assert (row["reference_source_caption"], row["target_caption"]) == ("a café", "unha árbore")


def test_missing_files(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="mine has no CSV, TSV or JSONL file: write image,caption in the first line"
    ):
        build(folder)
    with pytest.raises(FileNotFoundError, match=r"csv, line 4: .*has no pictures of owl\.png, nor of 1 others of 3"):
        build(folder, "image,caption\ndog.png,a\ndog.png,b\nowl.png,c\nrat.png,d\n")
    with pytest.raises(ValueError, match=r"2 files of captions, captions\.csv, more\.csv: name one \(caption_file\)"):
        build(folder, ROWS, "more.csv")
    assert len(all_rows(build(folder, caption_file="more.csv"))) == 4
    with pytest.raises(ValueError, match="caption_files needs data_dir"):
        CaptionFiles(cache_dir=tmp_path / "cache").download_and_prepare()


def test_a_changed_file_is_read_again(folder):
    assert len(all_rows(build(folder, ROWS))) == 4
    assert len(all_rows(build(folder, ROWS + "dog.png,Another.\n"))) == 5


def test_it_streams_and_writes_parquet(folder):
    text = (
        ROWS.replace("image,caption", "image,caption,split").replace("\n", ",train\n").replace("split,train", "split")
    )
    dataset = build(folder, text)
    builder = CaptionFiles(data_dir=folder, cache_dir=folder.parent / "cache")
    (stream,) = builder.as_streaming_dataset().values()
    streamed = list(stream)
    builder.download_and_prepare(folder.parent / "out", file_format="parquet")
    written = datasets.load_dataset("parquet", data_files=str(folder.parent / "out/*.parquet"), split="train")
    for rows in (streamed, written):
        assert [row["caption_id"] for row in rows] == dataset["train"]["caption_id"][:]
        assert [row["image"].size for row in rows] == [(5, 4), (6, 4), (7, 4), (5, 4)]  # Parquet holds the pictures


class Reverser(Translator):
    name = "reverser"

    def __init__(self, root=None):
        pass

    def supported_pairs(self):
        return [("en", "gl"), ("gl", "en")]

    def _translate(self, texts, source, target):
        return [text[::-1] for text in texts]


def test_without_human_captions_machine_translation_stands_in_and_says_so(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = "image,caption,target_caption,split\ndog.png,a dog,,test\nanimals/cat.jpg,a cat,un gato,test\n"
    dataset = build(folder, text + "animals/fox.png,a fox,,train\n")
    translated = add_translations(dataset, Reverser())
    assert translated["test"]["target_caption"][:] == ["god a", "un gato"]
    assert translated["test"]["target_origin"][:] == ["reverser", "human"]
    assert translated["test"]["source_caption"][:] == ["a dog", "otag nu"]
    assert "test: 1 of 2 rows have no human gl caption; translations by reverser stand in" in caplog.text


def test_the_training_example_runs_on_it(folder, encoders, tmp_path, monkeypatch):  # noqa: F811
    lines = ["image,caption"]
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 9, 9)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,red thing number {i}")
    (folder / "captions.csv").write_text("\n".join(lines))
    monkeypatch.setitem(ENGINES.entries, "reverser", Reverser)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = {
        "data": "caption_files",
        "data_dir": folder,
        "translator": "reverser",
        "output_dir": tmp_path / "out",
        "text_encoder": encoders / "t",
        "vision_encoder": encoders / "v",
        "num_train_epochs": 1,
        "use_cpu": True,
        "per_device_train_batch_size": 9,
        "projection_dim": 8,
        "baselines": False,
        "search_page": "none",
        "disable_tqdm": True,
    }
    train.train_recipe(**flags)
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    assert sum(report["settings"]["pictures"].values()) == 30 and report["settings"]["data"] == "caption_files"
    # nobody wrote a caption in the target language, and the card does not say so
    assert report["settings"]["queries"] == "translated by reverser, not all by people"
    assert "written by people" not in (tmp_path / "out/README.md").read_text()

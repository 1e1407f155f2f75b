"""Crossmodal-3600 on a small file in its form, and evaluation in several languages."""

import gzip
import json

import datasets
import pytest
from PIL import Image

from datasets_scripts.xm3600 import Xm3600
from modeling_nrccr.cli import evaluate
from modeling_nrccr.data.load import dataset_languages, load_caption_dataset
from modeling_nrccr.retrieval import evaluation as evaluate_retrieval
from tests.retrieval.test_search_examples import checkpoint, picture  # noqa: F401


KEYS = ["00086d4b4a0bda2f", "0008b5b7ae1c5b4e", "000c4d66ce89aa69"]
WORDS = {"en": "dog cat duck", "sw": "can gato pato", "quz": "pato can gato"}


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def record(i: int) -> dict:
    """A line as published: a key, the picture's locale, and for each language captions in three forms."""
    captions = {
        language: {
            "caption": [f"{words.split()[i]}", f"un  {words.split()[i]}"],
            "caption/tokenized": [words.split()[i], f"un {words.split()[i]}"],
            "caption/tokenized/lowercase": [words.split()[i], f"un {words.split()[i]}"],
        }
        for language, words in WORDS.items()
    }
    return {"image/key": KEYS[i], "image/locale": "sw", **captions}


def write(folder, records):
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in records))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "xm3600"
    (root / "images").mkdir(parents=True)
    for i, key in enumerate(KEYS):
        picture(3 * i).save(root / "images" / f"{key}.jpg")
    write(root, [record(i) for i in range(3)])
    return root


def build(folder, language="sw"):
    builder = Xm3600(config_name=language, data_dir=folder, cache_dir=folder.parent / "cache")
    builder.download_and_prepare()
    return builder.as_dataset()


def test_native_captions_and_a_test_split_alone(folder):
    dataset = build(folder)
    assert list(dataset) == ["test"] and len(Xm3600.BUILDER_CONFIGS) == 36
    row = dataset["test"][3]
    image = row.pop("image")
    assert row == {
        "image_id": f"xm3600/{KEYS[1]}",
        "caption_id": f"xm3600/{KEYS[1]}#1",
        "source_caption": None,
        "target_caption": "un gato",
        "back_translation": None,
        "source_language": "en",
        "target_language": "sw",
        "target_origin": "human",
        "reference_source_caption": None,
    }
    assert image.size == Image.open(folder / "images" / f"{KEYS[1]}.jpg").size
    streamed = Xm3600(config_name="sw", data_dir=folder, cache_dir=folder).as_streaming_dataset()["test"]
    assert [row["caption_id"] for row in streamed] == dataset["test"]["caption_id"][:]


def test_gzip_parquet_and_a_picture_without_captions(folder):
    records = [record(i) for i in range(3)]
    del records[0]["sw"]
    (folder / "captions.jsonl").unlink()
    data = "".join(f"{json.dumps(row)}\n" for row in records).encode()
    (folder / "captions.jsonl.gz").write_bytes(gzip.compress(data))
    builder = Xm3600(config_name="sw", data_dir=folder, cache_dir=folder.parent / "cache")
    builder.download_and_prepare(folder.parent / "out", file_format="parquet")
    rows = datasets.load_dataset("parquet", data_files=str(folder.parent / "out/*.parquet"), split="train")
    assert rows["image_id"][:] == [f"xm3600/{key}" for key in (KEYS[1], KEYS[1], KEYS[2], KEYS[2])]
    (folder / "captions.jsonl.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ValueError, match=r"captions\.jsonl\.gz: damaged after line \d"):
        build(folder)


def changed(**changes):
    return json.dumps(record(1) | changes)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"captions\.jsonl, line 2: not readable as JSON"),
        (json.dumps(record(0)), rf"line 2: {KEYS[0]} is in line 1 already"),
        (changed(sw={"caption": ["can", " "]}), r"captions\.jsonl, line 2: caption 1 in sw has no text"),
        (changed(sw={"caption": "can"}), r"line 2, sw: must be a list of texts, not 'can'"),
        (changed(sw=["can"]), r"line 2: not as published, with image/key and sw"),
        (json.dumps({"key": "x"}), r"line 2: not as published.*image/key"),
        ("\x00\udcff", r"captions\.jsonl, line 2: not UTF-8"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    with (folder / "captions.jsonl").open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{json.dumps(record(0))}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_what_is_missing_is_named(folder):
    (folder / "images" / f"{KEYS[2]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"images has no pictures of {KEYS[2]}\.jpg, nor of 0 others of 3"):
        build(folder)
    with pytest.raises(ValueError, match=r"captions\.jsonl has no captions in te"):
        build(folder, "te")
    (folder / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"xm3600 has no captions\.jsonl: unpack captions\.zip of https"):
        build(folder)


def test_names_of_data_sets_and_their_languages(folder):
    assert dataset_languages("multi30k:task2") == ["de", "fr", "cs"] and dataset_languages("caption_files") == []
    assert (
        dataset_languages("tuxpaint+cldr_emoji")[:3] == ["gl", "ca", "es"] and len(dataset_languages("xm3600")) == 36
    )
    assert load_caption_dataset("xm3600", "quz", data_dir=str(folder))["test"]["target_caption"][0] == "pato"
    with pytest.raises(ValueError, match="unknown data set 'xm36'"):
        load_caption_dataset("xm36", "sw")


def test_evaluation_in_several_languages(checkpoint, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    seen = []
    encode = evaluate_retrieval.encode_images
    monkeypatch.setattr(
        evaluate_retrieval,
        "encode_images",
        lambda model, images, *rest: seen.append(len(images)) or encode(model, images, *rest),
    )
    flags = [str(checkpoint), "--data", "xm3600", "--data_dir", str(folder), "--output"]
    asked = [part for code in WORDS for part in ("--query_language", code)]
    evaluate.main([*flags, str(tmp_path / "all.json"), *asked])
    report, output = json.loads((tmp_path / "all.json").read_text()), capsys.readouterr().out
    assert seen == [3, 0, 0]  # the languages share the pictures
    assert list(report["languages"]) == ["en", "sw", "quz"] and report["counts"]["sw"] == {
        "captions": 6,
        "images": 3,
        "groups": 3,
    }
    sums = {language: metrics["sum_recall"] for language, metrics in report["languages"].items()}
    assert len(set(sums.values())) > 1
    assert report["mean"]["sum_recall"] == pytest.approx(sum(sums.values()) / 3)
    assert report["worst"] == report["languages"][report["worst_language"]]
    assert report["worst"]["sum_recall"] == min(sums.values())
    assert "mean of 3" in output and f"worst: {report['worst_language']}" in output
    for language in ("sw", "quz"):
        evaluate.main([*flags, str(tmp_path / "one.json"), "--query_language", language])
        alone = json.loads((tmp_path / "one.json").read_text())
        assert alone["test"] == pytest.approx(report["languages"][language])
    for path in (folder / "images").iterdir():
        path.unlink()
    (folder / "images").rmdir()
    with pytest.raises(
        SystemExit, match=rf"3 of 3 pictures are missing, the first is xm3600/{KEYS[0]}: put them into"
    ):
        evaluate.main([*flags, str(tmp_path / "none.json"), "--query_language", "sw"])
    with pytest.raises(SystemExit, match="caption_files does not say which languages it has"):
        evaluate.main([str(checkpoint), "--data", "caption_files", "--query_language", "all"])

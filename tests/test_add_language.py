"""`examples/add_language.py` on a tiny dual encoder, real files and ready translations."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.languages import LANGUAGE_FILE


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import add_language  # noqa: E402


WORDS = ("red", "blue", "big", "small", "old", "cat", "dog", "house", "tree", "boat")
TOWER = {"model_type": "efficientnet_lite", "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_size": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A dual encoder, English captions, their translations, and human captions of pictures."""
    folder = tmp_path_factory.mktemp("files")
    vocabulary = ["<pad>", "<unk>", *WORDS, *(f"{word}o" for word in WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    processor = NrccrProcessor(tokenizer, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    model = tiny_model(vision_config=TOWER, visual_feat_dim=None, text_head="pooling", teacher_view="source")
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    captions = [" ".join(words) for words in itertools.permutations(WORDS, 3)][:300]
    (folder / "captions.txt").write_text("\n".join(captions))
    (folder / "translations").mkdir()
    target = ["o ".join(caption.split()) + "o" for caption in captions]
    pairs = list(zip(captions, target))
    (folder / "translations/forth.tsv").write_text("en\tgl\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    (folder / "translations/back.tsv").write_text("gl\ten\n" + "".join(f"{b}\t{a}\n" for a, b in pairs))
    lines = ["image,target_caption,caption"]
    for number in range(24):
        Image.new("RGB", (20, 20), (number * 10, 255 - number * 10, 99)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{target[number * 12]},{captions[number * 12]}")
    (folder / "human.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(files: Path, output: Path, **options):
    settings = {"base": files / "base", "captions": files / "captions.txt", "translator": f"file:{files}/translations",
                "output_dir": output, "num_train_epochs": 6, "per_device_train_batch_size": 64, "use_cpu": True,
                "disable_tqdm": True, "logging_strategy": "no"} | options  # fmt: skip
    add_language.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    return json.loads((output / "report.json").read_text())


def test_from_captions_to_a_language_file_and_its_report(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = run(files, tmp_path / "gl", eval=files / "human.csv", rivals="all")
    assert {path.name for path in (tmp_path / "gl").iterdir()} == {LANGUAGE_FILE, "report.json", "README.md"}
    names = ("this language", *add_language.RIVALS)
    rows = {"base", "translated query", "English, before"}
    rows |= {form.format(name) for name in names for form in ("{}", "{}, half its translation", "English, {}")}
    assert set(report["found"]) == rows
    assert report["found"]["English, before"] == report["found"]["English, this language"]
    assert report["found"]["English, before"] == report["found"]["English, embed_distillation"]
    assert report["found"]["English, before"] != report["found"]["English, trunk_calibration"]
    model, processor = NrccrModel.from_pretrained(files / "base"), NrccrProcessor.from_pretrained(files / "base")
    model.load_language("gl", tmp_path / "gl")
    queries = ["redo blueo bigo", "cato dogo houseo", "oldo treeo boato"]
    sources = encode_texts(model, [query.replace("o ", " ").removesuffix("o") for query in queries], processor)
    before = (encode_texts(model, queries, processor) * sources).sum(1).mean()
    after = (encode_texts(model.set_language("gl"), queries, processor) * sources).sum(1).mean()
    assert after > before + 0.05
    written = (tmp_path / "gl" / LANGUAGE_FILE).read_bytes()
    again = run(files, tmp_path / "gl", eval=files / "human.csv")
    assert again["steps"] == report["steps"] and (tmp_path / "gl" / LANGUAGE_FILE).read_bytes() == written
    assert "this language" in capsys.readouterr().out


def test_pictures_of_the_captions_are_encoded_once(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    captions = (files / "captions.txt").read_text().splitlines()
    lines = ["image,caption", *(f"{number % 24}.png,{caption}" for number, caption in enumerate(captions))]
    (files / "captions.csv").write_text("\n".join(lines) + "\n")
    options = {"captions": files / "captions.csv", "config": add_language.CONFIG.with_stem("add_language_pictures")}
    report = run(files, tmp_path / "gl", eval=files / "human.csv", **options)
    assert report["found"]["English, before"] == report["found"]["English, this language"]
    with pytest.raises(ValueError, match="have no picture: add a column image"):
        run(files, tmp_path / "none", **options | {"captions": files / "captions.txt"})


def test_another_text_encoder_learns_the_space_first(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tiny_model(1, text_head="pooling", teacher_view="source")
    other.text_tower.encoder.save_pretrained(tmp_path / "encoder")
    NrccrProcessor.from_pretrained(files / "base").tokenizer.save_pretrained(tmp_path / "encoder")
    report = run(files, tmp_path / "gl", text_encoder=tmp_path / "encoder", eval=files / "human.csv")
    assert report["text_encoder"] == str(tmp_path / "encoder")
    model = NrccrModel.from_pretrained(tmp_path / "gl/model")
    model.load_language("gl", tmp_path / "gl")
    base, processor = NrccrModel.from_pretrained(files / "base"), NrccrProcessor.from_pretrained(files / "base")
    picture = [Image.new("RGB", (20, 20), (10, 200, 99))]
    assert torch.equal(encode_images(model, picture, processor), encode_images(base, picture, processor))
    captions = ["red blue big", "cat dog house"]
    learnt = encode_texts(model, captions, NrccrProcessor.from_pretrained(tmp_path / "gl/model"))
    assert (learnt * encode_texts(base, captions, processor)).sum(1).mean() > 0.5


def test_what_is_wrong_is_said_before_anything_is_trained(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "few.txt").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="few.txt has 2 different captions"):
        run(files, tmp_path / "gl", captions=tmp_path / "few.txt")
    (tmp_path / "human.csv").write_text("image,target_caption\nnone.png,redo\n")
    with pytest.raises(ValueError, match="human.csv, line 2: there is no picture"):
        run(files, tmp_path / "gl", eval=tmp_path / "human.csv")
    with pytest.raises(ValueError, match="no rivals clip"):
        run(files, tmp_path / "gl", rivals="clip")


def test_several_languages_in_one_adapter(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "ca").mkdir()
    for name in ("forth", "back"):
        text = (files / f"translations/{name}.tsv").read_text().replace("gl", "ca", 1)
        (tmp_path / f"ca/{name}.tsv").write_text(text)
    engines = f"gl=file:{files}/translations;ca=file:{tmp_path}/ca"
    report = run(files, tmp_path / "two", target_language="gl,ca", translator=engines)
    assert report["language"] == "gl,ca" and report["verdict"] == "not tested"
    model = NrccrModel.from_pretrained(files / "base")
    for language in ("gl", "ca"):
        model.load_language(language, tmp_path / "two")
        assert f'load_language("{language}"' in (tmp_path / "two/README.md").read_text()
    with pytest.raises(ValueError, match="names no engine for es: add ';es=ENGINE'"):
        run(files, tmp_path / "three", target_language="gl,ca,es", translator=engines)
    with pytest.raises(ValueError, match="human.csv has captions of one language"):
        run(files, tmp_path / "two", target_language="gl,ca", translator=engines, eval=files / "human.csv")
    one = {"verdict": "use", "reasons": [], "found": {"base": {}}, "queries": 2}
    other = one | {"verdict": "do not use", "reasons": ["worse"]}
    merged = add_language.merge_reports({"gl": one, "ca": other})
    assert merged["verdict"] == "do not use" and merged["reasons"] == ["ca: worse"] and merged["queries"] == 4
    assert list(merged["found"]) == ["gl: base", "ca: base"]


def test_languages_are_balanced():
    from data import balance

    rows = balance([["a"] * 7, ["b", "c"]])
    assert [rows.count(name) for name in "abc"] in ([7, 4, 3], [7, 3, 4]) and len(rows) == 14


def test_do_not_use():
    found = {name: {"sum_recall": value} for name, value in (("base", 50), ("translated query", 70), ("ours", 60))}
    assert add_language.verdict(found, "ours")[0] == "use"
    assert "translated query finds more" in add_language.verdict(found, "ours")[1][0]
    assert add_language.verdict(found | {"ours": {"sum_recall": 49}}, "ours")[0] == "do not use"
    english = {"English, before": {"sum_recall": 90}, "English, ours": {"sum_recall": 88}}
    word, reasons = add_language.verdict(found | english, "ours")
    assert word == "do not use" and "English finds less" in reasons[0]

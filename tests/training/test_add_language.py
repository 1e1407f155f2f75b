"""`nrccr add-language` on a tiny dual encoder, real files and ready translations."""

import copy
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from modeling_nrccr import NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.cli import add_language as command
from modeling_nrccr.data.captions import read_captions
from modeling_nrccr.data.trained_split import SPLIT_FILE, check_unseen, split_seed, write_trained_split
from modeling_nrccr.languages import LANGUAGE_FILE
from modeling_nrccr.publishing import push as push_to_hub
from modeling_nrccr.publishing.verdicts import ASK, DO_NOT, TOO_FEW, USE, USE_FUSED
from modeling_nrccr.training import add_language, losses
from modeling_nrccr.training.examination import merge_reports, verdict
from tests.support import tiny_model
from tests.support.small_base import write_small_base


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A dual encoder, English captions, their translations, and human captions of pictures."""
    return write_small_base(tmp_path_factory.mktemp("files"))


RUN = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 64,
    "use_cpu": True,
    "min_steps": 0,
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def run(files: Path, output: Path, **options):
    own = {"base": files / "base", "data": files / "captions.txt", "translator": f"file:{files}/translations"}
    settings = RUN | own | {"output_dir": output} | options
    report = add_language.add_language(**settings)
    assert report == json.loads((output / "report.json").read_text())
    return report


def test_from_captions_to_a_language_file_and_its_report(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = run(files, tmp_path / "gl", test=files / "human.csv", rivals="all")
    files_made = {LANGUAGE_FILE, "report.json", "README.md", SPLIT_FILE}
    assert {path.name for path in (tmp_path / "gl").iterdir()} == files_made
    names = ("this language", *add_language.RIVALS)
    rows = {"base", "translated query", "English, before"}
    rows |= {"English through this language"}
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
    # the command does the same
    options = RUN | {"test": files / "human.csv", "data": files / "captions.txt", "output_dir": tmp_path / "gl"}
    options["translator"] = f"file:{files}/translations"
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command.main([str(files / "base"), *flags])
    again = json.loads((tmp_path / "gl/report.json").read_text())
    assert again["steps"] == report["steps"] and (tmp_path / "gl" / LANGUAGE_FILE).read_bytes() == written
    printed = capsys.readouterr().out
    assert "this language" in printed and f"--language gl={tmp_path / 'gl'}" in printed.splitlines()[-1]


def test_pictures_of_the_captions_are_encoded_once(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    captions = (files / "captions.txt").read_text().splitlines()
    lines = ["image,caption", *(f"{number % 24}.png,{caption}" for number, caption in enumerate(captions))]
    (files / "captions.csv").write_text("\n".join(lines) + "\n")
    options = {"data": files / "captions.csv", "recipe": "pictures"}
    report = run(files, tmp_path / "gl", test=files / "human.csv", **options)
    assert report["found"]["English, before"] == report["found"]["English, this language"]
    with pytest.raises(ValueError, match="have no picture: add a column image"):
        run(files, tmp_path / "none", **options | {"data": files / "captions.txt"})


def test_another_text_encoder_learns_the_space_first(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tiny_model(1, text_head="pooling", teacher_view="source")
    other.text_tower.encoder.save_pretrained(tmp_path / "encoder")
    NrccrProcessor.from_pretrained(files / "base").tokenizer.save_pretrained(tmp_path / "encoder")
    report = run(files, tmp_path / "gl", text_encoder=tmp_path / "encoder", test=files / "human.csv")
    assert report["text_encoder"] == "encoder"
    model = NrccrModel.from_pretrained(tmp_path / "gl/model")
    model.load_language("gl", tmp_path / "gl")
    base, processor = NrccrModel.from_pretrained(files / "base"), NrccrProcessor.from_pretrained(files / "base")
    picture = [Image.new("RGB", (20, 20), (10, 200, 99))]
    model, base = copy.deepcopy(model), copy.deepcopy(base)  # where a file's weights lie in memory changes last bits
    assert torch.equal(encode_images(model, picture, processor), encode_images(base, picture, processor))
    captions = ["red blue big", "cat dog house"]
    both, own = NrccrProcessor.from_dual_encoder(str(tmp_path / "gl/model")), encode_texts(base, captions, processor)
    assert torch.equal(encode_texts(model, captions, both, languages=None), own)  # by the base's own text side
    assert report["found"]["English, before"] == report["found"]["English, this language"]
    learnt = encode_texts(model.language_side(), captions, both.language_side(), languages=None)
    assert (learnt * own).sum(1).mean() > 0.5


def test_what_is_wrong_is_said_before_anything_is_trained(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "few.txt").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="few.txt has 2 different captions"):
        run(files, tmp_path / "gl", data=tmp_path / "few.txt")
    (tmp_path / "human.csv").write_text("image,target_caption\nnone.png,redo\n")
    with pytest.raises(ValueError, match="human.csv: there is no picture none.png"):
        run(files, tmp_path / "gl", test=tmp_path / "human.csv")
    with pytest.raises(ValueError, match="nothing.txt: there is no such file of captions"):
        run(files, tmp_path / "gl", data="nothing.txt")
    with pytest.raises(ValueError, match="unknown data set 'tuxpint'"):
        run(files, tmp_path / "gl", data="tuxpint")
    for old, new in (("captions", "data"), ("eval", "test"), ("target_language", "language")):
        with pytest.raises(ValueError, match=f"^{old} is now {new}$"):
            run(files, tmp_path / "gl", **{old: "gl"})
    with pytest.raises(ValueError, match="--base is now the first argument"):
        add_language.parse_arguments(["--base", "outputs/demo"])
    with pytest.raises(ValueError, match="no rivals clip"):
        run(files, tmp_path / "gl", rivals="clip")


def test_several_languages_in_one_adapter(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "ca").mkdir()
    for name in ("forth", "back"):
        text = (files / f"translations/{name}.tsv").read_text().replace("gl", "ca", 1)
        (tmp_path / f"ca/{name}.tsv").write_text(text)
    engines = f"gl=file:{files}/translations;ca=file:{tmp_path}/ca"
    report = run(files, tmp_path / "two", language="gl,ca", translator=engines)
    assert report["language"] == "gl,ca" and report["verdict"] == "not tested"
    model = NrccrModel.from_pretrained(files / "base")
    for language in ("gl", "ca"):
        model.load_language(language, tmp_path / "two")
        assert f'load_language("{language}"' in (tmp_path / "two/README.md").read_text()
    with pytest.raises(ValueError, match="names nothing for es: add ';es=...'"):
        run(files, tmp_path / "three", language="gl,ca,es", translator=engines)
    with pytest.raises(ValueError, match="human.csv has captions of one language"):
        run(files, tmp_path / "two", language="gl,ca", translator=engines, test=files / "human.csv")
    both = {"language": "gl,ca", "translator": engines, "num_train_epochs": 1}
    report = run(files, tmp_path / "both", test=f"gl={files}/human.csv;ca={files}/human.csv", **both)
    assert set(report["verdicts"]) == {"gl", "ca"} and {"gl: base", "ca: this language"} <= report["found"].keys()
    counts = {"queries": 2, "pictures": 2, "groups": 2, "left_out": []}
    one = {"verdict": "use", "reasons": [], "found": {"base": {}}} | counts
    other = one | {"verdict": "do not use", "reasons": ["worse"]}
    merged = merge_reports({"gl": one, "ca": other})
    assert merged["verdict"] == "do not use" and merged["reasons"] == ["ca: worse"] and merged["queries"] == 4
    assert list(merged["found"]) == ["gl: base", "ca: base"]


def test_a_language_from_parallel_sentences_tested_on_what_can_be_read(files, tmp_path, monkeypatch, caplog):
    """No engine is asked; a broken picture is left out before anything is trained, and the report is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO", "modeling_nrccr")
    (tmp_path / "images").mkdir()  # beside the file, as for training
    for number in range(1, 24):
        shutil.copy(files / f"{number}.png", tmp_path / "images")
    (tmp_path / "images/0.png").write_bytes((files / "0.png").read_bytes()[:40])
    shutil.copy(files / "human.csv", tmp_path)
    shutil.copy(files / "captions.txt", tmp_path)
    with (tmp_path / "human.csv").open("a") as file:
        file.write("./1.png,redo blueo,red blue\n")  # another caption of a picture that is there
    lines = (files / "translations/forth.tsv").read_text().splitlines()[1:]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    report = run(
        files,
        tmp_path / "gl",
        data=tmp_path / "pairs.tsv",
        test=tmp_path / "human.csv",
        translator="nobody",
        num_train_epochs=1,
        lexicon="wordnet:10",
    )
    assert report["translator"] == "parallel sentences" and report["captions"] == 300 and report["data"] == "pairs"
    assert (report["queries"], report["pictures"]) == (24, 23) and "0.png" in report["left_out"][0]
    assert "translated query" not in report["found"] and "this language" in report["found"]
    found = report["found"]["this language"]
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
    printed = caplog.text
    assert printed.index("left out, 1 test pictures") < printed.index("pairs to train on")
    assert "lexicon is left out, parallel sentences ask no engine" in printed
    low, high = found["intervals"]["sum_recall"]
    assert f"{found['sum_recall']:.1f} ({low:.1f} to {high:.1f})" in (tmp_path / "gl/README.md").read_text()
    publish_both(files, tmp_path)
    with pytest.raises(ValueError, match="does not say which of gl,ca it translates into"):
        run(files, tmp_path / "no", data=tmp_path / "pairs.tsv", language="gl,ca")
    with pytest.raises(ValueError, match="no translation back, which .*--pair_weighting agreement"):
        run(files, tmp_path / "no", data=tmp_path / "pairs.tsv", pair_weighting="agreement")


def publish_both(files: Path, folder: Path):
    """A language's folder, and the base with the language in it, are published: nothing of this machine is in them."""
    base, processor = NrccrModel.from_pretrained(files / "base"), NrccrProcessor.from_pretrained(files / "base")
    base.load_language("gl", folder / "gl")
    query = ["redo blueo bigo"]
    expected = encode_texts(base.set_language("gl"), query, processor)
    language = push_to_hub.write_upload(folder / "gl", folder / "language", "me/gl", base="me/base")
    whole = push_to_hub.write_upload(files / "base", folder / "whole", "me/base-gl", [f"gl={folder}/gl"], "me/base")
    for upload in (language, whole):
        card = ModelCard.load(upload / "README.md")
        assert card.data.language == ["en", "gl"] and card.data.base_model == ["me/base"] and card.data.license
        assert card.data.datasets == ["pairs"] and "too few queries" in card.text and card.text.count("```") == 2
        for path in upload.iterdir():
            assert not push_to_hub.is_pickled(path) and str(files).encode() not in path.read_bytes(), path
            assert str(folder).encode() not in path.read_bytes(), path
    assert {path.name for path in language.iterdir()} == {LANGUAGE_FILE, "README.md", "report.json", SPLIT_FILE}
    assert 'load_language("gl", "me/gl")' in (language / "README.md").read_text()
    assert 'from_pretrained("me/base-gl"' in (whole / "README.md").read_text()
    base.load_language("gl", language)
    assert torch.equal(encode_texts(base.set_language("gl"), query, processor), expected)
    model = NrccrModel.from_pretrained(whole)
    assert torch.equal(encode_texts(model.set_language("gl"), query, processor), expected)
    report = json.loads((folder / "gl/report.json").read_text())
    (folder / "gl/report.json").write_text(json.dumps(report | {"reasons": ["hf_" + "a" * 34]}))
    with pytest.raises(ValueError, match="holds a token of the Hub"):
        push_to_hub.write_upload(folder / "gl", folder / "no", "me/gl")
    assert not (folder / "no").exists()


def test_parallel_sentences_are_read_however_they_are_headed(tmp_path):
    pairs = [(f"a dog {number}", f"un can {number}") for number in range(200)]
    body = "".join(f"{source}\t{target}\n" for source, target in pairs)
    wide = "".join(f"{source}\tun gos\t{target}\n" for source, target in pairs)
    columns = "".join(f"{source},{target}\n" for source, target in pairs)
    for name, text in {
        "a.tsv": body,
        "b.tsv": "source\ttarget\n" + body,
        "c.tsv": "en\tca\tgl\n" + wide,
        "d.csv": "source,target\n" + columns,
    }.items():
        (tmp_path / name).write_text(text)
        read = read_captions(tmp_path / name, "gl")
        assert list(zip(read.texts, read.translations)) == pairs
    (tmp_path / "e.tsv.gz").write_bytes(gzip.compress(body.encode()))
    assert read_captions(tmp_path / "e.tsv.gz", "gl").translations == [target for _, target in pairs]
    (tmp_path / "captions.tsv").write_text("image\tcaption\n" + "".join(f"a.png\t{source}\n" for source, _ in pairs))
    assert read_captions(tmp_path / "captions.tsv", "gl").translations is None
    with pytest.raises(ValueError, match="c.tsv, line 1: no column 'es', but en, ca, gl"):
        read_captions(tmp_path / "c.tsv", "es")
    (tmp_path / "a.tsv").write_text(body + "a dog without\n")
    with pytest.raises(ValueError, match="a.tsv, line 201: a sentence and its translation are needed"):
        read_captions(tmp_path / "a.tsv", "gl")


def test_a_file_of_translations_without_the_way_back_is_enough(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(files / "translations/forth.tsv", tmp_path)
    options = {"translator": f"file:{tmp_path}/forth.tsv", "num_train_epochs": 1, "test": files / "human.csv"}
    report = run(files, tmp_path / "gl", **options)
    assert "translated query" not in report["found"] and "no pair gl-en" in report["reasons"][-2]
    with pytest.raises(ValueError, match="no pair gl-en"):
        run(files, tmp_path / "no", **options | {"losses": "feature_distillation=1,back_translation=1"})


def test_a_language_that_learned_nothing_is_an_error(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = losses.FeatureDistillation.__call__
    monkeypatch.setattr(losses.FeatureDistillation, "__call__", lambda *args: 0 * whole(*args))
    with pytest.raises(ValueError, match="nothing was learnt"):
        run(files, tmp_path / "gl")
    assert not (tmp_path / "gl").exists()


def test_the_report_is_written_whatever_happens_to_the_test(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(add_language.Examination, "report", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(files, tmp_path / "gl", test=files / "human.csv", num_train_epochs=1)
    report = json.loads((tmp_path / "gl/report.json").read_text())
    assert report["verdict"] == "not tested" and "ZeroDivisionError" in report["reasons"][0]
    assert (tmp_path / "gl" / LANGUAGE_FILE).is_file() and (tmp_path / "gl/README.md").is_file()


def test_languages_are_balanced():
    from modeling_nrccr.data.load import balance

    rows = balance([["a"] * 7, ["b", "c"]])
    assert [rows.count(name) for name in "abc"] in ([7, 4, 3], [7, 3, 4]) and len(rows) == 14


def draws(mean: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return mean + noise * np.concatenate([[0], np.random.default_rng(seed).standard_normal(1000)])


@pytest.mark.parametrize(
    "ours, fused, translated, expected",
    [
        (138, 158, 136, USE_FUSED),
        (138, 139, 136, USE),  # what the fusion adds is not sure
        (78, 126, 136, ASK),
        (19, 20, 21, DO_NOT),  # nothing finds more than the base
        (5, 6, 21, DO_NOT),
        (21, 21, 21, DO_NOT),  # an adapter that is the identity
        (45, 45, 20, TOO_FEW),  # more by its mean, but not surely
    ],
)
def test_the_verdict_follows_from_intervals(ours, fused, translated, expected):
    wide = 15 if expected == TOO_FEW else 0 if ours == 21 else 1
    sums = {
        "base": draws(21),
        "translated query": draws(translated, wide, 1),
        "ours": draws(ours, wide, 2),
        "ours, half its translation": draws(fused, wide, 3),
    }
    word, reasons = verdict(sums, "ours", 100)
    assert word == expected and f"base {21:.1f}" in reasons[0]
    assert ("more (" in reasons[0]) == (expected != DO_NOT or ours == 21)
    assert verdict(sums, "ours", 1)[0] == TOO_FEW
    # alone it may be taken or not; a translation that is not there is not recommended
    alone = {name: sums[name] for name in ("base", "ours")}
    assert verdict(alone, "ours", 100)[0] in ({USE, TOO_FEW} if ours > 21 else {DO_NOT})
    # English that surely loses rules it out; a loss that is not sure is said
    for loss, noise, ruled_out in ((23, 1, True), (3, 5, False), (0.5, 0.1, False)):
        english = {"English, before": draws(186), "English, ours": draws(186 - loss, noise, 4)}
        word, reasons = verdict(sums | english, "ours", 100)
        assert word == (DO_NOT if ruled_out and expected in (USE, USE_FUSED) else expected)
        assert any("English finds less" in reason for reason in reasons) == (loss > 1)


def test_a_base_is_tested_on_nothing_that_it_was_trained_on(tmp_path):
    captions = [f"a thing {number}" for number in range(60)]
    write_trained_split(tmp_path, "tuxpaint+cldr_emoji", 3, captions[:40])
    assert split_seed(str(tmp_path), None) == 3 and split_seed(str(tmp_path), 1, "multi30k:task1") == 1
    with pytest.raises(ValueError, match="trained with split seed 3: with seed 1 the test would hold"):
        split_seed(str(tmp_path), 1, "tuxpaint")
    check_unseen(str(tmp_path), [*captions[38:], None], "the test")  # one or two may be shared
    with pytest.raises(ValueError, match="trained on 10 of the 30 groups of the test, such as 'a thing 30'"):
        check_unseen(str(tmp_path), captions[30:], "the test")
    # what is made of it has seen what it has seen, and keeps its split
    (tmp_path / "next").mkdir()
    write_trained_split(tmp_path / "next", "mine", 0, ["another"], [str(tmp_path)])
    assert split_seed(str(tmp_path / "next"), None) == 3
    with pytest.raises(ValueError, match="trained on 10 of the 30"):
        check_unseen(str(tmp_path / "next"), captions[30:], "the test")

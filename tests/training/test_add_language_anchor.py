"""`nrccr add-language --source_anchor`: English is taught beside the language, to one text side."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modeling_nrccr import NrccrModel, NrccrProcessor, encode_texts
from modeling_nrccr.data.captions import read_captions
from modeling_nrccr.publishing.verdicts import GIVE_LANGUAGE, NO_LANGUAGE
from modeling_nrccr.recipes.fields import ANCHORS
from modeling_nrccr.training import add_language
from modeling_nrccr.training.examination import one_side
from modeling_nrccr.training.language_data import anchor_rows, join_languages, training_rows
from tests.support import tiny_model
from tests.support.small_base import WORDS, write_small_base


LORA = {"adapter": {"kind": "lora", "layers": -1, "rank": 8, "center": False}, "num_train_epochs": 6}
THROUGH = "English through this language"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A dual encoder, English captions, words, the translations of both, and human captions of pictures."""
    folder = write_small_base(tmp_path_factory.mktemp("files"))
    (folder / "words.txt").write_text("\n".join(WORDS))
    lines = {
        "forth": [f"{word}.\t{word}o." for word in WORDS],
        "back": [f"{word}o.\t{word}." for word in WORDS],
    }
    for name in lines:
        with (folder / f"translations/{name}.tsv").open("a") as file:
            file.write("\n".join(lines[name]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings(files: Path, output: Path, **options) -> dict:
    own = {"base": files / "base", "data": files / "captions.txt", "translator": f"file:{files}/translations"}
    own |= {"per_device_train_batch_size": 64, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return own | {"min_steps": 0, "num_train_epochs": 1, "output_dir": output} | options


def run(files: Path, output: Path, **options) -> dict:
    return add_language.add_language(**settings(files, output, **options))


def parts_of(files: Path, engines: int = 1, **options) -> list[dict]:
    """Return the rows of a language, translated by some engines, which are all the same."""
    translator = ",".join([f"file:{files}/translations"] * engines)
    given = settings(files, files / "unused", lexicon=str(files / "words.txt"), translator=translator, **options)
    script, _ = add_language.parse_arguments([], split_seed=0, **given)
    captions = read_captions(files / "captions.txt", "gl")
    return [training_rows(captions, script, language, False)[0] for language in script.language.split(",")]


def test_each_source_anchors_once_and_none_that_is_held_out(files):
    parts = parts_of(files, engines=2)
    train = [row["source_caption"] for row in parts[0]["train"]]
    captions, words = set(train) - set(WORDS), set(WORDS)
    assert Counter(train)[min(captions)] == 2 and len(captions) < 300
    for anchor, expected in {"captions": captions, "words": words, "both": captions | words, "none": set()}.items():
        rows = anchor_rows(anchor, [*parts, *parts])
        assert sorted(row["source_caption"] for row in rows) == sorted(expected)
        assert all(row["target_caption"] == row["source_caption"] for row in rows)
        held_out = {row["source_caption"] for row in parts[0]["validation"]}
        assert held_out and not held_out & set(expected)
    word = next(row for row in parts[0]["train"] if row["source_caption"] in words)
    parts[0]["validation"].append(word)  # a caption of one word, which is a word of the lexicon too
    assert {row["source_caption"] for row in anchor_rows("words", parts)} == words - {word["source_caption"]}
    pair = next(row for row in parts[0]["train"] if row["source_caption"] == min(captions))
    assert pair["target_caption"] != pair["source_caption"]  # the pairs are as they were


def test_anchors_are_balanced_as_one_more_language(files):
    parts = parts_of(files) * 2
    size, anchors = len(parts[0]["train"]), anchor_rows("captions", parts)
    rows = join_languages(parts, 0, anchors)
    english = [row for row in rows["train"] if row["target_caption"] == row["source_caption"]]
    assert len(english) == size and len(rows["train"]) == 3 * size
    assert rows["validation"] == join_languages(parts, 0)["validation"]
    assert join_languages(parts, 0, ()) == join_languages(parts, 0)


@pytest.mark.slow
def test_english_stays_what_it_is_for_the_base(files, tmp_path):
    pytest.importorskip("peft")
    base, processor = NrccrModel.from_pretrained(files / "base"), NrccrProcessor.from_pretrained(files / "base")
    captions = (files / "captions.txt").read_text().splitlines()
    queries = ["o ".join(caption.split()) + "o" for caption in captions]
    before = encode_texts(base, captions, processor)
    kept, learnt = {}, {}
    for anchor in ("none", "captions"):
        report = run(files, tmp_path / anchor, source_anchor=anchor, test=files / "human.csv", **LORA)
        assert report["source_anchor"] == anchor and THROUGH in report["found"]
        told = [reason for reason in report["reasons"] if reason.startswith((NO_LANGUAGE, GIVE_LANGUAGE))]
        assert len(told) == (anchor != "none")
        assert ("taught beside their translations" in (tmp_path / anchor / "README.md").read_text()) == bool(told)
        assert report["found"]["English, this language"] == report["found"]["English, before"]
        model = NrccrModel.from_pretrained(files / "base")
        model.load_language("gl", tmp_path / anchor)
        kept[anchor] = (encode_texts(model, captions, processor, languages="gl") * before).sum(1).mean()
        learnt[anchor] = (encode_texts(model, queries, processor, languages="gl") * before).sum(1).mean()
    runs = [next(tmp_path.glob(f"{anchor}-checkpoints/language-*")).name for anchor in kept]
    assert runs[0] != runs[1]  # another run, not a continuation
    assert 1 - kept["captions"] < 0.6 * (1 - kept["none"]), kept
    assert learnt["captions"] > (encode_texts(base, queries, processor) * before).sum(1).mean() + 0.05, learnt


@pytest.mark.slow
def test_a_second_text_side_is_anchored_too(files, tmp_path):
    other = tiny_model(1, text_head="pooling", teacher_view="source")
    other.text_tower.encoder.save_pretrained(tmp_path / "encoder")
    NrccrProcessor.from_pretrained(files / "base").tokenizer.save_pretrained(tmp_path / "encoder")
    options = {"test": files / "human.csv", "source_anchor": "captions"}
    found = run(files, tmp_path / "gl", text_encoder=tmp_path / "encoder", **options)["found"]
    assert found["English, this language"] == found["English, before"] != found[THROUGH]
    # that base has two sides: the one that reads languages is held to the one that reads English
    both = tmp_path / "gl/model"
    processor, captions = NrccrProcessor.from_pretrained(both), (files / "captions.txt").read_text().splitlines()
    kept = []
    for anchor in ("none", "captions"):
        run(files, tmp_path / anchor, base=both, source_anchor=anchor, num_train_epochs=10)
        base = NrccrModel.from_pretrained(both)
        base.load_language("gl", tmp_path / anchor)
        own, read = (encode_texts(base, captions, processor, languages=language) for language in (None, "gl"))
        kept.append((own * read).sum(1).mean())
    assert kept[1] > kept[0], kept


def test_pictures_and_parallel_sentences_anchor_their_captions(files, tmp_path):
    captions = (files / "captions.txt").read_text().splitlines()
    lines = ["image,caption", *(f"{number % 24}.png,{caption}" for number, caption in enumerate(captions))]
    (files / "captions.csv").write_text("\n".join(lines) + "\n")
    pictures = {"data": files / "captions.csv", "recipe": "pictures"}
    report = run(files, tmp_path / "pictures", source_anchor="captions", **pictures)
    assert report["steps"] > run(files, tmp_path / "without", **pictures)["steps"]
    lines = (files / "translations/forth.tsv").read_text().splitlines()[1:301]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    assert run(files, tmp_path / "pairs", data=tmp_path / "pairs.tsv", source_anchor="captions")["verdict"]


def test_an_anchor_without_effect_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="source_anchor='all': one of none, captions, words, both"):
        run(files, tmp_path / "gl", source_anchor="all")
    for anchor in ("words", "both"):
        with pytest.raises(ValueError, match="needs words, but there is no lexicon .*: choose captions"):
            run(files, tmp_path / "gl", source_anchor=anchor)
    (tmp_path / "pairs.tsv").write_text("\n".join((files / "translations/forth.tsv").read_text().splitlines()[1:301]))
    with pytest.raises(ValueError, match="parallel sentences go without a lexicon: choose captions"):
        run(files, tmp_path / "gl", data=tmp_path / "pairs.tsv", source_anchor="both", lexicon="wordnet:10")
    assert not (tmp_path / "gl").exists() and set(ANCHORS) == {"none", "captions", "words", "both"}


@pytest.mark.parametrize("lost, expected", [(-2, NO_LANGUAGE), (0.5, NO_LANGUAGE), (1.5, GIVE_LANGUAGE)])
def test_the_report_says_whether_a_language_need_be_given(lost, expected):
    noise = np.random.default_rng(0).standard_normal(1000)
    sums = {"English, before": 176 + np.concatenate([[0], noise])}
    sums["English through ours"] = sums["English, before"] - lost
    assert one_side(sums, "ours", 100).startswith(f"{expected}: English through ours SumR {176 - lost:.1f}")
    assert "not known: the test lacks enough pictures" in one_side(sums, "ours", 3)
    del sums["English through ours"]
    assert "lacks an English caption" in one_side(sums, "ours", 100)

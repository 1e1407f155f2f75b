"""The noise report, the confidence of translations, and the page that says how noisy the engines are."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sacrebleu.metrics import BLEU, CHRF

from modeling_nrccr.cli import noise as command
from modeling_nrccr.publishing import noise_report
from modeling_nrccr.translation import noise as translation_noise
from modeling_nrccr.translation.base import Translator
from modeling_nrccr.translation.noise import (
    FLAGS,
    Pair,
    add_translation_confidence,
    copied_share,
    correlation,
    dataset_pairs,
    encoder_agreement,
    measure_noise,
    translation_confidence,
    wrong_language,
)


ROOT = Path(__file__).parents[2]
# English, Galician by Apertium, and back: the first two as well as can be, the others as it really goes.
GOOD = ("a black dog", "un can negro", "a black dog")
LEFT = ("a stopwatch", "un stopwatch", "a stopwatch")
WRONG = ("ice cream", "Crema de xeo", "Believe it to me of ice")


def test_copied_share():
    assert copied_share(*GOOD[:2]) == 0
    assert copied_share(*LEFT[:2]) == 9 / 11  # letters, not words
    assert copied_share("Dog, DOG!", "dog dog") == 1
    assert copied_share("dog", "") == copied_share("", "can") == copied_share("3", "3") == 0


def test_confidence():
    assert translation_confidence(*GOOD) == 1
    assert translation_confidence("A black dog", "Un can negro", "a Black dog") == 1  # case says nothing
    assert translation_confidence("dog", "dog", "dog") == 0  # came back whole, but never left
    assert translation_confidence(*LEFT) == pytest.approx((2 / 11) ** 2)
    assert translation_confidence(*WRONG) == pytest.approx(
        CHRF(lowercase=True).sentence_score(WRONG[2], [WRONG[0]]).score / 100
    )
    assert 0 < translation_confidence(*WRONG) < 0.3
    for texts in (("dog", "", ""), ("dog", "can", ""), ("", "", "")):
        assert translation_confidence(*texts) == 0


def test_wrong_language():
    english, galician = "two young men are outside near many bushes", "dous homes novos están fóra preto dos arbustos"
    assert wrong_language(galician, "gl", "en") is None and wrong_language(english, "en", "gl") is None
    assert wrong_language(english, "gl", "en") == "en" and wrong_language(galician, "en", "gl") == "gl"
    czech = "dva mladí muži jsou venku poblíž mnoha keřů"
    assert wrong_language(czech, "gl", "en") == "cs"  # neither of the two
    assert wrong_language("", "gl", "en") is wrong_language("123", "gl", "en") is None
    assert wrong_language("to barn ute i skogen sammen med hunden sin", "nb", "en") is None
    assert wrong_language("两个年轻人在外面", "zh-Hant", "en") is None
    with pytest.raises(ValueError, match="does not know the language 'tlh'; it knows ace, af,"):
        wrong_language("a", "tlh", "en")


def test_correlation():
    def average_ranks(values):
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    first, second = [0.1, 0.4, 0.4, 0.9, 0.3], [3, 1, 4, 4, 4]
    both = correlation(first, second)
    assert both["spearman"] == pytest.approx(correlation(average_ranks(first), average_ranks(second))["pearson"])
    assert both["pearson"] == pytest.approx(0.38 / (0.348 * 6.8) ** 0.5)
    assert correlation([1, 2, 3], [1, 10, 11])["spearman"] == pytest.approx(1)
    assert correlation([1, 1], [1, 2]) == {"spearman": None, "pearson": None}
    with pytest.raises(ValueError, match="one length of at least 2, got 2, 3"):
        correlation([1, 2], [1, 2, 3])


NOISY = {
    "empty": ("a red car on the road", "...", "..."),
    "copied": ("Blue sky!", "blue sky", "Blue sky"),
    "repeated_words": ("a man walks along the street", "un home na rúa na rúa na rúa", "a man in the street"),
    "same_output": ("a small cat on the sofa", "un gato pequeno no sofá", "a small cat on the sofa"),
    "wrong_language": ("people walk along the beach", "los niños juegan en la calle y los hombres también", "people"),
    "odd_length": ("two dogs", "dous cans que corren moi amodo pola beira do río grande", "two dogs that run"),
}


def noisy_pairs(reference=None):
    texts = [*NOISY.values(), ("one small cat on the sofa", NOISY["same_output"][1], "a small cat on the sofa")]
    # nothing is wrong with these; they fix the usual ratio of lengths
    texts += [
        (f"a dog and {n} of its friends", f"un can e {n} dos seus amigos", f"a dog and {n} of its friends")
        for n in "3456789"
    ]
    return [Pair(row, f"p/{row}#0", *text, reference) for row, text in enumerate(texts)]


def test_each_kind_of_noise_is_counted_and_nothing_else():
    pairs = noisy_pairs()
    report = measure_noise(pairs, "en", "gl", num_worst=len(pairs))
    flags = {row["row"]: row["flags"] for row in report["worst"]}
    assert len(flags) == len(pairs)
    for row, flag in enumerate(NOISY):
        assert flag in flags[row], (flag, flags[row])
    assert flags[3] == flags[6] == ["same_output"] and flags[1] == ["copied"] and flags[2] == ["repeated_words"]
    assert not any(flags[row] for row in range(7, len(pairs)))
    for name in FLAGS:
        assert report[name] == pytest.approx(100 * sum(name in found for found in flags.values()) / len(pairs)), name
    assert report["languages"] == {"es": 1} and report["captions"] == len(pairs)
    assert report["length_ratio"] == pytest.approx(1.0, abs=0.1)
    assert sum(report["confidence_histogram"]) == len(pairs) and report["confidence_histogram"][9] >= 7
    assert report["confidence"] == pytest.approx(sum(pair.confidence for pair in pairs) / len(pairs))
    assert report["reference_chrf"] is report["reference_bleu"] is report["confidence_correlation"] is None
    json.dumps(report, allow_nan=False)


def test_scores_are_those_of_sacrebleu():
    good = ("a big black dog", "Un can negro e grande", "A big black dog")
    pairs = [
        Pair(0, "a", *good, "un can negro e grande"),
        Pair(1, "b", *LEFT, "un cronómetro"),
        Pair(2, "c", *WRONG, "xeado"),
    ]
    report = measure_noise(pairs, "en", "gl")
    for name, hypotheses, references in (
        ("round_trip", [pair.back_translation for pair in pairs], [pair.source for pair in pairs]),
        ("reference", [pair.translation for pair in pairs], [pair.reference for pair in pairs]),
    ):
        assert report[f"{name}_chrf"] == CHRF(lowercase=True).corpus_score(hypotheses, [references]).score
        assert report[f"{name}_bleu"] == BLEU(lowercase=True).corpus_score(hypotheses, [references]).score > 20
    assert [row["row"] for row in report["worst"]] == [1, 2, 0] and report["worst"][2]["quality"] == 100
    assert report["confidence_correlation"]["spearman"] == pytest.approx(1)
    # with human captions the worst are the worst, not those of lowest confidence
    pairs[0].reference = "tío"
    assert measure_noise(pairs, "en", "gl")["worst"][0]["row"] == 0
    assert len(measure_noise(pairs, "en", "gl", num_worst=2)["worst"]) == 2


def test_what_cannot_be_measured_is_none():
    report = measure_noise([Pair(0, "a", "dog", "qaryq")] * 2, "en", "tlh")
    assert report["wrong_language"] is report["confidence"] is report["round_trip_chrf"] is None
    assert report["worst"] == [] and report["copied"] == 0
    with pytest.raises(ValueError, match="no pairs en-gl"):
        measure_noise([], "en", "gl")
    assert measure_noise([Pair(0, "a", "a black dog", "一只黑色的狗", "a black dog", "一只黑色的狗")] * 4, "en", "zh")[
        "reference_bleu"
    ] == pytest.approx(100)


def test_ten_thousand_characters():
    long = "a dog and a cat " * 625
    report = measure_noise([Pair(0, "a", long, "un can e un gato " * 625, long)], "en", "gl")
    assert report["confidence"] > 0.3 and report["wrong_language"] == 0


def rows(split, origin, **changes):
    """Two rows of a translated data set: of training with translations, or of the test with human captions."""
    training = split == "train"
    columns = {
        "image_id": ["a", "b"],
        "caption_id": ["a#0", "b#0"],
        "source_caption": ["black dog", "ice cream"],
        "target_caption": ["can negro", "Crema de xeo"],
        "back_translation": ["black dog", "Believe it to me of ice"] if training else [None, None],
        "source_language": ["en", "en"],
        "target_language": ["gl", "gl"],
        "target_origin": [origin, origin],
        "reference_source_caption": [None, None] if training else ["a black dog", "gelato"],
        "number": [1, 2],
    } | changes
    features = {name: datasets.Value("int64" if name == "number" else "string") for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def texts(pairs):
    return [(pair.source, pair.translation, pair.back_translation, pair.reference) for pair in pairs]


def test_what_was_translated_from_what():
    train = dataset_pairs(rows("train", "apertium"), references={"b#0": "xeado"})
    assert texts(train["en", "gl"])[1] == ("ice cream", "Crema de xeo", "Believe it to me of ice", "xeado")
    assert train.keys() == {("en", "gl")} and [pair.row for pair in train["en", "gl"]] == [0, 1]
    # people wrote the target: the machine's is the English, and people's English is its reference
    assert texts(dataset_pairs(rows("test", "human"))["gl", "en"])[1] == ("Crema de xeo", "ice cream", None, "gelato")
    human = dataset_pairs(rows("train", "human"))
    assert texts(human["gl", "en"])[1] == ("Crema de xeo", "Believe it to me of ice", None, "ice cream")
    # a machine's caption stands in for a human one in a test
    stand_in = dataset_pairs(rows("test", "apertium"))
    assert texts(stand_in["en", "gl"])[1] == ("gelato", "Crema de xeo", "ice cream", None)
    assert dataset_pairs(rows("train", "human", back_translation=[None, None])) == {}
    columns = {"target_caption_b": ["can", None], "back_translation_b": ["dog", "a cream"]}
    several = dataset_pairs(rows("train", None, target_origin=["apertium", "human"], **columns), engine="b")
    assert texts(several["en", "gl"]) == [("black dog", "can", "dog", None)]
    assert texts(several["gl", "en"]) == [("Crema de xeo", "a cream", None, "ice cream")]


def test_missing_texts_are_named():
    with pytest.raises(ValueError, match=r"row 1 \(b#0\): back_translation is None; translate the data first"):
        dataset_pairs(rows("train", "apertium", back_translation=["dog", None]))
    untranslated = datasets.DatasetDict(train=rows("train", None, target_caption=[None, None]))
    for function in (translation_noise.noise_report, add_translation_confidence):
        with pytest.raises(ValueError, match=r"train, row 0 \(a#0\): target_caption is None"):
            function(untranslated)
    with pytest.raises(ValueError, match=r"the columns \['back_translation'\] are missing; it has"):
        dataset_pairs(rows("train", "apertium").remove_columns("back_translation"))


def test_add_translation_confidence():
    before = datasets.DatasetDict(train=rows("train", "apertium"), test=rows("test", "human"))
    after = add_translation_confidence(before)
    assert isinstance(after, datasets.DatasetDict)
    expected = [1, translation_confidence(*WRONG)]
    assert after["train"]["translation_confidence"][:] == pytest.approx(expected)
    assert after["test"]["translation_confidence"][:] == [1, 1]
    assert after["train"].features["translation_confidence"] == datasets.Value("float32")
    assert after["train"].remove_columns("translation_confidence")[:] == before["train"][:]
    again = add_translation_confidence(after["train"])
    assert again["translation_confidence"][:] == pytest.approx(expected) and len(again.column_names) == 11
    mixed = add_translation_confidence(rows("train", None, target_origin=["human", "apertium"]))
    assert mixed["translation_confidence"][:] == pytest.approx(expected)
    clean = rows("train", "human", back_translation=[None, None])
    assert add_translation_confidence(clean)["translation_confidence"][:] == [1, 1]
    assert len(add_translation_confidence(clean.select([]))) == 0


def test_an_encoder_has_its_say():
    vectors = {"black dog": [1, 0], "can negro": [0.8, 0.6], "ice cream": [0, 1], "Crema de xeo": [1, 0]}

    def embed(texts):
        return np.array([vectors[text] for text in texts])

    agreement = encoder_agreement(["black dog", "ice cream"], ["can negro", "Crema de xeo"], embed)
    others = (0.8 + 1 + 0.6 + 0) / 4  # each caption with each translation
    assert agreement == pytest.approx([(0.8 - others) / (1 - others), 0])
    before = datasets.DatasetDict(train=rows("train", "apertium"), test=rows("test", "human"))
    after = add_translation_confidence(before, embed)
    expected = [(1 + agreement[0]) / 2, translation_confidence(*WRONG) / 2]
    assert after["train"]["translation_confidence"][:] == pytest.approx(expected)
    assert after["test"]["translation_confidence"][:] == [1, 1]  # nothing to ask about
    with pytest.raises(ValueError, match="2 captions, 2 translations"):
        encoder_agreement(["a", "b"], ["c", "d"], lambda texts: np.ones((2, 3)))


@pytest.mark.parametrize(
    "package, call",
    [
        ("sacrebleu.metrics", lambda: translation_confidence(*GOOD)),
        ("py3langid.langid", lambda: wrong_language("a", "gl", "en")),
    ],
)
def test_without_the_extra(package, call, monkeypatch):
    caches = (translation_noise._chrf, translation_noise._identifier, translation_noise._languages)
    for function in caches:
        function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r'pip install "modeling_nrccr\[noise\]"'):
            call()


@pytest.mark.slow
def test_the_module_imports_without_the_extra():
    code = (
        "import sys; sys.modules['sacrebleu'] = sys.modules['py3langid'] = None; "
        "from modeling_nrccr.translation.noise import copied_share; print(copied_share('a dog', 'un dog'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "0.6", result.stderr


# ------------------------------------------------------------------------------------------------- report and page


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, text):
        self.text.append(text)


def test_the_page_is_whole_and_escaped():
    evil = '<script>alert("x")</script> & co'
    pairs = [Pair(0, f"{evil}#0", evil, evil, evil, evil), *noisy_pairs("un can")]
    entry = {"split": evil, "engine": evil, **measure_noise(pairs, "en", "gl")}
    page = Page()
    text = noise_report.render_page(evil, [entry, entry | {"confidence_histogram": None, "worst": []}])
    page.feed(text)
    assert "script" not in page.tags and not page.addresses and "http" not in text
    assert page.text.count(evil) >= 6 and text.count("<tr>") == text.count("</tr>")
    shown = "".join(page.text)
    for row in entry["worst"]:
        assert row["translation"] in shown and row["caption_id"] in shown
    assert "wrong language" in shown and "Spearman" in shown


def test_the_table_lines_up():
    entry = {"split": "train", "engine": "apertium", **measure_noise(noisy_pairs(), "en", "gl")}
    lines = noise_report.format_entries([entry, entry | {"split": "test", "confidence": None}]).split("\n")
    assert lines[0].split() == ["train:", "en-gl", "test:", "en-gl"] and lines[1].split() == ["apertium"] * 2
    assert len({len(line) for line in lines}) == 1 and not any("reference" in line for line in lines)
    assert re.fullmatch(r"confidence +0\.\d\d +–", next(line for line in lines if line.startswith("confidence")))


class Capitals(Translator):
    """Its Galician is capitals with a mark on each word, which it takes off again; it leaves `dog` as it is."""

    name = "capitals"

    def supported_pairs(self):
        return [("en", "gl"), ("gl", "en")]

    def _translate(self, texts, source, target):
        if target == "en":
            return [text.lower().replace("ñ", "") for text in texts]
        return [" ".join(w if w == "dog" else f"{w}ñ".upper() for w in text.split()) for text in texts]


@pytest.fixture
def pictures(tmp_path, monkeypatch, no_bars):
    captions = ["a red dog", "a blue cat", "two green birds", "one car"]
    lines = ["image,caption,target_caption,split"]
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
        split = "test" if number == 3 else "validation" if number == 2 else "train"
        lines.append(f"{number}.png,{caption},humano {number},{split}")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(noise_report, "load_engine", lambda *args, **kwargs: Capitals())
    return ["--data", "caption_files", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "noise")]


def test_the_command(pictures, capsys):
    command.main([*pictures, "--against_human"])
    folder = Path(pictures[-1])
    report = json.loads((folder / "noise.json").read_text())
    train, validation, test = report["entries"]
    assert (train["split"], train["engine"], train["captions"]) == ("train", "capitals", 2)
    assert train["reference_chrf"] < 20 and train["confidence_correlation"] and train["round_trip_chrf"] == 100
    assert (test["source_language"], test["target_language"], test["engine"]) == ("gl", "en", None)
    assert test["worst"][0]["translation"] == "humano 3" and test["worst"][0]["reference"] == "one car"
    assert report["settings"]["data"] == "caption_files" and str(folder.parent) not in json.dumps(report)
    assert sorted(path.name for path in folder.iterdir()) == ["noise.html", "noise.json"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"next: open {folder / 'noise.html'} in a browser"
    assert "train: en-gl" in printed and "capitals" in printed and "chrF to reference" in printed
    command.main([*pictures, "--splits", "train", "--num_worst", "1"])
    (only,) = json.loads((folder / "noise.json").read_text())["entries"]
    assert only["reference_chrf"] is None and only["worst"][0]["source"] == "a red dog"
    with pytest.raises(SystemExit, match="error: caption_files has no split dev; it has train, validation, test"):
        command.main([*pictures, "--splits", "dev"])


@pytest.mark.network
def test_confidence_tells_good_from_bad_translations_of_a_real_engine(tmp_path):
    """Galician training captions by Apertium against those that people wrote: docs/translation.json has 0.49."""
    command.main(["--against_human", "--splits", "train", "--output_dir", str(tmp_path)])
    (entry,) = json.loads((tmp_path / "noise.json").read_text())["entries"]
    assert entry["engine"] == "apertium" and entry["captions"] > 1000
    assert entry["confidence_correlation"]["spearman"] > 0.45 and entry["confidence_correlation"]["pearson"] > 0.45
    assert 5 < entry["copied"] < 20 and entry["empty"] == 0


# ----------------------------------------------------------------------------------------------------------- docs


def test_the_page_agrees_with_its_json():
    from benchmarks.translation import noise as benchmark

    report = json.loads((ROOT / "docs/translation.json").read_text(encoding="utf-8"))
    block = benchmark.BLOCK.search((ROOT / "docs/translation.md").read_text(encoding="utf-8"))
    assert block[1] + benchmark.tables(report) + block[2] == block[0]
    assert f"{report['pictures']['apertium en-gl']['reference_chrf']:.1f}" in block[0]

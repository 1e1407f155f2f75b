"""The search and evaluation scripts with a tiny model, and the page and picture of results."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import datasets
import pytest
import torch
from PIL import Image, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import EfficientNetLiteConfig, NrccrConfig, NrccrModel
from modeling_nrccr.cli import evaluate, search
from modeling_nrccr.cli import index as index_command
from modeling_nrccr.loading.models import load_model, load_with_languages
from modeling_nrccr.processing_nrccr import NrccrProcessor
from modeling_nrccr.publishing import search_page
from modeling_nrccr.publishing.search_page import QueryRow, Result, draw_sheet, render_html, write_search_page
from modeling_nrccr.publishing.tables import format_table
from modeling_nrccr.retrieval import evaluation as evaluate_retrieval
from modeling_nrccr.retrieval.index import open_index
from modeling_nrccr.retrieval.metrics import chance_metrics, compute_retrieval_metrics
from modeling_nrccr.retrieval.retriever import NrccrRetriever
from modeling_nrccr.translation.base import Translator
from tests.support import ROOT


WORDS = ["<pad>", "<unk>", "can", "gato", "pato"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved model of random weights with its processor."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 7,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 9,
    }
    vision = EfficientNetLiteConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_size=37, image_size=32)
    model = NrccrModel(NrccrConfig(text_config=text, vision_config=vision, projection_dim=11, key_query_size=32))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    for parameter in model.parameters():  # at their usual start, activations of so thin a tower die out
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    NrccrProcessor(tokenizer, ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(checkpoint, tmp_path_factory):
    """The file of a language that finds other pictures than the model does without it."""
    model = NrccrModel.from_pretrained(checkpoint)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.add_language("xx").update.weight, std=2.0)
    folder = tmp_path_factory.mktemp("language")
    model.save_language("xx", folder)
    return folder / "language_adapter.safetensors"


def picture(number, size=(40, 30)):
    return Image.linear_gradient("L").resize(size).rotate(31 * number).convert("RGB")


def example_rows():
    results = [Result(picture(i), f"caption {i}", 0.5 - i / 10, correct=i == 1) for i in range(5)]
    return [
        QueryRow("cara con ñ á é", "a face", results, 2, "a *face"),
        QueryRow('<script>alert("x")</script> & co', None, [Result(picture(7), '"><b>', 0.1)] * 7, 14),
        QueryRow("sen resposta coñecida", None, []),
    ]


# --------------------------------------------------------------------------------------------------------- search


def test_search_prints_the_best_pictures_and_draws_them(checkpoint, tmp_path, capsys):
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    for i in range(7):
        picture(i).save(gallery / f"{i}.png")
    (gallery / "broken.png").write_bytes(b"\x89PNG")
    arguments = [
        "--model",
        str(checkpoint),
        "--folder",
        str(gallery),
        "gato",
        "un can",
        "--k",
        "3",
    ]
    search.main([*arguments, "--output", str(tmp_path / "sheet.png")])
    output = capsys.readouterr().out
    assert f"7 pictures in {gallery}, 1 skipped" in output
    gato, can = output.split("\nun can\n")
    for part in (gato, can):
        hits = re.findall(r"^ +(\d)  (-?\d\.\d{3})  (\d\.png)$", part, re.MULTILINE)
        ranks, scores, ids = zip(*hits)
        assert ranks == ("1", "2", "3") and len(set(ids)) == 3
        assert float(scores[0]) >= float(scores[1]) >= float(scores[2]) and len(set(scores)) > 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == search_page.WIDTH and sheet.format == "PNG"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--folder": "nowhere"}, "error: The gallery 'nowhere' is not a folder"),
        ({"--k": "1 "}, "error: The query is ' ': a text that is not blank"),
        ({"--translation": "\ud800"}, "error: --translation holds '.ud800' at character 0"),
        ({"--language": "xx"}, "error: no adapter for the language 'xx'"),
        (
            {"--model": "no/such/model/here"},
            "error: Cannot load the model 'no/such/model/here': there is no such folder",
        ),
    ],
)
def test_search_says_what_is_wrong_in_a_line(checkpoint, tmp_path, change, message):
    picture(0).save(tmp_path / "0.png")
    arguments = {"--model": str(checkpoint), "--folder": str(tmp_path)} | change
    query = " " if "--k" in change else "gato"
    with pytest.raises(SystemExit, match=message):
        search.main([query, *(part for pair in arguments.items() for part in pair)])


def test_names_are_shown_without_what_a_terminal_obeys(checkpoint, tmp_path, capsys):
    evil = "a\x1b]0;title\x07\u202egnp.png"
    picture(0).save(tmp_path / evil)
    search.main(["--model", str(checkpoint), "--folder", str(tmp_path), "gato\x1b[2J"])
    shown = capsys.readouterr().out
    assert r"a\x1b]0;title\x07\u202egnp.png" in shown and r"gato\x1b[2J" in shown and "\x1b" not in shown
    chance = chance_metrics(2, 2)
    assert "\x1b" not in format_table({"e\x1b[2J\ud800": chance}) and r"e\x1b[2J\ud800 " in format_table(
        {"e\x1b[2J\ud800": chance}
    )


def test_search_asks_in_the_language_that_is_named(checkpoint, language, tmp_path, capsys):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    found = {}
    for spec in ("base", f"yy={language}", f"yy={language.parent}"):
        search.main(["--model", str(checkpoint), "--folder", str(tmp_path), "gato", "--language", spec])
        found[spec] = re.findall(r"0\.\d{3}|-0\.\d{3}", capsys.readouterr().out)
    base, of_file, of_folder = found.values()
    assert len(base) == 3 and base != of_file == of_folder


def index_of(checkpoint, tmp_path, *more) -> str:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    index_command.main([str(checkpoint), str(tmp_path), str(tmp_path / "index"), *more])
    return str(tmp_path / "index")


def test_an_index_remembers_its_model_and_languages(checkpoint, language, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "model")
    shutil.copytree(language.parent, "xx")
    index = index_of("model", tmp_path, "--language", "xx=xx", "--language", "base")
    made_by = json.loads((tmp_path / "index/index.json").read_text())["made_by"]
    assert made_by == {"model": str(tmp_path / "model"), "languages": [f"xx={tmp_path / 'xx'}", "base"]}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def hits(*arguments):
        capsys.readouterr()
        search.main([index, "gato", *arguments])
        return re.findall(r"-?0\.\d{3}", capsys.readouterr().out)

    remembered = hits()
    assert len(remembered) == 3 and remembered == hits("--model", str(checkpoint), "--language", f"xx={language}")
    assert hits("--language", "base") == hits("--model", str(checkpoint)) != remembered
    NrccrRetriever.load(index, *load_model(str(checkpoint))).save(tmp_path / "copy.db")
    assert open_index(tmp_path / "copy.db", 0, create=False).made_by == made_by
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(
        SystemExit, match=f"error: The index .* was made by '{tmp_path}/model', .*no such folder.*--model"
    ):
        hits()
    assert hits("--model", str(tmp_path / "moved"), "--language", f"xx={language}") == remembered
    written = NrccrRetriever(*load_model(str(checkpoint)))
    written.add([picture(0)])
    written.save(tmp_path / "index")  # from Python it says nothing, so that what is published names no folder
    assert str(tmp_path) not in (tmp_path / "index/index.json").read_text()
    with pytest.raises(SystemExit, match="does not say which model made it: name it, --model"):
        hits()


@pytest.mark.parametrize(
    "made_by", [3, {"model": "a"}, {"model": 1, "languages": []}, {"model": "a", "languages": "b"}]
)
def test_an_index_that_says_nonsense_of_its_model_is_refused(checkpoint, tmp_path, made_by):
    index = index_of(checkpoint, tmp_path)
    content = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(content | {"made_by": made_by}))
    with pytest.raises(SystemExit, match="Cannot read the index .*its made_by is"):
        search.main([index, "gato"])


def test_a_search_imports_what_it_uses(checkpoint, tmp_path):
    index = index_of(checkpoint, tmp_path)
    script = "import json, sys; sys.argv[0] = 'nrccr'; from modeling_nrccr.cli.main import main; main(sys.argv[1:]); "
    command = [sys.executable, "-c", f"{script}print(json.dumps([*sys.modules]))", "search", index, "gato", "can"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    *lines, modules = result.stdout.splitlines()
    assert lines[0] == f"3 pictures in {index}" and len(lines) == 11
    heavy = ("datasets", "transformers.trainer", "peft", "gradio", "fastapi", "evaluate", "av", "pymilvus")
    ours = tuple(f"modeling_nrccr.{name}" for name in ("training", "translation", "data", "publishing", "serving"))
    assert not {name for name in json.loads(modules) if name in heavy or name.startswith(ours)}


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--gallery", "x", "gato"], "--gallery is now --folder"),
        (["x", "--query", "gato"], "--query is now QUERY, as in nrccr search INDEX QUERY"),
        (["x", "gato", "--source_query_weight", "0.5"], "--source_query_weight is now --translation_weight"),
        (["x"], "give an index and queries: nrccr search INDEX QUERY"),
        (["--folder", ".", "gato"], "A folder of pictures needs a model: --model NAME"),
    ],
)
def test_old_words_and_lacking_ones_are_said_in_a_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as raised:
        search.main(arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2 and line in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs).get("class")))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_shows_everything(tmp_path):
    html_path, png_path = write_search_page(tmp_path / "new", "Title <1>", example_rows())
    assert (html_path, png_path) == (tmp_path / "new" / "search.html", tmp_path / "new" / "search.png")
    html = html_path.read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.addresses) == 12 and all(
        address.startswith("data:image/webp;base64,") for address in page.addresses
    )
    assert "script" not in {tag for tag, _ in page.tags} and "url(" not in html and "@import" not in html
    assert page.tags.count(("li", "right")) == page.tags.count(("svg", "mark")) == 1  # colour and a shape
    for text in ("Title <1>", "cara con ñ á é", "a face", "a *face", '<script>alert("x")</script>', '"><b>', "0.400"):
        assert text in page.text
    assert "The right picture is not here: it is at rank 14." in page.text
    assert page.text.count("The right picture is not here") == 1
    assert "comes first for 0 of 2 queries and is among the best 7 for 1." in page.text
    assert "meta" in {tag for tag, _ in page.tags} and "prefers-color-scheme: dark" in html
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["search.html", "search.png"]


def test_the_picture_marks_the_right_one():
    plain, marked = (
        [QueryRow("can", None, [Result(picture(0), "can", 0.5, correct)], rank)]
        for correct, rank in ((False, 9), (True, 1))
    )
    green = Image.new("RGB", (1, 1), search_page.GOOD).getpixel((0, 0))
    counts = [
        sum(count for count, color in draw_sheet("t", rows).getcolors(2**24) if color == green)
        for rows in (plain, marked)
    ]
    assert counts[0] == 0 and counts[1] > 2000
    # seven pictures take two lines of five, and a card is as high as its content
    assert draw_sheet("t", example_rows()[1:2]).height > draw_sheet("t", plain).height + search_page.TILE


def test_letters_are_drawn_or_written_without_accents(monkeypatch):
    """A bare machine has only Pillow's own font, which has no accented letters."""
    monkeypatch.setattr(search_page, "FONTS", ())
    pen = search_page.Pen(Image.new("RGB", (10, 10)))
    text, font = pen.prepare("avión con ñ, año, 猫", 20, False)
    assert text == "avion con n, ano, ?" and not search_page._missing(font, text)
    with pytest.raises(ValueError, match="Cannot read the font 'none.ttf'"):
        search_page.Pen(Image.new("RGB", (10, 10)), "none.ttf")


def test_text_is_broken_into_lines_that_fit():
    font = ImageFont.load_default(20)
    for text in ("one two three four five six seven", "a" * 60, "short", "", "two  words " + "b" * 30):
        for limit in (1, 2, 9):
            lines = search_page._wrap(text, font, 120, limit)
            assert len(lines) <= limit and all(font.getlength(line) <= 120 for line in lines)
            cut = lines and lines[-1].endswith("...")
            assert cut or "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert search_page._wrap("one two three", font, 1000, 2) == ["one two three"]


def test_a_transparent_picture_is_shown_on_white():
    row = QueryRow("can", None, [Result(Image.new("RGBA", (60, 60), (255, 0, 0, 0)), "nothing", 0.1)])
    assert "data:image/webp" in render_html("t", [row])
    assert (255, 0, 0) not in [color for _, color in draw_sheet("t", [row]).getcolors(2**24)]


# ----------------------------------------------------------------------------------------------------- evaluation


def test_sources_are_measured_on_their_own_galleries():
    generator = torch.Generator().manual_seed(0)
    image_ids = ["stamps/a", "emoji/1", "emoji/2", "stamps/b", "emoji/3"]
    owner = torch.tensor([4, 0, 0, 1, 2, 3, 4])
    texts, images = torch.randn(7, 5, generator=generator), torch.randn(5, 5, generator=generator)
    results = evaluate_retrieval.metrics_by_source(image_ids, texts, images, owner)
    assert list(results) == ["all", "emoji", "stamps"]
    emoji = compute_retrieval_metrics(texts[[0, 3, 4, 6]], images[[1, 2, 4]], torch.tensor([2, 0, 1, 2]))
    assert results["emoji"]["metrics"] == emoji
    assert results["all"]["metrics"] == compute_retrieval_metrics(texts, images, owner)
    assert results["stamps"]["chance"] == chance_metrics(3, 2, torch.tensor([0, 0, 1]))
    assert results["stamps"]["counts"] == {"captions": 3, "images": 2}
    plain = evaluate_retrieval.metrics_by_source(list("abcde"), texts, images, owner)
    assert list(plain) == ["all"] and plain["all"] == results["all"]


@pytest.fixture
def splits(monkeypatch):
    columns = {
        "image_id": ["emoji/1", "stamps/a", "emoji/1", "stamps/b"],
        "target_caption": ["can", "gato", "can can", "pato gato"],
        "image": [picture(0), picture(3), picture(0), picture(5)],
    }
    features = datasets.Features(
        {"image_id": datasets.Value("string"), "target_caption": datasets.Value("string"), "image": datasets.Image()}
    )
    test = datasets.Dataset.from_dict(columns, features=features)
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({"test": test})

    monkeypatch.setattr(evaluate_retrieval, "load_caption_dataset", load)
    return asked


def test_evaluation_writes_what_it_prints(checkpoint, splits, tmp_path, capsys):
    arguments = [
        str(checkpoint),
        "--data",
        "a+b",
        "--query_language",
        "ca",
        "--output",
        str(tmp_path / "m.json"),
    ]
    evaluate.main(arguments + ["--split_seed", "3"])
    assert splits == [("a+b", "ca", 3)]
    report, output = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out
    assert set(report) == {
        "test",
        "test_emoji",
        "test_stamps",
        "chance",
        "chance_emoji",
        "chance_stamps",
        "intervals",
        "intervals_emoji",
        "intervals_stamps",
        "counts",
        "settings",
    }
    assert report["counts"]["all"] == {"captions": 4, "images": 3, "groups": 3}
    assert (
        report["settings"] | {"data": "a+b", "query_languages": ["ca"], "split": "test", "split_seed": 3}
        == report["settings"]
    )
    assert report["test_emoji"]["sum_recall"] == 600 and report["chance"]["v2t_recall@10"] == 100
    low, high = report["intervals"]["sum_recall"]
    assert low <= report["test"]["sum_recall"] <= high and low < high
    assert (
        f"{report['test']['sum_recall']:.1f} ({low:.1f} to {high:.1f})"
        in output.split("all: 4 captions, 3 pictures")[1].splitlines()[0]
    )
    assert "4 captions: one is 25.0 points; intervals are of draws of 3 groups of pictures" in output
    with pytest.raises(SystemExit, match="error: No split 'dev'; there are test"):
        evaluate.main([*arguments, "--split", "dev"])


def test_what_is_measured_is_the_language_that_is_named(checkpoint, language, splits, tmp_path, capsys):
    (test,) = evaluate_retrieval.load_caption_dataset("a", "ca", 0).values()
    model, processor = load_with_languages(str(checkpoint), [f"ca={language}"])

    def measure(*arguments):
        output = str(tmp_path / "m.json")
        evaluate.main([str(checkpoint), "--data", "a", "--output", output, *arguments])
        return json.loads((tmp_path / "m.json").read_text())

    def expected(reader):
        found = evaluate_retrieval.evaluate_dataset(model, processor, test, language=reader, show_progress=False)
        return found["all"]["metrics"]

    assert expected("ca") != expected(None)
    assert measure("--language", f"ca={language}")["test"] == expected("ca")
    assert measure("--query_language", "gl", "--language", f"ca={language}")["test"] == expected("ca")  # the only one
    found = measure("--query_language", "ca", "--language", "base", "--language", f"xx={language}")
    assert found["test"] == expected(None)
    several = measure(
        "--query_language", "ca", "--query_language", "gl", "--language", "base", "--language", f"ca={language}"
    )
    assert several["languages"] == {"ca": expected("ca"), "gl": expected(None)}
    assert several["settings"]["read_by"] == {"ca": "ca", "gl": "base"}
    assert "read by: ca ca, gl base" in capsys.readouterr().out


class Reverser(Translator):
    name = "reverser"

    def supported_pairs(self):
        return [("ca", "en")]

    def _translate(self, texts, source, target):
        return [{"can": "gato", "gato": "can"}.get(text, "pato") for text in texts]


def test_the_translated_query_and_both_fused_stand_beside_it(
    checkpoint, language, splits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("NRCCR_CACHE", str(tmp_path / "cache"))
    report = {}
    for weight in ("0", "0.5", "1"):
        flags = ["--translator", f"{__name__}:Reverser", "--translation_weight", weight]
        evaluate.main([str(checkpoint), "--language", f"ca={language}", *flags, "--output", str(tmp_path / "m.json")])
        report[weight] = json.loads((tmp_path / "m.json").read_text())
    output = capsys.readouterr().out
    own, translated = report["0"]["test"], report["0"]["translated"]["metrics"]
    assert report["0"]["fused"]["metrics"] == own != translated == report["1"]["fused"]["metrics"]
    texts = ["gato", "can", "pato", "pato"]  # that the model reads without the language
    model, processor = load_with_languages(str(checkpoint), [])
    (test,) = evaluate_retrieval.load_caption_dataset("a", "ca", 0).values()
    rows = test.remove_columns("target_caption").add_column("target_caption", texts)
    found = evaluate_retrieval.evaluate_dataset(model, processor, rows, language=None, show_progress=False)
    assert translated == found["all"]["metrics"]
    assert (
        report["0.5"]["settings"]["translator"] == "reverser"
        and report["0.5"]["settings"]["translation_weight"] == 0.5
    )
    low, high = report["0.5"]["fused"]["intervals"]["sum_recall"]
    lines = re.findall(r"^all: 4 captions, 3 pictures(: \w+ query)? ", output, re.MULTILINE)
    assert lines == ["", ": translated query", ": fused query"] * 3
    assert f"({low:.1f} to {high:.1f})" in output and "its share of a fused query: 0.5" in output
    with pytest.raises(SystemExit, match="error: reverser has no pair gl-en"):
        evaluate.main([str(checkpoint), "--query_language", "gl", "--translator", f"{__name__}:Reverser"])


def test_the_language_of_the_queries_is_known_or_asked_for(checkpoint, splits, tmp_path):
    with pytest.raises(SystemExit, match="error: the language of the queries is not known: name it, --query_language"):
        evaluate.main([str(checkpoint)])
    model = NrccrModel.from_pretrained(checkpoint)
    model.add_language("ca")
    assert evaluate_retrieval.languages_to_ask("a", [], [], model) == ["ca"]
    assert evaluate_retrieval.languages_to_ask("a", ["gl"], [], model) == ["gl"]
    assert evaluate_retrieval.languages_to_ask("a", [], ["base", "gl=x", "gl"], model) == ["gl"]
    assert evaluate_retrieval.choose_split({"test": "", "test_2016": "a"}, None) == ("test_2016", "a")
    assert evaluate_retrieval.choose_split({"dev": "a", "test": "b"}, None) == ("test", "b")
    with pytest.raises(ValueError, match="No split 'test'; there are dev, train"):
        evaluate_retrieval.choose_split({"dev": "a", "train": "b", "test": ""}, None)


def test_the_split_seed_is_that_of_the_training(tmp_path, capsys):
    assert evaluate_retrieval.seed_of(str(tmp_path), None) == 0
    assert "assuming" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": {"seed": 1, "split_seed": 5}}))
    assert evaluate_retrieval.seed_of(str(tmp_path), None) == evaluate_retrieval.seed_of(str(tmp_path), 5) == 5
    with pytest.raises(ValueError, match="trained with split seed 5: with .*seed 4"):
        evaluate_retrieval.seed_of(str(tmp_path), 4)


def test_a_row_without_a_caption_is_named():
    rows = datasets.Dataset.from_dict({"image_id": ["emoji/1", "emoji/2"], "target_caption": ["can", None]})
    with pytest.raises(ValueError, match=r"Row 1 \(emoji/2\) has no target_caption: None"):
        evaluate_retrieval.evaluate_dataset(None, None, rows)


def test_the_table_has_a_line_for_each_row():
    chance = chance_metrics(542, 542)
    lines = format_table({"chance": chance, "a much longer name": chance}).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[1:]}) == 1
    assert lines[3].split() == ["chance"] + ["0.2", "0.9", "1.8", "271.5", "0.013"] * 2 + ["5.9"]

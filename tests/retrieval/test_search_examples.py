"""The search and evaluation scripts with a tiny model, and the page and picture of results."""

import json
import re
from html.parser import HTMLParser

import datasets
import pytest
import torch
from PIL import Image, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import EfficientNetLiteConfig, NrccrConfig, NrccrModel
from modeling_nrccr.processing_nrccr import NrccrProcessor
from modeling_nrccr.publishing import search_page
from modeling_nrccr.publishing.search_page import QueryRow, Result, draw_sheet, render_html, write_search_page
from modeling_nrccr.publishing.tables import format_table
from modeling_nrccr.retrieval import evaluation as evaluate_retrieval
from modeling_nrccr.retrieval import search
from modeling_nrccr.retrieval.metrics import chance_metrics, compute_retrieval_metrics


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
        "--gallery",
        str(gallery),
        "--query",
        "gato",
        "--query",
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
        ({"--gallery": "nowhere"}, "error: The gallery 'nowhere' is not a folder"),
        ({"--query": " "}, "error: --query is ' ': a text that is not blank"),
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
    arguments = {"--model": str(checkpoint), "--gallery": str(tmp_path), "--query": "gato"} | change
    with pytest.raises(SystemExit, match=message):
        search.main([part for pair in arguments.items() for part in pair])


def test_names_are_shown_without_what_a_terminal_obeys(checkpoint, tmp_path, capsys):
    evil = "a\x1b]0;title\x07\u202egnp.png"
    picture(0).save(tmp_path / evil)
    search.main(["--model", str(checkpoint), "--gallery", str(tmp_path), "--query", "gato\x1b[2J"])
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
        search.main(["--model", str(checkpoint), "--gallery", str(tmp_path), "--query", "gato", "--language", spec])
        found[spec] = re.findall(r"0\.\d{3}|-0\.\d{3}", capsys.readouterr().out)
    base, of_file, of_folder = found.values()
    assert len(base) == 3 and base != of_file == of_folder


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
        "--model",
        str(checkpoint),
        "--dataset",
        "a+b",
        "--target",
        "ca",
        "--output",
        str(tmp_path / "m.json"),
    ]
    evaluate_retrieval.main(arguments + ["--seed", "3"])
    assert splits == [("a+b", "ca", 3)]
    report, output = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out
    assert set(report) == {
        "test",
        "test_emoji",
        "test_stamps",
        "chance",
        "chance_emoji",
        "chance_stamps",
        "counts",
        "settings",
    }
    assert report["counts"]["all"] == {"captions": 4, "images": 3}
    assert (
        report["settings"] | {"dataset": "a+b", "target": "ca", "split": "test", "split_seed": 3} == report["settings"]
    )
    assert report["test_emoji"]["sum_recall"] == 600 and report["chance"]["v2t_recall@10"] == 100
    assert f"{report['test']['sum_recall']:.1f}" in output.split("all: 4 captions, 3 pictures")[1].splitlines()[0]
    with pytest.raises(SystemExit, match="error: No split 'dev'; there are test"):
        evaluate_retrieval.main([*arguments, "--split", "dev"])


def test_what_is_measured_is_the_language_that_is_named(checkpoint, language, splits, tmp_path, capsys):
    (test,) = evaluate_retrieval.load_caption_dataset("a", "ca", 0).values()
    model, processor = search.load_with_languages(str(checkpoint), [f"ca={language}"])

    def measure(*arguments):
        output = str(tmp_path / "m.json")
        evaluate_retrieval.main(["--model", str(checkpoint), "--dataset", "a", "--output", output, *arguments])
        return json.loads((tmp_path / "m.json").read_text())

    def expected(reader):
        found = evaluate_retrieval.evaluate_dataset(model, processor, test, language=reader, show_progress=False)
        return found["all"]["metrics"]

    assert expected("ca") != expected(None)
    assert measure("--target", "ca", "--language", f"ca={language}")["test"] == expected("ca")
    assert measure("--target", "gl", "--language", f"ca={language}")["test"] == expected("ca")  # the only one
    assert measure("--target", "ca", "--language", "base", "--language", f"xx={language}")["test"] == expected(None)
    several = measure("--target", "ca,gl", "--language", "base", "--language", f"ca={language}")
    assert several["languages"] == {"ca": expected("ca"), "gl": expected(None)}
    assert several["settings"]["read_by"] == {"ca": "ca", "gl": "base"}
    assert "read by: ca ca, gl base" in capsys.readouterr().out


def test_the_split_seed_is_that_of_the_training(tmp_path, capsys):
    assert evaluate_retrieval.split_seed(str(tmp_path), None) == 0
    assert "assuming" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": {"seed": 1, "split_seed": 5}}))
    assert evaluate_retrieval.split_seed(str(tmp_path), None) == evaluate_retrieval.split_seed(str(tmp_path), 5) == 5
    with pytest.raises(ValueError, match="trained with split seed 5: with .*seed 4"):
        evaluate_retrieval.split_seed(str(tmp_path), 4)


def test_a_row_without_a_caption_is_named():
    rows = datasets.Dataset.from_dict({"image_id": ["emoji/1", "emoji/2"], "target_caption": ["can", None]})
    with pytest.raises(ValueError, match=r"Row 1 \(emoji/2\) has no target_caption: None"):
        evaluate_retrieval.evaluate_dataset(None, None, rows)


def test_the_table_has_a_line_for_each_row():
    chance = chance_metrics(542, 542)
    lines = format_table({"chance": chance, "a much longer name": chance}).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[1:]}) == 1
    assert lines[3].split() == ["chance"] + ["0.2", "0.9", "1.8", "271.5", "0.013"] * 2 + ["5.9"]

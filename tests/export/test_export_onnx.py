"""Exported sides of tiny models give the model's embeddings, at any batch size, length and padding."""

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast, ViTImageProcessorPil

from modeling_nrccr import NrccrModel, encode_images, encode_texts
from modeling_nrccr.cli.export import main
from modeling_nrccr.export import onnx as export_onnx
from modeling_nrccr.export.formats import export_model
from modeling_nrccr.export.onnx import OnnxModel, write_onnx
from modeling_nrccr.export.report import format_report
from modeling_nrccr.export.sides import compare, list_sides
from modeling_nrccr.loading.models import load_with_languages
from modeling_nrccr.processing_nrccr import NrccrProcessor, NrccrTextProcessor
from tests.model.test_dual_encoders import DUAL_ENCODERS
from tests.model.test_hub import PICKLED, publish
from tests.support import TINY_TEXT, tiny_model


DOCS = Path(__file__).parents[2] / "docs"
TEXTS = ["dog", "un can corre", "a dog a dog a dog a dog", "can"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model with a vision tower."""
    folder = tmp_path_factory.mktemp("published") / "model"
    publish(folder)
    processor = NrccrProcessor.from_dual_encoder(str(folder))
    processor.max_text_length = 16
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory):
    """A model of features that reads Galician, its sides, and the folder of its files; beside it .pt2 archives."""
    processor = NrccrTextProcessor(PreTrainedTokenizerFast.from_pretrained(published), max_text_length=16)
    model = tiny_model(text_config=TINY_TEXT | {"num_hidden_layers": 1})
    model.add_language("gl")
    torch.nn.init.normal_(model.language_adapters["gl"].update.weight)
    model.set_language("gl")
    folder = tmp_path_factory.mktemp("exported")
    sides = list_sides(model, processor, ["text", "image"])
    found = write_onnx(model, processor, sides, folder / "onnx", int8=True, torch_export=folder / "pt2")
    assert {name: value["max_difference"] < 1e-5 for name, value in found.items()} == {
        "text.onnx": True,
        "image.onnx": True,
        "text.int8.onnx": False,
        "image.int8.onnx": False,
    }
    assert all(value["min_cosine"] > 0.98 for value in found.values()), found
    return model, sides, folder


def onnx_of(exported, suffix=""):
    model, sides, folder = exported
    return OnnxModel(folder / "onnx", model.config, sides, suffix)


@pytest.mark.parametrize("size, length", [(1, 1), (1, 16), (5, 2), (40, 9)])
@torch.no_grad()
def test_any_batch_and_length_gives_the_models_embeddings(exported, size, length):
    model, sides, _ = exported
    for side in sides:
        inputs = side.draw(size, length, torch.Generator().manual_seed(size))
        given = onnx_of(exported).embed(side.name, inputs)
        torch.testing.assert_close(given, side.embed(inputs), atol=1e-5, rtol=0)
        longer = {name: F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, 3)) for name, tensor in inputs.items()}
        torch.testing.assert_close(onnx_of(exported).embed(side.name, longer), given, atol=1e-5, rtol=0)


def test_the_file_reads_the_active_language_and_stands_for_the_model(exported):
    model, _, folder = exported
    processor = AutoProcessor.from_pretrained(folder / "onnx")
    texts = encode_texts(model, TEXTS, processor)
    torch.testing.assert_close(encode_texts(onnx_of(exported), TEXTS, processor), texts, atol=1e-5, rtol=0)
    with model.using_language(None):
        assert not torch.allclose(encode_texts(model, TEXTS, processor), texts, atol=1e-2)
    quantized = encode_texts(onnx_of(exported, ".int8"), TEXTS, processor)
    assert (quantized * texts).sum(1).min() > 0.98


def test_the_folder_holds_nothing_pickled(exported):
    _, sides, folder = exported
    files = {path.name: path for path in (folder / "onnx").rglob("*")}
    assert {"text.onnx", "text.int8.onnx", "image.onnx", "tokenizer.json", "processor_config.json"} <= set(files)
    for name, path in files.items():
        assert path.is_file() and not name.endswith((*PICKLED, ".pt2", ".tmp"))
        assert not zipfile.is_zipfile(path) and not path.read_bytes().startswith(b"\x80")
    inputs = sides[0].draw(3, 4, torch.Generator().manual_seed(1))
    program = torch.export.load(folder / "pt2" / "text.pt2").module()
    torch.testing.assert_close(program(*inputs.values()), onnx_of(exported).embed("text", inputs), atol=1e-5, rtol=0)


def test_nothing_is_written_where_embeddings_differ(exported, tmp_path, monkeypatch):
    model, sides, folder = exported
    processor = AutoProcessor.from_pretrained(folder / "onnx")
    with pytest.raises(ValueError, match="pt2 lies in .*Name a folder elsewhere"):
        write_onnx(model, processor, sides, tmp_path, torch_export=tmp_path / "pt2")
    monkeypatch.setattr(export_onnx, "compare", lambda *_: (float("nan"), 1.0))
    monkeypatch.setattr(export_onnx, "trace", lambda side: torch.export.load(folder / "pt2" / "image.pt2"))
    with pytest.raises(ValueError, match="image.onnx differs by nan from the model, more than 0.0001"):
        write_onnx(model, processor, sides[1:], tmp_path, torch_export=tmp_path.with_name("pt2"))
    assert not list(tmp_path.iterdir()) and not tmp_path.with_name("pt2").exists()


@pytest.mark.slow
def test_an_export_takes_the_place_of_an_earlier_one(exported, tmp_path, monkeypatch):
    model, sides, folder = exported
    processor = AutoProcessor.from_pretrained(folder / "onnx")
    earlier = shutil.copytree(folder / "onnx", tmp_path / "onnx")
    kept = {path.name: path.read_bytes() for path in earlier.iterdir()}
    monkeypatch.setattr(export_onnx, "trace", lambda side: torch.export.load(folder / f"pt2/{side.name}.pt2"))
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="text.onnx differs"):
        write_onnx(model, processor, sides[:1], earlier)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == kept
    monkeypatch.setattr(export_onnx, "TOLERANCE", 1e-4)
    write_onnx(model, processor, sides[:1], earlier)
    names = {path.name for path in earlier.iterdir()}
    assert "text.onnx" in names and not {"image.onnx", "text.int8.onnx", "image.int8.onnx"} & names
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    (earlier / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="onnx holds notes.md, which is no part of an export"):
        write_onnx(model, processor, sides[:1], earlier)
    assert (earlier / "notes.md").read_text() == "mine"


def test_what_cannot_be_exported_is_named(published, exported, tmp_path, monkeypatch):
    model, processor = load_with_languages(str(published), [])
    with pytest.raises(ValueError, match="no side of image: .*--sides text"):
        list_sides(tiny_model(visual_feat_dim=None), processor, ["image"])
    read = lambda images, return_tensors: {"pixel_values": 0, "spatial_shapes": 0}  # noqa: E731
    with pytest.raises(ValueError, match="EfficientNetLiteModel reads pictures of any shape .*--sides text"):
        list_sides(model, read, ["text", "image"])
    for arguments, reason in (
        ([str(tmp_path / "none")], "Cannot load the model .*none': there is no such folder"),
        ([str(published), "--language", "pt"], "no adapter for the language 'pt'"),
        ([str(published), "--language", f"pt={tmp_path}"], "language_adapter.safetensors"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{reason}"):
            main([arguments[0], str(tmp_path / "onnx"), *arguments[1:]])
    for options, reason in (
        ({"formats": ["onxn"]}, r"unknown export format 'onxn' \(do you mean onnx\?\): there are onnx"),
        ({"device": "cuda"}, "on the CPU in float32"),
        ({"languages": ["gl", "ca"]}, "in one language: name one, not gl, ca"),
        ({"int4": True}, "no option of onnx: int4"),
        ({"data_dir": "x"}, "name its data set, --data"),
        ({"data": "tuxpaint"}, "--query_language CODE"),
    ):
        with pytest.raises(ValueError, match=reason):
            export_model(str(published), tmp_path / "onnx", **{"formats": ["onnx"]} | options)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match='pip install "modeling_nrccr.export."'):
        main([str(published), str(tmp_path / "onnx")])
    assert not (tmp_path / "onnx").exists()


def test_the_page_has_the_tables_of_its_report():
    report = json.loads((DOCS / "export.json").read_text(encoding="utf-8"))
    assert format_report(report) in (DOCS / "export.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_vision_tower_and_the_report(published, tmp_path, capsys):
    report = tmp_path / "report.json"
    main([str(published), str(tmp_path / "onnx"), "--int8", "--report", str(report)])
    model, processor = load_with_languages(str(published), [])
    onnx = OnnxModel(tmp_path / "onnx", model.config, list_sides(model, processor, ["text", "image"]))
    pictures = [Image.new("RGB", (20 + i, 30), (9 * i, 200, 30)) for i in range(9)]
    for size in (1, 4, 9):
        expected = encode_images(model, pictures[:size], processor)
        torch.testing.assert_close(encode_images(onnx, pictures[:size], processor), expected, atol=1e-5, rtol=0)
    printed, report = capsys.readouterr().out, json.loads(report.read_text())
    assert format_report(report) in printed
    assert {row["engine"] for row in report["rows"]} == {"torch", "onnx", "onnx int8"}
    assert all(row["ms_1"] > 0 and row["megabytes"] > 0 for row in report["rows"])
    assert re.search(r"^\| image, onnx int8 \| \d+ \| .* \| \S+ \| [01]\.\d{4} \|$", printed, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_dual_encoder_with_a_language_inside_its_layers(published, family, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(DUAL_ENCODERS[family]).save_pretrained(tmp_path / "dual")
    model = NrccrModel.from_dual_encoder(str(tmp_path / "dual"))
    model.add_language("gl", kind="lora", layers=1, rank=4)
    model.set_language("gl")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    image_processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor = NrccrProcessor(PreTrainedTokenizerFast.from_pretrained(published), image_processor, max_text_length=9)
    sides = list_sides(model, processor, ["text", "image"])
    found = write_onnx(model, processor, sides, tmp_path / "onnx")
    assert max(value["max_difference"] for value in found.values()) < 1e-4
    model.set_language(None)
    assert compare(sides[0], OnnxModel(tmp_path / "onnx", model.config, sides).embed)[0] > 1e-3

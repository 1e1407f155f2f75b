"""A folder for Immich gives the model's embeddings, read as Immich reads it, or is not written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    SiglipTokenizer,
    ViTImageProcessorPil,
)

from modeling_nrccr import NrccrConfig, NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.cli.export import main
from modeling_nrccr.dual_encoders import dual_encoder_settings, load_dual_encoder
from modeling_nrccr.export import immich
from modeling_nrccr.export.formats import export_model
from modeling_nrccr.export.immich import ImmichText, export_immich, list_texts, make_tokenizer
from modeling_nrccr.export.immich_client import ImmichClient
from modeling_nrccr.export.readme import find_report
from modeling_nrccr.processing_nrccr import NrccrTextProcessor
from tests.model.test_dual_encoders import DUAL_ENCODERS
from tests.support import tiny_model


CLIENT = Path(immich.__file__).with_name("immich_client.py")
PIXELS = dict(
    model_type="vit",
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=29,
    image_size=16,
    patch_size=8,
)
LETTERS = "abcdefghijklmnopqrstuvwxyzáéïñσς:.▁"  # with four special tokens fewer than the 41 of the tiny models
SQUASHED = ViTImageProcessorPil(size={"height": 8, "width": 8})
CUT = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def letters(pad: str = "<pad>", end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of letters; texts begin and end with a token."""
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*special, *LETTERS])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")])
    if end:
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )


def family(name: str) -> NrccrModel:
    """A tiny model of a family, whose weights do something."""
    torch.manual_seed(0)
    dual = AutoModel.from_config(DUAL_ENCODERS[name]).eval()
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = NrccrModel(NrccrConfig(**dual_encoder_settings(dual.config))).eval()
    load_dual_encoder(model, dual)
    return model


def add_galician(model: NrccrModel, **settings) -> NrccrModel:
    model.add_language("gl", **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_adapters" in name or "lora_" in name:
                parameter.normal_(std=0.3)
    model.set_language("gl")
    return model


def check(folder: Path, model: NrccrModel, processor: NrccrProcessor, texts: list[str]):
    client = ImmichClient(folder, 1)
    ours = encode_texts(model, texts, processor).numpy()
    given = np.stack([client.embed_text(text) for text in texts])
    np.testing.assert_allclose(given, ours, atol=1e-5, rtol=0)
    (given,) = client.textual.get_inputs()
    assert (given.name, given.type, given.shape) == ("text", "tensor(int32)", [1, processor.max_text_length])
    return client


@pytest.mark.slow
def test_a_language_beside_the_pictures_of_its_base(tmp_path):
    """CLIP, whose padding token is also the one that ends a text, with LoRA folded in."""
    model, processor = family("clip"), NrccrProcessor(letters("</s>"), CUT, max_text_length=16, pad_to_square=False)
    photo = Image.radial_gradient("L").resize((20, 8)).convert("RGB")
    index = encode_images(model, [photo], processor)[0].numpy()
    add_galician(model, kind="lora", rank=2, layers=1)
    model.config.dual_encoder = {"name": "some/clip", "revision": None}
    (tmp_path / "language").mkdir()
    (tmp_path / "language/report.json").write_text('{"verdict": "use"}')
    languages = [f"gl={tmp_path / 'language'}"]
    report = export_immich(model, processor, tmp_path / "gl", "clip", languages=languages)
    files = {str(path.relative_to(tmp_path / "gl")) for path in (tmp_path / "gl").rglob("*.*")}
    assert files == {
        "README.md",
        "config.json",
        "textual/model.onnx",
        "textual/tokenizer.json",
        "textual/tokenizer_config.json",
        "visual/model.onnx",
        "visual/preprocess_cfg.json",
    }
    assert (report["base"], report["language"], report["verdict"]) == ("some/clip", "gl", "use")
    readme = (tmp_path / "gl/README.md").read_text(encoding="utf-8")
    assert "texts in `gl`, for libraries indexed by `some/clip`" in readme and "**use**" in readme
    assert report["texts"]["number"] == 200 and report["pictures"]["number"] == 20
    assert report["pictures"]["through_immich"]["min_cosine"] > 0.999
    client = check(tmp_path / "gl", model, processor, ["un can", "Ñ  corre\n", "a" * 99, "🐶", "</s> a"])
    np.testing.assert_allclose(client.embed_picture(photo), index, atol=1e-4, rtol=0)
    with model.using_language(None):
        assert np.abs(encode_texts(model, ["un can"], processor)[0].numpy() - client.embed_text("un can")).max() > 1e-3


def test_texts_of_one_length_in_small_letters_after_a_prefix(tmp_path):
    """SigLIP, which reads the padding, and lower-cases by rules of our own."""
    processor = NrccrProcessor(
        letters(), SQUASHED, "query: ", 16, pad_to_square=False, text_padding="max_length", lower_case=True
    )
    model = add_galician(family("siglip"))
    report = export_immich(model, processor, tmp_path / "out", "siglip", ["text"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "textual"}
    assert "`visual` stays" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert report["context_length"] == 16 and report["texts"]["max_difference"] < 1e-5
    check(tmp_path / "out", model, processor, ["ÑÁ", "ΑΣ ΣΑΣ Σ", "a\u0301", "."])
    processor.max_text_length = 12
    with pytest.raises(ValueError, match="reads 16 tokens and its processor cuts after 12: .*max_text_length to 16"):
        export_immich(model, processor, tmp_path / "out", "siglip")


@pytest.mark.slow
def test_a_model_of_ours_with_a_language(tmp_path, monkeypatch):
    """A padding token of its own, no token at the ends; and what takes the place of what."""
    text = dict(vocab_size=41, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=29)
    model = tiny_model(text_config=text, vision_config=PIXELS, visual_feat_dim=None)
    processor = NrccrProcessor(letters(end=False), ViTImageProcessorPil(size={"height": 16, "width": 16}), "", 12)
    add_galician(model)
    folder = tmp_path / "out"
    report = export_immich(model, processor, folder, str(tmp_path / "ours"))
    assert (
        report["model"] == "ours"
        and "filled up to a square" in report["summary"]
        and 0 < report["pictures"]["through_immich"]["min_cosine"] < 1
    )
    check(folder, model, processor, ["un can corre", "a", "a <pad> a"])
    assert np.isfinite(ImmichClient(folder).embed_text("")).all()
    assert json.loads((folder / "visual/preprocess_cfg.json").read_text())["resize_mode"] == "squash"
    kept = (folder / "textual/model.onnx").read_bytes()
    monkeypatch.setattr(immich, "trace", lambda side: None)
    monkeypatch.setattr(immich, "export_side", lambda side, _, work: (work / f"{side.name}.onnx").write_bytes(kept))
    monkeypatch.setattr(immich, "list_texts", lambda _: ["can"])
    monkeypatch.setattr(immich, "make_tokenizer", lambda other: make_tokenizer(NrccrTextProcessor(letters(), "a")))
    with pytest.raises(ValueError, match="reads 'can' otherwise than the model, .*nothing was written"):
        export_immich(model, processor, folder, "ours", ["text"])
    assert (folder / "textual/model.onnx").read_bytes() == kept and (folder / "visual").is_dir()
    monkeypatch.undo()
    (folder / "textual/armnn").touch()  # of Immich
    with pytest.raises(ValueError, match="out holds textual, which is no part of an export for Immich"):
        export_immich(model, processor, folder, "ours", ["text"])
    (folder / "textual/armnn").unlink()
    (folder / "README.md").write_text("# A model that Immich fetched")
    with pytest.raises(ValueError, match="out holds README.md, which is no part of an export for Immich"):
        export_immich(model, processor, folder, "ours", ["text"])


@pytest.mark.parametrize("ends", [True, False])
def test_the_mask_is_made_of_the_padding(ends):
    side = torch.nn.Module()
    side.forward = lambda ids, mask: mask
    module = ImmichText(side, 9, "end" if ends else "words")
    read = lambda *ids: module(torch.tensor([ids]).int())[0].tolist()  # noqa: E731
    assert read(1, 2, 9, 9, 9) == [1, 1, int(ends), 0, 0]
    assert read(1, 9, 2, 9, 9) == [1, 1, 1, int(ends), 0]
    assert read(1, 2, 3, 4, 9) == [1, 1, 1, 1, int(ends)]
    assert read(9, 9, 9, 9, 9) == [1, 0, 0, 0, 0]
    assert ImmichText(side, 9, "all")(torch.tensor([[1, 9]])).tolist() == [[1, 1]]


def test_what_immich_cannot_read_is_named(tmp_path):
    frames, tokenizer = tiny_model(), letters()
    processor = NrccrTextProcessor(tokenizer, max_text_length=9)
    sided = NrccrProcessor(tokenizer, SQUASHED, max_text_length=9)
    with pytest.raises(ValueError, match="reads visual_feats, .*frames, .*--sides text"):
        export_immich(frames, processor, tmp_path / "out", "x")
    with pytest.raises(ValueError, match="no side of image: .*--sides text"):
        export_immich(tiny_model(visual_feat_dim=None), processor, tmp_path / "out", "x")
    with pytest.raises(ValueError, match="reads a model's texts"):
        export_immich(frames, processor, tmp_path / "out", "x", ["image"])
    with pytest.raises(ValueError, match="pools padding"):
        export_immich(tiny_model(pool_padding=True), processor, tmp_path / "out", "x")
    with pytest.raises(ValueError, match="a picture of 8 x 8, .*squares|8 x 9"):
        immich.picture_settings(sided, (3, 8, 9))
    for change, reason in (
        ({"pad_token": None}, "has no pad token"),
        ({"truncation_side": "left"}, "keeps the end of a text"),
    ):
        changed = letters()
        for key, value in change.items():
            setattr(changed, key, value)
        with pytest.raises(ValueError, match=reason):
            make_tokenizer(NrccrTextProcessor(changed))
    assert not (tmp_path / "out").exists()
    texts = list_texts(processor)
    assert len(texts) == 200 and len(set(texts)) > 190 and all(text.strip() for text in texts)


def test_the_tokenizer_of_siglip_becomes_a_file(tmp_path):
    text = "\n".join(immich.SENTENCES[:9]).lower()
    options = dict(vocab_size=90, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, num_threads=1)
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(tmp_path / "spiece"), minloglevel=2, **options
    )
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"))
    processor = NrccrTextProcessor(tokenizer, max_text_length=500)
    made = make_tokenizer(processor)
    for text in [*list_texts(processor), "- A dog, - RUNS! -", "Σ ΟΔΟΣ. ½"]:
        ours = processor(text=[text])["input_ids"][0]
        assert made.encode(" ".join(text.split())).ids[:499] == ours[:499], text


def test_the_verdict_is_that_of_the_language(tmp_path):
    (tmp_path / "gl").mkdir()
    (tmp_path / "gl/report.json").write_text(json.dumps({"language": "gl", "verdict": "use"}))
    (tmp_path / "report.json").write_text(json.dumps({"verdict": "do not use", "verdicts": {"cs": "do not use"}}))
    verdicts = [find_report(str(tmp_path), code, [f"gl={tmp_path / 'gl'}", "cs"])["verdict"] for code in ("gl", "cs")]
    assert verdicts == ["use", "do not use"]
    assert find_report("some/clip", "gl", ["gl"]) == {}


@pytest.mark.slow
def test_without_this_package(tmp_path, capsys):
    """By the command; then in a process that has neither this package nor torch."""
    base = tmp_path / "base"
    model = family("clip")
    processor = NrccrProcessor(letters("</s>"), CUT, max_text_length=16, pad_to_square=False)
    add_galician(model, kind="lora", rank=2, layers=1)
    model.save_pretrained(base)
    processor.save_pretrained(base)
    main([str(base), str(tmp_path / "out"), "--to", "immich", "--language", "gl"])
    printed = capsys.readouterr().out
    assert "200 texts as Immich reads them" in printed and f"immich: {tmp_path / 'out'}" in printed
    with pytest.raises(SystemExit, match="no option of immich: int8"):
        main([str(base), str(tmp_path / "out"), "--to", "immich", "--int8"])
    with pytest.raises(ValueError, match="no option of immich: data"):
        export_model(str(base), tmp_path / "out", ["immich"], data="tuxpaint")
    texts = ["un can corre", "a dog", "Ñ", "🐶"]
    photo = Image.radial_gradient("L").resize((20, 8)).convert("RGB")
    expected = [*encode_texts(model, texts, processor).tolist(), *encode_images(model, [photo], processor).tolist()]
    shutil.copy(CLIENT, tmp_path / "client.py")
    code = (
        "import sys, json, runpy\n"
        "for name in ('modeling_nrccr', 'torch', 'transformers'): sys.modules[name] = None\n"
        "client = runpy.run_path(sys.argv[1])['ImmichClient'](sys.argv[2], 1)\n"
        "from PIL import Image\n"
        "photo = Image.radial_gradient('L').resize((20, 8)).convert('RGB')\n"
        "embeds = [client.embed_text(text) for text in json.loads(sys.argv[3])] + [client.embed_picture(photo)]\n"
        "print(json.dumps([embed.tolist() for embed in embeds]))"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "client.py"), str(tmp_path / "out"), json.dumps(texts)]
    given = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    np.testing.assert_allclose(json.loads(given), expected, atol=1e-5, rtol=0)

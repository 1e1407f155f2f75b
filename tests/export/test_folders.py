"""Folders for transformers, sentence-transformers and open_clip, of tiny models of every family: each is opened by the
library's own class and embeds as the model does, or is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    SiglipTokenizer,
)

from modeling_nrccr import NrccrModel, NrccrProcessor, encode_images, encode_texts, join_text_sides
from modeling_nrccr.cli.export import main
from modeling_nrccr.export import check, open_clip_folder, transformers_folder
from modeling_nrccr.export.formats import export_model
from modeling_nrccr.export.open_clip_folder import open_clip_weights, write_open_clip
from modeling_nrccr.export.processors import plain_tokenizer
from modeling_nrccr.export.sentence_transformers_folder import write_sentence_transformers
from modeling_nrccr.export.transformers_folder import write_transformers
from modeling_nrccr.open_clip import convert_weights
from modeling_nrccr.processing_nrccr import NrccrTextProcessor
from tests.export.test_fold import FOLDABLE, teach, write_base
from tests.model.test_dual_encoders import DUAL_ENCODERS, SIZES, WORDS, save_processor_parts
from tests.model.test_open_clip import EXPECTED, reference
from tests.support import ROOT, TINY_TEXT, tiny_model


TEXTS = ["cato on houseo", "red", "RED dog on a house cat blue red dog on a house cat blue", "  ca\u0301to\tred "]
SHADES = [Image.new("RGB", (9 + i, 30), (60 * i, 90, 200)) for i in range(3)]
# of a patch size and number that Siglip2Processor takes, whatever its files say
SIGLIP2 = Siglip2Config(
    text_config=WORDS | dict(projection_size=24), vision_config=SIZES | dict(patch_size=16, num_patches=256)
)
INSTEAD = "take --to sentence-transformers for its texts, or --to onnx"


@pytest.fixture(scope="module", params=DUAL_ENCODERS)
def made(request, tmp_path_factory):
    """A base, its folder, the folder of a language for it, and the model with that."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DUAL_ENCODERS, "siglip2", SIGLIP2)
        write_base(folder / "base", family)
    base = AutoModel.from_pretrained(folder / "base").eval()
    save_processor_parts(base, folder / "base")
    if family == "siglip2":
        Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256).save_pretrained(folder / "base")
    name = str(folder / "base")
    model, processor = NrccrModel.from_dual_encoder(name), NrccrProcessor.from_dual_encoder(name)
    teach(model, "gl", "lora")
    model.save_language("gl", folder / "gl")
    report = {"verdict": "use", "reasons": ["it finds more"], "language": "gl"}
    (folder / "gl" / "report.json").write_text(json.dumps(report))
    return family, base, folder, model, processor


def embed_by_transformers(folder: Path, texts: list[str], pictures: list) -> tuple[torch.Tensor, torch.Tensor]:
    """As a user of transformers does."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        of_texts = model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
        of_pictures = model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    return F.normalize(of_texts, dim=-1), F.normalize(of_pictures, dim=-1)


def test_transformers_opens_it(made, tmp_path):
    family, base, folder, model, processor = made
    if family not in FOLDABLE:
        with pytest.raises(ValueError, match=f"{family} has no projection to fold a language into: {INSTEAD}"):
            write_transformers(model, processor, tmp_path / "out", "base")
        return
    report = write_transformers(model, processor, tmp_path / "out", str(folder / "base"), [f"gl={folder / 'gl'}"])
    assert report["compared"]["texts"]["max_difference"] < 1e-5 and report["verdict"] == "use"
    of_texts, of_pictures = embed_by_transformers(tmp_path / "out", TEXTS, SHADES)
    torch.testing.assert_close(of_texts, encode_texts(model, TEXTS, processor), atol=1e-5, rtol=0)
    torch.testing.assert_close(of_pictures, encode_images(model, SHADES, processor), atol=1e-5, rtol=0)
    opened, theirs = AutoModel.from_pretrained(tmp_path / "out"), base.state_dict()
    assert type(opened) is type(base)
    pictures = {key: value for key, value in opened.state_dict().items() if key.startswith("vis")}
    assert pictures and all(torch.equal(value, theirs[key]) for key, value in pictures.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**gl: use**" in card and "- it finds more" in card and f'"{tmp_path / "out"}"' in card
    files = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert files == {".json", ".md", ".safetensors"}


def test_sentence_transformers_opens_it(made, tmp_path):
    family, base, folder, model, processor = made
    report = write_sentence_transformers(model, processor, tmp_path / "out", str(folder / "base"))
    opened = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert opened.max_seq_length == processor.max_text_length
    found = opened.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encode_texts(model, TEXTS, processor), atol=1e-5, rtol=0)
    kinds = [type(module).__name__ for module in opened]
    if family in FOLDABLE:
        assert kinds == ["Transformer", "Normalize"] and report["texts_only"] is None
        found = opened.encode(SHADES, convert_to_tensor=True)
        torch.testing.assert_close(found, encode_images(model, SHADES, processor), atol=1e-5, rtol=0)
    else:
        assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
        assert f"texts alone: {report['texts_only']}" in (tmp_path / "out" / "README.md").read_text()
        assert opened.prompts["query"] == processor.text_prefix and opened.default_prompt_name == "query"


@torch.no_grad()
def test_open_clip_files_open(made, tmp_path):
    family, base, folder, model, processor = made
    if family != "clip":
        with pytest.raises(ValueError, match=INSTEAD if family not in FOLDABLE else "CLIP's architecture alone, not"):
            write_open_clip(model, processor, tmp_path / "out", "base")
        return
    write_open_clip(model, processor, tmp_path / "out", "base")
    name = f"open_clip:{tmp_path / 'out'}"
    opened, reader = NrccrModel.from_dual_encoder(name), NrccrProcessor.from_dual_encoder(name)
    expected = encode_texts(model, TEXTS, processor)
    torch.testing.assert_close(encode_texts(opened, TEXTS, reader), expected, atol=1e-5, rtol=0)
    weights = base.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in convert_weights(open_clip_weights(weights)).items())
    theirs = opened.visual_tower.encoder.state_dict()
    assert all(torch.equal(value, weights[f"vision_model.{key}"]) for key, value in theirs.items())
    mode = (tmp_path / "out" / "open_clip_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "out" / "README.md").stat().st_mode


@pytest.mark.parametrize("kind", ["bottleneck", "dynamic"])
@pytest.mark.parametrize("write", [write_transformers, write_sentence_transformers, write_open_clip])
def test_another_kind_of_adapter_is_refused(made, write, kind, tmp_path):
    _, _, folder, _, processor = made
    model = NrccrModel.from_dual_encoder(str(folder / "base"))
    teach(model, "gl", kind)
    with pytest.raises(ValueError, match=f"kind '{kind}'.*that can linear, lora, none"):
        write(model, processor, tmp_path / "out", "base")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_base(folder / "base", "clip")
    save_processor_parts(AutoModel.from_pretrained(folder / "base"), folder / "base")
    model = NrccrModel.from_dual_encoder(str(folder / "base"))
    teach(model, "gl", "linear")
    model.save_language("gl", folder / "gl")
    return folder, model, NrccrProcessor.from_dual_encoder(str(folder / "base"))


def test_the_command_writes_several_and_says_what_it_compared(clip, tmp_path, capsys):
    folder, *_ = clip
    out = tmp_path / "out"
    argv = [str(folder / "base"), str(out), "--language", f"gl={folder / 'gl'}", "--report", str(tmp_path / "r.json")]
    main([*argv, "--to", "transformers", "sentence-transformers", "open_clip"])
    printed = capsys.readouterr().out
    assert printed.count("200 texts, read from this folder and by the model that it was made from: ") == 3
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"transformers", "sentence-transformers", "open_clip"} == {p.name for p in out.iterdir()}
    assert "gl: not tested" in (out / "open_clip" / "README.md").read_text()
    main([*argv, "--to", "transformers", "sentence-transformers"])  # in the place of an earlier one
    (out / "transformers" / "notes.odt").write_text("mine")
    with pytest.raises(SystemExit):
        main([*argv, "--to", "transformers", "sentence-transformers"])
    assert "holds notes.odt, which is no part of an export" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds config.json, which is no part of an export"):
        export_model(str(folder / "base"), folder / "base", ["transformers"])


def test_nothing_is_written_where_anything_differs(clip, tmp_path, monkeypatch):
    _, model, processor = clip
    fold = transformers_folder.fold_language

    def folded_badly(model):
        dual = fold(model)
        dual.text_projection.weight.data[0] += 1e-2
        return dual

    for module, write in ((transformers_folder, write_transformers), (open_clip_folder, write_open_clip)):
        monkeypatch.setattr(module, "fold_language", folded_badly)
        with pytest.raises(ValueError, match="with a difference of .* nothing was written"):
            write(model, processor, tmp_path / "out", "base")
    monkeypatch.undo()
    monkeypatch.setattr(check, "SAME_PICTURE", 1.1)
    with pytest.raises(ValueError, match="sees a picture with a cosine of .* nothing was written"):
        write_transformers(model, processor, tmp_path / "out", "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", reference.MODELS)
def test_a_base_of_open_clip_keeps_its_config(kind, tmp_path):
    reference.write_model(tmp_path / "base", reference.MODELS[kind], EXPECTED[kind]["shapes"])
    words = {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "cat": 1, "<unk>": 0}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
    ends = [(token, words[token]) for token in ("<|startoftext|>", "<|endoftext|>")]
    backend.post_processor = processors.TemplateProcessing(f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    config = json.loads((tmp_path / "base" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "words"
    (tmp_path / "base" / "open_clip_config.json").write_text(json.dumps(config))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "base")
    name = f"open_clip:{tmp_path / 'base'}"
    model, processor = NrccrModel.from_dual_encoder(name), NrccrProcessor.from_dual_encoder(name)
    teach(model, "gl", "lora")
    found = write_open_clip(model, processor, tmp_path / "open_clip", name)["compared"]
    assert found["pictures"]["max_difference"] < 1e-6
    assert json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text()) == config
    if kind == "longest":
        with pytest.raises(ValueError, match="resize_mode 'longest', which no class of transformers has"):
            write_transformers(model, processor, tmp_path / "out", name)
        return
    write_transformers(model, processor, tmp_path / "out", name)
    of_texts, _ = embed_by_transformers(tmp_path / "out", ["cat", "dog cat"], SHADES)
    torch.testing.assert_close(of_texts, encode_texts(model, ["cat", "dog cat"], processor), atol=1e-5, rtol=0)


def test_a_model_of_ours_goes_to_sentence_transformers_alone(clip, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(clip[0] / "base")
    processor = NrccrTextProcessor(tokenizer, text_prefix="red: ", max_text_length=16)
    model = tiny_model(text_config=TINY_TEXT, text_head="pooling", text_pooling="mean", teacher_view="source")
    teach(model, "gl", "lora")
    write_sentence_transformers(model, processor, tmp_path / "out", "ours")
    opened = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = opened.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encode_texts(model, TEXTS, processor), atol=1e-5, rtol=0)
    for write in (write_transformers, write_open_clip):
        with pytest.raises(ValueError, match=f"nrccr's own, which is no class of transformers: {INSTEAD}"):
            write(model, processor, tmp_path / "other", "ours")
    with pytest.raises(ValueError, match="text head is of the kind 'attention'.*Take --to onnx"):
        write_sentence_transformers(tiny_model(), processor, tmp_path / "other", "ours")


def test_a_saved_model_with_the_language_inside_goes_as_its_base_does(clip, tmp_path):
    _, model, processor = clip
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    [(place, report)] = export_model(str(tmp_path / "saved"), tmp_path / "out", ["transformers"]).values()
    assert report["language"] == "gl" and place == tmp_path / "out"
    of_texts, _ = embed_by_transformers(place, TEXTS, SHADES)
    torch.testing.assert_close(of_texts, encode_texts(model, TEXTS, processor), atol=1e-5, rtol=0)


def test_of_two_text_sides_the_language_goes_to_sentence_transformers(clip, tmp_path):
    folder, _, processor = clip
    BertModel(BertConfig(**WORDS)).save_pretrained(tmp_path / "bert")
    name = str(folder / "base")
    model = NrccrModel.from_dual_encoder(name, text_encoder=str(tmp_path / "bert"))
    model.with_source_text_side(NrccrModel.from_dual_encoder(name))
    teach(model, "gl", "linear")
    joined = join_text_sides(processor, processor)
    write_sentence_transformers(model, joined, tmp_path / "out", "two")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encode_texts(model, TEXTS, joined, languages="gl"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"two text sides .*: {INSTEAD}"):
        write_transformers(model, joined, tmp_path / "other", "two")
    with pytest.raises(ValueError, match="two reads its source language by the text side of its base"):
        write_sentence_transformers(model.set_language(None), joined, tmp_path / "other", "two")


def test_a_tokenizer_cleans_what_the_processor_cleans(clip):
    backend = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1, "\u00e1rbore": 2, "a": 3, "δρόμος": 4}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    processor = NrccrTextProcessor(tokenizer, lower_case=True, max_text_length=16)
    texts = ["  A\u0301rbore ", "a\t\n \u00c1RBORE ΔΡΌΜΟΣ"]
    plain = plain_tokenizer(processor)
    assert plain(texts)["input_ids"] == processor(text=texts, padding=False)["input_ids"]
    assert plain(texts)["input_ids"] != tokenizer(texts)["input_ids"] and plain.model_max_length == 16
    assert processor.num_truncated == 0


@pytest.mark.parametrize("lower_case", [False, True])
def test_the_tokenizer_of_siglip_is_read_back(lower_case, tmp_path):
    texts, prefix = [text.lower() for text in check.LANGUAGES[:9]], str(tmp_path / "spiece")
    options = dict(vocab_size=70, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=prefix, **options)
    tokenizer = SiglipTokenizer(f"{prefix}.model", do_lower_case=not lower_case)
    parts = dict(text_padding="max_length", lower_case=lower_case, max_text_length=20)
    processor = NrccrTextProcessor(tokenizer, **parts)
    plain_tokenizer(processor).save_pretrained(tmp_path / "out")
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = opened(check.list_texts(), padding="max_length", truncation=True)
    assert found["input_ids"] == processor(text=check.list_texts())["input_ids"] and set(found) == {"input_ids"}


ALONE = """
import sys
for name in ("modeling_nrccr", "peft", "sentence_transformers"):
    sys.modules[name] = None  # as if it were not installed
import json, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(sys.argv[1]).eval(), AutoProcessor.from_pretrained(sys.argv[1])
with torch.no_grad():
    texts = model.get_text_features(**processor(text=json.loads(sys.argv[2]), return_tensors="pt")).pooler_output
print(json.dumps(torch.nn.functional.normalize(texts, dim=-1).tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_transformers_alone_opens_it(family, tmp_path):
    write_base(tmp_path / "base", family)
    save_processor_parts(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "base")
    name = str(tmp_path / "base")
    model, processor = NrccrModel.from_dual_encoder(name), NrccrProcessor.from_dual_encoder(name)
    teach(model, "gl", "lora")
    write_transformers(model, processor, tmp_path / "out", name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), json.dumps(TEXTS)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, encode_texts(model, TEXTS, processor), atol=1e-5, rtol=0)
    assert str(ROOT) not in (tmp_path / "out" / "config.json").read_text()

"""Models of open_clip as bases, read without it and compared with what it computes (tests/open_clip_reference.py)."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPTokenizer

from modeling_nrccr import NrccrModel, NrccrProcessor, encode_images, encode_texts
from modeling_nrccr.open_clip import (
    BPE_FILE,
    NUM_MERGES,
    read_bpe,
    read_open_clip_config,
    read_open_clip_image_processor,
)
from tests.support import open_clip_reference as reference


FIXTURE = Path(__file__).parents[1] / "fixtures" / "open_clip.json"
EXPECTED = json.loads(FIXTURE.read_text())
WHEELS = ["open_clip_torch==3.3.0", "torchvision==0.28.0", "timm==1.0.31", "ftfy==6.3.1", "wcwidth==0.9.4"]


@pytest.fixture(scope="module", params=reference.MODELS)
def model(request, tmp_path_factory) -> tuple[Path, dict]:
    """A folder as open_clip writes it, and what open_clip computes with it."""
    folder, expected = tmp_path_factory.mktemp(request.param), EXPECTED[request.param]
    reference.write_model(folder, reference.MODELS[request.param], expected["shapes"])
    return folder, expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    reference.write_model(folder, reference.MODELS["longest"], EXPECTED["longest"]["shapes"])
    return folder


def changed(folder: Path, out: Path, change) -> str:
    """A copy whose config `change` has changed."""
    shutil.copytree(folder, out)
    config = json.loads((out / "open_clip_config.json").read_text())
    change(config["model_cfg"], config)
    (out / "open_clip_config.json").write_text(json.dumps(config))
    return f"open_clip:{out}"


def texts_of(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of what open_clip pads with 0, after the end."""
    ids = torch.tensor(ids)
    return ids, (torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)).long()


@torch.no_grad()
def test_embeddings_and_similarities_are_those_of_open_clip(model, tmp_path):
    folder, expected = model
    ours = NrccrModel.from_dual_encoder(f"open_clip:{folder}")
    config = read_open_clip_config(f"open_clip:{folder}")
    pixels = read_open_clip_image_processor(f"open_clip:{folder}", config)(reference.pictures(), return_tensors="pt")
    ids, mask = texts_of(expected["ids"])
    found = ours(ids, mask, **pixels)
    for key in ("text_embeds", "image_embeds"):
        wanted = torch.tensor(expected[key])
        assert wanted[0] @ wanted[1] < 0.999  # else equality would say little
        torch.testing.assert_close(found[key], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits_per_text, torch.tensor(expected["logits_per_text"]), atol=1e-4, rtol=1e-5)
    ours.add_language("gl")
    ours.save_language("gl", tmp_path)
    fresh = NrccrModel.from_dual_encoder(ours.made_for()["name"], dtype=torch.bfloat16)
    assert fresh.made_for()["name"] == f"open_clip:{folder}" and fresh.dtype == torch.bfloat16


def test_the_text_side_knows_its_activation(plain, tmp_path):
    acts = {}
    for flags in ({"quick_gelu": True}, {"quick_gelu": False}, {"quick_gelu": False, "force_quick_gelu": True}):
        name = changed(plain, tmp_path / str(len(acts)), lambda model, _: model.update(flags))  # noqa: B023
        config = read_open_clip_config(name)
        acts[str(flags)] = (config.text_config.hidden_act, config.vision_config.hidden_act)
    assert list(acts.values()) == [("quick_gelu",) * 2, ("gelu",) * 2, ("quick_gelu",) * 2]


# --- tokenizer: merges that make "cat" and "dog"


def write_bpe(folder: Path) -> Path:
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    with gzip.open(folder / BPE_FILE, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges]))
    return folder / BPE_FILE


SMALL = {"context_length": 7, "vocab_size": 518, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture
def small(tmp_path) -> Path:
    """A model of 518 tokens."""
    shapes = EXPECTED["longest"]["shapes"] | {"token_embedding.weight": [518, 16], "positional_embedding": [7, 16]}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("transformer.resblocks.1.")}
    config = reference.MODELS["longest"]
    config = config | {"model_cfg": config["model_cfg"] | {"text_cfg": SMALL}}
    reference.write_model(tmp_path / "small", config, shapes)
    return tmp_path / "small"


def test_a_tokenizer_lies_beside_the_weights_or_is_built(small, tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: copy tokenizer.json .*, or bpe_simple_vocab"):
        NrccrProcessor.from_dual_encoder(f"open_clip:{small}")
    read_bpe(write_bpe(small)).save_pretrained(tmp_path / "saved")
    built = NrccrProcessor.from_dual_encoder(f"open_clip:{small}")
    ids = built(text=["A  CAT", "dog dog dog dog dog dog dog dog"])["input_ids"]
    assert ids == [[516, 256 + 64, 513, 517, 517, 517, 517], [516] + [515] * 5 + [517]]
    (small / BPE_FILE).unlink()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", small)
    read = NrccrProcessor.from_dual_encoder(f"open_clip:{small}")
    assert isinstance(read.tokenizer, CLIPTokenizer) and read(text=["A  CAT"])["input_ids"] == [ids[0][:4]]

    model = NrccrModel.from_dual_encoder(f"open_clip:{small}")
    embeds = encode_images(model, reference.pictures(), read)
    read.save_pretrained(tmp_path / "ours")
    again = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert torch.equal(encode_images(model, reference.pictures(), again), embeds)
    torch.testing.assert_close(embeds, torch.tensor(EXPECTED["longest"]["image_embeds"]), atol=1e-5, rtol=0)


def test_canonicalized_texts_stay_so(small, tmp_path):
    write_bpe(small)
    name = changed(
        small, tmp_path / "c", lambda model, _: model["text_cfg"].update(tokenizer_kwargs={"clean": "canonicalize"})
    )
    processor = NrccrProcessor.from_dual_encoder(name)
    processor.save_pretrained(tmp_path / "saved")
    for made in (processor, NrccrProcessor.from_pretrained(tmp_path / "saved")):
        assert made(text=["Dog,_(cat)!"])["input_ids"] == [[516, 515, 513, 517]]


def test_another_tokenizer_than_it_was_trained_with_is_refused(small, tmp_path):
    path = write_bpe(small)
    path.write_bytes(gzip.compress(b"version\nc a\nca t</w>"))
    with pytest.raises(ValueError, match="ends a text by 515 and has 516 tokens; the text encoder knows 517"):
        NrccrProcessor.from_dual_encoder(f"open_clip:{small}")


# --- what is refused


REFUSED = {
    "a text encoder of the hub": (lambda m, _: m["text_cfg"].update(hf_model_name="roberta-base"), "hf_model_name"),
    "timm": (lambda m, _: m["vision_cfg"].update(timm_model_name="vit_base"), "vision_cfg.timm_model_name"),
    "custom text": (lambda m, _: m.update(custom_text=True), "custom_text = true is not CLIP's.*ViT-B-32"),
    "CoCa": (lambda m, _: m.update(multimodal_cfg={"width": 9}), "multimodal_cfg"),
    "ResNet": (lambda m, _: m["vision_cfg"].update(layers=[3, 4, 6, 3]), "is a ResNet"),
    "CLIPA": (lambda m, _: m["text_cfg"].update(no_causal_mask=True), "text_cfg.no_causal_mask"),
    "last token": (lambda m, _: m["text_cfg"].update(pool_type="last"), "text_cfg.pool_type"),
    "mean of patches": (lambda m, _: m["vision_cfg"].update(pool_type="avg"), "vision_cfg.pool_type"),
    "no norm": (lambda m, _: m["vision_cfg"].update(no_ln_pre=True), "vision_cfg.no_ln_pre"),
    "layer scale": (lambda m, _: m["vision_cfg"].update(ls_init_value=1e-4), "vision_cfg.ls_init_value"),
    "sigmoid's bias": (lambda m, _: m.update(init_logit_bias=-10), "init_logit_bias"),
    "what is to come": (lambda m, _: m["vision_cfg"].update(rope=True), "vision_cfg.rope = true"),
    "no square": (lambda m, _: m["vision_cfg"].update(image_size=[24, 32]), "image_size = .* is no square"),
    "no model": (lambda _, c: c.pop("model_cfg"), "is no config of open_clip"),
    "layers": (lambda m, _: m["vision_cfg"].update(layers=10**6), "far larger than its weights"),
    "another width": (lambda m, _: m["text_cfg"].update(vocab_size=99), "has the shape .* asks for .99, 16"),
    "fewer layers": (
        lambda m, _: m["text_cfg"].update(layers=1),
        "not of one CLIP model: text_model.enc",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_another_architecture_is_refused_by_name(plain, tmp_path, fault):
    name = changed(plain, tmp_path / "changed", REFUSED[fault][0])
    with pytest.raises(ValueError, match=REFUSED[fault][1]) as raised:
        NrccrModel.from_dual_encoder(name)
    assert str(tmp_path / "changed") in str(raised.value) and "\n" not in str(raised.value)


def test_settings_that_change_nothing_are_taken(plain, tmp_path):
    def change(model, _):
        model.update(custom_text=False, init_logit_bias=None)
        model["text_cfg"].update(no_causal_mask=False, pool_type="argmax", proj_type="linear", embed_cls=False)
        model["vision_cfg"].update(timm_model_name=None, timm_pool="", pool_type="tok", patch_dropout=0.5)

    NrccrModel.from_dual_encoder(changed(plain, tmp_path / "changed", change))


def test_broken_folders_are_refused(small, tmp_path):
    weights = load_file(small / "open_clip_model.safetensors")
    save_file(weights | {"visual.proj": weights["visual.proj"] * float("nan")}, small / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="visual_projection.weight of .* NaN or infinite"):
        NrccrModel.from_dual_encoder(f"open_clip:{small}")
    (small / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no open_clip_model.safetensors; pickled weights"):
        NrccrModel.from_dual_encoder(f"open_clip:{small}")
    with pytest.raises(ValueError, match=f"holds no config.json, but open_clip_config.json: write open_clip:{small}"):
        NrccrModel.from_dual_encoder(small)
    name = changed(small, tmp_path / "c", lambda _, c: c.update(preprocess_cfg={"resize_mode": "stretch"}))
    write_bpe(tmp_path / "c")
    with pytest.raises(ValueError, match="resize_mode = 'stretch'; known is shortest, longest, squash"):
        NrccrProcessor.from_dual_encoder(name)


# --- open_clip itself


@pytest.mark.slow
@pytest.mark.network
def test_open_clip_itself_from_text_and_picture_to_embedding(tmp_path):
    """Its wheels (12 MB) beside the torch that is here; the fixture is what it computes, and so do we."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheels), *WHEELS]
    subprocess.run(pip, check=True)
    script = Path(reference.__file__)
    environment = os.environ | {"PYTHONPATH": str(wheels)}
    subprocess.run([sys.executable, str(script), str(tmp_path / "new.json")], check=True, env=environment)
    assert NUM_MERGES == 48894
    for name, found in json.loads((tmp_path / "new.json").read_text()).items():
        expected = EXPECTED[name]
        assert (found["ids"], found["shapes"]) == (expected["ids"], expected["shapes"])
        folder = tmp_path / name
        reference.write_model(folder, reference.MODELS[name], expected["shapes"])
        shutil.copy(wheels / "open_clip" / BPE_FILE, folder)
        model = NrccrModel.from_dual_encoder(f"open_clip:{folder}")
        processor = NrccrProcessor.from_dual_encoder(f"open_clip:{folder}")
        embeds = {
            "text_embeds": encode_texts(model, reference.TEXTS, processor),
            "image_embeds": encode_images(model, reference.pictures(), processor),
        }
        for key, ours in embeds.items():
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), atol=1e-6, rtol=0)
            torch.testing.assert_close(ours, torch.tensor(found[key]), atol=1e-5, rtol=0)

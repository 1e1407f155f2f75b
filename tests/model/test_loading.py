"""Loading: options that load and are never saved, one precision, and folders that cannot be right."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from modeling_nrccr import NrccrModel, NrccrProcessor
from tests.support import tiny_batch, tiny_model
from tests.support.hub_server import hub_server, use_hub


SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
WORDS = SIZES | dict(vocab_size=41, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=1)
PIXELS = SIZES | dict(image_size=8, patch_size=4)
IDS, PICTURES = torch.tensor([[2, 7, 9, 3], [2, 11, 3, 3]]), torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=WORDS, vision_config=PIXELS, projection_dim=11)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> tuple[Path, Path]:
    """A text encoder in half precision, and a vision tower."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    BertModel(BertConfig(**WORDS)).half().save_pretrained(folder / "text")
    ViTModel(ViTConfig(**PIXELS)).save_pretrained(folder / "vision")
    return folder / "text", folder / "vision"


@torch.no_grad()
def embeds(model: NrccrModel) -> torch.Tensor:
    both = model.get_text_features(IDS), model.get_image_features(PICTURES)
    return torch.cat([part.pooler_output.float() for part in both])


def precisions(model: torch.nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in model.state_dict().values() if value.is_floating_point()}


# --- options


def test_options_of_loading_load_and_are_never_saved(clip, encoders, tmp_path):
    shutil.copytree(clip, tmp_path / "repo" / "inner")
    options = {
        "token": "hf_secret",
        "cache_dir": str(tmp_path / "cache_of_mine"),
        "trust_remote_code": True,
        "local_files_only": True,
        "force_download": False,
        "revision": "v_1_of_it",
        "dtype": torch.bfloat16,
        "device_map": "cpu",
    }
    made = {
        "dual": NrccrModel.from_dual_encoder(tmp_path / "repo", subfolder="inner", **options),
        "other text side": NrccrModel.from_dual_encoder(
            tmp_path / "repo", text_encoder=encoders[0], subfolder="inner", **options
        ),
        "encoders": NrccrModel.from_encoders(*encoders, projection_dim=7, **options),
    }
    for name, model in made.items():
        assert precisions(model) == {torch.bfloat16}, name
        model.save_pretrained(tmp_path / name)
        config = (tmp_path / name / "config.json").read_text()
        config = config.replace('"revision": null', "")  # of the base
        for key, value in ({key: options[key] for key in options if key != "dtype"} | {"subfolder": "inner"}).items():
            assert f'"{key}"' not in config and f'"{value}"' not in config, key
    assert made["encoders"].config.projection_dim == 7
    torch.testing.assert_close(embeds(made["dual"]), embeds(NrccrModel.from_dual_encoder(clip)), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda clip: NrccrModel.from_dual_encoder(clip, tokne="x"), "from_dual_encoder takes no 'tokne': .*'token'"),
        (lambda clip: NrccrModel.from_encoders(clip, text_poling="x"), "no 'text_poling': .*'text_pooling'"),
        (lambda clip: NrccrProcessor.from_dual_encoder(clip, dtype="x"), "from_dual_encoder takes no 'dtype'"),
    ],
)
def test_an_option_that_nobody_knows_is_named(clip, load, message):
    with pytest.raises(TypeError, match=message):
        load(clip)


def test_from_a_hub(clip, monkeypatch, tmp_path):
    with hub_server() as hub:
        first = hub.serve_folder("me/clip", clip)
        shutil.copytree(clip, tmp_path / "other")
        weights = load_file(clip / "model.safetensors")
        save_file({key: value + 0.1 for key, value in weights.items()}, tmp_path / "other" / "model.safetensors")
        second = hub.serve_folder("me/clip", tmp_path / "other", "other")
        use_hub(monkeypatch, hub)
        model = NrccrModel.from_dual_encoder("me/clip", cache_dir=tmp_path / "cache")
        assert model.config.dual_encoder == {"name": "me/clip", "revision": first}
        other = NrccrModel.from_dual_encoder("me/clip", revision="other", cache_dir=tmp_path / "cache")
        assert other.config.dual_encoder["revision"] == second and not torch.equal(embeds(model), embeds(other))
        assert torch.equal(embeds(model), embeds(NrccrModel.from_dual_encoder(clip)))
        asked = len(hub.log)
        NrccrModel.from_dual_encoder("me/clip", cache_dir=tmp_path / "cache", local_files_only=True)
        assert len(hub.log) == asked
        NrccrModel.from_dual_encoder("me/clip", cache_dir=tmp_path / "cache", force_download=True)
        assert [line for line in hub.log[asked:] if line.startswith("GET") and "config.json" in line]


def test_offloaded(clip, tmp_path):
    whole = NrccrModel.from_dual_encoder(clip)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    device_map = {name: "cpu" for name, _ in whole.named_children()} | {"text_tower": "disk", "logit_scale": "cpu"}
    place = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    for load in (
        lambda: NrccrModel.from_dual_encoder(clip, **place),
        lambda: NrccrModel.from_pretrained(tmp_path / "sharded", **place),
    ):
        model = load()
        assert model.hf_device_map == device_map and next(model.text_tower.parameters()).device.type == "meta"
        torch.testing.assert_close(embeds(model), embeds(whole), atol=1e-6, rtol=0)


# --- precision


def test_one_precision(clip, encoders, tmp_path):
    CLIPModel.from_pretrained(clip, dtype=torch.float16).save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "bfloat16"
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    whole = NrccrModel.from_dual_encoder(tmp_path / "half")
    assert precisions(whole) == {torch.float32}
    torch.testing.assert_close(embeds(whole), embeds(NrccrModel.from_dual_encoder(clip)), atol=5e-3, rtol=0)
    half = NrccrModel.from_dual_encoder(tmp_path / "half", dtype="auto")
    assert precisions(half) == {torch.float16}
    half.save_pretrained(tmp_path / "saved")
    assert precisions(NrccrModel.from_pretrained(tmp_path / "saved")) == {torch.float16}
    assert precisions(NrccrModel.from_pretrained(tmp_path / "saved", dtype=torch.float32)) == {torch.float32}
    assert precisions(NrccrModel(half.config)) == {torch.float32}
    assert precisions(NrccrModel.from_encoders(*encoders)) == {torch.float32}
    assert precisions(NrccrModel.from_encoders(*encoders, dtype="auto")) == {torch.float32}  # halves and wholes
    assert precisions(NrccrModel.from_encoders(encoders[0], visual_feat_dim=5, dtype="auto")) == {torch.float16}
    mixed = NrccrModel.from_dual_encoder(tmp_path / "half", text_encoder=encoders[0])
    assert precisions(mixed) == {torch.float32} and embeds(mixed).isfinite().all()


def test_equal_weights_of_two_files_embed_equally_to_the_bit(clip, encoders, tmp_path):
    """Wherever in its file a tensor begins: a picture keeps its embedding when the text side is another."""
    base = NrccrModel.from_dual_encoder(clip)
    base.save_pretrained(tmp_path / "base")
    NrccrModel.from_dual_encoder(clip, text_encoder=encoders[0]).save_pretrained(tmp_path / "other")
    for folder in ("base", "other"):
        model = NrccrModel.from_pretrained(tmp_path / folder)
        assert torch.equal(embeds(model)[2:], embeds(base)[2:])
        assert not [
            key
            for key, value in model.visual_tower.named_parameters()
            if value.data_ptr() % 64 and "position_embedding" not in key
        ]


# --- folders that cannot be right


def change_config(folder: Path, part: str | None, **values):
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lfs_pointer(folder: Path):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def truncated(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickled(folder: Path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_shards_of_which_one_is_gone(folder: Path):
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*"))[0].unlink()


NAN, LAYER = float("nan"), "encoder.layers.0.mlp.fc1.weight"
BROKEN = {
    "lacks a tensor": (lambda f: change_weights(f, lambda w: w.pop(find(w, LAYER))), "lacks .*fc1.weight"),
    "NaN": (lambda f: change_weights(f, lambda w: w[find(w, LAYER)].fill_(NAN)), "fc1.weight of .* NaN or infinite"),
    "another shape": (
        lambda f: change_weights(f, lambda w: w.update({find(w, LAYER): torch.ones(5, 24)})),
        r"fc1.weight of .* \(5, 24\).* asks for \(37, 24\)",
    ),
    "pointer": (lfs_pointer, "model.safetensors is a Git LFS pointer"),
    "truncated": (truncated, "is no whole safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is no whole safetensors file"),
    "header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "no whole safetensors file",
    ),
    "pickled": (pickled, "no model.safetensors.* but pytorch_model.bin, and pickled weights are not read"),
    "shards": (in_shards_of_which_one_is_gone, "lacks model-00001-of-"),
    "layers": (lambda f: change_config(f, "text_config", num_hidden_layers=10**6), "far larger than its weights"),
    "more words than numbers": (
        lambda f: change_config(f, "text_config", vocab_size=10**18),
        "config of .* makes no model",
    ),
    "words": (lambda f: change_config(f, "text_config", vocab_size=10**9), "far larger than its weights"),
    "pictures": (lambda f: change_config(f, "vision_config", image_size=10**6), "far larger than its weights"),
    "one layer more": (lambda f: change_config(f, "text_config", num_hidden_layers=3), "lacks .*layers.2"),
}


def find(weights: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in weights if name.endswith(end))


OURS = [(fault, True) for fault in ("lacks a tensor", "NaN", "another shape", "pickled", "layers")]


@pytest.mark.parametrize("fault, ours", [*((fault, False) for fault in BROKEN), *OURS])
def test_a_folder_that_cannot_be_right_is_refused_in_a_sentence(clip, tmp_path, fault, ours):
    breaking, message = BROKEN[fault]
    folder = tmp_path / "model"
    if ours:
        NrccrModel.from_dual_encoder(clip).save_pretrained(folder)
    else:
        shutil.copytree(clip, folder)
    breaking(folder)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as raised:
        (NrccrModel.from_pretrained if ours else NrccrModel.from_dual_encoder)(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert time.perf_counter() - start < 5


def test_an_encoder_without_its_decoder_is_whole(tmp_path):
    config = T5Config(vocab_size=41, d_model=24, d_kv=6, d_ff=37, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path)
    NrccrModel.from_encoders(tmp_path, visual_feat_dim=5)
    change_weights(tmp_path, lambda w: w.pop(find(w, "encoder.final_layer_norm.weight")))
    with pytest.raises(ValueError, match="lacks encoder.final_layer_norm.weight"):
        NrccrModel.from_encoders(tmp_path, visual_feat_dim=5)


def test_encoders_are_looked_at_as_well(encoders, tmp_path):
    shutil.copytree(encoders[0], tmp_path / "text")
    change_weights(tmp_path / "text", lambda w: w[find(w, "word_embeddings.weight")].fill_(float("inf")))
    with pytest.raises(ValueError, match="word_embeddings.weight of .*text holds 984 values that are NaN or infinite"):
        NrccrModel.from_encoders(tmp_path / "text", encoders[1])
    pickled(tmp_path / "text")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        NrccrModel.from_encoders(tmp_path / "text", encoders[1])


@pytest.mark.parametrize(
    "name, message",
    [
        ("no/such/model", "there is no such folder as no/such/model, and no hub id is so"),
        ("{tmp}/modle", "did you mean .*model?"),
        ("{tmp}", "holds no config.json, so it is no model"),
    ],
)
def test_what_no_hub_need_be_asked_for(clip, tmp_path, name, message):
    shutil.copytree(clip, tmp_path / "model")
    for load in (NrccrModel.from_dual_encoder, NrccrModel.from_encoders, NrccrProcessor.from_dual_encoder):
        with pytest.raises(ValueError, match=message):
            load(name.format(tmp=tmp_path))


def test_transformers_own_options_go_on_working(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    batch = tiny_batch(model)
    loaded, info = NrccrModel.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", head_dropout=0.3, use_safetensors=True
    )
    assert loaded.config.head_dropout == 0.3 and loaded.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    torch.testing.assert_close(loaded(**batch).text_embeds, model(**batch).text_embeds, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="use_safetensors=False asks for pickled weights"):
        NrccrModel.from_pretrained(tmp_path, use_safetensors=False)
    again = NrccrModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(again(**batch).text_embeds, model(**batch).text_embeds)
    wider = NrccrModel.from_pretrained(tmp_path, projection_dim=5, ignore_mismatched_sizes=True)
    assert wider(**batch).text_embeds.shape == (5, 5)

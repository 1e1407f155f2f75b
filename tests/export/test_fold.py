"""A language folded into tiny dual encoders of every family: the base's own class gives the same embeddings."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from modeling_nrccr import NrccrModel
from modeling_nrccr.export.fold import AFFINE, fold_language, text_map, text_weights
from tests.model.test_dual_encoders import DUAL_ENCODERS, own_text_embeds, texts
from tests.support import HEADS, tiny_model


FOLDABLE = ("clip", "metaclip_2", "altclip", "siglip", "siglip2")


def write_base(folder: Path, family: str):
    """Write a dual encoder whose biases do something."""
    torch.manual_seed(0)
    model = AutoModel.from_config(DUAL_ENCODERS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def teach(model: NrccrModel, language: str, kind: str):
    """Add a language that is far from the identity, and make it the active one."""
    adapter = model.add_language(language, kind=kind, rank=3, layers=1)
    torch.manual_seed(len(kind))
    with torch.no_grad():
        adapter.shift.normal_()
        for name, parameter in model.named_parameters():
            if f".{language}." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_language(language)


@pytest.fixture(scope="module", params=FOLDABLE)
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_base(folder, request.param)
    return folder


@torch.no_grad()
def test_every_affine_kind_folds_into_every_family(base):
    model, theirs = NrccrModel.from_dual_encoder(str(base)), AutoModel.from_pretrained(base).eval()
    ids, mask = texts()
    own = own_text_embeds(theirs, ids, mask)
    before = theirs.state_dict()
    for code, kind in zip(("gl", "eu", "ca"), AFFINE):
        teach(model, code, kind)
        folded = fold_language(model)
        assert type(folded) is type(theirs)
        expected = model.get_text_features(ids, mask).pooler_output
        assert (expected - own).abs().max() > 0.1
        torch.testing.assert_close(own_text_embeds(folded, ids, mask), expected, atol=2e-6, rtol=0)
        pictures = {key: value for key, value in folded.state_dict().items() if key.startswith("vis")}
        assert pictures and all(torch.equal(value, before[key]) for key, value in pictures.items())
    model.set_language(None)
    assert torch.equal(own_text_embeds(fold_language(model), ids, mask), own)


def test_another_kind_is_refused_by_name(base):
    model = NrccrModel.from_dual_encoder(str(base))
    for kind in ("bottleneck", "dynamic"):
        teach(model, "gl", kind)
        with pytest.raises(ValueError, match=f"of the kind '{kind}'.*that can linear, lora, none. Take --to onnx"):
            fold_language(model)


def test_what_has_no_place_is_refused_by_name(tmp_path):
    write_base(tmp_path / "clip", "clip")
    model = NrccrModel.from_dual_encoder(str(tmp_path / "clip"))
    adapter = model.add_language("gl")
    model.set_language("gl")
    with torch.no_grad():
        adapter.update.weight.copy_(-torch.eye(24))
        adapter.update.bias.fill_(1)
    with pytest.raises(ValueError, match="matrix of the adapter of gl cannot be inverted"):
        fold_language(model)
    model.remove_language("gl")
    with torch.no_grad():
        model.visual_projection.dense.weight.add_(0.1)
    with pytest.raises(ValueError, match="picture side is not that of .*clip any more .visual_projection.weight"):
        fold_language(model)
    write_base(tmp_path / "gemma", "embedding_gemma2")
    gemma = NrccrModel.from_dual_encoder(str(tmp_path / "gemma"))
    with pytest.raises(ValueError, match="embedding_gemma2 has no projection .*take --to sentence-transformers"):
        fold_language(gemma)
    with pytest.raises(ValueError, match="nrccr's own, which is no class of transformers: take --to sentence-tr"):
        fold_language(tiny_model())
    sided = NrccrModel.from_dual_encoder(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="two text sides .*take --to sentence-transformers"):
        fold_language(sided.with_source_text_side(NrccrModel.from_dual_encoder(str(tmp_path / "clip"))))


@pytest.mark.parametrize("head", ["pooling", "linear"])
@torch.no_grad()
def test_the_text_side_is_one_affine_map_behind_the_encoder(head):
    model = tiny_model(text_head=head, text_pooling="mean", projection_norm="batch_norm", teacher_view="source")
    teach(model, "gl", "lora")
    norm = model.text_projection.norm
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    ids, mask = texts()
    expected = model.get_text_features(ids.clamp(max=36), mask).pooler_output
    encoder = type(model.text_tower.encoder)(model.config.text_config, add_pooling_layer=False).eval()
    encoder.load_state_dict(text_weights(model))
    states = encoder(ids.clamp(max=36), mask).last_hidden_state
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    weight, bias = text_map(model)
    found = F.normalize(pooled @ weight.float().t() + bias.float(), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="text head is of the kind 'attention'.*Take --to onnx"):
        text_map(tiny_model(**HEADS["attention"]))

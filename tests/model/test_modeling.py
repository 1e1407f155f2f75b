import pytest
import torch

from modeling_nrccr import NrccrConfig, NrccrModel
from tests.support import HEADS, TINY_TEXT, tiny_batch, tiny_model


EMBEDS = ("text_embeds", "target_text_embeds", "back_translation_text_embeds", "teacher_text_embeds", "image_embeds")


def longer(batch: dict, extra: int = 4) -> dict:
    """The same batch with more padding on every view and on the frames."""
    pad = {2: (0, extra), 3: (0, 0, 0, extra)}
    return {key: torch.nn.functional.pad(value, pad[value.ndim], value=0) for key, value in batch.items()}


@pytest.mark.parametrize("heads", ["attention", "pooling"])
def test_embedding_does_not_depend_on_batch_mates(heads):
    model = tiny_model(**HEADS[heads])
    batch = tiny_batch(model)
    together, padded = model(**batch), model(**longer(batch))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = model(**{key: value[order] for key, value in batch.items()})
    for name in EMBEDS:
        torch.testing.assert_close(padded[name], together[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(shuffled[name], together[name][order], atol=1e-5, rtol=0)
    for i in range(5):
        alone = {}
        for key, value in batch.items():
            mask = batch[
                "visual_attention_mask" if key.startswith("visual") else key.replace("input_ids", "attention_mask")
            ]
            alone[key] = value[i : i + 1, : int(mask[i].sum())]
        for name, value in model(**alone).items():
            if name in EMBEDS:
                torch.testing.assert_close(value[0], together[name][i], atol=1e-5, rtol=0)


def test_published_embedding_depends_on_padding():
    # the weakness that the default repairs; if this fails, `pool_padding` does nothing
    model = tiny_model(**HEADS["published"])
    batch = tiny_batch(model)
    assert (model(**batch).text_embeds - model(**longer(batch)).text_embeds).abs().max() > 1e-3


@pytest.mark.parametrize("heads", HEADS)
def test_one_pass_for_all_views_equals_a_pass_for_each(heads):
    model = tiny_model(**HEADS[heads])
    batch = tiny_batch(model)
    calls = []
    model.text_tower.encoder.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(**batch)
    assert len(calls) == 1
    for name, prefix in (("text_embeds", ""), ("target_text_embeds", "target_")):
        alone = model.get_text_features(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]).pooler_output
        torch.testing.assert_close(alone, outputs[name], atol=1e-5, rtol=0)
    norms = torch.stack([outputs[name].norm(dim=-1) for name in EMBEDS])
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("trained_layers", [0, 1, 2, 3])
def test_resuming_at_the_boundary_equals_the_full_pass(trained_layers):
    model = tiny_model().set_trained_layers(trained_layers)
    batch = tiny_batch(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    boundary = model.text_tower.at_boundary(ids, mask)
    full = model.get_text_features(ids, mask).pooler_output
    resumed = model.get_text_features(ids, mask, boundary).pooler_output
    torch.testing.assert_close(resumed, full, atol=1e-6, rtol=0)
    assert len(model.text_tower.encoder.encoder.layer) == 3  # put back
    layers = [all(p.requires_grad for p in layer.parameters()) for layer in model.text_tower.encoder.encoder.layer]
    assert layers == [i >= 3 - trained_layers for i in range(3)]
    assert not any(p.requires_grad for p in model.text_tower.encoder.embeddings.parameters())


def test_frozen_layers_have_no_dropout_unless_asked():
    model = tiny_model().set_trained_layers(1).train()
    layers = model.text_tower.encoder.encoder.layer
    assert [layer.training for layer in layers] == [False, False, True] and model.text_head.training
    model.set_trained_layers(1, frozen_dropout=True).train()
    assert all(layer.training for layer in layers)


def test_save_and_load_keeps_the_embeddings(tmp_path):
    model = tiny_model(**HEADS["published"])
    model.save_pretrained(tmp_path)
    loaded = NrccrModel.from_pretrained(tmp_path)
    batch = tiny_batch(model)
    torch.testing.assert_close(loaded(**batch).text_embeds, model(**batch).text_embeds, atol=1e-6, rtol=0)
    code = {f"{name}.py" for name in ("configuration_nrccr", "modeling_nrccr", "modeling_efficientnet_lite")}
    code |= {
        "dual_encoders.py",
        "language_adapters.py",
        "languages.py",
        "length_groups.py",
        "weights.py",
        "heads.py",
        "towers.py",
        "open_clip.py",
        "files.py",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"} | code


def test_vision_tower_gives_the_features_of_one_frame():
    config = {
        "model_type": "efficientnet_lite",
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_size": 17,
    }
    model = tiny_model(vision_config=config, visual_feat_dim=None)
    pixels = torch.randn(3, 3, 32, 32)
    feats = model.visual_tower(pixels)
    assert feats.shape == (3, 1, 17)
    video = model.visual_tower(pixels[None])
    torch.testing.assert_close(video[0], feats[:, 0])
    by_pixels, by_feats = (
        model.get_image_features(**x).pooler_output for x in ({"pixel_values": pixels}, {"visual_feats": feats})
    )
    torch.testing.assert_close(by_pixels, by_feats)


def test_return_loss_is_clips():
    model = tiny_model()
    outputs = model(**tiny_batch(model), return_loss=True)
    scores = outputs.logit_scale * outputs.text_embeds @ outputs.image_embeds.t()
    torch.testing.assert_close(outputs.logits_per_text, scores)
    expected = -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()).mean() / 2
    torch.testing.assert_close(outputs.loss, expected)


def test_bad_input_names_value_and_remedy():
    with pytest.raises(ValueError, match="did you mean 'projection_dim'"):
        NrccrConfig(projecton_dim=3)
    assert NrccrConfig(text_config=TINY_TEXT, key_of_a_newer_transformers=1).projection_dim == 512
    with pytest.raises(Exception, match="teacher_view='source'"):
        NrccrConfig(text_head="pooling")
    model = tiny_model()
    with pytest.raises(ValueError, match="width 12, this model takes 13"):
        model.get_image_features(visual_feats=torch.zeros(2, 1, 12))
    with pytest.raises(ValueError, match="visual_feats instead of pixel_values"):
        model.get_image_features(pixel_values=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="has 3 layers"):
        model.set_trained_layers(4)
    published = tiny_model(**HEADS["published"]).train()
    with pytest.raises(ValueError, match="batch of one"):
        published(**tiny_batch(published, size=1))


@torch.no_grad()
def test_new_heads_leave_the_shared_towers_as_they_are():
    model = tiny_model(text_head="pooling", teacher_view="source")
    ids = torch.tensor([[5, 6, 7, 0, 0, 0]])
    mask = (ids > 0).long()
    before = model.text_tower(ids, mask)[:, :3]
    shared = model.with_new_heads(text_head="pooling", teacher_view="source", visual_feat_dim=13).eval()
    for other in (model, shared):
        assert torch.equal(other.text_tower(ids, mask)[:, :3], before)
        torch.testing.assert_close(other.text_tower(ids[:, :3], mask[:, :3]), before, atol=1e-6, rtol=0)

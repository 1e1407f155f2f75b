"""Tiny towers of every family, built in code: they load, train, save and reload, and keep their frozen boundary."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    ModernBertConfig,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from modeling_nrccr import NrccrConfig, NrccrModel, NrccrTrainer, NrccrTrainingArguments


SIZES = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=37)
WORDS = SIZES | dict(vocab_size=41, max_position_embeddings=23, pad_token_id=1)
PIXELS = SIZES | dict(image_size=8, patch_size=4)
TEXT = {
    "bert": (BertConfig(**WORDS), "mean"),
    "xlm-roberta": (XLMRobertaConfig(**WORDS), "first"),
    # one layer in two attends to a window of 2 tokens each side only
    "modernbert": (
        ModernBertConfig(
            **WORDS,
            global_attn_every_n_layers=2,
            local_attention=4,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
        ),
        "mean",
    ),
    "llama": (LlamaConfig(**WORDS, num_key_value_heads=2, bos_token_id=2, eos_token_id=3), "last"),
}
VISION = {
    "clip": (CLIPVisionConfig(**PIXELS, projection_dim=19), ("pooled", "cls", "mean", "projected")),
    "siglip2": (SiglipVisionConfig(**PIXELS), ("pooled", "mean")),  # the class of its fixed resolutions
    "siglip2-naflex": (Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=4), ("pooled", "mean")),
    "dinov2": (Dinov2Config(**PIXELS), ("pooled", "cls", "mean")),
    "vit": (ViTConfig(**PIXELS), ("pooled", "cls", "mean")),
}
# tensors with no gradient but rounding (a key's bias), or of a part that the chosen output does not pass
UNMOVED = ("key.bias", "k_proj.bias", "mask_token")


def model_of(text="bert", vision=None, seed=0, **config) -> NrccrModel:
    torch.manual_seed(seed)
    text_config, pooling = TEXT[text]
    vision_config = VISION[vision][0].to_dict() if vision else None
    config = {"visual_feat_dim": 13} | config if vision is None else config
    return NrccrModel(
        NrccrConfig(
            text_config=text_config.to_dict(),
            vision_config=vision_config,
            projection_dim=11,
            text_head="pooling",
            teacher_view="source",
            text_pooling=pooling,
            **config,
        )
    ).eval()


def captions(size=6, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(4, 41, (size, length), generator=generator)
    return ids * mask + 1 - mask, mask


def pictures(size=6, seed=0):
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained_one_step(model, rows, directory, **arguments):
    """One step of `NrccrTrainer`; which parameters moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = NrccrTrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=6,
        max_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        **arguments,
    )

    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    NrccrTrainer(model, arguments, rows, data_collator=collate).train()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def rows_of(visual: dict[str, torch.Tensor]) -> list[dict]:
    batch = dict(visual)
    for seed, prefix in enumerate(("", "target_", "back_translation_")):
        batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"] = captions(seed=seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(6)]


def reloaded(model, directory) -> NrccrModel:
    model.eval().save_pretrained(directory)
    again = AutoModel.from_pretrained(directory).eval()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    return again


def embeddings(model, **visual) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.get_text_features(*captions()).pooler_output, model.get_image_features(**visual).pooler_output


# -------------------------------------------------------------------------------------------------------- vision


@pytest.mark.slow
@pytest.mark.parametrize("output", ["pooled", "cls", "mean", "projected"])
@pytest.mark.parametrize("name", VISION)
def test_vision_tower(name, output, tmp_path):
    config, outputs = VISION[name]
    if output not in outputs:
        with pytest.raises(StrictDataclassClassValidationError, match=f"visual_encoder_output='{output}'"):
            model_of(vision=name, visual_encoder_output=output)
        return
    model = model_of(vision=name, visual_encoder_output=output)
    tower, pixel_values = model.visual_tower, pictures()
    with torch.no_grad():
        features = tower(pixel_values)
        encoder = tower.encoder
        inputs = tower.cut(pixel_values) if name == "siglip2-naflex" else {"pixel_values": pixel_values}
        full = encoder(**inputs)
    # which output feeds the head
    if output == "projected":
        assert type(encoder).__name__ == "CLIPVisionModelWithProjection" and model.config.visual_feat_dim == 19
        with torch.no_grad():
            expected = encoder.visual_projection(encoder.vision_model(pixel_values=pixel_values).pooler_output)
    else:
        states = full.last_hidden_state
        expected = {"pooled": full.pooler_output, "cls": states[:, 0], "mean": states.mean(1)}[output]
    assert features.shape == (6, 1, model.config.visual_feat_dim)
    torch.testing.assert_close(features[:, 0], expected)
    # a video is a picture a frame
    with torch.no_grad():
        video = tower(torch.stack([pixel_values, pixel_values.flip(0)], 1))
    torch.testing.assert_close(video, torch.stack([features[:, 0], features[:, 0].flip(0)], 1))

    moved = trained_one_step(model, rows_of({"pixel_values": pixel_values}), tmp_path, train_vision_tower=True)
    names = {name for name, _ in model.named_parameters() if name.startswith("visual_tower")}
    unread = ("pooler.", "head.", "post_layernorm.") if output in ("cls", "mean") else ()
    if output == "mean" and "siglip" in name:
        unread = ("head.",)
    still = {n for n in names - moved if not n.endswith(UNMOVED)}
    assert all(any(part in n for part in unread) for n in still), still
    assert any("patch_embed" in n for n in moved)
    assert not any(n.startswith("text_tower") for n in moved)

    again = reloaded(model, tmp_path / "saved")
    assert again.config.visual_encoder_output == output and type(again.visual_tower.encoder) is type(encoder)
    visual = {"pixel_values": pixel_values}
    for before, after in zip(embeddings(model, **visual), embeddings(again, **visual)):
        assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_vision_tower_loads_from_its_own_folder(name, tmp_path):
    torch.manual_seed(1)
    AutoModel.from_config(TEXT["bert"][0]).save_pretrained(tmp_path / "text")
    vision = AutoModel.from_config(VISION[name][0])
    vision.save_pretrained(tmp_path / "vision")
    model = NrccrModel.from_encoders(tmp_path / "text", tmp_path / "vision", projection_dim=11)
    loaded = model.visual_tower.encoder.state_dict()
    assert loaded and all(torch.equal(t, loaded[n]) for n, t in vision.state_dict().items())
    if name == "clip":
        with pytest.raises(ValueError, match="lacks visual_projection.weight"):
            NrccrModel.from_encoders(tmp_path / "text", tmp_path / "vision", visual_encoder_output="projected")


@pytest.mark.slow
@pytest.mark.parametrize("output", ["pooled", "projected"])
def test_vision_tower_of_a_whole_clip(output, tmp_path):
    """A dual encoder's folder gives its vision tower alone, its projection too where that is asked for."""
    torch.manual_seed(1)
    AutoModel.from_config(TEXT["bert"][0]).save_pretrained(tmp_path / "text")
    text, vision = SIZES | {"vocab_size": 31}, PIXELS | {"projection_dim": 19}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=19))
    clip.eval().save_pretrained(tmp_path / "clip")
    model = NrccrModel.from_encoders(tmp_path / "text", tmp_path / "clip", visual_encoder_output=output)
    assert model.config.vision_config.model_type == "clip_vision_model"
    with torch.no_grad():
        features = model.eval().visual_tower(pictures())[:, 0]
        pooled = clip.vision_model(pixel_values=pictures()).pooler_output
        expected = clip.visual_projection(pooled) if output == "projected" else pooled
    torch.testing.assert_close(features, expected)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["pooled", "mean"])
def test_naflex_tower_reads_what_its_image_processor_gives(output):
    """Pictures of several shapes, padded to the most patches; alone and in a batch the same."""
    model = model_of(vision="siglip2-naflex", visual_encoder_output=output)
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=6)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, size, dtype=np.uint8) for size in ((8, 8, 3), (10, 25, 3), (33, 9, 3))]
    with torch.no_grad():
        together = model.get_image_features(**processor(images, return_tensors="pt")).pooler_output
        alone = [model.get_image_features(**processor([image], return_tensors="pt")).pooler_output for image in images]
        square = processor(images[:1], return_tensors="pt", max_num_patches=4)
        patches = square["pixel_values"]  # of an 8 x 8 picture: cut by the processor, or by the tower
        pixels = patches.unflatten(2, (4, 4, 3)).unflatten(1, (2, 2)).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 8, 8)
        torch.testing.assert_close(model.visual_tower.cut(pixels)["pixel_values"], patches)
        uncut = model.get_image_features(pixel_values=pixels).pooler_output
        cut = model.get_image_features(**square).pooler_output
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(uncut, cut)


# ---------------------------------------------------------------------------------------------------------- text


@pytest.mark.slow
@pytest.mark.parametrize("head", ["pooling", "attention"])
@pytest.mark.parametrize("name", TEXT)
def test_text_tower(name, head, tmp_path):
    config, pooling = TEXT[name]
    torch.manual_seed(1)
    text = AutoModel.from_config(config)
    text.save_pretrained(tmp_path / "text")
    pooling = pooling if head == "pooling" else "mean"
    model = NrccrModel.from_encoders(
        tmp_path / "text",
        visual_feat_dim=13,
        projection_dim=11,
        text_head=head,
        text_pooling=pooling,
        teacher_view="cross" if head == "attention" else "source",
        key_query_size=16,
    )
    loaded = model.text_tower.encoder.state_dict()
    assert loaded and all(torch.equal(t, text.state_dict()[n]) for n, t in loaded.items())

    model.eval()
    ids, mask = captions()
    if pooling == "last":  # the last token that is no padding, wherever the padding is
        states = model.get_text_features(ids, mask).last_hidden_state
        pooled = model.text_head(states, mask)
        torch.testing.assert_close(pooled, torch.stack([row[n - 1] for row, n in zip(states, mask.sum(1))]))
        rolled = [(row.roll(9 - int(n)), part.roll(9 - int(n))) for row, part, n in zip(ids, mask, mask.sum(1))]
        left = model.get_text_features(torch.stack([r for r, _ in rolled]), torch.stack([m for _, m in rolled]))
        torch.testing.assert_close(left.pooler_output, model.get_text_features(ids, mask).pooler_output)
    # an embedding does not depend on its batch mates
    alone = torch.cat(
        [
            model.get_text_features(row[None, :n], part[None, :n]).pooler_output
            for row, part, n in zip(ids, mask, mask.sum(1))
        ]
    )
    torch.testing.assert_close(model.get_text_features(ids, mask).pooler_output, alone, atol=1e-5, rtol=0)

    visual = {"visual_feats": torch.randn(6, 1, 13)}
    moved = trained_one_step(model, rows_of(visual), tmp_path, trained_text_layers=-1)
    names = {n for n, _ in model.named_parameters() if n.startswith("text_tower")}
    assert not {n for n in names - moved if not n.endswith(UNMOVED)}

    again = reloaded(model, tmp_path / "saved")
    for before, after in zip(embeddings(model, **visual), embeddings(again, **visual)):
        assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("trained", [0, 1, 2, 3, 4])
def test_frozen_boundary(name, trained, tmp_path):
    """Training from states cached at the boundary is training from ids: the same states, the same gradients."""
    model = model_of(name).double()
    model.set_trained_layers(trained)
    ids, mask = captions()
    with torch.no_grad():
        states = model.text_tower.at_boundary(ids, mask)
    assert states.shape == (6, 9, 24) and not states.requires_grad
    states = states * mask[..., None]  # a cache keeps no padding

    def gradients(**inputs):
        model.zero_grad()
        model.get_text_features(attention_mask=mask, **inputs).pooler_output[:, 0].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    full, resumed = gradients(input_ids=ids), gradients(input_ids=ids, boundary_states=states)
    assert set(full) == set(resumed)
    for parameter, gradient in full.items():
        torch.testing.assert_close(resumed[parameter], gradient, atol=1e-12, rtol=1e-9)
    with torch.no_grad():
        for one, other in (
            (model.text_tower(ids, mask), model.text_tower(ids, mask, states)),
            (
                model.get_text_features(ids, mask).pooler_output,
                model.get_text_features(ids, mask, states).pooler_output,
            ),
        ):
            keep = mask.bool() if one.ndim == 3 else ...
            torch.testing.assert_close(one[keep], other[keep], atol=1e-12, rtol=0)

    if trained in (0, 4):
        return
    moved = trained_one_step(
        model.float(), rows_of({"visual_feats": torch.randn(6, 1, 13)}), tmp_path, trained_text_layers=trained
    )
    moved = {n for n in moved if n.startswith("text_tower")}
    parent, attribute = model.text_tower.layer_list()
    trains = {id(p) for layer in getattr(parent, attribute)[-trained:] for p in layer.parameters()}
    final = {n for n, p in model.named_parameters() if n in moved and id(p) not in trains}
    assert len(moved) - len(final) and all("norm" in n for n in final)  # and the norm after the last layer
    assert {n for n, p in model.named_parameters() if id(p) in trains and not n.endswith(UNMOVED)} <= moved

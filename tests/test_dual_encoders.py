"""Languages for dual encoders that are aligned already: tiny ones of every family, built in code."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AltCLIPConfig,
    AutoModel,
    CLIPConfig,
    EmbeddingGemma2Config,
    MetaClip2Config,
    Siglip2Config,
    SiglipConfig,
)

from modeling_nrccr import NrccrModel


SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
WORDS = SIZES | dict(vocab_size=41, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=1)
PIXELS = SIZES | dict(image_size=8, patch_size=4)
END = 3
DUAL_ENCODERS = {
    "clip": CLIPConfig(text_config=WORDS, vision_config=PIXELS, projection_dim=11),
    "metaclip_2": MetaClip2Config(text_config=WORDS, vision_config=PIXELS, projection_dim=11),
    "altclip": AltCLIPConfig(
        text_config=WORDS | dict(max_position_embeddings=19, project_dim=13), vision_config=PIXELS, projection_dim=11
    ),
    "siglip": SiglipConfig(text_config=WORDS | dict(projection_size=24), vision_config=PIXELS),
    "siglip2": Siglip2Config(
        text_config=WORDS | dict(projection_size=24), vision_config=SIZES | dict(patch_size=4, num_patches=4)
    ),
    "embedding_gemma2": EmbeddingGemma2Config(
        text_config=dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
            global_head_dim=6, intermediate_size=37, vocab_size=41, hidden_size_per_layer_input=8, embedding_dim=17,
            max_position_embeddings=64, sliding_window_pattern=2, pad_token_id=1,
        )
    ),
}  # fmt: skip
ADAPTERS = ("linear", "bottleneck", "dynamic", "lora")


@pytest.fixture(scope="module", params=DUAL_ENCODERS)
def dual(request, tmp_path_factory):
    """A dual encoder with weights that do something, and the folder that holds it."""
    torch.manual_seed(0)
    model = AutoModel.from_config(DUAL_ENCODERS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def texts(length: int = 9, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin, words, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (size,), generator=generator)
    lengths[0] = length
    ids = torch.randint(4, 41, (size, length), generator=generator)
    place = torch.arange(length)
    ids = torch.where(place < lengths[:, None] - 1, ids, END).masked_fill(place >= lengths[:, None], 1)
    ids[:, 0] = 2
    return ids, (place < lengths[:, None]).long()


def pictures(model, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type != "siglip2":
        return {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator)}
    mask = torch.ones(size, 4, dtype=torch.long)
    mask[0, 2:] = 0
    shapes = torch.tensor([[1, 2]] + [[2, 2]] * (size - 1))
    patches = torch.randn(size, 4, 48, generator=generator)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@torch.no_grad()
def own_text_embeds(model, ids, mask) -> torch.Tensor:
    """By the dual encoder's own code, padded as its documentation says."""
    if model.config.model_type == "embedding_gemma2":
        states = model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    if model.config.model_type.startswith("siglip"):
        ids = F.pad(ids, (0, model.config.text_config.max_position_embeddings - ids.shape[1]), value=1)
        mask = None
    return F.normalize(model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)


@torch.no_grad()
def test_at_first_the_similarities_are_its_own(dual):
    theirs, folder = dual
    ours = NrccrModel.from_dual_encoder(str(folder))
    ids, mask = texts()
    own = own_text_embeds(theirs, ids, mask)
    torch.testing.assert_close(ours.get_text_features(ids, mask).pooler_output, own, atol=1e-5, rtol=0)
    for kind in ADAPTERS:
        ours.add_language(kind, kind=kind, rank=3, layers=1)
        embeds = ours.get_text_features(ids, mask, languages=kind).pooler_output
        torch.testing.assert_close(embeds, own, atol=1e-5, rtol=0)
    if theirs.config.model_type == "embedding_gemma2":
        return  # its pictures are embedded by itself
    inputs = pictures(theirs)
    images = F.normalize(theirs.get_image_features(**inputs).pooler_output, dim=-1)
    torch.testing.assert_close(ours.get_image_features(**inputs).pooler_output, images, atol=1e-5, rtol=0)
    scores = ours(ids, mask, languages="linear", **inputs).logits_per_text
    torch.testing.assert_close(scores, theirs.logit_scale.exp() * own @ images.t(), atol=1e-4, rtol=1e-5)

"""How the text and picture sides of CLIP and its like become those of `NrccrModel`: one line a family."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from .open_clip import (
    is_open_clip,
    read_open_clip_config,
    read_open_clip_image_processor,
    read_open_clip_model,
    read_open_clip_tokenizer,
)
from .weights import check_name, load_weights


@dataclass(frozen=True)
class Family:
    """
    Args:
        text_model, vision_model: Attributes of the dual encoder's model; without `vision_model` the picture side stays
            where it is, and its embeddings come as `visual_feats`.
        pooling: Of the text encoder's states.
        text_projection, visual_projection: The Linear after pooling, where there is one.
        fixed_length: The last position is pooled, padding or not, so every text has all positions.
        text_prefix, lower_case: What is done to a text first.
        logit_bias: Its logits have a bias.
    """

    text_model: str = "text_model"
    vision_model: str | None = "vision_model"
    pooling: str = "last"
    text_projection: str | None = "text_projection"
    visual_projection: str | None = "visual_projection"
    fixed_length: bool = False
    text_prefix: str = ""
    lower_case: bool = False
    logit_bias: bool = False


GEMMA_VOCABULARY = 256_000
FAMILIES = {
    # pooled: the token that ends the text, the last one that is no padding
    "clip": Family(),
    "metaclip_2": Family(),
    "altclip": Family(pooling="first"),
    "siglip": Family(text_projection="text_model.head", visual_projection=None, fixed_length=True, logit_bias=True),
    "siglip2": Family(
        text_projection="text_model.head", visual_projection=None, fixed_length=True, lower_case=True, logit_bias=True
    ),
    # one backbone reads texts and pictures; pooled and projected as its documentation says
    "embedding_gemma2": Family(
        text_model="language_model",
        vision_model=None,
        pooling="mean",
        text_projection=None,
        visual_projection=None,
        text_prefix="task: search result | query: ",
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a dual encoder's config. Raises ValueError for a model of none."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{config.model_type!r} is no dual encoder that is known here: nrccr, {', '.join(FAMILIES)}. Any other "
            "takes part by its embeddings, `image_embeds` and `teacher_text_embeds` of the rows"
        )
    return FAMILIES[config.model_type]


def dual_encoder_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of `NrccrConfig` that make the same embeddings."""
    family, text = family_of(config), config.text_config
    size = getattr(config, "projection_dim", None) or getattr(text, "projection_size", None)
    size = size or getattr(text, "embedding_dim", None)
    return {
        "text_config": text,
        "vision_config": config.vision_config if family.vision_model else None,
        "visual_feat_dim": None if family.vision_model else size,
        "projection_dim": size,
        "text_head": "pooling",
        "text_pooling": family.pooling,
        "text_projection": "linear" if family.text_projection else "none",
        "visual_head": "pooling",
        "visual_projection": "linear" if family.visual_projection else "none",
        "text_length": text.max_position_embeddings if family.fixed_length else None,
        "teacher_view": "source",
        "logit_bias_init_value": 0.0 if family.logit_bias else None,
    }


def text_rules(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of `NrccrProcessor` that read texts as the dual encoder was trained to."""
    family, text = family_of(config), config.text_config
    positions = text.max_position_embeddings - (2 if config.model_type == "altclip" else 0)  # RoBERTa's start at 2
    # SigLIP 2 of fixed size says that it is "siglip"; its tokenizer is Gemma's, whose vocabulary has this size
    lower_case = family.lower_case or (config.model_type == "siglip" and text.vocab_size == GEMMA_VOCABULARY)
    return {
        "text_prefix": family.text_prefix,
        "lower_case": lower_case,
        "text_padding": "max_length" if family.fixed_length else "longest",
        "max_text_length": min(positions, 512),
    }


def read_encoder_config(name: str, **hub) -> PreTrainedConfig:
    """Reads the configuration of a hub id or folder."""
    check_name(name, subfolder=hub.get("subfolder"))
    return AutoConfig.from_pretrained(name, **hub)


def read_config(name: str, **hub) -> PreTrainedConfig:
    """Reads that of a dual encoder; `open_clip:NAME` is one in open_clip's files."""
    return read_open_clip_config(name, **hub) if is_open_clip(name) else read_encoder_config(name, **hub)


def read_dual_encoder(name: str, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """Reads the whole model; `options` of loading."""
    if is_open_clip(name):
        return read_open_clip_model(name, config, **options)
    family_of(config)
    return load_weights(AutoModel.from_pretrained, MODEL_MAPPING[type(config)], name, config=config, **options)


def read_processors(name: str, config: PreTrainedConfig, **hub) -> tuple[Any, Any]:
    """Reads the tokenizer, and the image processor of a family whose pictures do not stay where they are."""
    if is_open_clip(name):
        return read_open_clip_tokenizer(name, config, **hub), read_open_clip_image_processor(name, config, **hub)
    has_pictures = family_of(config).vision_model is not None
    image_processor = AutoImageProcessor.from_pretrained(name, **hub) if has_pictures else None
    return AutoTokenizer.from_pretrained(name, **hub), image_processor


@torch.no_grad()
def load_dual_encoder(model: nn.Module, dual: PreTrainedModel):
    """Copies the weights of `dual` into a `NrccrModel` of its settings."""
    family = family_of(dual.config)
    towers = [(model.text_tower, family.text_model)]
    if family.vision_model:
        towers.append((model.visual_tower, family.vision_model))
    for tower, name in towers:
        weights = getattr(dual, name).state_dict()
        tower.encoder.load_state_dict({key: weights[key] for key in tower.encoder.state_dict()})
    for projection, name in (
        (model.text_projection, family.text_projection),
        (model.visual_projection, family.visual_projection),
    ):
        if name:
            linear = attrgetter(name)(dual)
            projection.dense.weight.copy_(linear.weight)
            projection.dense.bias.zero_()
            if linear.bias is not None:
                projection.dense.bias.copy_(linear.bias)
    if hasattr(dual, "logit_scale"):
        model.logit_scale.copy_(dual.logit_scale.reshape(()))
    if family.logit_bias:
        model.logit_bias.copy_(dual.logit_bias.reshape(()))

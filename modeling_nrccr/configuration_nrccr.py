"""Architecture of NRCCR: which text encoder, which visual tower, which heads. No training setting lives here."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    r"""
    Configuration of [`EfficientNetLiteModel`], the small vision tower of the demo (EfficientNet-Lite0 by default).

    Source: EfficientNet, https://arxiv.org/abs/1905.11946; the Lite variants drop squeeze-and-excitation, use ReLU6
    and keep stem and head at their base width.

    Args:
        num_channels (`int`): Channels of a picture.
        image_size (`int`): Side of a picture in pixels (only recorded; the network is fully convolutional).
        width_coefficient (`float`), depth_coefficient (`float`): Compound scaling of the blocks; 1.0 is Lite0.
        hidden_size (`int`): Channels of the last convolution, the width of `pooler_output`.
        batch_norm_eps (`float`): Epsilon of each BatchNorm.
        batch_norm_momentum (`float`): PyTorch momentum of each BatchNorm.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    num_channels: int = 3
    image_size: int = 224
    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01
    initializer_range: float = 0.02


# text encoders that project the states of all tokens to another width
TEXT_FEAT_DIM = {"altclip_text_model": "project_dim", "embedding_gemma2_text": "embedding_dim"}


@strict
class NrccrConfig(PreTrainedConfig):
    r"""
    Configuration of [`NrccrModel`].

    The defaults are the repaired behaviour; the values of the released implementation (arXiv 2208.12526) are named
    "published" below, and `modeling_nrccr.conversion` sets them.

    Args:
        text_config (`dict` or `PreTrainedConfig`): Any `AutoModel` text encoder; without `model_type`: BERT.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Any `AutoModel` vision tower, or [`EfficientNetLiteConfig`]. None: the model takes `visual_feats` only.
        visual_feat_dim (`int`, *optional*): Width of `visual_feats`; defaults to the vision tower's output width.
            None with no vision tower: the model has no visual side, and embeds texts alone.
        projection_dim (`int`): Width of the common space (published: 1536).
        text_feat_dim (`int`, *optional*): Width of the text encoder's output, where it is not its `hidden_size`.
        text_projection, visual_projection (`str`):
            "linear", or "none": what the head gives is in the common space already (the picture side of SigLIP).
        text_length (`int`, *optional*):
            Every text is padded to so many tokens, which are all attended to: for text encoders that pool the last
            position, padding or not (SigLIP). An embedding then never depends on its batch mates.
        text_head, visual_head (`str`):
            "attention": LayerNorm, Linear, ReLU, positions, one attention block, pooling (published for text, video);
            "linear": pooling, then a Linear; for pictures ReLU(Linear) (published), for text without ReLU, so that
            with the projection it is a stack of two linear layers (M2M, arXiv 2601.10096);
            "pooling": pooling alone, straight into the projection.
        text_pooling, visual_pooling (`str`): "mean" or "max" over time; for text also "first" (CLS) or "last" token.
        text_hidden_size, visual_hidden_size (`int`, *optional*): Width inside an attention head; default: input width.
        text_num_attention_heads, visual_num_attention_heads (`int`): Heads of the attention block.
        key_query_size (`int`): Width of all queries (and keys) together.
        max_text_positions, max_visual_positions (`int`): Learned positions (published: 250 tokens, 80 frames).
        visual_encoder_output (`str`):
            What the vision tower hands on: "pooled" (`pooler_output`), "cls" (first token), "mean" (mean of all
            tokens) or "projected" (CLIP's projected `image_embeds`, which the paper used).
        teacher_view (`str`):
            "cross": source words attend to the target's states (published); "source": the source view itself.
            The cross view needs `text_head="attention"`.
        attention_score_scale (`str`): "head" divides scores by sqrt(key_query_size / heads); "hidden" by
            sqrt(hidden size / heads) (published).
        pool_padding (`bool`): True pools padding and attends from padded rows to everything (published): an
            embedding then depends on its batch mates.
        projection_norm (`str`): "none", or "batch_norm" after the projection (published).
        head_dropout, projection_dropout (`float`): Dropout inside attention heads (published 0.1) and after the
            projection (published 0.2).
        text_dropout, visual_dropout (`float`): Dropout on what a linear or pooling head has pooled.
        languages (`dict[str, dict]`, *optional*):
            Settings of the adapter of each language that was added (`NrccrModel.add_language`).
        language (`str`, *optional*): The one that reads texts at first (`NrccrModel.set_language`); None: no adapter.
        dual_encoder (`dict`, *optional*): `name` and `revision` of what `NrccrModel.from_dual_encoder` started from.
        source_text_side (`dict`, *optional*): A second text side, by its own fields of this class, that reads texts in
            no added language (`NrccrModel.with_source_text_side`); None: one text side reads all.
        logit_scale_init_value (`float`): Initial log of the contrastive temperature's inverse, as in CLIP.
        logit_bias_init_value (`float`, *optional*): Initial bias of the logits, as in SigLIP; None: there is none.
    """

    model_type = "nrccr"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    visual_feat_dim: int | None = None
    projection_dim: int = 512
    text_feat_dim: int | None = None
    text_projection: Literal["linear", "none"] = "linear"
    visual_projection: Literal["linear", "none"] = "linear"
    text_length: int | None = None
    text_head: Literal["attention", "linear", "pooling"] = "attention"
    visual_head: Literal["attention", "linear", "pooling"] = "linear"
    text_pooling: Literal["mean", "max", "first", "last"] = "mean"
    visual_pooling: Literal["mean", "max"] = "mean"
    text_hidden_size: int | None = None
    visual_hidden_size: int | None = None
    text_num_attention_heads: int = 8
    visual_num_attention_heads: int = 8
    key_query_size: int = 512
    max_text_positions: int = 250
    max_visual_positions: int = 80
    visual_encoder_output: Literal["pooled", "cls", "mean", "projected"] = "pooled"
    teacher_view: Literal["cross", "source"] = "cross"
    attention_score_scale: Literal["head", "hidden"] = "head"
    pool_padding: bool = False
    projection_norm: Literal["none", "batch_norm"] = "none"
    head_dropout: float = 0.1
    projection_dropout: float = 0.0
    text_dropout: float = 0.0
    visual_dropout: float = 0.0
    languages: dict[str, dict[str, Any]] | None = None
    language: str | None = None
    dual_encoder: dict[str, Any] | None = None
    source_text_side: dict[str, Any] | None = None
    logit_scale_init_value: float = 2.6592
    logit_bias_init_value: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        own = {field.name for field in fields(NrccrConfig)} - {field.name for field in fields(PreTrainedConfig)}
        for key in kwargs:
            # compared against our own names only: keys of newer transformers versions must pass
            if meant := get_close_matches(key, own, n=1, cutoff=0.85):
                raise ValueError(f"NrccrConfig has no field {key!r}: did you mean {meant[0]!r}?")
        super().__post_init__(**kwargs)
        # of a dual encoder (CLIP, SigLIP 2, ...) the vision tower alone
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        if hasattr(self.text_config, "vision_config"):
            raise ValueError(
                f"text_config is that of {self.text_config.model_type}, which reads pictures too: take "
                "NrccrModel.from_dual_encoder, or its text_config"
            )
        if self.text_feat_dim is None:
            width = TEXT_FEAT_DIM.get(self.text_config.model_type, "hidden_size")
            self.text_feat_dim = getattr(self.text_config, width)
        if self.visual_feat_dim is None and self.vision_config is not None:
            projected = self.visual_encoder_output == "projected"
            self.visual_feat_dim = getattr(self.vision_config, "projection_dim" if projected else "hidden_size", None)

    def validate_architecture(self):
        """Raise ValueError for settings that do not fit together; part of `@strict`-powered validation."""
        if self.teacher_view == "cross" and self.text_head != "attention":
            raise ValueError(
                "teacher_view='cross' needs the attention block of text_head='attention'; "
                f"with text_head={self.text_head!r} set teacher_view='source'"
            )
        tower = getattr(self.vision_config, "model_type", None)
        if self.visual_encoder_output == "projected" and tower not in (None, "clip_vision_model"):
            raise ValueError(f"visual_encoder_output='projected' is CLIP's; {tower} has no projection: use 'pooled'")
        if self.visual_encoder_output == "cls" and tower in ("siglip_vision_model", "siglip2_vision_model"):
            raise ValueError(f"visual_encoder_output='cls': {tower} has no class token: use 'pooled' or 'mean'")
        for side in ("text", "visual"):
            if getattr(self, f"{side}_head") != "attention":
                continue
            heads = getattr(self, f"{side}_num_attention_heads")
            width = getattr(self, f"{side}_hidden_size")
            if self.key_query_size % heads or (width or 0) % heads:
                raise ValueError(
                    f"key_query_size ({self.key_query_size}) and {side}_hidden_size ({width}) must be multiples of "
                    f"{side}_num_attention_heads ({heads})"
                )


# At import, not in `__init__`: AutoConfig of a published checkpoint runs this file before any modelling file.
AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoConfig.register("nrccr", NrccrConfig, exist_ok=True)
NrccrConfig.register_for_auto_class()

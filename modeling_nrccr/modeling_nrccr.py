"""NRCCR: pictures or videos and sentences of any language in one space (Wang et al. 2022, arXiv 2208.12526).

The model turns inputs into embeddings and nothing else: losses are in `losses.py`, training is in `trainer.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .assembly import NrccrAssemblyMixin
from .configuration_nrccr import NrccrConfig
from .files import writing_weights
from .heads import NrccrAttentionHead, NrccrPoolingHead, NrccrProjection, clip_loss
from .language_adapters import NrccrLanguageAdapter
from .languages import NrccrLanguagesMixin
from .length_groups import length_groups, row_lengths
from .text_passes import NrccrTextPassesMixin
from .towers import NrccrTextTower, NrccrVisualTower


VIEWS = ("source", "target", "back_translation")


# ------------------------------------------------------------------------------------------------------- outputs


@dataclass
class NrccrOutput(ModelOutput):
    r"""
    Embeddings are projected and L2-normalised, `(batch_size, projection_dim)`; None where a view is not given.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): With `return_loss=True`, CLIP's contrastive loss.
        logits_per_text (`torch.FloatTensor` of shape `(text_batch_size, image_batch_size)`): Scaled similarities.
        logits_per_image (`torch.FloatTensor` of shape `(image_batch_size, text_batch_size)`): Their transpose.
        text_embeds, target_text_embeds, back_translation_text_embeds (`torch.FloatTensor`): Views of a caption.
        teacher_text_embeds (`torch.FloatTensor`): The teacher of the target view: source and target read together.
        teacher_target_text_embeds (`torch.FloatTensor`): The target caption alone, by another model that teaches.
        image_embeds (`torch.FloatTensor`): The picture or video.
        logit_scale (`torch.FloatTensor` of shape `()`): The factor in the logits, already exponentiated.
        text_hidden_states, target_text_hidden_states (`torch.FloatTensor` of shape
            `(batch_size, sequence_length, hidden_size)`): Encoder output before the head, for the discriminator.
    """

    loss: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    target_text_embeds: torch.FloatTensor | None = None
    back_translation_text_embeds: torch.FloatTensor | None = None
    teacher_text_embeds: torch.FloatTensor | None = None
    teacher_target_text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    text_hidden_states: torch.FloatTensor | None = None
    target_text_hidden_states: torch.FloatTensor | None = None


# --------------------------------------------------------------------------------------------------------- model


class NrccrPreTrainedModel(PreTrainedModel):
    config_class = NrccrConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, NrccrModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, module.config.logit_bias_init_value)
        elif isinstance(module, NrccrLanguageAdapter):
            module.reset()

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs):
        """Saves as [`PreTrainedModel.save_pretrained`] does; whom the umask lets may read the weights too."""
        with writing_weights(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)


class NrccrModel(NrccrLanguagesMixin, NrccrAssemblyMixin, NrccrTextPassesMixin, NrccrPreTrainedModel):
    """A text tower and a visual tower, each with a head and a projection into one space.

    Views of a caption travel under their own names: `input_ids` (source), `target_input_ids`,
    `back_translation_input_ids`, each with its `*attention_mask`, all in ONE pass through the text encoder.
    """

    def __init__(self, config: NrccrConfig, towers: "NrccrModel | None" = None):
        super().__init__(config)
        self.text_tower = towers.text_tower if towers else NrccrTextTower(config)
        self.visual_tower = None
        if config.vision_config is not None:
            self.visual_tower = towers.visual_tower if towers else NrccrVisualTower(config)
        width = config.text_feat_dim
        if config.text_head == "attention":
            self.text_head = NrccrAttentionHead(
                width,
                config.text_hidden_size or width,
                config.text_num_attention_heads,
                config.max_text_positions,
                config.text_pooling,
                config,
            )
        else:
            dense = config.text_head == "linear"
            self.text_head = NrccrPoolingHead(width, config.text_pooling, config.text_dropout, config, dense, False)
        width = config.visual_feat_dim
        if width is None:
            self.visual_head = None
        elif config.visual_head == "attention":
            self.visual_head = NrccrAttentionHead(
                width,
                config.visual_hidden_size or width,
                config.visual_num_attention_heads,
                config.max_visual_positions,
                config.visual_pooling,
                config,
            )
        else:
            dense = config.visual_head == "linear"
            self.visual_head = NrccrPoolingHead(width, config.visual_pooling, config.visual_dropout, config, dense)
        width = self.text_head.output_size
        self.text_projection = NrccrProjection(width, config, config.text_projection)
        self.visual_projection = None
        if self.visual_head is not None:
            self.visual_projection = NrccrProjection(self.visual_head.output_size, config, config.visual_projection)
        adapters = {name: NrccrLanguageAdapter(width, **part) for name, part in (config.languages or {}).items()}
        self.language_adapters = nn.ModuleDict(adapters)
        for language in filter(self.has_lora, adapters):
            self.insert_lora(language, adapters[language])
        self.language = config.language
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.source_text_side = None
        if config.source_text_side is not None:
            self.source_text_side = type(self)(NrccrConfig(**config.source_text_side))
        self.kept_in_eval: list[nn.Module] = []
        self.recompute_passes, self.checkpoint_every = False, 0  # see `run_tower`
        self.post_init()

    def set_trained_layers(
        self,
        text_layers: int | None = None,
        vision: bool = True,
        frozen_dropout: bool = False,
        visual_head: bool = True,
    ):
        """Freezes the text encoder below its top `text_layers` layers (None: trains all of it), the vision tower
        unless `vision`, and what follows it unless `visual_head`: then no `image_embeds` changes. Dropout inside
        frozen towers is off unless `frozen_dropout` (published: on)."""
        self.text_tower.freeze_below(text_layers)
        towers = [tower for tower in (self.text_tower, self.visual_tower) if tower]
        if self.visual_tower is not None:
            self.visual_tower.requires_grad_(vision)
        heads = [module for module in (self.visual_head, self.visual_projection) if module]
        for module in heads:
            module.requires_grad_(visual_head)
        frozen = (
            []
            if frozen_dropout
            else [
                module
                for tower in towers
                for module in tower.modules()
                if (parameters := list(module.parameters())) and not any(p.requires_grad for p in parameters)
            ]
        )
        frozen += [] if visual_head else heads
        # their dropout too, which has no parameters
        self.kept_in_eval = list({child: None for module in frozen for child in module.modules()})
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.kept_in_eval:  # every one is listed, so none needs to look at its children
            module.training = False
        return self

    @property
    def cached_text_pooling(self) -> str | None:
        """How a frozen text encoder's states may be pooled once and for all; None where something reads them all."""
        frozen = self.text_tower.num_trained_layers == 0
        return self.config.text_pooling if frozen and self.config.text_head != "attention" else None

    def get_input_embeddings(self) -> nn.Module:
        return self.text_tower.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_tower.encoder.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boundary_states: torch.Tensor | None = None,
        languages: str | Sequence[str | None] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embed texts: `pooler_output` is the L2-normalised embedding, of shape `(batch_size, projection_dim)`.
        `languages`: whose adapter reads each text (None in a list: no adapter's); by default that of
        `set_language`."""
        if self.source_text_side is not None and input_ids is not None:
            languages = self.languages_of(len(input_ids), languages)
            if None in languages:
                return self.read_by_side(input_ids, attention_mask, languages)
        view = self.text_inputs(input_ids, attention_mask, boundary_states)
        languages = self.languages_of(len(view[1]), languages)
        states, features = self.read_text(view, languages)
        embeds = self.text_projection(self.adapt(features, languages))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=embeds)

    def read_by_side(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, languages: list[str | None]
    ) -> BaseModelOutputWithPooling:
        """Let each text be read by the side that its tokens, `(batch_size, sequence_length)`, are of; its states are
        that side's, and not given."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = torch.empty(len(mask), self.config.projection_dim, dtype=self.dtype, device=mask.device)
        for side, is_own in ((self.source_text_side, False), (self, True)):
            rows = [row for row, language in enumerate(languages) if (language is not None) == is_own]
            if rows:
                length = max(1, int(row_lengths(mask[rows]).max()))
                of_rows = [languages[row] for row in rows]
                read = side.get_text_features(input_ids[rows, :length], mask[rows, :length], languages=of_rows)
                embeds[rows] = read.pooler_output
        return BaseModelOutputWithPooling(pooler_output=embeds)

    def read_text(self, view: tuple, languages: list[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of one view (see `encode_text`), and what the head makes of them, `(batch_size, width)`,
        which adapters read."""
        states = self.encode_text([view], languages)[0]
        return states, self.text_head(states, view[1])

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        visual_feats: torch.Tensor | None = None,
        visual_attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embed pictures, videos or features, `(batch_size, num_frames, visual_feat_dim)`, with the mask of the
        frames; `pooler_output` is the L2-normalised embedding, of shape `(batch_size, projection_dim)`.
        `image_embeds`: such embeddings, as an index has them; they are L2-normalised. Raises ValueError for what the
        model cannot read: none of these, features of another width, pixels without a vision tower."""
        if image_embeds is not None:
            return BaseModelOutputWithPooling(pooler_output=F.normalize(image_embeds.to(self.dtype), dim=-1))
        if self.visual_head is None:
            raise ValueError("this model embeds texts alone: its NrccrConfig.visual_feat_dim is None")
        if visual_feats is None and pixel_values is None:
            raise ValueError("pictures are read from pixel_values, visual_feats or image_embeds: got none of them")
        if visual_feats is None:
            if self.visual_tower is None:
                raise ValueError("this model has no vision tower: give visual_feats instead of pixel_values")
            visual_feats = self.visual_tower(pixel_values, pixel_attention_mask, spatial_shapes)
        else:
            visual_feats = visual_feats.to(self.logit_scale.dtype)
        if visual_feats.ndim == 2:
            visual_feats = visual_feats.unsqueeze(1)
        if visual_feats.shape[-1] != self.config.visual_feat_dim:
            raise ValueError(
                f"visual_feats have width {visual_feats.shape[-1]}, this model takes {self.config.visual_feat_dim} "
                "(NrccrConfig.visual_feat_dim)"
            )
        if visual_attention_mask is None:
            visual_attention_mask = visual_feats.new_ones(visual_feats.shape[:2])
        embeds = self.visual_projection(self.visual_head(visual_feats, visual_attention_mask))
        return BaseModelOutputWithPooling(last_hidden_state=visual_feats, pooler_output=embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_feats: torch.Tensor | None = None,
        visual_attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        target_input_ids: torch.Tensor | None = None,
        target_attention_mask: torch.Tensor | None = None,
        back_translation_input_ids: torch.Tensor | None = None,
        back_translation_attention_mask: torch.Tensor | None = None,
        boundary_states: torch.Tensor | None = None,
        target_boundary_states: torch.Tensor | None = None,
        back_translation_boundary_states: torch.Tensor | None = None,
        languages: str | Sequence[str | None] | None = None,
        return_teacher: bool = True,
        return_loss: bool = False,
    ) -> NrccrOutput:
        r"""
        Embed captions, in up to three views, and pictures.

        Args:
            input_ids, target_input_ids, back_translation_input_ids (`torch.LongTensor` of shape
                `(batch_size, sequence_length)`): The views of a caption, each with its own length.
            boundary_states, ... (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Instead of ids: the cached output of the frozen layers (`NrccrTextTower.at_boundary`).
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, or with a frame
                axis after the first): Pictures or videos.
            pixel_attention_mask, spatial_shapes: With `pixel_values` of patches, for a NaFlex tower (SigLIP 2).
            visual_feats (`torch.FloatTensor` of shape `(batch_size, num_frames, visual_feat_dim)`): Instead of pixels.
            image_embeds (`torch.FloatTensor` of shape `(batch_size, projection_dim)`): Instead of both, from an index.
            languages (`str` or list, *optional*): As in `get_text_features`; of the target captions, where there are
                such: source captions and back-translations are then in the language that needs no adapter.
            return_teacher (`bool`): False saves the compute of `teacher_text_embeds`.
            return_loss (`bool`): Adds CLIP's contrastive loss between source captions and pictures.

        Raises:
            ValueError: nothing is given to embed; or a model of two text sides is asked for other views than the
                source's.
        """
        views = {
            "source": (input_ids, attention_mask, boundary_states),
            "target": (target_input_ids, target_attention_mask, target_boundary_states),
            "back_translation": (
                back_translation_input_ids,
                back_translation_attention_mask,
                back_translation_boundary_states,
            ),
        }
        views = {
            name: self.text_inputs(*view) for name, view in views.items() if view[0] is not None or view[2] is not None
        }
        if not views and pixel_values is None and visual_feats is None and image_embeds is None:
            raise ValueError(
                "nothing to embed: give input_ids, or pixel_values, visual_feats or image_embeds, or both"
            )
        embeds, teacher_embeds, states = {}, None, {}
        if not (pixel_values is None and visual_feats is None and image_embeds is None):
            image_embeds = self.get_image_features(
                pixel_values,
                visual_feats,
                visual_attention_mask,
                pixel_attention_mask,
                spatial_shapes,
                image_embeds,
                return_dict=True,
            ).pooler_output
        if self.source_text_side is not None and views:
            if set(views) != {"source"} or boundary_states is not None:
                raise ValueError("a model of two text sides asks; what is trained of it is its language_side()")
            embeds["source"] = self.get_text_features(*views["source"][:2], languages=languages).pooler_output
        elif views:
            masks = {name: mask for name, (_, mask, _) in views.items()}
            spoken = {name: [None] * len(mask) for name, mask in masks.items()}
            adapted = "target" if "target" in views else next(iter(views))
            spoken[adapted] = self.languages_of(len(masks[adapted]), languages)
            states = dict(zip(views, self.encode_text(list(views.values()), sum(spoken.values(), []))))
            return_teacher = return_teacher and "source" in views and "target" in views
            embeds, teacher_embeds = self.embed_views(states, masks, spoken, return_teacher)

        logit_scale = self.logit_scale.exp()
        logits_per_text = loss = None
        text_embeds = embeds.get("source", embeds.get("target"))
        if text_embeds is not None and image_embeds is not None:
            logits_per_text = logit_scale * text_embeds @ image_embeds.t()
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias
            loss = clip_loss(logits_per_text) if return_loss else None
        return NrccrOutput(
            loss=loss,
            logits_per_text=logits_per_text,
            logits_per_image=None if logits_per_text is None else logits_per_text.t(),
            text_embeds=embeds.get("source"),
            target_text_embeds=embeds.get("target"),
            back_translation_text_embeds=embeds.get("back_translation"),
            teacher_text_embeds=teacher_embeds,
            image_embeds=image_embeds,
            logit_scale=logit_scale,
            text_hidden_states=states.get("source"),
            target_text_hidden_states=states.get("target"),
        )

    def embed_views(
        self,
        states: dict[str, torch.Tensor],
        masks: dict[str, torch.Tensor],
        languages: dict[str, list[str | None]],
        return_teacher: bool,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return embeddings by view and the teacher's. The order source, target, teacher, back-translation is that of
        the released code: it decides the running statistics of a BatchNorm."""
        cross = return_teacher and self.config.teacher_view == "cross"
        groups = []
        if self.config.text_head == "attention" and not self.config.pool_padding:
            lengths = {view: row_lengths(mask) for view, mask in masks.items()}
            groups = length_groups(sum(lengths.values()))
        if len(groups) < 2:
            read = self.read_views(states, masks, cross)
        else:
            parts = []
            for rows in groups:
                cut = {view: max(1, int(length[rows].max())) for view, length in lengths.items()}
                of_rows = [{view: part[view][rows, : cut[view]] for view in cut} for part in (states, masks)]
                parts.append(self.read_views(*of_rows, cross))
            order = torch.cat(groups).argsort()
            read = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        read |= {name: self.adapt(read[name], languages[name]) for name in languages}
        embeds = {name: self.text_projection(features) for name, features in read.items()}
        teacher = embeds.pop("teacher", None)
        if return_teacher and not cross:
            teacher = embeds["source"]
        return embeds, teacher

    def read_views(
        self, states: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], cross: bool
    ) -> dict[str, torch.Tensor]:
        """Return what the head reads in each view, and with `cross` the teacher, of shape `(batch_size, width)`."""
        if self.config.teacher_view == "source":
            return {view: self.text_head(states[view], masks[view]) for view in VIEWS if view in states}
        states = {view: self.text_head.embed(states[view]) for view in states}
        read = {view: self.text_head.read(states[view], masks[view]) for view in VIEWS[:2] if view in states}
        if cross:
            source, target = ((states[view], masks[view]) for view in VIEWS[:2])
            read["teacher"] = self.text_head.cross(*source, *target)
        if VIEWS[2] in states:
            read[VIEWS[2]] = self.text_head.read(states[VIEWS[2]], masks[VIEWS[2]])
        return read


NrccrModel.register_for_auto_class("AutoModel")
AutoModel.register(NrccrConfig, NrccrModel, exist_ok=True)

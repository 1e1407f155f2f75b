"""NRCCR: pictures or videos and sentences of any language in one space (Wang et al. 2022, arXiv 2208.12526).

The model turns inputs into embeddings and nothing else: losses are in `losses.py`, training is in `trainer.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.hub import resolve_revision

from .configuration_nrccr import NrccrConfig
from .dual_encoders import (
    dual_encoder_settings,
    load_dual_encoder,
    read_config,
    read_dual_encoder,
    read_encoder_config,
)
from .files import writing_weights
from .heads import NrccrAttentionHead, NrccrPoolingHead, NrccrProjection, clip_loss
from .language_adapters import NrccrLanguageAdapter
from .languages import NrccrLanguagesMixin
from .length_groups import length_groups, pad_right, pass_tokens, row_lengths, up_to_end_of_text
from .open_clip import folder_of
from .towers import NrccrTextTower, NrccrVisualTower, load_encoder
from .weights import EVERYWHERE, HUB_OPTIONS, PLACE_OPTIONS, load_weights, of_hub, place, split_options


VIEWS = ("source", "target", "back_translation")
END_OF_TEXT = ("clip_text_model", "metaclip_2_text_model")  # they look for that token, and want no mask
# what a call may say of the model's config; precision is an option of loading
SETTINGS = {*NrccrConfig.__dataclass_fields__, "attn_implementation"} - {"dtype"}


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


def own_fields(settings: dict) -> dict:
    """Of what a config says, the fields of [`NrccrConfig`] itself."""
    return {name: value for name, value in settings.items() if name in NrccrConfig.__dataclass_fields__}


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


class NrccrModel(NrccrLanguagesMixin, NrccrPreTrainedModel):
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

    @classmethod
    def from_pretrained(cls, name, *args, config: NrccrConfig | str | None = None, **options):
        """As of every model of transformers; a folder that cannot be right is refused first (`load_weights`)."""
        if name is None or options.get("state_dict") is not None or options.get("gguf_file"):
            return super().from_pretrained(name, *args, config=config, **options)
        settings = {key: options.pop(key) for key in list(options) if key in SETTINGS}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **of_hub(options), **settings)
        else:
            options |= settings
        return load_weights(super().from_pretrained, cls, name, *args, config=config, **options)

    @classmethod
    def from_encoders(cls, text_encoder: str, vision_encoder: str | None = None, **options) -> "NrccrModel":
        """Two pretrained encoders (hub ids or folders) and new heads.

        Args:
            options: Of loading, for both encoders (`token`, `dtype`, `device_map`, ...), and settings of
                [`NrccrConfig`]. Without `dtype` the model is in float32; "auto": as the encoders are stored.
        """
        loading, settings = split_options(options, SETTINGS, "from_encoders")
        files = of_hub(loading, (*HUB_OPTIONS, "variant", "dtype"))
        names = [text_encoder] + ([vision_encoder] if vision_encoder else [])
        configs = [read_encoder_config(name, **of_hub(loading)) for name in names]
        model = cls(NrccrConfig(text_config=configs[0], vision_config=(configs + [None])[1], **settings))
        towers = [model.text_tower] + ([model.visual_tower] if vision_encoder else [])
        read = [load_encoder(*parts, **files) for parts in zip(towers, names, configs)]
        return place(model.to(functools.reduce(torch.promote_types, read)), **of_hub(loading, PLACE_OPTIONS))

    @classmethod
    def from_dual_encoder(
        cls, name: str, text_encoder: str | None = None, revision: str | None = None, **options
    ) -> "NrccrModel":
        """A dual encoder that is aligned already (CLIP, SigLIP 2, ..., or a model of this class; a hub id or a folder
        of config and weights, or `open_clip:` and one in open_clip's files), to add languages to.

        Args:
            text_encoder: Hub id or folder of another text encoder, in the place of its own. The projection after it
                is new: the dual encoder's English text embeddings teach it.
            options: Of loading (`token`, `dtype`, `device_map`, ...), and settings of [`NrccrConfig`]. Without `dtype`
                the model is in float32; "auto": as `name` is stored.

        Raises:
            ValueError: for a model that is no dual encoder, or whose text side is of an unknown kind, and as
                `load_weights`.
        """
        loading, settings = split_options(options, SETTINGS, "from_dual_encoder")
        files = {"dtype": torch.float32} | of_hub(loading, (*HUB_OPTIONS, "variant", "dtype"))
        own = of_hub(loading, EVERYWHERE)
        revision = resolve_revision(
            folder_of(name), revision, **of_hub(own, ("token", "local_files_only", "cache_dir"))
        )
        files |= {"revision": revision} if revision else {}
        config = read_config(name, **of_hub(files))
        if config.model_type == cls.config_class.model_type:
            model = cls.from_pretrained(name, **files, **settings)
        else:
            dual = read_dual_encoder(name, config, **files)
            model = cls(NrccrConfig(**(dual_encoder_settings(config) | settings))).to(dual.dtype)
            load_dual_encoder(model, dual)
        model.config.dual_encoder = {"name": str(name), "revision": getattr(revision, "resolved", None)}
        if text_encoder is not None:
            model = model.with_new_text_side(text_encoder, **own)
        return place(model.eval(), **of_hub(loading, PLACE_OPTIONS))

    def with_new_text_side(self, text_encoder: str, **hub) -> "NrccrModel":
        """The same picture side, which it shares, beside another text encoder and a new projection after it."""
        settings = self.config.to_dict() | {
            "text_config": read_encoder_config(text_encoder, **hub),
            "vision_config": deepcopy(self.config.vision_config),  # see `with_new_heads`
            "text_feat_dim": None,
            "text_length": None,
            "text_head": "pooling",
            "text_pooling": "mean",
            "text_projection": "linear",
            "teacher_view": "source",
            "languages": None,
            "language": None,
            "source_text_side": None,
        }
        config = NrccrConfig(**own_fields(settings))
        towers = SimpleNamespace(text_tower=NrccrTextTower(config), visual_tower=self.visual_tower)
        load_encoder(towers.text_tower, text_encoder, settings["text_config"], **hub)
        model = type(self)(config, towers=towers).to(self.dtype)
        model.visual_head = self.visual_head
        model.visual_projection = self.visual_projection
        model.logit_scale, model.logit_bias = self.logit_scale, self.logit_bias
        return model.eval()

    def with_source_text_side(self, base: "NrccrModel") -> "NrccrModel":
        """Let the text side of `base`, which it shares, read the texts that are in no added language, bit for bit as
        it reads them there; this model's own reads the languages. Both are one model, of one index.

        Raises:
            ValueError: where the two embed into different spaces, or `base` has languages inside its text tower.
        """
        if base.config.projection_dim != self.config.projection_dim:
            raise ValueError(
                f"embeddings of width {base.config.projection_dim} and {self.config.projection_dim} are of two "
                "spaces: take the base that this text side was made for"
            )
        if inside := [language for language in base.language_adapters if base.has_lora(language)]:
            raise ValueError(f"the base has {', '.join(inside)} inside its text tower: remove_language first")
        settings = base.config.to_dict() | {
            "vision_config": None,
            "visual_feat_dim": None,
            "languages": None,
            "language": None,
            "dual_encoder": None,
            "source_text_side": None,
        }
        config = NrccrConfig(**own_fields(settings))
        side = type(self)(config, towers=SimpleNamespace(text_tower=base.text_tower)).to(base.dtype)
        side.text_head, side.text_projection = base.text_head, base.text_projection
        self.source_text_side, self.config.source_text_side = side.eval(), own_fields(config.to_dict())
        return self

    def language_side(self) -> "NrccrModel":
        """This model without its `source_text_side`, all else shared: what languages are trained in."""
        if self.source_text_side is None:
            return self
        # not a new model: that would draw the weights of LoRA again, in the tower that it shares
        side = self.unwrapped()
        side._modules, side.config = self._modules | {"source_text_side": None}, deepcopy(self.config)
        side.config.source_text_side = None
        return side

    def with_new_heads(self, **config_kwargs) -> "NrccrModel":
        """A model with new heads over the same towers, which it shares; `config_kwargs` as in [`NrccrConfig`]."""
        # copies: a new config resets the attention implementation of those that it is given; the towers keep theirs
        encoders = {name: deepcopy(getattr(self.config, name)) for name in ("text_config", "vision_config")}
        return type(self)(NrccrConfig(**encoders, **config_kwargs), towers=self)

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

    def encode_text(
        self,
        views: list[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]],
        languages: list[str | None],
    ) -> list[torch.Tensor]:
        """One pass of the text encoder for several views, each `(input_ids, attention_mask, boundary_states)` and each
        padded to its own length; returns the states of each, of shape `(batch_size, sequence_length, hidden_size)`.
        `languages`: of all rows of all views."""
        ids, masks, states = zip(*views)
        sizes = [mask.shape for mask in masks]
        longest = max(length for _, length in sizes)

        def stack(parts: tuple[torch.Tensor, ...], value: int = 0) -> torch.Tensor:
            padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
            return torch.cat([F.pad(part, pad, value=value) for part, pad in zip(parts, padding)])

        inputs = {}
        if states[0] is not None:
            inputs["boundary_states"] = stack(states)
        if ids[0] is not None:
            inputs["input_ids"] = stack(ids, self.pad_token_id)
        encoded = self.encode_by_language(inputs, stack(masks), languages)
        parts = encoded.split([batch for batch, _ in sizes])
        return [part[:, :length] for part, (_, length) in zip(parts, sizes)]

    def encode_by_language(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, languages: list[str | None]
    ) -> torch.Tensor:
        """[`encode_by_length`] once, or for the rows of each language that has LoRA inside the text tower."""
        inside = [language if self.has_lora(language) else None for language in languages]
        groups = {language: [i for i, of in enumerate(inside) if of == language] for language in dict.fromkeys(inside)}
        if len(groups) == 1:
            return self.encode_by_length(inputs, mask, inside[0])
        parts = []
        for language, rows in groups.items():
            at = torch.tensor(rows, device=mask.device)
            part = {name: value[at] for name, value in inputs.items()}
            parts.append(self.encode_by_length(part, mask[at], language))
        return torch.cat(parts)[torch.tensor(sum(groups.values(), [])).argsort()]

    def encode_by_length(
        self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, language: str | None
    ) -> torch.Tensor:
        """Run the text tower over rows of like length, of shape `(batch_size, sequence_length, hidden_size)`; what it
        gives for cut-off padding is 0. `language`: whose LoRA is in it."""
        # published: states of padding are pooled, so none is cut off; nothing is computed from the boundary at k = 0;
        # a graph that is exported has no look at its values
        whole = self.config.pool_padding or torch.compiler.is_compiling()
        whole = whole or ("boundary_states" in inputs and self.text_tower.num_trained_layers == 0)
        if whole:
            return self.run_tower(inputs, mask, language)
        lengths = row_lengths(mask)
        recompute = self.recompute_passes and torch.is_grad_enabled()
        groups = length_groups(lengths, max_tokens=pass_tokens(mask.device) if recompute else None)
        if len(groups) < 2:
            return self.run_tower(inputs, mask, language)
        parts = []
        for rows in groups:
            length = max(1, int(lengths[rows].max()))
            part = {name: value[rows, :length] for name, value in inputs.items()}
            states = self.run_tower(part, mask[rows, :length], language)
            parts.append(F.pad(states, (0, 0, 0, mask.shape[1] - length)))
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def run_tower(self, inputs: dict[str, torch.Tensor], mask: torch.Tensor, language: str | None) -> torch.Tensor:
        """One pass of the text tower; with `recompute_passes` its states alone are kept for the backward pass, which
        computes the rest again with the same dropout."""

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.lora(language), self.checkpointed_layers("boundary_states" in inputs, language):
                return self.text_tower(attention_mask=mask, **inputs)

        if self.recompute_passes and torch.is_grad_enabled():
            return checkpoint(run, inputs, use_reentrant=False)
        return run(inputs)

    @contextmanager
    def checkpointed_layers(self, resumed: bool, language: str | None) -> Iterator:
        """Keep of every `checkpoint_every`-th layer of the text tower its input alone: the backward pass computes the
        rest again, by this language's LoRA. (That of transformers would leave out layers that are frozen but for
        LoRA, and compute them again by whatever LoRA is in them then.) `resumed`: from the boundary."""
        layers, tower = [], self.text_tower
        if self.checkpoint_every and torch.is_grad_enabled():
            frozen = len(tower.layers()) - tower.num_trained_layers if resumed else 0
            layers = getattr(*tower.layer_list())[frozen :: self.checkpoint_every]

        def checkpointed(forward: Callable) -> Callable:
            def again(*args, **kwargs):
                with self.lora(language):
                    return forward(*args, **kwargs)

            return functools.partial(checkpoint, again, use_reentrant=False)

        for layer in layers:
            layer.forward = checkpointed(layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ):
        """As in transformers: trains in less memory, and computes each layer twice. Raises ValueError for an option
        that would have no effect on the text tower."""
        if gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}) or offload:
            given = (gradient_checkpointing_kwargs or {}) | {"offload": offload}
            raise ValueError(f"activation_checkpointing_kwargs {given}: every_n_layers alone has an effect here")
        self.checkpoint_every = every_n_layers
        tower = self.visual_tower
        if tower is not None and any(parameter.requires_grad for parameter in tower.parameters()):
            tower.encoder.activation_checkpointing_enable(every_n_layers=every_n_layers)

    def gradient_checkpointing_disable(self):
        """As in transformers."""
        self.checkpoint_every = 0

    def text_inputs(
        self, ids: torch.Tensor | None, mask: torch.Tensor | None, states: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return ids, mask and states as the text encoder reads them, each `(batch_size, sequence_length, ...)`:
        padded on the right, so that a text's positions are those that it has alone."""
        if ids is None and states is None:
            raise ValueError("texts are read from input_ids (or, of frozen layers, boundary_states): got neither")
        if mask is None:
            of = states if ids is None else ids
            mask = torch.ones(of.shape[:2], dtype=torch.long, device=of.device)
            if ids is not None and self.config.text_config.model_type in END_OF_TEXT:
                mask = up_to_end_of_text(ids, self.config.text_config.eos_token_id)
        if ids is not None and not self.config.pool_padding:
            ids, mask = pad_right(ids, mask)
        length = self.config.text_length
        if length is None or ids is None:
            return ids, mask, states
        if ids.shape[1] > length:
            raise ValueError(f"{ids.shape[1]} tokens, but this model reads {length} (NrccrConfig.text_length)")
        if missing := length - ids.shape[1]:
            padding = ids[mask == 0]  # of the tokenizer, whose config often says another
            ids = F.pad(ids, (0, missing), value=int(padding[0]) if len(padding) else self.pad_token_id)
        return ids, torch.ones_like(ids), states

    @property
    def pad_token_id(self) -> int:
        return getattr(self.config.text_config, "pad_token_id", None) or 0

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boundary_states: torch.Tensor | None = None,
        languages: str | Sequence[str | None] | None = None,
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` is the L2-normalised embedding, of shape `(batch_size, projection_dim)`. `languages`: whose
        adapter reads each text (None in a list: no adapter's); by default that of `set_language`."""
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
        """Of one view (see `encode_text`): its states, and what the head makes of them, `(batch_size, width)`, which
        adapters read."""
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
        """Pictures, videos or features, `(batch_size, num_frames, visual_feat_dim)`, with the mask of the frames;
        `pooler_output` is the L2-normalised embedding, of shape `(batch_size, projection_dim)`. `image_embeds`: such
        embeddings, as an index has them; they are L2-normalised."""
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
        """Embeddings by view and the teacher's. The order source, target, teacher, back-translation is that of the
        released code: it decides the running statistics of a BatchNorm."""
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
        """What the head reads in each view, and with `cross` the teacher, of shape `(batch_size, width)`."""
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

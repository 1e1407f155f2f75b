"""How a `NrccrModel` is put together: from a folder, from encoders, from a dual encoder, and from parts of others."""

import functools
from copy import deepcopy
from types import SimpleNamespace
from typing import Self

import torch
from transformers import PreTrainedConfig
from transformers.utils.hub import resolve_revision

from .configuration_nrccr import NrccrConfig
from .dual_encoders import (
    dual_encoder_settings,
    load_dual_encoder,
    read_config,
    read_dual_encoder,
    read_encoder_config,
)
from .open_clip import folder_of
from .towers import NrccrTextTower, load_encoder
from .weights import EVERYWHERE, HUB_OPTIONS, PLACE_OPTIONS, load_weights, of_hub, place, split_options


# what a call may say of the model's config; precision is an option of loading
SETTINGS = {*NrccrConfig.__dataclass_fields__, "attn_implementation"} - {"dtype"}


def own_fields(settings: dict) -> dict:
    """Return the fields of [`NrccrConfig`] itself out of what a config says."""
    return {name: value for name, value in settings.items() if name in NrccrConfig.__dataclass_fields__}


class NrccrAssemblyMixin:
    """The ways to make a `NrccrModel` other than by its config. Towers and heads of others are shared, not copied."""

    @classmethod
    def from_pretrained(cls, name, *args, config: NrccrConfig | str | None = None, **options):
        """Load as every model of transformers; a folder that cannot be right is refused first (`load_weights`)."""
        if name is None or options.get("state_dict") is not None or options.get("gguf_file"):
            return super().from_pretrained(name, *args, config=config, **options)
        settings = {key: options.pop(key) for key in list(options) if key in SETTINGS}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **of_hub(options), **settings)
        else:
            options |= settings
        return load_weights(super().from_pretrained, cls, name, *args, config=config, **options)

    @classmethod
    def from_encoders(cls, text_encoder: str, vision_encoder: str | None = None, **options) -> Self:
        """Build a model of two pretrained encoders (hub ids or folders) and new heads.

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
    ) -> Self:
        """Load a dual encoder that is aligned already (CLIP, SigLIP 2, ..., or a model of this class; a hub id or a
        folder of config and weights, or `open_clip:` and one in open_clip's files), to add languages to.

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

    def with_new_text_side(self, text_encoder: str, **hub) -> Self:
        """Return the same picture side, which it shares, beside another text encoder and a new projection after it."""
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

    def with_source_text_side(self, base: Self) -> Self:
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

    def language_side(self) -> Self:
        """Return this model without its `source_text_side`, all else shared: what languages are trained in."""
        if self.source_text_side is None:
            return self
        # not a new model: that would draw the weights of LoRA again, in the tower that it shares
        side = self.unwrapped()
        side._modules, side.config = self._modules | {"source_text_side": None}, deepcopy(self.config)
        side.config.source_text_side = None
        return side

    def with_new_heads(self, **config_kwargs) -> Self:
        """Return a model with new heads over the same towers, which it shares; `config_kwargs` as in
        [`NrccrConfig`]."""
        # copies: a new config resets the attention implementation of those that it is given; the towers keep theirs
        encoders = {name: deepcopy(getattr(self.config, name)) for name in ("text_config", "vision_config")}
        return type(self)(NrccrConfig(**encoders, **config_kwargs), towers=self)

"""NRCCR: pictures or videos and sentences of any language in one space (Wang et al. 2022, arXiv 2208.12526).

The model turns inputs into embeddings and nothing else: losses are in `losses.py`, training is in `trainer.py`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    CLIPVisionModelWithProjection,
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
from .language_adapters import NrccrLanguageAdapter
from .languages import NrccrLanguagesMixin
from .length_groups import length_groups, pad_right, pass_pictures, pass_tokens, row_lengths, up_to_end_of_text
from .loading import EVERYWHERE, HUB_OPTIONS, PLACE_OPTIONS, load_weights, of_hub, place, split_options
from .modeling_efficientnet_lite import EfficientNetLiteModel
from .open_clip import folder_of


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


# --------------------------------------------------------------------------------------------------------- heads


def clip_loss(logits: torch.Tensor, mean: Callable[[torch.Tensor], torch.Tensor] = torch.mean) -> torch.Tensor:
    """Symmetric cross-entropy of a square matrix of logits, positives on the diagonal (CLIP, arXiv 2103.00020).
    `mean`: of the values of all pairs, `(batch_size,)`."""
    labels = torch.arange(len(logits), device=logits.device)
    return sum(mean(F.cross_entropy(matrix, labels, reduction="none")) for matrix in (logits, logits.t())) / 2


def pool(states: torch.Tensor, mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """`(batch_size, length, width)` and its mask `(batch_size, length)` -> `(batch_size, width)`; no mask: all."""
    if how == "first":  # texts are padded on the right
        return states[:, 0]
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    if how == "last":
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
    mask = mask.unsqueeze(-1).to(states.dtype)
    if how == "max":
        return states.masked_fill(mask == 0, torch.finfo(states.dtype).min).amax(1)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)  # of a row that is all padding: 0


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in their order, `(world_size * batch_size, ...)`, with gradient."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


class GatheredBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the whole batch of all processes (`torch.nn.SyncBatchNorm` refuses CPU tensors)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            return super().forward(hidden_states)
        rank, size = torch.distributed.get_rank(), len(hidden_states)
        return super().forward(gather_rows(hidden_states))[rank * size : (rank + 1) * size]


class NrccrProjection(nn.Module):
    """Linear, optional BatchNorm, dropout, L2 norm: into the common space (paper, section 3.1)."""

    def __init__(self, input_size: int, config: NrccrConfig, kind: str = "linear"):
        super().__init__()
        self.dense = nn.Linear(input_size, config.projection_dim) if kind == "linear" else None
        self.norm = GatheredBatchNorm1d(config.projection_dim) if config.projection_norm == "batch_norm" else None
        self.dropout = nn.Dropout(config.projection_dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = features if self.dense is None else self.dense(features)
        if self.norm is not None:
            if self.training and len(projected) < 2:
                raise ValueError("a training batch of one has no BatchNorm statistics: use at least 2 rows a batch")
            projected = self.norm(projected)
        return F.normalize(self.dropout(projected), dim=-1)


class NrccrAttention(nn.Module):
    """The attention block that all views share: multi-head attention, Linear, dropout, LayerNorm (paper, eq. 1-3)."""

    def __init__(self, hidden_size: int, num_heads: int, config: NrccrConfig):
        super().__init__()
        self.num_heads = num_heads
        width = config.key_query_size if config.attention_score_scale == "head" else hidden_size
        self.scale = (width / num_heads) ** -0.5
        self.pool_padding = config.pool_padding
        self.query = nn.Linear(hidden_size, config.key_query_size)
        self.key = nn.Linear(hidden_size, config.key_query_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def attention_mask(self, query_mask: torch.Tensor, key_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Boolean over keys; published: a bias, the same for every key where the query row is padding."""
        if not self.pool_padding:
            return key_mask[:, None, None, :].bool()
        return (1 - query_mask[:, None, :, None].to(dtype) * key_mask[:, None, None, :].to(dtype)) * -10000.0

    def context(
        self, queries: torch.Tensor, query_mask: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor
    ) -> torch.Tensor:
        """`(batch_size, query_length, hidden_size)`: what each query row reads from the keys' states."""
        heads = [
            layer(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, queries), (self.key, keys), (self.value, keys))
        ]
        mask = self.attention_mask(query_mask, key_mask, queries.dtype)
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale).transpose(1, 2).flatten(2)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Self-attention with a residual, `(batch_size, length, hidden_size)` to the same shape."""
        return self.layer_norm(self.dropout(self.dense(self.context(states, mask, states, mask))) + states)

    def cross(
        self, queries: torch.Tensor, query_mask: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor
    ) -> torch.Tensor:
        """From one view to another, without the residual, of shape `(batch_size, query_length, hidden_size)`."""
        return self.layer_norm(self.dropout(self.dense(self.context(queries, query_mask, keys, key_mask))))


class NrccrAttentionHead(nn.Module):
    """Linear and ReLU, learned positions, one attention block, pooling: for words and for frames alike."""

    def __init__(
        self, input_size: int, hidden_size: int, num_heads: int, max_positions: int, pooling: str, config: NrccrConfig
    ):
        super().__init__()
        self.pooling, self.pool_padding = pooling, config.pool_padding
        self.output_size = hidden_size
        self.input_norm = nn.LayerNorm(input_size)
        self.input_dense = nn.Linear(input_size, hidden_size)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.position_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.attention = NrccrAttention(hidden_size, num_heads, config)

    def embed(self, states: torch.Tensor) -> torch.Tensor:
        """Encoder states with positions, `(batch_size, length, input_size)` -> `(batch_size, length, hidden_size)`."""
        length, limit = states.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise ValueError(f"{length} positions, but this head has {limit}: truncate the input to {limit}")
        hidden = F.relu(self.input_dense(self.dropout(self.input_norm(states))))
        positions = self.position_embeddings(torch.arange(length, device=states.device))
        return self.dropout(self.position_norm(hidden + positions))

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return pool(hidden, None if self.pool_padding else mask, self.pooling)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.read(self.embed(states), mask)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Self-attention and pooling of what `embed` returned, of shape `(batch_size, hidden_size)`."""
        return self.pool(self.attention(hidden, mask), mask)

    def cross(
        self, source: torch.Tensor, source_mask: torch.Tensor, target: torch.Tensor, target_mask: torch.Tensor
    ) -> torch.Tensor:
        """The teacher (paper, section 3.3): source words attend to the target's; pooled beside the target's states."""
        read = self.attention.cross(source, source_mask, target, target_mask)
        return self.pool(torch.cat([read, target], 1), torch.cat([source_mask, target_mask], 1))


class NrccrPoolingHead(nn.Module):
    """Pooling over tokens or frames; with `dense=True` a Linear after it, and a ReLU (published for pictures)."""

    def __init__(
        self, input_size: int, pooling: str, dropout: float, config: NrccrConfig, dense: bool, relu: bool = True
    ):
        super().__init__()
        self.pooling, self.pool_padding = pooling, config.pool_padding
        self.output_size = input_size
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(input_size, input_size) if dense else None
        self.relu = relu

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled = self.dropout(pool(states, None if self.pool_padding else mask, self.pooling))
        if self.dense is None:
            return pooled
        return F.relu(self.dense(pooled)) if self.relu else self.dense(pooled)


# -------------------------------------------------------------------------------------------------------- towers


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build what `AutoModel` builds, of an encoder-decoder its encoder; also the towers of dual encoders that it does
    not know, such as `SiglipTextModel`."""
    # one precision for the whole model, whatever a config remembers of the file that it came from
    dtype = torch.get_default_dtype()
    if type(config) in MODEL_MAPPING:
        model = AutoModel.from_config(config, dtype=dtype)
        # of parts, not of config.is_encoder_decoder, which is False where an encoder was saved alone (T5EncoderModel)
        both = all(isinstance(getattr(model, part, None), PreTrainedModel) for part in ("encoder", "decoder"))
        return model.get_encoder() if both else model
    return getattr(transformers, type(config).__name__.replace("Config", "Model"))._from_config(config, dtype=dtype)


def own_fields(settings: dict) -> dict:
    """Of what a config says, the fields of [`NrccrConfig`] itself."""
    return {name: value for name, value in settings.items() if name in NrccrConfig.__dataclass_fields__}


class Reached(Exception):
    """A boundary, by a pass that ends there."""


class NrccrTextTower(nn.Module):
    """Any `AutoModel` text encoder. Its lower layers may be frozen, and their output computed once and reused.

    `num_trained_layers = k` puts the boundary below the top k layers (None: everything is trained, no boundary;
    0: the whole encoder is frozen, the boundary is its output).
    """

    def __init__(self, config: NrccrConfig):
        super().__init__()
        self.encoder = build_encoder(config.text_config)
        if isinstance(getattr(self.encoder, "pooler", None), nn.Module):
            self.encoder.pooler = None  # never read: heads start from the states of all tokens
        if isinstance(getattr(self.encoder, "head", None), nn.Linear):
            self.encoder.head = nn.Identity()  # of SigLIP, after pooling: it is the model's projection
        self.num_trained_layers: int | None = None
        self.given_beside: int | None = None  # how much a layer gives beside states; -1: no tuple; see `resume`

    def layer_list(self) -> tuple[nn.Module, str]:
        """The parent and the attribute name of the encoder's list of layers."""
        depth = self.encoder.config.num_hidden_layers
        for parent in self.encoder.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == depth:
                    return parent, name
        raise ValueError(
            f"no list of {depth} layers found in {type(self.encoder).__name__}: cannot freeze a part of it"
        )

    def freeze_below(self, num_trained_layers: int | None):
        """Trains the top `num_trained_layers` layers (and what follows them); embeddings train only with None."""
        self.num_trained_layers = num_trained_layers
        self.encoder.requires_grad_(num_trained_layers is None)
        if not num_trained_layers:
            return
        parent, name = self.layer_list()
        layers = getattr(parent, name)
        if num_trained_layers > len(layers):
            raise ValueError(
                f"trained_text_layers={num_trained_layers}, but the text encoder has {len(layers)} layers"
            )
        for layer in layers[len(layers) - num_trained_layers :]:
            layer.requires_grad_(True)
        for final_norm in ("final_layer_norm", "norm", "final_norm"):  # of pre-norm encoders
            if isinstance(module := getattr(parent, final_norm, None), nn.Module):
                module.requires_grad_(True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boundary_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the states of all tokens, `(batch_size, sequence_length, hidden_size)`, from ids, or from those at
        the boundary and the ids that they were computed of (some encoders read them in every layer)."""
        if boundary_states is None:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.num_trained_layers == 0:
            return boundary_states
        return self.resume(boundary_states, input_ids, attention_mask)

    def at_boundary(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return what the first trained layer reads, of shape `(batch_size, sequence_length, hidden_size)`."""
        if self.num_trained_layers == 0:
            return self(input_ids, attention_mask)
        states, _ = self.stop_before(self.layers()[-self.num_trained_layers], input_ids, attention_mask)
        return states[:, : input_ids.shape[1]]  # Longformer pads to whole windows

    def layers(self) -> nn.ModuleList:
        """Return the encoder's layers. Raises ValueError where nothing of it is frozen."""
        if self.num_trained_layers is None:
            raise ValueError("nothing of the text encoder is frozen: set the number of trained layers first")
        return getattr(*self.layer_list())

    @torch.no_grad()
    def stop_before(self, layer: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple:
        """Return what `layer` reads, and what the layer before it gave; nothing above is computed."""
        given = []

        def stop(_, args, kwargs):
            raise Reached(args[0] if args else kwargs["hidden_states"])

        handles = [layer.register_forward_pre_hook(stop, with_kwargs=True)]
        keep = lambda _, args, output: given.append(output)  # noqa: E731
        handles += [below.register_forward_hook(keep) for below in self.layers()]
        try:
            self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        except Reached as reached:
            return reached.args[0], given[-1] if given else None
        finally:
            for handle in handles:
                handle.remove()

    def resume(
        self, boundary_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the states of all tokens, from those at the boundary."""
        # The encoder's own forward runs, so that its masks, positions, final norm, and what it does by the number of a
        # layer, are its own. Frozen layers hand on what they read, and the first trained one reads the boundary.
        if input_ids is None:
            raise ValueError("boundary_states below trained layers need the input_ids that they were computed of")

        def replace(_, args, kwargs):
            longer = (args[0] if args else kwargs["hidden_states"]).shape[1] - boundary_states.shape[1]
            states = F.pad(boundary_states, (0, 0, 0, longer))
            return ((states, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": states})

        layers = self.layers()
        frozen = layers[: -self.num_trained_layers]
        if frozen and self.given_beside is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=input_ids.device)
            given = self.stop_before(layers[len(frozen)], ids, torch.ones_like(ids))[1]
            self.given_beside = len(given) - 1 if isinstance(given, tuple) else -1

        def hand_on(hidden_states, *args, **kwargs):
            return hidden_states if self.given_beside < 0 else (hidden_states, *[None] * self.given_beside)

        handle = layers[len(frozen)].register_forward_pre_hook(replace, with_kwargs=True)
        for layer in frozen:
            layer.forward = hand_on
        try:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        finally:
            handle.remove()
            for layer in frozen:
                del layer.forward


class NrccrVisualTower(nn.Module):
    """Any `AutoModel` vision tower: pictures to one feature each, as the first (and only) frame."""

    def __init__(self, config: NrccrConfig):
        super().__init__()
        vision_config, self.output = config.vision_config, config.visual_encoder_output
        if self.output == "projected":
            self.encoder = CLIPVisionModelWithProjection._from_config(vision_config, dtype=torch.get_default_dtype())
        elif vision_config.model_type == "efficientnet_lite":
            # built directly: the Hub loads config and model code as two modules, so AutoModel's class check fails
            self.encoder = EfficientNetLiteModel(vision_config)
        else:
            self.encoder = build_encoder(vision_config)
        self.patch_size = vision_config.patch_size if vision_config.model_type == "siglip2_vision_model" else None

    def cut(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures as the towers of SigLIP 2 that keep the aspect ratio (NaFlex) read them: a row for each patch."""
        grid = pixel_values.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([(grid.shape[2], grid.shape[4])] * len(patches), device=patches.device)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            "spatial_shapes": shapes,
        }

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(batch_size, num_channels, height, width)` -> `(batch_size, 1, visual_feat_dim)`; videos have a frame axis.
        What the image processor of a NaFlex tower gives is taken too."""
        frames = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
        frames = frames.to(self.encoder.dtype)  # processors give float32, whatever the model was loaded as
        inputs = {"pixel_values": frames}
        if spatial_shapes is not None:
            inputs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        elif self.patch_size is not None:
            inputs = self.cut(frames)
        whole = self.training or torch.is_grad_enabled()  # BatchNorm reads the batch; a graph keeps all of it anyway
        if whole or (size := pass_pictures(frames)) is None:
            features = self.features(**inputs)
        else:
            parts = zip(*(value.split(size) for value in inputs.values()))
            features = torch.cat([self.features(**dict(zip(inputs, part))) for part in parts])
        return features.unflatten(0, (len(pixel_values), -1))

    def features(self, **inputs) -> torch.Tensor:
        """Of one pass, `(num_pictures, visual_feat_dim)`."""
        outputs = self.encoder(**inputs)
        if self.output == "projected":
            return outputs.image_embeds
        if self.output != "pooled":
            how = "first" if self.output == "cls" else "mean"
            return pool(outputs.last_hidden_state, inputs.get("pixel_attention_mask"), how)
        if outputs.pooler_output is None:
            raise ValueError(
                f"{type(self.encoder).__name__} gives no pooled output: set visual_encoder_output to 'cls' or 'mean'"
            )
        return outputs.pooler_output


def load_encoder(
    tower: NrccrTextTower | NrccrVisualTower,
    folder: str,
    config: PreTrainedConfig,
    dtype: str | torch.dtype = torch.float32,
    **hub,
) -> torch.dtype:
    """Read pretrained weights, of a hub id or a folder and its `config`, into a tower; returns the precision that they
    were read in (`dtype`; "auto": as they are stored). Raises ValueError as `load_weights`."""
    # by the tower's own class: AutoModel reads a dual encoder as both of its towers, and without projection
    encoder, options = type(tower.encoder), {"dtype": dtype} | hub
    whole = isinstance(tower, NrccrTextTower) and encoder is not (
        of_config := MODEL_MAPPING.get(type(config), encoder)
    )
    if whole:  # an encoder-decoder
        encoder = of_config
        options["may_lack"] = ("decoder.",)  # of folders with the encoder alone
    elif isinstance(tower, NrccrTextTower) and "add_pooling_layer" in signature(encoder).parameters:
        options["add_pooling_layer"] = False
    config = deepcopy(config if whole else tower.encoder.config)
    config.dtype = None  # it is that of the tower, not of the file
    loaded = load_weights(encoder.from_pretrained, encoder, folder, config=config, **options)
    loaded = loaded.get_encoder() if whole else loaded
    tower.encoder.load_state_dict(loaded.state_dict())
    return loaded.dtype


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
                width, config.text_hidden_size or width, config.text_num_attention_heads,
                config.max_text_positions, config.text_pooling, config,
            )  # fmt: skip
        else:
            dense = config.text_head == "linear"
            self.text_head = NrccrPoolingHead(width, config.text_pooling, config.text_dropout, config, dense, False)
        width = config.visual_feat_dim
        if width is None:
            self.visual_head = None
        elif config.visual_head == "attention":
            self.visual_head = NrccrAttentionHead(
                width, config.visual_hidden_size or width, config.visual_num_attention_heads,
                config.max_visual_positions, config.visual_pooling, config,
            )  # fmt: skip
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
            "text_feat_dim": None, "text_length": None, "text_head": "pooling", "text_pooling": "mean",
            "text_projection": "linear", "teacher_view": "source", "languages": None, "language": None,
            "source_text_side": None,
        }  # fmt: skip
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
            "vision_config": None, "visual_feat_dim": None, "languages": None, "language": None, "dual_encoder": None,
            "source_text_side": None,
        }  # fmt: skip
        config = NrccrConfig(**own_fields(settings))
        side = type(self)(config, towers=SimpleNamespace(text_tower=base.text_tower)).to(base.dtype)
        side.text_head, side.text_projection = base.text_head, base.text_projection
        self.source_text_side, self.config.source_text_side = side.eval(), own_fields(config.to_dict())
        return self

    def language_side(self) -> "NrccrModel":
        """This model without its `source_text_side`, all else shared: what languages are trained in."""
        if self.source_text_side is None:
            return self
        side = copy(self)  # not a new model: that would draw the weights of LoRA again, in the tower that it shares
        side._modules, side.config = self._modules | {"source_text_side": None}, deepcopy(self.config)
        side.config.source_text_side = None
        for name in ("forward", "_original_forward"):  # accelerate's, bound to the model that was trained before
            side.__dict__.pop(name, None)
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
        frozen = [] if frozen_dropout else [
            module for tower in towers for module in tower.modules()
            if (parameters := list(module.parameters())) and not any(p.requires_grad for p in parameters)
        ]  # fmt: skip
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
                back_translation_input_ids, back_translation_attention_mask, back_translation_boundary_states,
            ),
        }  # fmt: skip
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
                pixel_values, visual_feats, visual_attention_mask, pixel_attention_mask, spatial_shapes, image_embeds,
                return_dict=True,
            ).pooler_output  # fmt: skip
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

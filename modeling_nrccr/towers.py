"""Text encoders and vision towers of any family, frozen below a boundary where that is wanted."""

from copy import deepcopy
from inspect import signature

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_nrccr import NrccrConfig
from .heads import pool
from .length_groups import pass_pictures
from .modeling_efficientnet_lite import EfficientNetLiteModel
from .weights import load_weights


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
        """Return the parent and the attribute name of the encoder's list of layers. Raises ValueError where there is
        none."""
        depth = self.encoder.config.num_hidden_layers
        for parent in self.encoder.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == depth:
                    return parent, name
        raise ValueError(
            f"no list of {depth} layers found in {type(self.encoder).__name__}: cannot freeze a part of it"
        )

    def freeze_below(self, num_trained_layers: int | None):
        """Trains the top `num_trained_layers` layers (and what follows them); embeddings train only with None. Raises
        ValueError for more layers than there are."""
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
        """Return the states of all tokens, from those at the boundary. Raises ValueError without `input_ids`."""
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
        """Cut pictures as the towers of SigLIP 2 that keep the aspect ratio (NaFlex) read them: into a row for each
        patch."""
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
        """Map `(batch_size, num_channels, height, width)` to `(batch_size, 1, visual_feat_dim)`; videos have a frame
        axis. What the image processor of a NaFlex tower gives is taken too."""
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
        """Return the features of one pass, `(num_pictures, visual_feat_dim)`. Raises ValueError where a pooled output
        is wanted and the encoder has none."""
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

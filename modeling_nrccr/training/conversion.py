"""Checkpoints of the released implementation (arXiv 2208.12526, commit 5628a90) -> this package.

A released checkpoint is a list of five state dicts (visual encoder, text encoder, visual projection, text projection,
discriminator), its training options, and the text encoder's config.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from ..configuration_nrccr import NrccrConfig
from ..modeling_nrccr import NrccrModel
from .adversary import LanguageDiscriminator
from .losses import MEASURES, NrccrLoss


PARTS = ("visual encoder", "text encoder", "visual projection", "text projection", "discriminator")

# prefix here: prefix there, by part; the first that fits counts
HEAD = {
    "input_norm.": "input_proj_layer.LayerNorm.",
    "input_dense.": "input_proj_layer.net.1.",
    "position_embeddings.": "pos_embed_layer.position_embeddings.",
    "position_norm.": "pos_embed_layer.LayerNorm.",
    "attention.dense.": "encoder_layer.output.dense.",
    "attention.layer_norm.": "encoder_layer.output.LayerNorm.",
    "attention.": "encoder_layer.self.",
}
PREFIXES = {
    "visual encoder": {"visual_head.dense.": "proj."} | {f"visual_head.{ours}": old for ours, old in HEAD.items()},
    "text encoder": {"text_tower.encoder.": "text_bert.text_bert."}
    | {f"text_head.{ours}": old for ours, old in HEAD.items()},
    "visual projection": {"visual_projection.dense.": "mapping.fc1.", "visual_projection.norm.": "mapping.bn_1."},
    "text projection": {"text_projection.dense.": "mapping.fc1.", "text_projection.norm.": "mapping.bn_1."},
    "discriminator": {"classify.": "model.", "convolve.": "convolve."},
}
WRAPPERS = re.compile(r"^((module|AdvAgent|discriminator)\.)+")
# BERT's pooler is read by nothing, there or here; position_ids is a constant that old transformers versions saved
UNREAD = re.compile(r"text_bert\.text_bert\.(pooler\..*|embeddings\.position_ids)")

POSITIONS = "pos_embed_layer.position_embeddings.weight"
OPTIONS = (
    "model_type",
    "visual_feat_dim",
    "visual_mapping_layers",
    "text_mapping_layers",
    "text_hidden_size",
    "text_num_attention",
    "text_pooling",
    "dropout",
    "loss_fun",
    "margin",
    "measure",
    "max_violation",
    "cost_style",
    "direction",
    "tri_alpha",
    "dtl_beta",
    "l1_gama",
    "back_w",
    "scale",
)
VIDEO_OPTIONS = ("video_hidden_size", "video_num_attention", "video_pooling")
KNOWN_VALUES = {
    "model_type": ("img", "video"),
    "text_pooling": ("mean", "max"),
    "video_pooling": ("mean", "max"),
    "loss_fun": ("mrl",),
    "cost_style": ("sum", "mean"),
    "direction": ("all", "t2v", "v2t"),
    "measure": MEASURES,
    "text_layer": (1,),
    "video_layer": (1,),
}


def convert_original_checkpoint(
    state_dicts: Sequence[Mapping[str, torch.Tensor] | None], options: Mapping, text_config: Mapping
) -> tuple[NrccrModel, LanguageDiscriminator | None, NrccrLoss]:
    """Return the model with its published behaviour in `model.config`, its discriminator and its loss.

    Args:
        state_dicts: Of the five parts, in the order of `PARTS`, names with or without `module.`; the discriminator
            may be left out. The text encoder's pooler is dropped: nothing reads it.
        options: The training options, and `key_query_size` where it is not 512. `disc_type` may be absent: the tensors
            tell.
        text_config: The text encoder's config as a dict (BERT where it names no `model_type`).

    Raises ValueError for an option that is missing or of no use here, and names each missing, extra or wrong-shaped
    tensor. The encoder layers of `options["layer_list"]` train; [`NrccrTrainer`] sets this anew, by their number.
    """
    if len(state_dicts) not in (4, 5):
        raise ValueError(f"{len(state_dicts)} state dicts: give those of {', '.join(PARTS)} (the last may be absent)")
    parts = {part: unwrap(tensors) for part, tensors in zip(PARTS, state_dicts) if tensors or part != PARTS[-1]}
    model = NrccrModel(convert_options(options, text_config, parts))
    load(model, {part: parts[part] for part in PARTS[:4]})
    discriminator = None
    if tensors := parts.get("discriminator"):
        kind = options.get("disc_type") or discriminator_kind(tensors)
        discriminator = LanguageDiscriminator(model.config.text_config.hidden_size, kind, pool_padding=True).eval()
        load(discriminator, {"discriminator": tensors})
    train_layers(model, options.get("layer_list"))
    return model.eval(), discriminator, convert_loss(options)


def check_options(options: Mapping):
    video = options.get("model_type") == "video"
    if missing := [name for name in OPTIONS + VIDEO_OPTIONS * video if name not in options]:
        raise ValueError(f"options lack {', '.join(missing)}")
    for name, values in KNOWN_VALUES.items():
        if (video or not name.startswith("video_")) and options.get(name, values[0]) not in values:
            raise ValueError(f"option {name}={options[name]!r}: can only convert {' or '.join(map(repr, values))}")
    for name in ("visual_mapping_layers", "text_mapping_layers"):
        if len(options[name]) != 2:
            raise ValueError(f"option {name}={options[name]!r}: a projection has one layer, so two widths")


def convert_options(options: Mapping, text_config: Mapping, parts: Mapping[str, Mapping]) -> NrccrConfig:
    """Return the architecture that the options describe, with the published behaviour; only the numbers of positions,
    which no option gives, come from the tensors of `parts`."""
    check_options(options)
    positions = {
        name: len(parts[part][POSITIONS])
        for name, part in (("max_visual_positions", PARTS[0]), ("max_text_positions", PARTS[1]))
        if POSITIONS in parts[part]
    }
    video = options["model_type"] == "video"
    visual = (
        dict(
            visual_hidden_size=options["video_hidden_size"],
            visual_num_attention_heads=options["video_num_attention"],
            visual_pooling=options["video_pooling"],
        )
        if video
        else {}
    )
    return NrccrConfig(
        text_config=dict(text_config),
        visual_feat_dim=options["visual_feat_dim"],
        projection_dim=options["text_mapping_layers"][1],
        visual_head="attention" if video else "linear",
        text_pooling=options["text_pooling"],
        text_hidden_size=options["text_hidden_size"],
        text_num_attention_heads=options["text_num_attention"],
        key_query_size=options.get("key_query_size", 512),  # a constant of the released code
        projection_dropout=float(options["dropout"]),
        head_dropout=0.1,
        attention_score_scale="hidden",
        pool_padding=True,
        projection_norm="batch_norm",
        teacher_view="cross",
        **visual,
        **positions,
    )


def convert_loss(options: Mapping) -> NrccrLoss:
    """Return the published loss with the weights, the margin and the kind of hinge that the options give."""
    return NrccrLoss.published(
        losses={
            "triplet": 1.0,
            "target_triplet": options["tri_alpha"],
            "distillation": options["dtl_beta"],
            "feature_distillation": options["l1_gama"],
            "back_translation": options["back_w"],
            "adversarial": options["scale"],
        },
        margin=options["margin"],
        hardest_negatives=options["max_violation"],
        triplet_reduction=options["cost_style"],
        triplet_direction=options["direction"],
        triplet_measure=options["measure"],
    )


def train_layers(model: NrccrModel, names: Sequence[str] | None):
    """Trains the text encoder's layers with these names ("layer.<number>"), and freezes the rest of it."""
    if names is None:
        return
    parent, name = model.text_tower.layer_list()
    layers = getattr(parent, name)
    found = [re.fullmatch(r"(?:.*\.)?layer\.(\d+)\.?", name) for name in names if "pooler" not in name]
    numbers = [int(match[1]) if match else len(layers) for match in found]
    if numbers and max(numbers) >= len(layers):
        raise ValueError(f"option layer_list={list(names)!r}: the text encoder has layer.0 to layer.{len(layers) - 1}")
    model.set_trained_layers(len(layers) - min(numbers, default=len(layers)), frozen_dropout=True)
    for number, layer in enumerate(layers):
        layer.requires_grad_(number in numbers)


def discriminator_kind(tensors: Mapping[str, torch.Tensor]) -> str:
    return "strong" if "convolve.0.weight" in tensors else "weak" if "model.weight" in tensors else "not-so-weak"


def unwrap(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a part that are read, by their bare names."""
    bare = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in bare.items() if not UNREAD.fullmatch(name)}


def released_names(part: str, module: torch.nn.Module) -> dict[str, str]:
    """Return our name of each tensor of a part, by its name there."""
    names = {}
    for name in module.state_dict():
        if ours := next((prefix for prefix in PREFIXES[part] if name.startswith(prefix)), None):
            names[PREFIXES[part][ours] + name.removeprefix(ours)] = name
    return names


def load(module: torch.nn.Module, parts: Mapping[str, Mapping[str, torch.Tensor]]):
    """Loads every part; what the released model lacks (`logit_scale`) keeps its initial value. Raises ValueError for
    tensors that do not fit the options."""
    weights, faults = module.state_dict(), []
    for part, tensors in parts.items():
        names = released_names(part, module)
        faults += [f"{part} lacks {name}" for name in names if name not in tensors]
        for name, tensor in tensors.items():
            if name not in names:
                faults.append(f"{part} has an extra {name}")
            elif tensor.shape != weights[names[name]].shape:
                expected = tuple(weights[names[name]].shape)
                faults.append(f"{name} of the {part} has shape {tuple(tensor.shape)}, not {expected}")
            else:
                weights[names[name]] = tensor
    if faults:
        raise ValueError("these tensors do not fit the options: " + "; ".join(faults))
    module.load_state_dict(weights)

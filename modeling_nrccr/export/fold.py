"""Folds the active language into plain weights: LoRA into the text encoder, the adapter into the affine maps before
and after the pooled state. What is left is of a class that knows nothing of languages."""

from operator import attrgetter

import torch
from torch import nn
from transformers import PreTrainedModel

from ..dual_encoders import family_of, read_config, read_dual_encoder
from ..heads import NrccrPoolingHead
from ..modeling_nrccr import NrccrModel


AFFINE = ("linear", "lora", "none")  # kinds of adapter that are an affine map of the pooled state
# what is applied last before the projection, of families whose projection has no bias
LAST_AFFINE = {
    "clip": "text_model.final_layer_norm",
    "metaclip_2": "text_model.final_layer_norm",
    "altclip": "text_model.transformation",
}
WORST_CONDITION = 1e6  # of a matrix that is inverted: float32 has seven digits
Affine = tuple[torch.Tensor, torch.Tensor]  # a matrix and a constant, in float64


def adapter_map(model: NrccrModel) -> Affine:
    """
    Return what the active language's adapter makes of a pooled state, of shapes `(width, width)` and `(width,)`.

    Raises:
        ValueError: for a kind that is no affine map.
    """
    width = model.text_head.output_size
    matrix, constant = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    if model.language is None:
        return matrix, constant
    adapter = model.adapter(model.language)
    if adapter.kind not in AFFINE:
        raise ValueError(
            f"the adapter of {model.language} is of the kind {adapter.kind!r}, which cannot be folded into a model of "
            f"others: that can {', '.join(AFFINE)}. Take --to onnx, or add the language again with one of these"
        )
    if adapter.update is not None:
        matrix, constant = matrix + adapter.update.weight.double(), adapter.update.bias.double()
    return matrix, constant + matrix @ adapter.shift.double()


def text_weights(model: NrccrModel) -> dict[str, torch.Tensor]:
    """Return the text encoder's weights, by its own names, with the active language's LoRA merged into them."""
    encoder, layers = model.text_tower.encoder, set(model.lora_layers())
    inside = [f"{name}.lora_" for name, module in encoder.named_modules() if module in layers]
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in encoder.state_dict().items()
        if not name.startswith(tuple(inside))
    }
    if model.has_lora(model.language):
        for name, module in encoder.named_modules():
            if module in layers and model.language in module.r:
                weight = weights[f"{name}.weight"]
                weights[f"{name}.weight"] = weight + module.get_delta_weight(model.language).to(weight.dtype)
    return weights


def text_map(model: NrccrModel) -> Affine:
    """
    Return the one affine map from the pooled state of the text encoder to the embedding before it is normalised, of
    shapes `(projection_dim, text_feat_dim)` and `(projection_dim,)`: head, adapter, projection and BatchNorm.

    Raises:
        ValueError: for a head, or a kind of adapter, that is more than that.
    """
    head, projection = model.text_head, model.text_projection
    if not isinstance(head, NrccrPoolingHead) or (head.dense is not None and head.relu):
        raise ValueError(
            f"the text head is of the kind {model.config.text_head!r}, which no application of others has: it takes "
            "pooling and one linear map. Take --to onnx"
        )
    steps = [(head.dense.weight.double(), head.dense.bias.double())] if head.dense is not None else []
    steps.append(adapter_map(model))
    if projection.dense is not None:
        steps.append((projection.dense.weight.double(), projection.dense.bias.double()))
    if (norm := projection.norm) is not None:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        steps.append((scale.diag(), norm.bias.double() - scale * norm.running_mean.double()))
    matrix, constant = steps[0]
    for weight, bias in steps[1:]:
        matrix, constant = weight @ matrix, weight @ constant + bias
    return matrix, constant


def read_base(model: NrccrModel) -> PreTrainedModel:
    """
    Read the dual encoder that a model was made from, in its own class.

    Raises:
        ValueError: for a model that was made from none, that has another text encoder or a second text side, or whose
            picture side is not the base's any more; it says what takes it.
    """
    instead = "take --to sentence-transformers for its texts, or --to onnx"
    if model.source_text_side is not None:
        raise ValueError(f"this model has two text sides (nrccr), and no class of transformers has: {instead}")
    base = model.config.dual_encoder or {}
    hub = {"revision": base["revision"]} if base.get("revision") else {}
    config = read_config(base["name"], **hub) if base else model.config
    if config.model_type == model.config.model_type:
        raise ValueError(f"this model is nrccr's own, which is no class of transformers: {instead}")
    family = family_of(config)
    if family.text_projection is None or family.vision_model is None:
        raise ValueError(f"{config.model_type} has no projection to fold a language into: {instead}")
    if model.config.text_config.model_type != config.text_config.model_type:
        raise ValueError(f"this model has another text encoder than {base['name']}: {instead}")
    dual = read_dual_encoder(base["name"], config, **hub).eval()
    parts = [(model.visual_tower.encoder, family.vision_model)]
    if family.visual_projection:
        parts.append((model.visual_projection.dense, family.visual_projection))
    for ours, name in parts:
        own, theirs = ours.state_dict(), attrgetter(name)(dual).state_dict()
        for key in theirs.keys() & own.keys():
            if not torch.equal(own[key], theirs[key]):
                raise ValueError(
                    f"the picture side is not that of {base['name']} any more ({name}.{key}), so no index of the base "
                    f"would be read: {instead}"
                )
    return dual


@torch.no_grad()
def fold_language(model: NrccrModel) -> PreTrainedModel:
    """
    Return a model of the base's own class that reads texts as `model` does in its active language (None: as it does
    without one), to the last digits of float32; its picture side is the base's, bit for bit.

    Raises:
        ValueError: for a model, a kind of adapter or a matrix that cannot be folded; it says what can.
    """
    matrix, constant = adapter_map(model)  # before anything large is read
    dual = read_base(model)
    family, own = family_of(dual.config), model.text_projection.dense
    missing, unexpected = getattr(dual, family.text_model).load_state_dict(text_weights(model), strict=False)
    if unexpected or any(not name.startswith(("head.", "pooler.")) for name in missing):
        raise ValueError(f"the text encoder is not that of the base: {', '.join([*unexpected, *missing][:3])}")
    projection = attrgetter(family.text_projection)(dual)
    weight, bias = own.weight.double(), own.bias.double()
    if projection.bias is not None:
        projection.weight.copy_(weight @ matrix)
        projection.bias.copy_(weight @ constant + bias)
        return dual
    last = LAST_AFFINE.get(dual.config.model_type)
    last = last and attrgetter(last)(dual)
    if last is None or getattr(last, "bias", None) is None or bias.any():
        raise ValueError(
            f"{dual.config.model_type} has no bias that the shift of an adapter could be folded into: take --to onnx"
        )
    if isinstance(last, nn.Linear):
        last.bias.copy_(matrix @ last.bias.double() + constant)
        last.weight.copy_(matrix @ last.weight.double())
        projection.weight.copy_(weight)
        return dual
    if constant.any():
        if not torch.linalg.cond(matrix) < WORST_CONDITION:
            raise ValueError(
                f"the matrix of the adapter of {model.language} cannot be inverted, so its constant has no "
                "place before the projection: add the language again, or take --to onnx"
            )
        constant = torch.linalg.solve(matrix, constant)
    projection.weight.copy_(weight @ matrix)
    last.bias.copy_(last.bias.double() + constant)
    return dual

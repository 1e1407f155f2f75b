"""The two sides of a model, each as a module that becomes a file."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor


BATCHES = ((1, 1), (1, 16), (2, 3), (7, 11), (33, 16))  # size and length; from 32 the model groups texts by length
Inputs = dict[str, torch.Tensor]


class TextSide(nn.Module):
    """Computes `NrccrModel.get_text_features` of one language, without what depends on the number of rows and their
    lengths."""

    def __init__(self, model: NrccrModel):
        super().__init__()
        self.tower, self.head, self.projection = model.text_tower, model.text_head, model.text_projection
        self.adapter = nn.Identity() if model.language is None else model.language_adapters[model.language]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.tower(input_ids, attention_mask)
        return self.projection(self.adapter(self.head(states, attention_mask)))


class ImageSide(nn.Module):
    def __init__(self, model: NrccrModel):
        super().__init__()
        self.tower, self.head, self.projection = model.visual_tower, model.visual_head, model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.tower(pixel_values)
        return self.projection(self.head(features, features.new_ones(features.shape[:2])))


class FeatureSide(nn.Module):
    def __init__(self, model: NrccrModel):
        super().__init__()
        self.head, self.projection = model.visual_head, model.visual_projection

    def forward(self, visual_feats: torch.Tensor, visual_attention_mask: torch.Tensor) -> torch.Tensor:
        return self.projection(self.head(visual_feats, visual_attention_mask))


@dataclass
class Side:
    """
    Holds what becomes a file.

    Args:
        name: of the file.
        output: name of the embeddings in it, of shape `(batch, projection_dim)`.
        module: takes the inputs by position.
        axes: names of each input's dynamic axes, by axis.
        draw: random inputs of a size and length.
        embed: what the model itself makes of them.
    """

    name: str
    output: str
    module: nn.Module
    axes: dict[str, dict[int, str]]
    draw: Callable[[int, int, torch.Generator], Inputs]
    embed: Callable[[Inputs], torch.Tensor]


def one_text_side(model: NrccrModel, processor: NrccrProcessor, name: str) -> tuple[NrccrModel, NrccrProcessor]:
    """Return a model that is exported whole: of one whose source language has a text side of its own, that of the
    active language. Raises ValueError where none is active; `name`: of the model, as it was loaded."""
    if model.source_text_side is None:
        return model, processor
    if model.language is None:
        raise ValueError(
            f"{name} reads its source language by the text side of its base: export that base, or name the "
            "language whose side is exported, --language CODE"
        )
    return model.language_side(), processor.language_side()


def list_sides(model: NrccrModel, processor: NrccrProcessor, wanted: Sequence[str]) -> list[Side]:
    """Return those of `wanted` that the model has. Raises ValueError for a tower that cannot be exported."""
    config, fixed = model.config, model.config.text_length
    exported = model
    if model.has_lora(model.language):  # a copy, as what is compared with it stays as it was
        exported = deepcopy(model).merge_language(model.language)

    def draw_text(size: int, length: int, generator: torch.Generator) -> Inputs:
        length = fixed or min(length, processor.max_text_length)
        pad = processor.tokenizer.pad_token_id
        ids = torch.randint(config.text_config.vocab_size, (size, length), generator=generator)
        ids[ids == pad] = 1 if pad == 0 else 0  # some encoders number the places of what is no padding
        if fixed:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        mask = mask.flip(1) if processor.tokenizer.padding_side == "left" else mask
        return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}

    def draw_image(size: int, length: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(size, *shape, generator=generator)}

    def draw_features(size: int, length: int, generator: torch.Generator) -> Inputs:
        mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=generator)).long()
        mask[0] = 1
        return {
            "visual_feats": torch.randn(size, length, config.visual_feat_dim, generator=generator) * mask[..., None],
            "visual_attention_mask": mask,
        }

    def embed_text(inputs: Inputs) -> torch.Tensor:
        return model.get_text_features(**inputs).pooler_output

    def embed_image(inputs: Inputs) -> torch.Tensor:
        return model.get_image_features(**inputs).pooler_output

    axes = {0: "batch"} if fixed else {0: "batch", 1: "length"}
    axes = {"input_ids": axes, "attention_mask": axes}
    sides = [Side("text", "text_embeds", TextSide(exported), axes, draw_text, embed_text)]
    if "image" in wanted and model.visual_tower is not None:
        inputs = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        if set(inputs) != {"pixel_values"}:
            raise ValueError(
                f"{type(model.visual_tower.encoder).__name__} reads pictures of any shape ({', '.join(inputs)}): its "
                "positions depend on each, and no exporter can follow. Export its texts alone: --sides text"
            )
        shape, axes = inputs["pixel_values"].shape[1:], {"pixel_values": {0: "batch"}}
        sides.append(Side("image", "image_embeds", ImageSide(exported), axes, draw_image, embed_image))
    elif "image" in wanted and model.visual_head is not None:
        axes = {0: "batch", 1: "frames"}
        axes = {"visual_feats": axes, "visual_attention_mask": axes}
        sides.append(Side("image", "image_embeds", FeatureSide(exported), axes, draw_features, embed_image))
    sides = [side for side in sides if side.name in wanted]
    if not sides:
        raise ValueError(f"This model has no side of {', '.join(wanted)}: export its texts, --sides text")
    return sides


@torch.no_grad()
def compare(side: Side, embed: Callable[[str, Inputs], torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference to the model's embeddings, and the lowest cosine, over `BATCHES` of random inputs.
    `embed`: of what was exported, by the name of the side."""
    largest, cosine = 0.0, 1.0
    for seed, (size, length) in enumerate(BATCHES):
        inputs = side.draw(size, length, torch.Generator().manual_seed(seed))
        expected, given = side.embed(inputs), embed(side.name, inputs)
        largest = max(largest, float((expected - given).abs().max()))
        cosine = min(cosine, float((expected * given).sum(1).min()))
    return largest, cosine

"""The recorded numbers of the released implementation (`fixtures/reference`), as inputs of this package."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_nrccr.training.conversion import PARTS, convert_original_checkpoint, released_names


FIXTURES = Path(__file__).parents[1] / "fixtures" / "reference"
NAMES = ("vid_encoding", "text_encoding", "vid_mapping", "text_mapping", "AdvAgent.discriminator")  # of PARTS, there
VIEWS = {"source": "", "trans": "target_", "back": "back_translation_"}


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


@cache
def settings(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def options(name: str, **changes) -> dict:
    return settings(name)["opt"] | {"key_query_size": settings(name)["key_query_size"]} | changes


def state_dicts(name: str, discriminator: str | None = None) -> list[dict[str, torch.Tensor]]:
    """The five of a released checkpoint; `forward_*` files keep the discriminators apart."""
    prefix = "weights_before/" if name.startswith("train") else "weights/"
    weights = {key.removeprefix(prefix): t for key, t in tensors(name).items() if key.startswith(prefix)}
    if discriminator:
        judge = tensors(f"{name}_disc_{discriminator}")
        weights |= {key.removeprefix("before/"): t for key, t in judge.items()}
    parts = [{k.removeprefix(f"{part}."): t for k, t in weights.items() if k.startswith(f"{part}.")} for part in NAMES]
    return parts if parts[4] else parts[:4]


def converted(name: str, discriminator: str | None = None, dtype: torch.dtype = torch.float64):
    changes = {"disc_type": discriminator} if discriminator else {}
    model, judge, loss = convert_original_checkpoint(
        state_dicts(name, discriminator), options(name, **changes), settings(name)["bert_config"]
    )
    return model.to(dtype), judge and judge.to(dtype), loss


def batch(name: str, prefix: str = "inputs", dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What the model takes, of the recorded inputs."""
    inputs = {k.removeprefix(f"{prefix}/"): t for k, t in tensors(name).items() if k.startswith(f"{prefix}/")}
    views = {
        f"{ours}{key}": inputs[f"{view}_{old}"]
        for view, ours in VIEWS.items()
        for key, old in (("input_ids", "ids"), ("attention_mask", "mask"))
    }
    if "image_feats" in inputs:
        return views | {"visual_feats": inputs["image_feats"].to(dtype)}
    return views | {"visual_feats": inputs["frames"].to(dtype), "visual_attention_mask": inputs["frame_mask"]}


def by_released_name(model, discriminator=None) -> dict[str, str]:
    """Our name of every tensor of a released checkpoint: "text_mapping.mapping.fc1.bias" to
    "text_projection.dense.bias"; the discriminator's begin with "discriminator."."""
    names = {
        f"{name}.{old}": ours
        for part, name in zip(PARTS[:4], NAMES)
        for old, ours in released_names(part, model).items()
    }
    judged = {} if discriminator is None else released_names(PARTS[4], discriminator)
    return names | {f"{NAMES[4]}.{old}": f"discriminator.{ours}" for old, ours in judged.items()}


def state(model, discriminator) -> dict[str, torch.Tensor]:
    """All tensors of both, under the names of `by_released_name`."""
    return model.state_dict() | {f"discriminator.{key}": t for key, t in discriminator.state_dict().items()}

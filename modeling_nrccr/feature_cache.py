"""Outputs of everything frozen, computed once: the vision tower's features and the text states at the boundary."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import BatchFeature

from .modeling_nrccr import NrccrModel


class FeatureCache:
    """Stands in for the processor: `cache(text=[...])` gives `boundary_states`, `cache(images=[image_id, ...])` gives
    `visual_feats`; what was not added is an error.

    Args:
        model: Its frozen part (`NrccrModel.set_trained_layers`) decides what is cached.
        processor: The model's processor.
        directory: Where the cache is kept between runs (None: in memory only). Files are named by a fingerprint of
            the frozen weights and of the processor's settings, so a cache of another encoder is never read.
    """

    def __init__(self, model: NrccrModel, processor, directory: str | Path | None = None):
        if model.config.pool_padding:
            raise ValueError("pool_padding=True pools the states of padding too, which are not cached: train uncached")
        self.model, self.processor = model, processor
        # the whole frozen tower and where it is cut: any other weights or cut give other states
        self.texts = Store(directory, "texts", (model.text_tower, model.text_tower.num_trained_layers, processor))
        self.images = Store(directory, "images", (model.visual_tower, processor))

    def add_texts(self, captions: Iterable[str | None], batch_size: int = 128):
        """States of every new caption at the boundary; None is passed over."""
        new = sorted({c for c in captions if c} - self.texts.rows.keys(), key=lambda caption: (len(caption), caption))
        self.texts.fill(new, self.boundary_states, batch_size, self.model)

    def add_images(self, image_ids: Iterable[str], load, batch_size: int = 16):
        """Features of every new picture or video; `load(image_id)` returns a picture, or a list of frames."""
        new = [image_id for image_id in dict.fromkeys(image_ids) if image_id not in self.images.rows]

        def features(ids: list[str]) -> list[torch.Tensor]:
            loaded = [load(image_id) for image_id in ids]
            kind = "videos" if isinstance(loaded[0], list) else "images"
            inputs = self.processor(**{kind: loaded}, return_tensors="pt").to(self.model.device)
            mask = inputs.pop("visual_attention_mask", None)
            feats = self.model.visual_tower(**inputs)
            return list(feats) if mask is None else [row[of_row.bool()] for row, of_row in zip(feats, mask)]

        self.images.fill(new, features, batch_size, self.model)

    def boundary_states(self, captions: list[str]) -> list[torch.Tensor]:
        inputs = self.processor(text=captions, return_tensors="pt").to(self.model.device)
        states = self.model.text_tower.at_boundary(inputs["input_ids"], inputs["attention_mask"])
        return [row[mask.bool()] for row, mask in zip(states, inputs["attention_mask"])]

    def __call__(
        self, text: list[str] | None = None, images: list[str] | None = None, visual_feats=None, **kwargs
    ) -> BatchFeature:
        """`boundary_states (batch_size, sequence_length, hidden_size)` and `attention_mask`, or
        `visual_feats (batch_size, num_frames, visual_feat_dim)`, of videos with `visual_attention_mask`. Pre-extracted
        `visual_feats` need no cache: they go to the processor."""
        batch = BatchFeature()
        if text is not None:
            batch["boundary_states"], batch["attention_mask"] = pad([self.texts[caption] for caption in text])
        if images is not None:
            batch["visual_feats"], mask = pad([self.images[image_id] for image_id in images])
            if mask.shape[1] > 1:
                batch["visual_attention_mask"] = mask
        if visual_feats is not None:
            batch.update(self.processor(visual_feats=visual_feats, **kwargs))
        return batch


def pad(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as one batch, and its mask, of shape `(batch_size, length)`."""
    lengths = torch.tensor([len(part) for part in parts])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), mask


class Store:
    """Named sequences of vectors of one width, in one matrix; written atomically as one safetensors file."""

    def __init__(self, directory: str | Path | None, kind: str, frozen: tuple):
        self.kind, self.rows, self.matrix = kind, {}, None
        self.path = Path(directory) / f"{kind}-{fingerprint(*frozen)}.safetensors" if directory else None
        if self.path and self.path.exists():
            with safe_open(self.path, "pt") as file:
                self.rows = {key: tuple(row) for key, row in json.loads(file.metadata()["rows"]).items()}
                self.matrix = file.get_tensor("vectors")

    def __getitem__(self, key: str) -> torch.Tensor:
        try:
            start, end = self.rows[key]
        except KeyError:
            raise KeyError(f"{key!r} is not among the cached {self.kind}: call add_{self.kind} first") from None
        return self.matrix[start:end]

    @torch.no_grad()
    def fill(self, keys: list[str], compute, batch_size: int, model: NrccrModel):
        if not keys:
            return
        was_training = model.training
        model.eval()
        parts = [] if self.matrix is None else [self.matrix]
        end = len(parts[0]) if parts else 0
        for start in tqdm(range(0, len(keys), batch_size), desc=f"frozen {self.kind}", unit="batch"):
            chunk = keys[start : start + batch_size]
            for key, vectors in zip(chunk, compute(chunk), strict=True):
                if not vectors.isfinite().all():
                    raise ValueError(
                        f"the encoder gives NaN or infinity for {key!r}: check this input and the weights"
                    )
                self.rows[key] = (end, end := end + len(vectors))
                parts.append(vectors.cpu())
        model.train(was_training)
        self.matrix = torch.cat(parts)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"vectors": self.matrix}, partial, metadata={"rows": json.dumps(self.rows)})
            os.replace(partial, self.path)


def fingerprint(*parts) -> str:
    """Of modules (their weights) and of anything with a faithful `repr` or `to_dict`."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()

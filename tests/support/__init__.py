"""What the tests share: a tiny model, its batches, a processor of words, rows that can be learnt."""

import random
from pathlib import Path

import torch

from modeling_nrccr import NrccrConfig, NrccrModel


torch.set_num_threads(1)  # two spinning threads on a busy 2-core machine are 10 times slower

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures"
TINY_TEXT = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=29,
    max_position_embeddings=40,
)
HEADS = {
    "attention": {},
    "pooling": {"text_head": "pooling", "visual_head": "pooling", "teacher_view": "source"},
    "published": {
        "pool_padding": True,
        "projection_norm": "batch_norm",
        "attention_score_scale": "hidden",
        "projection_dropout": 0.2,
        "visual_head": "attention",
        "visual_hidden_size": 16,
        "text_hidden_size": 16,
    },
}


def tiny_model(seed: int = 0, **config) -> NrccrModel:
    torch.manual_seed(seed)
    config = {"text_config": TINY_TEXT, "projection_dim": 11, "key_query_size": 32, "visual_feat_dim": 13} | config
    return NrccrModel(NrccrConfig(**config)).eval()


def tiny_batch(model: NrccrModel, size: int = 5, frames: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three views of different lengths and padding, and feature sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for prefix, length in (("", 7), ("target_", 9), ("back_translation_", 6)):
        lengths = torch.randint(2, length + 1, (size,), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths[:, None]).long()
        batch[f"{prefix}input_ids"] = torch.randint(2, 37, (size, length), generator=generator) * mask
        batch[f"{prefix}attention_mask"] = mask
    lengths = torch.randint(1, frames + 1, (size,), generator=generator)
    lengths[0] = frames
    batch["visual_attention_mask"] = (torch.arange(frames) < lengths[:, None]).long()
    feats = torch.randn(size, frames, model.config.visual_feat_dim, generator=generator)
    batch["visual_feats"] = (feats * batch["visual_attention_mask"].unsqueeze(-1)).to(model.dtype)
    return batch


class WordProcessor:
    """Stands in for a processor: numbers words, pads; pictures are feature vectors already."""

    def __repr__(self):
        return "WordProcessor"

    def __call__(self, text=None, images=None, visual_feats=None, **kwargs):
        from transformers import BatchFeature

        batch = BatchFeature()
        if text is not None:
            ids = [torch.tensor([2 + sum(map(ord, word)) % 35 for word in caption.split()]) for caption in text]
            batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            batch["attention_mask"] = (batch["input_ids"] > 0).long()
        if images is not None:
            batch["visual_feats"] = torch.stack([torch.as_tensor(image).float() for image in images]).unsqueeze(1)
        if visual_feats is not None:
            feats = [torch.as_tensor(feat).float() for feat in visual_feats]
            batch["visual_feats"] = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)
            lengths = torch.tensor([len(feat) for feat in feats])
            batch["visual_attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def toy_rows(count: int, seed: int = 0) -> list[dict]:
    """Pictures that are bags of words, captions that name the words: learnable, for plumbing only."""
    generator = random.Random(seed)
    words = [f"word{i}" for i in range(13)]
    rows = []
    for i in range(count):
        chosen = generator.sample(range(13), 3)
        feats = [float(j in chosen) for j in range(13)]
        source = " ".join(words[j] for j in chosen)
        rows.append(
            {
                "image_id": f"toy/{i}",
                "caption_id": f"toy/{i}#0",
                "image": feats,
                "source_caption": source,
                "target_caption": source.replace("word", "palabra"),
                "back_translation": source + " again",
            }
        )
    return rows

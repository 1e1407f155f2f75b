"""Trains the bench of bases: a small dual encoder of each family that languages are added to.

    python -m benchmarks.bases.build  # all, about a minute each; they stay in the cache folder
    python -m benchmarks.bases.build clip siglip

An instrument for the plumbing, and no more: it shows that a family's own code, tokenizer and image processor go the
whole way from captions to an answered query, and says nothing of how good real weights are. Each base is of its
family's own classes at a small size, with its own kind of tokenizer, trained from 1,350 English captions, and its own
image processor. Its picture tower is first pulled to the picture embeddings of a model of ours (the base "nrccr", of
the recipe `english`); then the text side is trained by the family's own loss on the real pictures and their English
captions. The pictures of EmbeddingGemma 2 stay with it: its text side alone is trained, towards nrccr's.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AltCLIPConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    EmbeddingGemma2Config,
    MetaClip2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    set_seed,
)

from benchmarks.bases import tokenizers as kinds
from modeling_nrccr import NrccrModel, NrccrProcessor
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.heads import clip_loss
from modeling_nrccr.loading.wheels import cache_folder, new_folder
from modeling_nrccr.processing_nrccr import to_rgb
from modeling_nrccr.retrieval.encoding import encode_images, encode_texts
from modeling_nrccr.retrieval.metrics import chance_metrics, compute_retrieval_metrics


DATASET = "tuxpaint+cldr_emoji"
SCALE = 20.0  # of similarities, where a family has none of its own
BATCH = 128
RECIPE = 2  # of the training: another makes other bases
FAR = 5  # times chance
RECORD = "training.json"


@dataclass(frozen=True)
class Size:
    """How large a base is. `layers` of text: of families that alternate two kinds of attention, two of each."""

    width: int = 96
    layers: int = 4
    picture_layers: int = 3
    heads: int = 4
    patch: int = 8
    grid: int = 6  # patches a side
    vocabulary: int = 1500

    @property
    def tower(self) -> dict:
        return {"hidden_size": self.width, "intermediate_size": 3 * self.width, "num_attention_heads": self.heads}

    @property
    def side(self) -> int:
        return self.patch * self.grid


TINY = Size(width=24, layers=4, picture_layers=1, patch=4, grid=2, vocabulary=560)


# ------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Base:
    """Of a family: its tokenizer `(captions, vocabulary)`, its configuration `(tokenizer, size)`, its image processor
    `(size)`, or None where its pictures stay with it, and the learning rate of its text side."""

    tokenizer: Callable[[Sequence[str], int], PreTrainedTokenizerBase]
    config: Callable[[PreTrainedTokenizerBase, Size], PreTrainedConfig]
    image_processor: Callable[[Size], object] | None = None
    rate: float = 1e-3


def text_fields(tokenizer: PreTrainedTokenizerBase, size: Size, **fields) -> dict:
    fields = {"max_position_embeddings": tokenizer.model_max_length} | fields
    return size.tower | {"num_hidden_layers": size.layers} | kinds.token_ids(tokenizer) | fields


def picture_fields(size: Size, **fields) -> dict:
    fields = fields or {"image_size": size.side}
    return size.tower | {"num_hidden_layers": size.picture_layers, "patch_size": size.patch} | fields


def clip_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> CLIPConfig:
    # as OpenAI's folders say it: 2, which means that the largest number ends a text
    text = text_fields(tokenizer, size, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    return CLIPConfig(text_config=text, vision_config=picture_fields(size), projection_dim=size.width)


def metaclip2_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> MetaClip2Config:
    text = text_fields(tokenizer, size)
    return MetaClip2Config(text_config=text, vision_config=picture_fields(size), projection_dim=size.width)


def altclip_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> AltCLIPConfig:
    positions = tokenizer.model_max_length + 2  # RoBERTa's begin at 2
    text = text_fields(tokenizer, size, max_position_embeddings=positions, project_dim=size.width + 8)
    text["initializer_factor"] = 1.0
    return AltCLIPConfig(text_config=text, vision_config=picture_fields(size), projection_dim=size.width)


def siglip_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> SiglipConfig:
    text = text_fields(tokenizer, size, projection_size=size.width, bos_token_id=None)
    return SiglipConfig(text_config=text, vision_config=picture_fields(size))


def siglip2_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> Siglip2Config:
    text = text_fields(tokenizer, size, projection_size=size.width)
    return Siglip2Config(text_config=text, vision_config=picture_fields(size, num_patches=size.grid**2))


def embedding_gemma2_config(tokenizer: PreTrainedTokenizerBase, size: Size) -> EmbeddingGemma2Config:
    head = size.width // size.heads
    text = text_fields(
        tokenizer,
        size,
        num_key_value_heads=2,
        head_dim=head,
        global_head_dim=2 * head,
        sliding_window_pattern=2,
        sliding_window=3,
        hidden_size_per_layer_input=size.width // 4,
        embedding_dim=EMBEDDING_DIM,
    )
    return EmbeddingGemma2Config(text_config=text)


def clip_pictures(size: Size) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size.side}, crop_size=size.side)


EMBEDDING_DIM = 1024  # of modeling_nrccr/recipes/english.yaml, whose pictures EmbeddingGemma 2 is taught by
BASES = {
    "clip": Base(kinds.clip_tokenizer, clip_config, clip_pictures),
    "metaclip_2": Base(kinds.xlm_roberta_tokenizer, metaclip2_config, clip_pictures),
    "altclip": Base(kinds.xlm_roberta_tokenizer, altclip_config, clip_pictures),
    "siglip": Base(
        kinds.siglip_tokenizer,
        siglip_config,
        lambda size: SiglipImageProcessorPil(size={"height": size.side, "width": size.side}),
    ),
    "siglip2": Base(
        kinds.siglip2_tokenizer,
        siglip2_config,
        lambda size: Siglip2ImageProcessorPil(patch_size=size.patch, max_num_patches=size.grid**2),
        rate=2e-3,
    ),
    "embedding_gemma2": Base(kinds.gemma_tokenizer, embedding_gemma2_config),
}
NAMES = ("nrccr", *BASES)


def save_untrained(base: Base, captions: Sequence[str], folder: Path, size: Size, seed: int = 0) -> PreTrainedModel:
    """Writes a base as a hub repository has it, with the weights of its initialisation; returns the model."""
    set_seed(seed)
    tokenizer = base.tokenizer(captions, size.vocabulary)
    model = AutoModel.from_config(base.config(tokenizer, size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if base.image_processor is not None:
        base.image_processor(size).save_pretrained(folder)
    return model


# ----------------------------------------------------------------------------------------------- by their own code


def text_inputs(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, texts: Sequence[str]) -> dict:
    """Return what the family's documentation makes of texts, as keywords for `text_embeds`."""
    if model.config.model_type.startswith("siglip"):
        length = model.config.text_config.max_position_embeddings
        inputs = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {"input_ids": inputs["input_ids"]}
    if model.config.model_type == "embedding_gemma2":
        texts = [f"task: search result | query: {text}" for text in texts]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def text_embeds(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
    """Return the embeddings of texts, L2-normalised, `(batch_size, width)`."""
    if model.config.model_type == "embedding_gemma2":
        states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return F.normalize(model.get_text_features(input_ids, attention_mask=attention_mask).pooler_output, dim=-1)


def picture_embeds(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """Return the embeddings of pictures, L2-normalised, `(batch_size, width)`."""
    return F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)


# ------------------------------------------------------------------------------------------------------- training


@lru_cache
def captioned(split: str) -> tuple[list[str], list[Image.Image]]:
    """Return the English captions of a split of seed 0, written by people, and their pictures."""
    rows = load_caption_dataset(DATASET, "gl")[split]
    captions = rows["source_caption" if split == "train" else "reference_source_caption"]
    return list(captions), [to_rgb(image) for image in rows["image"]]


@lru_cache
@torch.no_grad()
def pictures_of_nrccr(split: str) -> torch.Tensor:
    """Return what the base of ours makes of the pictures, `(num_pictures, EMBEDDING_DIM)`."""
    folder = str(base_folder("nrccr"))
    model, processor = NrccrModel.from_dual_encoder(folder).eval(), NrccrProcessor.from_dual_encoder(folder)
    return encode_images(model, captioned(split)[1], processor)


def batches(count: int, epochs: int) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count)[: count // BATCH * BATCH].split(BATCH)


def fit(parameters: Iterable[nn.Parameter], epochs: int, count: int, rate: float, loss_of: Callable):
    """Train `parameters` by AdamW with one cycle of the rate; `loss_of` is called with the rows of each batch."""
    rows = list(batches(count, epochs))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(rows))
    for batch in rows:
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        schedule.step()


def picture_side(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the picture tower, and of the projection after it where there is one."""
    return [parameter for name, parameter in model.named_parameters() if name.startswith(("vision", "visual"))]


def distil_pictures(model: PreTrainedModel, pixels: dict, teacher: torch.Tensor, epochs: int):
    """Pulls the picture tower to what another makes of the same pictures, `(num_pictures, width)`, through a
    projection that is thrown away."""
    teacher = F.normalize(teacher - teacher.mean(0), dim=-1)
    with torch.no_grad():
        width = picture_embeds(model, **{name: part[:2] for name, part in pixels.items()}).shape[1]
    projection = nn.Linear(width, teacher.shape[1])

    def loss_of(rows):
        embeds = picture_embeds(model, **{name: part[rows] for name, part in pixels.items()})
        embeds, wanted = F.normalize(projection(embeds), dim=-1), teacher[rows]
        return clip_loss(SCALE * embeds @ wanted.t()) + (1 - (embeds * wanted).sum(1)).mean()

    fit([*picture_side(model), *projection.parameters()], epochs, len(teacher), 2e-3, loss_of)


def train(model: PreTrainedModel, tokenizer, image_processor, rate: float, epochs: int = 10):
    """Train a model by the family's own loss, over pictures and captions. The picture tower is locked then (LiT, arXiv
    2111.07991): a tower that moves may collapse with the text side, and SigLIP's loss at this size does not leave that
    again."""
    captions, pictures = captioned("train")
    teacher = pictures_of_nrccr("train")
    pixels = {}
    if image_processor is not None:
        pixels = dict(image_processor(pictures, return_tensors="pt"))
        distil_pictures(model, pixels, teacher, epochs)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            if hasattr(model, "logit_bias"):  # SigLIP's is -10, of batches of 32,000: here it would learn nothing
                model.logit_bias.fill_(-math.log(BATCH) - 2)
        for parameter in picture_side(model):
            parameter.requires_grad_(False)

    def loss_of(rows):
        texts = text_inputs(tokenizer, model, [captions[row] for row in rows])
        if not pixels:
            return clip_loss(SCALE * text_embeds(model, **texts) @ teacher[rows].t())
        return model(**texts, **{name: part[rows] for name, part in pixels.items()}, return_loss=True).loss

    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(free, epochs, len(captions), rate, loss_of)


@torch.no_grad()
def english_sum_recall(model: PreTrainedModel, tokenizer, image_processor) -> float:
    """Return the SumR of English queries that people wrote, to held-out pictures, by the family's own code."""
    model.eval()
    captions, pictures = captioned("test")
    texts = text_embeds(model, **text_inputs(tokenizer, model, captions))
    images = pictures_of_nrccr("test")
    if image_processor is not None:
        images = picture_embeds(model, **image_processor(pictures, return_tensors="pt"))
    return compute_retrieval_metrics(texts, images, torch.arange(len(images)))["sum_recall"]


def build_nrccr(folder: Path, seed: int) -> float:
    """Runs the recipe of our own English base."""
    from modeling_nrccr.training.run import train_recipe

    train_recipe("english", output_dir=folder, seed=seed, disable_tqdm=True)
    model, processor = NrccrModel.from_pretrained(folder).eval(), NrccrProcessor.from_pretrained(folder)
    captions, pictures = captioned("test")
    texts, images = encode_texts(model, captions, processor), encode_images(model, pictures, processor)
    return compute_retrieval_metrics(texts, images, torch.arange(len(images)))["sum_recall"]


def build(name: str, folder: Path, seed: int) -> float:
    """Trains a base into an empty folder; how well its English finds held-out pictures."""
    if name == "nrccr":
        return build_nrccr(folder, seed)
    base = BASES[name]
    model = save_untrained(base, captioned("train")[0], folder, Size(), seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder) if base.image_processor else None
    train(model.train(), tokenizer, image_processor, base.rate)
    model.save_pretrained(folder)
    return english_sum_recall(model, tokenizer, image_processor)


def base_folder(name: str, seed: int = 0) -> Path:
    """Return the folder of a base, which is trained unless it is there. Raises RuntimeError where its English finds
    little more than chance: such a base shows nothing."""
    folder = cache_folder() / "bases" / f"{name}-{RECIPE}-seed{seed}"
    if (folder / "config.json").exists():
        return folder
    start = time.perf_counter()
    with new_folder(folder) as unfinished:
        found = build(name, unfinished, seed)
        size = len(captioned("test")[0])
        chance = chance_metrics(size, size)["sum_recall"]
        record = {"sum_recall": found, "chance": chance, "seconds": time.perf_counter() - start}
        if found < FAR * chance:
            raise RuntimeError(f"{name}: English finds SumR {found:.1f}, chance {chance:.1f}: it was not trained")
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: English SumR {found:.1f}, chance {chance:.1f}; {record['seconds']:.0f} s", flush=True)
    return folder


def read_record(folder: Path) -> dict[str, float]:
    """Return what `base_folder` found of a base: `sum_recall` of its English, `chance`, and `seconds` of its
    training."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    for name in parser.parse_args().names:
        print(base_folder(name))


if __name__ == "__main__":
    main()

"""What a team would try instead of adding a language, on the same frozen encoder and the same translations."""

from copy import copy, deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from ..data.collator import DataCollatorForCrossLingualRetrieval
from ..modeling_nrccr import NrccrModel
from .arguments import NrccrTrainingArguments
from .feature_cache import FeatureCache
from .losses import read_losses
from .trainer import NrccrTrainer


TRUNK_BLOCKS = 3  # of arXiv 2608.30725: the first 3 or 4 text blocks


def frozen_cache(model: NrccrModel, processor, rows: list[dict], directory: Path | None = None) -> FeatureCache:
    """Cache the pooled states of all captions of `rows` by the model's frozen text encoder."""
    cache = FeatureCache(model, processor, directory)
    columns = ("source_caption", "target_caption", "back_translation", "reference_source_caption")
    cache.add_texts(row.get(column) for row in rows for column in columns)
    return cache


def embed_distillation(
    model: NrccrModel, language: str, cache: FeatureCache, rows: list[dict], args: NrccrTrainingArguments
) -> NrccrModel:
    """
    Train by `EmbedDistillLoss` of sentence-transformers 6.2 (cosine), in its trainer with its defaults: the target
    caption's embedding is pulled to the source's. The student is a Dense on the frozen encoder's pooled state, the
    identity at first, and the model's own projection: what an adapter of kind "linear" is, into which it is written
    back.

    Raises ImportError where sentence-transformers is not installed.
    """
    try:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.base.modules.dense import Dense
        from sentence_transformers.base.modules.input_module import InputModule
        from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
    except ImportError as error:
        raise ImportError(f'this rival needs {error.name}: pip install "sentence-transformers>=6.2,<7"') from error

    class CachedStates(InputModule):
        """A text's pooled state, computed before."""

        def preprocess(self, inputs, **kwargs):
            return {"sentence_embedding": cache.texts.batch(list(inputs))[0][:, 0]}

        tokenize = preprocess

        def forward(self, features, **kwargs):
            return features

        def save(self, *args, **kwargs):
            pass

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = deepcopy(model.text_projection).requires_grad_(False).eval()

        def forward(self, features):
            return features | {"sentence_embedding": self.frozen(features["sentence_embedding"])}

    set_seed(args.seed)
    width = model.text_head.output_size
    dense = Dense(width, width, activation_function=nn.Identity())
    nn.init.eye_(dense.linear.weight)
    nn.init.zeros_(dense.linear.bias)
    student = SentenceTransformer(modules=[CachedStates(), dense, Projection()], device="cpu")
    with torch.no_grad():
        states = cache.texts.batch([row["source_caption"] for row in rows])[0][:, 0]
        labels = model.text_projection(states)
    data = Dataset.from_dict({"sentence": [row["target_caption"] for row in rows], "label": labels.tolist()})
    own = Arguments(
        output_dir=f"{args.output_dir}-embed-distill",
        num_train_epochs=args.num_train_epochs,
        seed=args.seed,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=args.bf16,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    SentenceTransformerTrainer(student, own, train_dataset=data, loss=EmbedDistillLoss(student, "cosine")).train()
    adapter = model.add_language(language, kind="linear")
    with torch.no_grad():
        adapter.update.weight.copy_(dense.linear.weight - torch.eye(width))
        adapter.update.bias.copy_(dense.linear.bias)
    return model.set_language(language).eval()


def m2m(model: NrccrModel, cache: FeatureCache, rows: list[dict], args: NrccrTrainingArguments) -> NrccrModel:
    """Train two linear layers on a frozen multilingual encoder, from English text alone (M2M, arXiv 2601.10096)."""
    set_seed(args.seed)
    names = ("projection_dim", "text_pooling", "visual_head", "visual_projection", "text_length")
    settings = {name: getattr(model.config, name) for name in names}
    student = model.with_new_heads(text_head="linear", teacher_view="source", **settings)
    student.visual_head, student.visual_projection = model.visual_head, model.visual_projection
    english = [row | {"target_caption": row["source_caption"]} for row in rows]
    args = distillation_arguments(args, {"feature_distillation": 1.0}, train_visual_head=False)
    collator = DataCollatorForCrossLingualRetrieval(cache)
    NrccrTrainer(student, args, english, data_collator=collator, teacher=model).train()
    return student.eval()


def trunk_calibration(
    model: NrccrModel, processor, rows: list[dict], args: NrccrTrainingArguments, epochs: int = 3
) -> NrccrModel:
    """Train the first text blocks by InfoNCE with the English embeddings and a cosine anchor to them, from text alone
    (arXiv 2608.30725; its temperature, weights and rate are not known here: those of `args`, 2e-4)."""
    set_seed(args.seed)
    student = deepcopy(model)
    args = distillation_arguments(
        args,
        {"feature_distillation": 1.0, "target_contrastive": 1.0},
        trained_text_layers=-1,
        train_visual_head=False,
        learning_rate=2e-4,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
    )
    trainer = NrccrTrainer(student, args, rows, processing_class=processor, teacher=model)
    student.requires_grad_(False)
    parent, name = student.text_tower.layer_list()
    getattr(parent, name)[:TRUNK_BLOCKS].requires_grad_(True)
    trainer.train()
    return student.eval()


def distillation_arguments(
    args: NrccrTrainingArguments, losses: dict[str, float], **changes
) -> NrccrTrainingArguments:
    """Return arguments for text alone, with these losses, without checkpoints."""
    fixed = {
        "losses": read_losses(losses),
        "text_only": True,
        "train_language": None,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "early_stopping_patience": 0,
        "keep_best_in_memory": False,
    }
    args = copy(args)  # not dataclasses.replace: __post_init__ of TrainingArguments cannot run twice
    for key, value in (fixed | changes).items():
        setattr(args, key, value)
    return args

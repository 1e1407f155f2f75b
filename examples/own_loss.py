"""
Train a language with a loss of your own, from rows that are plain dictionaries.

    python examples/own_loss.py openai/clip-vit-base-patch32 pairs.tsv --language gl --output outputs/gl

The last 50 pairs are held out. PYTHONPATH=examples nrccr train --losses own_loss:Uniformity=0.1 finds the loss too.
"""

import argparse
from pathlib import Path

import torch

from modeling_nrccr import LossTerm, NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.loading.models import load_model


class Uniformity(LossTerm):
    """Spreads a batch's target captions over the sphere (Wang and Isola, arXiv 2005.10242)."""

    reads = ("target",)  # views that are not read are not encoded

    def __call__(self, outputs, ignored):
        target = self.loss.embeds(outputs, "target_text_embeds")  # (batch_size, dim), L2-normalised
        return torch.pdist(target).square().mul(-2).exp().mean().log()


def train(base: str, pairs: str, language: str, output: str, epochs: int = 20) -> NrccrTrainer:
    """Train an adapter, write the language into the folder `output`, and return the Trainer, which has the log."""
    model, processor = load_model(base)
    model.add_language(language)
    texts = [line.split("\t") for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    rows = [{"image_id": source, "source_caption": source, "target_caption": target} for source, target in texts]
    args = NrccrTrainingArguments(
        output_dir=f"{output}-checkpoints",
        train_language=language,
        text_only=True,  # the English caption stands for its picture
        losses={"feature_distillation": 1.0, "own_loss:Uniformity": 0.1},
        num_train_epochs=epochs,
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        eval_gallery_column="source_caption",  # a held-out translation shall find its source
    )
    trainer = NrccrTrainer(model, args, rows[:-50], rows[-50:], processing_class=processor)
    trainer.train()
    model.eval().save_language(language, output)
    return trainer


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", help="folder or hub id of a CLIP, SigLIP 2, ..., or a model of ours")
    options.add_argument("pairs", help="a line is an English caption, a tab, its translation")
    options.add_argument("--language", default="gl", help="its code")
    options.add_argument("--output", default="outputs/gl", help="folder of the language")
    train(**vars(options.parse_args()))


if __name__ == "__main__":
    main()

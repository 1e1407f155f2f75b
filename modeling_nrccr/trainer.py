"""`NrccrTrainer` holds the losses and the discriminator, logs each term by name, and ranks over the full split."""

from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

from .data_collator import DataCollatorForCrossLingualRetrieval
from .discriminator import LanguageDiscriminator, adversarial_loss, discriminator_loss
from .encoding import encode_images, encode_texts
from .losses import NrccrLoss
from .metrics import compute_retrieval_metrics
from .modeling_nrccr import NrccrModel, NrccrOutput
from .training_args import NrccrTrainingArguments


logger = logging.get_logger(__name__)

DISCRIMINATOR_FILE = "discriminator.safetensors"
DISCRIMINATOR_OPTIMIZER_FILE = "discriminator_optimizer.pt"


class NrccrTrainer(Trainer):
    r"""
    Trains a [`NrccrModel`] with the terms of [`NrccrLoss`]; override `similarity_distillation`,
    `feature_distillation`, ... to change one.

    Args:
        model: The model; `args.trained_text_layers` and `args.train_vision_tower` freeze the rest of it.
        args: [`NrccrTrainingArguments`].
        train_dataset, eval_dataset: Rows with the columns of the builders (`datasets_scripts`).
        processing_class: The model's processor, saved with each checkpoint.
        data_collator: By default [`DataCollatorForCrossLingualRetrieval`] over `processing_class`, or over a
            [`FeatureCache`] given here as `data_collator.processor`.
        discriminator: By default built from `args.discriminator_kind` where `args.adversarial_loss_weight > 0`.
    """

    def __init__(
        self,
        model: NrccrModel,
        args: NrccrTrainingArguments,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator: DataCollatorForCrossLingualRetrieval | None = None,
        discriminator: LanguageDiscriminator | None = None,
        loss: NrccrLoss | None = None,
        **kwargs,
    ):
        text_layers = None if args.trained_text_layers < 0 else args.trained_text_layers
        model.set_trained_layers(text_layers, args.train_vision_tower, args.frozen_dropout)
        self.nrccr_loss = loss or NrccrLoss.from_arguments(args)
        self.nrccr_loss.terms |= {
            "distillation_loss": self.similarity_distillation,
            "feature_distillation_loss": self.feature_distillation,
            "back_translation_loss": self.cycle_consistency,
        }
        collator = data_collator or DataCollatorForCrossLingualRetrieval(processing_class)
        collator.views = args.needed_views()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = False  # a mean over the batch: the Trainer divides by the accumulation steps
        self.term_history = defaultdict(list)
        self.discriminator = None
        if args.adversarial_loss_weight > 0:
            self.discriminator = discriminator or LanguageDiscriminator(
                model.config.text_config.hidden_size, args.discriminator_kind, model.config.pool_padding
            )
            self.discriminator.to(args.device, next(model.parameters()).dtype)
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=args.discriminator_learning_rate
            )
            self.add_callback(SaveDiscriminator(self))
        if args.early_stopping_patience > 0:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    # ------------------------------------------------------------------------------------------------- the losses

    def similarity_distillation(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        """`distillation_loss`; `ignored`: boolean `(n, n)`, pairs that show the same picture."""
        return self.nrccr_loss.distillation_loss(outputs, ignored)

    def feature_distillation(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        """`feature_distillation_loss`."""
        return self.nrccr_loss.feature_distillation_loss(outputs, ignored)

    def cycle_consistency(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        """`back_translation_loss`."""
        return self.nrccr_loss.back_translation_loss(outputs, ignored)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        inputs = dict(inputs)
        image_ids = inputs.pop("image_ids", None)
        outputs = model(**inputs, return_teacher=self.args.needs_teacher())
        terms = self.nrccr_loss(*self.gather_batch(outputs, image_ids))
        loss = terms.pop("loss")
        if self.discriminator is not None:
            masks = [self.text_mask(inputs, prefix) for prefix in ("", "target_")]
            terms["discriminator_loss"] = self.discriminator_step(outputs, *masks)
            terms["adversarial_loss"] = self.adversarial_loss(outputs, masks[1])
            loss = loss + self.args.adversarial_loss_weight * terms["adversarial_loss"]
        for name, term in terms.items():
            self.term_history[name].append(term.detach())
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def text_mask(inputs: dict, prefix: str) -> torch.Tensor:
        mask = inputs.get(f"{prefix}attention_mask")
        return torch.ones_like(inputs[f"{prefix}input_ids"]) if mask is None else mask

    def gather_batch(self, outputs: NrccrOutput, image_ids: torch.Tensor | None):
        """The embeddings of all processes, with gradient, so that each computes the loss of the whole batch: DDP's
        mean over processes of these gradients is then the gradient that one process with the whole batch has."""
        if self.args.world_size == 1:
            return outputs, image_ids
        from torch.distributed.nn.functional import all_gather

        gathered = {
            name: torch.cat(all_gather(value.contiguous())) if name.endswith("_embeds") else value
            for name, value in outputs.items()
            if value is not None
        }
        return NrccrOutput(**gathered), None if image_ids is None else self.accelerator.gather(image_ids)

    def discriminator_step(self, outputs: NrccrOutput, mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """One step of the discriminator, on detached states, before the encoder's loss is computed through it."""
        loss = discriminator_loss(
            self.discriminator(outputs.text_hidden_states.detach(), mask),
            self.discriminator(outputs.target_text_hidden_states.detach(), target_mask),
        )
        self.discriminator_optimizer.zero_grad()
        (self.args.discriminator_loss_weight * loss).backward()
        if self.args.world_size > 1:  # not wrapped by DDP: freezing a wrapped module breaks its reducer
            for parameter in self.discriminator.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.discriminator_optimizer.step()
        return loss

    def adversarial_loss(self, outputs: NrccrOutput, target_mask: torch.Tensor) -> torch.Tensor:
        self.discriminator.requires_grad_(False)
        loss = adversarial_loss(self.discriminator(outputs.target_text_hidden_states, target_mask))
        self.discriminator.requires_grad_(True)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean since the last log, under its name."""
        if self.term_history and "loss" in logs:
            names = list(self.term_history)
            means = torch.stack([torch.stack(self.term_history[name]).mean() for name in names])
            means = self.accelerator.reduce(means, "mean").tolist()
            logs |= dict(zip(names, means))
            self.term_history.clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics over the full split, both directions, with `args.eval_query_column` as queries; a dict of datasets
        gives each its name as a prefix."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            parts = (self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in eval_dataset.items())
            return {key: value for part in parts for key, value in part.items()}
        queries, images, caption_to_image = self.encode_dataset(eval_dataset, self.args.eval_query_column)
        metrics = compute_retrieval_metrics(queries, images, caption_to_image)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def encode_dataset(self, dataset, query_column: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings of the captions in `query_column` and of each picture once, and the row of each caption's picture
        `(num_captions,)`; each process encodes a part, none twice."""
        rows = dataset.remove_columns("image") if "image" in getattr(dataset, "column_names", ()) else dataset
        captions = [row[query_column] for row in rows]
        for i, caption in enumerate(captions):
            if not caption:
                raise ValueError(f"row {i} has no {query_column}: translate the data set, or set eval_query_column")
        first_row = {}
        for i, row in enumerate(rows):
            first_row.setdefault(row["image_id"], i)
        order = {image_id: i for i, image_id in enumerate(first_row)}
        caption_to_image = torch.tensor([order[row["image_id"]] for row in rows])
        model, processor = self.accelerator.unwrap_model(self.model), self.data_collator.processor
        size = self.args.per_device_eval_batch_size
        queries = self.shared_out(captions, lambda part: encode_texts(model, part, processor, size))
        images = self.shared_out(list(first_row.values()), lambda part: self.encode_rows(dataset, part, size))
        return queries, images, caption_to_image

    def encode_rows(self, dataset, indices: list[int], batch_size: int) -> torch.Tensor:
        model = self.accelerator.unwrap_model(self.model)

        def media(images: list[int], **kwargs):
            from transformers import BatchFeature

            return BatchFeature(self.data_collator.media([dataset[i] for i in images]))

        return encode_images(model, indices, media, batch_size)

    def shared_out(self, items: list, encode) -> torch.Tensor:
        """`encode` over `items`, every process a contiguous part of them; the whole, in order, on each."""
        size, rank = self.args.world_size, self.args.process_index
        bounds = [len(items) * i // size for i in range(size + 1)]
        part = encode(items[bounds[rank] : bounds[rank + 1]])
        return part if size == 1 else torch.cat(gather_object([part]))

    # ------------------------------------------------------------------------------------------- saving, resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint and self.discriminator is not None:
            self.load_discriminator(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # this folder may be published: no pickled file in it
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def save_discriminator(self, directory: Path):
        save_file(self.discriminator.state_dict(), directory / DISCRIMINATOR_FILE)
        torch.save(self.discriminator_optimizer.state_dict(), directory / DISCRIMINATOR_OPTIMIZER_FILE)

    def load_discriminator(self, directory: Path):
        if not (directory / DISCRIMINATOR_FILE).exists():
            raise ValueError(
                f"{directory} holds no {DISCRIMINATOR_FILE}: it was saved without adversarial_loss_weight"
            )
        self.discriminator.load_state_dict(load_file(directory / DISCRIMINATOR_FILE))
        state = torch.load(directory / DISCRIMINATOR_OPTIMIZER_FILE, weights_only=True)
        self.discriminator_optimizer.load_state_dict(state)


class SaveDiscriminator(TrainerCallback):
    """Puts the discriminator and its optimizer beside the rest of a checkpoint: training state, never published."""

    def __init__(self, trainer: NrccrTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            self.trainer.save_discriminator(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

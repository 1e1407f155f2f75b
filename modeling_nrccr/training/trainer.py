"""`NrccrTrainer` holds the losses and the discriminator, logs each term by name, and ranks over the full split."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchFeature, EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from ..data.collator import KEY_PREFIX, DataCollatorForCrossLingualRetrieval, single_rows, without_images
from ..files import write_file, writing
from ..heads import gather_rows
from ..modeling_nrccr import NrccrModel, NrccrOutput
from ..retrieval.encoding import encode_images, encode_texts, picture_rows
from ..retrieval.metrics import RECALL_AT, compute_retrieval_metrics
from .adversary import LanguageDiscriminator, adversarial_loss, discriminator_loss
from .arguments import NrccrTrainingArguments
from .callbacks import BestWeightsCallback, EpochDecayCallback, TieCallback
from .checkpoints import (
    checkpoint_directory,
    damage,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    remove_old_checkpoints,
)
from .checks import TrainingChecks, fit_batches, not_a_number
from .losses import NrccrLoss, ranking_cross_entropy


logger = logging.get_logger(__name__)

MASKS = (*(f"{prefix}attention_mask" for prefix in KEY_PREFIX.values()), "visual_attention_mask")
TEXT_KEYS = ("input_ids", "attention_mask", "boundary_states")
CALIBRATION_ROWS = 4096
DISCRIMINATOR_FILE = "discriminator.safetensors"
DISCRIMINATOR_OPTIMIZER_FILE = "discriminator_optimizer.pt"


class NrccrTrainer(Trainer):
    r"""
    Trains a [`NrccrModel`] with the terms of [`NrccrLoss`]; one of your own is a [`LossTerm`], named in `args.losses`.

    Args:
        model: The model; `args.trained_text_layers` and `args.train_vision_tower` freeze the rest of it.
        args: [`NrccrTrainingArguments`].
        train_dataset, eval_dataset: Rows with the columns of the builders (`datasets_scripts`).
        processing_class: The model's processor, saved with each checkpoint.
        data_collator: By default [`DataCollatorForCrossLingualRetrieval`] over `processing_class`, or over a
            [`FeatureCache`] given here as `data_collator.processor`.
        discriminator: By default built from `args.discriminator_kind` where `args.losses` has adversarial.
        teacher: A frozen model whose embeddings of the source captions are the teacher's, such as an English-only
            one that the target language is distilled from (arXiv 2004.09813). It reads what `model` reads, so with a
            [`FeatureCache`] it has the same frozen encoder.
        base: The model that `args.train_language` is added to, without it, and its processor: the language is
            calibrated by them. Over a [`FeatureCache`] of the rows' captions that takes no pass through the encoder.

    `torchrun --nproc_per_node n` computes what one process does with the whole batch. Raises ValueError for what
    would not (`NrccrTrainingArguments.check_processes`).
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
        teacher: NrccrModel | None = None,
        base: tuple[NrccrModel, Callable] | None = None,
        **kwargs,
    ):
        args.check_processes(model)
        if model.visual_head is None and not args.text_only:
            raise ValueError("this model embeds texts alone (NrccrConfig.visual_feat_dim is None): set text_only=True")
        groups = isinstance(train_dataset, list) and train_dataset and isinstance(train_dataset[0], list)
        if groups and args.world_size > 1:
            raise ValueError(f"groups of rows differ in size: train them in one process, not {args.world_size}")
        args = copy(args)
        # old checkpoints go when the new one is complete, which is later than the Trainer would do it
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        # the order of the rows: else drawn from the random state, which is each process's own
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        args.logging_nan_inf_filter = False  # it would log 0: `compute_loss` stops instead
        fit_batches(args, train_dataset, eval_dataset)
        self.resumed_state: TrainerState | None = None
        text_layers = None if args.trained_text_layers < 0 else args.trained_text_layers
        if args.train_language is None:
            model.set_trained_layers(text_layers, args.train_vision_tower, args.frozen_dropout, args.train_visual_head)
        else:
            model.train_language(args.train_language)
            if "adversarial" in args.losses and not model.has_lora(args.train_language):
                raise ValueError(
                    "the loss adversarial trains nothing, because no state of the text encoder changes: add the "
                    'language with kind="lora", or leave the loss out'
                )
        if args.distillation_relation == "source" and "distillation" in args.losses and teacher is None:
            raise ValueError(
                'distillation_relation="source" hands on what a teacher knows of both languages: give one'
            )
        model.recompute_passes = args.gradient_cache
        if args.bf16 and args.device.type == "cpu":
            # fused attention over short texts goes backward four times slower in bfloat16 than in its single steps
            model.text_tower.encoder.set_attn_implementation("eager")
        self.teacher = None if teacher is None else teacher.to(args.device).eval()
        self.base = base
        self.nrccr_loss = loss or NrccrLoss.from_arguments(args)
        collator = data_collator or DataCollatorForCrossLingualRetrieval(processing_class)
        collator.views, collator.taught_views = args.needed_views(), args.needed_views(taught=True)
        collator.with_media = not args.text_only
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
        if "adversarial" in args.losses:
            self.discriminator = discriminator or LanguageDiscriminator(
                model.config.text_config.hidden_size, args.discriminator_kind, model.config.pool_padding
            )
            # never in half precision, in which Adam loses its small steps
            self.discriminator.to(args.device, torch.promote_types(model.dtype, torch.float32))
            for parameter in self.discriminator.parameters():  # not wrapped by DDP, which would do this
                parameter.data = broadcast(parameter.data)
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=args.discriminator_learning_rate
            )
        self.add_callback(Checkpoints(self))
        if args.lr_decay_per_epoch != 1 or args.plateau_factor != 1:
            decay = EpochDecayCallback(args.lr_decay_per_epoch, args.plateau_factor, args.plateau_interval)
            self.add_callback(decay)
        self.add_callback(TieCallback())  # before those that ask whether an evaluation is the best so far
        if args.early_stopping_patience > 0:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.keep_best_in_memory:
            self.add_callback(BestWeightsCallback())
        self.checks = TrainingChecks(model)
        self.add_callback(self.checks)

    # ------------------------------------------------------------------------------------------------- the losses

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        inputs = self.pad_to_whole_batch(dict(inputs))
        image_ids, teacher_embeds = inputs.pop("image_ids", None), inputs.pop("teacher_text_embeds", None)
        own_teacher = self.args.needs_teacher() and self.teacher is None and teacher_embeds is None
        outputs = model(**inputs, return_teacher=own_teacher)
        if self.teacher is not None:
            with torch.no_grad():
                source = {key: inputs[key] for key in TEXT_KEYS if key in inputs}
                outputs.teacher_text_embeds = self.teacher.get_text_features(**source).pooler_output
                if self.args.distillation_relation == "source":
                    target = {key: inputs[f"target_{key}"] for key in TEXT_KEYS if f"target_{key}" in inputs}
                    outputs.teacher_target_text_embeds = self.teacher.get_text_features(**target).pooler_output
        if teacher_embeds is not None:
            outputs.teacher_text_embeds = F.normalize(teacher_embeds.to(outputs.logit_scale), dim=-1)
        terms = self.nrccr_loss(*self.gather_batch(outputs, image_ids))
        loss = terms.pop("loss")
        if self.discriminator is not None:
            masks = [self.text_mask(inputs, prefix) for prefix in ("", "target_")]
            terms["discriminator_loss"] = self.discriminator_step(outputs, *masks)
            terms["adversarial_loss"] = self.adversarial_loss(outputs, masks[1])
            loss = loss + self.args.losses["adversarial"] * terms["adversarial_loss"]
        if not torch.isfinite(loss):
            broken = [name for name, term in terms.items() if not torch.isfinite(term)]
            raise ValueError(not_a_number(self.args, self.state, ", ".join(broken) or "the sum of the loss"))
        for name, term in terms.items():
            self.term_history[name].append(term.detach())
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def text_mask(inputs: dict, prefix: str) -> torch.Tensor:
        mask = inputs.get(f"{prefix}attention_mask")
        return torch.ones_like(inputs[f"{prefix}input_ids"]) if mask is None else mask

    def pad_to_whole_batch(self, inputs: dict) -> dict:
        """Pad a part of the batch as far as the longest row of all processes wants it, where padding is pooled too
        (published)."""
        if self.args.world_size == 1 or not self.model.config.pool_padding:
            return inputs
        for name, value in inputs.items():
            frames = name == "visual_feats" or (name == "pixel_values" and value.ndim == 5)
            if frames or name in MASKS or name.endswith(("input_ids", "boundary_states")):
                pad_index = self.model.pad_token_id if name.endswith("input_ids") else 0
                inputs[name] = self.accelerator.pad_across_processes(value, dim=1, pad_index=pad_index)
        return inputs

    def gather_batch(self, outputs: NrccrOutput, image_ids: torch.Tensor | None):
        """Gather the embeddings of all processes, with gradient, so that each computes the loss of the whole batch:
        DDP's mean over processes of these gradients is then the gradient that one process with the whole batch has."""
        if self.args.world_size == 1:
            return outputs, image_ids
        gathered = {
            name: gather_rows(value) if name.endswith("_embeds") else value
            for name, value in outputs.items()
            if value is not None
        }
        return NrccrOutput(**gathered), None if image_ids is None else self.accelerator.gather(image_ids)

    def discriminator_step(self, outputs: NrccrOutput, mask: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Take one step of the discriminator, on detached states, before the encoder's loss is computed through it."""
        loss = discriminator_loss(
            self.judge(outputs.text_hidden_states.detach(), mask),
            self.judge(outputs.target_text_hidden_states.detach(), target_mask),
        )
        self.discriminator_optimizer.zero_grad()
        (self.args.discriminator_weight * loss).backward()
        if self.args.world_size > 1:  # not wrapped by DDP: freezing a wrapped module breaks its reducer
            for parameter in self.discriminator.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.discriminator_optimizer.step()
        return loss

    def judge(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the discriminator's logits of shape `(batch_size, 2)`, in its own precision whatever autocast does
        around."""
        with torch.autocast(states.device.type, enabled=False):
            return self.discriminator(states.to(next(self.discriminator.parameters()).dtype), mask)

    def adversarial_loss(self, outputs: NrccrOutput, target_mask: torch.Tensor) -> torch.Tensor:
        self.discriminator.requires_grad_(False)
        loss = adversarial_loss(self.judge(outputs.target_text_hidden_states, target_mask))
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
        """Return metrics over the full split, both directions, with `args.eval_query_column` as queries, and
        `cross_entropy`, by which evaluations that are equal by `metric_for_best_model` are told apart; a dict of
        datasets gives each its name as a prefix."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            parts = (self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in eval_dataset.items())
            return {key: value for part in parts for key, value in part.items()}
        queries, images, caption_to_image = self.encode_dataset(eval_dataset, self.args.eval_query_column)
        weight, sources = self.args.eval_translation_weight, None
        if weight > 0:
            sources = self.encode_captions(eval_dataset, "source_caption")
        metrics = compute_retrieval_metrics(queries, images, caption_to_image, sources, weight)
        metrics["t2v_sum_recall"] = sum(metrics[f"t2v_recall@{k}"] for k in RECALL_AT)  # what the paper chooses by
        scale = self.accelerator.unwrap_model(self.model).logit_scale.detach().exp().cpu()
        metrics["cross_entropy"] = ranking_cross_entropy(queries, images, caption_to_image, scale)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def encode_dataset(self, dataset, query_column: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return embeddings of the captions in `query_column`, of each picture once (or of its first caption in
        `args.eval_gallery_column`), and the row of each caption's picture `(num_captions,)`; the same on every
        process, each of which encodes a part, none twice."""
        first_rows, caption_to_image = picture_rows([row["image_id"] for row in without_images(dataset)])
        queries, size = self.encode_captions(dataset, query_column), self.args.per_device_eval_batch_size
        rows, gallery = list(first_rows.values()), self.args.eval_gallery_column
        if gallery is not None:
            return queries, self.encode_captions(dataset, gallery)[rows], caption_to_image
        images = self.shared_out(rows, lambda part: self.encode_rows(dataset, part, size))
        return queries, images, caption_to_image

    def encode_captions(self, dataset, column: str) -> torch.Tensor:
        """Embed a column of captions, of shape `(num_rows, projection_dim)`, the same on every process. Raises
        ValueError for a row without one."""
        captions = [row[column] for row in without_images(dataset)]
        for i, caption in enumerate(captions):
            if not caption:
                raise ValueError(f"row {i} has no {column}: translate the data set, or set eval_query_column")
        model, processor = self.accelerator.unwrap_model(self.model), self.data_collator.processor
        size = self.args.per_device_eval_batch_size
        # sorted as `encode_texts` does, so that its batches are the same for any number of processes
        unique = sorted(set(captions), key=lambda caption: (len(caption), caption))
        row = {caption: i for i, caption in enumerate(unique)}
        language = model.language
        if self.args.train_language is not None:  # all other columns are in the base's own
            language = self.args.train_language if column == "target_caption" else None
        with model.using_language(language):
            queries = self.shared_out(unique, lambda part: encode_texts(model, part, processor, size))
        return queries[[row[caption] for caption in captions]]

    def encode_rows(self, dataset, indices: list[int], batch_size: int) -> torch.Tensor:
        model = self.accelerator.unwrap_model(self.model)

        def media(images: list[int], **kwargs):
            return BatchFeature(self.data_collator.media([dataset[i] for i in images]))

        return encode_images(model, indices, media, batch_size)

    def shared_out(self, items: list, encode) -> torch.Tensor:
        """Map `encode` over `items`; whole batches are dealt out to the processes, because with `pool_padding` a row
        depends on its batch. The whole, in order, on each, of shape `(len(items), projection_dim)`."""
        processes, size = self.args.world_size, self.args.per_device_eval_batch_size
        if processes == 1:
            return encode(items)
        mine = [i for i in range(len(items)) if i // size % processes == self.args.process_index]
        embeds = torch.zeros(len(items), self.model.config.projection_dim)
        embeds[mine] = encode([items[i] for i in mine])
        return self.accelerator.reduce(embeds.to(self.args.device), "sum").cpu()  # all others add 0: exact

    # ------------------------------------------------------------------------------------------- batches, schedule

    def get_train_dataloader(self) -> DataLoader:
        """Return the DataLoader as the Trainer does; of a stream too, a last batch that is not full is left out
        (`dataloader_drop_last`)."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        names = ("drop_last", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        options = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        size = self.args.per_device_train_batch_size
        loader = DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator, **options)
        return self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Create the schedule as the Trainer does; a warm-up that would never end takes a tenth of the steps."""
        if (warmup := self.args.get_warmup_steps(num_training_steps)) >= num_training_steps:
            self.args.warmup_steps = num_training_steps // 10
            logger.warning(
                f"warmup_steps={warmup}, but {num_training_steps} steps are trained: {self.args.warmup_steps} instead"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    # ------------------------------------------------------------------------------------------- saving, resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train as the Trainer does; `True` takes the newest whole checkpoint, or starts anew where there is none.
        Raises TimeoutError where another run is writing the same checkpoints."""
        writes = self.args.should_save and self.args.save_strategy != "no"
        with writing(self.args.output_dir) if writes else nullcontext():
            return self.train_alone(resume_from_checkpoint, **kwargs)

    def train_alone(self, resume_from_checkpoint: str | bool | None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"{self.args.output_dir} holds no complete checkpoint: training starts anew")
        elif resume_from_checkpoint and (reason := damage(resume_from_checkpoint)):
            raise ValueError(
                f"the checkpoint {resume_from_checkpoint} {reason}: resume from an earlier one, or with True from the "
                "newest whole one"
            )
        self.resumed_state = None
        self.checks.begin()
        if self.args.train_language is not None and not resume_from_checkpoint:
            self.calibrate_language()
        if resume_from_checkpoint:
            self.resumed_state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))
            if self.discriminator is not None:
                self.load_discriminator(Path(resume_from_checkpoint))
        model = self.accelerator.unwrap_model(self.model)
        if self.args.train_language is not None:  # a checkpoint then holds what is trained, no frozen encoders
            trained = model.language_keys(self.args.train_language)
            counters = "num_batches_tracked"  # of BatchNorm: torch never calls one missing, so it is saved
            model._keys_to_ignore_on_save = {
                key for key in model.state_dict() if key not in trained and not key.endswith(counters)
            }
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            model._keys_to_ignore_on_save = set()

    @torch.no_grad()
    def calibrate_language(self):
        """Set the adapter's shift and the size of its noise, from the first training captions."""
        adapted = self.accelerator.unwrap_model(self.model)
        model, processor = self.base or (adapted, self.data_collator.processor)
        own_language = None if self.base else self.args.train_language  # which the base has not
        rows = list(itertools.islice(single_rows(without_images(self.train_dataset)), CALIBRATION_ROWS))
        states = {}
        for column, language in (("source_caption", None), ("target_caption", own_language)):
            captions = sorted({row[column] for row in rows}, key=lambda text: (len(text), text))  # each once
            row_of = {caption: row for row, caption in enumerate(captions)}
            parts, size = [], self.args.per_device_eval_batch_size
            for start in range(0, len(captions), size):
                inputs = processor(text=captions[start : start + size], return_tensors="pt").to(model.device)
                view = model.text_inputs(
                    inputs.get("input_ids"), inputs["attention_mask"], inputs.get("boundary_states")
                )
                with self.compute_loss_context_manager():  # bf16 where training is
                    parts.append(model.read_text(view, [language] * len(view[1]))[1].float())
            states[column] = torch.cat(parts)[[row_of[row[column]] for row in rows]]
        adapted.adapter(self.args.train_language).calibrate(states["source_caption"], states["target_caption"])

    def set_initial_training_values(self, args, dataloader):
        """Leave no epoch for a run that had ended: the Trainer would take another step before it notices."""
        num_train_epochs, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if (state := self.resumed_state) is not None:
            stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {"args": {}, "attributes": {}})
            patience = stopping["args"].get("early_stopping_patience", 1)
            stopped = stopping["attributes"].get("early_stopping_patience_counter", 0) >= patience
            num_train_epochs = 0 if stopped or state.global_step >= max_steps else num_train_epochs
        return num_train_epochs, *others, max_steps

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if _internal_call and self.args.should_save:  # a checkpoint begins, perhaps over an old one
            mark_incomplete(output_dir)
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # this folder may be published: no pickled file in it
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def save_discriminator(self, directory: Path):
        write_file(directory / DISCRIMINATOR_FILE, save(self.discriminator.state_dict()))
        torch.save(self.discriminator_optimizer.state_dict(), directory / DISCRIMINATOR_OPTIMIZER_FILE)

    def load_discriminator(self, directory: Path):
        if not (directory / DISCRIMINATOR_FILE).exists():
            raise ValueError(f"{directory} holds no {DISCRIMINATOR_FILE}: it was saved without the loss adversarial")
        self.discriminator.load_state_dict(load_file(directory / DISCRIMINATOR_FILE))
        state = torch.load(directory / DISCRIMINATOR_OPTIMIZER_FILE, weights_only=True)
        self.discriminator_optimizer.load_state_dict(state)


class Checkpoints(TrainerCallback):
    """Completes a checkpoint: the discriminator and its optimizer (training state, never published), then the mark
    that nothing is missing; only then are older checkpoints removed."""

    def __init__(self, trainer: NrccrTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:  # else all processes drop the same units; a resumed run reads its random state later
            torch.manual_seed(args.seed + args.process_index)
        best = checkpoint_directory(args.output_dir, state.best_global_step or 0)
        if is_complete(best):  # its recorded path is another where the folder was moved or copied
            state.best_model_checkpoint = str(best)

    def on_save(self, args, state, control, **kwargs):
        directory = checkpoint_directory(args.output_dir, state.global_step)
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            if self.trainer.discriminator is not None:
                self.trainer.save_discriminator(directory)
            mark_complete(directory)
            remove_old_checkpoints(args.output_dir, self.trainer.save_total_limit, state.best_model_checkpoint)

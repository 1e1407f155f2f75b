"""What is checked before, while and after a model is trained, so that no run ends well without having learnt."""

import itertools
import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data.collator import without_images
from .checkpoints import last_complete_checkpoint


logger = logging.get_logger(__name__)

LOGIT_SCALE_LIMIT = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5: unbounded, training becomes unstable


def fit_batches(args, dataset: Iterable | None, eval_dataset: Iterable | None = None):
    """
    Fits batch, accumulation and epochs in `args` to the rows that there are: a batch that is larger than all of them
    would never be filled, and so no step be taken. Of a stream, as many rows are read as one step takes.

    Raises:
        ValueError: so few rows cannot be trained on, or the last batch of an epoch would be of one row; or there are
            none to evaluate on.
    """
    if args.eval_strategy != "no" and has_length(eval_dataset) and len(eval_dataset) == 0:
        raise ValueError("eval_dataset has no rows: hold some out, or set eval_strategy to no")
    if dataset is None:
        return
    processes, size = args.world_size, args.per_device_train_batch_size
    stream, a_step = not has_length(dataset), size * processes * args.gradient_accumulation_steps
    rows = sum(1 for _ in itertools.islice(without_images(dataset), a_step)) if stream else len(dataset)
    if rows < 2 * processes:
        raise ValueError(
            f"train_dataset has {rows} rows, but a row is told apart from others: {2 * processes} are the fewest"
            + (f", two for each of {processes} processes" if processes > 1 else "")
        )
    if args.dataloader_drop_last and rows < size * processes:
        args.per_device_train_batch_size = rows // processes
        logger.warning_once(
            f"{rows} rows are fewer than a batch of {size * processes}: trained in batches of "
            f"{rows // processes * processes} (per_device_train_batch_size={rows // processes})"
        )
        size = rows // processes
    if stream:
        if rows < a_step:  # a stream that ends amid an accumulation takes no step
            args.gradient_accumulation_steps = max(1, rows // (size * processes))
        return
    if not args.dataloader_drop_last and rows % size == 1:
        raise ValueError(
            f"{rows} rows in batches of {size} leave a last one of one row, which has no negatives: set "
            "dataloader_drop_last to True, or another per_device_train_batch_size"
        )
    batches = rows / (size * processes)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps <= 0 and args.num_train_epochs * steps < args.min_steps:
        logger.warning_once(
            f"num_train_epochs={args.num_train_epochs:g} would be {math.ceil(args.num_train_epochs * steps)} steps: "
            f"{math.ceil(args.min_steps / steps)} epochs are trained, for min_steps={args.min_steps}"
        )
        args.num_train_epochs = math.ceil(args.min_steps / steps)


def checksum(model: nn.Module) -> torch.Tensor:
    """Return a checksum of the bits of each parameter that is trained, `(num_parameters,)`: what has moved differs."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    sums = [p.contiguous().view(whole[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


class TrainingChecks(TrainerCallback):
    """
    Stops a run whose gradients are no numbers or that takes no step, keeps `logit_scale` within bounds, and lets no
    evaluation choose weights that have not moved yet (the first step of a warm-up has rate 0).
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.step_before, self.idle_epochs = state.global_step, state.global_step, 0
        scale = getattr(self.model, "logit_scale", None)
        self.scale = scale if scale is not None and scale.requires_grad else None
        # that of SigLIP begins above
        self.limit = max(LOGIT_SCALE_LIMIT, float(scale.detach())) if self.scale is not None else None

    def begin(self):
        """Call before anything is trained or loaded: what moves is compared with the weights of now."""
        self.start, self.moved = checksum(self.model), False

    def has_moved(self) -> bool:
        self.moved = self.moved or not torch.equal(checksum(self.model), self.start)
        return self.moved

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.fp16:  # whose scaler leaves such steps out
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            raise ValueError(not_a_number(args, state, "the gradient (of a loss that is a number itself)"))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.scale is not None:
            self.scale.data.clamp_(max=self.limit)

    def on_step_end(self, args, state, control, **kwargs):
        self.check_evaluation(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.check_evaluation(control)
        # a resumed stream may end before it reaches what is new
        self.idle_epochs = 0 if state.global_step > self.step_before else self.idle_epochs + 1
        if self.idle_epochs > 1:
            raise ValueError(no_step(args))
        self.step_before = state.global_step

    def check_evaluation(self, control):
        if control.should_evaluate and not self.has_moved():
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step == 0:
            raise ValueError(no_step(args))
        self.moved = False  # the best weights have been loaded
        if state.global_step > self.first_step and len(self.start) and not self.has_moved():
            raise ValueError(
                f"nothing was learnt: after {state.global_step} steps the weights are what they were before (the "
                f"learning rate is {args.learning_rate:g}, and rises for "
                f"{args.get_warmup_steps(state.max_steps)} of {state.max_steps} steps): train for more steps, or "
                "look for a term of the loss whose gradient is 0"
            )


def no_step(args) -> str:
    return (
        f"no step was trained: the rows gave no batch of {args.per_device_train_batch_size}. Set a smaller "
        "per_device_train_batch_size or gradient_accumulation_steps, or fewer dataloader_num_workers"
    )


def not_a_number(args, state, what: str) -> str:
    """Return the message about a step whose loss or gradient is NaN or infinite."""
    kept = last_complete_checkpoint(args.output_dir)
    kept = f"{kept} is the last good checkpoint" if kept else "no checkpoint had been written before"
    return (
        f"step {state.global_step + 1}: {what} is NaN or infinite, so training stops and nothing of it is saved; "
        f"{kept}. Look at the rows for values that are no numbers, or lower the learning rate ({args.learning_rate:g})"
    )

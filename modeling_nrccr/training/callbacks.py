"""Callbacks of the Trainer: the schedule of the released code (arXiv 2208.12526), and the best weights in memory.

The rest of the schedule is the Trainer's own: `early_stopping_patience` stops, `metric_for_best_model` chooses.
"""

import math

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class EpochDecayCallback(TrainerCallback, ExportableState):
    r"""
    Multiplies the learning rate that `lr_scheduler_type` gives by `decay` after each epoch, and by `plateau_factor`
    after an epoch whose `metric_for_best_model` was no better than the best before it.

    Args:
        decay (`float`): Published: 0.99.
        plateau_factor (`float`): Published: 0.5.
        plateau_interval (`int`): Epochs that lie at least between two such steps, or before the first. Published: 3.

    Raises ValueError where an epoch is not evaluated, or where a resumed run would forget the steps already taken.
    """

    def __init__(self, decay: float = 0.99, plateau_factor: float = 0.5, plateau_interval: int = 3):
        self.decay, self.plateau_factor, self.plateau_interval = decay, plateau_factor, plateau_interval
        self.plateaus, self.last_plateau = 0, 0

    def state(self) -> dict:
        names = ("decay", "plateau_factor", "plateau_interval")
        counters = ("plateaus", "last_plateau")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in counters},
        }

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.plateaus, self.last_plateau = 0, 0
        if self.plateau_factor == 1:
            return
        if args.eval_strategy != "epoch" or args.metric_for_best_model is None:
            raise ValueError(
                f"plateau_factor={self.plateau_factor} judges each epoch: set eval_strategy to epoch (it is "
                f"{args.eval_strategy.value}) and name a metric_for_best_model, or set plateau_factor to 1"
            )
        if not args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "plateau_factor needs restore_callback_states_from_checkpoint=True: resuming forgets else"
            )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        value = watched(metrics, args)
        if value is None:  # of another data set
            return
        improved = is_better(value, state.best_metric, args)  # the Trainer has not yet counted this evaluation
        epoch = round(state.epoch or 0)
        if not improved and epoch - self.last_plateau >= self.plateau_interval:
            self.plateaus, self.last_plateau = self.plateaus + 1, epoch

    def on_epoch_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        # from the initial rate, not from the last: a resumed run may find either in its checkpoint
        factor = self.decay ** int(state.epoch) * self.plateau_factor**self.plateaus
        for i, group in enumerate(optimizer.param_groups):
            base = group["initial_lr"] * factor
            if lr_scheduler.base_lrs[i]:  # 0 stays 0
                group["lr"] *= base / lr_scheduler.base_lrs[i]
            lr_scheduler.base_lrs[i] = base
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the Trainer logs


class TieCallback(TrainerCallback, ExportableState):
    """Of evaluations that are equal by `metric_for_best_model`, makes the one of the least `eval_cross_entropy` the
    best: a metric that cannot rise any more neither stops a run nor chooses its first evaluation."""

    def __init__(self):
        self.loss = math.inf  # of the best

    def state(self) -> dict:
        return {"args": {}, "attributes": {"loss": self.loss}}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.loss = math.inf

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        value, loss = watched(metrics, args), metrics.get("eval_cross_entropy")
        if value is None or loss is None:
            return
        if value == state.best_metric and loss < self.loss:
            # the Trainer and its callbacks compare with this: the value is then better than the best
            state.best_metric = math.nextafter(value, -math.inf if args.greater_is_better else math.inf)
        if is_better(value, state.best_metric, args):
            self.loss = loss


class BestWeightsCallback(TrainerCallback):
    """Keeps a copy of what trains from the best evaluation by `metric_for_best_model`, and ends the training with it:
    for runs whose checkpoints, frozen encoders and all, would cost more than the training."""

    def __init__(self):
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights = {}

    def on_evaluate(self, args, state, control, metrics, model=None, **kwargs):
        value = watched(metrics, args)
        if value is None or (self.weights and not is_better(value, state.best_metric, args)):
            return
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in frozen}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.weights:
            model.load_state_dict(self.weights, strict=False)


def watched(metrics: dict[str, float], args) -> float | None:
    """Return the value of `metric_for_best_model`; None where these are the metrics of another data set."""
    name = args.metric_for_best_model or ""
    return metrics.get(name if name.startswith("eval_") else f"eval_{name}")


def is_better(value: float, best: float | None, args) -> bool:
    return best is None or (value > best if args.greater_is_better else value < best)

"""`NrccrTrainingArguments`: those of the Trainer, and every weight, margin, temperature and switch of the loss."""

import os
import platform
import shlex
import sys
from dataclasses import dataclass, field

import torch
from accelerate.utils import str_to_bool
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..recipes.limits import check_numbers
from .adversary import KINDS
from .losses import NrccrLossArguments


logger = logging.get_logger(__name__)

LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "max_steps": -1,
    "min_steps": 0,
    "early_stopping_patience": 0,
    "plateau_interval": 1,
    "trained_text_layers": -1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "margin": 0,
    "eval_translation_weight": 0,
}
ABOVE = {
    "num_train_epochs": 0,
    "learning_rate": 0,
    "discriminator_learning_rate": 0,
    "lr_decay_per_epoch": 0,
    "plateau_factor": 0,
    "temperature": 0,
    "feature_distillation_beta": 0,
}


@dataclass
class NrccrTrainingArguments(NrccrLossArguments, TrainingArguments):
    r"""
    Arguments of [`NrccrTrainer`]. The loss's own (`losses`, margins, ...) are those of [`NrccrLossArguments`].

    Raises ValueError where the loss `adversarial` meets a text encoder that is wholly frozen: its gradient
    would be zero.
    """

    trained_text_layers: int = field(
        default=0,
        metadata={
            "help": "Trains the top k layers of the text encoder; 0 freezes all of it, -1 trains all, embeddings too. "
            "Paper, section 4.1: 9 of 12 for pictures, 7 for videos."
        },
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Trains the vision tower. Released code: no."})
    train_visual_head: bool = field(
        default=True, metadata={"help": "False keeps every picture's embedding, and so an index, as it is."}
    )
    train_language: str | None = field(
        default=None,
        metadata={"help": "Trains this language's adapter (`NrccrModel.add_language`) and nothing else of the model."},
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "Trains without pictures: the (teacher's) source caption stands where the picture would."},
    )
    gradient_cache: bool = field(
        default=False,
        metadata={
            "help": "Keeps the output alone of each pass through the text encoder, and computes the rest again: exact "
            "gradients of a large batch in little memory (GradCache, arXiv 2101.06983), for one more forward pass."
        },
    )
    frozen_dropout: bool = field(default=False, metadata={"help": "Dropout inside frozen layers. Released code: on."})
    discriminator_kind: str = field(
        default="not-so-weak",
        metadata={"help": f"One of {', '.join(KINDS)}. Released code: strong for VATEX, else not-so-weak."},
    )
    discriminator_learning_rate: float = field(default=1e-3, metadata={"help": "Its own Adam. Released code: 1e-3."})
    min_steps: int = field(
        default=0,
        metadata={"help": "So many steps at least: more epochs of few rows, where `max_steps` does not say how many."},
    )
    bf16_if_fast: bool = field(
        default=False, metadata={"help": "bf16 on an accelerator or a CPU that has instructions for it."}
    )
    eval_query_column: str = field(
        default="target_caption", metadata={"help": "Column whose captions are the queries of an evaluation."}
    )
    eval_gallery_column: str | None = field(
        default=None, metadata={"help": "Column whose captions are found in an evaluation; default: pictures."}
    )
    keep_best_in_memory: bool = field(
        default=False, metadata={"help": "Ends with the best weights by `metric_for_best_model`, with no checkpoint."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stops after so many evaluations without improvement; 0: never. Paper: 11."}
    )
    lr_decay_per_epoch: float = field(
        default=1.0, metadata={"help": "Multiplies the learning rate after each epoch. Released code: 0.99."}
    )
    plateau_factor: float = field(
        default=1.0, metadata={"help": "Multiplies it after an epoch without improvement. Released code: 0.5."}
    )
    plateau_interval: int = field(
        default=3, metadata={"help": "Epochs between two such steps at least. Released code: 3."}
    )
    eval_translation_weight: float = field(
        default=0.0,
        metadata={"help": "Share of source_caption in the queries of an evaluation; transductive. Released: 0.2."},
    )

    # the Trainer's own, with the values that retrieval needs
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads more than the model."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "A rest of one row has no negatives."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "The best and the last checkpoint are kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "The best by `metric_for_best_model`."})
    metric_for_best_model: str | None = field(
        default="sum_recall", metadata={"help": "Two-sided recall sum on validation. Paper: one-sided."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Of `metric_for_best_model`."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run goes on counting the evaluations of early stopping."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Which parameters have a gradient depends on the terms of the loss."}
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False},
        metadata={
            "help": "Accelerate's. Parts of a streamed batch have different lengths: not dispatched by one process."
        },
    )

    def __post_init__(self):
        if self.bf16_if_fast:
            on_cpu = self.use_cpu or not torch.accelerator.is_available()
            self.bf16 = self.bf16 or (cpu_has_bf16() is True if on_cpu else is_torch_bf16_gpu_available())
        if not torch.accelerator.is_available() and (launched_processes() > 1 or self.bf16):
            self.use_cpu = True  # else accelerate makes no group of processes, each trains alone; and bf16 is refused
        check_numbers(self, LEAST, ABOVE)
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give a number of steps, or -1 for num_train_epochs")
        NrccrLossArguments.__post_init__(self)
        TrainingArguments.__post_init__(self)
        if self.bf16 and self.device.type == "cpu" and cpu_has_bf16() is False:
            logger.warning(
                "bf16=True, but this CPU has no instructions for it: expect eight times the time of float32"
            )
        if self.discriminator_kind not in KINDS:
            raise ValueError(f"discriminator_kind={self.discriminator_kind!r}: one of {', '.join(KINDS)}")
        if "adversarial" in self.losses and self.trained_text_layers == 0 and self.train_language is None:
            raise ValueError(
                "the loss adversarial trains nothing, because the text encoder is wholly frozen: set "
                "trained_text_layers, or leave the loss out"
            )

    def check_processes(self, model: nn.Module | None = None):
        """Raise ValueError for a launch that would not compute what one process does with the whole batch."""
        sharded = {
            "DeepSpeed": self.deepspeed or enabled("ACCELERATE_USE_DEEPSPEED"),
            "FSDP": self.fsdp or enabled("ACCELERATE_USE_FSDP"),
            "Megatron-LM": enabled("ACCELERATE_USE_MEGATRON_LM"),
            "parallelism_config": self.parallelism_config or enabled("ACCELERATE_USE_PARALLELISM_CONFIG"),
        }
        for name, used in sharded.items():
            if used:
                raise ValueError(
                    f"{name} is not supported: nobody has shown that it computes the same. Start with plain torchrun, "
                    "or with one of examples/accelerate_configs"
                )
        if self.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                f"one process on {self.n_gpu} GPUs would be nn.DataParallel, in which rows lose most of their "
                f"negatives. Start one process a GPU:\n    torchrun --nproc_per_node {self.n_gpu} "
                f"{shlex.join(sys.argv)}\nor choose one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        if launched_processes() > 1 and self.world_size == 1:
            raise ValueError(
                f"{launched_processes()} processes were started, but each would train alone and overwrite the others' "
                "files, because accelerate knows no way to connect them: use one process, or set use_cpu=True"
            )
        if self.world_size == 1:
            return
        if not self.dataloader_drop_last:
            raise ValueError(
                f"dataloader_drop_last=False with {self.world_size} processes would fill the last batch with rows of "
                "the first: set it to True"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} with {self.world_size} processes: each "
                "would draw an order of its own, and rows would be doubled and lost. Set it to random"
            )
        tower = getattr(model, "visual_tower", None)
        if self.train_vision_tower and tower is not None:
            if any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) for module in tower.modules()):
                raise ValueError(
                    f"train_vision_tower=True with {self.world_size} processes: the BatchNorm of this vision tower "
                    "would see each process's part of a batch. Leave the tower frozen, or train in one process"
                )


def cpu_has_bf16() -> bool | None:
    """Tell whether products of bfloat16 matrices are faster than those of float32: twice with avx512_bf16. Return None
    of processors that nothing is known of here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def launched_processes() -> int:
    """Return as many processes as torchrun says that it has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def enabled(variable: str) -> bool:
    """Tell whether `accelerate launch` has set this variable of the environment."""
    return bool(str_to_bool(os.environ.get(variable, "false")))

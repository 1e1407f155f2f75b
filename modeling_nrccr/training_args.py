"""`NrccrTrainingArguments`: those of the Trainer, and every weight, margin, temperature and switch of the loss."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .discriminator import KINDS
from .losses import NrccrLossArguments


@dataclass
class NrccrTrainingArguments(NrccrLossArguments, TrainingArguments):
    r"""
    Arguments of [`NrccrTrainer`]. The loss's own (weights, margins, ...) are those of [`NrccrLossArguments`].

    Raises ValueError where `adversarial_loss_weight > 0` meets a text encoder that is wholly frozen: its gradient
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
    frozen_dropout: bool = field(default=False, metadata={"help": "Dropout inside frozen layers. Released code: on."})
    discriminator_kind: str = field(
        default="not-so-weak",
        metadata={"help": f"One of {', '.join(KINDS)}. Released code: strong for VATEX, else not-so-weak."},
    )
    discriminator_learning_rate: float = field(default=1e-3, metadata={"help": "Its own Adam. Released code: 1e-3."})
    eval_query_column: str = field(
        default="target_caption", metadata={"help": "Column whose captions are the queries of an evaluation."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stops after so many evaluations without improvement; 0: never. Paper: 11."}
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

    def __post_init__(self):
        super().__post_init__()
        if self.discriminator_kind not in KINDS:
            raise ValueError(f"discriminator_kind={self.discriminator_kind!r}: one of {', '.join(KINDS)}")
        if self.adversarial_loss_weight > 0 and self.trained_text_layers == 0:
            raise ValueError(
                f"adversarial_loss_weight={self.adversarial_loss_weight} trains nothing, because the text encoder is "
                "wholly frozen: set trained_text_layers, or the weight to 0"
            )

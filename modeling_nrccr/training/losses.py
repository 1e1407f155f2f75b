"""The terms of the method: as pure functions, as classes with a name (`LOSSES`), and weighed by `NrccrLoss`.

The defaults repair the released behaviour; `NrccrLoss.published()` has the settings of the paper (arXiv 2208.12526).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch.nn import functional as F

from ..heads import clip_loss
from ..modeling_nrccr import NrccrOutput
from ..recipes.mappings import read_mapping
from ..registry import Registry


LOSSES = Registry(
    "loss",
    {
        "triplet": ".losses:Triplet",
        "contrastive": ".losses:Contrastive",
        "target_triplet": ".losses:TargetTriplet",
        "target_contrastive": ".losses:TargetContrastive",
        "distillation": ".losses:Distillation",
        "feature_distillation": ".losses:FeatureDistillation",
        "back_translation": ".losses:BackTranslation",
        "adversarial": ".adversary:Adversarial",
    },
    __package__,
)
REPAIRED_LOSSES = {
    "contrastive": 1.0,
    "target_contrastive": 0.6,
    "distillation": 0.4,
    "feature_distillation": 0.1,
    "back_translation": 0.5,
}
PUBLISHED_LOSSES = {  # paper, section 4.1; triplet and adversarial: released code
    "triplet": 1.0,
    "target_triplet": 0.6,
    "distillation": 0.4,
    "feature_distillation": 0.1,
    "back_translation": 0.5,
    "adversarial": 0.001,
}
MEASURES = ("cosine", "order", "euclidean", "l1", "l2", "l1_norm", "l2_norm")
SINKHORN_STEPS = 20


def same_item(image_ids: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """Return a boolean `(size, size)`: pairs off the diagonal that show the same picture, so are no negatives."""
    if image_ids is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    same = image_ids[:, None] == image_ids[None, :]
    return same & ~torch.eye(size, dtype=torch.bool, device=device)


def similarities(a: torch.Tensor, b: torch.Tensor, measure: str = "cosine") -> torch.Tensor:
    """Return similarities `(n, n)`, b in rows. "order" is the negative order violation |max(b - a, 0)| (VSE++, arXiv
    1707.05612); "euclidean" and "l2" are the negative squared distance, "l1" the negative sum of absolute differences.
    "l1_norm" and "l2_norm" are, as released, the POSITIVE mean over the width, so they push pairs apart: kept for
    parity alone. Raises ValueError for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"triplet_measure={measure!r}: one of {', '.join(MEASURES)}")
    if measure == "cosine":
        return b @ a.t()
    difference = b[:, None, :] - a[None, :, :]
    if measure == "order":
        return -torch.linalg.vector_norm(difference.clamp(min=0), dim=-1)  # its gradient at 0 is 0, that of sqrt NaN
    distance = difference.abs() if measure.startswith("l1") else difference.pow(2)
    return distance.mean(-1) if measure.endswith("_norm") else -distance.sum(-1)


def triplet_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    ignored: torch.Tensor,
    margin: float = 0.2,
    hardest: bool = True,
    reduction: str = "mean",
    direction: str = "all",
    measure: str = "cosine",
) -> torch.Tensor:
    """Return the hinge on the hardest (or on every) negative, both ways (paper, eq. 8; VSE++, arXiv 1707.05612).

    a, b: `(n, dim)`, pairs in rows; ignored: boolean `(n, n)`, pairs that are no negatives. "mean" averages over all
    hinges of each direction (released: a plain sum), and the two directions add up.
    """
    scores = similarities(a, b, measure)
    positives = scores.diagonal()
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    total = scores.new_zeros(())
    for way, dim in (("t2v", 1), ("v2t", 0)):
        if direction not in (way, "all"):
            continue
        hinges = (margin + scores - positives.unsqueeze(dim)).clamp(min=0).masked_fill(diagonal | ignored, 0)
        if hardest:
            hinges = hinges.amax(dim)
        total = total + (hinges.sum() if reduction == "sum" else hinges.mean())
    return total


def mean_of_pairs(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of one value a pair, `(n,)`; with `weights` `(n,)` their weighted mean."""
    return values.mean() if weights is None else (weights * values).sum() / weights.sum().clamp(min=1e-6)


def agreement_weights(source: torch.Tensor, back_translation: torch.Tensor) -> torch.Tensor:
    """Return weights `(n,)` in 0..1: how far a caption and its back-translation, both `(n, dim)`, agree beyond what
    unrelated captions of the batch do. By a frozen encoder, as OSA weighs pairs (arXiv 2410.01944): the excess is
    squared; its factor `1 - excess^2`, made for the small cosines of text and picture, would give perfect agreement no
    weight, and is left out."""
    cosines = source @ back_translation.t()
    unrelated = (cosines.sum() - cosines.trace()) / max(1, cosines.numel() - len(cosines))
    return ((cosines.diagonal() - unrelated) / (1 - unrelated).clamp(min=1e-6)).clamp(0, 1).square().detach()


@torch.no_grad()
def transport_weights(
    anchors: Sequence[torch.Tensor], target: torch.Tensor, ignored: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """Return weights `(n,)` in 0..1: the share of each target caption that the best transport of the batch's anchors
    to its target captions, all `(n, dim)`, leaves in its own place; averaged over the kinds of anchors, sources and
    pictures. By embeddings that are being learned, so that confidence grows with them. After DCOT (arXiv 2309.05451),
    whose costs and schedule of the two views are its own."""
    shares = []
    for anchor in anchors:
        plan = (anchor @ target.t() / temperature).masked_fill(ignored, float("-inf"))
        for _ in range(SINKHORN_STEPS):  # Sinkhorn's, in logarithms: rows and columns that sum to 1
            plan = plan.log_softmax(0).log_softmax(1)
        shares.append(plan.diagonal().exp())
    return torch.stack(shares).mean(0)


def ranking_cross_entropy(
    queries: torch.Tensor, items: torch.Tensor, owner: torch.Tensor, scale: torch.Tensor, rows: int = 4096
) -> float:
    """Return the softmax cross-entropy of `queries` `(n, dim)` over all `items` `(m, dim)`, of which `owner` `(n,)` is
    each query's: what recalls measure, but without their steps."""
    losses = [
        F.cross_entropy(scale * part @ items.t(), own, reduction="sum")
        for part, own in zip(queries.split(rows), owner.split(rows))
    ]
    return float(sum(losses)) / max(1, len(queries))


def contrastive_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    ignored: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the symmetric softmax contrast (InfoNCE, arXiv 1807.03748; CLIP, arXiv 2103.00020) of `(n, dim)` and `(n,
    dim)`."""
    logits = (scale * b @ a.t()).masked_fill(ignored, float("-inf"))
    return clip_loss(logits, lambda values: mean_of_pairs(values, weights))


def distillation_loss(
    items: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    ignored: torch.Tensor,
    temperature: float,
    detach_targets: bool,
    weights: torch.Tensor | None = None,
    teacher_items: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of the similarity view: the teacher's softmax over the batch is the student's soft target, both
    ways (eq. 10-11).

    items, student, teacher: `(n, dim)`; teacher_items: what the teacher is compared with, by default `items`.
    `detach_targets=False` lets targets carry gradient through `items`, as released; the teacher itself is always
    detached.
    """
    terms, known = [], items if teacher_items is None else teacher_items
    for flip in (False, True):
        target, logits = known @ teacher.detach().t() / temperature, items @ student.t() / temperature
        target, logits = (
            (matrix.t() if flip else matrix).masked_fill(ignored, float("-inf")) for matrix in (target, logits)
        )
        target = (target.detach() if detach_targets else target).softmax(1)
        # a masked pair has target 0 and log-probability -inf, whose product must count as 0
        values = -(target * logits.log_softmax(1).masked_fill(ignored, 0)).sum(1)
        terms.append(mean_of_pairs(values, weights))
    return sum(terms) / 2


def feature_distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    beta: float,
    detach_targets: bool,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of the feature view: the target embedding is pulled to the teacher's (paper, eq. 12).

    "cosine" is 1 - cosine, in 0..2. "smooth_l1" is as released: on unit vectors it is their mean squared difference
    over 2 beta, near 1e-4, and has no effect.
    """
    teacher = teacher.detach() if detach_targets else teacher
    if kind == "cosine":
        return mean_of_pairs(1 - (student * teacher).sum(-1), weights)
    return mean_of_pairs(F.smooth_l1_loss(student, teacher, beta=beta, reduction="none").mean(-1), weights)


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


def read_losses(losses: Mapping[str, float] | str | None) -> dict[str, float]:
    """
    Return the weight of each loss that is on, in the order in which they are added up: that of `LOSSES`, then those of
    others as they were named. A weight of 0 is off.

    Raises:
        ValueError: a loss that there is not, a class that is none, a weight that is no positive number.
    """
    losses = read_mapping(losses, "losses")
    for name, weight in losses.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"losses: {name}={weight!r}, but a weight is a number, 0 or more")
        if not (isinstance(LOSSES[name], type) and issubclass(LOSSES[name], LossTerm)):
            raise ValueError(f"losses: {name} is no subclass of modeling_nrccr.LossTerm")
    order = [name for name in LOSSES if name in losses] + [name for name in losses if name not in LOSSES.entries]
    return {name: losses[name] for name in order if losses[name]}


@dataclass
class NrccrLossArguments:
    """Weights, margins, temperatures and switches of the loss."""

    losses: dict | str | None = field(
        default_factory=lambda: dict(REPAIRED_LOSSES),
        metadata={
            "help": "Losses and their weights, of those that `nrccr list losses` lists, or your own as module:Class; "
            "what is not named is off. Published: triplet=1,target_triplet=0.6,distillation=0.4,"
            "feature_distillation=0.1,back_translation=0.5,adversarial=0.001."
        },
    )
    discriminator_weight: float = setting(1.0, "Of the discriminator's own step. Released code: 1.")
    margin: float = setting(0.2, "Margin of every hinge. Paper, section 4.1: 0.2.")
    temperature: float = setting(0.07, "Of the similarity view. Paper, section 4.1: 0.07.")
    hardest_negatives: bool = setting(True, "Hinge on the hardest negative only (VSE++). Released code: true.")
    triplet_reduction: Literal["mean", "sum"] = setting("mean", "Over the batch. Released code: sum.")
    triplet_direction: Literal["all", "t2v", "v2t"] = setting("all", "Released code: all.")
    triplet_measure: Literal[MEASURES] = setting("cosine", "Similarity of the hinge. Released code: cosine.")
    back_translation_objective: Literal["contrastive", "triplet"] = setting("contrastive", "Paper: triplet.")
    feature_distillation_kind: Literal["cosine", "smooth_l1"] = setting("cosine", "Released code: smooth_l1, null.")
    feature_distillation_beta: float = setting(4.0, "Of smooth_l1. Released code: 4.")
    detach_targets: bool = setting(True, "No gradient through soft targets. Released code: false.")
    pair_weighting: Literal["none", "agreement", "transport"] = setting(
        "none",
        "Weight of a target caption in softmax and distillation terms. agreement: of source and back-translation; "
        "transport: confidence by optimal transport (DCOT).",
    )
    distillation_relation: Literal["picture", "source"] = setting(
        "picture", "Whose similarities the similarity view hands on: the teacher's to pictures, or to sources (CL2CM)."
    )
    mask_same_image: bool = setting(True, "Captions of one picture are never negatives. Released code: false.")

    PUBLISHED = dict(
        losses=PUBLISHED_LOSSES,
        triplet_reduction="sum",
        back_translation_objective="triplet",
        feature_distillation_kind="smooth_l1",
        detach_targets=False,
        mask_same_image=False,
    )

    RENAMED = {f"{name}_loss_weight": f"losses: {{{name}: ...}}" for name in LOSSES} | {
        "discriminator_loss_weight": "discriminator_weight",
        "eval_source_query_weight": "eval_translation_weight",
    }

    def __post_init__(self):
        self.losses = read_losses(self.losses)

    def read_by_terms(self) -> set[str]:
        """Return what any term reads: views of a caption, and "teacher"."""
        return {view for name in self.losses for view in LOSSES[name].reads}

    def needed_views(self, taught: bool = False) -> tuple[str, ...]:
        """Return which views of a caption any term reads; the others need not be encoded. `taught`: the rows bring the
        teacher's embeddings of the source captions (and stand for pictures where there are none)."""
        read = self.read_by_terms()
        if self.pair_weighting == "agreement":
            read.add("back_translation")
        if not taught or "back_translation" in read:
            read.add("source")
        return tuple(view for view in ("source", "target", "back_translation") if view in read)

    def needs_teacher(self) -> bool:
        return "teacher" in self.read_by_terms()


class LossTerm:
    """
    One loss: subclass it, name it as `my_module:MyLoss` in `losses`, and it is trained on, weighed and logged.

    Attributes:
        reads: what it reads: "source", "target" and "back_translation" are views of a caption, which are encoded only
            where they are read; "teacher" is the teacher's embedding of the source.
        by_trainer: the Trainer computes it, which has more than a model's output.
        loss: the `NrccrLoss` it is a term of, which has `embeds`, `items`, `pair_weights`, `hinge`.
        settings: [`NrccrLossArguments`].
    """

    reads: tuple[str, ...] = ()
    by_trainer = False

    def __init__(self, loss: "NrccrLoss"):
        self.loss, self.settings = loss, loss.settings

    def __call__(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        """
        Return the loss, unweighted, a scalar.

        Args:
            outputs: embeddings of the batch, L2-normalised, `(n, dim)` each.
            ignored: boolean `(n, n)`, pairs that show the same picture, so are no negatives.
        """
        raise NotImplementedError


class Triplet(LossTerm):
    """Hinge on negatives, source caption and picture."""

    reads = ("source",)

    def __call__(self, outputs, ignored):
        return self.loss.hinge(self.loss.items(outputs), self.loss.embeds(outputs, "text_embeds"), ignored)


class Contrastive(LossTerm):
    """Softmax contrast, source caption and picture (CLIP, arXiv 2103.00020)."""

    reads = ("source",)

    def __call__(self, outputs, ignored):
        text = self.loss.embeds(outputs, "text_embeds")
        return contrastive_loss(self.loss.items(outputs), text, ignored, outputs.logit_scale)


class TargetTriplet(LossTerm):
    """Hinge on negatives, target caption and picture."""

    reads = ("target",)

    def __call__(self, outputs, ignored):
        return self.loss.hinge(self.loss.items(outputs), self.loss.embeds(outputs, "target_text_embeds"), ignored)


class TargetContrastive(LossTerm):
    """Softmax contrast, target caption and picture."""

    reads = ("target",)

    def __call__(self, outputs, ignored):
        text, weights = self.loss.embeds(outputs, "target_text_embeds"), self.loss.pair_weights(outputs, ignored)
        return contrastive_loss(self.loss.items(outputs), text, ignored, outputs.logit_scale, weights)


class Distillation(LossTerm):
    """Similarity view: the target caption's similarities to the batch's pictures are to be its teacher's."""

    reads = ("target", "teacher")

    def __call__(self, outputs, ignored):
        student, teacher = (self.loss.embeds(outputs, f"{who}_text_embeds") for who in ("target", "teacher"))
        s, items, weights = self.settings, self.loss.items(outputs), self.loss.pair_weights(outputs, ignored)
        known = None
        if s.distillation_relation == "source":
            known, teacher = teacher, self.loss.embeds(outputs, "teacher_target_text_embeds")
        return distillation_loss(items, student, teacher, ignored, s.temperature, s.detach_targets, weights, known)


class FeatureDistillation(LossTerm):
    """Feature view: the target caption's embedding is pulled to its teacher's."""

    reads = ("target", "teacher")

    def __call__(self, outputs, ignored):
        student, teacher = (self.loss.embeds(outputs, f"{who}_text_embeds") for who in ("target", "teacher"))
        s, weights = self.settings, self.loss.pair_weights(outputs, ignored)
        return feature_distillation_loss(
            student, teacher, s.feature_distillation_kind, s.feature_distillation_beta, s.detach_targets, weights
        )


class BackTranslation(LossTerm):
    """Cycle: a source caption finds its back-translation."""

    reads = ("source", "back_translation")

    def __call__(self, outputs, ignored):
        source = self.loss.embeds(outputs, "text_embeds")
        back = self.loss.embeds(outputs, "back_translation_text_embeds")
        if self.settings.back_translation_objective == "triplet":
            return self.loss.hinge(source, back, ignored)
        return contrastive_loss(source, back, ignored, outputs.logit_scale)


class NrccrLoss:
    """`NrccrLoss(losses={"contrastive": 1.0}, **settings)(outputs, image_ids=None) -> dict[str, Tensor]`: every term,
    unweighted, and `loss`, their weighted sum. A term is called as it is logged: `contrastive_loss`, and one of others
    by its whole name, `my_module:MyLoss`. The discriminator's two terms are the Trainer's.

    Settings are the fields of [`NrccrLossArguments`]. Without pictures (`image_embeds` None) the teacher's embedding
    of the source caption, or where there is no teacher the source caption's own, stands where the picture would.
    Raises ValueError for a batch of one (it has no negatives) and for a term whose view the output lacks.
    """

    def __init__(self, **settings: Any):
        self.settings = NrccrLossArguments(**settings)
        self.terms: dict[str, LossTerm] = {}
        self.weights: dict[str, float] = {}
        for name, weight in self.settings.losses.items():
            if not LOSSES[name].by_trainer:
                logged = f"{name}_loss" if name in LOSSES.entries else name
                self.terms[logged], self.weights[logged] = LOSSES[name](self), weight

    @classmethod
    def published(cls, **settings) -> "NrccrLoss":
        """Return the loss with the settings of the paper and its released code."""
        return cls(**(NrccrLossArguments.PUBLISHED | settings))

    @classmethod
    def from_arguments(cls, arguments: NrccrLossArguments) -> "NrccrLoss":
        """Return the loss of anything that has the fields, such as [`NrccrTrainingArguments`]."""
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(NrccrLossArguments)})

    def __call__(self, outputs: NrccrOutput, image_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        items = self.items(outputs)
        size, device = len(items), items.device
        if size < 2:
            raise ValueError("a batch of one has no negatives: train with at least 2 rows a batch")
        if not self.terms:
            raise ValueError("no loss is on: name at least one in losses, such as contrastive=1")
        ignored = same_item(image_ids if self.settings.mask_same_image else None, size, device)
        terms = {name: term(outputs, ignored) for name, term in self.terms.items()}
        return terms | {"loss": sum(self.weights[name] * term for name, term in terms.items())}

    def embeds(self, outputs: NrccrOutput, name: str) -> torch.Tensor:
        value = getattr(outputs, name)
        if value is None:
            raise ValueError(f"this loss reads {name}, which the output lacks: give that view or leave that loss out")
        return value

    def items(self, outputs: NrccrOutput) -> torch.Tensor:
        """Return what captions are to find, `(n, dim)`: pictures, or texts of the source language in their place.
        Raises ValueError without pictures for the losses triplet and contrastive."""
        if outputs.image_embeds is not None:
            return outputs.image_embeds
        if outputs.teacher_text_embeds is not None:
            return outputs.teacher_text_embeds.detach()
        if self.settings.losses.keys() & {"triplet", "contrastive"}:
            raise ValueError(
                "without pictures the source captions would be their own answer: leave the losses triplet and "
                "contrastive out"
            )
        return self.embeds(outputs, "text_embeds")

    def pair_weights(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor | None:
        if self.settings.pair_weighting == "none":
            return None
        if self.settings.pair_weighting == "transport":
            source = outputs.teacher_text_embeds if outputs.text_embeds is None else outputs.text_embeds
            anchors = [embeds for embeds in (source, outputs.image_embeds) if embeds is not None]
            return transport_weights(anchors, self.embeds(outputs, "target_text_embeds"), ignored)
        views = ("text_embeds", "back_translation_text_embeds")
        return agreement_weights(*(self.embeds(outputs, view) for view in views))

    def hinge(self, a: torch.Tensor, b: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
        s = self.settings
        return triplet_loss(
            a, b, ignored, s.margin, s.hardest_negatives, s.triplet_reduction, s.triplet_direction, s.triplet_measure
        )

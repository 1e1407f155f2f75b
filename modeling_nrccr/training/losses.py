"""The terms of the method as pure functions, and `NrccrLoss`, which names and weighs them over a model's output.

The defaults repair the released behaviour; `NrccrLoss.published()` has the settings of the paper (arXiv 2208.12526).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch.nn import functional as F

from ..heads import clip_loss
from ..modeling_nrccr import NrccrOutput


MEASURES = ("cosine", "order", "euclidean", "l1", "l2", "l1_norm", "l2_norm")
SINKHORN_STEPS = 20


def same_item(image_ids: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """Boolean `(size, size)`: pairs off the diagonal that show the same picture, so are no negatives."""
    if image_ids is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    same = image_ids[:, None] == image_ids[None, :]
    return same & ~torch.eye(size, dtype=torch.bool, device=device)


def similarities(a: torch.Tensor, b: torch.Tensor, measure: str = "cosine") -> torch.Tensor:
    """`(n, n)`, b in rows. "order" is the negative order violation |max(b - a, 0)| (VSE++, arXiv 1707.05612);
    "euclidean" and "l2" are the negative squared distance, "l1" the negative sum of absolute differences. "l1_norm"
    and "l2_norm" are, as released, the POSITIVE mean over the width, so they push pairs apart: kept for parity alone.
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
    """Hinge on the hardest (or on every) negative, both ways (paper, eq. 8; VSE++, arXiv 1707.05612).

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
    """Of one value a pair, `(n,)`; with `weights` `(n,)` their weighted mean."""
    return values.mean() if weights is None else (weights * values).sum() / weights.sum().clamp(min=1e-6)


def agreement_weights(source: torch.Tensor, back_translation: torch.Tensor) -> torch.Tensor:
    """`(n,)` in 0..1: how far a caption and its back-translation, both `(n, dim)`, agree beyond what unrelated
    captions of the batch do. By a frozen encoder, as OSA weighs pairs (arXiv 2410.01944): the excess is squared; its
    factor `1 - excess^2`, made for the small cosines of text and picture, would give perfect agreement no weight, and
    is left out."""
    cosines = source @ back_translation.t()
    unrelated = (cosines.sum() - cosines.trace()) / max(1, cosines.numel() - len(cosines))
    return ((cosines.diagonal() - unrelated) / (1 - unrelated).clamp(min=1e-6)).clamp(0, 1).square().detach()


@torch.no_grad()
def transport_weights(
    anchors: Sequence[torch.Tensor], target: torch.Tensor, ignored: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """`(n,)` in 0..1: the share of each target caption that the best transport of the batch's anchors to its target
    captions, all `(n, dim)`, leaves in its own place; averaged over the kinds of anchors, sources and pictures. By
    embeddings that are being learned, so that confidence grows with them. After DCOT (arXiv 2309.05451),
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
    """Softmax cross-entropy of `queries` `(n, dim)` over all `items` `(m, dim)`, of which `owner` `(n,)` is each
    query's: what recalls measure, but without their steps."""
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
    """Symmetric softmax contrast (InfoNCE, arXiv 1807.03748; CLIP, arXiv 2103.00020) of `(n, dim)` and `(n, dim)`."""
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
    """Similarity view: the teacher's softmax over the batch is the student's soft target, both ways (eq. 10-11).

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
    """Feature view: the target embedding is pulled to the teacher's (paper, eq. 12).

    "cosine" is 1 - cosine, in 0..2. "smooth_l1" is as released: on unit vectors it is their mean squared difference
    over 2 beta, near 1e-4, and has no effect.
    """
    teacher = teacher.detach() if detach_targets else teacher
    if kind == "cosine":
        return mean_of_pairs(1 - (student * teacher).sum(-1), weights)
    return mean_of_pairs(F.smooth_l1_loss(student, teacher, beta=beta, reduction="none").mean(-1), weights)


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class NrccrLossArguments:
    """Weights, margins, temperatures and switches of the loss. A weight of 0 switches a term off."""

    triplet_loss_weight: float = setting(0.0, "Hinge, source caption and picture. Paper: 1.")
    contrastive_loss_weight: float = setting(1.0, "Softmax contrast, source caption and picture (CLIP). Paper: 0.")
    target_triplet_loss_weight: float = setting(0.0, "Hinge, target caption and picture. Paper, section 4.1: 0.6.")
    target_contrastive_loss_weight: float = setting(0.6, "Softmax contrast, target caption and picture. Paper: 0.")
    distillation_loss_weight: float = setting(0.4, "Similarity view of the teacher. Paper, section 4.1: 0.4.")
    feature_distillation_loss_weight: float = setting(0.1, "Feature view of the teacher. Paper, section 4.1: 0.1.")
    back_translation_loss_weight: float = setting(0.5, "Cycle: source and back-translation. Paper, section 4.1: 0.5.")
    adversarial_loss_weight: float = setting(0.0, "Fooling the discriminator. Released code: 0.001.")
    discriminator_loss_weight: float = setting(1.0, "The discriminator's own step. Released code: 1.")
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
        triplet_loss_weight=1.0,
        contrastive_loss_weight=0.0,
        target_triplet_loss_weight=0.6,
        target_contrastive_loss_weight=0.0,
        distillation_loss_weight=0.4,
        feature_distillation_loss_weight=0.1,
        back_translation_loss_weight=0.5,
        adversarial_loss_weight=0.001,
        triplet_reduction="sum",
        back_translation_objective="triplet",
        feature_distillation_kind="smooth_l1",
        detach_targets=False,
        mask_same_image=False,
    )

    def needed_views(self, taught: bool = False) -> tuple[str, ...]:
        """Which views of a caption any term reads; the others need not be encoded. `taught`: the rows bring the
        teacher's embeddings of the source captions (and stand for pictures where there are none)."""
        target = self.target_triplet_loss_weight or self.target_contrastive_loss_weight
        target = target or self.needs_teacher() or self.adversarial_loss_weight
        back = self.back_translation_loss_weight or self.pair_weighting == "agreement"
        source = not taught or back or self.triplet_loss_weight or self.contrastive_loss_weight
        source = source or self.adversarial_loss_weight
        views = {"source": source, "target": target, "back_translation": back}
        return tuple(view for view, needed in views.items() if needed)

    @staticmethod
    def without_terms() -> dict[str, float]:
        """Weight 0 for every term, those that come later too: to say what is trained by naming what is not 0."""
        return {f"{term}_weight": 0.0 for term in (*TERMS, "adversarial_loss")}

    def needs_teacher(self) -> bool:
        return bool(self.distillation_loss_weight or self.feature_distillation_loss_weight)


class NrccrLoss:
    """`NrccrLoss(**settings)(outputs, image_ids=None) -> dict[str, Tensor]`: every term, unweighted and by name, and
    `loss`, their weighted sum. The discriminator's two terms are the Trainer's.

    Settings are the fields of [`NrccrLossArguments`]. Without pictures (`image_embeds` None) the teacher's embedding
    of the source caption, or where there is no teacher the source caption's own, stands where the picture would.
    Raises ValueError for a batch of one (it has no negatives) and for a term whose view the output lacks.
    """

    def __init__(self, **settings):
        self.settings = NrccrLossArguments(**settings)
        self.terms = {name: getattr(self, name) for name in TERMS}  # a trainer puts its own methods here

    @classmethod
    def published(cls, **settings) -> "NrccrLoss":
        """The settings of the paper and its released code."""
        return cls(**(NrccrLossArguments.PUBLISHED | settings))

    @classmethod
    def from_arguments(cls, arguments: NrccrLossArguments) -> "NrccrLoss":
        """From anything that has the fields, such as [`NrccrTrainingArguments`]."""
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(NrccrLossArguments)})

    def weight(self, term: str) -> float:
        return getattr(self.settings, f"{term}_weight")

    def __call__(self, outputs: NrccrOutput, image_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        items = self.items(outputs)
        size, device = len(items), items.device
        if size < 2:
            raise ValueError("a batch of one has no negatives: train with at least 2 rows a batch")
        ignored = same_item(image_ids if self.settings.mask_same_image else None, size, device)
        terms = {name: term(outputs, ignored) for name, term in self.terms.items() if self.weight(name)}
        if not terms:
            raise ValueError("every weight is 0: give at least one term of the loss a weight")
        return terms | {"loss": sum(self.weight(name) * term for name, term in terms.items())}

    def embeds(self, outputs: NrccrOutput, name: str) -> torch.Tensor:
        value = getattr(outputs, name)
        if value is None:
            raise ValueError(f"this loss reads {name}, which the output lacks: give that view or set its weight to 0")
        return value

    def items(self, outputs: NrccrOutput) -> torch.Tensor:
        """What captions are to find, `(n, dim)`: pictures, or texts of the source language in their place."""
        if outputs.image_embeds is not None:
            return outputs.image_embeds
        if outputs.teacher_text_embeds is not None:
            return outputs.teacher_text_embeds.detach()
        if self.settings.triplet_loss_weight or self.settings.contrastive_loss_weight:
            raise ValueError(
                "without pictures the source captions would be their own answer: set triplet_loss_weight and "
                "contrastive_loss_weight to 0"
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

    def triplet_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        return self.hinge(self.items(outputs), self.embeds(outputs, "text_embeds"), ignored)

    def contrastive_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        text = self.embeds(outputs, "text_embeds")
        return contrastive_loss(self.items(outputs), text, ignored, outputs.logit_scale)

    def target_triplet_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        return self.hinge(self.items(outputs), self.embeds(outputs, "target_text_embeds"), ignored)

    def target_contrastive_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        text, weights = self.embeds(outputs, "target_text_embeds"), self.pair_weights(outputs, ignored)
        return contrastive_loss(self.items(outputs), text, ignored, outputs.logit_scale, weights)

    def distillation_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        student, teacher = (self.embeds(outputs, f"{who}_text_embeds") for who in ("target", "teacher"))
        s, items, weights, known = self.settings, self.items(outputs), self.pair_weights(outputs, ignored), None
        if s.distillation_relation == "source":
            known, teacher = teacher, self.embeds(outputs, "teacher_target_text_embeds")
        return distillation_loss(items, student, teacher, ignored, s.temperature, s.detach_targets, weights, known)

    def feature_distillation_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        student, teacher = (self.embeds(outputs, f"{who}_text_embeds") for who in ("target", "teacher"))
        s, weights = self.settings, self.pair_weights(outputs, ignored)
        return feature_distillation_loss(
            student, teacher, s.feature_distillation_kind, s.feature_distillation_beta, s.detach_targets, weights
        )

    def back_translation_loss(self, outputs: NrccrOutput, ignored: torch.Tensor) -> torch.Tensor:
        source, back = self.embeds(outputs, "text_embeds"), self.embeds(outputs, "back_translation_text_embeds")
        if self.settings.back_translation_objective == "triplet":
            return self.hinge(source, back, ignored)
        return contrastive_loss(source, back, ignored, outputs.logit_scale)


TERMS = (
    "triplet_loss",
    "contrastive_loss",
    "target_triplet_loss",
    "target_contrastive_loss",
    "distillation_loss",
    "feature_distillation_loss",
    "back_translation_loss",
)

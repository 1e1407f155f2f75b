"""What the repairs of the losses change, by their values and gradients."""

import torch
from torch.nn import functional as F

from benchmarks.differences.effects import BATCH, DIM, arrow, effect, unit
from modeling_nrccr import NrccrLoss, NrccrOutput
from modeling_nrccr.training.losses import same_item, triplet_loss


def outputs(seed: int = 6) -> NrccrOutput:
    """Return embeddings of a batch half way through training: views near their pictures, some nearer than others."""
    images = unit(BATCH, DIM, seed=seed)
    views = {
        name: F.normalize(images + noise * unit(BATCH, DIM, seed=seed + i + 1), dim=-1).requires_grad_()
        for i, (name, noise) in enumerate(
            [
                ("text_embeds", 2.0),
                ("target_text_embeds", 4.0),
                ("teacher_text_embeds", 3.0),
                ("back_translation_text_embeds", 3.0),
            ]
        )
    }
    return NrccrOutput(image_embeds=images.requires_grad_(), logit_scale=torch.tensor(1 / 0.07), **views)


def losses() -> tuple[NrccrLoss, NrccrLoss]:
    return NrccrLoss.published(), NrccrLoss()


def gradients(loss: NrccrLoss, term: str, names: list[str], batch=None) -> list[torch.Tensor]:
    """Return the gradients of one weighted term, with respect to the embeddings of these names."""
    batch = batch or outputs()
    value = loss.weights[term] * loss(batch)[term]
    inputs = [getattr(batch, name) for name in names]
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(inputs, torch.autograd.grad(value, inputs, allow_unused=True))
    ]


@effect("Feature view")
def feature_view() -> str:
    batch = outputs()
    near = F.cosine_similarity(batch.target_text_embeds, batch.teacher_text_embeds).mean().item()
    values = [loss(batch)["feature_distillation_loss"].item() for loss in losses()]
    return f"its value where target and teacher have cosine {near:.2f}: {values[0]:.5f} -> {values[1]:.2f}"


@effect("Target of the feature view")
def feature_target() -> str:
    values = []
    for loss in losses():
        student, teacher = gradients(loss, "feature_distillation_loss", ["target_text_embeds", "teacher_text_embeds"])
        values.append(100 * teacher.norm() / (teacher.norm() + student.norm()))
    return f"share of its gradient that moves the teacher: {values[0]:.0f} % -> {values[1]:.0f} %"


@effect("Sums and means")
def term_scales() -> str:
    values = []
    for loss, contrast in zip(losses(), ("target_triplet_loss", "target_contrastive_loss")):
        (similarity,) = gradients(loss, "distillation_loss", ["target_text_embeds"])
        (other,) = gradients(loss, contrast, ["target_text_embeds"])
        values.append(100 * similarity.norm() / (similarity.norm() + other.norm()))
    return f"the similarity view's share of the gradient on target captions: {values[0]:.1f} % -> {values[1]:.1f} %"


@effect("Targets of the similarity view")
def similarity_targets() -> str:
    published, repaired = losses()
    a, b = (gradients(loss, "distillation_loss", ["image_embeds"])[0] for loss in (published, repaired))
    share = 100 * (a - b).norm() / a.norm()
    return f"of the norm of the gradient on pictures, the part through the targets has {share:.0f} % -> 0 %"


@effect("Captions of the same item")
def false_negatives() -> str:
    generator, shares = torch.Generator().manual_seed(7), []
    for items, captions in ((29000, 5), (25991, 10)):
        rows = torch.randint(items * captions, (2000, BATCH), generator=generator).sort(1).values
        item, other = rows // captions, rows.diff(dim=1) > 0
        shares.append(100 * ((item.diff(dim=1) == 0) & other).any(1).double().mean().item())
    images = unit(BATCH, DIM, seed=8)
    images[1] = images[0]
    ids = torch.arange(BATCH)
    ids[1] = 0
    ignored = [same_item(known, BATCH, images.device) for known in (None, ids)]
    values = [triplet_loss(images, images, pairs, reduction="sum").item() for pairs in ignored]
    return (
        f"{shares[0]:.0f} % of the batches of Multi30K task 2 hold such a pair, {shares[1]:.0f} % of VATEX; then the "
        f"hinge of perfect embeddings is {arrow(*values, 1)}"
    )

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_nrccr import LanguageDiscriminator, NrccrLoss, NrccrOutput
from modeling_nrccr.training.adversary import KINDS, adversarial_loss, discriminator_loss
from modeling_nrccr.training.losses import (
    LOSSES,
    REPAIRED_LOSSES,
    contrastive_loss,
    distillation_loss,
    transport_weights,
    triplet_loss,
)
from tests.support import tiny_batch, tiny_model


def nothing(n: int) -> torch.Tensor:
    return torch.zeros(n, n, dtype=torch.bool)


def unit(n: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_equal_embeddings_give_log_n_and_the_margin():
    same = torch.ones(6, 4).double() / 2
    torch.testing.assert_close(contrastive_loss(same, same, nothing(6), torch.tensor(14.0)).item(), math.log(6))
    torch.testing.assert_close(distillation_loss(same, same, same, nothing(6), 0.07, True).item(), math.log(6))
    assert triplet_loss(same, same, nothing(6)).item() == pytest.approx(0.4)
    assert triplet_loss(same, same, nothing(6), reduction="sum", direction="t2v").item() == pytest.approx(1.2)


@pytest.mark.parametrize("hardest", [True, False])
def test_triplet_equals_a_plain_loop(hardest):
    a, b = unit(5, seed=1), unit(5, seed=2)
    total = 0.0
    for i in range(5):
        for scores in (b[i] @ a.T, b @ a[i]):
            hinges = [max(0.0, (0.2 + scores[j] - scores[i]).item()) for j in range(5) if j != i]
            total += max(hinges) if hardest else sum(hinges)
    assert triplet_loss(a, b, nothing(5), 0.2, hardest, "sum").item() == pytest.approx(total)


def outputs_of(n: int = 4, **changes) -> NrccrOutput:
    names = (
        "text_embeds",
        "target_text_embeds",
        "back_translation_text_embeds",
        "teacher_text_embeds",
        "image_embeds",
    )
    values = {name: unit(n, seed=i).requires_grad_() for i, name in enumerate(names)}
    return NrccrOutput(**(values | {"logit_scale": torch.tensor(10.0)} | changes))


TERMS = [name for name in LOSSES if not LOSSES[name].by_trainer]


@pytest.mark.parametrize("term", TERMS)
def test_captions_of_one_picture_are_never_negatives(term):
    # row 1 is a second caption of row 0's picture: how alike the two are must not move the loss of the other rows
    loss = NrccrLoss(losses={term: 1.0}, back_translation_objective="triplet", hardest_negatives=False, margin=3.0)
    outputs = outputs_of()
    terms = loss(outputs, image_ids=torch.tensor([7, 7, 8, 9]))
    all_negatives = loss(outputs)
    assert set(terms) == {f"{term}_loss", "loss"}
    if term != "feature_distillation":
        assert terms["loss"].item() != pytest.approx(all_negatives["loss"].item())
    two = NrccrOutput(**{k: v[:2] if v.ndim else v for k, v in outputs.items()})
    pair = loss(two, image_ids=torch.tensor([7, 7]))["loss"]  # no negatives at all are left
    feature_view = (1 - (two.target_text_embeds * two.teacher_text_embeds).sum(-1)).mean().item()
    expected = feature_view if "feature" in term else 0.0
    assert pair.item() == pytest.approx(expected, abs=1e-12)


def test_targets_carry_no_gradient_unless_published():
    for loss, reached in ((NrccrLoss(), False), (NrccrLoss.published(), True)):
        weights = vars(loss.settings) | {"losses": {name: 1.0 for name in TERMS if "distillation" in name}}
        outputs = outputs_of()
        NrccrLoss(**weights)(outputs)["loss"].backward()
        assert (outputs.teacher_text_embeds.grad is not None) == reached
        assert outputs.target_text_embeds.grad.abs().sum() > 0


def test_the_repaired_feature_view_has_a_scale_that_the_published_one_lacks():
    outputs = outputs_of(64)
    repaired = NrccrLoss()(outputs)["feature_distillation_loss"].item()
    published = NrccrLoss.published()(outputs)["feature_distillation_loss"].item()
    assert 0.5 < repaired < 1.5 and published < 0.1


def test_mean_terms_do_not_grow_with_the_batch():
    # every term of the default is a mean: a doubled batch (new ids) moves hinges and feature view by nothing
    settings = {"losses": {"triplet": 1.0, "feature_distillation": 0.1}}
    small, large = outputs_of(), outputs_of()
    large = NrccrOutput(**{k: torch.cat([v, v]) if v.ndim else v for k, v in large.items()})
    ids = torch.tensor([0, 1, 2, 3])
    terms = NrccrLoss(**settings)(small, ids), NrccrLoss(**settings)(large, torch.cat([ids, ids]))
    assert terms[0]["loss"].item() == pytest.approx(terms[1]["loss"].item())


def test_what_is_not_named_is_off_and_errors_are_clear():
    loss = NrccrLoss(losses=REPAIRED_LOSSES | {"back_translation": 0.0, "distillation": 0.0})
    assert loss.settings.losses == {"contrastive": 1.0, "target_contrastive": 0.6, "feature_distillation": 0.1}
    terms = loss(outputs_of(back_translation_text_embeds=None))
    assert "back_translation_loss" not in terms and "distillation_loss" not in terms
    total = sum(loss.weights[name] * value for name, value in terms.items() if name != "loss")
    torch.testing.assert_close(terms["loss"], total)
    with pytest.raises(ValueError, match="target_text_embeds, which the output lacks"):
        NrccrLoss()(outputs_of(target_text_embeds=None))
    with pytest.raises(ValueError, match="batch of one"):
        NrccrLoss()(outputs_of(1))
    with pytest.raises(TypeError, match="margn"):
        NrccrLoss(margn=0.1)
    for losses, reason in (
        ({"triplets": 1}, "unknown loss 'triplets' .do you mean triplet"),
        ({"triplet": -1}, "triplet=-1, but a weight"),
        ({"triplet": True}, "triplet=True, but a weight"),
        ({"triplet": float("nan")}, "triplet=nan"),
        ("triplet", "write it as a=1,b=2"),
        ({"collections:OrderedDict": 1}, "no subclass of modeling_nrccr.LossTerm"),
        ({"no_such_module:Loss": 1}, "no module 'no_such_module'"),
        ({"collections:Loss": 1}, "collections has no 'Loss'"),
    ):
        with pytest.raises(ValueError, match=reason):
            NrccrLoss(losses=losses)
    with pytest.raises(ValueError, match="no loss is on"):
        NrccrLoss(losses={})(outputs_of())


def test_losses_come_as_a_mapping_or_as_text_and_add_up_in_one_order():
    ways = [
        {"target_triplet": 1, "contrastive": 0.5},
        "contrastive=0.5,target_triplet=1",
        '{"contrastive": 0.5, "target_triplet": 1}',
    ]
    assert [list(NrccrLoss(losses=way).settings.losses.items()) for way in ways] == [
        [("contrastive", 0.5), ("target_triplet", 1)]
    ] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_discriminator_ignores_padding_and_learns(kind):
    torch.manual_seed(0)
    discriminator = LanguageDiscriminator(24, kind).double()
    states, mask = (
        torch.randn(4, 6, 24).double(),
        torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0], [1, 1] + [0] * 4]),
    )
    logits = discriminator(states, mask)
    alone = discriminator(states[1:2, :3], mask[1:2, :3])
    torch.testing.assert_close(logits[1:2], alone)
    assert logits.shape == (4, 2)
    target = states + 1
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3)
    losses = []
    for _ in range(90):
        loss = discriminator_loss(discriminator(states, mask), discriminator(target, mask))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert adversarial_loss(discriminator(target, mask)) > adversarial_loss(discriminator(states, mask))


def test_loss_reads_a_models_output():
    model = tiny_model()
    terms = NrccrLoss(losses=REPAIRED_LOSSES | {"triplet": 1.0, "target_triplet": 1.0})(model(**tiny_batch(model)))
    assert set(terms) == {f"{name}_loss" for name in TERMS} | {"loss"}
    terms["loss"].backward()
    assert model.text_projection.dense.weight.grad.abs().sum() > 0


def test_transport_trusts_the_pairs_that_stay_in_their_place():
    anchors, nothing_ignored = torch.eye(4), torch.zeros(4, 4, dtype=torch.bool)
    target = anchors[[0, 1, 3, 2]]  # two went wrong
    weights = transport_weights([anchors], target, nothing_ignored)
    assert weights[:2].min() > 0.9 and weights[2:].max() < 0.1 and not weights.requires_grad
    # a second kind of anchors has half a say, and the same picture's other caption takes no share
    both = transport_weights([anchors, target], target, nothing_ignored)
    torch.testing.assert_close(both[2:], (weights[2:] + weights[0]) / 2, atol=1e-3, rtol=0)
    twins = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert transport_weights([anchors], target, twins).min() > 0.9


def test_a_teacher_of_both_languages_hands_on_its_similarities_of_texts():
    embeds = {name: F.normalize(torch.randn(5, 8), dim=-1) for name in ("source", "target", "student", "picture")}
    outputs = NrccrOutput(
        teacher_text_embeds=embeds["source"],
        teacher_target_text_embeds=embeds["target"],
        target_text_embeds=embeds["student"],
        image_embeds=embeds["picture"],
    )
    loss = NrccrLoss(distillation_relation="source", losses={"distillation": 1.0})
    expected = 0
    ours, theirs = embeds["picture"] @ embeds["student"].T / 0.07, embeds["source"] @ embeds["target"].T / 0.07
    for dim in (0, 1):
        expected -= (theirs.softmax(dim) * ours.log_softmax(dim)).sum(dim).mean() / 2
    torch.testing.assert_close(loss(outputs)["loss"], expected)
    with pytest.raises(ValueError, match="teacher_target_text_embeds"):
        loss(NrccrOutput(**{name: value for name, value in outputs.items() if name != "teacher_target_text_embeds"}))

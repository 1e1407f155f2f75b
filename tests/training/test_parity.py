"""This package against the recorded numbers of the released implementation: nothing is skipped, no tolerance widened.

float64: 1e-9; what is stored rounded to float32 (gradients, trained weights): 1e-6 of the tensor's maximum; recorded
float64 norms and checksums: 1e-8. float32: 1e-3 for attention outputs, 2e-4 for the rest, 1e-3 relative for losses.
"""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from modeling_nrccr import NrccrOutput, NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.training.adversary import KINDS, SOURCE, TARGET, adversarial_loss, language_loss
from modeling_nrccr.training.losses import NrccrLoss
from tests.support import reference


FILES = ("img", "video")
PRECISIONS = {"f64": torch.float64, "f32": torch.float32}
TERMS = {  # by the recorded name: ours
    "triplet_source": "triplet_loss",
    "triplet_trans": "target_triplet_loss",
    "sim_distill": "distillation_loss",
    "feat_distill": "feature_distillation_loss",
    "triplet_back": "back_translation_loss",
}
# Every recorded intermediate, by the recorded prefix, and where it is in this package. "text_head" stands for the
# visual head too, and `inputs` for what enters a module.
INTERMEDIATES = {
    "bert_embeddings": "output of the text encoder's embeddings",
    "bert_seq": "output of the text encoder",
    "text_proj": "input of text_head.position_norm, less the positions (LayerNorm, Linear, ReLU)",
    "text_pos": "output of text_head.position_norm",
    "text_attn_context": "input of text_head.attention.dense",
    "text_attn": "output of text_head.attention.layer_norm, residual or not",
    "text_feat": "input of text_projection.dense",
    "text_map_raw": "output of text_projection.norm",
    "text_emb": "embedding",
    "video_proj": "as text_proj",
    "video_pos": "as text_pos",
    "video_attn": "as text_attn",
    "visual_feat": "input of visual_projection.dense",
    "visual_map_raw": "output of visual_projection.norm",
    "visual_emb": "embedding",
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def recorded(module: nn.Module, what: str) -> list[torch.Tensor]:
    """What enters ("input") or leaves ("output") a module, call by call."""
    seen = []

    def hook(_, args, output):
        seen.append(args[0] if what == "input" else getattr(output, "last_hidden_state", output))

    module.register_forward_hook(hook)
    return seen


def intermediates(model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One forward pass, every intermediate by its recorded name."""
    head, encoder = model.text_head, model.text_tower.encoder
    views = ("source", "trans", "back")
    attended = ("self_source", "self_trans", "cross", "self_back")  # in the order of the released code
    pooled = ("source", "trans", "cross", "back")
    seen = {
        ("bert_embeddings", views): recorded(encoder.embeddings, "output"),
        ("bert_seq", views): recorded(encoder, "output"),
        ("text_proj", views): recorded(head.position_norm, "input"),
        ("text_pos", views): recorded(head.position_norm, "output"),
        ("text_attn_context", attended): recorded(head.attention.dense, "input"),
        ("text_attn", attended): recorded(head.attention.layer_norm, "output"),
        ("text_feat", pooled): recorded(model.text_projection.dense, "input"),
        ("text_map_raw", pooled): recorded(model.text_projection.norm, "output"),
        ("text_emb", pooled): recorded(model.text_projection, "output"),
        ("visual_feat", ("out",)): recorded(model.visual_projection.dense, "input"),
        ("visual_map_raw", ("out",)): recorded(model.visual_projection.norm, "output"),
        ("visual_emb", ("out",)): recorded(model.visual_projection, "output"),
    }
    if model.config.visual_head == "attention":
        seen |= {
            ("video_proj", ("out",)): recorded(model.visual_head.position_norm, "input"),
            ("video_pos", ("out",)): recorded(model.visual_head.position_norm, "output"),
            ("video_attn", ("self",)): recorded(model.visual_head.attention.layer_norm, "output"),
        }
    outputs = model(**batch)
    by_view = zip(
        pooled,
        (
            outputs.text_embeds,
            outputs.target_text_embeds,
            outputs.teacher_text_embeds,
            outputs.back_translation_text_embeds,
        ),
    )
    named = {f"output.{view}": embeds for view, embeds in by_view} | {"output.visual": outputs.image_embeds}
    lengths = [batch[f"{prefix}input_ids"].shape[1] for prefix in reference.VIEWS.values()]
    for (name, parts), calls in seen.items():
        if name.startswith("bert"):  # all views in one pass, padded to the longest
            calls = [rows[:, :length] for rows, length in zip(calls[0].chunk(3), lengths)]
        for part, value in zip(parts, calls, strict=True):
            if name.endswith("_proj"):
                of = model.visual_head if name.startswith("video") else head
                value = value - of.position_embeddings.weight[: value.shape[1]]
            named[f"{name}.{part}"] = value
    return named


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", FILES)
def test_every_intermediate(file, precision):
    name, dtype = f"forward_{file}", PRECISIONS[precision]
    model, _, _ = reference.converted(name, dtype=dtype)
    with torch.no_grad():
        ours = intermediates(model, reference.batch(name, dtype=dtype))
    expected = {k.partition("/")[2]: t for k, t in reference.tensors(name).items() if k.startswith(f"{precision}/")}
    assert {key.partition(".")[0] for key in expected} <= set(INTERMEDIATES)
    for key, value in expected.items():
        assert value.dtype == dtype
        tolerance = 1e-9 if precision == "f64" else 1e-3 if "attn" in key else 2e-4
        close(ours.pop(key), value, tolerance, key)
    assert len(expected) == (35 if file == "img" else 38)
    for key, value in ours.items():  # what is left: the model's output, under its own names
        view = key.partition(".")[2]
        embed = "visual_emb.out" if view == "visual" else f"text_emb.{view}"
        close(value, expected[embed], 1e-9 if precision == "f64" else 2e-4, key)


def trainer_of(directory, model, loss, discriminator, options, rows=None, **changes) -> NrccrTrainer:
    """`NrccrTrainer` itself, with the settings of the released loss, fed with ready batches in the given order."""

    def collate(rows):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    arguments = NrccrTrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=6,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        weight_decay=0.0,
        lr_scheduler_type="constant",
        learning_rate=options["learning_rate"],
        max_grad_norm=options["grad_clip"],
        discriminator_learning_rate=options["glr"],
        trained_text_layers=len(options["layer_list"]),
        frozen_dropout=True,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        **asdict(loss.settings),
        **changes,
    )
    return NrccrTrainer(model, arguments, rows, data_collator=collate, discriminator=discriminator)


def watched(discriminator: nn.Module) -> list[torch.Tensor]:
    """Its logits of each step: source, target (both before its own step), target (after it)."""
    return recorded(discriminator, "output")


def check_terms(terms: dict, logits: list[torch.Tensor], total, expected: dict, scale: float, tolerance: dict):
    """Every term, unweighted and weighted, of one step."""
    weights = NrccrLoss.published().weights
    for theirs, ours in TERMS.items():
        weight, value = weights[ours], float(terms[ours])
        unweighted = theirs if theirs == "triplet_source" else f"{theirs}_unweighted"
        assert value == pytest.approx(expected[unweighted], **tolerance), ours
        if theirs != "triplet_source":
            assert weight * value == pytest.approx(expected[f"{theirs}_weighted"], **tolerance), ours
    real, fake = language_loss(logits[0], SOURCE).item(), language_loss(logits[1], TARGET).item()
    assert real == pytest.approx(expected["disc_real"], **tolerance)
    assert fake == pytest.approx(expected["disc_fake"], **tolerance)
    assert float(terms["discriminator_loss"]) == pytest.approx((real + fake) / 2, **tolerance)
    assert float(terms["adversarial_loss"]) == pytest.approx(adversarial_loss(logits[2]).item(), **tolerance)
    assert scale * float(terms["adversarial_loss"]) == pytest.approx(expected["gen_loss_scaled"], **tolerance)
    assert total == pytest.approx(expected["total"], **tolerance)


EXACT, RELATIVE, RECORDED = dict(rel=0, abs=1e-9), dict(rel=1e-3, abs=0), dict(rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_losses_and_gradients(file, kind, precision, tmp_path):
    name, dtype = f"forward_{file}", PRECISIONS[precision]
    model, discriminator, loss = reference.converted(name, kind, dtype)
    options, batch = reference.options(name), reference.batch(name, dtype=dtype)
    before = {key: value.clone() for key, value in reference.state(model, discriminator).items()}
    logits = watched(discriminator)
    trainer = trainer_of(tmp_path, model, loss, discriminator, options)
    total = trainer.compute_loss(model.eval(), batch)
    total.backward()

    # the loss on its own names the same terms, and leaves the discriminator's to the Trainer
    alone = loss(model(**batch))
    assert set(alone) == {*TERMS.values(), "loss"}
    terms = {term: values[0] for term, values in trainer.term_history.items()}
    assert all(torch.equal(alone[term], terms[term]) for term in TERMS.values())
    expected = reference.settings(name)["losses"][kind][precision]
    exact = precision == "f64"
    check_terms(terms, logits, total.item(), expected, options["scale"], EXACT if exact else RELATIVE)
    assert alone["loss"].item() + expected["gen_loss_scaled"] == pytest.approx(
        expected["total"], **(EXACT if exact else RELATIVE)
    )

    norms = reference.settings(name)["grad_norms"][kind]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    every = reference.by_released_name(model, discriminator)
    names = {old: ours for old, ours in every.items() if ours in trained}
    assert set(names) == set(norms["f64"]) and set(names.values()) == trained - {"logit_scale"}
    frozen = {old for old in reference.settings(name)["no_grad_params"] if "pooler" not in old}
    assert frozen == {old for old, ours in every.items() if ours.startswith("text_tower") and ours not in trained}
    gradients = {old: model.get_parameter(ours).grad for old, ours in names.items()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm == pytest.approx(norms[f"total_{precision}"], **(RECORDED if exact else RELATIVE))
    if not exact:
        return
    for old, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(norms["f64"][old], **RECORDED), old
        stored = reference.tensors(name).get(f"grads/{kind}/{old}")
        if stored is not None:  # a gradient that is zero but for rounding (a key's bias) has no relative error
            close(gradient, stored, max(1e-6 * stored.abs().max().item(), 1e-12), old)
    stored = [key for key in reference.tensors(name) if key.startswith(f"grads/{kind}/")]
    assert stored and {key.removeprefix(f"grads/{kind}/") for key in stored} <= set(names)

    steps, state = reference.settings(name)["disc"][kind], reference.state(model, discriminator)
    assert float(terms["adversarial_loss"]) == pytest.approx(steps["gen_loss_unscaled_f64"], **EXACT)
    assert set(steps["after_step_f64"]) == {old for old in every if old.startswith("AdvAgent")}
    for old, expected in steps["after_step_f64"].items():
        check_sums(state[every[old]], before[every[old]], expected, old)


def check_sums(tensor: torch.Tensor, before: torch.Tensor, expected: dict[str, float], name: str):
    flat = tensor.double().flatten()
    sums = {
        "sum": flat.sum(),
        "l2": flat.norm(),
        "weighted": flat @ torch.arange(len(flat), dtype=flat.dtype).cos(),
        "change_l2": (flat - before.double().flatten()).norm(),
    }
    for what, value in expected.items():
        assert sums[what].item() == pytest.approx(value, **RECORDED), f"{what} of {name}"


class StateAfter(TrainerCallback):
    """Copies of all weights after each step."""

    def __init__(self, state):
        self.state, self.steps = state, []

    def on_step_end(self, *args, **kwargs):
        self.steps.append({name: value.clone() for name, value in self.state().items()})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", FILES)
def test_five_training_steps(file, precision, tmp_path):
    name, dtype = f"train_{file}", PRECISIONS[precision]
    recording, options = reference.settings(name), reference.options(name)
    model, discriminator, loss = reference.converted(name, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = [reference.batch(name, f"batch{k}", dtype) for k in range(5)]
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(6)]
    logits, totals = watched(discriminator), []
    trainer = trainer_of(tmp_path, model, loss, discriminator, options, rows, max_steps=5)
    compute_loss = trainer.compute_loss

    def recorded_loss(*args, **kwargs):
        totals.append(compute_loss(*args, **kwargs))
        return totals[-1]

    trainer.compute_loss = recorded_loss
    before = {key: value.clone() for key, value in reference.state(model, discriminator).items()}
    after = StateAfter(lambda: reference.state(model, discriminator))
    trainer.add_callback(after)
    trainer.train()

    exact = precision == "f64"
    for k, expected in enumerate(recording[f"trajectory_{precision}"]):
        logged, three = trainer.state.log_history[k], logits[3 * k : 3 * k + 3]
        check_terms(logged, three, totals[k].item(), expected, options["scale"], EXACT if exact else RELATIVE)
        assert logged["grad_norm"] == pytest.approx(
            expected["grad_norm_before_clip"], **(RECORDED if exact else RELATIVE)
        )
        assert logged["loss"] == pytest.approx(expected["total"], rel=1e-6 if exact else 1e-3)  # summed in float32
    if not exact:  # parameters whose gradient is zero but for rounding drift in float32
        return
    names = reference.by_released_name(model, discriminator)
    for step, checks in ((0, recording["checks_after1_f64"]), (4, recording["checks_after5_f64"])):
        assert {old for old in checks if "pooler" not in old} == set(names)
        for old, ours in names.items():
            check_sums(after.steps[step][ours], before[ours], checks[old], old)
    for old, ours in names.items():
        stored = reference.tensors(name)[f"weights_after5_f64_as_f32/{old}"]
        close(after.steps[4][ours], stored, 1e-6 * stored.abs().max().item(), old)
    unchanged = {old for old in recording["unchanged_after5"] if "pooler" not in old}
    assert unchanged == {old for old, ours in names.items() if torch.equal(after.steps[4][ours], before[ours])}


@pytest.mark.parametrize("file", FILES)
def test_every_variant_of_the_hinge(file):
    tensors = reference.tensors(f"forward_{file}")
    outputs = NrccrOutput(image_embeds=tensors["f64/visual_emb.out"], text_embeds=tensors["f64/text_emb.source"])
    variants = reference.settings(f"forward_{file}")["triplet_variants_f64"]
    assert len({tuple(variant.values()) for variant in variants}) == 84
    for variant in variants:
        loss = NrccrLoss(
            losses={"triplet": 1},
            margin=variant["margin"],
            hardest_negatives=variant["max_violation"],
            triplet_reduction=variant["cost_style"],
            triplet_direction=variant["direction"],
            triplet_measure=variant["measure"],
        )
        assert loss(outputs)["triplet_loss"].item() == pytest.approx(variant["value"], **EXACT), variant


@pytest.mark.parametrize("file", FILES)
def test_embeddings_of_one_view_alone_are_the_same(file):
    """Search time: one view at a time, no longer one beside it to be padded to."""
    name = f"forward_{file}"
    model, _, _ = reference.converted(name)
    batch, tensors = reference.batch(name), reference.tensors(name)
    with torch.no_grad():
        for view, prefix in reference.VIEWS.items():
            embeds = model.get_text_features(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
            close(embeds.pooler_output, tensors[f"f64/text_emb.{view}"], 1e-9, view)
        visual = model.get_image_features(
            visual_feats=batch["visual_feats"], visual_attention_mask=batch.get("visual_attention_mask")
        )
    close(visual.pooler_output, tensors["f64/visual_emb.out"], 1e-9, "visual")

"""Training without pictures, with a frozen teacher, and with the visual side kept as it is."""

import pytest
import torch

from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    NrccrConfig,
    NrccrLoss,
    NrccrModel,
    NrccrTrainer,
)
from modeling_nrccr.training.losses import REPAIRED_LOSSES
from tests.support import HEADS, WordProcessor, tiny_batch, tiny_model, toy_rows
from tests.training.test_losses import outputs_of, unit
from tests.training.test_trainer import arguments, trainer_of


ONLY_FEATURES = {"losses": {"feature_distillation": 1.0}}
TEXT_ONLY = dict(losses=REPAIRED_LOSSES | {"contrastive": 0}, text_only=True)


def text_model() -> NrccrModel:
    config = tiny_model(**HEADS["pooling"]).config.to_dict()
    return NrccrModel(NrccrConfig(**(config | {"visual_feat_dim": None, "vision_config": None}))).eval()


def test_without_pictures_the_english_caption_stands_in_their_place():
    outputs = outputs_of(image_embeds=None)
    weights = {"losses": TEXT_ONLY["losses"]}
    with_teacher = NrccrLoss(**weights)(outputs)
    as_pictures = NrccrLoss(**weights)(outputs_of(image_embeds=unit(4, seed=3)))  # the teacher's embedding
    for name in with_teacher:
        torch.testing.assert_close(with_teacher[name], as_pictures[name])
    only = {"losses": {"target_contrastive": 1.0}}
    without = NrccrLoss(**only)(outputs_of(image_embeds=None, teacher_text_embeds=None))
    in_their_place = NrccrLoss(**only)(outputs_of(image_embeds=unit(4, seed=0), teacher_text_embeds=None))
    torch.testing.assert_close(without["loss"], in_their_place["loss"])
    with pytest.raises(ValueError, match="their own answer"):
        NrccrLoss(losses={"contrastive": 1.0})(outputs_of(image_embeds=None, teacher_text_embeds=None))


def test_a_model_of_texts_alone_trains_and_finds_translations(tmp_path):
    model, rows, held_out = text_model(), toy_rows(120), toy_rows(20, seed=9)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("visual") for name in names)
    with pytest.raises(ValueError, match="texts alone"):
        trainer_of(tmp_path, model)
    with pytest.raises(ValueError, match="texts alone"):
        model.get_image_features(visual_feats=torch.ones(1, 1, 4))
    settings = dict(
        num_train_epochs=6,
        learning_rate=3e-3,
        trained_text_layers=-1,
        keep_best_in_memory=True,
        save_strategy="no",
        load_best_model_at_end=False,
        eval_gallery_column="source_caption",
    )
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    trainer = NrccrTrainer(model, arguments(tmp_path, **settings, **TEXT_ONLY), rows, held_out, data_collator=collator)
    before = trainer.evaluate()["eval_sum_recall"]
    trainer.train()
    history = [entry["eval_sum_recall"] for entry in trainer.state.log_history if "eval_sum_recall" in entry]
    after = trainer.evaluate()["eval_sum_recall"]
    assert after == pytest.approx(max(history)) and after > before + 100
    # what was kept is a copy, not the weights that went on training
    trainer.model.save_pretrained(tmp_path / "text")
    again = NrccrModel.from_pretrained(tmp_path / "text")
    inputs = WordProcessor()(text=["red dog"], return_tensors="pt")
    torch.testing.assert_close(
        again.eval().get_text_features(**inputs).pooler_output,
        trainer.model.eval().get_text_features(**inputs).pooler_output,
    )


def test_a_frozen_teacher_is_followed_and_no_picture_moves(tmp_path):
    teacher, student = tiny_model(**HEADS["pooling"]), tiny_model(**HEADS["pooling"])
    student.load_state_dict(teacher.state_dict())
    torch.nn.init.normal_(student.text_projection.dense.weight)
    rows = [row | {"target_caption": row["source_caption"]} for row in toy_rows(64)]
    kept = {name: p.detach().clone() for name, p in student.named_parameters() if name.startswith("visual")}
    of_teacher = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    pictures = {name: value for name, value in tiny_batch(student).items() if "visual" in name or "pixel" in name}
    images = student.eval().get_image_features(**pictures).pooler_output
    settings = ONLY_FEATURES | dict(text_only=True, train_visual_head=False, num_train_epochs=16, learning_rate=3e-2)
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    trainer = NrccrTrainer(
        student, arguments(tmp_path, **settings), rows, toy_rows(12, seed=9), data_collator=collator, teacher=teacher
    )
    trainer.train()
    losses = [entry["feature_distillation_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in student.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
    assert all(torch.equal(p, of_teacher[name]) for name, p in teacher.named_parameters())
    assert torch.equal(student.eval().get_image_features(**pictures).pooler_output, images)


def test_new_heads_share_the_towers():
    model = tiny_model(**HEADS["attention"])
    other = model.with_new_heads(
        text_head="linear", teacher_view="source", projection_dim=11, visual_feat_dim=model.config.visual_feat_dim
    )
    assert other.text_tower is model.text_tower and other.visual_tower is model.visual_tower
    inputs = WordProcessor()(text=["red dog", "blue"], return_tensors="pt")
    before = {name: tensor.clone() for name, tensor in model.text_tower.state_dict().items()}
    assert other.get_text_features(**inputs).pooler_output.shape == (2, 11)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.text_tower.state_dict().items())
    # two linear layers without a ReLU between them: homogeneous but for the biases
    head, states = other.text_head, torch.randn(3, 1, model.config.text_config.hidden_size)
    torch.nn.init.zeros_(head.dense.bias)
    mask = torch.ones(3, 1)
    torch.testing.assert_close(head.eval()(-states, mask), -head(states, mask))


@pytest.mark.parametrize("heads", ["attention", "pooling"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_grouping_by_length_changes_nothing(heads, side, monkeypatch):
    from modeling_nrccr import length_groups as length_groups_module
    from modeling_nrccr import modeling_nrccr as module
    from modeling_nrccr import text_passes

    model = tiny_model(**HEADS[heads]).eval()
    generator = torch.Generator().manual_seed(0)
    batch, lengths = {}, torch.tensor([2, 9, 3, 2, 4, 2, 30, 3] * 5)
    for prefix in ("", "target_", "back_translation_"):
        order = torch.randperm(len(lengths), generator=generator)
        mask = (torch.arange(30) < lengths[order][:, None]).long()
        mask = mask.flip(1) if side == "left" else mask
        ids = torch.randint(5, 20, mask.shape, generator=generator) * mask
        batch |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    monkeypatch.setattr(length_groups_module, "pass_tokens", lambda device: 60)
    groups = module.length_groups(lengths)
    assert len(groups) > 4 and torch.cat(groups).sort().values.equal(torch.arange(len(lengths)))
    assert all(lengths[rows].max() * len(rows) <= 60 for rows in groups)
    grouped = model(**batch)
    for of in (module, text_passes):
        monkeypatch.setattr(of, "length_groups", lambda lengths, **_: [torch.arange(len(lengths))])
    whole = model(**batch)
    for name, value in whole.items():
        if name.endswith("_embeds"):
            torch.testing.assert_close(grouped[name], value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", ["attention", "pooling"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_gradient_cache_gives_the_same_gradients(heads, lora, monkeypatch):
    """With dropout on, a BatchNorm that sees the whole batch, and in the memory of a pass."""
    from modeling_nrccr import length_groups as length_groups_module
    from modeling_nrccr import text_passes

    monkeypatch.setattr(length_groups_module, "pass_tokens", lambda device: 40)
    monkeypatch.setattr(text_passes, "pass_tokens", lambda device: 40)
    torch.manual_seed(0)
    model = tiny_model(**HEADS[heads], projection_norm="batch_norm", projection_dropout=0.2)
    if lora:
        model.add_language("xx", kind="lora", rank=3, layers=1)
        model.train_language("xx")
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first, so that A would have no gradient
                torch.nn.init.normal_(parameter)
    batch, lengths = {}, torch.tensor([2, 9, 3, 2, 4, 2, 12, 3] * 3)
    for prefix in ("", "target_", "back_translation_"):
        mask = (torch.arange(12) < lengths[:, None]).long()
        batch |= {f"{prefix}input_ids": torch.randint(5, 20, mask.shape) * mask, f"{prefix}attention_mask": mask}
    batch["visual_feats"] = torch.randn(len(lengths), 1, model.config.visual_feat_dim)
    found = []
    for recompute in (False, True):
        model.recompute_passes = recompute
        model.zero_grad()
        torch.manual_seed(1)
        saved = SavedTensors()
        with saved:
            loss = NrccrLoss()(model.train()(**batch))["loss"]
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients, saved.size))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() and any(".lora_A." in name for name in found[1][1]) == lora
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-5)
    assert found[1][2] < (0.6 if heads == "pooling" else 0.9) * found[0][2]


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """How many numbers autograd keeps for the backward pass."""

    def __init__(self):
        self.size = 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.size += tensor.numel()
        return tensor

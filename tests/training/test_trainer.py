import json

import pytest
import torch
from datasets import Dataset

from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    FeatureCache,
    NrccrTrainer,
    NrccrTrainingArguments,
)
from modeling_nrccr.training.losses import REPAIRED_LOSSES, BackTranslation
from tests.support import HEADS, TINY_TEXT, WordProcessor, tiny_model, toy_rows


def arguments(directory, **changes) -> NrccrTrainingArguments:
    settings = dict(
        output_dir=str(directory),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=3e-3,
        logging_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return NrccrTrainingArguments(**(settings | changes))


def trainer_of(directory, model=None, rows=None, processor=None, **changes) -> NrccrTrainer:
    model = model or tiny_model(**HEADS["attention"])
    collator = DataCollatorForCrossLingualRetrieval(processor or WordProcessor())
    rows = rows or toy_rows(40)
    return NrccrTrainer(model, arguments(directory, **changes), rows, toy_rows(12, seed=9), data_collator=collator)


ALL_TERMS = {"losses": REPAIRED_LOSSES | {"triplet": 1.0, "target_triplet": 0.6, "adversarial": 0.01}}


def test_tiny_training_moves_what_is_trained_and_nothing_else(tmp_path):
    trainer = trainer_of(tmp_path, trained_text_layers=1, discriminator_kind="strong", **ALL_TERMS)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    judged = {name: p.detach().clone() for name, p in trainer.discriminator.named_parameters()}
    trainer.train()
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("text_tower") for name in frozen)
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        # a key's bias shifts all scores of a query alike: its gradient is zero
        assert moved == (name not in frozen) or name.endswith("key.bias"), name
    assert all(not torch.equal(p, judged[name]) for name, p in trainer.discriminator.named_parameters())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert "discriminator_loss" in logged
    weighted = sum(weight * logged[f"{name}_loss"] for name, weight in trainer.args.losses.items())
    assert logged["loss"] == pytest.approx(weighted, rel=1e-4)


def test_training_on_toy_rows_finds_unseen_pictures(tmp_path):
    model = tiny_model(**HEADS["pooling"])
    trainer = trainer_of(
        tmp_path, model, toy_rows(160), num_train_epochs=15, learning_rate=1e-2, trained_text_layers=-1
    )
    before = trainer.evaluate()["eval_t2v_recall@5"]
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_t2v_recall@5"] > max(70, before) and metrics["eval_sum_recall"] > 350
    # the best epoch by the two-sided sum of recalls was kept
    best = max(entry["eval_sum_recall"] for entry in trainer.state.log_history if "eval_sum_recall" in entry)
    assert metrics["eval_sum_recall"] == pytest.approx(best)


@pytest.mark.parametrize("trained_layers", [0, 2])
def test_cached_training_equals_uncached(tmp_path, trained_layers):
    rows, results = toy_rows(24), []
    for cached in (False, True):
        model = tiny_model(text_config=TINY_TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        model.set_trained_layers(trained_layers)
        processor = WordProcessor()
        if cached:
            processor = FeatureCache(model, processor)
            processor.add_texts(
                c
                for r in rows + toy_rows(12, seed=9)
                for c in (r["source_caption"], r["target_caption"], r["back_translation"])
            )
            processor.images = ImagesAreFeatures()
        trainer = trainer_of(tmp_path / str(cached), model, rows, processor, trained_text_layers=trained_layers)
        trainer.train()
        results.append(trainer.evaluate() | {"loss": trainer.state.log_history[0]["loss"]})
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    assert results[0]["eval_sum_recall"] == pytest.approx(results[1]["eval_sum_recall"])


class ImagesAreFeatures:
    def batch(self, feats):
        return torch.tensor(feats).unsqueeze(1), torch.ones(len(feats), 1)


def test_unneeded_views_are_not_collated(tmp_path):
    rows = [row | {"target_caption": None, "back_translation": None} for row in toy_rows(16)]
    trainer = trainer_of(tmp_path, rows=rows, eval_query_column="source_caption", losses={"contrastive": 1.0})
    trainer.train()
    assert trainer.data_collator.views == ("source",)
    with pytest.raises(ValueError, match="target_caption of 'toy/.*#0' is None: translate the data set first"):
        trainer_of(tmp_path / "b", rows=rows).train()


def test_resume_continues_discriminator_and_both_optimizers(tmp_path):
    settings = dict(trained_text_layers=1, num_train_epochs=4, save_total_limit=None, **ALL_TERMS)
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    steps = 5 * 2
    other = trainer_of(tmp_path / "other", model=tiny_model(seed=5), **settings)  # other weights: all must be restored
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    for (name, a), b in zip(whole.model.named_parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(whole.discriminator.parameters(), other.discriminator.parameters()):
        torch.testing.assert_close(a, b)
    whole.save_model(str(tmp_path / "published"))
    names = {path.name for path in (tmp_path / "published").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl", ".pth")) for name in names)
    assert "discriminator.safetensors" not in names


def test_evaluation_takes_datasets_and_several_captions_a_picture(tmp_path):
    rows = toy_rows(10)
    rows += [row | {"caption_id": row["caption_id"] + "b", "target_caption": "other words"} for row in rows[:4]]
    trainer = trainer_of(tmp_path)
    queries, images, owner = trainer.encode_dataset(Dataset.from_list(rows), "target_caption")
    assert queries.shape == (14, 11) and images.shape == (10, 11) and owner.tolist() == [*range(10), 0, 1, 2, 3]
    metrics = trainer.evaluate({"a": rows, "b": rows[:5]})
    assert metrics["eval_b_t2v_recall@5"] == 100.0 and 0 < metrics["eval_a_t2v_recall@1"] <= 100


def test_adversarial_needs_a_trained_layer(tmp_path):
    with pytest.raises(ValueError, match="set trained_text_layers, or leave the loss out"):
        arguments(tmp_path, losses={"adversarial": 0.1})
    with pytest.raises(ValueError, match="not-so-weak"):
        arguments(tmp_path, discriminator_kind="brutal")


class Louder(BackTranslation):
    """The cycle, and 123."""

    def __call__(self, outputs, ignored):
        return super().__call__(outputs, ignored) + 123


def test_a_loss_of_ones_own_is_logged_by_its_name(tmp_path):
    name = f"{__name__}:Louder"
    trainer = trainer_of(tmp_path, max_steps=2, losses={name: 1.0})
    trainer.train()
    assert trainer.data_collator.views == ("source", "back_translation")
    assert json.loads(json.dumps(trainer.state.log_history))[0][name] > 123


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_cpu_without_it_is_warned_of(supported, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("modeling_nrccr.training.arguments.cpu_has_bf16", lambda: supported)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    NrccrTrainingArguments(output_dir=str(tmp_path), bf16=True)
    assert ("no instructions for it" in caplog.text) == (not supported)

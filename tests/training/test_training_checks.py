"""Runs that would end well without having learnt anything: refused, mended or stopped."""

import pytest
import torch
from datasets import IterableDataset
from torch import nn

from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    NrccrLoss,
    NrccrTrainer,
    NrccrTrainingArguments,
)
from modeling_nrccr.training.checkpoints import damage, last_complete_checkpoint, mark_complete
from modeling_nrccr.training.losses import REPAIRED_LOSSES, LossTerm
from tests.support import HEADS, WordProcessor, tiny_batch, tiny_model, toy_rows


def trainer_of(directory, rows, model=None, validation=None, **changes) -> NrccrTrainer:
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
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    args, model = NrccrTrainingArguments(**(settings | changes)), model or tiny_model(**HEADS["pooling"])
    return NrccrTrainer(model, args, rows, validation or toy_rows(6, seed=9), data_collator=collator)


def stream_of(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


QUIET = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


@pytest.mark.parametrize(
    "kind, changes",
    [
        (list, {}),
        (list, {"max_steps": 3, "gradient_accumulation_steps": 4}),
        (stream_of, {"max_steps": 2, "gradient_accumulation_steps": 4}),
    ],
)
def test_fewer_rows_than_a_batch_are_trained_in_what_there_is(kind, changes, tmp_path):
    trainer = trainer_of(tmp_path, kind(toy_rows(5)), **QUIET | changes)
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 5 and trainer.state.global_step == changes.get("max_steps", 2)
    assert trainer.checks.has_moved()
    with pytest.raises(ValueError, match="train_dataset has 1 rows"):
        trainer_of(tmp_path, kind(toy_rows(1)), **QUIET | changes)


def test_a_last_batch_of_one_row_is_left_out_of_a_stream(tmp_path):
    """9 rows in batches of 8, in training by BatchNorm; and a stream that ends amid an accumulation takes its step."""
    model = tiny_model(**HEADS["published"])
    trainer = trainer_of(tmp_path, stream_of(toy_rows(9)), model, max_steps=3, **QUIET)
    trainer.train()
    assert trainer.state.global_step == 3
    trainer = trainer_of(tmp_path, stream_of(toy_rows(20)), max_steps=2, gradient_accumulation_steps=4, **QUIET)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.args.gradient_accumulation_steps == 2
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        kept = DataCollatorForCrossLingualRetrieval(WordProcessor())
        NrccrTrainer(model, NrccrTrainingArguments(str(tmp_path)), toy_rows(9), [], data_collator=kept)
    with pytest.raises(ValueError, match="leave a last one of one row.*set dataloader_drop_last"):
        trainer_of(tmp_path, toy_rows(9), dataloader_drop_last=False, **QUIET)


def test_no_step_is_an_error(tmp_path):
    trainer = trainer_of(tmp_path, stream_of(toy_rows(9)), max_steps=3, **QUIET)
    trainer.train_dataset = stream_of([])
    with pytest.raises(ValueError, match="no step was trained.*per_device_train_batch_size"):
        trainer.train()
    trainer = trainer_of(tmp_path, stream_of(toy_rows(16)), max_steps=3, gradient_accumulation_steps=2, **QUIET)
    trainer.train_dataset = stream_of(toy_rows(8))  # would go round for ever
    with pytest.raises(ValueError, match="no step was trained"):
        trainer.train()


def test_few_rows_are_trained_for_more_epochs(tmp_path):
    trainer = trainer_of(tmp_path, toy_rows(17), min_steps=7, **QUIET)
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.state.epoch == 4


class NotANumber(LossTerm):
    """From step 5 on."""

    reads, calls = ("source",), 0

    def __call__(self, outputs, ignored):
        self.calls += 1
        return outputs.text_embeds.mean() * (float("nan") if self.calls > 4 else 1)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = trainer_of(
        tmp_path, toy_rows(16), losses={f"{__name__}:NotANumber": 1}, num_train_epochs=4, save_total_limit=None
    )
    with pytest.raises(ValueError, match="step 5: .*:NotANumber is NaN.*checkpoint-4 is the last good"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, toy_rows(16))
    weight = trainer.model.text_projection.dense.weight
    weight.register_hook(lambda gradient: gradient / 0 if trainer.state.global_step == 3 else gradient)
    with pytest.raises(ValueError, match="step 4: the gradient.*checkpoint-2 is the last good"):
        trainer.train()
    assert weight.isfinite().all()


@pytest.mark.parametrize("heads", HEADS)
def test_a_row_that_is_all_padding_gives_no_nan(heads):
    model = tiny_model(**HEADS[heads])
    batch = tiny_batch(model)
    for name in ("attention_mask", "target_attention_mask", "visual_attention_mask"):
        batch[name][2] = 0
    outputs = model.train()(**batch)
    loss = NrccrLoss(losses=REPAIRED_LOSSES | {"triplet": 1.0, "target_triplet": 1.0})(outputs)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("first, most", [(4.6, 100.0), (4.76, 116.75)])  # SigLIP's begins above
def test_the_scale_of_logits_is_bounded(first, most, tmp_path):
    model = tiny_model(logit_scale_init_value=first, **HEADS["pooling"])
    model.logit_scale.register_hook(lambda gradient: gradient * 0 - 1.0)
    trainer_of(tmp_path, toy_rows(16), model, learning_rate=0.1, max_steps=2, **QUIET).train()
    assert model.logit_scale.exp().item() == pytest.approx(most, rel=1e-3)


def test_ties_are_decided_by_the_loss(tmp_path):
    """Of five rows every recall is 100 from the first evaluation on, which is not of the first step: a warm-up begins
    at rate 0."""
    trainer = trainer_of(
        tmp_path,
        toy_rows(8),
        validation=toy_rows(8)[:5],
        num_train_epochs=5,
        early_stopping_patience=1,
        metric_for_best_model="t2v_recall@5",
        warmup_steps=2,
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_cross_entropy" in entry]
    assert {entry["eval_t2v_recall@5"] for entry in evaluated} == {100.0}
    best = min(evaluated, key=lambda entry: entry["eval_cross_entropy"])
    assert trainer.state.best_global_step == best["step"] > evaluated[0]["step"] == 2 and trainer.state.epoch == 5
    assert trainer.evaluate()["eval_cross_entropy"] == pytest.approx(best["eval_cross_entropy"])


def test_nothing_learnt_is_an_error(tmp_path):
    model = tiny_model(**HEADS["pooling"])
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match="nothing was learnt: after 4 steps"):
        trainer_of(tmp_path, toy_rows(16), model, weight_decay=0.0).train()


def test_a_warm_up_that_would_never_end_is_cut(tmp_path):
    trainer = trainer_of(tmp_path, toy_rows(80), warmup_steps=100, logging_strategy="steps", logging_steps=1, **QUIET)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert trainer.args.warmup_steps == 2 and max(rates) == pytest.approx(3e-3)


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    whole = trainer_of(
        tmp_path,
        toy_rows(8),
        num_train_epochs=4,
        save_total_limit=None,
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    whole.train()
    for step, name in ((4, "trainer_state.json"), (3, "optimizer.pt"), (2, "model.safetensors")):
        path = tmp_path / f"checkpoint-{step}" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
        if step == 4:
            mark_complete(path.parent)  # written so
        assert ("its state" if step == 4 else name) in damage(path.parent)
    with pytest.raises(ValueError, match="checkpoint-4 is damaged.*resume from an earlier"):
        trainer_of(tmp_path, toy_rows(8)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert all(f"checkpoint-{step} is damaged" in caplog.text for step in (2, 3, 4))


@pytest.mark.parametrize(
    "name, value",
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", 0),
        ("max_steps", 0),
        ("learning_rate", -1.0),
        ("temperature", 0.0),
        ("trained_text_layers", -2),
        ("num_train_epochs", float("nan")),
    ],
)
def test_numbers_that_would_train_nothing_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}="):
        NrccrTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """How many numbers autograd keeps for the backward pass, each tensor once."""

    def __init__(self):
        self.sizes = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize("cached", [False, True])
def test_gradient_checkpointing_of_lora_saves_memory_and_is_exact(cached):
    """Of rows of two languages, in layers that are frozen but for LoRA; with dropout in the head; of cached states."""
    torch.manual_seed(0)
    model = tiny_model(**HEADS["pooling"], text_dropout=0.2)
    for language in ("gl", "ca"):
        model.add_language(language, kind="lora", rank=3, layers=2)
    model.train_language("gl")
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("language_adapters"):
            nn.init.normal_(parameter.requires_grad_(True), std=0.3)
    mask = torch.ones(8, 12, dtype=torch.long)
    inputs = {"input_ids": torch.randint(2, 37, (8, 12)), "attention_mask": mask}
    if cached:
        inputs["boundary_states"] = model.text_tower.at_boundary(**inputs).detach()
    found = []
    for every in (0, 1):
        if every:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(1)
        with (saved := Saved()):
            embeds = model.get_text_features(**inputs, languages=["gl", "ca"] * 4).pooler_output
        (embeds * torch.arange(11.0)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((embeds.detach(), gradients, saved.size))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert {language for name in found[1][1] for language in ("gl", "ca") if f".{language}." in name} == {"gl", "ca"}
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-5)
    assert found[1][2] < 0.5 * found[0][2]
    model.gradient_checkpointing_disable()
    with pytest.raises(ValueError, match="offload.*every_n_layers alone"):
        model.gradient_checkpointing_enable(offload=True)


def test_gradient_checkpointing_is_the_trainers(tmp_path):
    model = tiny_model(**HEADS["pooling"])
    model.add_language("gl", kind="lora", rank=2, layers=-1)
    trainer_of(tmp_path, toy_rows(16), model, train_language="gl", activation_checkpointing=True, **QUIET).train()
    assert model.checkpoint_every == 1 and any(
        parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["linear", "recommended"])
@pytest.mark.parametrize("count", [50, 300, 3000])
def test_the_recipes_learn_from_few_captions_and_from_many(recipe, count, tmp_path):
    """A tenth of which is held out; as `nrccr add-language` trains."""
    from modeling_nrccr.training.add_language import parse_arguments

    options = {"output_dir": tmp_path, "use_cpu": True, "bf16_if_fast": False, "disable_tqdm": True}
    script, args = parse_arguments([], recipe, base="none", **options)
    model, rows = tiny_model(**HEADS["pooling"]), toy_rows(count)
    model.add_language("gl", **script.adapter_settings())
    args.train_language = "gl"
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    trainer = NrccrTrainer(model, args, rows[: -count // 10], rows[-count // 10 :], data_collator=collator)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert trainer.state.global_step >= 40 and model.adapter("gl").update.weight.norm() > 0.1
    assert (
        after["eval_cross_entropy"] < before["eval_cross_entropy"]
        and after["eval_sum_recall"] > before["eval_sum_recall"]
    )

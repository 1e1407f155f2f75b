"""What the repairs of training change: the chosen model, seeds, resuming."""

import tempfile

import numpy as np
import torch
from transformers import BatchFeature, PrinterCallback

from benchmarks.differences.effects import TEXT, effect
from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    NrccrConfig,
    NrccrModel,
    NrccrTrainer,
    NrccrTrainingArguments,
)


def toy_rows(count: int, seed: int) -> list[dict]:
    """Return pictures that are bags of words; the translation has three words in ten wrong."""
    generator, rows = np.random.default_rng(seed), []
    for i in range(count):
        chosen = generator.choice(30, 3, replace=False)
        heard = [int(word) if generator.random() > 0.3 else int(generator.integers(30)) for word in chosen]
        source, target = (
            " ".join(f"{start}{word}" for word in words) for start, words in (("", chosen), ("9", heard))
        )
        rows.append(
            {
                "image_id": f"{i}",
                "visual_feats": np.eye(30, dtype="float32")[chosen].sum(0, keepdims=True),
                "source_caption": source,
                "target_caption": target,
                "back_translation": source,
            }
        )
    return rows


def words_to_ids(text=None, visual_feats=None, **kwargs) -> BatchFeature:
    if text is None:
        feats = torch.stack([torch.as_tensor(feat) for feat in visual_feats])
        return BatchFeature({"visual_feats": feats})
    ids = torch.tensor([[2 + int(word) % 97 for word in line.split()] for line in text])
    return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def trainer(folder: str, seed: int = 0, epochs: int = 8, **changes) -> NrccrTrainer:
    args = NrccrTrainingArguments(
        output_dir=folder,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        trained_text_layers=1,
        disable_tqdm=True,
        use_cpu=True,
        load_best_model_at_end=False,
        save_strategy="no",
        **changes,
    )
    torch.manual_seed(seed)
    heads = dict(text_head="pooling", visual_head="pooling", teacher_view="source")
    model = NrccrModel(NrccrConfig(text_config=TEXT, visual_feat_dim=30, projection_dim=32, **heads))
    collator = DataCollatorForCrossLingualRetrieval(words_to_ids)
    run = NrccrTrainer(model, args, toy_rows(256, seed=1), toy_rows(100, seed=2), data_collator=collator)
    run.remove_callback(PrinterCallback)
    return run


def weights(trained: NrccrTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


@effect("Choice of the model", costly=True)
def model_choice() -> str:
    """Return which epoch validation chooses, and what it gives in both directions on other rows."""
    gains, different = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(5):
            run = trainer(folder, seed, eval_strategy="epoch")
            run.eval_dataset = {"chosen_by": toy_rows(100, seed=2), "tested": toy_rows(100, seed=3)}
            run.args.metric_for_best_model = "chosen_by_sum_recall"
            run.train()
            log: dict[float, dict] = {}
            for entry in run.state.log_history:
                log.setdefault(entry["epoch"], {}).update(entry)
            one = max(log.values(), key=lambda e: sum(e[f"eval_chosen_by_t2v_recall@{k}"] for k in (1, 5, 10)))
            both = max(log.values(), key=lambda e: e["eval_chosen_by_sum_recall"])
            different += one["epoch"] != both["epoch"]
            gains.append(both["eval_tested_sum_recall"] - one["eval_tested_sum_recall"])
    return (
        f"toy rows, 5 seeds: another epoch is chosen in {different}; test SumR of that choice {np.mean(gains):+.1f} "
        f"(from {min(gains):+.1f} to {max(gains):+.1f})"
    )


@effect("Seeds", costly=True)
def seeds() -> str:
    with tempfile.TemporaryDirectory() as folder:
        runs = [trainer(folder, seed, epochs=2, eval_strategy="no") for seed in (0, 0, 1)]
        for run in runs:
            run.train()
        same, other = ((weights(runs[0]) - weights(runs[i])).abs().max().item() for i in (1, 2))
    return (
        f"largest difference of a weight between two runs: {other:.2f} (seeds 0 and 1) -> {same:.0f} (the same seed)"
    )


@effect("Resuming", costly=True)
def resuming() -> str:
    with tempfile.TemporaryDirectory() as folder:
        options = dict(eval_strategy="no", lr_scheduler_type="constant", save_steps=8, save_total_limit=None)
        whole, resumed, weights_only = (trainer(f"{folder}/{i}", epochs=4, **options) for i in range(3))
        whole.args.save_strategy = "steps"
        whole.train()
        checkpoint = f"{folder}/0/checkpoint-16"
        resumed.train(resume_from_checkpoint=checkpoint)
        weights_only.model.load_state_dict(NrccrModel.from_pretrained(checkpoint).state_dict())
        weights_only.args.num_train_epochs = 2
        weights_only.train()
        lost, kept = ((weights(run) - weights(whole)).abs().max().item() for run in (weights_only, resumed))
    return (
        f"largest difference of a weight to the uninterrupted run: {lost:.3f} (weights alone restored) -> {kept:.0g}"
    )

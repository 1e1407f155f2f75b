"""What tiny runs log stays as it was recorded: to the last bit where processor and torch are those of the record."""

import json

import pytest
import torch

from modeling_nrccr import NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.data.collator import DataCollatorForCrossLingualRetrieval
from modeling_nrccr.training.losses import REPAIRED_LOSSES, NrccrLossArguments
from tests.support import FIXTURES, HEADS, WordProcessor, tiny_model, toy_rows


RECORD = json.loads((FIXTURES / "training_logs.json").read_text(encoding="utf-8"))
EVERY_TERM = REPAIRED_LOSSES | {"triplet": 1.0, "target_triplet": 0.6, "adversarial": 0.01}
RUNS = {  # name: (heads, arguments)
    "repaired": ("pooling", {}),
    "every_term": ("attention", dict(trained_text_layers=1, discriminator_kind="strong", losses=EVERY_TERM)),
    "published": ("published", NrccrLossArguments.PUBLISHED | {"trained_text_layers": 2}),
    "text_only": (
        "pooling",
        dict(
            text_only=True,
            eval_gallery_column="source_caption",
            losses={"feature_distillation": 1.0, "target_contrastive": 0.5},
        ),
    ),
    "agreement": ("pooling", dict(pair_weighting="agreement", losses=REPAIRED_LOSSES | {"back_translation": 0.0})),
}
TIMES = ("runtime", "per_second", "total_flos")


@pytest.mark.parametrize("name", RUNS)
def test_a_tiny_run_logs_what_it_logged(name, tmp_path):
    heads, changes = RUNS[name]
    args = NrccrTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=3e-3,
        logging_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        report_to="none",
        save_strategy="no",
        load_best_model_at_end=False,
        **changes,
    )
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    model, held_out = tiny_model(**HEADS[heads]), toy_rows(12, seed=9)
    trainer = NrccrTrainer(model, args, toy_rows(40), held_out, data_collator=collator)
    trainer.train()
    logged = [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in trainer.state.log_history
    ]
    recorded_here = (RECORD["torch"], RECORD["processor"]) == (
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
    )
    expected = RECORD["runs"][name]
    if recorded_here:
        assert logged == expected
    else:
        assert [entry.keys() for entry in logged] == [entry.keys() for entry in expected]
        losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (logged, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)

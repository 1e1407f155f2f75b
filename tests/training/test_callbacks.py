import random

import pytest

from modeling_nrccr import DataCollatorForCrossLingualRetrieval, NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.training.callbacks import EpochDecayCallback
from tests.support import WordProcessor, tiny_model, toy_rows


PUBLISHED = dict(lr_decay_per_epoch=0.99, plateau_factor=0.5, early_stopping_patience=11)


def published_rates(scores: list[float], epochs: int) -> list[float]:
    """The rate of each epoch computed as the released code does, one epoch after another."""
    rate, best, waited, bad, rates = 1e-3, float("-inf"), 0, 0, []
    for score in scores[:epochs]:
        rates.append(rate)
        improved, best = score > best, max(best, score)
        waited += 1
        rate *= 0.99
        if not improved and waited > 2:
            rate, waited = rate * 0.5, 0
        bad = 0 if improved else bad + 1
        if bad > 10:
            break
    return rates


def train(directory, scores, monkeypatch, epochs=30, resume=None, **changes) -> list[float]:
    """The logged rate of each epoch of a run whose evaluations give `scores`."""
    settings = dict(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
        save_total_limit=None,
        metric_for_best_model="t2v_sum_recall",
        load_best_model_at_end=False,
        data_seed=0,
    )
    args = NrccrTrainingArguments(**(settings | PUBLISHED | changes))
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    trainer = NrccrTrainer(tiny_model(), args, toy_rows(8), toy_rows(4), data_collator=collator)

    def evaluate(ignored=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = {"eval_t2v_sum_recall": scores[round(trainer.state.epoch) - 1]}
        trainer.control = trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_rates_are_those_of_the_published_loop(tmp_path, monkeypatch):
    generator = random.Random(1)
    scores = [round(generator.random(), 1) + epoch * 0.05 * (epoch < 9) for epoch in range(30)]
    rates = train(tmp_path, scores, monkeypatch, save_strategy="no")
    expected = published_rates(scores, 30)
    assert rates == pytest.approx(expected, rel=1e-12)
    halved = [i for i in range(1, len(rates)) if rates[i] < 0.6 * rates[i - 1]]
    # plateaus both right after an interval and held back by it; it stopped before the end
    assert len(halved) > 3 and min(b - a for a, b in zip(halved, halved[1:])) == 3 and len(rates) < 30
    assert len(rates) == 1 + scores.index(max(scores[: len(rates)])) + 11


def test_a_resumed_run_keeps_to_the_schedule(tmp_path, monkeypatch):
    scores = [3, 2, 1, 1, 1, 4, 4, 1, 1, 1]  # as good as the best is no improvement
    whole = train(tmp_path, scores, monkeypatch, epochs=10)
    assert whole == pytest.approx(published_rates(scores, 10), rel=1e-12)
    for epoch in (3, 5):  # right after a plateau, and between two
        # steps as well as epochs are counted: the second half logs its own epochs only after those of the first
        resumed = train(tmp_path, scores, monkeypatch, epochs=10, resume=tmp_path / f"checkpoint-{2 * epoch}")
        assert resumed == pytest.approx(whole, rel=1e-12)


def test_it_multiplies_what_the_scheduler_gives(tmp_path, monkeypatch):
    plain = train(
        tmp_path / "a",
        [1] * 4,
        monkeypatch,
        4,
        lr_scheduler_type="linear",
        save_strategy="no",
        lr_decay_per_epoch=1.0,
        plateau_factor=1.0,
    )
    decayed = train(
        tmp_path / "b",
        [1, 2, 3, 4],
        monkeypatch,
        4,
        lr_scheduler_type="linear",
        save_strategy="no",
        lr_decay_per_epoch=0.9,
    )
    assert decayed == pytest.approx([rate * 0.9**epoch for epoch, rate in enumerate(plain)])


def test_settings_under_which_it_would_not_work_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="set eval_strategy to epoch"):
        train(tmp_path, [1], monkeypatch, eval_strategy="steps", eval_steps=1, save_strategy="no")
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint"):
        train(tmp_path, [1], monkeypatch, restore_callback_states_from_checkpoint=False, save_strategy="no")
    state = EpochDecayCallback(0.9, 0.3, 5).state()
    assert EpochDecayCallback.from_state(state).state() == state

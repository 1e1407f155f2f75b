"""kill -9 of a training process at random moments, and at the worst ones: the resumed run ends as the uninterrupted
one, to 1e-6, in its metrics, weights, discriminator, both optimizers, schedule and random state."""

import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging as transformers_logging

from modeling_nrccr import DataCollatorForCrossLingualRetrieval, NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.training.checkpoints import MARKER, is_complete, last_complete_checkpoint
from modeling_nrccr.training.losses import REPAIRED_LOSSES
from tests.support import HEADS, WordProcessor, tiny_model, toy_rows


pytestmark = pytest.mark.slow

SCHEDULES = {
    # stops early, between two of which the best checkpoint and the last one are different
    "epochs": dict(num_train_epochs=20, early_stopping_patience=4),
    # saves in the middle of an epoch (5 batches, 3 steps), ends there too
    "steps": dict(
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=28,
        gradient_accumulation_steps=2,
        save_total_limit=2,
    ),
}
RANDOM_MOMENTS = [(list(SCHEDULES)[i % 2], random.Random(i).random()) for i in range(9)]
WORST_MOMENTS = ["optimizer.pt", "discriminator.safetensors", MARKER, "rmtree"]


def trainer_of(directory: Path, schedule: str) -> NrccrTrainer:
    settings = dict(
        output_dir=str(directory),
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        learning_rate=3e-3,
        logging_steps=1,
        per_device_train_batch_size=8,
        trained_text_layers=1,
        losses=REPAIRED_LOSSES | {"adversarial": 0.1},
    )
    args = NrccrTrainingArguments(**(settings | SCHEDULES[schedule]))
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    model = tiny_model(**HEADS["attention"])  # dropout is on
    return NrccrTrainer(model, args, toy_rows(44), toy_rows(12, seed=9), data_collator=collator)


# ------------------------------------------------------------------------------------------- in the killed process


class Started(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        Path(args.output_dir, "started").touch()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, step: int):
    """Half a file is written, or half a folder deleted, in the first checkpoint from `step` on."""
    save, replace = torch.save, os.replace

    def late(path) -> bool:
        return int(Path(path).parent.name.rpartition("-")[2]) >= step

    def half_save(value, path, *args, **kwargs):
        if Path(path).name != moment or not late(path):
            return save(value, path, *args, **kwargs)
        save(value, buffer := io.BytesIO())
        Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        die()

    def half_rmtree(path, *args, **kwargs):
        for name in sorted(os.listdir(path))[1::2]:  # the mark is the first
            Path(path, name).unlink()
        die()

    if moment == "rmtree":
        shutil.rmtree = half_rmtree
    elif moment == MARKER:
        os.replace = lambda a, b: die() if Path(b).name == MARKER and late(b) else replace(a, b)
    elif moment == "discriminator.safetensors":
        own = NrccrTrainer.save_discriminator
        NrccrTrainer.save_discriminator = lambda trainer, directory: (
            die() if late(directory / moment) else own(trainer, directory)
        )
    else:
        torch.save = half_save


def run(directory: Path, schedule: str, moment: str | None = None, step: int = 0):
    torch.set_num_threads(1)
    if moment:
        die_at(moment, step)
    warnings, loads, load = [], [], torch.load
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    transformers_logging.get_logger("modeling_nrccr.training.checkpoints").addHandler(handler)

    def recorded_load(path, *args, **kwargs):
        loads.append((Path(path).name, kwargs.get("weights_only")))
        return load(path, *args, **kwargs)

    torch.load = recorded_load
    directory.mkdir(exist_ok=True)
    trainer, started = trainer_of(directory, schedule), Started()
    trainer.add_callback(started)
    trainer.train(resume_from_checkpoint=True)
    metrics = trainer.evaluate()
    save_file(trainer.model.state_dict(), directory / "final.safetensors")
    state = trainer.state
    report = {
        "metrics": metrics,
        "log": state.log_history,
        "epoch": state.epoch,
        "best": state.best_global_step,
        "best_path": state.best_model_checkpoint,
        "from": started.step,
        "loads": loads,
        "warnings": warnings,
    }
    (directory / "final.json").write_text(json.dumps(report))


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def server():
    """Forks a process for each run from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["modeling_nrccr.training.trainer", "transformers.models.bert.modeling_bert", "pytest"]
    )
    return context


def start(server, *args) -> multiprocessing.Process:
    process = server.Process(target=run, args=args)
    process.start()
    return process


def finish(server, directory: Path, schedule: str) -> dict:
    process = start(server, directory, schedule)
    process.join(60)
    assert process.exitcode == 0
    return json.loads((directory / "final.json").read_text())


def wait_for(path: Path, process: multiprocessing.Process) -> float:
    while process.is_alive() and not path.exists():
        time.sleep(0.002)
    return time.perf_counter()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The uninterrupted run of each schedule, and its seconds."""
    runs = {}
    for schedule in SCHEDULES:
        directory = tmp_path_factory.mktemp(schedule)
        process = start(server, directory, schedule)
        begin = wait_for(directory / "started", process)
        end = wait_for(directory / "final.safetensors", process)
        process.join(60)
        assert process.exitcode == 0
        runs[schedule] = directory, json.loads((directory / "final.json").read_text()), end - begin
    return runs


def close(actual, expected, name: str):
    """Nested states to 1e-6; what is no float exactly."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            close(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), name
        for i, (a, b) in enumerate(zip(actual, expected)):
            close(a, b, f"{name}[{i}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=0, abs=1e-6), name
    else:
        assert (actual == expected) if not hasattr(expected, "shape") else (actual == expected).all(), name


def state_of(checkpoint: Path) -> dict:
    """All of a checkpoint, by file."""
    state = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    with safe_globals():
        for name in ("optimizer.pt", "scheduler.pt", "discriminator_optimizer.pt", "rng_state.pth"):
            state[name] = torch.load(checkpoint / name, weights_only=True)
    assert len(state) == 6
    trained = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state | {"log": trained.log_history, "best": (trained.best_metric, trained.best_global_step)}


def check_ends_alike(server, whole, directory: Path, schedule: str) -> dict:
    newest = last_complete_checkpoint(directory)
    if newest is not None:  # the best so far has survived too
        step = TrainerState.load_from_json(str(Path(newest, "trainer_state.json"))).best_global_step
        assert is_complete(directory / f"checkpoint-{step}")
    report, (expected_directory, expected, _) = finish(server, directory, schedule), whole[schedule]
    assert report["best_path"] == str(directory / f"checkpoint-{report['best']}")  # even if the folder was moved
    assert report["from"] == (int(newest.rpartition("-")[2]) if newest else 0)
    for key in ("metrics", "epoch", "best"):
        close(report[key], expected[key], key)
    ours, theirs = ([e for e in r["log"] if "train_runtime" not in e] for r in (report, expected))
    close(ours, theirs, "log")
    close(load_file(directory / "final.safetensors"), load_file(expected_directory / "final.safetensors"), "final")
    names = {path.name for path in expected_directory.glob("checkpoint-*")}
    assert {path.name for path in directory.glob("checkpoint-*")} == names
    for name in names:
        close(state_of(directory / name), state_of(expected_directory / name), name)
    loaded = dict(report["loads"])
    assert all(loaded.values()), loaded  # weights_only
    if newest:
        assert {"optimizer.pt", "scheduler.pt", "discriminator_optimizer.pt"} <= loaded.keys()
    return report


def test_the_uninterrupted_runs_are_worth_it(whole):
    _, epochs, _ = whole["epochs"]
    assert epochs["epoch"] < 20 and epochs["best"] < epochs["epoch"] * 5  # stopped early, the best is not the last
    directory, steps, _ = whole["steps"]
    assert len(list(directory.glob("checkpoint-*"))) == 2 and steps["best"] < 28


@pytest.mark.parametrize("schedule,fraction", RANDOM_MOMENTS)
def test_killed_at_a_random_moment(server, whole, tmp_path, schedule, fraction):
    directory = tmp_path / "run"
    for _ in range(5):  # a fast machine may be done before: earlier, then
        process = start(server, directory, schedule)
        wait_for(directory / "started", process)
        time.sleep(fraction * whole[schedule][2])
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        shutil.rmtree(directory)
        fraction *= 0.7
    assert process.exitcode == -signal.SIGKILL and not (directory / "final.json").exists()
    check_ends_alike(server, whole, directory, schedule)


@pytest.mark.parametrize("moment", WORST_MOMENTS)
def test_killed_while_a_checkpoint_is_written_or_deleted(server, whole, tmp_path, moment):
    directory = tmp_path / "run"
    step = whole["epochs"][1]["best"] + 10  # neither the last complete checkpoint nor this one is the best
    process = start(server, directory, "epochs", moment, step)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    newest = last_complete_checkpoint(directory)
    assert newest is not None
    half = [str(path) for path in directory.glob("checkpoint-*") if not is_complete(path)]
    assert len(half) == 1
    with pytest.raises(ValueError, match="checkpoint-[0-9]+ is not complete.*resume from an earlier"):
        trainer_of(directory, "epochs").train(resume_from_checkpoint=half[0])
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    report = check_ends_alike(server, whole, directory, "epochs")
    if moment != "rmtree":  # there, the half is older than what is loaded
        assert report["from"] == step - 5 and any(f"{half[0]} is not complete" in text for text in report["warnings"])
    shutil.rmtree(directory)  # the paths in the checkpoints are gone
    check_ends_alike(server, whole, moved, "epochs")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_finished_run_takes_no_further_step(server, whole, tmp_path, schedule):
    directory = tmp_path / "run"
    shutil.copytree(whole[schedule][0], directory)
    check_ends_alike(server, whole, directory, schedule)

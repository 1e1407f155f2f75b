"""`torchrun --nproc_per_node n` against one process with the whole batch, and what is refused instead.

    torchrun --standalone --nproc_per_node 2 tests/test_processes.py DIRECTORY

is what the tests start: every case in one launch; each process writes what it saw to `DIRECTORY/<rank>.*`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from modeling_nrccr import DataCollatorForCrossLingualRetrieval, NrccrTrainer, NrccrTrainingArguments
from modeling_nrccr.training.adversary import LanguageDiscriminator
from modeling_nrccr.training.losses import PUBLISHED_LOSSES, REPAIRED_LOSSES, NrccrLossArguments
from tests.support import HEADS, TINY_TEXT, WordProcessor, tiny_model, toy_rows


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
BATCH, STEPS = 12, 3  # rows a step, whatever the number of processes
NO_DROPOUT = {
    "text_config": TINY_TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "head_dropout": 0.0,
}
PUBLISHED = (
    HEADS["published"] | NO_DROPOUT | {"projection_dropout": 0.0},
    NrccrLossArguments.PUBLISHED
    | dict(losses=PUBLISHED_LOSSES | {"adversarial": 0.5}, discriminator_kind="strong", trained_text_layers=2),
)
REPAIRED = (
    HEADS["attention"] | NO_DROPOUT,
    dict(losses=REPAIRED_LOSSES | {"adversarial": 0.5}, discriminator_kind="not-so-weak", trained_text_layers=-1),
)
CASES = {  # name: (model, arguments)
    f"{name}_accumulation_{steps}": (model, arguments | {"gradient_accumulation_steps": steps})
    for name, (model, arguments) in {"published": PUBLISHED, "repaired": REPAIRED}.items()
    for steps in (1, 2)
} | {
    # neither the pictures' side nor the logit scale is read: DDP must not wait for their gradients
    "text_alone": (
        HEADS["attention"] | NO_DROPOUT,
        dict(
            losses={"feature_distillation": 0.1, "back_translation": 0.5},
            back_translation_objective="triplet",
            trained_text_layers=1,
            activation_checkpointing=True,
        ),
    ),
    "streamed": REPAIRED,
}


# ------------------------------------------------------------------------------------------------- in each process


class DoubleProcessor(WordProcessor):
    """Features in float64; counts what it is given."""

    def __init__(self):
        self.texts, self.images = [], 0

    def __call__(self, text=None, visual_feats=None, **kwargs):
        self.texts += text or []
        self.images += len(visual_feats or [])
        batch = super().__call__(text=text, visual_feats=visual_feats, **kwargs)
        if "visual_feats" in batch:
            batch["visual_feats"] = batch["visual_feats"].double()
        return batch


def rows_of(count: int, seed: int) -> list[dict]:
    """Captions of 1 to 7 words and 1 to 4 frames, so that parts of a batch are padded differently; two captions to
    a picture."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, row in enumerate(toy_rows(count, seed)):
        words = [f"word{j}" for j in torch.randint(0, 35, (7,), generator=generator).tolist()]
        lengths = torch.randint(1, 8, (3,), generator=generator).tolist()
        views = dict(zip(("source_caption", "target_caption", "back_translation"), lengths))
        frames = 1 + i % 4
        rows.append(
            row
            | {view: " ".join(words[:length]) for view, length in views.items()}
            | {"image_id": f"toy/{i // 2}", "visual_feats": torch.randn(frames, 13, generator=generator).tolist()}
        )
    return rows


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Recorder(TrainerCallback):
    """The gradients of every step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def arguments(directory: Path, **changes) -> NrccrTrainingArguments:
    settings = dict(
        output_dir=str(directory),
        disable_tqdm=True,
        seed=3,
        learning_rate=2e-3,
        max_grad_norm=1.0,
        logging_steps=1,
        use_cpu="WORLD_SIZE" not in os.environ,  # who starts several without a GPU need not say so
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    return NrccrTrainingArguments(**(settings | changes))


def trainer_of(directory: Path, config: dict, rows=None, seed: int = 0, discriminator=None, **changes) -> NrccrTrainer:
    collator = DataCollatorForCrossLingualRetrieval(DoubleProcessor())
    args = arguments(directory, **changes)
    rows = rows or rows_of(BATCH * STEPS * args.gradient_accumulation_steps + 7, seed=1)
    model = tiny_model(seed, **config).double()
    return NrccrTrainer(model, args, rows, data_collator=collator, discriminator=discriminator)


def train(directory: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    config, changes = CASES[name]
    rows, discriminator = None, None
    if name == "streamed":  # and a discriminator of which the processes have different weights
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        rows, discriminator = Stream(rows_of(60, seed=1)), LanguageDiscriminator(TINY_TEXT["hidden_size"])
    trainer = trainer_of(directory / name, config, rows, discriminator=discriminator, max_steps=STEPS, **changes)
    recorder, losses, compute_loss = Recorder(), [], trainer.compute_loss

    def recorded_loss(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = recorded_loss
    trainer.add_callback(recorder)
    trainer.train()
    tensors = {"losses": trainer.accelerator.reduce(torch.stack(losses).detach(), "mean")}
    for step, gradients in enumerate(recorder.gradients):
        tensors |= {f"gradient/{step}/{key}": value for key, value in gradients.items()}
    tensors |= {f"weight/{key}": value for key, value in trainer.model.state_dict().items()}
    if trainer.discriminator is not None:
        tensors |= {f"discriminator/{key}": value for key, value in trainer.discriminator.state_dict().items()}
    return tensors, trainer.state.log_history


def evaluate(directory: Path, heads: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Seven captions (two of them equal) of four pictures in batches of two, and one caption alone."""
    trainer = trainer_of(directory, HEADS[heads] | NO_DROPOUT, per_device_eval_batch_size=2)
    processor = trainer.data_collator.processor
    rows, tensors = rows_of(7, seed=2), {}
    rows[5]["target_caption"] = rows[2]["target_caption"]
    for count in (7, 1):
        for name, value in zip(("text", "image", "owner"), trainer.encode_dataset(rows[:count], "target_caption")):
            tensors[f"{name}_{count}"] = value
    metrics = trainer.evaluate(rows)
    return tensors, {"metrics": metrics, "texts": processor.texts, "images": processor.images}


def resume(directory: Path) -> dict[str, torch.Tensor]:
    """Six steps, and the last three again from a checkpoint and other weights; dropout on."""
    tensors = {}
    settings = dict(save_strategy="steps", save_steps=3, save_total_limit=None, max_steps=6, **REPAIRED[1])
    for name, seed, checkpoint in (("whole", 0, None), ("resumed", 5, str(directory / "whole" / "checkpoint-3"))):
        trainer = trainer_of(directory / name, HEADS["attention"], rows_of(60, seed=1), seed, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        for part in (trainer.model, trainer.discriminator):
            tensors |= {f"{name}/{type(part).__name__}/{key}": value for key, value in part.state_dict().items()}
        tensors |= {f"{name}/random": torch.get_rng_state(), f"{name}/seed": torch.tensor(torch.initial_seed())}
    return tensors


def main(directory: Path):
    torch.set_num_threads(1)
    tensors, log = {}, {}
    for name in CASES:
        tensors[name], log[name] = train(directory, name)
    for heads in ("published", "attention"):
        tensors[f"evaluate_{heads}"], log[f"evaluate_{heads}"] = evaluate(directory, heads)
    tensors["resume"] = resume(directory)
    flat = {f"{name}/{key}": t.contiguous().clone() for name, part in tensors.items() for key, t in part.items()}
    rank = os.environ.get("RANK", "0")
    save_file(flat, directory / f"{rank}.safetensors")
    (directory / f"{rank}.json").write_text(json.dumps(log))


# ------------------------------------------------------------------------------------------------------- the tests


def launch(directory: Path, processes: int) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
    """What each process saw; a single one is started as `cpu.yaml` says."""
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, __file__, str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    tensors = [load_file(directory / f"{rank}.safetensors") for rank in range(processes)]
    return tensors, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    tensors, logs = launch(tmp_path_factory.mktemp("one"), 1)
    return tensors[0], logs[0]


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("several"), request.param)


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}/")}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_n_processes_train_as_one_with_the_whole_batch(one, several, case):
    expected, log = part(one[0], case), one[1][case]
    kinds = {key.split("/")[1] for key in expected}
    assert kinds == {"losses", "gradient", "weight"} | ({"discriminator"} if case != "text_alone" else set())
    for tensors, logged in zip(*several):
        actual = part(tensors, case)
        assert set(actual) == set(expected)
        for key, value in expected.items():
            assert value.is_floating_point() is False or value.dtype == torch.float64
            torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
        assert len(logged[case]) == len(log) == STEPS + 1
        for ours, theirs in zip(logged[case][:-1], log):
            assert set(ours) == set(theirs)
            for name, value in theirs.items():  # the Trainer adds up its loss in float32
                assert ours[name] == pytest.approx(value, rel=1e-6 if name == "loss" else 1e-9, abs=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["published", "attention"])
def test_an_uneven_last_part_neither_doubles_nor_loses_a_row(one, several, heads):
    name = f"evaluate_{heads}"
    expected, log = part(one[0], name), one[1][name]
    assert [len(expected[f"{name}/{key}"]) for key in ("text_7", "image_7", "text_1", "image_1")] == [7, 4, 1, 1]
    for tensors, logged in zip(*several):
        for key, value in expected.items():
            assert torch.equal(tensors[key], value), key
        assert logged[name]["metrics"] == log["metrics"]
    texts = sorted(text for logged in several[1] for text in logged[name]["texts"])
    assert texts == sorted(log["texts"])  # six of seven are different, encoded twice; and one
    assert len(texts) == 6 + 1 + 6 and sum(logged[name]["images"] for logged in several[1]) == 4 + 1 + 4


@pytest.mark.slow
def test_n_processes_resume_exactly_and_drop_different_units(several):
    tensors, _ = several
    for ours in tensors:
        whole, resumed = part(ours, "resume/whole"), part(ours, "resume/resumed")
        assert len(whole) == len(resumed) > 10
        for (key, value), other in zip(whole.items(), resumed.values()):
            torch.testing.assert_close(other, value, rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    assert len({ours["resume/whole/seed"].item() for ours in tensors}) == len(tensors)


@pytest.mark.slow
def test_the_discriminator_is_never_in_half_precision(tmp_path):
    collator = DataCollatorForCrossLingualRetrieval(WordProcessor())
    args, rows, seen = arguments(tmp_path, max_steps=2, bf16=True, **REPAIRED[1]), rows_of(24, seed=1), []
    trainer = NrccrTrainer(tiny_model(**REPAIRED[0]), args, rows, data_collator=collator)
    trainer.discriminator.register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.dtype)))
    before = {name: value.clone() for name, value in trainer.discriminator.state_dict().items()}
    trainer.train()
    assert len(seen) == 3 * 2 and set(seen) == {(torch.float32, torch.float32)}
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own
        trainer.compute_loss(trainer.model, collator(rows[:6]))
    assert len(seen) == 9 and set(seen) == {(torch.float32, torch.float32)}
    half = NrccrTrainer(tiny_model().bfloat16(), args, rows, data_collator=collator)
    assert next(half.discriminator.parameters()).dtype == torch.float32
    assert all(not torch.equal(value, before[name]) for name, value in trainer.discriminator.state_dict().items())


@pytest.mark.slow
def test_launch_configs_are_read_and_use_bf16_on_gpus():
    files = {path.stem: ClusterConfig.from_yaml_file(path) for path in CONFIGS.glob("*.yaml")}
    assert set(files) == {"cpu", "single_gpu", "multi_gpu", "multi_node"}
    for name, config in files.items():
        assert str(config.mixed_precision) == ("no" if name == "cpu" else "bf16"), name
        assert config.distributed_type == ("MULTI_GPU" if name.startswith("multi") else "NO"), name


def refused(directory: Path, message: str, **changes):
    with pytest.raises(ValueError, match=message):
        trainer_of(directory, HEADS["attention"], rows_of(24, seed=1), **changes)


def test_what_nobody_has_proved_is_refused(tmp_path, monkeypatch):
    for name, message in (("FSDP", "FSDP is not supported"), ("DEEPSPEED", "DeepSpeed is not supported")):
        args = arguments(tmp_path)  # `accelerate launch` sets the variable; made before, as DeepSpeed is not installed
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(ValueError, match=message):
            NrccrTrainer(None, args)  # before anything else: it would fail without a model
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*accelerate_configs"):
        NrccrTrainer(None, args)
    refused(tmp_path, "FSDP is not supported", fsdp="full_shard")


def test_several_gpus_without_a_launcher_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/train.py", "--output_dir", "my outputs"])
    monkeypatch.setattr(NrccrTrainingArguments, "n_gpu", 4)
    refused(tmp_path, r"torchrun --nproc_per_node 4 examples/train.py --output_dir 'my outputs'\n")


@pytest.mark.slow
def test_train_refuses_before_anything_is_fetched(tmp_path, monkeypatch):
    from modeling_nrccr.training import experiment
    from modeling_nrccr.training import run as train

    monkeypatch.setattr(experiment, "load_translated_dataset", lambda *args, **kwargs: pytest.fail("fetched"))
    monkeypatch.setattr(NrccrTrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 4"):
        train.run(*train.parse_arguments(["--output_dir", str(tmp_path)]))


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each would train alone.*use_cpu=True"):
        NrccrTrainer(None, args)


def test_what_would_differ_on_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(NrccrTrainingArguments, "world_size", 2)
    refused(tmp_path, "dataloader_drop_last=False with 2 processes", dataloader_drop_last=False)
    refused(tmp_path, "'group_by_length' with 2 processes", train_sampling_strategy="group_by_length")
    lite = dict(vision_config=dict(model_type="efficientnet_lite", hidden_size=13), visual_feat_dim=None)
    with pytest.raises(ValueError, match="train_vision_tower=True with 2 processes: the BatchNorm"):
        trainer_of(tmp_path, HEADS["pooling"] | lite, rows_of(24, seed=1), train_vision_tower=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

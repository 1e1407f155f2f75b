"""`modeling_nrccr/recipes/paper`: each recipe builds model, loss and trainer, and trains; tiny encoders stand in."""

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
)

from modeling_nrccr import NrccrLossArguments, NrccrTrainer, compute_retrieval_metrics
from modeling_nrccr.training.callbacks import EpochDecayCallback
from modeling_nrccr.training.experiment import build_model
from modeling_nrccr.training.run import parse_arguments
from tests.support import ROOT


RECIPES = {path.stem: path for path in sorted((ROOT / "modeling_nrccr/recipes/paper").glob("*.yaml"))}
PICTURES, VIDEOS = {"multi30k_task1", "multi30k_task2", "mscoco"}, {"msrvtt_cn", "vatex"}
WORDS = ["hund", "katze", "dog", "cat", "red", "blue", "grun", "grün", "Grün"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab=vocab, do_lower_case=False).save_pretrained(folder / "text")
    sizes = dict(hidden_size=24, num_hidden_layers=12, num_attention_heads=4, intermediate_size=29)
    BertModel(BertConfig(vocab_size=len(vocab), **sizes)).save_pretrained(folder / "text")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=17)
    tower = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=512, **sizes)
    CLIPVisionModelWithProjection(tower).save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "vision")
    return folder


def rows(count: int, feat_dim: int | None) -> list[dict]:
    generator = np.random.default_rng(0)
    captions = [" ".join(generator.choice(WORDS, 3)) for _ in range(3 * count)]
    media = [
        {"visual_feats": generator.normal(size=(2 + i % 3, feat_dim)).astype("float32")}
        if feat_dim
        else {"image": Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype="uint8"))}
        for i in range(count)
    ]
    names = ("source_caption", "target_caption", "back_translation")
    return [media[i] | {"image_id": f"{i}"} | dict(zip(names, captions[3 * i :])) for i in range(count)]


def test_there_is_one_for_each_published_setting():
    assert set(RECIPES) == PICTURES | VIDEOS


@pytest.mark.parametrize(
    "path", sorted((ROOT / "modeling_nrccr/recipes/neighbours").glob("*.yaml")), ids=lambda path: path.stem
)
def test_neighbours_say_what_is_theirs_and_are_read(path):
    script, model, args = parse_arguments(["--recipe", str(path)])
    assert args.output_dir != "outputs/demo" and f"nrccr train --recipe neighbours/{path.stem}" in path.read_text()
    if path.stem != "cl2cm_teacher":  # it is told of in cl2cm.yaml
        assert all(word in path.read_text() for word in ("arXiv", "Theirs:", "Ours:", "Left out:"))
    assert args.needed_views() and model.adapter
    assert args.needs_teacher() or script.teacher is None


@pytest.mark.parametrize("name", RECIPES)
def test_values_are_the_published_ones_each_with_its_source(name):
    settings = yaml.safe_load(RECIPES[name].read_text())
    script, model, args = parse_arguments(["--recipe", str(RECIPES[name])])
    assert {key: getattr(args, key) for key in NrccrLossArguments.PUBLISHED} == NrccrLossArguments.PUBLISHED
    assert {field.name for field in fields(NrccrLossArguments)} <= set(settings)  # spelt out, whatever the defaults
    assert (args.margin, args.temperature, args.hardest_negatives) == (0.2, 0.07, True)
    assert args.trained_text_layers == (9 if name in PICTURES else 7) and args.frozen_dropout
    assert args.discriminator_kind == ("strong" if name == "vatex" else "not-so-weak")
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (1e-4, 128, 50)
    assert (args.lr_decay_per_epoch, args.plateau_factor, args.plateau_interval) == (0.99, 0.5, 3)
    assert args.early_stopping_patience == 11 and args.metric_for_best_model == "t2v_sum_recall"
    assert (args.max_grad_norm, args.weight_decay, args.eval_translation_weight) == (2, 0, 0.2)
    assert model.pool_padding and model.attention_score_scale == "hidden" and model.projection_norm == "batch_norm"
    assert (model.projection_dim, model.key_query_size, model.projection_dropout) == (1536, 512, 0.2)
    assert model.visual_head == ("pooling" if name in PICTURES else "attention")
    own = {"data", "language", "search_page", "logging_strategy", "output_dir"}  # of this run, no source
    for line in RECIPES[name].read_text().splitlines():
        key = line.split(":")[0]
        assert not line or line[0] == "#" or key in own or " # " in line, line


@pytest.mark.parametrize("name", RECIPES)
def test_it_builds_and_trains(name, encoders, tmp_path):
    feat_dim = {"msrvtt_cn": 4096, "vatex": 1024}.get(name)
    flags = {
        "recipe": RECIPES[name],
        "text_encoder": encoders / "text",
        "output_dir": tmp_path,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "vision_encoder": "none" if feat_dim else encoders / "vision",
    }
    _, model_arguments, args = parse_arguments([part for k, v in flags.items() for part in (f"--{k}", str(v))])
    model, processor = build_model(model_arguments)
    assert processor.tokenizer.tokenize("Grün") == ["grun"]
    assert model.config.visual_feat_dim == (feat_dim or 512)
    validation = rows(12, feat_dim)
    trainer = NrccrTrainer(model, args, rows(8, feat_dim), validation, processor)
    layers = model.text_tower.encoder.encoder.layer
    assert [p.requires_grad for layer in layers for p in layer.parameters()].count(
        True
    ) == 16 * args.trained_text_layers
    trained = [layer.output.dense.weight for layer in layers[-args.trained_text_layers :]]
    assert all(weight.requires_grad for weight in trained)
    (decay,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, EpochDecayCallback))
    (stop,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert (decay.decay, decay.plateau_factor, decay.plateau_interval) == (0.99, 0.5, 3)
    assert stop.early_stopping_patience == 11 and trainer.discriminator.kind == args.discriminator_kind
    before = [weight.detach().clone() for weight in trained]
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(not torch.equal(old, new) for old, new in zip(before, trained))
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    terms = {
        "triplet_loss",
        "target_triplet_loss",
        "distillation_loss",
        "feature_distillation_loss",
        "back_translation_loss",
        "adversarial_loss",
        "discriminator_loss",
    }
    assert terms == {key for key in logged if key.endswith("_loss") and key != "train_loss"}
    assert np.isfinite(logged["loss"])
    # the model is chosen by text-to-visual recalls of queries fused with their translation
    queries, images, owner = trainer.encode_dataset(validation, "target_caption")
    sources, _, _ = trainer.encode_dataset(validation, "source_caption")
    fused = compute_retrieval_metrics(queries, images, owner, sources, 0.2)
    assert logged["eval_t2v_sum_recall"] == pytest.approx(sum(fused[f"t2v_recall@{k}"] for k in (1, 5, 10)))
    assert logged["eval_t2v_map"] == pytest.approx(fused["t2v_map"])
    assert fused["t2v_map"] != compute_retrieval_metrics(queries, images, owner)["t2v_map"]


def test_each_command_of_the_readme_names_a_recipe_and_fits_the_parser():
    text = (ROOT / "modeling_nrccr/recipes/README.md").read_text()
    commands = [shlex.split(line)[2:] for line in re.findall(r"nrccr train --recipe [^`|\n]*", text)]
    for command in commands:
        parse_arguments(command)
    named = {Path(command[1]).stem for command in commands}
    assert named == set(RECIPES)
    for name, figure in (
        ("vatex", "366.5"),
        ("msrvtt_cn", "308"),
        ("mscoco", "512.4"),
        ("multi30k_task1", "450.7"),
        ("multi30k_task2", "480.9"),
    ):
        assert figure in text and figure in RECIPES[name].read_text()


def test_a_tokenizer_that_ignores_lower_casing_is_refused(encoders, tmp_path):
    shutil.copytree(encoders / "text", tmp_path / "text")
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ete": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "text")
    flags = ["--recipe", str(RECIPES["vatex"]), "--text_encoder", str(tmp_path / "text")]
    with pytest.raises(ValueError, match="do_lower_case is BERT's"):
        build_model(parse_arguments(flags)[1])


@pytest.mark.parametrize(
    "arguments, settings, answer",
    [
        (["--triplet_loss_weight", "1"], {}, "--triplet_loss_weight is now losses: {triplet: ...}"),
        (["--triplet_loss_weight=1"], {}, "--triplet_loss_weight is now losses: {triplet: ...}"),
        ([], {"triplet_loss_weight": 1.0}, "triplet_loss_weight is now losses: {triplet: ...}"),
        (["--adapter_kind", "lora"], {}, "--adapter_kind is now adapter: {kind: ...}"),
        (["--discriminator_loss_weight", "1"], {}, "--discriminator_loss_weight is now --discriminator_weight"),
    ],
)
def test_an_old_field_answers_with_the_new_one(arguments, settings, answer):
    with pytest.raises(ValueError, match=f"^{re.escape(answer)}$"):
        parse_arguments(arguments, **settings)


def test_an_adapter_is_said_over_the_one_that_a_recipe_has():
    demo = ["--recipe", "demo"]
    lora = {"kind": "lora", "center": True, "noise": 0.0, "rank": 32, "layers": -1}
    assert parse_arguments(demo)[1].adapter == lora
    assert parse_arguments([*demo, "--adapter", "rank=8,center=false"])[1].adapter == lora | {
        "rank": 8,
        "center": False,
    }
    assert parse_arguments(['--adapter={"kind": "dynamic"}'])[1].adapter["kind"] == "dynamic"
    for adapter, reason in (
        ("kind=liner", "do you mean linear"),
        ("width=8", "unknown width; its settings are kind, center, noise, rank, layers"),
        ("noise=-1", "noise=-1"),
        ("rank=2.5", "rank=2.5"),
        ("lora", "write it as a=1,b=2"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_arguments(["--adapter", adapter])

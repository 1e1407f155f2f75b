"""Languages are added to a model, chosen, saved, loaded; the model itself never changes."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    NrccrModel,
    NrccrTrainer,
    NrccrTrainingArguments,
)
from modeling_nrccr.languages import LANGUAGE_FILE
from modeling_nrccr.retrieval.encoding import encode_texts
from modeling_nrccr.training.losses import agreement_weights
from tests.support import tiny_model, toy_rows


CAPTIONS = ["palabra1 palabra5 palabra7", "palabra2", "palabra3 palabra9"]


def base(seed: int = 0, **config) -> NrccrModel:
    return tiny_model(seed, text_head="pooling", teacher_view="source", **config)


def trained(model, language, directory, processor, rows=None, steps: int = 30, **arguments) -> NrccrTrainer:
    defaults = {
        "train_language": language,
        "text_only": True,
        "losses": {"feature_distillation": 1.0},
        "max_steps": steps,
        "learning_rate": 1e-2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "use_cpu": True,
        "per_device_train_batch_size": 16,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = NrccrTrainingArguments(output_dir=str(directory), **(defaults | arguments))
    collator = DataCollatorForCrossLingualRetrieval(processor)
    trainer = NrccrTrainer(model, args, rows or toy_rows(48), data_collator=collator)
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


def embeds(model, texts, processor, language=None) -> torch.Tensor:
    with model.using_language(language):
        return encode_texts(model, texts, processor)


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "dynamic", "lora"])
def test_training_changes_the_language_and_nothing_else(kind, tmp_path, word_processor):
    model = base()
    model.add_language("xx", kind=kind, rank=4, layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    english = embeds(model, ["word1 word2"], word_processor)
    feats = torch.randn(5, 3, 13)
    images = model.get_image_features(visual_feats=feats).pooler_output
    rows = toy_rows(48)
    start = embeds(model, [row["target_caption"] for row in rows], word_processor, "xx")
    trained(model, "xx", tmp_path, word_processor)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("language_adapters.xx." in name or ".xx." in name for name in changed)
    assert torch.equal(model.get_image_features(visual_feats=feats).pooler_output, images)
    assert torch.equal(embeds(model, ["word1 word2"], word_processor), english)
    sources = embeds(model, [row["source_caption"] for row in rows], word_processor)
    targets = embeds(model, [row["target_caption"] for row in rows], word_processor, "xx")
    assert (sources * targets).sum(1).mean() > (sources * start).sum(1).mean() + 0.1


@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_a_saved_language_is_loaded_into_another_copy(kind, tmp_path, word_processor):
    model = base()
    model.add_language("xx", kind=kind, rank=4, layers=1)
    trained(model, "xx", tmp_path / "run", word_processor)
    model.save_language("xx", tmp_path / "xx")
    assert [path.name for path in (tmp_path / "xx").iterdir()] == [LANGUAGE_FILE]
    other = base()
    other.add_language("zz", kind=kind, rank=4, layers=2)
    other.load_language("yy", tmp_path / "xx")  # under another name
    expected = embeds(model, CAPTIONS, word_processor, "xx")
    torch.testing.assert_close(embeds(other, CAPTIONS, word_processor, "yy"), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds(other, CAPTIONS, word_processor), embeds(base(), CAPTIONS, word_processor))
    other.remove_language("yy")
    with pytest.raises(ValueError, match="no adapter for the language 'yy' .here: zz."):
        other.set_language("yy")


@pytest.mark.parametrize("kind", ["linear", "lora"])
@torch.no_grad()
def test_a_batch_of_several_languages_is_each_alone(kind, word_processor):
    model = base()
    for number, language in enumerate(("xx", "yy")):
        torch.manual_seed(number)
        model.add_language(language, kind=kind, rank=3, layers=1)
        for parameter in model.language_weights(language).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    spoken = ["xx", None, "yy"]
    inputs = word_processor(text=CAPTIONS)
    mixed = model.get_text_features(**inputs, languages=spoken).pooler_output
    alone = [embeds(model, [text], word_processor, language)[0] for text, language in zip(CAPTIONS, spoken)]
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-6, rtol=0)
    assert (alone[0] @ embeds(model, CAPTIONS[:1], word_processor, "yy")[0]) < 0.99
    outputs = model(
        **{f"target_{key}": value for key, value in inputs.items()}, **inputs, languages="xx", return_teacher=False
    )
    torch.testing.assert_close(outputs.text_embeds, embeds(model, CAPTIONS, word_processor), atol=1e-6, rtol=0)
    expected = embeds(model, CAPTIONS, word_processor, "xx")
    torch.testing.assert_close(outputs.target_text_embeds, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="2 languages for 3 texts"):
        model.get_text_features(**inputs, languages=["xx", "yy"])


def test_another_model_or_revision_is_refused(tmp_path, word_processor):
    model = base()
    model.config.dual_encoder = {"name": "us/base", "revision": "a" * 40}
    model.add_language("xx")
    model.save_language("xx", tmp_path)
    model.to(torch.bfloat16).load_language("xx", tmp_path)  # the same one in another precision
    with pytest.raises(ValueError, match="was made for us/base .*, and this is .* similarity 0"):
        base(seed=1).load_language("xx", tmp_path)
    with pytest.raises(ValueError, match="similarity 0.0000"):
        base(projection_dim=7).load_language("xx", tmp_path)
    other = base()
    other.config.dual_encoder = {"name": "us/base", "revision": "b" * 40}
    with pytest.raises(ValueError, match="revision b{40}"):
        other.load_language("xx", tmp_path)
    path = tmp_path / LANGUAGE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no language file, or damaged"):
        base().load_language("xx", tmp_path)


def test_a_full_export_keeps_its_languages(tmp_path, word_processor):
    model = base()
    for kind in ("linear", "dynamic"):
        model.add_language(kind, kind=kind, rank=3)
        trained(model, kind, tmp_path / "run", word_processor, steps=3)
    model.set_language("dynamic").save_pretrained(tmp_path / "full")
    loaded = NrccrModel.from_pretrained(tmp_path / "full")
    assert loaded.language == "dynamic"
    for language in (None, "linear", "dynamic"):
        expected = embeds(model, CAPTIONS, word_processor, language)
        torch.testing.assert_close(embeds(loaded, CAPTIONS, word_processor, language), expected, atol=1e-6, rtol=0)


def test_lora_is_merged_for_an_export_that_needs_no_peft(tmp_path, word_processor, monkeypatch):
    model = base()
    model.add_language("xx", kind="lora", rank=3, layers=2)
    trained(model, "xx", tmp_path / "run", word_processor)
    expected = embeds(model, CAPTIONS, word_processor, "xx")
    model.merge_language("xx").save_pretrained(tmp_path / "merged")
    assert not [key for key in load_file(tmp_path / "merged/model.safetensors") if ".lora_" in key or ".base_" in key]
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = NrccrModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(embeds(loaded, CAPTIONS, word_processor, "xx"), expected, atol=1e-5, rtol=0)
    with pytest.raises(ImportError, match="pip install"):
        loaded.add_language("yy", kind="lora")


def test_training_from_precomputed_embeddings_alone(tmp_path, word_processor):
    model, rows = base(), toy_rows(48)
    teacher = embeds(base(seed=3), [row["source_caption"] for row in rows], word_processor)
    images = torch.randn(len(rows), 11)
    for row, of_text, of_image in zip(rows, teacher, images):
        row.pop("image")
        row |= {"teacher_text_embeds": of_text.tolist(), "image_embeds": of_image.tolist()}
    model.add_language("xx")
    start = embeds(model, [row["target_caption"] for row in rows], word_processor, "xx")
    losses = {"feature_distillation": 1.0, "target_contrastive": 0.1}
    trainer = trained(model, "xx", tmp_path, word_processor, rows, text_only=False, steps=60, losses=losses)
    targets = embeds(model, [row["target_caption"] for row in rows], word_processor, "xx")
    assert (targets * teacher).sum(1).mean() > (start * teacher).sum(1).mean() + 0.3
    assert trainer.evaluate(rows)["eval_t2v_recall@10"] > 0


def test_a_resumed_language_run_ends_as_the_whole_one(tmp_path, word_processor):
    def run(**arguments):
        model = base()
        torch.manual_seed(0)
        model.add_language("xx", kind="bottleneck", rank=3, noise=0.3)
        options = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "steps": 12}
        trained(model, "xx", tmp_path, word_processor, **options, **arguments)
        return model.language_weights("xx")

    whole = run()
    checkpoint = tmp_path / "checkpoint-10"
    saved = load_file(checkpoint / "model.safetensors")
    assert all(key.startswith("language_adapters.xx.") for key in saved)  # not the frozen encoders
    resumed = run(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_agreement_weights_are_zero_for_the_unrelated():
    source = torch.eye(4)
    back = source[[0, 1, 3, 2]]  # two went wrong
    weights = agreement_weights(source, back)
    assert weights[:2].min() > 0.9 and weights[2:].max() == 0


def test_another_language_inside_the_encoder_touches_neither_cache_nor_teacher(tmp_path, word_processor):
    from modeling_nrccr import FeatureCache
    from modeling_nrccr.training.teacher import add_teacher_embeds as teach

    model, rows = base(), toy_rows(24)
    expected = teach([dict(row) for row in rows], model, word_processor)
    plain = FeatureCache(model.set_trained_layers(0), word_processor)
    plain.add_texts(CAPTIONS)
    model.add_language("xx", kind="lora", rank=3, layers=-1)
    assert model.adapter("xx").layers == 3 and model.config.languages["xx"]["layers"] == 3
    with torch.no_grad():
        for parameter in model.language_weights("xx").values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.set_language("xx")  # as a model that was saved so is loaded
    taught = teach([dict(row) for row in rows], model, word_processor)
    for row, other in zip(taught, expected):
        torch.testing.assert_close(row["teacher_text_embeds"], other["teacher_text_embeds"], atol=1e-6, rtol=0)
    model.add_language("yy")
    cache = FeatureCache(model.train_language("yy"), word_processor)
    cache.add_texts(CAPTIONS)
    for caption in CAPTIONS:
        torch.testing.assert_close(cache.texts[caption], plain.texts[caption], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="take another code"):
        model.add_language("to")

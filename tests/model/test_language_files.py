"""Languages come and go without a trace, files are looked at before anything changes, threads ask side by side."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BatchFeature, BertConfig, CLIPTextConfig

from modeling_nrccr import EfficientNetLiteConfig, NrccrConfig, NrccrModel, NrccrRetriever
from modeling_nrccr.languages import LANGUAGE_FILE, read_language_file
from tests.model.test_languages import CAPTIONS, base, embeds, trained


@torch.no_grad()
def speaking(model: NrccrModel, language: str = "gl", seed: int = 0, **settings) -> NrccrModel:
    """With a language whose adapter does something."""
    model.add_language(language, **{"kind": "lora", "rank": 3, "layers": 1} | settings)
    torch.manual_seed(seed)
    for weights in model.language_weights(language).values():
        weights.add_(0.3 * torch.randn_like(weights))
    return model


def saved(tmp_path, **settings):
    speaking(base(), **settings).save_language("gl", tmp_path)
    return tmp_path / LANGUAGE_FILE


# ------------------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("then", ["nothing", "linear", "fewer layers"])
def test_a_removed_language_leaves_no_trace(then, tmp_path, word_processor):
    model = speaking(base(), layers=-1)
    names = set(base().state_dict())
    model.remove_language("gl")
    if then != "nothing":
        speaking(model, "ca", kind="linear" if then == "linear" else "lora")
    assert {name for name in model.state_dict() if "ca" not in name.split(".")} - names <= {
        name for name in model.state_dict() if "base_layer" in name and then == "fewer layers"
    }
    model.save_pretrained(tmp_path)
    loaded = NrccrModel.from_pretrained(tmp_path).eval()
    for language in [None, *model.language_adapters]:
        expected = embeds(model, CAPTIONS, word_processor, language)
        torch.testing.assert_close(embeds(loaded, CAPTIONS, word_processor, language), expected, atol=1e-6, rtol=0)
    assert torch.equal(embeds(model, CAPTIONS, word_processor), embeds(base(), CAPTIONS, word_processor))


def test_a_language_that_is_loaded_anew_stays_the_active_one(tmp_path, word_processor):
    path = saved(tmp_path)
    model = speaking(base(), seed=1).set_language("gl")
    model.load_language("gl", path.parent)
    assert model.language == model.config.language == "gl"
    expected = embeds(speaking(base()), CAPTIONS, word_processor, "gl")
    torch.testing.assert_close(embeds(model, CAPTIONS, word_processor, "gl"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "code, text",
    [
        (
            "mlp",
            CLIPTextConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=29,
                vocab_size=37,
                max_position_embeddings=40,
                eos_token_id=3,
            ),
        ),
        (
            "dense",
            BertConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=29,
                vocab_size=37,
                max_position_embeddings=40,
            ),
        ),
    ],
)
def test_a_code_may_be_the_name_of_a_module(code, text, tmp_path):
    model = NrccrModel(text_config_of(text))
    speaking(model, code, layers=-1).train_language(code)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.language_keys(code) if "shift" not in name and "deviation" not in name}
    model.save_language(code, tmp_path)
    _, weights = read_language_file(tmp_path / LANGUAGE_FILE)
    assert all("lora_" in name for name in weights if name.startswith("text_tower."))


def text_config_of(text):
    return NrccrConfig(
        text_config=text, projection_dim=11, visual_feat_dim=13, text_head="pooling", teacher_view="source"
    )


@pytest.mark.parametrize("code", ["base", "training", "keys", "to", "a.b", "", None, 3])
def test_what_cannot_name_a_language_is_refused(code):
    with pytest.raises(ValueError, match="language|model's own|torch keeps"):
        base().add_language(code)


def test_adding_a_language_freezes_nothing():
    model = base().requires_grad_(True)
    speaking(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- files


def rewritten(path, change):
    """The file with other contents: `change(about, weights)`, which returns what is written of `about`."""
    with safe_open(path, "pt") as file:
        about, weights = json.loads(file.metadata()["about"]), {key: file.get_tensor(key) for key in file.keys()}
    changed = change(about, weights)
    save_file(weights, path, {"about": changed if isinstance(changed, str) else json.dumps(about)})


def settings(**values):
    return lambda about, weights: about["settings"].update(values)


def tensor(name, value):
    def change(about, weights):
        key = next(key for key in weights if name in key)
        weights[key] = value(weights[key])

    return change


DAMAGED = {
    "NaN probe": (tensor("probe", lambda value: value * torch.nan), "similarity nan"),
    "NaN weights": (tensor("lora_A", lambda value: value * torch.nan), "lora_A.* not finite"),
    "shape": (tensor("update.weight", lambda value: value[:2].clone()), r"shape \(2, 24\), not \(24, 24\)"),
    "integers": (tensor("update.bias", lambda value: value.int()), "update.bias"),
    "huge rank": (settings(rank=10**8), "shape"),
    "negative rank": (settings(rank=-1), "rank=-1"),
    "rank of text": (settings(rank="4"), "rank='4'"),
    "layers": (settings(layers=99), "layers=99"),
    "unknown setting": (settings(colour="red"), "colour"),
    "unknown kind": (settings(kind="telepathy"), "telepathy"),
    "null": (lambda about, weights: "null", "does not say what it is"),
    "a list": (lambda about, weights: "[1]", "does not say what it is"),
    "deep": (lambda about, weights: "[" * 100_000, "damaged"),
    "no model": (lambda about, weights: about.__delitem__("model"), "model is None"),
    "lacking": (lambda about, weights: weights.__delitem__("update.bias"), "lacks update.bias"),
    "surplus": (lambda about, weights: weights.update(more=torch.ones(1)), "does not know, more"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_and_the_language_before_it_stays(damage, tmp_path, word_processor):
    change, message = DAMAGED[damage]
    path = saved(tmp_path)
    model = speaking(base(), seed=1).set_language("gl")
    before = embeds(model, CAPTIONS, word_processor, "gl")
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        model.load_language("gl", tmp_path)
    assert str(path) in str(error.value)
    assert list(model.language_adapters) == ["gl"] and model.language == "gl"
    assert torch.equal(embeds(model, CAPTIONS, word_processor, "gl"), before)


@pytest.mark.parametrize("made, used", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_file_holds_in_any_precision(made, used, tmp_path):
    """Of a deep encoder, whose embeddings in half precision are those of the same weights to two digits."""

    def deep():
        return base(
            text_config=dict(
                vocab_size=37,
                hidden_size=24,
                num_hidden_layers=12,
                num_attention_heads=4,
                intermediate_size=29,
                max_position_embeddings=40,
            )
        )

    speaking(deep().to(torch.bfloat16).to(made)).save_language("gl", tmp_path)
    model = deep().to(torch.bfloat16).to(used)
    model.load_language("gl", tmp_path)
    assert model.dtype == used and model.language_adapters["gl"].update.weight.dtype == used


def test_the_probe_is_that_of_the_base_after_training_in_half_precision(tmp_path, word_processor):
    """Accelerate leaves an autocast around the model's forward."""
    model, expected = base(), base().probe()
    model.add_language("gl")
    trained(model, "gl", tmp_path, word_processor, steps=2, bf16=True)
    torch.testing.assert_close(model.probe(), expected, atol=1e-6, rtol=0)


def test_an_index_holds_in_any_precision(tmp_path, word_processor):
    def seeing(seed: int = 0) -> NrccrModel:
        return base(
            seed,
            vision_config=EfficientNetLiteConfig(width_coefficient=0.2, depth_coefficient=0.2, hidden_size=24),
            visual_feat_dim=24,
        )

    def processor(images=None, **kwargs):
        pixels = [np.asarray(image.resize((32, 32)), np.float32).transpose(2, 0, 1) / 255 for image in images]
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type="pt")

    for made, used in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        rounded = seeing().to(made)
        retriever = NrccrRetriever(rounded, processor)
        retriever.add([Image.new("RGB", (9, 9), "red")])
        retriever.save(tmp_path / str(made))
        assert len(NrccrRetriever.load(tmp_path / str(made), seeing().to(used), processor)) == 1
        with pytest.raises(ValueError, match="made by another model"):
            NrccrRetriever.load(tmp_path / str(made), seeing(1).to(used), processor)


# --------------------------------------------------------------------------------------------------------- threads


@torch.no_grad()
def test_threads_that_ask_side_by_side_get_what_they_get_alone(word_processor):
    model = speaking(speaking(base(), "gl", layers=-1), "ca", seed=1, kind="linear")
    asked = [("gl", 0), (None, 1), ("ca", 2)]
    inputs = word_processor(text=CAPTIONS)

    def ask(language, row):
        return model.get_text_features(**inputs, languages=[language] * 3).pooler_output[row]

    expected = {one: ask(*one) for one in asked}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    wrong = []

    def work(one):
        with torch.inference_mode():
            wrong.extend(one for _ in range(25) if not torch.allclose(ask(*one), expected[one], atol=1e-6))

    threads = [threading.Thread(target=work, args=(one,)) for one in asked * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.language is None
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


# ------------------------------------------------------------------------------------------- the model's own manners


def test_what_the_model_does_not_know_is_refused(word_processor):
    model = speaking(base())
    inputs = word_processor(text=CAPTIONS)
    for misspelt in ("language", "output_hidden_states", "inputs_embeds"):
        for call in (model, model.get_text_features):
            with pytest.raises(TypeError, match=misspelt):
                call(**inputs, **{misspelt: "gl"})
    for call in (model, model.get_text_features, model.get_image_features):
        with pytest.raises(ValueError, match="got n|nothing to embed"):
            call()


@torch.no_grad()
def test_a_tuple_where_it_is_asked_for(word_processor):
    model, inputs = base(), word_processor(text=CAPTIONS)
    states, embeds = model.get_text_features(**inputs, return_dict=False)
    assert torch.equal(embeds, model.get_text_features(**inputs).pooler_output) and states.ndim == 3
    feats = torch.randn(3, 2, 13)
    outputs = model(**inputs, visual_feats=feats)
    for one, other in zip(model(**inputs, visual_feats=feats, return_dict=False), outputs.to_tuple(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_embeddings_of_another_precision_are_taken(word_processor):
    model, inputs = base().to(torch.bfloat16), word_processor(text=CAPTIONS)
    outputs = model(**inputs, image_embeds=torch.randn(3, 11))
    assert outputs.logits_per_text.shape == (3, 3)


def test_the_vocabulary_grows(word_processor):
    model = base()
    before = embeds(model, CAPTIONS, word_processor)
    model.resize_token_embeddings(50)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 50
    assert torch.equal(embeds(model, CAPTIONS, word_processor), before)

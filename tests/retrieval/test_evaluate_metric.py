"""The metric of `evaluate`, loaded from its folder as users do, without a network."""

import doctest
from pathlib import Path

import evaluate
import pytest
import torch

from modeling_nrccr import compute_retrieval_metrics


FOLDER = Path(__file__).parents[2] / "examples" / "metrics" / "nrccr_retrieval"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.syspath_prepend(evaluate.config.HF_MODULES_CACHE)
        yield evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


def embeddings(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    texts, sources = torch.randn(2, 30, 7, generator=generator, dtype=torch.float64).to(dtype)
    images = torch.randn(11, 7, generator=generator, dtype=torch.float64).to(dtype)
    return texts, images, torch.randint(0, 11, (30,), generator=generator), sources


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_packages_own(metric, dtype):
    texts, images, owner, sources = embeddings(dtype)
    expected = compute_retrieval_metrics(texts, images, owner)
    predictions = texts.float() if dtype == torch.bfloat16 else texts  # which NumPy does not know
    assert metric.compute(predictions=predictions, references=owner, image_embeds=images) == expected
    fusion = {"source_text_embeds": sources, "translation_weight": 0.4}
    got = metric.compute(predictions=predictions, references=owner, image_embeds=images, **fusion)
    assert got == compute_retrieval_metrics(texts, images, owner, sources, 0.4) != expected


def test_batches_arrays_and_lists(metric):
    texts, images, owner, _ = embeddings()
    for part in range(3):
        metric.add_batch(predictions=texts[part::3].numpy(), references=owner[part::3].tolist())
    # another order of the captions: the same rankings
    assert metric.compute(image_embeds=images.tolist()) == pytest.approx(
        compute_retrieval_metrics(texts, images, owner)
    )


def test_its_example_is_true(metric, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[2])
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {"evaluate": evaluate}, "", None, 0)
    assert len(example.examples) == 4 and doctest.DocTestRunner().run(example).failed == 0


def test_bad_input_is_named(metric):
    texts, images, owner, _ = embeddings()
    with pytest.raises(ValueError, match=r"caption_to_image\[2\] is 11, but image_embeds has rows 0 to 10"):
        metric.compute(predictions=texts[:3], references=[0, 1, 11], image_embeds=images)
    with pytest.raises(ValueError, match="Mismatch in the number of predictions .30. and references .3."):
        metric.compute(predictions=texts, references=owner[:3], image_embeds=images)

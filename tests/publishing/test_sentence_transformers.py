"""What sentence-transformers measures and stores of a model, against this repository's numbers."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import truncate_embeddings
from sentence_transformers.util.quantization import quantize_embeddings
from transformers import AutoModel, AutoProcessor

from benchmarks import embedding_quantisation as benchmark
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files
from modeling_nrccr.retrieval.encoding import picture_rows
from modeling_nrccr.retrieval.evaluation import evaluate_dataset
from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics
from tests.model.test_hub import publish


ROOT = Path(__file__).parents[2]


def caption_rows(seed: int, pictures: int = 24, captions: int = 36) -> Dataset:
    """No two captions and no two pictures are alike: mteb ranks equal ones by their ids, we at the middle."""
    generator = random.Random(seed)
    texts = generator.sample(list(itertools.permutations(["a", "dog", "un", "can", "corre"], 3)), captions)
    noise = np.random.default_rng(seed).integers(0, 255, (pictures, 24, 24, 3), dtype=np.uint8)
    rows = [
        {"image_id": f"{i % pictures}", "image": PIL.fromarray(noise[i % pictures]), "target_caption": " ".join(text)}
        for i, text in enumerate(texts)
    ]
    features = {"image_id": Value("string"), "image": Image(), "target_caption": Value("string")}
    return Dataset.from_list(rows, features=Features(features))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences") / "model"
    publish(folder)
    write_sentence_transformers_files(folder)
    return folder


def test_its_evaluator_gives_our_recalls(folder):
    rows, model = caption_rows(0), SentenceTransformer(str(folder), device="cpu")
    ours = evaluate_dataset(
        AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder), rows, show_progress=False
    )["all"]["metrics"]
    first_rows, owner = picture_rows(rows["image_id"])
    captions = {f"caption-{i}": text for i, text in enumerate(rows["target_caption"])}
    pictures = {f"picture-{i}": rows[row]["image"] for i, row in enumerate(first_rows.values())}
    pairs = [(f"caption-{i}", f"picture-{picture}") for i, picture in enumerate(owner.tolist())]
    relevant = {query: {found for other, found in pairs if other == query} for query, _ in pairs}
    found = InformationRetrievalEvaluator(captions, pictures, relevant)(model)
    back = {picture: {caption for caption, other in pairs if other == picture} for picture in pictures}
    found_back = InformationRetrievalEvaluator(pictures, captions, back)(model)
    for k in (1, 5, 10):
        assert 100 * found[f"cosine_accuracy@{k}"] == pytest.approx(ours[f"t2v_recall@{k}"])
        assert 100 * found[f"cosine_recall@{k}"] == pytest.approx(ours[f"t2v_recall@{k}"])  # a caption has one picture
        assert 100 * found_back[f"cosine_accuracy@{k}"] == pytest.approx(ours[f"v2t_recall@{k}"])
    assert 0 < ours["t2v_recall@10"] < 100 and found_back["cosine_recall@1"] < found_back["cosine_accuracy@5"]


def test_its_max_seq_length_is_where_texts_are_cut(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    whole, short = model.encode("a dog un can corre"), model.encode("a dog")
    assert model.max_seq_length == 64 and not np.allclose(whole, short, atol=1e-3)
    model.max_seq_length = 2
    np.testing.assert_allclose(model.encode("a dog un can corre"), short, atol=1e-6)
    np.testing.assert_allclose(model.encode(" a  dog\n"), short, atol=1e-6)
    cut = SentenceTransformer(str(folder), device="cpu", processor_kwargs={"model_max_length": 2})
    np.testing.assert_allclose(cut.encode("a dog un can corre"), short, atol=1e-6)
    with pytest.raises(TypeError, match="takes no 'stride' in text_kwargs"):
        model.encode("a dog", processing_kwargs={"text": {"stride": 1}})


def test_truncated_and_quantised_embeddings_are_measured(folder):
    rows = caption_rows(2)
    test = benchmark.encode(SentenceTransformer(str(folder), device="cpu"), rows)
    short = SentenceTransformer(str(folder), device="cpu", truncate_dim=4).encode(rows["target_caption"][:])
    torch.testing.assert_close(truncate_embeddings(test[0], 4), torch.from_numpy(short), atol=1e-6, rtol=0)

    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(40, 64, generator=generator)
    images, owner = texts + 1.5 * torch.randn(40, 64, generator=generator), torch.arange(40)
    found = benchmark.measure((texts, images, owner), (texts, images, owner), (64, 16))
    full = found["64"]
    assert full["float32"]["sum_recall"] == compute_retrieval_metrics(texts, images, owner)["sum_recall"]
    assert [full[name]["bytes"] for name in ("float32", "int8", "binary, rescored")] == [256, 64, 8]
    assert abs(full["int8"]["sum_recall"] - full["float32"]["sum_recall"]) < 20
    assert found["16"]["binary"]["sum_recall"] < full["binary"]["sum_recall"] < full["float32"]["sum_recall"]
    assert full["binary, rescored"]["sum_recall"] > full["binary"]["sum_recall"]


@pytest.mark.parametrize("dim", [16, 12])
def test_bits_rank_as_their_hamming_distance(dim):
    embeds = torch.randn(9, dim, generator=torch.Generator().manual_seed(0)).numpy()
    numbers = benchmark.as_numbers(quantize_embeddings(embeds, "binary"), "binary", dim)
    assert torch.equal(numbers, torch.from_numpy(np.where(embeds > 0, 1.0, -1.0).astype(np.float32)))


def test_the_page_has_the_committed_numbers():
    report = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(report) in benchmark.BLOCK.search(benchmark.PAGE.read_text())[0]
    demo = json.loads((ROOT / "docs/demo.json").read_text())
    assert report["results"]["1024"]["float32"]["sum_recall"] == pytest.approx(demo["test"]["sum_recall"])

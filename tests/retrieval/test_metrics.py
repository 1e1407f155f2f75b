"""Metrics against the recorded numbers of the published code, a slow obvious implementation, and closed forms."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_nrccr.retrieval import metrics as module
from modeling_nrccr.retrieval.metrics import (
    chance_metrics,
    compute_retrieval_metrics,
    fuse_query_embeds,
    mean_rank_variance,
    retrieval_ranks,
)


FIXTURES = Path(__file__).parents[1] / "fixtures" / "reference"
RECORDED = {"r1": "recall@1", "r5": "recall@5", "r10": "recall@10", "medr": "median_rank", "meanr": "mean_rank"}
RECORDED["map"] = "map"


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Chunks so small that every test crosses their borders."""
    monkeypatch.setattr(module, "CHUNK_SIZE", 1)


def slow_metrics(scores, caption_to_image):
    """Average-rank metrics in plain Python from a captions x pictures list of lists."""

    def rank(score, others):
        return 1 + sum(other > score for other in others) + sum(other == score for other in others) / 2

    ranks, precisions = {"t2v": [], "v2t": []}, {"t2v": [], "v2t": []}
    for row, image in zip(scores, caption_to_image):
        ranks["t2v"].append(rank(row[image], row[:image] + row[image + 1 :]))
        precisions["t2v"].append(1 / ranks["t2v"][-1])
    for image in sorted(set(caption_to_image)):
        column = [row[image] for row in scores]
        own = sorted((s for s, i in zip(column, caption_to_image) if i == image), reverse=True)
        others = [s for s, i in zip(column, caption_to_image) if i != image]
        ranks["v2t"].append(rank(own[0], others))
        precisions["v2t"].append(sum(n / (n - 1 + rank(s, others)) for n, s in enumerate(own, 1)) / len(own))
    result = {}
    for way in ("t2v", "v2t"):
        ordered, n = sorted(ranks[way]), len(ranks[way])
        for k in (1, 5, 10):
            result[f"{way}_recall@{k}"] = 100 * sum(r <= k for r in ordered) / n
        result[f"{way}_median_rank"] = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        result[f"{way}_mean_rank"] = sum(ordered) / n
        result[f"{way}_map"] = sum(precisions[way]) / n
    result["sum_recall"] = sum(value for name, value in result.items() if "recall" in name)
    result["mean_recall"] = result["sum_recall"] / 6
    return result


@pytest.mark.parametrize("name", ["v8_small", "v12_single", "v50", "v50_shuffled"])
def test_equals_the_numbers_recorded_from_the_published_code(name):
    record = json.loads((FIXTURES / f"metrics_{name}.json").read_text())
    tensors = load_file(FIXTURES / f"metrics_{name}.safetensors")
    owner = torch.tensor(record["caption_owner_index"])
    for result in record["results"]:
        got = compute_retrieval_metrics(
            tensors["trans_emb"], tensors["video_emb"], owner, tensors["source_emb"], result["w_source"]
        )
        for way in ("t2v", "v2t"):
            for theirs, ours in RECORDED.items():
                assert got[f"{way}_{ours}"] == pytest.approx(result[way][theirs], abs=1e-9), (result, way, ours)
    assert len(record["results"]) == 5


@pytest.mark.parametrize("seed", range(6))
def test_equals_a_slow_implementation_with_ties(seed):
    """Vectors of few distinct values give many exact ties; uneven caption counts, pictures without captions."""
    generator = torch.Generator().manual_seed(seed)
    num_captions, num_images = [(150, 70), (67, 130), (9, 4), (1, 1), (200, 3), (131, 66)][seed]
    signs = torch.randint(0, 2, (num_captions + num_images, 4), generator=generator) * 2 - 1
    texts, images = signs.double().split([num_captions, num_images])  # of norm 2: products are exact
    owner = torch.randint(0, num_images, (num_captions,), generator=generator)
    expected = slow_metrics((texts @ images.T).tolist(), owner.tolist())
    for dtype in (torch.float32, torch.float64):
        got = compute_retrieval_metrics(texts.to(dtype), images.to(dtype), owner)
        assert got == pytest.approx(expected, abs=1e-9)
        assert set(got) == set(chance_metrics(num_captions, num_images, owner))
        for way, ranks in zip(("t2v", "v2t"), retrieval_ranks(texts.to(dtype), images.to(dtype), owner)):
            assert ranks.nanmean().item() == pytest.approx(expected[f"{way}_mean_rank"])
            assert (ranks <= 5).sum() / ranks.isfinite().sum() * 100 == pytest.approx(expected[f"{way}_recall@5"])


@pytest.mark.parametrize("num_captions, num_images", [(120, 40), (60, 150), (7, 3), (40, 1)])
def test_equals_trec_eval_without_ties(num_captions, num_images):
    """`pytrec_eval` wraps NIST's trec_eval: what others think of several captions a picture, and of none."""
    import pytrec_eval

    generator = torch.Generator().manual_seed(num_captions)
    texts, images = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (num_captions, num_images))
    owner = torch.randint(0, num_images, (num_captions,), generator=generator)
    images[owner] += 0.5 * texts  # some are found
    scores = torch.nn.functional.normalize(texts) @ torch.nn.functional.normalize(images).T
    assert len(scores.unique()) == scores.numel()
    got, ours = compute_retrieval_metrics(texts, images, owner), retrieval_ranks(texts, images, owner)
    is_own = owner[:, None] == torch.arange(num_images)
    for way, matrix, own, ranks in zip(("t2v", "v2t"), (scores, scores.T), (is_own, is_own.T), ours):
        queries = own.any(1).nonzero()[:, 0].tolist()
        relevant = {str(q): {str(i): int(hit) for i, hit in enumerate(own[q])} for q in queries}
        # places from below instead of scores, which trec_eval may round
        run = {str(q): dict(zip(relevant[str(q)], matrix[q].argsort().argsort().tolist())) for q in queries}
        evaluator = pytrec_eval.RelevanceEvaluator(relevant, ["map", "recip_rank", "success.1,5,10"])
        results = evaluator.evaluate(run)
        table = {
            name: torch.tensor([results[str(q)][name] for q in queries], dtype=torch.float64)
            for name in ("map", "recip_rank", "success_1", "success_5", "success_10")
        }
        torch.testing.assert_close(ranks[queries], 1 / table["recip_rank"])
        assert ranks.isnan().sum() == len(ranks) - len(queries)
        expected = {f"recall@{k}": 100 * table[f"success_{k}"].mean().item() for k in (1, 5, 10)}
        expected["map"] = table["map"].mean().item()
        expected["mean_rank"] = (1 / table["recip_rank"]).mean().item()
        expected["median_rank"] = (1 / table["recip_rank"]).quantile(0.5).item()
        assert {name: got[f"{way}_{name}"] for name in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_captions, num_images", [(65, 65), (50, 25), (265, 53), (331, 131)])
def test_a_constant_model_never_beats_chance(num_captions, num_images, dtype):
    texts, images = torch.randn(2, 1, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    owner = torch.arange(num_captions) % num_images
    got = compute_retrieval_metrics(texts.expand(num_captions, -1), images.expand(num_images, -1), owner)
    chance = chance_metrics(num_captions, num_images, owner)
    for name, value in chance.items():
        assert got[name] >= value - 1e-9 if "rank" in name else got[name] <= value + 1e-9, name
    assert got["t2v_mean_rank"] == got["t2v_median_rank"] == (num_images + 1) / 2
    fused = compute_retrieval_metrics(
        texts.expand(num_captions, -1), images.expand(num_images, -1), owner, texts.expand(num_captions, -1), 0.3
    )
    assert fused == got


def test_a_perfect_model_is_perfect_though_captions_repeat():
    images = torch.eye(12)
    owner = torch.arange(12).repeat_interleave(3)
    got = compute_retrieval_metrics(images[owner], images, owner)
    assert got["sum_recall"] == 600 and got["t2v_map"] == got["v2t_map"] == 1.0 and got["v2t_mean_rank"] == 1.0


def test_float64_is_computed_in_float64():
    """Two pictures that float32 cannot tell apart."""
    images = torch.tensor([[1.0, 0.0], [1.0, 1e-6]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    owner = torch.tensor([0])
    assert compute_retrieval_metrics(texts, images, owner)["t2v_mean_rank"] == 1.0
    assert compute_retrieval_metrics(texts.float(), images.float(), owner)["t2v_mean_rank"] == 1.5


def test_chance_is_the_mean_over_random_rankings():
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([0] * 5 + [1] * 2 + [3] * 4 + [4])
    runs = []
    for _ in range(1500):
        texts, images = torch.eye(12, 12), torch.rand(6, 12, generator=generator)  # scores = random numbers
        runs.append(slow_metrics((texts @ images.T).tolist(), owner.tolist()))
    chance = chance_metrics(12, 6, owner)
    for name in chance:
        if "median" not in name:  # the expected median of a few ranks has no closed form
            values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
            assert chance[name] == pytest.approx(values.mean().item(), abs=4 * values.std().item() / 1500**0.5 + 1e-9)
    assert chance_metrics(100, 100)["t2v_median_rank"] == chance_metrics(100, 100)["v2t_median_rank"] == 50.5
    assert chance_metrics(1, 1)["sum_recall"] == 600


def test_online_fusion_mixes_unit_vectors():
    query, translated = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    fused = fuse_query_embeds(query, translated, 0.2)
    assert torch.allclose(fused, torch.nn.functional.normalize(torch.tensor([[0.8, 0.2]])))
    assert torch.allclose(fuse_query_embeds(query[0], translated[0], 1.0), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        fuse_query_embeds(query, translated, 1.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_embeds": torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])}, "text_embeds has NaN or infinity in row 1"),
        ({"image_embeds": torch.full((3, 2), float("inf"))}, "image_embeds has NaN or infinity in row 0"),
        ({"image_embeds": torch.ones(3, 5)}, "one width and dtype, got 2 .* and 5"),
        ({"text_embeds": torch.ones(2)}, r"of shape \(num_rows, embed_dim\)"),
        ({"text_embeds": torch.ones(0, 2)}, r"of shape \(num_rows, embed_dim\)"),
        ({"caption_to_image": torch.tensor([0, 3])}, r"caption_to_image\[1\] is 3, but image_embeds has rows 0 to 2"),
        ({"caption_to_image": torch.tensor([-1, 0])}, r"caption_to_image\[0\] is -1"),
        ({"caption_to_image": torch.tensor([0])}, r"must have shape \(2,\)"),
        ({"caption_to_image": torch.tensor([0.0, 1.0])}, "LongTensor"),
        ({"translation_weight": 0.5}, "needs source_text_embeds"),
        ({"source_text_embeds": torch.ones(1, 2)}, r"source_text_embeds has shape \(1, 2\)"),
        ({"source_text_embeds": torch.ones(2, 2), "translation_weight": 20}, "between 0 and 1, got 20"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "text_embeds": torch.ones(2, 2),
        "image_embeds": torch.ones(3, 2),
        "caption_to_image": torch.tensor([0, 2]),
    }
    compute_retrieval_metrics(**good)
    with pytest.raises(ValueError, match=message):
        compute_retrieval_metrics(**{**good, **change})


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest result of any operation."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *(t.untyped_storage().nbytes() for t in tensors)])
        return result


def test_memory_does_not_grow_with_captions_times_pictures():
    generator = torch.Generator().manual_seed(0)
    texts, sources, images = torch.randn(3, 3000, 8, generator=generator)
    with LargestTensor() as largest:
        compute_retrieval_metrics(texts, images, torch.arange(3000) // 3, sources, 0.5)
    assert 0 < largest.size <= 64 * (3000 + 48) * 4  # a chunk is 64 rows and whole tiles; all would be 3000 x 3000


def test_mean_rank_variance_is_that_of_each_query_over_languages():
    assert mean_rank_variance([torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0])]) == 0.5  # (1 + 0) / 2
    for ranks in ([torch.ones(3)], [torch.ones(3), torch.ones(4)]):
        with pytest.raises(ValueError, match="two languages or more"):
            mean_rank_variance(ranks)

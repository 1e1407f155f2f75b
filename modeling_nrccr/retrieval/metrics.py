"""Retrieval metrics in both directions: recall@k, ranks, mAP and their sum, without a captions x pictures matrix.

The similarity matrix is walked in chunks, and ranks are counted rather than sorted. Definitions follow Wang et al.,
"Cross-Lingual Cross-Modal Retrieval with Noise-Robust Learning" (ACM MM 2022, arXiv 2208.12526) and its released code.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


RECALL_AT = (1, 5, 10)
# Scores held at a time. 2**21 float32 numbers are 8 MB: they stay in cache between the product and the counting.
CHUNK_SIZE = 2**21


def compute_retrieval_metrics(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    caption_to_image: torch.Tensor,
    source_text_embeds: torch.Tensor | None = None,
    translation_weight: float = 0.0,
) -> dict[str, float]:
    """
    Ranks every picture for every caption (`t2v_`) and every caption for every picture (`v2t_`) by cosine similarity.

    A rank is 1 + the number of better items + half the number of equally good ones, so a model that maps everything
    to one point gets the middle rank. In `v2t_` the rank of a picture is that of its best caption, and its other
    captions never stand in the way; a picture without captions is a candidate in `t2v_` and is no query in `v2t_`.

    Args:
        text_embeds: captions of shape `(num_captions, embed_dim)`, of any length (normalised here). Float64 is
            computed in float64; half precision is computed in float32.
        image_embeds: pictures or videos of shape `(num_images, embed_dim)`.
        caption_to_image: LongTensor of shape `(num_captions,)`, the row of each caption's picture in `image_embeds`.
        source_text_embeds: translations of the captions into the source language, of shape
            `(num_captions, embed_dim)`, for the published query fusion. That fusion is transductive: each similarity
            matrix is min-max normalised over the whole test set, which a single query cannot do. Use
            [`fuse_query_embeds`] at search time.
        translation_weight: `w` in `w * sim(source) + (1 - w) * sim(target)`.

    Returns:
        `t2v_recall@1`, `@5`, `@10` (percent of rank <= k), `t2v_median_rank`, `t2v_mean_rank`, `t2v_map` (0..1), the
        same with `v2t_`; `sum_recall`, the sum of the six recalls, and `mean_recall`, their mean.

    Raises:
        ValueError: for shapes that do not fit, NaN or infinity, or a `caption_to_image` out of range; names the row.
    """
    texts, images, caption_to_image = _checked(text_embeds, image_embeds, caption_to_image)
    if not 0.0 <= translation_weight <= 1.0:
        raise ValueError(f"translation_weight must be between 0 and 1, got {translation_weight}.")
    if source_text_embeds is not None:
        sources = _normalize(source_text_embeds, "source_text_embeds")
        if sources.shape != texts.shape:
            raise ValueError(
                f"source_text_embeds has shape {tuple(sources.shape)}, but must have one row for each row of "
                f"text_embeds, {tuple(texts.shape)}."
            )
        texts = _transductive_fusion(texts, sources, images, translation_weight)
    elif translation_weight > 0:
        raise ValueError(f"translation_weight={translation_weight} needs source_text_embeds, the translated queries.")

    with torch.no_grad():
        ones = torch.ones_like(caption_to_image)
        metrics = _summary(_ahead(texts, images, caption_to_image, ones), ones, "t2v")

        order, captions, counts = _captions_of(caption_to_image, len(images))
        metrics.update(_summary(_ahead(images[order], texts, captions, counts), counts, "v2t"))

    recalls = [metrics[f"{way}_recall@{k}"] for way in ("t2v", "v2t") for k in RECALL_AT]
    metrics["sum_recall"] = sum(recalls)
    metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


@torch.no_grad()
def retrieval_ranks(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, caption_to_image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the ranks behind [`compute_retrieval_metrics`], query by query, for paired comparisons of two models.

    Returns:
        float64 of shape `(num_captions,)`, the rank of each caption's picture, and of shape `(num_images,)`, the rank
        of each picture's best caption (NaN where it has none).
    """
    texts, images, caption_to_image = _checked(text_embeds, image_embeds, caption_to_image)
    t2v = 1 + _ahead(texts, images, caption_to_image, torch.ones_like(caption_to_image))
    order, captions, counts = _captions_of(caption_to_image, len(images))
    v2t = torch.full((len(images),), math.nan, dtype=torch.float64, device=images.device)
    v2t[order] = 1 + _ahead(images[order], texts, captions, counts)[counts.cumsum(0) - counts]
    return t2v, v2t


def mean_rank_variance(ranks: Sequence[torch.Tensor]) -> float:
    """Return how differently languages rank the same thing: the variance over languages of its rank, averaged over
    things (CCRK, arXiv 2406.18254); 0 where all agree. `ranks`: of each language, of shape `(num_queries,)`, in one
    order.

    Raises ValueError for fewer than two languages, or another number of queries in one of them.
    """
    if len(ranks) < 2 or len({of_language.shape for of_language in ranks}) > 1:
        raise ValueError(
            f"ranks of shapes {[tuple(part.shape) for part in ranks]}: two languages or more, of one shape"
        )
    return float(torch.stack(list(ranks)).double().var(0, correction=0).mean())


def fuse_query_embeds(
    text_embeds: torch.Tensor, source_text_embeds: torch.Tensor, translation_weight: float
) -> torch.Tensor:
    """
    Fuse queries and their translations online: `normalize((1 - w) * query + w * translated_query)` needs no other
    query.

    Args:
        text_embeds: queries as they were asked, of shape `(..., embed_dim)`.
        source_text_embeds: the same queries translated into the source language, of shape `(..., embed_dim)`.
        translation_weight: `w`, from 0 (the query as asked) to 1 (its translation alone).

    Returns:
        L2-normalised embeddings of shape `(..., embed_dim)`.

    Raises:
        ValueError: for a weight that is not in 0..1, and for two shapes.
    """
    if not 0.0 <= translation_weight <= 1.0:
        raise ValueError(f"translation_weight must be between 0 and 1, got {translation_weight}.")
    if text_embeds.shape != source_text_embeds.shape:
        raise ValueError(
            f"Query and translated query must have one shape, got {tuple(text_embeds.shape)} and "
            f"{tuple(source_text_embeds.shape)}."
        )
    query, translated = F.normalize(text_embeds, dim=-1), F.normalize(source_text_embeds, dim=-1)
    return F.normalize((1 - translation_weight) * query + translation_weight * translated, dim=-1)


def chance_metrics(
    num_captions: int, num_images: int, caption_to_image: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Return what a random ranking gets on average, in closed form; the names are those of [`compute_retrieval_metrics`].

    Args:
        num_captions: number of captions.
        num_images: number of pictures.
        caption_to_image: LongTensor of shape `(num_captions,)`, as in [`compute_retrieval_metrics`]; without it the
            captions are spread over the pictures evenly.

    Raises:
        ValueError: there are no captions or no pictures, or `caption_to_image` has another number of rows than
            captions.
    """
    if num_captions < 1 or num_images < 1:
        raise ValueError(f"Needs captions and pictures, got {num_captions} captions and {num_images} pictures.")
    if caption_to_image is None:
        caption_to_image = torch.arange(num_captions) % num_images
    elif len(caption_to_image) != num_captions:
        raise ValueError(f"caption_to_image has {len(caption_to_image)} rows for {num_captions} captions.")
    caption_to_image = _check_rows(caption_to_image.cpu(), num_images)
    counts = torch.bincount(caption_to_image, minlength=num_images)
    metrics = _chance(num_images, torch.ones(1, dtype=torch.long), "t2v")
    metrics.update(_chance(num_captions, counts[counts > 0], "v2t"))
    recalls = [metrics[f"{way}_recall@{k}"] for way in ("t2v", "v2t") for k in RECALL_AT]
    metrics["sum_recall"] = sum(recalls)
    metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


def _normalize(embeds: torch.Tensor, name: str) -> torch.Tensor:
    """Normalise rows of shape `(num_rows, embed_dim)` by L2, in float32 or float64. Raises ValueError for what is not
    finite, or of another shape or type."""
    if embeds.dim() != 2 or 0 in embeds.shape or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (num_rows, embed_dim), got {embeds.dtype} {tuple(embeds.shape)}."
        )
    embeds = embeds.detach()
    if embeds.dtype not in (torch.float32, torch.float64):
        embeds = embeds.float()
    # A sum is finite only if its terms are, but for an overflow, which the second look excludes.
    if not embeds.sum().isfinite():
        bad = (~embeds.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"{name} has NaN or infinity in row {bad[0]} ({len(bad)} of {len(embeds)} rows).")
    return F.normalize(embeds, dim=1)


def _checked(text_embeds, image_embeds, caption_to_image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    texts, images = _normalize(text_embeds, "text_embeds"), _normalize(image_embeds, "image_embeds")
    return texts, images, _check(texts, images, caption_to_image)


def _captions_of(caption_to_image: torch.Tensor, num_images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pictures with captions, those with the most first, so that the j-th caption of each belongs to the first
    rows only; the captions in the order of these pictures; and the number of captions of each."""
    counts = torch.bincount(caption_to_image, minlength=num_images)
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    position = torch.full_like(counts, len(order)).scatter_(0, order, torch.arange(len(order)).to(order))
    return order, position[caption_to_image].argsort(stable=True), counts[order]


def _check(texts: torch.Tensor, images: torch.Tensor, caption_to_image: torch.Tensor) -> torch.Tensor:
    if texts.shape[1] != images.shape[1] or texts.dtype != images.dtype:
        raise ValueError(
            f"text_embeds and image_embeds must have one width and dtype, got {texts.shape[1]} ({texts.dtype}) and "
            f"{images.shape[1]} ({images.dtype})."
        )
    if caption_to_image.shape != texts.shape[:1]:
        raise ValueError(
            f"caption_to_image must have shape ({len(texts)},), a row number of image_embeds for each caption, got "
            f"{tuple(caption_to_image.shape)}."
        )
    return _check_rows(caption_to_image.to(texts.device), len(images))


def _check_rows(caption_to_image: torch.Tensor, num_images: int) -> torch.Tensor:
    if caption_to_image.is_floating_point() or caption_to_image.is_complex() or caption_to_image.dtype == torch.bool:
        raise ValueError(f"caption_to_image must hold row numbers (a LongTensor), got {caption_to_image.dtype}.")
    bad = ((caption_to_image < 0) | (caption_to_image >= num_images)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"caption_to_image[{bad[0]}] is {int(caption_to_image[bad[0]])}, but image_embeds has rows 0 to "
            f"{num_images - 1} ({len(bad)} of {len(caption_to_image)} captions are out of range)."
        )
    return caption_to_image.long()


def _chunks(num_queries: int, num_items: int):
    rows = max(64, CHUNK_SIZE // num_items)
    return [(start, min(start + rows, num_queries)) for start in range(0, num_queries, rows)]


def _scores(queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return scores of shape `(num_queries, num_items)`, where equal items get equal scores to the last bit."""
    if len(queries) == 1:
        # One row takes the matrix-vector path, which adds up the last items in another order (seen on MKL).
        return (queries.expand(2, -1) @ items.T)[:1]
    return queries @ items.T


def _whole_tiles(items: torch.Tensor) -> torch.Tensor:
    """Pad with rows of zeros, up to whole tiles of a kernel, which adds up what is left over in another order (seen on
    MKL with AVX-512: 48 columns)."""
    return F.pad(items, (0, 0, 0, -len(items) % 48))


def _ahead(queries: torch.Tensor, items: torch.Tensor, relevant: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Return how many irrelevant items stand ahead of each relevant one, equal ones counted half.

    Args:
        queries: of shape `(num_queries, embed_dim)`.
        items: of shape `(num_items, embed_dim)`.
        relevant: item numbers of shape `(num_relevant,)`: those of the first query, then those of the second, ...
        counts: number of relevant items of each query, of shape `(num_queries,)`, descending, at least 1.

    Returns:
        float64 of shape `(num_relevant,)`, ascending within each query.
    """
    ahead = torch.empty(len(relevant), dtype=torch.float64, device=items.device)
    ends, padded = counts.cumsum(0), _whole_tiles(items)
    for start, stop in _chunks(len(queries), len(items)):
        scores = _scores(queries[start:stop], padded)[:, : len(items)]
        count = counts[start:stop]
        first_of = ends[start:stop] - count
        row = torch.arange(stop - start, device=items.device).repeat_interleave(count)
        column = relevant[first_of[0] : ends[stop - 1]]
        slot = torch.arange(len(row), device=items.device) - (first_of - first_of[0])[row]

        # Thresholds of shape (queries, most captions), best first; queries with fewer captions are padded by -inf.
        own = torch.full((len(count), int(count[0])), -math.inf, dtype=scores.dtype, device=items.device)
        own[row, slot] = scores[row, column]
        own = own.sort(dim=1, descending=True).values
        scores[row, column] = -math.inf  # relevant items are never ahead of each other
        difference = torch.empty_like(scores)
        for j in range(own.shape[1]):
            having = int((count > j).sum())  # the first `having` queries have a j-th item, for counts descend
            signs = torch.sub(scores[:having], own[:having, j : j + 1], out=difference[:having]).sign_()
            # The signs sum to #better - #worse (exact in float32 up to 2**24 items): this is #better + #equal / 2.
            ahead[first_of[:having] + j] = (len(items) + signs.sum(dim=1).double()) / 2
    return ahead


def _summary(ahead: torch.Tensor, counts: torch.Tensor, way: str) -> dict[str, float]:
    """Return metrics from the output of [`_ahead`]."""
    ends = counts.cumsum(0)
    ranks = 1 + ahead[ends - counts]
    query = torch.arange(len(counts), device=ahead.device).repeat_interleave(counts)
    nth = torch.arange(1, len(ahead) + 1, device=ahead.device) - (ends - counts)[query]
    precision = nth / (nth + ahead)
    average_precision = torch.zeros_like(ranks).index_add_(0, query, precision) / counts
    metrics = {f"{way}_recall@{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_AT}
    ranked = ranks.sort().values  # torch.median takes the lower of the two middle ones
    metrics[f"{way}_median_rank"] = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]).item() / 2
    metrics[f"{way}_mean_rank"] = ranks.mean().item()
    metrics[f"{way}_map"] = average_precision.mean().item()
    return metrics


@torch.no_grad()
def _transductive_fusion(
    texts: torch.Tensor, sources: torch.Tensor, images: torch.Tensor, weight: float
) -> torch.Tensor:
    """
    Return queries of shape `(num_captions, embed_dim)` whose products with the pictures rank as the published fusion
    does.

    Min-max normalisation over a whole matrix is `(s - low) / (high - low)`, and both matrices are products with the
    same pictures: but for a constant, their weighted sum is the product of the weighted sum of the queries.
    """
    if weight == 0:
        return texts
    if weight == 1:
        return sources
    fused = torch.zeros_like(texts)
    for queries, share in ((sources, weight), (texts, 1 - weight)):
        low, high = math.inf, -math.inf
        for start, stop in _chunks(len(queries), len(images)):
            scores = _scores(queries[start:stop], images)
            low, high = min(low, scores.min().item()), max(high, scores.max().item())
        # A matrix that is constant but for rounding says nothing, and its rounding is not to be blown up.
        if high - low > queries.shape[1] * torch.finfo(queries.dtype).eps:
            fused.add_(queries, alpha=share / (high - low))
    return fused


def _chance(num_items: int, counts: torch.Tensor, way: str) -> dict[str, float]:
    """Return the expected metrics of queries with `counts` relevant items each, of shape `(num_queries,)`, among
    `num_items`."""
    sizes, queries = counts.unique(return_counts=True)
    shares = queries.double() / queries.sum()
    rank = torch.arange(num_items, dtype=torch.float64)
    # Of n items m are relevant: the best of them comes after place k with probability C(n - m, k) / C(n, k).
    reached = torch.zeros(num_items, dtype=torch.float64)
    for size, share in zip(sizes.tolist(), shares.tolist()):
        reached += share * (1 - ((num_items - size - rank).clamp(min=0) / (num_items - rank)).cumprod(0))
    harmonic = (1 / (rank + 1)).mean()
    others = (sizes.double() - 1) / max(num_items - 1, 1)
    metrics = {f"{way}_recall@{k}": 100 * reached[min(k, num_items) - 1].item() for k in RECALL_AT}
    # The rank that half of the queries reach; the middle of two where exactly half do.
    middle = [1 + int((reached < 0.5 + slack).sum()) for slack in (-1e-9, 1e-9)]
    metrics[f"{way}_median_rank"] = sum(middle) / 2
    metrics[f"{way}_mean_rank"] = (shares * (num_items + 1) / (sizes + 1)).sum().item()
    metrics[f"{way}_map"] = (shares * (harmonic + others * (1 - harmonic))).sum().item()
    return metrics

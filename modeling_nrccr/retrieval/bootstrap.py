"""Intervals and paired comparisons of retrieval results, from the ranks of single queries.

An interval is the middle 95 % of 1,000 draws of the test groups, with replacement. Rows that are compared are counted
on the same draws, so what makes a test hard for both cancels.
"""

from collections.abc import Sequence

import numpy as np

from .metrics import RECALL_AT


DRAWS = 1000
WAYS = ("t2v", "v2t")


def hits(ranks: Sequence[np.ndarray], groups: Sequence[np.ndarray], num_groups: int) -> np.ndarray:
    """Count each group's queries, and those found among the first 1, 5 and 10, of shape `(2, 4, num_groups)` for both
    directions. `ranks`, `groups`: of each direction, `(num_queries,)`; a rank that is NaN is no query."""
    result = np.zeros((len(WAYS), 1 + len(RECALL_AT), num_groups))
    for way, (of_query, group) in enumerate(zip(map(np.asarray, ranks), map(np.asarray, groups), strict=True)):
        asked = ~np.isnan(of_query)
        np.add.at(result[way, 0], group[asked], 1)
        for i, k in enumerate(RECALL_AT, 1):
            np.add.at(result[way, i], group[asked], of_query[asked] <= k)
    return result


def draw_groups(num_groups: int, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Draw how often each group counts, of shape `(1 + DRAWS, num_groups)`: once each, then in every draw."""
    shares = np.full(num_groups, 1 / num_groups)
    draws = np.random.default_rng(seed).multinomial(num_groups, shares, DRAWS)
    return np.concatenate([np.ones((1, num_groups)), draws])


def recalls(counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the recalls in percent of each draw, of shape `(num_draws, 2, 3)`: both directions, among the first 1, 5
    and 10."""
    drawn = np.einsum("wkg,dg->dwk", counts, draws)
    return 100 * drawn[..., 1:] / np.maximum(drawn[..., :1], 1)


def sum_recall(counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return SumR of each draw, of shape `(num_draws,)`."""
    return recalls(counts, draws).sum((1, 2))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the middle 95 % of draws, of shape `(1 + DRAWS,)`, the first of which is what was measured."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(low), float(high)


def intervals(counts: np.ndarray, draws: np.ndarray) -> dict[str, list[float]]:
    """Return the low and high end of each recall and of SumR, by their names in `compute_retrieval_metrics`."""
    found = recalls(counts, draws)
    values = {f"{way}_recall@{k}": found[:, i, j] for i, way in enumerate(WAYS) for j, k in enumerate(RECALL_AT)}
    values["sum_recall"] = found.sum((1, 2))
    return {name: [round(end, 2) for end in interval(of_name)] for name, of_name in values.items()}

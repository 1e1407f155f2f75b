"""Means, intervals and paired comparisons of a study, from the ranks of its test queries.

An interval is the middle 95 % of 1,000 draws of the test groups (with replacement, within each split) of the mean over
all runs. Two rows are compared on the same draws, so what makes a test set hard for both cancels.
"""

import json
from collections import defaultdict

import numpy as np
import pandas as pd

from modeling_nrccr.files import write_file


DRAWS = 1000
RECALL_AT = (1, 5, 10)


def hits(ranks: pd.DataFrame, groups: list[str]) -> np.ndarray:
    """Of each group: queries, and those found among the first 1, 5 and 10, of shape `(2, 4, num_groups)` for both
    directions."""
    result = np.zeros((2, 1 + len(RECALL_AT), len(groups)))
    number = {group: i for i, group in enumerate(groups)}
    for way, direction in enumerate(("t2v", "v2t")):
        part = ranks[ranks["direction"] == direction]
        of = part["group"].map(number).to_numpy()
        np.add.at(result[way, 0], of, 1)
        for i, k in enumerate(RECALL_AT, 1):
            np.add.at(result[way, i], of, part["rank"].to_numpy() <= k)
    return result


def sum_recall(counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """SumR of each draw, of shape `(num_draws,)`; `draws (num_draws, num_groups)`: how often each group was drawn."""
    drawn = np.einsum("wkg,dg->dwk", counts, draws)
    return 100 * (drawn[..., 1:] / drawn[..., :1]).sum((1, 2))


class Bootstrap:
    """Draws of the test groups of each split, the same for every row."""

    def __init__(self, study):
        self.study, self.draws, self.groups = study, {}, {}
        self.counts = {}  # (run, query, gallery) -> counts by group

    def load(self, run, gallery: str, query: str) -> tuple[np.ndarray, np.ndarray]:
        key = (run, gallery, query)
        split = (run.condition, run.language, run.split_seed, gallery)
        if key not in self.counts:
            path = self.study.work / "ranks" / f"{run.name}.parquet"
            ranks = pd.read_parquet(path)
            for (of_query, of_gallery), part in ranks.groupby(["query", "gallery"]):
                place = (*split[:3], of_gallery)
                if place not in self.draws:
                    groups = sorted(set(part["group"]))
                    generator = np.random.default_rng([run.split_seed, len(groups)])
                    shares = np.full(len(groups), 1 / len(groups))
                    self.groups[place] = groups
                    self.draws[place] = generator.multinomial(len(groups), shares, DRAWS).astype(float)
                self.counts[run, of_gallery, of_query] = hits(part, self.groups[place])
        return self.counts[key], self.draws[split]

    def sums(self, run, gallery: str, query: str) -> np.ndarray:
        """The SumR of the run, then of each draw, of shape `(1 + DRAWS,)`."""
        counts, draws = self.load(run, gallery, query)
        return sum_recall(counts, np.concatenate([np.ones((1, draws.shape[1])), draws]))


def summary(values: np.ndarray) -> dict[str, float]:
    """`values` of shape `(num_runs, 1 + DRAWS)`: the mean over runs and its interval."""
    mean = values.mean(0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    result = {"mean": mean[0], "low": low, "high": high, "runs": len(values), "sd": values[:, 0].std()}
    return {name: round(float(value), 2) for name, value in result.items()}


def compare(study):
    """Writes the study's `summary.json`: SumR by row, query, gallery, condition and language, and comparisons."""
    from study import QUERIES

    bootstrap, runs = Bootstrap(study), defaultdict(list)
    for run in study.runs():
        runs[run.condition, run.language, run.row].append(run)
    galleries = list(study.load(next(study.runs()))["test"]["target"])
    rows, pairs = [], []
    for (condition, language, row), of_row in runs.items():
        for gallery in galleries:
            for query in QUERIES:
                if gallery not in study.load(of_row[0])["test"].get(query, {}):
                    continue  # a language without a translator, or without stamps
                sums = np.stack([bootstrap.sums(run, gallery, query) for run in of_row])
                place = {"condition": condition, "language": language, "row": row, "gallery": gallery, "query": query}
                rows.append(place | summary(sums))
    for condition in study.conditions:
        for language in study.languages:
            for first, second in study.comparisons:
                sides = [side.split(":") for side in (first, second)]
                if not all(runs[condition, language, row] for row, _ in sides):
                    continue  # a row of other languages alone
                shared = set.intersection(
                    *({(run.split_seed, run.seed) for run in runs[condition, language, row]} for row, _ in sides)
                )
                for gallery in galleries:
                    runs_of = [runs[condition, language, row][0] for row, _ in sides]
                    if not all(
                        gallery in study.load(run)["test"].get(query, {}) for run, (_, query) in zip(runs_of, sides)
                    ):
                        continue
                    means = [
                        np.stack([
                            bootstrap.sums(run, gallery, query)
                            for run in runs[condition, language, row]
                            if (run.split_seed, run.seed) in shared
                        ])
                        for row, query in sides
                    ]  # fmt: skip
                    place = {"condition": condition, "language": language, "first": first, "second": second}
                    pairs.append(place | {"gallery": gallery} | summary(means[0] - means[1]))
    report = {"draws": DRAWS, "rows": rows, "comparisons": pairs}
    if study.consistency:
        report["consistency"] = consistency(study, runs)
    write_file(study.results / "summary.json", json.dumps(report, indent=1) + "\n")


def consistency(study, runs: dict) -> list[dict]:
    """Mean rank variance of each row and direction over the study's languages of `consistency`, mean over runs."""
    import torch

    from modeling_nrccr.metrics import mean_rank_variance

    found = []
    for condition in study.conditions:
        for row in study.rows:
            by_language = [runs[condition, language, row] for language in study.consistency]
            if not all(by_language):
                continue
            for direction in ("t2v", "v2t"):
                values = []
                for of_run in zip(*by_language, strict=True):
                    parts = [pd.read_parquet(study.work / "ranks" / f"{run.name}.parquet") for run in of_run]
                    chosen = {"query": "target", "gallery": "all", "direction": direction}
                    parts = [part[(part[list(chosen)] == list(chosen.values())).all(axis=1)] for part in parts]
                    if any(list(part["group"]) != list(parts[0]["group"]) for part in parts):
                        raise ValueError(f"{', '.join(run.name for run in of_run)}: their pictures are not the same")
                    values.append(mean_rank_variance([torch.tensor(part["rank"].to_numpy()) for part in parts]))
                mean = sum(values) / len(values)
                found.append({"condition": condition, "row": row, "direction": direction, "mean": round(mean, 1)})
    return found

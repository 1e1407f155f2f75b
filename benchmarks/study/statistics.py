"""Means, intervals and paired comparisons of a study, from the ranks of its test queries.

An interval is the middle 95 % of 1,000 draws of the test groups (with replacement, within each split) of the mean over
all runs. Two rows are compared on the same draws, so what makes a test set hard for both cancels.
"""

from collections import defaultdict

import numpy as np
import pandas as pd

from benchmarks import records
from benchmarks.study.spec import KEY, QUERIES
from modeling_nrccr.retrieval.bootstrap import DRAWS, WAYS, draw_groups, hits, interval, sum_recall


def group_hits(ranks: pd.DataFrame, groups: list[str]) -> np.ndarray:
    """Return [`hits`] of a run's ranks, in the order of `groups`."""
    number = {group: i for i, group in enumerate(groups)}
    parts = [ranks[ranks["direction"] == way] for way in WAYS]
    return hits([part["rank"] for part in parts], [part["group"].map(number) for part in parts], len(groups))


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
                    self.groups[place] = groups
                    self.draws[place] = draw_groups(len(groups), [run.split_seed, len(groups)])
                self.counts[run, of_gallery, of_query] = group_hits(part, self.groups[place])
        return self.counts[key], self.draws[split]

    def sums(self, run, gallery: str, query: str) -> np.ndarray:
        """Return the SumR of the run, then of each draw, of shape `(1 + DRAWS,)`."""
        return sum_recall(*self.load(run, gallery, query))


def summary(values: np.ndarray) -> dict[str, float]:
    """Return the mean over runs, and its interval, of `values` of shape `(num_runs, 1 + DRAWS)`."""
    mean = values.mean(0)
    low, high = interval(mean)
    result = {"mean": mean[0], "low": low, "high": high, "runs": len(values), "sd": values[:, 0].std()}
    return {name: round(float(value), 2) for name, value in result.items()}


def compare(study):
    """Write the study's summary: SumR by row, query, gallery, condition and language, and comparisons."""
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
                        np.stack(
                            [
                                bootstrap.sums(run, gallery, query)
                                for run in runs[condition, language, row]
                                if (run.split_seed, run.seed) in shared
                            ]
                        )
                        for row, query in sides
                    ]
                    place = {"condition": condition, "language": language, "first": first, "second": second}
                    pairs.append(place | {"gallery": gallery} | summary(means[0] - means[1]))
    report = {"draws": DRAWS, "rows": rows, "comparisons": pairs}
    if study.consistency:
        report["consistency"] = consistency(study, runs)
    records.put(study.file, {"summary": report}, KEY)


def consistency(study, runs: dict) -> list[dict]:
    """Return the mean rank variance of each row and direction over the study's languages of `consistency`, mean over
    runs."""
    import torch

    from modeling_nrccr.retrieval.metrics import mean_rank_variance

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

"""The table of retrieval metrics that commands print."""

from collections.abc import Mapping, Sequence

from ..files import printable


METRICS = {"R@1": "recall@1", "R@5": "recall@5", "R@10": "recall@10", "MedR": "median_rank", "mAP": "map"}
WAYS = {"t2v": "text to picture", "v2t": "picture to text"}
WIDTH = 6


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """
    Return one line for each entry of `rows`, from its name to the metrics of [`compute_retrieval_metrics`]: recalls in
    percent, median rank and mAP in both directions, and SumR with its interval, of rows that bring `intervals`.
    """
    rows = {printable(name): metrics for name, metrics in rows.items()}  # of sources, which are parts of file names
    label = max([len(name) for name in rows] + [0])
    block = len(METRICS) * (WIDTH + 1)
    head = [
        " " * label + "".join(f"  {title:^{block}}" for title in WAYS.values()),
        " " * label + "".join("  " + "".join(f" {name:>{WIDTH}}" for name in METRICS) for _ in WAYS) + "   SumR",
    ]
    lines = []
    for name, metrics in rows.items():
        line = f"{name:<{label}}"
        for way in WAYS:
            values = [(metrics[f"{way}_{metric}"], 3 if metric == "map" else 1) for metric in METRICS.values()]
            line += "  " + "".join(f" {value:{WIDTH}.{digits}f}" for value, digits in values)
        low, high = metrics.get("intervals", {}).get("sum_recall", (None, None))
        ends = "" if low is None else f" ({low:.1f} to {high:.1f})"
        lines.append(f"{line}  {metrics['sum_recall']:5.1f}{ends}")
    return "\n".join([line.rstrip() for line in head] + ["-" * len(head[1])] + lines)


def format_markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the recalls and SumR of the same rows as a Markdown table, with the intervals of rows that bring them."""
    shown = [name for name in METRICS if name.startswith("R@")]
    head = ["", *(f"{way} {name}" for way in WAYS for name in shown), "SumR"]
    lines = []
    for name, metrics in rows.items():
        columns = [*(f"{way}_{METRICS[metric]}" for way in WAYS for metric in shown), "sum_recall"]
        ends = metrics.get("intervals", {})
        brackets = [" ({:.1f} to {:.1f})".format(*ends[key]) if key in ends else "" for key in columns]
        lines.append([name, *(f"{metrics[key]:.1f}{bracket}" for key, bracket in zip(columns, brackets))])
    return markdown_table(head, lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return cells as a Markdown table, all columns but the first aligned to the right."""
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)

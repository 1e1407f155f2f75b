"""Writes docs/study.md (its generated blocks), its figures, and README's results, from the JSON of the studies alone.

    python -m benchmarks.study.report

Text outside the blocks is written by hand and stays.
"""

import json
import os
from pathlib import Path

from benchmarks import ROOT
from benchmarks.pages import fill
from benchmarks.study.spec import QUERIES, Study
from modeling_nrccr.publishing.tables import markdown_table


STUDIES = ROOT / "benchmarks/studies"
PAGE, README = ROOT / "docs/study.md", ROOT / "README.md"
GALLERIES = {"all": "all pictures", "emoji": "emoji alone", "stamps": "stamps alone"}
ASKED = {
    "target": "human {language} query",
    "translated": "its translation into English",
    "fused": "both fused",
    "english": "human English query",
}
LANGUAGES = {
    "gl": "Galician",
    "ca": "Catalan",
    "es": "Spanish",
    "cs": "Czech",
    "de": "German",
    "fr": "French",
    "eu": "Basque",
    "sw": "Swahili",
    "cy": "Welsh",
}


def interval(value: dict) -> str:
    return f"{value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def reach(values: list[dict]) -> list[list[float]]:
    """Return the reach of error bars: how far each interval goes below its mean, and above."""
    return [[value["mean"] - value["low"] for value in values], [value["high"] - value["mean"] for value in values]]


def find(entries: list[dict], **place) -> list[dict]:
    return [entry for entry in entries if all(entry[key] == value for key, value in place.items())]


def side_name(study: Study, side: str, language: str) -> str:
    row, query = side.split(":")
    if row == "english_only":
        return {
            "target": "English only",
            "translated": "translated query",
            "english": "English only, human English query",
            "fused": "English only, fused",
        }[query]
    name = study.rows[row].label
    return name if query == "target" else f"{name}, {ASKED[query].format(language=language)}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return markdown_table(head, lines) + "\n"


def rows_table(study: Study, report: dict, gallery: str, condition: str, language: str) -> str:
    """Return a table of SumR of each row and query, with its interval; the two baselines stand apart though they are
    one model."""
    name, lines = LANGUAGES.get(language, language), []
    for row, spec in listed(study).items():
        if language not in (spec.languages or study.languages):
            continue
        cells = {}
        for query in QUERIES:
            (cells[query],) = find(
                report["rows"], condition=condition, language=language, row=row, gallery=gallery, query=query
            )
        runs = int(cells["target"]["runs"])
        lines.append([spec.label, str(runs), *(interval(cells[query]) for query in QUERIES)])
    return markdown(
        ["SumR, " + GALLERIES.get(gallery, gallery), "runs", *(q.format(language=name) for q in ASKED.values())], lines
    )


def listed(study: Study) -> dict:
    return {name: row for name, row in study.rows.items() if row.listed}


def comparison_lines(study: Study, report: dict, condition: str, language: str) -> list[list[str]]:
    lines, name = [], LANGUAGES.get(language, language)
    for first, second in study.comparisons:
        by_gallery = {
            pair["gallery"]: pair
            for pair in find(report["comparisons"], condition=condition, language=language, first=first, second=second)
        }
        if not by_gallery:
            continue
        lines.append(
            [
                f"{side_name(study, first, name)} − {side_name(study, second, name)}",
                *(interval(by_gallery[gallery]) for gallery in by_gallery),
                verdict(by_gallery["all"]),
            ]
        )
    return lines


def verdict(pair: dict) -> str:
    if pair["low"] > 0:
        return "better"
    return "worse" if pair["high"] < 0 else "no difference shown"


def comparisons_table(study: Study, report: dict, condition: str, language: str) -> str:
    galleries = list(dict.fromkeys(pair["gallery"] for pair in report["comparisons"]))
    head = ["difference of SumR", *(GALLERIES.get(gallery, gallery) for gallery in galleries), "over all pictures"]
    return markdown(head, comparison_lines(study, report, condition, language))


def settings_table(study: Study) -> str:
    """Return a table of which point of the grid each row's validation chose, and what a run took."""
    lines = []
    for name, spec in listed(study).items():
        runs = [study.load(run) for run in study.runs() if run.row == name]
        point = study.grid[runs[0]["grid_point"]]
        chosen = ", ".join(f"{key} {spec.settings.get(key, value):g}" for key, value in point.items())
        trained = [run for run in runs if run["steps"]] or runs
        seconds = sorted(sum(run["seconds"].values()) for run in trained)
        weights = sorted({run["source_query_weight"] for run in runs})
        lines.append(
            [
                spec.label,
                chosen or "–",
                f"{weights[0]:g} to {weights[-1]:g}",
                f"{seconds[len(seconds) // 2]:.0f}",
            ]
        )
    return markdown(["row", "chosen on validation", "fusion weight", "seconds a run (median)"], lines)


def tables(study: Study) -> str:
    report, parts = study.summary(), []
    galleries = list(dict.fromkeys(row["gallery"] for row in report["rows"]))
    for condition in study.conditions:
        for language in study.languages:
            title = " ".join(filter(None, [LANGUAGES.get(language, language), condition]))
            parts.append(f"### {title}\n")
            parts += [rows_table(study, report, gallery, condition, language) for gallery in galleries]
            parts.append(comparisons_table(study, report, condition, language))
    parts.append(settings_table(study))
    return "\n".join(parts)


def compact_tables(study: Study) -> str:
    """Return the tables of a study with many rows: all pictures alone."""
    report, condition, language = study.summary(), next(iter(study.conditions)), study.languages[0]
    return "\n".join(
        [
            rows_table(study, report, "all", condition, language),
            comparisons_table(study, report, condition, language),
            settings_table(study),
        ]
    )


def cell(report: dict, **place) -> str:
    found = find(report["rows"], gallery="all", **place)
    return interval(found[0]) if found else "–"


def together_tables(study: Study) -> str:
    """Return the tables of several languages at once: those that are learned, with their mean, the worst and the
    variance of ranks; those that are not; and differences of each."""
    report, learned, parts = study.summary(), study.consistency, []
    others = [language for language in study.languages if language not in learned]

    def means(row: str, languages: list[str]) -> list[float]:
        found = [find(report["rows"], gallery="all", query="target", row=row, language=name) for name in languages]
        return [entry[0]["mean"] for entry in found if entry]

    for languages, title in ((learned, "learned"), (others, "not learned")):
        lines = []
        for row, spec in listed(study).items():
            values = means(row, languages)
            if not values:
                continue
            cells = [cell(report, query="target", row=row, language=language) for language in languages]
            variance = (
                [f"{v['mean']:.0f}" for v in find(report["consistency"], row=row)] if languages == learned else []
            )
            lines.append([spec.label, *cells, f"{sum(values) / len(values):.1f}", f"{min(values):.1f}", *variance])
        names = [LANGUAGES[language] for language in languages]
        head = ["rank variance, t2v", "v2t"] if languages == learned else []
        parts.append(markdown([f"SumR, languages {title}", *names, "mean", "worst", *head], lines))
    lines = []
    for first, second in study.comparisons:
        found = {
            language: find(report["comparisons"], language=language, first=first, second=second, gallery="all")
            for language in study.languages
        }
        name = f"{side_name(study, first, 'target-language')} − {side_name(study, second, 'target-language')}"
        lines.append([name, *(interval(pair[0]) if pair else "–" for pair in found.values())])
    parts.append(markdown(["difference of SumR", *(LANGUAGES[language] for language in study.languages)], lines))
    parts.append(settings_table(study))
    return "\n".join(parts)


def quality_table(recommended: Study, czech: Study) -> str:
    """Return a table of what better translations give the linear adapter: of each engine chrF against people's
    captions, and how far it goes from the English-only model to human captions."""
    quality = json.loads((ROOT / "docs/translation.json").read_text(encoding="utf-8"))["pictures"]
    engines = [
        ("gl", "apertium en-gl", recommended, "linear"),
        ("ca", "apertium en-ca", recommended, "linear"),
        ("es", "apertium en-es", recommended, "linear"),
        ("cs", "dictionary en-cs", czech, "dictionary"),
        ("cs", "marian en-cs", czech, "marian"),
    ]
    lines = []
    for language, engine, study, row in engines:
        rows = study.summary()["rows"]
        low, reached, high = (
            find(rows, language=language, gallery="all", query="target", row=name)[0]["mean"]
            for name in ("english_only", row, "human")
        )
        chrf = quality[engine]["reference_chrf"]
        share = (reached - low) / (high - low)
        lines.append([engine, f"{chrf:.1f}", f"{low:.1f}", f"{reached:.1f}", f"{high:.1f}", f"{100 * share:.0f}%"])
    lines.sort(key=lambda line: -float(line[1]))
    head = ["engine", "chrF to people's captions", "English only", "linear adapter", "human captions", "of the way"]
    return markdown(head, lines)


def text_table() -> str:
    """Return text-to-text retrieval of Multi30K's human captions (`benchmarks/translation/multi30k_text.py`), before
    and after training on English and Galician machine translation."""
    report = json.loads((ROOT / "docs/multi30k_text.json").read_text(encoding="utf-8"))
    lines = []
    for pair, before in report["retrieval"].items():
        after = report["retrieval_after"][pair]["recall@1"]
        asks, answers = (LANGUAGES.get(code, "English") for code in pair.split("-"))
        difference = after - before["recall@1"]
        lines.append([f"{asks} asks {answers}", f"{before['recall@1']:.1f}", f"{after:.1f}", f"{difference:+.1f}"])
    means = [sum(float(line[i]) for line in lines) / len(lines) for i in (1, 2, 3)]
    lines.append(["mean of all", f"{means[0]:.1f}", f"{means[1]:.1f}", f"{means[2]:+.1f}"])
    return markdown(["R@1", "before", "after", "difference"], lines)


def curves_table(study: Study) -> str:
    """Return a table of SumR of human target queries by condition, for a study whose conditions are rates of noise."""
    report, (language,) = study.summary(), study.languages
    lines = []
    for row, spec in study.rows.items():
        place = {"language": language, "row": row, "gallery": "all", "query": "target"}
        cells = [find(report["rows"], condition=condition, **place) for condition in study.conditions]
        lines.append([spec.label, *(interval(cell[0]) if cell else "–" for cell in cells)])
    return markdown(["SumR at noise", *study.conditions], lines)


def asked_lines(study: Study, asked: tuple[tuple[str, str, str], ...], columns: list[dict]) -> list[list[str]]:
    """Return README's lines, each a label, a row and a query, with an interval for each of `columns`: its language and
    gallery."""
    report, condition = study.summary(), next(iter(study.conditions))
    lines = []
    for label, row, query in asked:
        place = {"condition": condition, "row": row, "query": query}
        lines.append([label, *(interval(find(report["rows"], **place, **column)[0]) for column in columns)])
    return lines


def by_language(study: Study) -> str:
    """Return README's table of what adding a language gives: a column a language."""
    asked = (
        ("the base, asked in the language", "english_only", "target"),
        ("**the base, asked the query's machine translation**", "english_only", "translated"),
        ("a new model, trained on captions and their translations (MT, plain)", "mt_plain", "target"),
        ("the language added: linear adapter, seconds", "linear", "target"),
        ("**the language added: recommended recipe, minutes**", "recipe", "target"),
        ("**the same, fused with the translation**", "recipe", "fused"),
        ("a new model, trained on human captions (upper bound)", "human", "target"),
        ("(for comparison) the base, human English query, before and after", "recipe", "english"),
    )
    lines = asked_lines(study, asked, [{"language": language, "gallery": "all"} for language in study.languages])
    names = [LANGUAGES.get(language, language) for language in study.languages]
    return (
        f"Human queries, {len(study.split_seeds)} splits, SumR over all pictures with its 95 % interval.\n\n"
        + markdown(["", *names], lines)
    )


def figures():
    """Draw docs/study_rows and docs/study_scenes, as PNG and SVG."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same bytes for the same JSON
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "nrccr", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot as plt

    def save(figure, name: str):
        for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            path = ROOT / f"docs/{name}.{suffix}"
            figure.savefig(path.with_suffix(f".tmp.{suffix}"), bbox_inches="tight", **options)
            os.replace(path.with_suffix(f".tmp.{suffix}"), path)
        plt.close(figure)

    study = Study(STUDIES / "real.yaml")
    report, language = study.summary(), study.languages[0]
    name, place = LANGUAGES[language], {"condition": next(iter(study.conditions)), "language": language}
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(study.rows) + 1.2))
    styles = {"target": ("o", "#0b6e99"), "fused": ("D", "#b3541e"), "translated": ("s", "#8a8a8a")}
    for query, (marker, colour) in styles.items():
        for at, row in enumerate(reversed(study.rows)):
            (value,) = find(report["rows"], row=row, query=query, gallery="all", **place)
            shift = {"target": 0.18, "translated": 0, "fused": -0.18}[query]
            label = ASKED[query].format(language=name) if at == 0 else None
            style = {"fmt": marker, "color": colour, "capsize": 2, "label": label}
            axes.errorbar(value["mean"], at + shift, xerr=reach([value]), **style)
    (baseline,) = find(report["rows"], row="english_only", query="translated", gallery="all", **place)
    axes.axvline(baseline["mean"], color="#8a8a8a", linestyle=":", label="translated query (English only)")
    axes.set_yticks(range(len(study.rows)), [study.rows[row].label for row in reversed(study.rows)])
    axes.set_xlabel("SumR over all pictures, with 95 % interval")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.08), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    save(figure, "study_rows")

    study = Study(STUDIES / "scenes.yaml")
    report, (language,) = study.summary(), study.languages
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for (row, spec), marker in zip(study.rows.items(), "osD^v"):
        values = find(report["rows"], language=language, row=row, gallery="all", query="target")
        rates = [float(value["condition"]) for value in values]
        axes.errorbar(
            rates, [v["mean"] for v in values], yerr=reach(values), marker=marker, capsize=3, label=spec.label
        )
    axes.set_xlabel("rate of mixed translation noise (synthetic scenes, Czech)")
    axes.set_ylabel("SumR of clean Czech queries, 95 % interval")
    axes.set_xticks([float(condition) for condition in study.conditions])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    save(figure, "study_scenes")
    few_figure(plt, save)
    ablation_figure(plt, save)
    gain_figure(plt, save)


def gain_figure(plt, save):
    """Draw docs/study_gain, README's: what adding a language gives, beside what a team would try first."""
    study = Study(STUDIES / "recommended.yaml")
    report = study.summary()
    bars = (
        ("the base, asked in the language", "english_only", "target", "#c9c9c9"),
        ("the base, asked the query's translation", "english_only", "translated", "#8a8a8a"),
        ("the language added", "recipe", "target", "#3c9cc4"),
        ("the language added, fused with the translation", "recipe", "fused", "#0b6e99"),
        ("(the base, human English query)", "recipe", "english", "#e8d3b9"),
    )
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for number, (label, row, query, colour) in enumerate(bars):
        values = [
            find(report["rows"], row=row, query=query, gallery="all", language=language)[0]
            for language in study.languages
        ]
        places = [at + (number - 2) * 0.17 for at in range(len(values))]
        style = {"width": 0.16, "color": colour, "label": label, "capsize": 2, "ecolor": "#444444"}
        axes.bar(places, [value["mean"] for value in values], yerr=reach(values), **style)
    axes.set_xticks(range(len(study.languages)), [LANGUAGES[language] for language in study.languages])
    axes.set_ylabel("SumR of human queries, 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=9)
    save(figure, "study_gain")


def few_figure(plt, save):
    """Draw docs/study_few: SumR against the number of human captions, beside machine translation and alone."""
    study = Study(STUDIES / "few.yaml")
    report, counts = study.summary(), [25, 100, 400, 1350]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    place = {"language": study.languages[0], "gallery": "all", "query": "target"}
    for kind, label, marker in (
        ("mt", "beside machine translation", "o"),
        ("human", "alone", "s"),
    ):
        rows = [find(report["rows"], row=f"{kind}_{count}", **place)[0] for count in ("25", "100", "400", "all")]
        axes.errorbar(counts, [v["mean"] for v in rows], yerr=reach(rows), marker=marker, capsize=3, label=label)
    for name, row, query in (
        ("machine translation alone", "mt_0", "target"),
        ("English only, translated query", "english_only", "translated"),
        ("English only", "english_only", "target"),
    ):
        value = find(report["rows"], row=row, **(place | {"query": query}))[0]["mean"]
        axes.axhline(value, linestyle=":", color="#8a8a8a")
        axes.annotate(name, (25, value), xytext=(0, 3), textcoords="offset points", fontsize=8, color="#555555")
    axes.set_xscale("log")
    axes.set_xticks(counts, ["25", "100", "400", "all (about 1,390)"])
    axes.minorticks_off()
    axes.set_xlabel("human Galician captions in training")
    axes.set_ylabel("SumR of human Galician queries, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    save(figure, "study_few")


def ablation_figure(plt, save):
    """Draw docs/study_ablation: SumR against the share of the translated query, and against the number of captions."""
    study = Study(STUDIES / "ablation.yaml")
    report, runs = study.summary(), [study.load(run) for run in study.runs()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for row, marker in (("cosine", "o"), ("all_three", "s"), ("english_only", "^")):
        curves = [run["fusion"] for run in runs if run["row"] == row]
        shares = [float(share) for share in curves[0]]
        values = [sum(curve[share] for curve in curves) / len(curves) for share in curves[0]]
        left.plot(shares, values, marker=marker, label=study.rows[row].label)
    left.set_xlabel("share of the translated query in the fusion")
    left.set_ylabel("SumR of human Galician queries")
    place = {"language": study.languages[0], "gallery": "all", "query": "target"}
    names = ("captions_100", "captions_350", "captions_700", "captions_all")
    values = [find(report["rows"], row=name, **place)[0] for name in names]
    right.errorbar(range(4), [v["mean"] for v in values], yerr=reach(values), marker="o", capsize=3)
    right.set_xticks(range(4), ["100", "350", "700", "all"])
    right.set_xlabel("captions trained on, 95 % interval")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    save(figure, "study_ablation")


def blocks() -> dict[Path, dict[str, str]]:
    names = ("real", "scenes", "languages", "screen", "czech", "recommended", "few")
    studies = {name: Study(STUDIES / f"{name}.yaml") for name in names}
    page = {f"study {name}": tables(study) for name, study in studies.items() if name != "scenes"}
    page["study ablation"], page["study neighbours"] = (
        compact_tables(Study(STUDIES / f"{name}.yaml")) for name in ("ablation", "neighbours")
    )
    page["study quality"] = quality_table(studies["recommended"], studies["czech"])
    page["study text"] = text_table()
    page["study together"] = together_tables(Study(STUDIES / "together.yaml"))
    page["study scenes"] = curves_table(studies["scenes"]) + "\n" + settings_table(studies["scenes"])
    return {
        PAGE: page,
        README: {"study recommended": by_language(studies["recommended"])},
    }


def main():
    for path, content in blocks().items():
        fill(path, content)
    figures()


if __name__ == "__main__":
    main()

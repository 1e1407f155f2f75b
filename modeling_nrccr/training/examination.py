"""Examines a language that was added: what human queries find, beside the base and the translated query, and whether
to use it. What is said follows from intervals of paired differences, never from a difference alone."""

from collections.abc import Callable

import numpy as np
import torch

from datasets_scripts.reading.splits import group_key

from ..modeling_nrccr import NrccrModel
from ..publishing.verdicts import ASK, DO_NOT, GIVE_LANGUAGE, NO_LANGUAGE, STERN, TOO_FEW, USE, USE_FUSED
from ..retrieval.bootstrap import draw_groups, hits, interval, intervals, sum_recall
from ..retrieval.encoding import encode_texts, picture_rows
from ..retrieval.metrics import compute_retrieval_metrics, fuse_query_embeds, retrieval_ranks
from .feature_cache import FeatureCache


OURS, BASE, TRANSLATED = "this language", "base", "translated query"
FUSED, ENGLISH, ENGLISH_BEFORE = "{}, half its translation", "English, {}", "English, before"
THROUGH = "English through {}"  # by the side that reads the language; ENGLISH: where no language is given
SHARE = 0.5  # of the translation in a fused query
FEWEST_GROUPS = 20  # of pictures: of fewer no interval can be trusted
MARGIN = 1.0  # SumR: less is no difference


class Examination:
    """
    Human captions of a language, the pictures that they describe, and what is found for them. All that can fail (a
    broken picture, a translation that is not to be had) is done here, before anything is trained.

    Args:
        rows: with `image_id`, `target_caption` and `reference_source_caption` (or None).
        load: gives the picture of a row, by its number.
        translate: gives the source language of queries; or raises `unavailable`, and nothing is asked in translation.
    """

    def __init__(
        self,
        rows: list[dict],
        load: Callable,
        base: NrccrModel,
        processor,
        translate: Callable | None = None,
        unavailable: tuple = (ValueError,),
    ):
        first, _ = picture_rows([row["image_id"] for row in rows])
        embeds, self.broken = embed_pictures(first, lambda name: load(first[name]), base, processor, strict=False)
        rows = [row for row in rows if row["image_id"] in embeds]
        if not rows:
            reason = next(iter(self.broken.values()))
            raise ValueError(f"none of {len(first)} test pictures can be read, such as {reason}")
        first, self.owner = picture_rows([row["image_id"] for row in rows])
        self.images = torch.stack([embeds[name] for name in first])
        self.base, self.processor = base, processor
        self.asked = [row["target_caption"] for row in rows]
        self.english = [row["reference_source_caption"] for row in rows]
        keys = [group_key(self.english[row] or "") or name for name, row in first.items()]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.group = np.array([numbers[key] for key in keys])  # of each picture
        self.draws = draw_groups(len(numbers))
        self.found: dict[str, dict] = {}
        self.sums: dict[str, np.ndarray] = {}  # SumR, then of each draw
        self.translated, self.untranslated = None, None
        if translate is not None:
            try:
                translated = translate(self.asked)
            except unavailable as error:
                self.untranslated = str(error)
            else:
                self.translated = encode_texts(base, translated, processor, languages=None)

    def ask(self, name: str, queries: torch.Tensor):
        """Counts what `queries`, of shape `(num_queries, projection_dim)`, find; under `name`."""
        metrics = compute_retrieval_metrics(queries, self.images, self.owner)
        ranks = [part.numpy() for part in retrieval_ranks(queries, self.images, self.owner)]
        counts = hits(ranks, [self.group[self.owner], self.group], self.draws.shape[1])
        self.found[name] = metrics | {"intervals": intervals(counts, self.draws)}
        self.sums[name] = sum_recall(counts, self.draws)

    def ask_base(self):
        self.ask(BASE, encode_texts(self.base, self.asked, self.processor, languages=None))
        if self.translated is not None:
            self.ask(TRANSLATED, self.translated)
        self.ask_english(ENGLISH_BEFORE, self.base)

    def ask_english(self, name: str, model: NrccrModel, processor=None, language: str | None = None):
        if all(self.english):
            self.ask(name, encode_texts(model, self.english, processor or self.processor, languages=language))

    def ask_model(self, name: str, model: NrccrModel, language: str | None, processor=None):
        queries = encode_texts(model, self.asked, processor or self.processor, languages=language)
        self.ask(name, queries)
        if self.translated is not None:
            self.ask(FUSED.format(name), fuse_query_embeds(queries, self.translated, SHARE))
        self.ask_english(ENGLISH.format(name), model, processor)

    def report(self, ours: tuple, rivals: dict[str, tuple], anchored: bool = False) -> dict:
        """Return `verdict`, `reasons`, `found` and counts. `ours`, and each of `rivals`: as of `ask_model`.
        `anchored`: English was taught beside the language; the reasons say whether a language need be given."""
        self.ask_base()
        self.ask_model(OURS, *ours)
        model, language, processor = ours
        self.ask_english(THROUGH.format(OURS), model, processor, language)
        for name, rival in rivals.items():
            self.ask_model(name, *rival)
        word, reasons = verdict(self.sums, OURS, self.draws.shape[1])
        if anchored:
            reasons.append(one_side(self.sums, OURS, self.draws.shape[1]))
        if self.untranslated:
            reasons.append(f"the translated query was not asked: {self.untranslated}")
        counts = {
            "queries": len(self.asked),
            "pictures": len(self.images),
            "groups": self.draws.shape[1],
            "left_out": list(self.broken.values()),
        }
        return {"verdict": word, "reasons": reasons, "found": self.found} | counts


def embed_pictures(
    names, load: Callable, base: NrccrModel, processor, work=None, strict: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the base's embedding of each picture, by name, and those that cannot be read, with the reason. `work`:
    folder that keeps what was computed."""
    side = base.language_side().set_trained_layers(0, False)
    cache = FeatureCache(side, processor.language_side(), work)
    broken = cache.add_images(names, load, strict=strict)
    good = [name for name in dict.fromkeys(names) if name not in broken]
    if not good:
        return {}, broken
    with torch.no_grad():
        embeds = base.get_image_features(**cache(images=good)).pooler_output.float().cpu()
    return dict(zip(good, embeds)), broken


def verdict(sums: dict[str, np.ndarray], name: str, num_groups: int) -> tuple[str, list[str]]:
    """
    Return what to do, and why.

    Of the base as it is, the language alone, the base asked in translation and both fused (in this order: each costs
    more than the one before) the first is taken that is not surely worse than the best. English that surely loses more
    than `MARGIN` rules the language out.

    Args:
        sums: SumR of each row of the report, then of each draw, `(1 + DRAWS,)`; all by the same draws.
        name: of the row that is judged.
        num_groups: that were drawn from.
    """
    if num_groups < FEWEST_GROUPS:
        return TOO_FEW, [f"the test has {num_groups} groups of pictures: {FEWEST_GROUPS} are needed, better hundreds"]
    rows = {DO_NOT: BASE, USE: name, ASK: TRANSLATED, USE_FUSED: FUSED.format(name)}
    rows = {word: row for word, row in rows.items() if row in sums}
    best = max(rows, key=lambda word: sums[rows[word]][0])
    level = [word for word in rows if word == best or interval(sums[rows[best]] - sums[rows[word]])[0] <= 0]
    word = level[0]
    if word == DO_NOT and any(
        interval(sums[rows[other]] - sums[BASE])[1] > MARGIN for other in (USE, USE_FUSED) if other in rows
    ):
        word = TOO_FEW
    shown = rows[{DO_NOT: USE, TOO_FEW: best if best != DO_NOT else USE}.get(word, word)]
    others = [row for row in rows.values() if row != shown and (row == BASE or word in (USE, ASK, USE_FUSED))]
    reasons = [compared(sums, shown, other) for other in others]
    if word == TOO_FEW:
        reasons.append("with more human queries it can be told whether that is so")
    before, after = ENGLISH_BEFORE, ENGLISH.format(name)
    if before in sums and after in sums:
        lost = sums[before] - sums[after]
        if lost[0] > MARGIN:
            reasons.insert(0, f"English finds less than before: {compared(sums, after, before)}")
        if interval(lost)[0] > MARGIN and word in (USE, USE_FUSED):
            word, reasons = DO_NOT, reasons[:1]
    return word, reasons


def one_side(sums: dict[str, np.ndarray], name: str, num_groups: int) -> str:
    """Return whether one text side is enough for English and the language. Arguments as of `verdict`, which this does
    not change: without a language, English is what it was."""
    before, through = ENGLISH_BEFORE, THROUGH.format(name)
    if through not in sums or num_groups < FEWEST_GROUPS:
        lack = "enough pictures" if through in sums else "an English caption with each query"
        return f"whether a language need be given is not known: the test lacks {lack}"
    word = GIVE_LANGUAGE if sums[before][0] - sums[through][0] > MARGIN else NO_LANGUAGE
    return f"{word}: {compared(sums, through, before)}"


def compared(sums: dict[str, np.ndarray], row: str, other: str) -> str:
    difference = sums[row] - sums[other]
    low, high = interval(difference)
    more = "more" if difference[0] >= 0 else "less"
    return (
        f"{row} SumR {sums[row][0]:.1f}, {other} {sums[other][0]:.1f}: {abs(difference[0]):.1f} {more} "
        f"({low:+.1f} to {high:+.1f})"
    )


def merge_reports(tested: dict[str, dict]) -> dict:
    """Merge the reports of several languages, each line and reason with its language, and the sternest verdict."""
    if len(tested) < 2:
        return next(iter(tested.values()), {})
    counts = {name: sum(part[name] for part in tested.values()) for name in ("queries", "pictures", "groups")}
    return {
        "verdict": min((part["verdict"] for part in tested.values()), key=STERN.index),
        "verdicts": {language: part["verdict"] for language, part in tested.items()},
        "reasons": [f"{language}: {reason}" for language, part in tested.items() for reason in part["reasons"]],
        "found": {
            f"{language}: {name}": found for language, part in tested.items() for name, found in part["found"].items()
        },
        "left_out": [reason for part in tested.values() for reason in part["left_out"]],
    } | counts

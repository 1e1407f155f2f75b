"""
How noisy machine-translated captions are: a report for a whole set, and a confidence for each pair.

Neither needs a human translation: what is compared is the caption, its translation and the translation back. Where
human captions are at hand, they show how far that can be trusted. Needs the extra `noise`:
[sacrebleu](https://github.com/mjpost/sacrebleu) and the language identifier py3langid, whose wheel holds its model.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm


CLEAN_ORIGINS = ("human", "grammar")  # of `target_origin`: the caption is no translation
WORD = re.compile(r"[^\W\d_]+")
# A phrase of one to four words that stands there three times in a row: what a decoder does that has lost its way.
LOOP = re.compile(r"\b(\w+(?:\W+\w+){0,3})(?:\W+\1\b){2}", re.IGNORECASE)
# How many times likelier than the target language the source language, or any other, must be. Captions are short: with
# these, 1 to 4 % of the demo's that people wrote are called wrong, and three of four that were left in English are.
SOURCE_FACTOR, OTHER_FACTOR = math.e, 20
LENGTH_FACTOR = 2  # beyond it, shorter or longer than the set's median ratio, a length is odd
IDENTIFIER_CODES = {"nb": "no"}
BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh"} | dict.fromkeys(("ja", "th", "km", "lo", "my"), "char")
FLAGS = ("empty", "copied", "repeated_words", "same_output", "wrong_language", "odd_length")


def _missing(package: str, error: ImportError) -> ImportError:
    return ImportError(f'the noise of translations needs {package}: pip install "modeling_nrccr[noise]" ({error})')


@cache
def _chrf():
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise _missing("sacrebleu", error) from error
    return CHRF(lowercase=True)


@cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise _missing("py3langid", error) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sentence_chrf(hypothesis: str, reference: str) -> float:
    """
    Return chrF (Popović, 2015, https://aclanthology.org/W15-3049) of one pair, 0 to 100. Upper and lower case are
    alike here and in all that follows: engines begin with a capital where emoji names do not, which matters to no
    picture.
    """
    return _chrf().sentence_score(hypothesis, [reference]).score


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """
    Return `chrf` and `bleu` of a corpus, 0 to 100, as sacrebleu computes them with `lowercase=True`; `language`: of
    both sides, for BLEU's tokenizer.
    """
    from sacrebleu.metrics import BLEU

    tokenizer = BLEU_TOKENIZERS.get(language.split("-")[0], BLEU.TOKENIZER_DEFAULT)
    metrics = {"chrf": _chrf(), "bleu": BLEU(lowercase=True, tokenize=tokenizer)}
    return {name: metric.corpus_score(hypotheses, [references]).score for name, metric in metrics.items()}


def copied_share(source: str, translation: str) -> float:
    """Return the share of a translation's letters, 0 to 1, in words that stand in the source too: mostly left
    untranslated, though some words are the same in both languages."""
    words, known = WORD.findall(translation.casefold()), set(WORD.findall(source.casefold()))
    return sum(len(word) for word in words if word in known) / max(sum(map(len, words)), 1)


def translation_confidence(source: str, translation: str, back_translation: str) -> float:
    """
    Return how far a translation can be trusted, 0 to 1, from the three texts alone:

        chrF(back_translation, source) / 100 * (1 - copied_share(source, translation)) ** 2

    A word that was left as it was comes back as it was: the way there and back alone takes the worst translations for
    the best. The power was chosen by the correlation with chrF against human captions on Galician training pairs;
    `docs/translation.md` has it for other languages, and what else was tried.

    Raises ImportError without the extra `noise`.
    """
    kept = 1 - copied_share(source, translation)
    return min(sentence_chrf(back_translation, source) / 100, 1.0) * kept**2


def encoder_agreement(
    sources: Sequence[str], translations: Sequence[str], embed: Callable[[list[str]], ArrayLike]
) -> np.ndarray:
    """
    Return how much closer each translation lies to its own caption than to any, by a multilingual encoder: 0 as close
    as to the others on average, 1 in one place. Of shape `(len(sources),)`.

    Args:
        embed: texts to L2-normalised embeddings of shape `(len(texts), embed_dim)`.

    Raises:
        ValueError: for unequal numbers of captions, translations and embeddings.
    """
    rows = np.asarray(embed([*sources, *translations]), dtype=np.float64)
    if rows.shape[0] != 2 * len(sources) or len(sources) != len(translations):
        raise ValueError(f"{len(sources)} captions, {len(translations)} translations, {rows.shape} embeddings")
    first, second = np.split(rows, 2)
    others = float(first.mean(0) @ second.mean(0))  # the mean cosine of all with all
    return ((np.einsum("ij,ij->i", first, second) - others) / max(1 - others, 1e-6)).clip(0, 1)


def wrong_language(text: str, target: str, source: str) -> str | None:
    """
    Return the language that a text is in, if that is clearly not `target`: py3langid finds `source` e times likelier,
    or any other language 20 times. None where it is `target`, or too short to tell.

    Raises:
        ValueError: the identifier does not know `target`; [`knows_language`] tells.
        ImportError: without the extra `noise`.
    """
    if not knows_language(target):
        raise ValueError(f"py3langid does not know the language {target!r}; it knows {', '.join(_languages())}")
    target, source = _identifier_code(target), _identifier_code(source)
    if target == source or not WORD.search(text):
        return None
    likelihood = dict(_identifier().rank(text))
    found = max(likelihood, key=likelihood.get)
    if likelihood[found] > OTHER_FACTOR * likelihood[target]:
        return found
    return source if likelihood.get(source, 0) > SOURCE_FACTOR * likelihood[target] else None


def knows_language(code: str) -> bool:
    """Tell whether the identifier knows a language, given by its ISO 639-1 or BCP 47 code."""
    return _identifier_code(code) in _languages()


def _identifier_code(code: str) -> str:
    code = code.split("-")[0].lower()
    return IDENTIFIER_CODES.get(code, code)


@cache
def _languages() -> list[str]:
    return sorted(_identifier().labels)


def correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """
    Compute `spearman` and `pearson` of two sequences of one length; ties share their mean rank; None where one is
    constant.

    Raises ValueError if the lengths differ, or are below 2.
    """
    values = [np.asarray(part, dtype=np.float64) for part in (first, second)]
    if values[0].shape != values[1].shape or len(values[0]) < 2:
        raise ValueError(
            f"correlation needs two sequences of one length of at least 2, got {len(first)}, {len(second)}"
        )
    return {"spearman": _pearson(*map(_ranks, values)), "pearson": _pearson(*values)}


def _pearson(first: np.ndarray, second: np.ndarray) -> float | None:
    if not np.ptp(first) or not np.ptp(second):
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@dataclass
class Pair:
    """A caption and its translation; `back_translation` and a human `reference` of the translation where there are."""

    row: int
    caption_id: str
    source: str
    translation: str
    back_translation: str | None = None
    reference: str | None = None

    @property
    def confidence(self) -> float | None:
        if self.back_translation is None:
            return None
        return translation_confidence(self.source, self.translation, self.back_translation)


def measure_noise(pairs: Sequence[Pair], source_language: str, target_language: str, num_worst: int = 50) -> dict:
    """
    Measure what a translation did to a set of captions.

    Returns:
        `dict` of:
        - `captions`, `source_language`, `target_language`;
        - `round_trip_chrf`, `round_trip_bleu`: of the back-translations against the captions, 0 to 100 (sacrebleu);
          None where a back-translation is missing;
        - `reference_chrf`, `reference_bleu`: of the translations against the references; None where one is missing;
        - `length_ratio`: median of the lengths in characters, translation over caption;
        - in percent of the captions, `empty` (no letter or digit); `copied` (the same words as in the caption);
          `repeated_words` (a phrase three times in a row, which is not so in the caption); `same_output` (another
          caption has the same translation); `odd_length` (beyond half or twice the `length_ratio`); `wrong_language`
          (see [`wrong_language`]; None where the identifier does not know the language);
        - `copied_letters`: mean of [`copied_share`], in percent;
        - `languages`: of those in the wrong one, how many captions are in which;
        - `confidence`: mean of [`translation_confidence`]; `confidence_histogram`: captions in ten equal bins;
        - `confidence_correlation`: with the translations' chrF against the references;
        - `worst`: the `num_worst` pairs of lowest chrF against the references, without these of lowest confidence,
          long ones first: their texts, `confidence`, `quality` (that chrF), and `flags`, the shares above that they
          count to.

    Raises:
        ValueError: there are no pairs.
        ImportError: without the extra `noise`.
    """
    if not pairs:
        raise ValueError(f"no pairs {source_language}-{target_language} to measure")
    identify = knows_language(target_language)
    captions_of: dict[str, set] = {}
    for pair in pairs:
        captions_of.setdefault(_key(pair.translation), set()).add(_key(pair.source))
    ratios = np.array([len(pair.translation) / max(len(pair.source), 1) for pair in pairs])
    median = float(np.median(ratios))
    rows, languages = [], Counter()
    for pair, ratio in zip(tqdm(pairs, desc="translation noise", unit="caption", delay=2), ratios):
        key = _key(pair.translation)
        found = wrong_language(pair.translation, target_language, source_language) if identify else None
        languages.update([found] if found else [])
        tests = {
            "empty": not key,
            "copied": bool(key) and key == _key(pair.source),
            "repeated_words": bool(LOOP.search(pair.translation)) and not LOOP.search(pair.source),
            "same_output": bool(key) and len(captions_of[key]) > 1,
            "wrong_language": found is not None,
            "odd_length": not median / LENGTH_FACTOR <= ratio <= median * LENGTH_FACTOR,
        }
        quality = None if pair.reference is None else sentence_chrf(pair.translation, pair.reference)
        flags = [name for name in FLAGS if tests[name]]
        rows.append(asdict(pair) | {"confidence": pair.confidence, "quality": quality, "flags": flags})

    shares = {name: 100 * sum(name in row["flags"] for row in rows) / len(rows) for name in FLAGS}
    if not identify:
        shares["wrong_language"] = None
    report = {"captions": len(rows), "source_language": source_language, "target_language": target_language}
    for name, hypothesis, reference, language in (
        ("round_trip", "back_translation", "source", source_language),
        ("reference", "translation", "reference", target_language),
    ):
        texts = [(row[hypothesis], row[reference]) for row in rows]
        scores = corpus_scores(*zip(*texts), language) if all(None not in both for both in texts) else {}
        report |= {f"{name}_chrf": scores.get("chrf"), f"{name}_bleu": scores.get("bleu")}
    report |= {"length_ratio": median, **shares}
    report["copied_letters"] = 100 * float(np.mean([copied_share(pair.source, pair.translation) for pair in pairs]))
    report["languages"] = dict(languages.most_common())
    confidences, qualities = ([row[name] for row in rows] for name in ("confidence", "quality"))
    rated, judged = None not in confidences, None not in qualities
    report["confidence"] = float(np.mean(confidences)) if rated else None
    report["confidence_histogram"] = np.histogram(confidences, 10, (0, 1))[0].tolist() if rated else None
    report["confidence_correlation"] = (
        correlation(confidences, qualities) if rated and judged and len(rows) > 1 else None
    )
    report["worst"] = _worst(rows, num_worst)
    return report


def _key(text: str) -> str:
    """Return a text without case and punctuation; two texts with the same one say the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _worst(rows: list[dict], count: int) -> list[dict]:
    """Return the `count` worst pairs, each pair of texts once; equals by length, then in the order of the rows."""
    by = next((name for name in ("quality", "confidence") if None not in [row[name] for row in rows]), None)
    if by is None:
        return []
    distinct = {(_key(row["source"]), _key(row["translation"])): row for row in reversed(rows)}
    return sorted(distinct.values(), key=lambda row: (row[by], -len(row["source"]), row["row"]))[:count]


def dataset_pairs(
    dataset, references: Mapping[str, str] | None = None, engine: str | None = None
) -> dict[tuple[str, str], list[Pair]]:
    """
    Return the machine translations of a split with the builders' columns, by direction `(source, target)`.

    - A row whose `target_caption` is a translation: from `source_caption`, back in `back_translation`; outside
      training from `reference_source_caption`, back in `source_caption`.
    - A row whose `target_caption` people wrote: the other direction, in `back_translation` or `source_caption`, with
      the human English as `reference`; left out where there is no translation.

    Args:
        references (`Mapping[str, str]`, *optional*): human target captions by `caption_id`.
        engine (`str`, *optional*): of several engines, this one, whose columns end in `_<engine>`.

    Raises ValueError for a text or a column that is missing; names the row and the column.
    """
    suffix = f"_{engine}" if engine else ""
    texts = ["source_caption", "target_caption", "back_translation"]
    if "reference_source_caption" in dataset.column_names:
        texts.append("reference_source_caption")
    names = ["caption_id", "source_language", "target_language", "target_origin", *texts]
    names += [name + suffix for name in texts[:3] if suffix and name + suffix in dataset.column_names]
    if missing := [name for name in names if name not in dataset.column_names]:
        raise ValueError(f"the columns {missing} are missing; it has {dataset.column_names}")
    directions: dict[tuple[str, str], list[Pair]] = {}
    for number, row in enumerate(dataset.select_columns(names)):
        is_clean = row["target_origin"] in CLEAN_ORIGINS
        in_target = "target_caption" if is_clean else f"target_caption{suffix}"
        # outside training the human English is kept apart, and the source is what was translated from the target
        in_training = row.get("reference_source_caption") is None
        in_source = "source_caption" if in_training else "reference_source_caption"
        in_return = f"back_translation{suffix}" if in_training else f"source_caption{suffix}"
        if is_clean and row.get(in_return) is None:
            continue
        for column in (in_target,) if is_clean else (in_source, in_target, in_return):
            if row.get(column) is None:
                raise ValueError(
                    f"row {number} ({row['caption_id']}): {column} is None; translate the data first "
                    "(add_translations), or leave the split out"
                )
        languages, key = (row["source_language"], row["target_language"]), (number, row["caption_id"])
        source, target, back = row[in_source], row[in_target], row[in_return]
        if is_clean:
            languages, pair = languages[::-1], Pair(*key, target, back, reference=source)
        else:
            pair = Pair(*key, source, target, back, (references or {}).get(row["caption_id"]))
        directions.setdefault(languages, []).append(pair)
    return directions


def translation_engines(dataset) -> list[str]:
    """Return the engines whose translations stand in columns of their own, `target_caption_<engine>`."""
    prefix = "target_caption_"
    return [name.removeprefix(prefix) for name in dataset.column_names if name.startswith(prefix)]


def noise_report(
    dataset_dict, references: Mapping[str, Mapping[str, str]] | None = None, num_worst: int = 50
) -> list[dict]:
    """
    Return [`measure_noise`] of every split of a translated `DatasetDict`, one entry a split, direction and engine:
    `split`, `engine` (None where people wrote the captions that were translated, since no column names it) and the
    measures.

    Args:
        references: human target captions, by split and `caption_id`.

    Raises ValueError as [`dataset_pairs`] does; names the split.
    """
    entries = []
    for split, dataset in dataset_dict.items():
        for engine in translation_engines(dataset) or [None]:
            try:
                directions = dataset_pairs(dataset, (references or {}).get(split), engine)
            except ValueError as error:
                raise ValueError(f"{split}, {error}") from error
            for (source, target), pairs in directions.items():
                origins = sorted({str(name) for name in dataset["target_origin"]} - set(CLEAN_ORIGINS))
                made = (source, target) == (dataset["source_language"][0], dataset["target_language"][0])
                name = engine or (", ".join(origins) if made else None)
                entries.append({"split": split, "engine": name, **measure_noise(pairs, source, target, num_worst)})
    return entries


def add_translation_confidence(dataset, embed: Callable[[list[str]], ArrayLike] | None = None):
    """
    Add the column `translation_confidence`, float32 in 0 to 1: [`translation_confidence`] of each row's
    `target_caption`; 1 where people wrote it.

    Args:
        dataset (`Dataset` or `DatasetDict`): translated, with the builders' columns.
        embed (*optional*): a frozen multilingual encoder as [`encoder_agreement`] takes it. The confidence is then
            multiplied by (1 + agreement) / 2, the agreement being that of the captions of one call. It helps where a
            translation comes back whole whatever it was, as from a dictionary; see `docs/translation.md`.

    Returns:
        The same type, with all other columns as they were; a column of that name is replaced.

    Raises:
        ValueError: a text is missing; names the split and the row.
        ImportError: without the extra `noise`.
    """
    import datasets

    if isinstance(dataset, Mapping):
        result = {}
        for split, part in dataset.items():
            try:
                result[split] = add_translation_confidence(part, embed)
            except ValueError as error:
                raise ValueError(f"{split}, {error}") from error
        return type(dataset)(result)
    column = "translation_confidence"
    if column in dataset.column_names:
        dataset = dataset.remove_columns(column)
    origins = dataset["target_origin"][:]
    pairs = [
        pair for pairs in dataset_pairs(dataset).values() for pair in pairs if origins[pair.row] not in CLEAN_ORIGINS
    ]
    values = [1.0] * len(dataset)
    for pair in tqdm(pairs, desc=column, unit="caption", delay=2):
        values[pair.row] = pair.confidence
    if embed is not None and pairs:
        agreement = encoder_agreement([pair.source for pair in pairs], [pair.translation for pair in pairs], embed)
        for pair, share in zip(pairs, agreement):
            values[pair.row] *= (1 + float(share)) / 2
    return dataset.add_column(column, values, feature=datasets.Value("float32"))

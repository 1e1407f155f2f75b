"""Language codes: ISO 639-1 or BCP 47 for people, and what each engine calls the same languages."""

import difflib
from collections import defaultdict
from collections.abc import Iterable

from langcodes import Language, closest_match, standardize_tag, tag_distance


# Languages that CLDR's aliases keep apart from the code people use for them: those of M2M100, NLLB and Apertium.
_ALIASES = {"ns": "nso", "zlm": "ms", "pbt": "ps", "quy": "qu"}
_SAME = 5  # CLDR's distance up to which two codes are one language: pt-BR and pt, es-MX and es, no and nb


def _language(code: str) -> Language:
    """Parse a code. Raises ValueError if it is no BCP 47, written with "-" or "_"."""
    first, *rest = code.replace("_", "-").split("-")
    return Language.get("-".join([_ALIASES.get(first, first), *rest]))


def _is_same(language: Language, other: Language) -> bool:
    return language.distance(other) <= _SAME and language.maximize().script == other.maximize().script


def standard_code(code: str) -> str:
    """
    Return the shortest BCP 47 code, which is ISO 639-1 where there is one: `gl` for `glg`, `glg_Latn` and `gl_ES`, but
    `zh-Hant` for `zho_Hant`. What is no language code stays as it is.
    """
    try:
        tag = standardize_tag(_language(code), macro=True)
        short = Language.get(tag).language
        return short if short and _is_same(Language.get(tag), Language.get(short)) else tag
    except ValueError:
        return code


def _rank(code: str, language: str) -> tuple:
    return tag_distance(code.replace("_", "-"), language), len(code), "Latn" not in code


def standard_codes(codes: Iterable[str]) -> dict[str, str]:
    """
    Return standard codes and the engine's own for them. Where two of its codes are one language (`zho_Hans` and
    `zho_Hant`, `kas_Arab` and `kas_Deva`), the usual one has the short code and the others keep what tells them apart.
    """
    groups = defaultdict(list)
    for code in codes:
        groups[standard_code(code).split("-")[0]].append(code)
    result = {}
    for language, members in groups.items():
        # The nearest takes the short code; twi and aka, both "ak" to some, keep their own.
        first, *others = sorted(members, key=lambda code: _rank(code, language)) if len(members) > 1 else members
        result[language] = first
        for code in others:
            tag = code.replace("_", "-")
            names = standard_code(code), standardize_tag(tag.split("-")[0]), standardize_tag(tag)
            result.setdefault(next((name for name in names if name not in result), code), code)
    return result


def closest_code(code: str, known: Iterable[str]) -> str | None:
    """Find the one of `known` that is the same language (`pt-BR`: `pt`, `glg`: `gl`, `zh-TW`: `zh-Hant`), else
    None."""
    known = list(known)
    if code in known:
        return code
    try:
        language = _language(code)
        best, _ = closest_match(language, known, max_distance=_SAME)
        return best if best in known and _is_same(language, Language.get(best)) else None
    except ValueError:
        return None


def nearest_codes(code: str, known: Iterable[str], count: int = 5) -> str:
    """Name, for messages, up to `count` of `known` that may have been meant; `cs` first for `cz`, the country's
    code."""
    known = sorted(known)
    guesses = []
    try:
        guesses.append(Language.get(f"und-{code.upper()}").maximize().language)
    except ValueError:
        pass
    guesses = [guess for guess in guesses if guess in known and guess != "en"]  # English: of no known country
    guesses += difflib.get_close_matches(standard_code(code.lower()), known, count, cutoff=0.5)
    guesses += [other for other in known if other[0] == code[:1].lower()] if not guesses else []
    return ", ".join(list(dict.fromkeys(guesses or known))[:count])

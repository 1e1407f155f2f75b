"""
The grammar of the synthetic scenes: captions in English, Czech, German and French, inflected rightly, out of words
that a simulated translator can get wrong one by one. See [`Scenes`].
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


LANGUAGES = ("en", "cs", "de", "fr")

# English singular and plural; Czech gender (`a`: animate masculine) and nominative, genitive, accusative and
# instrumental, first of the singular, then of the plural; German and French gender, singular, plural.
_THINGS = {
    "star": (
        "star stars",
        "f hvězda hvězdy hvězdu hvězdou hvězdy hvězd hvězdy hvězdami",
        "m Stern Sterne",
        "f étoile étoiles",
    ),
    "heart": ("heart hearts", "n srdce srdce srdce srdcem srdce srdcí srdce srdci", "n Herz Herzen", "m cœur cœurs"),
    "circle": (
        "circle circles",
        "m kruh kruhu kruh kruhem kruhy kruhů kruhy kruhy",
        "m Kreis Kreise",
        "m cercle cercles",
    ),
    "square": (
        "square squares",
        "m čtverec čtverce čtverec čtvercem čtverce čtverců čtverce čtverci",
        "n Quadrat Quadrate",
        "m carré carrés",
    ),
    "triangle": (
        "triangle triangles",
        "m trojúhelník trojúhelníku trojúhelník trojúhelníkem trojúhelníky trojúhelníků trojúhelníky trojúhelníky",
        "n Dreieck Dreiecke",
        "m triangle triangles",
    ),
    "cross": ("cross crosses", "m kříž kříže kříž křížem kříže křížů kříže kříži", "n Kreuz Kreuze", "f croix croix"),
    "arrow": (
        "arrow arrows",
        "f šipka šipky šipku šipkou šipky šipek šipky šipkami",
        "m Pfeil Pfeile",
        "f flèche flèches",
    ),
    "ring": (
        "ring rings",
        "m prsten prstenu prsten prstenem prsteny prstenů prsteny prsteny",
        "m Ring Ringe",
        "m anneau anneaux",
    ),
    "moon": ("moon moons", "m měsíc měsíce měsíc měsícem měsíce měsíců měsíce měsíci", "m Mond Monde", "f lune lunes"),
    "house": ("house houses", "m dům domu dům domem domy domů domy domy", "n Haus Häuser", "f maison maisons"),
    "tree": (
        "tree trees",
        "m strom stromu strom stromem stromy stromů stromy stromy",
        "m Baum Bäume",
        "m arbre arbres",
    ),
    "fish": ("fish fish", "f ryba ryby rybu rybou ryby ryb ryby rybami", "m Fisch Fische", "m poisson poissons"),
    "flower": (
        "flower flowers",
        "f květina květiny květinu květinou květiny květin květiny květinami",
        "f Blume Blumen",
        "f fleur fleurs",
    ),
    "butterfly": (
        "butterfly butterflies",
        "a motýl motýla motýla motýlem motýli motýlů motýly motýly",
        "m Schmetterling Schmetterlinge",
        "m papillon papillons",
    ),
    "bird": ("bird birds", "a pták ptáka ptáka ptákem ptáci ptáků ptáky ptáky", "m Vogel Vögel", "m oiseau oiseaux"),
    "leaf": (
        "leaf leaves",
        "m list listu list listem listy listů listy listy",
        "n Blatt Blätter",
        "f feuille feuilles",
    ),
    "mushroom": (
        "mushroom mushrooms",
        "f houba houby houbu houbou houby hub houby houbami",
        "m Pilz Pilze",
        "m champignon champignons",
    ),
    "umbrella": (
        "umbrella umbrellas",
        "m deštník deštníku deštník deštníkem deštníky deštníků deštníky deštníky",
        "m Regenschirm Regenschirme",
        "m parapluie parapluies",
    ),
    "cup": ("cup cups", "m hrnek hrnku hrnek hrnkem hrnky hrnků hrnky hrnky", "f Tasse Tassen", "f tasse tasses"),
    "boat": ("boat boats", "f loď lodi loď lodí lodě lodí lodě loděmi", "n Boot Boote", "m bateau bateaux"),
    "flag": (
        "flag flags",
        "f vlajka vlajky vlajku vlajkou vlajky vlajek vlajky vlajkami",
        "f Flagge Flaggen",
        "m drapeau drapeaux",
    ),
    "key": ("key keys", "m klíč klíče klíč klíčem klíče klíčů klíče klíči", "m Schlüssel Schlüssel", "f clé clés"),
    "apple": (
        "apple apples",
        "n jablko jablka jablko jablkem jablka jablek jablka jablky",
        "m Apfel Äpfel",
        "f pomme pommes",
    ),
    "cloud": ("cloud clouds", "m mrak mraku mrak mrakem mraky mraků mraky mraky", "f Wolke Wolken", "m nuage nuages"),
    "drop": (
        "drop drops",
        "f kapka kapky kapku kapkou kapky kapek kapky kapkami",
        "m Tropfen Tropfen",
        "f goutte gouttes",
    ),
    "envelope": (
        "envelope envelopes",
        "f obálka obálky obálku obálkou obálky obálek obálky obálkami",
        "m Umschlag Umschläge",
        "f enveloppe enveloppes",
    ),
    "hat": (
        "hat hats",
        "m klobouk klobouku klobouk kloboukem klobouky klobouků klobouky klobouky",
        "m Hut Hüte",
        "m chapeau chapeaux",
    ),
    "window": (
        "window windows",
        "n okno okna okno oknem okna oken okna okny",
        "n Fenster Fenster",
        "f fenêtre fenêtres",
    ),
    "wheel": ("wheel wheels", "n kolo kola kolo kolem kola kol kola koly", "n Rad Räder", "f roue roues"),
}

# English; Czech (masculine nominative; all hard); German stem; French masculine and feminine of the singular, then of
# the plural. "=" is not inflected.
_ADJECTIVES = {
    "size": {
        "large": ("large", "velký", "groß", "grand grande grands grandes"),
        "small": ("small", "malý", "klein", "petit petite petits petites"),
    },
    "colour": {
        "red": ("red", "červený", "rot", "rouge rouge rouges rouges"),
        "blue": ("blue", "modrý", "blau", "bleu bleue bleus bleues"),
        "green": ("green", "zelený", "grün", "vert verte verts vertes"),
        "yellow": ("yellow", "žlutý", "gelb", "jaune jaune jaunes jaunes"),
        "orange": ("orange", "oranžový", "orangefarben", "=orange"),
        "purple": ("purple", "fialový", "violett", "violet violette violets violettes"),
        "pink": ("pink", "růžový", "=rosa", "rose rose roses roses"),
        "brown": ("brown", "hnědý", "braun", "=marron"),
        "black": ("black", "černý", "schwarz", "noir noire noirs noires"),
        "white": ("white", "bílý", "weiß", "blanc blanche blancs blanches"),
        "grey": ("grey", "šedý", "grau", "gris grise gris grises"),
        "turquoise": ("turquoise", "tyrkysový", "türkisfarben", "=turquoise"),
    },
    "pattern": {
        "striped": ("striped", "pruhovaný", "gestreift", "rayé rayée rayés rayées"),
        "dotted": ("dotted", "puntíkovaný", "gepunktet", "=à pois"),
        "checked": ("checked", "kostkovaný", "kariert", "=à carreaux"),
    },
}
_NUMBERS = {  # Czech by case, of masculine and of other nouns
    "two": ("two", {"nom": "dva dvě", "gen": "dvou", "acc": "dva dvě", "ins": "dvěma"}, "zwei", "deux"),
    "three": ("three", {"nom": "tři", "gen": "tří", "acc": "tři", "ins": "třemi"}, "drei", "trois"),
}
# Where one thing is; what one is to another; how three stand. The Czech cases that follow are below.
_PLACES = {
    "spot": {
        "top left": ("in the top left", "vlevo nahoře", "oben links", "en haut à gauche"),
        "top right": ("in the top right", "vpravo nahoře", "oben rechts", "en haut à droite"),
        "middle": ("in the middle", "uprostřed", "in der Mitte", "au milieu"),
        "bottom left": ("in the bottom left", "vlevo dole", "unten links", "en bas à gauche"),
        "bottom right": ("in the bottom right", "vpravo dole", "unten rechts", "en bas à droite"),
    },
    "relation": {
        "left": ("to the left of", "vlevo od", "links von", "à gauche de"),
        "right": ("to the right of", "vpravo od", "rechts von", "à droite de"),
        "above": ("above", "nad", "über", "au-dessus de"),
        "below": ("below", "pod", "unter", "au-dessous de"),
    },
    "line": {
        "between": ("between", "mezi", "zwischen", "entre"),
        "row": ("in a row", "v řadě", "in einer Reihe", "en ligne"),
        "column": ("in a column", "ve sloupci", "in einer Spalte", "en colonne"),
    },
}
_CZECH_CASES = {"left": "gen", "right": "gen", "above": "ins", "below": "ins", "between": "ins"}

VOCABULARY: dict[str, tuple[str, ...]] = {
    "thing": tuple(_THINGS),
    **{kind: tuple(words) for kind, words in _ADJECTIVES.items()},
    "number": tuple(_NUMBERS),
    **{kind: tuple(words) for kind, words in _PLACES.items()},
}
_ORDER = {language: ("number", "size", "colour", "pattern", "thing") for language in LANGUAGES}
_ORDER["fr"] = ("number", "size", "thing", "colour", "pattern")

# How a caption starts (in the singular and the plural of what follows), and the case that follows.
_OPENINGS = {
    "en": [("", "nom"), ("the picture shows", "acc"), ("a picture with", "ins"), ("there is|there are", "nom")],
    "cs": [("", "nom"), ("obrázek ukazuje", "acc"), ("obrázek s", "ins"), ("je tu|jsou tu", "nom")],
    "de": [("", "nom"), ("das Bild zeigt", "acc"), ("ein Bild mit", "ins"), ("hier ist|hier sind", "nom")],
    "fr": [("", "nom"), ("l'image montre", "acc"), ("une image avec", "ins"), ("il y a", "nom")],
}
OPENINGS = len(_OPENINGS["en"])
_AND = {"en": "and", "cs": "a", "de": "und", "fr": "et"}
_SPELLING = {  # what the next word's first letter decides
    "en": (re.compile(r"\b(a) (?=[aeiouéœ])", re.IGNORECASE), r"\1n "),
    "cs": (re.compile(r"\b(s) (?=[szšž]|dv|tř|čt)", re.IGNORECASE), r"\1e "),
    "de": (re.compile(r"(?!)"), ""),
    "fr": (re.compile(r"\b(d)e (?=[aeiouyâàéèêîôœ])", re.IGNORECASE), r"\1'"),
}

_CZECH_ENDINGS = {  # of hard adjectives, by gender: nominative, genitive, accusative, instrumental
    False: {"m": "ý ého ý ým", "a": "ý ého ého ým", "f": "á é ou ou", "n": "é ého é ým"},
    True: {"m": "é ých é ými", "a": "í ých é ými", "f": "é ých é ými", "n": "á ých á ými"},
}
_CZECH_CASE_INDEX = {"nom": 0, "gen": 1, "acc": 2, "ins": 3}
_GERMAN_ARTICLES = {"nom": "ein eine ein", "acc": "einen eine ein", "dat": "einem einer einem"}  # m, f, n
_GERMAN_ENDINGS = {"nom": "er e es", "acc": "en e es", "dat": "en en en"}  # after "ein"; m, f, n
_GERMAN_PLURAL_ENDINGS = {"nom": "e", "acc": "e", "dat": "en"}  # after a number
_GERMAN_DATIVES = {"Herz": "Herzen"}  # the others are as the nominative


@dataclass(frozen=True)
class Word:
    """
    A content word of a caption, and what a translator did to it.

    Args:
        kind (`str`), concept (`str`): a key and a value of `VOCABULARY`.
        text (`str`, *optional*): what was left untranslated.
        is_dropped (`bool`): left out.
        moved_to (`float`, *optional*): where it was put, among the other places there are, in [0, 1).
    """

    kind: str
    concept: str
    text: str | None = None
    is_dropped: bool = False
    moved_to: float | None = None


@dataclass(frozen=True)
class Caption:
    """
    What a caption says, in no language yet.

    Args:
        opening (`int`): which of the `OPENINGS` ways to start.
        phrases (`tuple[tuple[Word, ...], ...]`): of each thing its words; a `number` makes it a plural.
        place (`Word`): how they stand; of the kind `spot`, `relation` or `line` for one, two or three things.
    """

    opening: int
    phrases: tuple[tuple[Word, ...], ...]
    place: Word

    @property
    def words(self) -> tuple[Word, ...]:
        return (*(word for phrase in self.phrases for word in phrase), self.place)

    def replace_words(self, words: list[Word]) -> "Caption":
        """Return the same caption with other words, in the order of `words`."""
        rest = iter(words)
        return replace(
            self, phrases=tuple(tuple(next(rest) for _ in phrase) for phrase in self.phrases), place=next(rest)
        )


def _czech(kind: str, concept: str, noun: str, case: str, is_plural: bool) -> str:
    gender, *forms = _THINGS[noun][1].split()
    index = _CZECH_CASE_INDEX[case]
    if kind == "thing":
        return forms[index + 4 * is_plural]
    if kind == "number":
        by_gender = _NUMBERS[concept][1][case].split()
        return by_gender[0 if gender in "ma" else -1]
    stem = _ADJECTIVES[kind][concept][1][:-1]
    if is_plural and gender == "a" and case == "nom":  # velcí, modří
        stem = re.sub("k$", "c", re.sub("r$", "ř", stem))
    return stem + _CZECH_ENDINGS[is_plural][gender].split()[index]


def _german(kind: str, concept: str, noun: str, case: str, is_plural: bool) -> str:
    gender, singular, plural = _THINGS[noun][2].split()
    case = "dat" if case in ("ins", "gen") else case  # the prepositions here all take the dative
    if kind == "thing" and is_plural:
        return plural + "n" * (case == "dat" and plural[-1] not in "ns")
    if kind == "thing":
        return _GERMAN_DATIVES.get(singular, singular) if case == "dat" else singular
    if kind == "article":
        return _GERMAN_ARTICLES[case].split()["mfn".index(gender)]
    if kind == "number":
        return _NUMBERS[concept][2]
    stem = _ADJECTIVES[kind][concept][2]
    if stem.startswith("="):
        return stem[1:]
    return stem + (_GERMAN_PLURAL_ENDINGS[case] if is_plural else _GERMAN_ENDINGS[case].split()["mfn".index(gender)])


def _french(kind: str, concept: str, noun: str, case: str, is_plural: bool) -> str:
    gender, *forms = _THINGS[noun][3].split()
    if kind == "thing":
        return forms[is_plural]
    if kind == "article":
        return {"m": "un", "f": "une"}[gender]
    if kind == "number":
        return _NUMBERS[concept][3]
    forms = _ADJECTIVES[kind][concept][3]
    return forms[1:] if forms.startswith("=") else forms.split()[(gender == "f") + 2 * is_plural]


def _english(kind: str, concept: str, noun: str, case: str, is_plural: bool) -> str:
    if kind == "thing":
        return _THINGS[noun][0].split()[is_plural]
    if kind == "article":
        return "a"
    return (_NUMBERS if kind == "number" else _ADJECTIVES[kind])[concept][0]


_INFLECT = {"en": _english, "cs": _czech, "de": _german, "fr": _french}


def _phrase(words: tuple[Word, ...], first: int, language: str, case: str) -> list[tuple[str, int | None]]:
    """Return a noun phrase as texts, each with its place in `Caption.words`, which starts at `first`, or None."""
    numbers = {word.kind: i for i, word in enumerate(words)}
    noun, is_plural = words[numbers["thing"]].concept, "number" in numbers
    inflect = _INFLECT[language]
    parts = [] if is_plural or language == "cs" else [(inflect("article", "", noun, case, False), None)]
    for kind in _ORDER[language]:
        if kind in numbers:
            word = words[numbers[kind]]
            text = word.text or inflect(kind, word.concept, noun, case, is_plural)
            parts.append((text, first + numbers[kind]))
    return parts


def _parts(caption: Caption, language: str) -> list[tuple[str, int | None]]:
    """Return the texts of a caption in the grammar's order, each with its place in `words`; nothing dropped or moved
    yet."""
    place = caption.place
    opening, case = _OPENINGS[language][caption.opening]
    is_list = place.concept in ("row", "column")
    is_plural = is_list or any(word.kind == "number" for word in caption.phrases[0])
    opening = opening.split("|")[-1 if is_plural else 0]
    # outside Czech only the dative of German shows, which follows wherever Czech has genitive or instrumental
    other = case if is_list else _CZECH_CASES.get(place.concept, case)
    phrases, number = [], 0
    for words in caption.phrases:
        phrases.append(_phrase(words, number, language, other if phrases else case))
        number += len(words)
    where = (place.text or _PLACES[place.kind][place.concept][LANGUAGES.index(language)], number)
    first, *others = phrases
    joined = [part for i, phrase in enumerate(others) for part in ([(_AND[language], None)] if i else []) + phrase]
    start = [(opening, None)] if opening else []
    if is_list:
        return [*start, *first, (",", None), *joined, where]
    return [*start, *first, where, *joined]


def surfaces(caption: Caption, language: str) -> list[str]:
    """Return how each of `caption.words` reads in a language, inflected."""
    texts = {number: text for text, number in _parts(caption, language)}
    return [texts[number] for number in range(len(caption.words))]


def realise(caption: Caption, language: str) -> str:
    """Write a caption as a sentence of one of `LANGUAGES`, with what was done to its words."""
    words = caption.words
    parts = [part for part in _parts(caption, language) if part[1] is None or not words[part[1]].is_dropped]
    for number, word in enumerate(words):
        if word.moved_to is not None and not word.is_dropped and len(parts) > 1:
            at = next(i for i, part in enumerate(parts) if part[1] == number)
            places = [i for i in range(len(parts)) if i != at]
            parts.insert(places[int(word.moved_to * len(places))], parts.pop(at))
    text = " ".join(part for part, _ in parts).replace(" ,", ",").strip(", ")
    pattern, replacement = _SPELLING[language]
    text = pattern.sub(replacement, text)
    return f"{text[0].upper()}{text[1:]}."


NOISE_KINDS = ("wrong_sense", "untranslated", "dropped", "wrong_order")


def noise_rates(noise: float | Mapping[str, float]) -> dict[str, float]:
    """
    Return the rate of each of `NOISE_KINDS`, the share of content words that it befalls: given by name, or one number,
    which the four share equally. Raises ValueError for an unknown name, and for rates below 0 or over 1 together.
    """
    if isinstance(noise, Mapping):
        if unknown := noise.keys() - set(NOISE_KINDS):
            raise ValueError(f"noise has unknown kinds {', '.join(sorted(unknown))}; known: {', '.join(NOISE_KINDS)}")
        rates = {kind: float(noise.get(kind, 0.0)) for kind in NOISE_KINDS}
    else:
        rates = {kind: float(noise) / len(NOISE_KINDS) for kind in NOISE_KINDS}
    if not (min(rates.values()) >= 0 and sum(rates.values()) <= 1 + 1e-9):
        raise ValueError(f"noise must be from 0 to 1, or rates of at least 0 that sum to at most 1, got {noise!r}")
    return rates


def mistranslate(caption: Caption, source: str, rates: Mapping[str, float], key: str) -> Caption:
    """
    Return what a translator at the given `rates` makes of a caption in the language `source`; realise it in the other
    one. It is drawn by `key` alone: what errs at some rates errs at higher ones too, if their proportions are the
    same.

    - `wrong_sense`: another word of its kind, always the same one, as with real words of two senses, and rightly
      inflected; `untranslated`: as it stands in `source`; `dropped`: left out; `wrong_order`: put elsewhere.
    - Errors that are there already stay: a noisy translation can be translated back. At least one word is left.
    """
    total, weights = sum(rates.values()), list(rates.values())
    words = []
    for i, (word, text) in enumerate(zip(caption.words, surfaces(caption, source))):
        draw = random.Random(f"{key}/{i}")
        errs, kind = draw.random() < total, draw.choices(list(rates), weights)[0] if total else None
        if not errs or word.is_dropped:
            pass
        elif kind == "wrong_sense":
            concepts = VOCABULARY[word.kind]
            word = replace(word, concept=concepts[concepts.index(word.concept) - 1], text=None)
        elif kind == "untranslated":
            word = replace(word, text=text)
        elif kind == "dropped":
            word = replace(word, is_dropped=True)
        else:
            word = replace(word, moved_to=draw.random())
        words.append(word)
    if all(word.is_dropped for word in words):
        words[0] = caption.words[0] if not caption.words[0].is_dropped else replace(words[0], is_dropped=False)
    return caption.replace_words(words)


def noise_share(noisy: Caption, clean: Caption, language: str) -> float:
    """
    Return the share, 0 to 1, of a caption's content words (things, numbers, sizes, colours, patterns, and where things
    are, one each) that are wrong, left in another language, missing or moved. A word that is the same in both
    languages is not wrong, nor is one that merely agrees with a wrong noun.
    """
    if realise(noisy, language) == realise(clean, language):
        return 0.0
    wrong = 0
    for word, right, text in zip(noisy.words, clean.words, surfaces(clean, language)):
        is_foreign = word.text is not None and word.text != text
        wrong += word.is_dropped or word.moved_to is not None or word.concept != right.concept or is_foreign
    return wrong / len(clean.words)

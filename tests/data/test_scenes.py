"""Synthetic scenes: inflection against sentences written by hand, noise against rates, pictures against captions."""

import random
from dataclasses import replace
from statistics import mean

import datasets
import numpy as np
import pytest

from datasets_scripts.reading.scenes_drawing import COLOURS, draw_scene
from datasets_scripts.reading.scenes_grammar import (
    LANGUAGES,
    NOISE_KINDS,
    OPENINGS,
    VOCABULARY,
    Caption,
    Word,
    mistranslate,
    noise_rates,
    noise_share,
    realise,
    surfaces,
)
from datasets_scripts.scenes import Scene, Scenes, Thing, describe, draw_up_scene
from modeling_nrccr.data.load import load_translated_dataset, query_origin


pytestmark = pytest.mark.usefixtures("no_bars")

KIND_OF = {concept: kind for kind, concepts in VOCABULARY.items() for concept in concepts}
SMALL = {"num_train": 24, "num_validation": 6, "num_test": 8}


def caption(opening: int, place: str, *phrases: str) -> Caption:
    """`caption(0, "left", "large red star", "two fish")`."""
    words = tuple(tuple(Word(KIND_OF[concept], concept) for concept in phrase.split()) for phrase in phrases)
    return Caption(opening, words, Word(KIND_OF[place], place))


# Openings: 0 nominative, 1 accusative, 2 instrumental (German: dative), 3 "there is".
SENTENCES = [
    (
        caption(0, "left", "large red star", "two small blue fish"),
        "A large red star to the left of two small blue fish.",
        "Velká červená hvězda vlevo od dvou malých modrých ryb.",
        "Ein großer roter Stern links von zwei kleinen blauen Fischen.",
        "Une grande étoile rouge à gauche de deux petits poissons bleus.",
    ),
    (
        caption(1, "above", "large white striped butterfly", "green heart"),
        "The picture shows a large white striped butterfly above a green heart.",
        "Obrázek ukazuje velkého bílého pruhovaného motýla nad zeleným srdcem.",
        "Das Bild zeigt einen großen weißen gestreiften Schmetterling über einem grünen Herzen.",
        "L'image montre un grand papillon blanc rayé au-dessus d'un cœur vert.",
    ),
    (
        caption(2, "right", "two orange dotted apple", "black envelope"),
        "A picture with two orange dotted apples to the right of a black envelope.",
        "Obrázek se dvěma oranžovými puntíkovanými jablky vpravo od černé obálky.",
        "Ein Bild mit zwei orangefarbenen gepunkteten Äpfeln rechts von einem schwarzen Umschlag.",
        "Une image avec deux pommes orange à pois à droite d'une enveloppe noire.",
    ),
    (
        caption(3, "middle", "three large blue bird"),
        "There are three large blue birds in the middle.",
        "Jsou tu tři velcí modří ptáci uprostřed.",
        "Hier sind drei große blaue Vögel in der Mitte.",
        "Il y a trois grands oiseaux bleus au milieu.",
    ),
    (
        caption(1, "below", "two small grey heart", "three yellow boat"),
        "The picture shows two small grey hearts below three yellow boats.",
        "Obrázek ukazuje dvě malá šedá srdce pod třemi žlutými loděmi.",
        "Das Bild zeigt zwei kleine graue Herzen unter drei gelben Booten.",
        "L'image montre deux petits cœurs gris au-dessous de trois bateaux jaunes.",
    ),
    (
        caption(2, "between", "white flower", "brown checked tree", "purple window"),
        "A picture with a white flower between a brown checked tree and a purple window.",
        "Obrázek s bílou květinou mezi hnědým kostkovaným stromem a fialovým oknem.",
        "Ein Bild mit einer weißen Blume zwischen einem braunen karierten Baum und einem violetten Fenster.",
        "Une image avec une fleur blanche entre un arbre marron à carreaux et une fenêtre violette.",
    ),
    (
        caption(3, "row", "pink key", "orange umbrella", "turquoise house"),
        "There are a pink key, an orange umbrella and a turquoise house in a row.",
        "Jsou tu růžový klíč, oranžový deštník a tyrkysový dům v řadě.",
        "Hier sind ein rosa Schlüssel, ein orangefarbener Regenschirm und ein türkisfarbenes Haus in einer Reihe.",
        "Il y a une clé rose, un parapluie orange et une maison turquoise en ligne.",
    ),
    (
        caption(1, "column", "two red bird", "cup", "arrow"),
        "The picture shows two red birds, a cup and an arrow in a column.",
        "Obrázek ukazuje dva červené ptáky, hrnek a šipku ve sloupci.",
        "Das Bild zeigt zwei rote Vögel, eine Tasse und einen Pfeil in einer Spalte.",
        "L'image montre deux oiseaux rouges, une tasse et une flèche en colonne.",
    ),
    (
        caption(2, "top left", "yellow cross"),
        "A picture with a yellow cross in the top left.",
        "Obrázek se žlutým křížem vlevo nahoře.",
        "Ein Bild mit einem gelben Kreuz oben links.",
        "Une image avec une croix jaune en haut à gauche.",
    ),
    (
        caption(0, "left", "two leaf", "two black bird"),
        "Two leaves to the left of two black birds.",
        "Dva listy vlevo od dvou černých ptáků.",
        "Zwei Blätter links von zwei schwarzen Vögeln.",
        "Deux feuilles à gauche de deux oiseaux noirs.",
    ),
]


@pytest.mark.parametrize("row", SENTENCES, ids=lambda row: row[1])
def test_inflection(row):
    assert [realise(row[0], language) for language in LANGUAGES] == list(row[1:])


def test_every_word_has_its_forms():
    for thing in VOCABULARY["thing"]:
        for number in ("", "two ", "three "):
            for place in VOCABULARY["relation"]:
                for opening in range(OPENINGS):
                    said = caption(opening, place, f"{number}red {thing}", f"{number}large {thing}")
                    for language in LANGUAGES:
                        assert all(surfaces(said, language)) and "=" not in realise(said, language)
    # different concepts never read alike: else a wrong sense could be right
    for language in LANGUAGES:
        for kind in ("thing", "size", "colour", "pattern"):
            phrases = [concept if kind == "thing" else f"{concept} star" for concept in VOCABULARY[kind]]
            texts = {realise(caption(0, "middle", phrase), language) for phrase in phrases}
            assert len(texts) == len(VOCABULARY[kind])
    assert set(COLOURS) == set(VOCABULARY["colour"])


def captions(count: int, seed: int = 0) -> list[Caption]:
    draw = random.Random(seed)
    return [said for _ in range(count) for said in describe(draw_up_scene(draw), draw)]


@pytest.mark.parametrize(
    "noise", [0.2, 1.0, *({kind: 0.4} for kind in NOISE_KINDS), {"dropped": 0.1, "untranslated": 0.3}]
)
def test_noise_has_its_rate(noise):
    said = captions(300)
    made = [mistranslate(clean, "en", noise_rates(noise), str(i)) for i, clean in enumerate(said)]
    weights = [len(clean.words) for clean in said]
    shares = [noise_share(noisy, clean, "cs") for noisy, clean in zip(made, said)]
    total = sum(noise_rates(noise).values())
    assert sum(share * weight for share, weight in zip(shares, weights)) / sum(weights) == pytest.approx(
        total, abs=0.04
    )
    pairs = [pair for noisy, clean in zip(made, said) for pair in zip(noisy.words, clean.words)]
    found = {
        "wrong_sense": mean(word.concept != clean.concept for word, clean in pairs),
        "untranslated": mean(word.text is not None for word, _ in pairs),
        "dropped": mean(word.is_dropped for word, _ in pairs),
        "wrong_order": mean(word.moved_to is not None for word, _ in pairs),
    }
    assert found == pytest.approx(noise_rates(noise), abs=0.04)
    assert all(len(realise(noisy, language)) > 1 for noisy in made for language in LANGUAGES)  # never nothing at all


def test_what_each_kind_of_noise_does():
    clean = caption(1, "left", "large red star", "blue fish")

    def at_once(**rates):
        return [realise(mistranslate(clean, "en", rates, "k"), language) for language in ("cs", "de")]

    assert at_once(wrong_sense=1.0) == [
        "Obrázek ukazuje malé tyrkysové kolo pod červeným stromem.",
        "Das Bild zeigt ein kleines türkisfarbenes Rad unter einem roten Baum.",
    ]
    assert at_once(untranslated=1.0)[0] == "Obrázek ukazuje large red star to the left of blue fish."
    assert at_once(untranslated=1.0)[1] == "Das Bild zeigt einen large red star to the left of einem blue fish."
    assert at_once(dropped=1.0)[0] == "Obrázek ukazuje velkou."  # something is left
    moved = at_once(wrong_order=1.0)[0]
    words = "obrázek ukazuje velkou červenou hvězdu vlevo od modré ryby".split()
    assert sorted(moved.lower().strip(".").split()) == sorted(words) and moved.lower().strip(".").split() != words


def test_noise_share_counts_what_is_wrong_and_nothing_else():
    clean = caption(1, "left", "red star", "orange fish")
    words = list(clean.words)
    assert noise_share(clean, clean, "cs") == 0
    words[1] = Word("thing", "heart")  # "červené srdce": the adjective agrees, it is not wrong
    assert noise_share(clean.replace_words(words), clean, "cs") == 1 / 5
    words[4] = Word("relation", "left", is_dropped=True)
    assert noise_share(clean.replace_words(words), clean, "cs") == 2 / 5
    foreign = mistranslate(clean, "en", {"untranslated": 1.0}, "k")
    assert noise_share(foreign, clean, "cs") == 1
    assert noise_share(foreign, clean, "fr") == 4 / 5  # "orange" is French too


def test_noise_grows_with_its_rate():
    for i, clean in enumerate(captions(60)):
        wrong = set()
        for rate in (0, 0.25, 0.5, 0.75):
            noisy = mistranslate(clean, "en", noise_rates(rate), str(i))
            now = {k for k, (word, right) in enumerate(zip(noisy.words, clean.words)) if word != right}
            assert wrong <= now
            wrong = now


def test_back_translation_keeps_the_errors():
    clean = caption(0, "left", "large red star", "blue fish")
    words = list(clean.words)
    words[1], words[2] = Word("colour", "red", text="red"), Word("thing", "star", is_dropped=True)
    words[3] = Word("colour", "green")
    back = mistranslate(clean.replace_words(words), "cs", noise_rates(0), "k")
    assert realise(back, "en") == "A large red to the left of a green fish."
    back = mistranslate(clean.replace_words(words), "cs", {"untranslated": 1.0}, "k")
    assert realise(back, "en") == "A velká red vlevo od a zelené ryby."


@pytest.mark.parametrize(
    "noise, message",
    [
        (1.1, "noise must be from 0 to 1.*got 1.1"),
        (-0.1, "noise must be"),
        (float("nan"), "noise must be"),
        ({"dropped": 0.7, "untranslated": 0.5}, "sum to at most 1"),
        ({"typos": 0.1}, "unknown kinds typos; known: wrong_sense, untranslated, dropped, wrong_order"),
    ],
)
def test_bad_noise_is_named(noise, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Scenes(config_name="cs", noise=noise, cache_dir=tmp_path)


def test_pictures_show_what_is_said():
    spots = {"top left": (38, 38), "bottom right": (90, 90), "middle": (64, 64)}
    for spot, at in spots.items():
        for colour, rgb in COLOURS.items():
            scene = Scene((Thing("square", colour, size="large"),), spot)
            pixel = draw_scene(scene.things, scene.place, random.Random(1)).getpixel(at)
            assert max(abs(a - b) for a, b in zip(pixel, rgb)) <= 26
    red, blue = Thing("circle", "red"), Thing("circle", "blue")
    for place, axis, sign in (("left", 0, 1), ("right", 0, -1), ("above", 1, 1), ("below", 1, -1)):
        image = draw_scene((red, blue), place, random.Random(2))
        assert sign * (centre_of(image, "red")[axis] - centre_of(image, "blue")[axis]) < -30, place

    def area(thing: Thing) -> int:
        return len(pixels_of(draw_scene((thing,), "middle", random.Random(3)), "red"))

    small, plain, large = (area(Thing("heart", "red", size=size)) for size in ("small", None, "large"))
    assert small * 1.5 < plain < large / 1.5
    for pattern in VOCABULARY["pattern"]:
        assert area(Thing("heart", "red", pattern=pattern)) < 0.9 * plain
    shapes = {
        draw_scene((Thing(shape, "red"),), "middle", random.Random(4)).tobytes() for shape in VOCABULARY["thing"]
    }
    assert len(shapes) == len(VOCABULARY["thing"])


def pixels_of(image, colour: str) -> np.ndarray:
    """`(count, 2)`, x and y of the pixels that have about a colour."""
    is_near = np.abs(np.asarray(image).astype(int) - COLOURS[colour]).max(axis=-1) <= 30
    return np.argwhere(is_near)[:, ::-1]


def centre_of(image, colour: str) -> np.ndarray:
    return pixels_of(image, colour).mean(axis=0)


def test_captions_are_true_of_the_scene():
    draw = random.Random(5)
    opposites = {"left": "right", "above": "below"}
    opposites |= {b: a for a, b in opposites.items()}
    for _ in range(200):
        scene = draw_up_scene(draw)
        by_shape = {thing.shape: (i, thing) for i, thing in enumerate(scene.things)}
        for said in describe(scene, draw):
            order = []
            for words in said.phrases:
                of_kind = {word.kind: word.concept for word in words}
                i, thing = by_shape[of_kind["thing"]]
                order.append(i)
                assert {"two": 2, "three": 3}.get(of_kind.get("number"), 1) == thing.number
                assert all(
                    of_kind[kind] == getattr(thing, kind) for kind in of_kind.keys() & {"size", "colour", "pattern"}
                )
            place = said.place.concept
            if len(scene.things) == 1:
                assert place == scene.place
            elif len(scene.things) == 2:
                assert place == (scene.place if order == [0, 1] else opposites[scene.place])
            elif len(order) == 2:
                forward = {"row": "left", "column": "above"}[scene.place]
                assert abs(order[0] - order[1]) == 1 and place == (
                    forward if order[0] < order[1] else opposites[forward]
                )
            else:
                assert order == ([1, 0, 2] if place == "between" else [0, 1, 2])
                assert place in ("between", scene.place)


def build(tmp_path, config_name="cs", **options):
    builder = Scenes(config_name=config_name, cache_dir=tmp_path, **(SMALL | options))
    builder.download_and_prepare()
    return builder.as_dataset()


def test_rows(tmp_path, capsys):
    dataset = build(tmp_path, noise=0.5)
    assert "(synthetic), seed 0, scenes-noise-0.50: train 24 (" in capsys.readouterr().out
    human = build(tmp_path, noise=0.5, target="human")
    clean, other = build(tmp_path), build(tmp_path, seed=1)
    # an id never stands for another picture: caches of features are kept by it
    assert not set(clean["train"]["image_id"]) & set(other["train"]["image_id"])
    for split, count in zip(("train", "validation", "test"), SMALL.values()):
        rows, bound, right = dataset[split], human[split], clean[split]
        assert len(set(rows["image_id"])) == count < len(rows) == len(set(rows["caption_id"]))
        assert rows[0]["image"].size == (128, 128)
        assert rows["caption_id"] == bound["caption_id"] == right["caption_id"]
        for row, upper, exact in zip(rows, bound, right):
            assert exact["translation_noise"] == 0
            assert row["image"].tobytes() == exact["image"].tobytes()
            if split == "train":
                assert row["target_origin"] == "scenes-noise-0.50" and upper["target_origin"] == "grammar"
                assert exact["target_origin"] == "scenes-noise-0.00" and row["reference_source_caption"] is None
                assert row["source_caption"] == exact["source_caption"] == exact["back_translation"]
                assert (row["translation_noise"] == 0) == (row["target_caption"] == exact["target_caption"])
                assert upper["target_caption"] == exact["target_caption"] and upper["translation_noise"] == 0
                assert row["back_translation"] and upper["back_translation"]
            else:
                assert row["target_origin"] == "grammar" and row["back_translation"] is None
                assert row["target_caption"] == exact["target_caption"]
                assert row["reference_source_caption"] == exact["source_caption"]
                assert (row["translation_noise"] == 0) == (row["source_caption"] == exact["source_caption"])
    assert 0.3 < mean(dataset["train"]["translation_noise"]) < 0.7
    assert query_origin(dataset["test"]) == "written by a grammar, not by people (synthetic)"


def test_splits_share_no_scene():
    sizes = {"train": 600, "validation": 100, "test": 200}
    drawn = list(Scenes(config_name="cs", seed=3)._scenes(sizes))
    splits = {}
    for split, scene, captions in drawn:
        said = [realise(replace(caption, opening=0), "en") for caption in captions]
        for what in (frozenset((thing.shape, thing.colour) for thing in scene.things), *said):
            assert splits.setdefault(what, split) == split, what
    assert {split: sum(split == other for other, *_ in drawn) for split in sizes} == sizes
    assert len({scene for _, scene, _ in drawn}) == len(drawn)
    assert list(Scenes(config_name="de", seed=3)._scenes(sizes)) == drawn
    assert list(Scenes(config_name="cs", seed=4)._scenes(sizes)) != drawn


def test_the_same_in_every_process():
    builder = Scenes(config_name="cs", noise=0.75)
    _, scene, captions = next(builder._scenes({"train": 1, "validation": 0, "test": 0}))
    row = next(builder._scene_rows("scenes/0", scene, captions, "train"))
    columns = ("source_caption", "target_caption", "back_translation")
    assert [row[name] for name in columns] == [
        "There is a brown bird below a blue key.",
        "Je tu hnědý červeným pod key pták.",
        "There is a pod hnědý a červeným pták.",
    ]
    assert row["translation_noise"] == pytest.approx(4 / 5)


def test_the_noise_can_be_named_with_the_language(tmp_path, monkeypatch):
    named = Scenes(config_name="0.5-de", cache_dir=tmp_path)
    assert (
        named.config.name == "de"
        and named.cache_dir == Scenes(config_name="de", noise=0.5, cache_dir=tmp_path).cache_dir
    )
    assert named._origin == "scenes-noise-0.50"
    by_kind = Scenes(config_name="fr", noise={"dropped": 0.1, "wrong_order": 0.25}, cache_dir=tmp_path)
    assert by_kind._origin == "scenes-noise-dropped-0.10-wrong_order-0.25"
    with pytest.raises(ValueError, match="names the noise: leave noise=0.1 out"):
        Scenes(config_name="0.5-cs", noise=0.1, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="'half' is no rate of noise: write such as 0.5-cs"):
        Scenes(config_name="half-cs", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'gl' not found. Available: \['cs', 'de', 'fr'\]"):
        Scenes(config_name="gl", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="num_train must be at least 1"):
        build(tmp_path, num_train=0)
    monkeypatch.setattr(Scenes.BUILDER_CONFIG_CLASS, "num_train", 12)
    for name, size in (("num_train", 12), ("num_validation", 3), ("num_test", 3)):
        for config in Scenes.BUILDER_CONFIGS:
            monkeypatch.setattr(config, name, size)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset, engine = load_translated_dataset("scenes:0.5", "en", "de", 0, "translated", "none", None)
    assert engine.name == "scenes-noise-0.50" and not any(
        rows.data.column(column).null_count
        for split, rows in dataset.items()
        for column in ("target_caption", "source_caption", *(["back_translation"] if split == "train" else []))
    )

"""
Synthetic scenes: pictures of a few coloured shapes, captions by a grammar, and a simulated translator whose noise is
a dial. An instrument to measure methods with, no data of the world.

    from datasets_scripts.scenes import Scenes
    builder = Scenes(config_name="cs", noise=0.5)
    builder.download_and_prepare()
    dataset = builder.as_dataset()
"""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from .reading.columns import CaptionBuilder, CaptionedPictureConfig, caption_columns, png_bytes
from .reading.scenes_drawing import draw_scene
from .reading.scenes_grammar import (
    LANGUAGES,
    OPENINGS,
    VOCABULARY,
    Caption,
    Word,
    mistranslate,
    noise_rates,
    noise_share,
    realise,
)
from .reading.splits import split_of


_SOURCES = ("scenes.py", "reading/scenes_drawing.py", "reading/scenes_grammar.py")
_THINGS_WEIGHTS = (0.2, 0.45, 0.35)  # of one, two, three things in a picture
_SAID = {"size": 0.5, "colour": 0.75, "pattern": 0.6}  # how often a caption says them
_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """Some shapes of one kind. `number` 1 to 3; `size` None is the middle one; `pattern` None is plain."""

    shape: str
    colour: str
    number: int = 1
    size: str | None = None
    pattern: str | None = None

    def words(self, draw: random.Random) -> tuple[Word, ...]:
        """Return what a caption says of it: not everything."""
        words = [Word("number", ("two", "three")[self.number - 2])] if self.number > 1 else []
        for kind, share in _SAID.items():
            if draw.random() < share and getattr(self, kind) is not None:
                words.append(Word(kind, getattr(self, kind)))
        return (*words, Word("thing", self.shape))


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `place`: a spot, a relation of the first to the second, `row` or `column`."""

    things: tuple[Thing, ...]
    place: str

    @property
    def group(self) -> str:
        """Scenes of the same coloured shapes are alike: they belong on one side of a split."""
        return "scene: " + ", ".join(sorted({f"{thing.colour} {thing.shape}" for thing in self.things}))


def draw_up_scene(draw: random.Random) -> Scene:
    count = draw.choices((1, 2, 3), _THINGS_WEIGHTS)[0]
    places = (VOCABULARY["spot"], VOCABULARY["relation"], ("row", "column"))[count - 1]
    things = []
    for shape in draw.sample(VOCABULARY["thing"], count):
        number = draw.choices((1, 2, 3), (0.8, 0.12, 0.08))[0] if count < 3 else 1
        size = draw.choice((*VOCABULARY["size"], None))
        pattern = draw.choice(VOCABULARY["pattern"]) if draw.random() < 0.35 else None
        things.append(Thing(shape, draw.choice(VOCABULARY["colour"]), number, size, pattern))
    return Scene(tuple(things), draw.choice(places))


def describe(scene: Scene, draw: random.Random) -> list[Caption]:
    """Write one or two captions of a scene, which start differently; the second sees it from the other side. None says
    all: as people's, they leave out a size, a colour, a pattern, and often one of three things."""
    captions = []
    for opening in draw.sample(range(OPENINGS), draw.choice((1, 2))):
        things, place = scene.things, scene.place
        if len(things) == 3 and draw.random() < 0.5:
            things, place = draw.choice((things[:2], things[1:])), {"row": "left", "column": "above"}[place]
        if len(things) == 2 and draw.random() < 0.5:
            things, place = things[::-1], _OPPOSITES[place]
        if len(things) == 3 and draw.random() < 0.5:
            things, place = (things[1], things[0], things[2]), "between"
        kind = ("spot", "relation", "line")[len(things) - 1]
        captions.append(Caption(opening, tuple(thing.words(draw) for thing in things), Word(kind, place)))
    return captions


@dataclass
class ScenesConfig(CaptionedPictureConfig):
    """
    BuilderConfig of Scenes; its name is the target language.

    Args:
        seed (`int`, defaults to 0): of the scenes, their pictures, captions and split, and of the noise. Scenes and
            clean captions do not depend on the noise, and what errs at a low rate errs at a higher one too.
        target (`str`, defaults to `"translated"`): `"human"` for training captions without noise, the upper bound;
            what is translated back stays noisy.
        noise (`float` or `dict[str, float]`, defaults to 0.0): the share of content words that the simulated
            translator gets wrong, in equal parts by `wrong_sense`, `untranslated`, `dropped` and `wrong_order`; or a
            rate for each, see [`mistranslate`].
        num_train, num_validation, num_test (`int`): pictures.
    """

    noise: float | dict[str, float] = 0.0
    num_train: int = 1500
    num_validation: int = 250
    num_test: int = 500


class Scenes(CaptionBuilder):
    """
    Synthetic: pictures of one to three coloured shapes, drawn by this package, with captions in English and a target
    language by its own grammar. A simulated translator, at a chosen rate of noise, makes the target captions and
    back-translations of training, and the `source_caption` of validation and test, whose target captions are the
    grammar's. `translation_noise` is the true noise of what it made in a row (`target_caption` in training, elsewhere
    `source_caption`): the share of content words that are wrong, left in the other language, missing or moved, 0 to 1.

    `config_name="0.5-cs"` is short for `config_name="cs", noise=0.5`; for commands, `--data scenes:0.5`.
    """

    BUILDER_CONFIG_CLASS = ScenesConfig
    BUILDER_CONFIGS = [ScenesConfig(name=language, version="1.0.0") for language in LANGUAGES[1:]]
    EXPECTED = {
        language: {"train": (1500, None), "validation": (250, None), "test": (500, None)} for language in LANGUAGES[1:]
    }
    LICENSE_ID = "apache-2.0"
    LICENSE = "Apache-2.0, as this package, which draws and writes it all."

    def __init__(self, *args, config_name: str | None = None, hash: str | None = None, **kwargs):
        amount, dash, language = (config_name or "").rpartition("-")
        if dash:
            if kwargs.get("noise") is not None:
                raise ValueError(f"config_name={config_name!r} names the noise: leave noise={kwargs['noise']!r} out")
            try:
                config_name, kwargs["noise"] = language, float(amount)
            except ValueError:
                raise ValueError(f"{amount!r} is no rate of noise: write such as 0.5-{language}") from None
        # datasets caches by options; here the code is the data
        code = hashlib.sha256(b"".join(Path(__file__).parent.joinpath(name).read_bytes() for name in _SOURCES))
        super().__init__(*args, config_name=config_name, hash=hash or code.hexdigest()[:16], **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        noise_rates(self.config.noise)  # an error now, not when it is built
        info = super()._info()
        info.features["translation_noise"] = datasets.Value("float32")
        return info

    @property
    def _origin(self) -> str:
        """The simulated translator's name, with its noise."""
        noise = self.config.noise
        if not isinstance(noise, Mapping):
            return f"scenes-noise-{noise:.2f}"
        rates = [f"{kind}-{rate:.2f}" for kind, rate in noise_rates(noise).items() if rate]
        return "scenes-noise-" + ("-".join(rates) or "0.00")

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        sizes = {split: getattr(self.config, f"num_{split}") for split in self.SPLITS}
        if min(sizes.values()) < 0 or not sizes["train"]:
            raise ValueError(f"num_train must be at least 1, num_validation and num_test at least 0, got {sizes}")
        rows = {split: [] for split in self.SPLITS}
        scenes = tqdm(
            self._scenes(sizes), total=sum(sizes.values()), desc=f"{self.name} {self.config.name}", disable=None
        )
        for split, scene, captions in scenes:
            # what an id stands for never changes: caches of features know pictures by it
            digest = hashlib.blake2b(f"{self.config.seed}\n{scene}".encode(), digest_size=8).hexdigest()
            rows[split] += self._scene_rows(f"scenes/{digest}", scene, captions, split)
        noise = [row["translation_noise"] for of_split in rows.values() for row in of_split]
        counts = ", ".join(f"{split} {sizes[split]} ({len(of_split)} captions)" for split, of_split in rows.items())
        print(
            f"{self.name} {self.config.name} (synthetic), seed {self.config.seed}, {self._origin}: {counts}; "
            f"{sum(noise) / len(noise):.3f} of the content words mistranslated",
            flush=True,
        )
        self._rows = rows
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in rows if rows[name]]

    def _scenes(self, sizes: dict[str, int]) -> Iterator[tuple[str, Scene, list[Caption]]]:
        """Yield different scenes with their splits and captions, until each split has as many as it should. What is
        said in one split is not said in another, even of other scenes."""
        seed, draw = self.config.seed, random.Random(f"{self.config.seed}/scenes")
        fractions = {split: size / sum(sizes.values()) for split, size in sizes.items() if split != "train"}
        missing, seen, said_in = dict(sizes), set(), {}
        while any(missing.values()):
            scene = draw_up_scene(draw)
            captions = describe(scene, draw)
            split = split_of(scene.group, seed, fractions)
            said = [(caption.phrases, caption.place) for caption in captions]
            if missing[split] and scene not in seen and all(said_in.get(what, split) == split for what in said):
                seen.add(scene)
                said_in.update(dict.fromkeys(said, split))
                missing[split] -= 1
                yield split, scene, captions

    def _scene_rows(self, image_id: str, scene: Scene, captions: list[Caption], split: str) -> Iterator[dict]:
        language, seed, rates = self.config.name, self.config.seed, noise_rates(self.config.noise)
        picture = draw_scene(scene.things, scene.place, random.Random(f"{seed}/{image_id}"))
        image = {"path": None, "bytes": png_bytes(picture)}
        for k, clean in enumerate(captions):
            caption_id = f"{image_id}#{k}"
            is_noisy = split == "train" and self.config.target == "translated"
            there = mistranslate(clean, "en", rates, f"{seed}/{caption_id}/there") if is_noisy else clean
            back = mistranslate(there, language, rates, f"{seed}/{caption_id}/back")
            row = caption_columns(
                image_id,
                realise(clean, "en"),
                realise(there, language),
                language,
                split,
                "human",
                caption_id=caption_id,
            )
            row["target_origin"] = self._origin if is_noisy else "grammar"
            if split == "train":
                row["back_translation"] = realise(back, "en")
                noise = noise_share(there, clean, language)
            else:
                row["source_caption"] = realise(back, "en")
                noise = noise_share(back, clean, "en")
            yield {**row, "image": image, "translation_noise": noise}

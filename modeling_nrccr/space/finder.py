"""What the Space does, without its page: search pictures, clips and a visitor's own, and explain what was found."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor

from datasets_scripts.reading.debian import FetchError

from ..media import IMAGE_SUFFIXES, load_image
from ..modeling_nrccr import NrccrModel
from ..processor_inputs import text_problem
from ..retrieval.encoding import encode_images, encode_texts
from ..retrieval.metrics import fuse_query_embeds
from ..retrieval.retriever import Hit, NrccrRetriever
from ..translation.base import TranslationError
from ..translation.engines import load_translator, prepare_translator
from .cards import data_uri
from .gallery import Gallery


logger = logging.getLogger(__name__)

MAX_QUERY = 200  # characters
MAX_OWN = 24  # pictures a visitor
MAX_BYTES = 8 * 2**20  # of one upload
MAX_PIXELS = 50_000_000  # phones' pictures; more is refused before it is decoded


@dataclass
class Query:
    """A sentence, a picture, or both, as an embedding of shape `(projection_dim,)`."""

    text: str
    language: str
    picture: str | None  # as it is shown
    embed: torch.Tensor


@dataclass
class OwnPictures:
    """A visitor's pictures: in memory, nowhere else. By id their names, and what is shown of them."""

    index: NrccrRetriever
    pictures: dict[str, tuple[str, str]] = field(default_factory=dict)


class Finder:
    """
    Holds model, indexes and pictures of a folder that `build_space` wrote.

    Args:
        folder: with `model`, `index` and `clips`.
        languages: codes, English among them; the first one is what English is translated into.
        data_dir: as of [`Gallery`].

    Raises:
        ValueError: A part of the folder is missing, or was made by another model.
    """

    def __init__(self, folder: str | Path, languages: Sequence[str], data_dir: str | Path | None = None):
        folder = Path(folder)
        if not (folder / "model/config.json").exists():
            raise ValueError(f"{folder} has no model: write the Space with `nrccr space`")
        self.languages = list(languages)
        self.model = NrccrModel.from_pretrained(folder / "model").eval()
        self.processor = AutoProcessor.from_pretrained(folder / "model")
        self.gallery = Gallery(folder / "clips", data_dir)
        self.pictures = self.load_index(folder / "index/pictures")
        self.clips, self.frames = None, None
        if (folder / "index/clips").is_dir():
            self.clips, self.frames = (self.load_index(folder / "index" / name) for name in ("clips", "frames"))
        self.translators = {}

    def load_index(self, folder: Path) -> NrccrRetriever:
        return NrccrRetriever.load(folder, self.model, self.processor)

    def counterpart(self, language: str) -> str:
        """Return the language that a query is translated into: English, or from English the first other one."""
        return next(code for code in self.languages if code != "en") if language == "en" else "en"

    # ------------------------------------------------------------------------------------------------------ search

    def embed_texts(self, texts: Sequence[str], language: str) -> torch.Tensor:
        """Embed texts by the language's own adapter where the model has one, of shape `(len(texts),
        projection_dim)`."""
        adapter = language if language in self.model.language_adapters else None
        return encode_texts(self.model, texts, self.processor, languages=adapter)

    def query(self, text: str, language: str, picture: Image.Image | None = None) -> Query:
        """Return the query of a sentence, a picture, or both alike. Raises ValueError for neither, and for a text that
        is too long, or that no text encoder should read."""
        text = " ".join(text.split())
        if len(text) > MAX_QUERY:
            raise ValueError(f"The query has {len(text)} characters; {MAX_QUERY} are enough for a picture.")
        if not text and picture is None:
            raise ValueError("Type what you would like to see, or add a picture.")
        if text and (problem := text_problem(text)):
            raise ValueError(f"The query {problem}.")
        parts = [self.embed_texts([text], language)[0]] if text else []
        shown = None
        if picture is not None:
            parts.append(encode_images(self.model, [picture], self.processor)[0])
            shown = data_uri(picture)
        return Query(text, language, shown, parts[0] if len(parts) == 1 else fuse_query_embeds(*parts, 0.5))

    def search(self, embed: torch.Tensor, index: NrccrRetriever, k: int, unseen: bool = False) -> list[Hit]:
        """Find the best `k`; with `unseen`, of what was no part of training."""
        return index.search(embed, k=k, filter={"seen": False} if unseen else None)

    def best_frames(self, embed: torch.Tensor, clips: Sequence[Hit]) -> dict[str, str]:
        """Return, by clip, the id of the frame that is most like the query."""
        best, wanted = {}, {hit.id for hit in clips}
        for hit in self.frames.search(embed, k=len(self.frames)):  # best first
            clip = hit.id.partition("#")[0]
            if clip in wanted:
                best.setdefault(clip, hit.id)
        return best

    # ----------------------------------------------------------------------------------------------------- explain

    def word_weights(self, query: Query, index: NrccrRetriever, hits: Sequence[Hit]) -> list[tuple[str, list[float]]]:
        """Return each word and by how much the similarity to each hit falls when that word is left out of the
        query."""
        words = query.text.split()
        if len(words) < 2:
            return [(word, [hit.score for hit in hits]) for word in words]
        rest = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
        weights = []
        for word, embed in zip(words, self.embed_texts(rest, query.language)):
            scores = {hit.id: hit.score for hit in index.search(embed, k=len(index))}
            weights.append((word, [hit.score - scores[hit.id] for hit in hits]))
        return weights

    def translate(self, text: str, source: str) -> tuple[str, str] | None:
        """Return a machine translation and the engine's name; None where there is no engine for the pair."""
        target = self.counterpart(source)
        if (source, target) not in self.translators:
            try:
                spec, options = prepare_translator("apertium", source, target)
                translator = load_translator(spec, **options)
                translator.check_pair(source, target)
            except (FetchError, TranslationError, ValueError) as error:
                logger.warning("no translation from %s to %s: %s", source, target, error)
                translator = None
            self.translators[source, target] = translator
        translator = self.translators[source, target]
        if translator is None:
            return None
        try:
            return translator.translate([text], source, target, show_progress=False)[0], translator.name
        except TranslationError as error:
            logger.warning("%s", error)
            return None

    # ------------------------------------------------------------------------------------------------ own pictures

    def add_own(self, own: OwnPictures | None, files: Sequence[str | Path]) -> tuple[OwnPictures | None, list[str]]:
        """Add `files` to a visitor's pictures, as far as they are sound and there is room. Return these, and what was
        refused."""
        own = own or OwnPictures(NrccrRetriever(self.model, self.processor))
        refused = []
        for file in map(Path, files):
            try:
                if len(own.pictures) >= MAX_OWN:
                    raise ValueError(f"there is room for {MAX_OWN} pictures")
                picture = read_upload(file)
            except ValueError as error:
                refused.append(f"{file.name}: {error}")
                continue
            id = f"own/{len(own.pictures)}"
            own.index.add([picture], ids=[id], metadata=[{"seen": False}])
            own.pictures[id] = file.stem[:60], data_uri(picture)
        return (own if own.pictures else None), refused


def read_upload(file: str | Path) -> Image.Image:
    """Read a visitor's picture and make it small. Raises ValueError for a large file, or one that is no sound
    picture."""
    file = Path(file)
    if file.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"no picture of a known kind ({', '.join(IMAGE_SUFFIXES)})")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MB")
    try:
        picture = load_image(file, MAX_PIXELS)
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError("cannot be read as a picture") from error
    picture.thumbnail((512, 512))
    return picture

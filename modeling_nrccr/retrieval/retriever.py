"""Search a gallery of pictures and videos with a sentence in any language, or with a picture.

```python
retriever = NrccrRetriever(model, processor)
retriever.add("my_pictures")
for hit in retriever.search("un gato durmindo", k=5):
    print(hit.score, hit.id)
retriever.save("my_index")
```
"""

import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils import logging

from ..files import is_utf8
from ..languages import in_eval_mode, same_model
from ..modeling_nrccr import NrccrModel
from ..processor_inputs import text_problem
from .encoding import ACTIVE, Language, ahead, encode, encode_images, encode_texts
from .gallery_media import NOUNS, MediaReader, Skipped, find_media
from .index import GalleryIndex, open_index, split_address
from .metrics import fuse_query_embeds


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

BLOCK = 1024  # embeddings that are stored at a time


@dataclass(frozen=True)
class Hit:
    """One result of a search: the picture's `id`, its cosine similarity to the query, and what was stored with it."""

    id: str | int
    score: float
    metadata: dict[str, Any]


class Encoded(NamedTuple):
    """Rows that could be read, their embeddings of shape `(len(rows), projection_dim)`, what is known of each (of a
    video `frame` and `num_frames`), and what could not be read."""

    rows: list[int]
    embeds: torch.Tensor
    metadata: list[dict[str, Any]]
    skipped: list[Skipped]


class NrccrRetriever:
    """
    Encodes a gallery of pictures or videos and searches it.

    Args:
        model: [`NrccrModel`] with a vision tower (or of visual features), on the device that shall encode.
        processor: its [`NrccrProcessor`].
        index: where the gallery is kept. None: in memory, by faiss. A folder: the same, read from there if it has been
            saved, and written by [`save`]. `NAME.db` (Milvus Lite) or `http://...` (a Milvus server): stored there at
            once. Or what [`open_index`] opened.
        options: of the engine, [`FaissIndex`] or [`MilvusIndex`], such as `collection`.

    Raises:
        ValueError: if the index is broken, or was made by another model, picture size or width.
        ConnectionError: if the server does not answer, here and in every method.
        ImportError: if faiss or pymilvus is missing.
    """

    def __init__(
        self, model: NrccrModel, processor: Callable, index: str | Path | GalleryIndex | None = None, **options
    ):
        self.model = model
        self.processor = processor
        is_address = index is None or isinstance(index, (str, Path))
        self.index = open_index(index, model.config.projection_dim, **options) if is_address else index
        if index is not None:
            self._check_model(self.index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> list[str | int]:
        """Ids of the whole gallery, in no particular order."""
        return [id for ids, _, _ in self.index.rows() for id in ids]

    def add(
        self,
        images: "str | Path | Sequence[str | Path | Image.Image] | datasets.Dataset | None" = None,
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        strict: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
        videos: Sequence | None = None,
        read_frames: Callable[[Any], Sequence[Image.Image]] | None = None,
        skip_existing: bool = False,
    ) -> list[Skipped]:
        """
        Encodes pictures or videos and adds them to the gallery. Two threads read and decode the next batches; about a
        thousand are stored at a time, so that little is lost if it is interrupted: call it again with
        `skip_existing`.

        Args:
            images: a folder (searched with its sub-folders), a sequence of files and `PIL.Image`s, or a
                `datasets.Dataset` of `image_id` and one of `image`, `video` and `visual_feats` (rows of one picture
                are taken once).
            ids: one for each, unique in the gallery. Default: the path below the folder, the file as it was given,
                the `image_id`, or a running number.
            metadata: one JSON-able dict for each. Default: `{"path": ...}` for files, the texts and numbers of a data
                set's row. A video also gets `num_frames` and `frame`, the number of the frame that is most like it.
            strict: raise for what cannot be read, rather than skip it.
            videos: instead of `images`: lists of frames, or whatever `read_frames` takes.
            read_frames: the frames of a video, such as `datasets_scripts.reading.videos.read_frames`; in threads.
            skip_existing: leave out ids that the gallery has, rather than raise.

        Returns:
            What was skipped because it cannot be read, each with the reason.

        Raises:
            ValueError: for a folder without pictures, a repeated id, lists of unequal length, what cannot be read
                under `strict`, or if none can be read.
        """
        kind, sources, ids, metadata, skipped = find_media(images, videos, ids, metadata, strict, len(self))
        rows = self._new_rows(ids, metadata, skip_existing)

        stored, count, block = 0, len(rows) + len(skipped), max(1, BLOCK // batch_size) * batch_size
        with tqdm(total=len(rows), desc=f"{NOUNS[kind]}s", unit=NOUNS[kind], disable=not show_progress) as progress:
            for start in range(0, len(rows), block):
                chosen = ((row, sources[row]) for row in rows[start : start + block])
                encoded = self.encode_media(kind, chosen, ids, read_frames, strict, batch_size, progress.update)
                if encoded.rows:
                    entries = [metadata[row] | extra for row, extra in zip(encoded.rows, encoded.metadata)]
                    self._store(encoded.embeds, [ids[row] for row in encoded.rows], entries, encoded.rows)
                skipped += encoded.skipped
                stored += len(encoded.rows)
        if skipped:
            logger.warning(
                f"Skipped {len(skipped)} of {count} {NOUNS[kind]}s that cannot be read: "
                + "; ".join(f"{id} ({reason})" for id, reason in skipped[:5])
                + ("; ..." if len(skipped) > 5 else "")
            )
        if not stored and len(rows) == len(ids):  # else the gallery has the others
            raise ValueError(
                f"None of {count} {NOUNS[kind]}s can be read"
                + (f"; the first, {skipped[0].id!r}: {skipped[0].reason}" if skipped else "")
                + "."
            )
        return skipped

    def encode_media(
        self,
        kind: str,
        media: Iterable[tuple[int, Any]],
        ids: Sequence[str | int],
        read_frames: Callable[[Any], Sequence[Image.Image]] | None = None,
        strict: bool = False,
        batch_size: int = 32,
        on_progress: Callable[[int], Any] = lambda count: None,
    ) -> Encoded:
        """
        Encode what [`add`] stores, without storing it; threads read and decode what comes next. Whatever is raised for
        one of them skips that one.

        Args:
            kind: "images", "videos" or "visual_feats".
            media: row and picture, video or features.
            ids: by row.
            on_progress: called with the number of media of each batch.

        Raises:
            ValueError: for what cannot be read, under `strict`.
        """
        embeds, extra, kept, skipped, media = [], [], [], [], iter(media)

        reader = MediaReader(kind, ids, self.processor, read_frames, strict)
        chunks = iter(lambda: list(itertools.islice(media, batch_size)), [])
        for parts, refused, count in ahead(chunks, reader.prepare, self.model.device):
            skipped += refused
            for rows, inputs in parts:
                batch_embeds, batch_extra = self._encode(kind, inputs)
                finite = batch_embeds.isfinite().all(dim=1)
                for row, entry, is_finite in zip(rows, batch_extra or [{}] * len(rows), finite.tolist()):
                    if is_finite:
                        kept.append(row)
                        extra.append(entry)
                    else:
                        error = ValueError("its embedding is not finite; check the model's weights")
                        skipped.append(reader.refuse(row, error))
                embeds.append(batch_embeds[finite])
            on_progress(count)
        return Encoded(kept, torch.cat(embeds) if embeds else torch.empty(0, self.index.dim), extra, skipped)

    def add_embeds(
        self,
        embeds: torch.Tensor,
        ids: Sequence[str | int],
        metadata: Sequence[dict[str, Any]] | None = None,
        skip_existing: bool = False,
    ):
        """
        Adds what this model has encoded before, without encoding it again.

        Args:
            embeds: L2-normalised, of shape `(len(ids), projection_dim)`.
            ids, metadata, skip_existing: as in [`add`].

        Raises:
            ValueError: for a wrong shape, a value that is not finite, a repeated id, or lists of unequal length.
        """
        metadata = [{}] * len(ids) if metadata is None else metadata
        if not len(embeds) == len(ids) == len(metadata):
            raise ValueError(
                f"Got {len(embeds)} embeddings, {len(ids)} ids and {len(metadata)} metadata: one each is needed."
            )
        rows = self._new_rows(ids, metadata, skip_existing)
        if len(rows) < len(ids):
            embeds, ids, metadata = embeds[rows], [ids[row] for row in rows], [metadata[row] for row in rows]
        if rows:
            self._store(embeds, ids, metadata, rows)

    def remove(self, ids: Sequence[str | int]) -> int:
        """Removes what the gallery has of `ids`, and returns how many that were. Raises ValueError for a single id."""
        if isinstance(ids, (str, int)):
            raise ValueError(f"remove() takes a list of ids, got {ids!r}.")
        return self.index.remove(list(ids))

    def encode_query(self, query: str | Image.Image, language: Language = ACTIVE) -> torch.Tensor:
        """Return the L2-normalised embedding of a text, read by `language` as in [`search`], or of a picture, of shape
        `(projection_dim,)`. Raises ValueError for a text that no text encoder should read."""
        if isinstance(query, Image.Image):
            return encode_images(self.model, [query], self.processor)[0]
        if problem := text_problem(query):
            raise ValueError(f"The query {problem}, or a PIL.Image")
        return encode_texts(self.model, [query], self.processor, languages=language)[0]

    def search(
        self,
        query: str | Image.Image | torch.Tensor | np.ndarray,
        k: int = 10,
        filter: dict[str, str | int | float | bool] | None = None,
        translation: str | None = None,
        translation_weight: float = 0.5,
        language: Language = ACTIVE,
    ) -> list[Hit]:
        """
        Find the `k` pictures (fewer in a smaller gallery) that are most similar to the query, best first. Nothing of
        the model is switched: threads may ask in different languages.

        Args:
            query: a text, a picture, or an embedding of shape `(projection_dim,)`, which is L2-normalised.
            filter: only what has these values in its metadata, all of them. Some engines take `True` for 1.
            translation: the query in the source language (English), which the model's own text side reads: both are
                asked, by [`fuse_query_embeds`].
            translation_weight: the translation's share, from 0 to 1.
            language: whose adapter reads a text; None: no adapter's, the model's own text side. By default the one
                that is active in the model.

        Raises:
            ValueError: for a blank query, an embedding of another shape or without direction, a value that cannot be
                filtered by, a language that the model has not, or an empty gallery.
        """
        k = _check_k(k)
        for key, value in (filter or {}).items():
            _check_filter(key, value)
        if isinstance(query, (torch.Tensor, np.ndarray)):
            embed = self._check_embed(torch.as_tensor(query))
        else:
            embed = self.encode_query(query, language)
        if translation is not None:
            translated = self.encode_query(translation, None)  # it is in the language that needs no adapter
            embed = fuse_query_embeds(embed, translated, translation_weight)
        found = self.index.search(embed.numpy(force=True), k, filter)
        if not found and not len(self):
            raise ValueError("The gallery is empty: add() pictures before search().")
        return [Hit(*row) for row in found]

    def _check_embed(self, embed: torch.Tensor) -> torch.Tensor:
        """Return a query's embedding, float32 on the CPU and L2-normalised. Raises ValueError for another shape, or
        one without direction."""
        if embed.shape != (self.index.dim,):
            raise ValueError(
                f"The query's embedding has shape {tuple(embed.shape)}, the gallery's are {(self.index.dim,)}."
            )
        embed = embed.detach().float().cpu()
        norm = embed.norm()
        if not (norm > 0 and norm.isfinite()):
            raise ValueError(f"The query's embedding has the norm {norm:g}, so no direction: encode the query again.")
        return embed / norm

    def save(self, target: str | Path | None = None, **options):
        """
        Writes the gallery where it came from, or elsewhere: `save("http://localhost:19530")` copies one from a folder
        to a server, without encoding anything again. Faiss replaces a folder, and a crash on the way leaves what was
        there; a database keeps the rows that it has, but for those of the same ids.

        Args:
            target: a folder, `NAME.db` or a URI.
            options: of the engine of `target`, if that is another.

        Raises:
            ValueError: a gallery that is in memory only, without `target`.
        """
        here = self.index.location
        target = here if target is None else target
        if target is None:
            raise ValueError("This gallery is in memory only: name the folder or the URI to save it to.")
        if self.index.fingerprint is None:
            self.index.fingerprint = self.fingerprint().numpy()
        if str(target) == str(here) and not options:
            self.index.save()
        elif split_address(target)[0] == "faiss" and getattr(self.index, "takes_folder", False):
            self.index.save(target)
        else:
            other = open_index(target, self.index.dim, **options)
            self._check_model(other)
            if self.index.made_by is not None:
                other.made_by = self.index.made_by
            for ids, metadata, embeds in self.index.rows(embeds=True):
                other.upsert(ids, embeds, metadata)
            other.save()

    @classmethod
    def load(cls, index: str | Path, model: NrccrModel, processor: Callable, **options) -> "NrccrRetriever":
        """
        Opens a gallery that is there: what [`save`] wrote, or what [`add`] stored.

        Raises:
            ValueError: if there is no readable index, or if another model (or picture size) made it.
        """
        return cls(model, processor, index, create=False, **options)

    def fingerprint(self, rounded_to: torch.dtype | None = None) -> torch.Tensor:
        """
        Return the embedding of a fixed test picture (of fixed features, where the model has no vision tower), computed
        in float32, of shape `(projection_dim,)`.

        It tells visual towers and picture processors apart, on any device and in any precision; an index stays valid
        when only the text side is replaced, for example to gain a language.
        """
        if getattr(self.model, "visual_tower", True) is None:
            feats = [np.linspace(-1, 1, self.model.config.visual_feat_dim)]
            kind, inputs = "visual_feats", self.processor(visual_feats=feats, return_tensors="pt")
        else:
            shades = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
            kind, inputs = "images", self.processor(images=[Image.merge("RGB", shades)], return_tensors="pt")
        if not isinstance(self.model, NrccrModel):  # exported ones have one precision
            return self._encode(kind, inputs)[0][0]
        with in_eval_mode(self.model), torch.no_grad():
            outputs = self.model.in_float32(rounded_to, **inputs.to(self.model.device))
        return outputs.image_embeds[0].float().cpu()

    def _check_model(self, index: GalleryIndex):
        """Marks a new index with the model, and refuses one of another model."""
        if index.dim != self.model.config.projection_dim:
            raise ValueError(
                f"The index {str(index.location)!r} holds embeddings of width {index.dim}, this model's have "
                f"{self.model.config.projection_dim}: load the model that made it, or name another index."
            )
        stored = index.fingerprint
        if stored is None:
            if len(index):
                raise ValueError(
                    f"The index {str(index.location)!r} does not say which model made it: build it again."
                )
            index.fingerprint = self.fingerprint().numpy()
            return
        similarity = same_model(
            self.model, lambda dtype: self.fingerprint(dtype)[None], torch.as_tensor(stored).reshape(1, -1)
        )
        if similarity != 1:
            raise ValueError(
                f"The index {str(index.location)!r} was made by another model or picture size: a test picture's "
                f"embedding has similarity {similarity:.3f} to the stored one, not 1. Load the model that made it, or "
                "add the pictures again."
            )

    def _new_rows(self, ids: Sequence[str | int], metadata: Sequence[dict], skip_existing: bool) -> list[int]:
        """Return rows of the ids that the gallery lacks. Raises ValueError for an id or metadata that cannot be
        stored, before anything is encoded."""
        for row, (id, entry) in enumerate(zip(ids, metadata)):
            if type(id) not in (str, int):
                raise ValueError(f"Row {row}: an id is a text or an integer, got {id!r}.")
            if not is_utf8(str(id)):
                raise ValueError(f"Row {row}: the id {id!r} cannot be stored, since it is not UTF-8.")
            try:
                if not isinstance(entry, dict):
                    raise ValueError("it is not a dict")
                json.dumps(entry, allow_nan=False, ensure_ascii=False).encode()
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {row}: the metadata {entry!r} cannot be stored as JSON: {error}.") from error
        existing, seen = self.index.existing(ids), set()
        for row, id in enumerate(ids):
            if id in seen or id in existing and not skip_existing:
                raise ValueError(
                    f"Row {row}: the id {id!r} is in the gallery already; ids must be unique (skip_existing=True "
                    "leaves out those of earlier calls)."
                )
            seen.add(id)
        return [row for row, id in enumerate(ids) if id not in existing]

    def _encode(self, kind: str, inputs: BatchFeature) -> tuple[torch.Tensor, list[dict[str, int]]]:
        """Return embeddings and, of videos, what is to be stored with each."""
        extra = []

        def embed(inputs: BatchFeature) -> torch.Tensor:
            inputs = inputs.to(self.model.device)
            outputs = self.model.get_image_features(**inputs)
            if kind == "videos":
                feats, mask = outputs.last_hidden_state, inputs["visual_attention_mask"]
                frames = self.model.get_image_features(visual_feats=feats.flatten(0, 1)).pooler_output
                alike = (frames.unflatten(0, feats.shape[:2]) @ outputs.pooler_output.unsqueeze(-1)).squeeze(-1)
                best = alike.masked_fill(mask == 0, -torch.inf).argmax(dim=1)
                extra.extend({"frame": int(n), "num_frames": int(count)} for n, count in zip(best, mask.sum(dim=1)))
            return outputs.pooler_output

        return encode(self.model, [inputs], lambda chunk: chunk[0], embed, 1, None), extra

    def _store(self, embeds: torch.Tensor, ids: Sequence, metadata: Sequence[dict], rows: Sequence[int]):
        if embeds.ndim != 2 or embeds.shape[1] != self.index.dim:
            raise ValueError(
                f"The embeddings have shape {tuple(embeds.shape)}, the gallery takes (rows, {self.index.dim})."
            )
        if not (finite := embeds.isfinite().all(dim=1)).all():
            i = int((~finite).nonzero()[0])
            raise ValueError(f"Row {rows[i]}: the embedding of {ids[i]!r} is not finite; check the model's weights.")
        texts = [json.dumps(entry, ensure_ascii=False) for entry in metadata]
        self.index.upsert(list(ids), embeds.float().numpy(force=True), texts)


def _check_k(k: int) -> int:
    """Return `k` as Python's own integer, of whatever library it comes."""
    try:
        number = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}.")
    return number


def _check_filter(key: str, value: str | int | float | bool):
    plain = type(value) in (str, int, float, bool) and (not isinstance(value, float) or math.isfinite(value))
    texts = [text for text in (key, value) if isinstance(text, str)]
    if not plain or not isinstance(key, str) or any(ord(letter) < 32 for text in texts for letter in text):
        raise ValueError(
            f"Cannot filter by {key!r}: {value!r}; a value is a text without control characters, a finite number or a "
            "truth value."
        )

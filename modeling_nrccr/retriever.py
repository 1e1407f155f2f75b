"""Search a gallery of pictures with a sentence in any language, or with a picture.

```python
retriever = NrccrRetriever(model, processor)
retriever.add("my_pictures")
for hit in retriever.search("un gato durmindo", k=5):
    print(hit.score, hit.id)
```
"""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from .encoding import encode_images, encode_texts
from .modeling_nrccr import NrccrModel
from .processing_nrccr import load_image


logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
INDEX_FILE = "index.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Hit:
    """One result of a search: the picture's `id`, its cosine similarity to the query, and what was stored with it."""

    id: str | int
    score: float
    metadata: dict[str, Any]


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    id: str | int
    reason: str


def list_images(folder: str | Path) -> list[Path]:
    """
    The pictures under `folder`, sorted, by suffix; hidden files and folders are left out.

    Raises:
        ValueError: if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"The gallery {str(folder)!r} is not a folder.")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise ValueError(
            f"No pictures under {str(folder)!r}: looked for files that end in {', '.join(IMAGE_SUFFIXES)}."
        )
    return paths


class NrccrRetriever:
    """
    Holds the embeddings of a gallery in memory and ranks all of them for a query (exact search, one product).

    Args:
        model: [`NrccrModel`] with a vision tower, on the device that shall encode.
        processor: its [`NrccrProcessor`].
    """

    def __init__(self, model: NrccrModel, processor: Callable):
        self.model = model
        self.processor = processor
        self.ids: list[str | int] = []
        self.metadata: list[dict[str, Any]] = []
        self.image_embeds = torch.empty(0, model.config.projection_dim)

    def __len__(self) -> int:
        return len(self.ids)

    def add(
        self,
        images: str | Path | Sequence[str | Path | Image.Image],
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        strict: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> list[Skipped]:
        """
        Encodes pictures and adds them to the gallery; decodes `batch_size` pictures at a time.

        Args:
            images: a folder (searched with its sub-folders), or a sequence of files and `PIL.Image`s.
            ids: one for each picture, unique in the gallery. Default: the path below the folder, the file as it was
                given, or a running number.
            metadata: one JSON-able dict for each picture. Default: `{"path": ...}` for files.
            strict: raise for a picture that cannot be read, rather than skip it.

        Returns:
            The pictures that were skipped, each with the reason.

        Raises:
            ValueError: for a folder without pictures, a repeated id, lists of unequal length, a picture that cannot
                be read under `strict`, or if none can be read.
        """
        if isinstance(images, (str, Path)):
            folder, images = Path(images), list_images(images)
            ids = [path.relative_to(folder).as_posix() for path in images] if ids is None else ids
        if ids is None:
            ids = [str(len(self) + i if isinstance(image, Image.Image) else image) for i, image in enumerate(images)]
        if metadata is None:
            metadata = [{} if isinstance(image, Image.Image) else {"path": str(image)} for image in images]
        if not len(images) == len(ids) == len(metadata):
            raise ValueError(
                f"Got {len(images)} pictures, {len(ids)} ids and {len(metadata)} metadata: one each is needed."
            )
        known = set(self.ids)
        for row, id in enumerate(ids):
            if id in known:
                raise ValueError(f"Row {row}: the id {id!r} is in the gallery already; ids must be unique.")
            known.add(id)

        embeds, kept, skipped = [], [], []
        with tqdm(total=len(images), desc="pictures", unit="picture", disable=not show_progress) as progress:
            for start in range(0, len(images), batch_size):
                batch = []
                for row in range(start, min(start + batch_size, len(images))):
                    image = images[row]
                    try:
                        batch.append(image if isinstance(image, Image.Image) else load_image(image))
                        kept.append(row)
                    except Exception as error:  # decoders of corrupt files raise nearly anything
                        if strict:
                            raise ValueError(f"Row {row}: cannot read the picture {ids[row]!r}: {error}") from error
                        skipped.append(Skipped(ids[row], str(error)))
                if batch:
                    embeds.append(encode_images(self.model, batch, self.processor, batch_size=batch_size))
                progress.update(min(batch_size, len(images) - start))
        if skipped:
            logger.warning(
                f"Skipped {len(skipped)} of {len(images)} pictures that cannot be read: "
                + "; ".join(f"{id} ({reason})" for id, reason in skipped[:5])
                + ("; ..." if len(skipped) > 5 else "")
            )
        if not kept:
            raise ValueError(
                f"None of {len(images)} pictures can be read"
                + (f"; the first, {skipped[0].id!r}: {skipped[0].reason}" if skipped else "")
                + "."
            )
        embeds = torch.cat(embeds)
        if not embeds.isfinite().all():
            row = kept[int((~embeds.isfinite()).any(dim=1).nonzero()[0])]
            raise ValueError(f"Row {row}: the embedding of {ids[row]!r} is not finite; check the model's weights.")
        self.image_embeds = torch.cat([self.image_embeds, embeds])
        self.ids += [ids[row] for row in kept]
        self.metadata += [metadata[row] for row in kept]
        return skipped

    def encode_query(self, query: str | Image.Image) -> torch.Tensor:
        """The L2-normalised embedding of a text or a picture, of shape `(projection_dim,)`."""
        if isinstance(query, Image.Image):
            return encode_images(self.model, [query], self.processor)[0]
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"A query is a text that is not blank, or a PIL.Image; got {query!r}.")
        return encode_texts(self.model, [query], self.processor)[0]

    def search(self, query: str | Image.Image | torch.Tensor, k: int = 10) -> list[Hit]:
        """
        The `k` pictures (fewer in a smaller gallery) that are most similar to the query, best first.

        Args:
            query: a text, a picture, or an L2-normalised embedding of shape `(projection_dim,)`, such as
                [`fuse_query_embeds`] makes of a query and its translation.
        """
        if not len(self):
            raise ValueError("The gallery is empty: add() pictures before search().")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        embed = query if isinstance(query, torch.Tensor) else self.encode_query(query)
        if embed.shape != self.image_embeds.shape[1:]:
            raise ValueError(
                f"The query's embedding has shape {tuple(embed.shape)}, the gallery's are "
                f"{tuple(self.image_embeds.shape[1:])}."
            )
        scores, rows = (self.image_embeds @ embed.to(self.image_embeds)).topk(min(k, len(self)))
        return [Hit(self.ids[row], score, self.metadata[row]) for score, row in zip(scores.tolist(), rows.tolist())]

    def save(self, directory: str | Path):
        """Writes `index.json` and a safetensors file; a crash on the way leaves the index that was there before."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The JSON is replaced last and names its tensors, so the two files of an index always belong together.
        name = f"embeddings-{secrets.token_hex(4)}.safetensors"
        index = {"version": FORMAT_VERSION, "embeddings": name, "ids": self.ids, "metadata": self.metadata}
        text = json.dumps(index, ensure_ascii=False, indent=1)
        save_file(
            {"image_embeds": self.image_embeds.contiguous(), "fingerprint": self.fingerprint()}, directory / name
        )
        temporary = directory / f"{INDEX_FILE}.{secrets.token_hex(4)}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / INDEX_FILE)
        for old in directory.glob("embeddings-*.safetensors"):
            if old.name != name:
                old.unlink()

    @classmethod
    def load(cls, directory: str | Path, model: NrccrModel, processor: Callable) -> "NrccrRetriever":
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: if there is no readable index, or if another model (or picture size) made it.
        """
        path = Path(directory) / INDEX_FILE
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["version"] != FORMAT_VERSION:
                raise ValueError(f"it has format {index['version']}, this version reads {FORMAT_VERSION}")
            tensors = load_file(path.with_name(Path(index["embeddings"]).name))
            embeds, fingerprint = tensors["image_embeds"], tensors["fingerprint"]
            if not len(embeds) == len(index["ids"]) == len(index["metadata"]):
                raise ValueError(
                    f"{len(embeds)} embeddings, {len(index['ids'])} ids, {len(index['metadata'])} metadata"
                )
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"Cannot read the index {str(path)!r}: {error}. Build it again with save().") from error
        retriever = cls(model, processor)
        ours = retriever.fingerprint()
        similarity = float(ours @ fingerprint) if ours.shape == fingerprint.shape else 0.0
        if similarity < 0.999:
            raise ValueError(
                f"The index {str(path)!r} was made by another model or picture size: a test picture's embedding has "
                f"similarity {similarity:.3f} to the stored one, not 1. Load the model that made it, or add the "
                "pictures again."
            )
        retriever.image_embeds, retriever.ids, retriever.metadata = embeds, index["ids"], index["metadata"]
        return retriever

    def fingerprint(self) -> torch.Tensor:
        """
        The embedding of a fixed test picture, of shape `(projection_dim,)`.

        It tells visual towers and picture processors apart, on any device and in any precision; an index stays valid
        when only the text side is replaced, for example to gain a language.
        """
        shades = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
        return encode_images(self.model, [Image.merge("RGB", shades)], self.processor)[0]

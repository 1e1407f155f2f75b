"""Serves a model over HTTP: embeddings of texts and pictures, and the search of a gallery.

What arrives together is encoded in one batch. Everything is bounded: what one request may hold (4xx says what was
wrong, and how to put it right) and what all of them may (503 with Retry-After). When it is stopped it answers what it
has accepted. It has one model and no password: for more, put a proxy before several of it. See docs/serve.md.
"""

import asyncio
import base64
import binascii
import re
import reprlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import torch
from PIL import UnidentifiedImageError

from ..loading.models import BASE, load_with_languages
from ..media import IMAGE_FORMATS, count_pixels, load_image
from ..modeling_nrccr import NrccrModel
from ..processor_inputs import text_problem
from ..retrieval.encoding import encode, encode_texts
from ..retrieval.index import is_milvus
from ..retrieval.metrics import fuse_query_embeds
from ..retrieval.retriever import NrccrRetriever
from .limits import LOCAL, Limits


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from pydantic import BaseModel, ConfigDict, model_validator
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .http import RETRY_AFTER, Answer, BodyLimit, invalid, refusal, refused, while_connected
except ImportError as error:
    raise ImportError('a server needs fastapi and uvicorn: pip install "modeling_nrccr[serve]"') from error


RENAMED = {"source_query_weight": "translation_weight"}  # fields of a request
DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)


class EmbedRequest(BaseModel):
    """Pictures as base64 of a file, or as data: URLs. `language`: of the texts; by default the server's, "base" for no
    adapter."""

    model_config = ConfigDict(strict=True, extra="forbid")
    texts: list[str] = []
    images: list[str] = []
    language: str | None = None


class SearchRequest(BaseModel):
    """A text or a picture; the rest as in `NrccrRetriever.search`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    text: str | None = None
    image: str | None = None
    language: str | None = None
    translation: str | None = None
    translation_weight: float = 0.5
    k: int = 10
    filter: dict[str, str | int | float | bool] | None = None

    @model_validator(mode="before")
    @classmethod
    def say_new_words(cls, request: Any) -> Any:
        for old, new in RENAMED.items():
            if isinstance(request, dict) and old in request:
                raise ValueError(f"{old} is now {new}")
        return request


class Batcher:
    """
    Encodes together what arrives together.

    Args:
        encode: takes at most `batch_size` items, gives their embeddings of shape `(len(items), projection_dim)`.
        executor: of one thread, in which it runs: a model is used by one thread at a time.
    """

    def __init__(self, encode: Callable[[list], torch.Tensor], executor: ThreadPoolExecutor, limits: Limits):
        self.encode, self.executor, self.limits = encode, executor, limits
        self.queue: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()
        self.encoded = self.batches = self.largest = 0

    async def embed(self, items: Sequence) -> torch.Tensor:
        """Return the items' embeddings, of shape `(len(items), projection_dim)`, in their order."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        for entry in zip(items, futures):
            self.queue.put_nowait(entry)
        return torch.stack(await asyncio.gather(*futures))

    async def run(self):
        """Encode batches until it is cancelled. While a batch is encoded, the next one gathers in the queue."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.next()]
            deadline = loop.time() + self.limits.max_wait_ms / 1000
            try:
                async with asyncio.timeout_at(deadline):
                    while len(batch) < self.limits.batch_size:
                        batch.append(await self.next())
            except TimeoutError:
                pass
            if batch := [entry for entry in batch if not entry[1].done()]:
                await self.answer(batch)

    async def next(self) -> tuple[Any, asyncio.Future]:
        """Return the next item that somebody still waits for, since clients leave."""
        while (entry := await self.queue.get())[1].done():
            pass
        return entry

    async def answer(self, batch: list[tuple[Any, asyncio.Future]]):
        items, futures = zip(*batch)
        try:
            embeds = await asyncio.get_running_loop().run_in_executor(self.executor, self.encode, list(items))
        except Exception as error:  # whatever a model may raise: it must not stop the queue
            if len(batch) > 1:
                for entry in batch:  # one by one, so that only the one at fault fails
                    await self.answer([entry])
            elif not futures[0].done():
                futures[0].set_exception(error)
            return
        self.encoded += len(batch)
        self.batches += 1
        self.largest = max(self.largest, len(batch))
        for future, embed in zip(futures, embeds):
            if not future.done():  # its client has left
                future.set_result(embed)


class Service:
    """
    What the endpoints do. Every problem with a request is an `HTTPException` whose `detail` names it.

    Args:
        name: of the model, for /health.
        index: the gallery that /search searches; None: there is none.
        filters: metadata that searches may filter by; faiss keeps a table of each for good.
    """

    def __init__(
        self,
        name: str,
        model: NrccrModel,
        processor: Callable,
        index: NrccrRetriever | None = None,
        limits: Limits | None = None,
        filters: Sequence[str] = (),
    ):
        self.name, self.model, self.processor, self.index = name, model, processor, index
        self.limits, self.filters = limits or Limits(), tuple(filters)
        self.accepted = 0  # texts and pictures that are under way
        # one thread each: decoded pictures are large, the model has one state, and faiss builds tables as it filters
        self.reader, self.encoder, self.searcher = (ThreadPoolExecutor(1) for _ in range(3))
        self.texts = Batcher(self.encode_texts, self.encoder, self.limits)
        self.images = Batcher(self.encode_images, self.encoder, self.limits)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers while it is entered."""
        tasks = [asyncio.create_task(batcher.run()) for batcher in (self.texts, self.images)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for executor in (self.reader, self.encoder, self.searcher):
                executor.shutdown()

    # ------------------------------------------------------------------------------------------- in their own threads

    def encode_texts(self, items: list[tuple[str, str | None]]) -> torch.Tensor:
        """Map texts, each with its language, to embeddings `(len(items), projection_dim)`."""
        texts, languages = zip(*items)
        return encode_texts(self.model, texts, self.processor, len(items), languages=languages)

    def encode_images(self, items: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Map what the processor made of each picture to embeddings `(len(items), projection_dim)`."""

        def embed(chunk: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            inputs = {name: torch.cat([item[name] for item in chunk]).to(self.model.device) for name in chunk[0]}
            return self.model.get_image_features(**inputs).pooler_output

        return encode(self.model, items, list, embed, len(items), None)

    def check_images(self, images: dict[str, str]) -> dict[str, bytes]:
        """Map base64 to files, by field of the request; nothing of them is decoded. Raises HTTPException 413 and 422
        for more bytes and pixels than are taken."""
        files = {field: decode_base64(field, encoded) for field, encoded in images.items()}
        for field, content in files.items():
            if len(content) > self.limits.max_image_bytes:
                raise HTTPException(413, f"{field} has {len(content)} bytes: {self.limits.max_image_bytes} are taken")
        pixels = sum(read_picture(field, partial(count_pixels, content)) for field, content in files.items())
        if pixels > self.limits.max_pixels:
            names = ", ".join(files)
            raise HTTPException(422, f"{names}: {pixels} pixels in all, {self.limits.max_pixels} are taken a request")
        return files

    def read_image(self, field: str, content: bytes) -> dict[str, torch.Tensor]:
        """Map a file to what the model reads of one picture, which is small, however large the picture is."""

        def read() -> dict[str, torch.Tensor]:
            return self.processor(images=[load_image(content, self.limits.max_pixels)], return_tensors="pt")

        return read_picture(field, read)

    # ------------------------------------------------------------------------------------------------------- requests

    @contextmanager
    def admit(self, count: int):
        """Counts `count` texts and pictures from here until they are answered, or refuses them."""
        if self.accepted + count > self.limits.max_waiting:
            raise HTTPException(503, f"{self.accepted} texts and pictures wait already: ask again", RETRY_AFTER)
        self.accepted += count
        try:
            yield
        finally:
            self.accepted -= count

    def language(self, language: str | None) -> str | None:
        """Return the language of a request, as the model knows it. Raises HTTPException 422 for one that it has
        not."""
        if language is None:
            return self.model.language
        if language != BASE and language not in self.model.language_adapters:
            known = ", ".join([BASE, *self.model.language_adapters])
            name = reprlib.repr(language)
            raise HTTPException(422, f"language {name} is not here ({known}): leave it out for the default")
        return None if language == BASE else language

    def check_text(self, field: str, text: str) -> str:
        if problem := text_problem(text):
            raise HTTPException(422, f"{field} {problem}")
        if len(text) > self.limits.max_characters:
            raise HTTPException(422, f"{field} has {len(text)} characters: {self.limits.max_characters} are taken")
        return text

    async def embed_images(self, images: dict[str, str]) -> torch.Tensor:
        """Embed pictures in base64, by field of the request; all are read before the first is encoded."""
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(self.reader, self.check_images, images)
        items = [await loop.run_in_executor(self.reader, self.read_image, *file) for file in files.items()]
        return await self.images.embed(items)

    async def embed(self, request: EmbedRequest) -> dict[str, Any]:
        """Answer with embeddings under the names that [`NrccrModel`] gives them."""
        for field, largest in (("texts", self.limits.max_texts), ("images", self.limits.max_images)):
            if (size := len(getattr(request, field))) > largest:
                raise HTTPException(422, f"{field} has {size} entries: {largest} are taken, ask several times")
        if not request.texts and not request.images:
            raise HTTPException(422, "texts and images are both empty: give at least one")
        language = self.language(request.language)
        texts = [(self.check_text(f"texts[{row}]", text), language) for row, text in enumerate(request.texts)]
        images = {f"images[{row}]": image for row, image in enumerate(request.images)}
        answer = {}
        with self.admit(len(texts) + len(images)):
            if images:
                answer["image_embeds"] = (await self.embed_images(images)).tolist()
            if texts:
                answer["text_embeds"] = (await self.texts.embed(texts)).tolist()
        return answer

    async def search(self, request: SearchRequest) -> dict[str, Any]:
        """Answer with the hits, best first."""
        if self.index is None:
            raise HTTPException(404, "there is no gallery here: start the server with --index")
        if (request.text is None) == (request.image is None):
            raise HTTPException(422, "give either text or image, and not both")
        if not 1 <= request.k <= self.limits.max_k:
            raise HTTPException(422, f"k is {request.k}: from 1 to {self.limits.max_k} is taken")
        if not 0 <= request.translation_weight <= 1:
            raise HTTPException(422, f"translation_weight is {request.translation_weight}: from 0 to 1 is taken")
        if unknown := (request.filter or {}).keys() - set(self.filters):
            known = ", ".join(self.filters) or "none"
            name = reprlib.repr(min(unknown))
            raise HTTPException(422, f"filter by {name} is not served ({known}): start with --filter_by")
        texts = []
        if request.text is not None:
            texts.append((self.check_text("text", request.text), self.language(request.language)))
        if request.translation is not None:  # in the language that needs no adapter
            texts.append((self.check_text("translation", request.translation), None))
        with self.admit(len(texts) + (request.image is not None)):
            embeds = [] if request.image is None else [(await self.embed_images({"image": request.image}))[0]]
            if texts:
                embeds += await self.texts.embed(texts)
            embed = embeds[0]
            if request.translation is not None:
                embed = fuse_query_embeds(*embeds, request.translation_weight)
            loop = asyncio.get_running_loop()
            try:
                hits = await loop.run_in_executor(self.searcher, self.index.search, embed, request.k, request.filter)
            except ValueError as error:  # of a filter, or an empty gallery
                raise HTTPException(422, str(error)) from error
        return {"hits": [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits]}

    async def health(self) -> dict[str, Any]:
        index = None
        if self.index is not None:
            size = await asyncio.get_running_loop().run_in_executor(self.searcher, len, self.index)
            index = {"address": str(self.index.index.location), "size": size}
        return {
            "status": "ready",
            "model": self.name,
            "projection_dim": self.model.config.projection_dim,
            "languages": list(self.model.language_adapters),
            "language": self.model.language or BASE,
            "index": index,
            "waiting": self.accepted,
            "served": {
                name: {"encoded": batcher.encoded, "batches": batcher.batches, "largest_batch": batcher.largest}
                for name, batcher in (("texts", self.texts), ("images", self.images))
            },
        }


def decode_base64(field: str, encoded: str) -> bytes:
    """Decode base64, also as browsers (data: URLs) and mail (broken into lines) have it. Raises HTTPException 422 for
    what is none."""
    encoded = "".join(encoded[len(found[0]) :].split() if (found := DATA_URL.match(encoded)) else encoded.split())
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(422, f"{field} is no base64 ({error}): encode the picture's file") from error


def read_picture(field: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UnidentifiedImageError as error:
        kinds = ", ".join(IMAGE_FORMATS)
        raise HTTPException(422, f"{field} is no picture of a known kind: send one of {kinds}") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise HTTPException(422, f"{field} cannot be read as a picture: {error}") from error


def build_app(service: Service, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """
    Build the web application of a service.

    Args:
        hosts: names that requests may call the server by, which pages of other sites cannot; "*": any.

    Raises:
        ValueError: a star stands for a part of a name.
    """
    for host in hosts:
        if "*" in host.removeprefix("*.") and host != "*":
            raise ValueError(f"the host {host!r}: a star stands for a whole name, as in *.example.org, or alone")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="NRCCR", description=__doc__.split("\n")[0].rstrip(":"), lifespan=lifespan)
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, refused)

    @app.exception_handler(ConnectionError)  # of the database that holds the gallery
    def unreachable(_: Request, error: ConnectionError) -> Answer:
        return refusal(503, f"the gallery does not answer: {error}", RETRY_AFTER)

    # each answers with a response, since FastAPI would walk through every number of an embedding

    @app.post("/embed")
    async def embed(body: EmbedRequest, request: Request) -> Response:
        return await while_connected(request, service.embed(body))

    @app.post("/search")
    async def search(body: SearchRequest, request: Request) -> Response:
        return await while_connected(request, service.search(body))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return Answer(await service.health())

    return app


def serve(
    model: str,
    index: str | None = None,
    *,
    languages: Sequence[str] = (),
    collection: str = "gallery",
    filters: Sequence[str] = (),
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] | None = None,
    port: int = 8000,
    limits: Limits | None = None,
    device: str | None = None,
    dtype: str | None = None,
):
    """
    Serve a model until the process is told to stop.

    Args:
        model: folder or hub id.
        index: the gallery that is searched, of `nrccr index`.
        languages: as `--language` takes them; the first is the default of requests.
        collection: name of the gallery within Milvus.
        filters: metadata that a search may filter by.
        host: address to listen at.
        allowed_hosts: names that requests may call the server by; default: those of this machine, or any where `host`
            is another.
        port: 0 is a free one.
        device, dtype: of the model, as for [`load_model`].

    Raises:
        ValueError: there is no such model, language or index, or a limit refuses everything.
    """
    hosts = allowed_hosts or (LOCAL if host in (*LOCAL, "::1") else ("*",))
    loaded, processor = load_with_languages(model, languages, device, dtype)
    gallery = None
    if index is not None:
        options = {"collection": collection} if is_milvus(index) else {}
        gallery = NrccrRetriever.load(index, loaded, processor, **options)
    service = Service(model, loaded, processor, gallery, limits, filters)
    uvicorn.run(build_app(service, hosts), host=host, port=port)

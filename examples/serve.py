"""Serves a model over HTTP: embeddings of texts and pictures, and the search of a gallery:

    python examples/serve.py outputs/demo --index outputs/gallery

    curl --json '{"texts": ["can correndo"]}' http://127.0.0.1:8000/embed
    curl --json '{"text": "can correndo", "k": 5}' http://127.0.0.1:8000/search

What arrives together is encoded in one batch. Everything is bounded: what one request may hold (4xx says what was
wrong, and how to put it right) and what all of them may (503 with Retry-After). At Ctrl+C it answers what it has
accepted. It has one model and no password: for more, put a proxy before several of it. See docs/serve.md.
"""

import argparse
import asyncio
import base64
import binascii
import io
import reprlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from arguments import option
from PIL import UnidentifiedImageError
from search import load_with_languages

from modeling_nrccr import NrccrModel, NrccrRetriever
from modeling_nrccr.encoding import encode
from modeling_nrccr.gallery_index import is_milvus
from modeling_nrccr.media import IMAGE_FORMATS, load_image
from modeling_nrccr.metrics import fuse_query_embeds


try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict
except ImportError as error:
    raise ImportError('a server needs fastapi and uvicorn: pip install "modeling_nrccr[serve]"') from error


BASE = "base"  # as a request's language: no adapter
RETRY_AFTER = {"Retry-After": "1"}  # seconds


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and what all that are under way may."""

    max_texts: int = option(64, "texts a request")
    max_characters: int = option(1000, "characters a text; what the model does not read of them, it cuts off")
    max_images: int = option(8, "pictures a request")
    max_image_bytes: int = option(8 * 2**20, "bytes of a picture's file")
    max_pixels: int = option(50_000_000, "pixels of a picture; more is refused before it is decoded")
    max_k: int = option(100, "hits of a search")
    max_body_bytes: int = option(16 * 2**20, "bytes of a request")
    max_held_bytes: int = option(128 * 2**20, "bytes of all requests that are under way")
    max_waiting: int = option(512, "texts and pictures that were accepted and are not answered yet")
    max_batch: int = option(32, "texts or pictures in a batch")
    max_wait_ms: int = option(5, "milliseconds that a text or picture waits for others to share its batch")
    max_body_seconds: int = option(30, "seconds that a request may take to arrive")


class EmbedRequest(BaseModel):
    """Pictures as base64 of a file. `language`: of the texts; by default the server's, "base" for no adapter."""

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
    source_query_weight: float = 0.5
    k: int = 10
    filter: dict[str, str | int | float | bool] | None = None


class Batcher:
    """
    Encodes together what arrives together.

    Args:
        encode: takes at most `max_batch` items, gives their embeddings of shape `(len(items), projection_dim)`.
        executor: of one thread, in which it runs: a model is used by one thread at a time.
    """

    def __init__(self, encode: Callable[[list], torch.Tensor], executor: ThreadPoolExecutor, limits: Limits):
        self.encode, self.executor, self.limits = encode, executor, limits
        self.queue: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()
        self.encoded = self.batches = self.largest = 0

    async def embed(self, items: Sequence) -> torch.Tensor:
        """Of shape `(len(items), projection_dim)`, in their order."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        for entry in zip(items, futures):
            self.queue.put_nowait(entry)
        return torch.stack(await asyncio.gather(*futures))

    async def run(self):
        """Until it is cancelled. While a batch is encoded, the next one gathers in the queue."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            deadline = loop.time() + self.limits.max_wait_ms / 1000
            try:
                async with asyncio.timeout_at(deadline):
                    while len(batch) < self.limits.max_batch:
                        batch.append(await self.queue.get())
            except TimeoutError:
                pass
            await self.answer(batch)

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
            if not future.done():  # cancelled, at a second Ctrl+C
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
        """Texts, each with its language, to embeddings `(len(items), projection_dim)`."""

        def embed(chunk: list[tuple[str, str | None]]) -> torch.Tensor:
            texts, languages = zip(*chunk)
            inputs = self.processor(text=list(texts), return_tensors="pt").to(self.model.device)
            return self.model.get_text_features(**inputs, languages=list(languages)).pooler_output

        return encode(self.model, items, list, embed, len(items), None)

    def encode_images(self, items: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """What the processor made of each picture to embeddings `(len(items), projection_dim)`."""

        def embed(chunk: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            inputs = {name: torch.cat([item[name] for item in chunk]).to(self.model.device) for name in chunk[0]}
            return self.model.get_image_features(**inputs).pooler_output

        return encode(self.model, items, list, embed, len(items), None)

    def read_image(self, field: str, encoded: str) -> dict[str, torch.Tensor]:
        """Base64 to what the model reads of one picture, which is small, however large the picture is."""
        try:
            content = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise HTTPException(422, f"{field} is no base64 ({error}): encode the picture's file") from error
        if len(content) > self.limits.max_image_bytes:
            raise HTTPException(413, f"{field} has {len(content)} bytes: {self.limits.max_image_bytes} are taken")
        try:
            picture = load_image(io.BytesIO(content), self.limits.max_pixels)
            return self.processor(images=[picture], return_tensors="pt")
        except UnidentifiedImageError as error:
            kinds = ", ".join(IMAGE_FORMATS)
            raise HTTPException(422, f"{field} is no picture of a known kind: send one of {kinds}") from error
        except Exception as error:  # decoders of broken files raise nearly anything
            raise HTTPException(422, f"{field} cannot be read as a picture: {error}") from error

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
        """Of a request, as the model knows it."""
        if language is None:
            return self.model.language
        if language != BASE and language not in self.model.language_adapters:
            known = ", ".join([BASE, *self.model.language_adapters])
            raise HTTPException(422, f"language {language!r} is not here ({known}): leave it out for the default")
        return None if language == BASE else language

    def check_text(self, field: str, text: str) -> str:
        if not text.strip():
            raise HTTPException(422, f"{field} is {text[:20]!r}: a text that is not blank is needed")
        if len(text) > self.limits.max_characters:
            raise HTTPException(422, f"{field} has {len(text)} characters: {self.limits.max_characters} are taken")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise HTTPException(422, f"{field} holds half of a UTF-16 pair: send whole characters")
        return text

    async def embed_images(self, images: dict[str, str]) -> torch.Tensor:
        """Base64 by field of the request; all are read before the first is encoded."""
        loop = asyncio.get_running_loop()
        items = [await loop.run_in_executor(self.reader, self.read_image, *image) for image in images.items()]
        return await self.images.embed(items)

    async def embed(self, request: EmbedRequest) -> dict[str, Any]:
        """Embeddings under the names that [`NrccrModel`] gives them."""
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
        """Hits, best first."""
        if self.index is None:
            raise HTTPException(404, "there is no gallery here: start the server with --index")
        if (request.text is None) == (request.image is None):
            raise HTTPException(422, "give either text or image, and not both")
        if not 1 <= request.k <= self.limits.max_k:
            raise HTTPException(422, f"k is {request.k}: from 1 to {self.limits.max_k} is taken")
        if not 0 <= request.source_query_weight <= 1:
            raise HTTPException(422, f"source_query_weight is {request.source_query_weight}: from 0 to 1 is taken")
        if unknown := (request.filter or {}).keys() - set(self.filters):
            known = ", ".join(self.filters) or "none"
            raise HTTPException(422, f"filter by {min(unknown)!r} is not served ({known}): start with --filter_by")
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
                embed = fuse_query_embeds(*embeds, request.source_query_weight)
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


class BodyLimit:
    """ASGI: refuses bodies that are too large (413), too slow (408) or, together, too many (503) as they arrive."""

    def __init__(self, app: Callable, limits: Limits):
        self.app, self.limits, self.held = app, limits, 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, more, limits = 0, True, self.limits
        deadline = asyncio.get_running_loop().time() + limits.max_body_seconds

        async def bounded() -> dict:
            nonlocal size, more
            if not more:  # what is left to be received is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request did not arrive within {limits.max_body_seconds} s") from None
            more = message.get("more_body", False)
            arrived = len(message.get("body", b""))
            size += arrived
            self.held += arrived
            if size > limits.max_body_bytes:
                raise HTTPException(413, f"the request is larger than {limits.max_body_bytes} bytes: send less")
            if self.held > limits.max_held_bytes:
                raise HTTPException(503, "too many bytes are under way: ask again", RETRY_AFTER)
            return message

        try:
            await self.app(scope, bounded, send)
        finally:
            self.held -= size


def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """What is wrong with the fields of a request, without repeating them at length."""
    reasons = []
    for problem in error.errors()[:5]:
        place = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"][1:]]
        field = "".join(place).lstrip(".") or "the body"
        reasons.append(f"{field}: {problem['msg']}, got {reprlib.repr(problem['input'])}")
        if problem["type"] == "json_invalid":
            reasons = [f"the body is no JSON: {problem['ctx']['error']}, at character {problem['loc'][1]}"]
    if "json" not in request.headers.get("content-type", ""):
        reasons = ["the body must be JSON, with the header Content-Type: application/json"]
    return JSONResponse({"detail": "; ".join(reasons)}, 422)


def build_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="NRCCR", description=__doc__.split("\n")[0].rstrip(":"), lifespan=lifespan)
    app.add_middleware(BodyLimit, limits=service.limits)
    app.add_exception_handler(RequestValidationError, invalid)

    @app.exception_handler(ConnectionError)  # of the database that holds the gallery
    def unreachable(_: Request, error: ConnectionError) -> JSONResponse:
        return JSONResponse({"detail": f"the gallery does not answer: {error}"}, 503, RETRY_AFTER)

    # each answers with a response, since FastAPI would walk through every number of an embedding

    @app.post("/embed")
    async def embed(request: EmbedRequest) -> JSONResponse:
        return JSONResponse(await service.embed(request))

    @app.post("/search")
    async def search(request: SearchRequest) -> JSONResponse:
        return JSONResponse(await service.search(request))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse(await service.health())

    return app


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or hub id of a trained model, or of a dual encoder such as CLIP")
    parser.add_argument("--index", help="what index_gallery.py made: folder, NAME.db, or the URI of a Milvus server")
    parser.add_argument("--collection", default="gallery", help="name of the gallery within Milvus")
    parser.add_argument(
        "--language", action="append", default=[], help="CODE=FOLDER adds what add_language.py wrote; may be given "
        "several times; the first CODE is the default of requests",
    )  # fmt: skip
    parser.add_argument("--filter_by", action="append", default=[], help="metadata that a search may filter by")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    for field in fields(Limits):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=field.metadata["help"])
    args = parser.parse_args(argv)
    try:
        service = load_service(args)
    except (ValueError, OSError, ImportError) as error:  # what a user can put right: a line without a traceback
        sys.exit(f"error: {error}")
    uvicorn.run(build_app(service), host=args.host, port=args.port)


def load_service(args: argparse.Namespace) -> Service:
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    for name, value in vars(limits).items():
        if value < (name != "max_wait_ms"):
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if limits.max_waiting < limits.max_texts + limits.max_images:
        raise ValueError(f"max_waiting={limits.max_waiting} is less than one request may hold: raise it")
    model, processor = load_with_languages(args.model, args.language)
    index = None
    if args.index:
        options = {"collection": args.collection} if is_milvus(args.index) else {}
        index = NrccrRetriever.load(args.index, model, processor, **options)
    return Service(args.model, model, processor, index, limits, args.filter_by)


if __name__ == "__main__":
    main()

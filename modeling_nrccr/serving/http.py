"""What the server does about requests and answers as such, whatever they ask: bounds, refusals, clients that leave."""

import asyncio
import json
import reprlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException


RETRY_AFTER = {"Retry-After": "1"}  # seconds
MAX_DETAIL = 500  # characters of a refusal: what was sent may be long
CLIENT_LEFT = 499  # as nginx calls it; nobody reads it


class BodyLimit:
    """ASGI: refuses bodies that are too large (413), too slow (408) or, together, too many (503) as they arrive.
    `limits`: a [`Limits`]."""

    def __init__(self, app: Callable, limits: Any):
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


class Answer(JSONResponse):
    """JSON in UTF-8; halves of characters, as names of old files may hold, are escaped as JSON does."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


def refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer({"detail": detail if len(detail) <= MAX_DETAIL else f"{detail[:MAX_DETAIL]}..."}, status, headers)


def refused(request: Request, error: StarletteHTTPException) -> Answer:
    detail = str(error.detail)
    if error.status_code == 400 and error.__cause__ is not None:  # FastAPI keeps what is wrong with a body to itself
        encoding = request.headers.get("content-encoding")
        reason = f"Content-Encoding {encoding[:20]!r} is not taken" if encoding else error.__cause__
        detail = f"the body cannot be read ({reason}): send JSON in UTF-8, not compressed"
    return refusal(error.status_code, detail, error.headers)


def invalid(request: Request, error: RequestValidationError) -> Answer:
    """Say what is wrong with the fields of a request, without repeating them at length."""
    reasons = []
    for problem in error.errors()[:5]:
        place = [f"[{part}]" if isinstance(part, int) else f".{part[:40]}" for part in problem["loc"][1:]]
        field = "".join(place).lstrip(".") or "the body"
        reasons.append(f"{field}: {problem['msg']}, got {reprlib.repr(problem['input'])}")
        if problem["type"] == "json_invalid":
            reasons = [f"the body is no JSON: {problem['ctx']['error']}, at character {problem['loc'][1]}"]
    if "json" not in request.headers.get("content-type", ""):
        reasons = ["the body must be JSON, with the header Content-Type: application/json"]
    return refusal(422, "; ".join(reasons))


async def while_connected(request: Request, work: Awaitable[dict[str, Any]]) -> Response:
    """Return what `work` gives; it is cancelled, and so is what of it waits, as soon as the client has left."""

    async def left():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return Answer(await working) if working.done() else Response(status_code=CLIENT_LEFT)
    finally:
        for task in (working, leaving):
            task.cancel()

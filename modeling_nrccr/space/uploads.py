"""What visitors upload lies on the disk until they submit it, and some never do: bounded in number, bytes and time."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from starlette.exceptions import HTTPException

from .finder import MAX_BYTES, MAX_OWN


MAX_AGE = 300  # seconds that a file waits to be submitted
MAX_SECONDS = 120  # that a request may take to arrive
MAX_REQUEST = MAX_OWN * MAX_BYTES + 2**20  # bytes: all that a visitor may add, and what stands between
MAX_FILES, MAX_TOTAL = 500, 2**30  # files and bytes of all visitors


class UploadLimit:
    """
    ASGI: refuses uploads that are too large (413), too slow (408), or for which there is no room now (503).

    Args:
        folder: of the uploads, and of nothing else: what is older than `MAX_AGE` is removed.
    """

    def __init__(self, app: Callable, folder: str):
        self.app, self.folder = app, Path(folder)
        self.arriving = 0  # bytes of requests that are under way

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            return await self.app(scope, receive, send)
        files, stored = await asyncio.to_thread(sweep, self.folder)
        size, deadline = 0, asyncio.get_running_loop().time() + MAX_SECONDS

        async def bounded() -> dict:
            nonlocal size
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The upload took more than {MAX_SECONDS} seconds.") from None
            size += len(message.get("body", b""))
            self.arriving += len(message.get("body", b""))
            if size > MAX_REQUEST:
                raise HTTPException(413, f"Up to {MAX_OWN} pictures of {MAX_BYTES // 2**20} MB each are taken.")
            if files >= MAX_FILES or stored + self.arriving > MAX_TOTAL:
                raise HTTPException(503, "Too much is being uploaded: try again in some minutes.")
            return message

        try:
            await self.app(scope, bounded, send)
        finally:
            self.arriving -= size


def sweep(folder: Path) -> tuple[int, int]:
    """Removes what is older than `MAX_AGE`; gives the number of files that stay, and their bytes."""
    files = size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # of those that are submitted meanwhile
            stat = path.lstat()
            if path.is_dir():
                continue
            if time.time() - stat.st_mtime > MAX_AGE:
                path.unlink()
            else:
                files, size = files + 1, size + stat.st_size
    return files, size

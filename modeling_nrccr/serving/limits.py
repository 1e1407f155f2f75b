"""What a server takes; nothing here is slow to import, since these are flags too."""

from dataclasses import dataclass, field, fields


LOCAL = ("127.0.0.1", "localhost", "[::1]")


def limit(default: int, help: str) -> int:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """
    What one request may hold, and what all that are under way may.

    Raises:
        ValueError: a number would refuse every request.
    """

    max_texts: int = limit(64, "texts a request")
    max_characters: int = limit(1000, "characters a text; what the model does not read of them, it cuts off")
    max_images: int = limit(8, "pictures a request")
    max_image_bytes: int = limit(8 * 2**20, "bytes of a picture's file")
    max_pixels: int = limit(50_000_000, "pixels of a request's pictures; more is refused before any is decoded")
    max_k: int = limit(100, "hits of a search")
    max_body_bytes: int = limit(16 * 2**20, "bytes of a request")
    max_held_bytes: int = limit(128 * 2**20, "bytes of all requests that are under way")
    max_waiting: int = limit(512, "texts and pictures that were accepted and are not answered yet")
    batch_size: int = limit(32, "texts or pictures at once")
    max_wait_ms: int = limit(5, "milliseconds that a text or picture waits for others to share its batch")
    max_body_seconds: int = limit(30, "seconds that a request may take to arrive")

    def __post_init__(self):
        for part in fields(self):
            value = getattr(self, part.name)
            if value <= 0 and not (value == 0 and part.name == "max_wait_ms"):
                raise ValueError(f"{part.name} is {value}: it must be at least 1")
        if self.max_waiting < self.max_texts + self.max_images:
            raise ValueError(
                f"max_waiting={self.max_waiting} is less than one request may hold "
                f"({self.max_texts} texts and {self.max_images} pictures): raise it"
            )

"""Rows of embeddings that add_teacher_embeds."""

from ..modeling_nrccr import NrccrModel
from ..retrieval.encoding import encode_texts


def add_teacher_embeds(rows: list[dict], base: NrccrModel, processor) -> list[dict]:
    """Gives each row the base's embedding of its source caption, as `teacher_text_embeds`; returns them."""
    captions = [row["source_caption"] for row in rows]
    embeds = encode_texts(base, captions, processor, show_progress=True, languages=None)
    for row, embed in zip(rows, embeds, strict=True):
        row["teacher_text_embeds"] = embed
    return rows

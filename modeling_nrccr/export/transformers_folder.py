"""A folder of transformers' own class: `AutoModel` and `AutoProcessor` open it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..files import replacing_folder, writing_weights
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from .check import compare_embeddings, summarize
from .fold import fold_language
from .processors import plain_processor
from .readme import PICTURES, find_report, is_exported_folder, write_readme


SNIPPET = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER").eval()
processor = AutoProcessor.from_pretrained("FOLDER")
texts = model.get_text_features(**processor(text=["..."], OPTIONS, return_tensors="pt")).pooler_output
"""


def check_weights(folded: PreTrainedModel, written: PreTrainedModel):
    """Raise ValueError where a weight of what was written is not that of `folded`, bit for bit."""
    expected, found = folded.state_dict(), written.state_dict()
    if odd := [key for key in expected if key not in found or not torch.equal(expected[key], found[key])]:
        raise ValueError(f"{odd[0]} is not read back as it was written: nothing was written; is the disk sound?")


def embedders(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[Callable, Callable]:
    """Return what embeds texts, and what embeds pictures, as a user of transformers does."""

    def embed_texts(texts: list[str]) -> torch.Tensor:
        return model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output

    def embed_pictures(pictures: list[Image.Image]) -> torch.Tensor:
        return model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output

    return embed_texts, embed_pictures


def save_folded(folded: PreTrainedModel, processor: ProcessorMixin, folder: Path):
    """Write model and processor, and read them back."""
    with writing_weights(folder):
        folded.save_pretrained(folder)
    processor.save_pretrained(folder)
    check_weights(folded, AutoModel.from_pretrained(folder, dtype=folded.dtype))


def write_transformers(
    model: NrccrModel,
    processor: NrccrProcessor,
    folder: str | Path,
    name: str,
    languages: Sequence[str] = (),
    batch_size: int = 32,
) -> dict:
    """
    Write a model in the class of its base, with the active language in it, or nothing.

    Args:
        model: in float32, on the CPU.
        name: of the model, as it was loaded.
        languages: as they were loaded; where the report of one is found.

    Returns:
        `{"model": ..., "language": ..., "verdict": ..., "compared": of compare_embeddings,
        "summary": ...}`.

    Raises:
        ValueError: for a model that cannot be folded, and where the folder reads anything otherwise than the model.
    """
    folder, report = Path(folder), find_report(name, model.language, languages)
    folded = fold_language(model)
    plain = plain_processor(folded.config, processor)
    with replacing_folder(folder, partial(is_exported_folder, folder), "an export") as work:
        save_folded(folded, plain, work)
        opened = AutoModel.from_pretrained(work).eval(), AutoProcessor.from_pretrained(work)
        what = f"{type(opened[0]).__name__} of transformers"
        found = compare_embeddings(what, model, processor, *embedders(*opened), batch_size)
        padding = '"max_length"' if processor.text_padding == "max_length" else "True"
        snippet = SNIPPET.replace("FOLDER", str(folder)).replace("OPTIONS", f"padding={padding}, truncation=True")
        write_readme(
            work, "transformers", model, model.config.dual_encoder["name"], found, report, snippet, [PICTURES]
        )
    return {
        "model": name,
        "language": model.language,
        "verdict": report.get("verdict"),
        "compared": found,
        "summary": summarize(found),
    }

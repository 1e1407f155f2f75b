"""A folder of sentence-transformers' own modules: `SentenceTransformer(folder)` opens it."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel

from ..files import replacing_folder, writing_weights
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrTextProcessor
from ..publishing.sentence_transformers_files import modality_config
from .check import compare_embeddings, summarize
from .fold import fold_language, text_map, text_weights
from .processors import plain_processor, plain_tokenizer, tokenizer_options
from .readme import PICTURES, find_report, is_exported_folder, write_readme
from .sides import one_text_side
from .transformers_folder import check_weights, save_folded


POOLING = {"first": "cls", "last": "lasttoken", "mean": "mean", "max": "max"}
SNIPPET = """
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
embeddings = model.encode(["..."])
"""


def load_sentence_transformers():
    try:
        import sentence_transformers
        from sentence_transformers.base.modules import transformer
        from sentence_transformers.sentence_transformer import modules
    except ImportError as error:
        raise ImportError(
            'this format is written, and compared, by its own library: pip install "sentence-transformers>=5.4"'
        ) from error
    return sentence_transformers.SentenceTransformer, transformer.Transformer, modules


@torch.no_grad()
def plain_text_encoder(model: NrccrModel) -> PreTrainedModel:
    """
    Return the text encoder in its own class, with the active language's LoRA merged into it.

    Raises:
        ValueError: where `AutoModel` does not open that class.
    """
    config, own = model.config.text_config, type(model.text_tower.encoder)
    if MODEL_MAPPING.get(type(config), None) is not own or model.config.text_length is not None:
        raise ValueError(
            f"sentence-transformers does not read texts by {own.__name__} as this model does: take --to onnx"
        )
    encoder = own._from_config(config, dtype=torch.float32).eval()
    encoder.load_state_dict(text_weights(model), strict=False)
    if isinstance(pooler := getattr(encoder, "pooler", None), nn.Module):  # never read; the same in every export
        for parameter in pooler.parameters():
            parameter.zero_()
    return encoder


def write_modules(model: NrccrModel, processor: NrccrTextProcessor, folded: PreTrainedModel | None, work: Path):
    """Write the modules: Transformer and Normalize of a folded dual encoder, for texts and pictures; else, for texts,
    Transformer, Pooling, Dense, Normalize."""
    sentence_transformer, transformer, modules = load_sentence_transformers()
    scratch = work / "scratch"
    scratch.mkdir()
    options = tokenizer_options(processor)
    options.pop("max_length")  # the tokenizer's, which `max_seq_length` reads and sets
    options = {"processing_kwargs": {"text": options}}
    if folded is not None:
        save_folded(folded, plain_processor(folded.config, processor), scratch)
        options |= {"modality_config": modality_config(), "module_output_name": "sentence_embedding"}
        parts = [transformer(str(scratch), **options)]
    else:
        encoder, (weight, bias) = plain_text_encoder(model), text_map(model)
        with writing_weights(scratch):
            encoder.save_pretrained(scratch)
        plain_tokenizer(processor).save_pretrained(scratch)
        parts = [transformer(str(scratch), **options)]
        check_weights(encoder, parts[0].model)
        dense = modules.Dense(*reversed(weight.shape), True, nn.Identity(), weight.float(), bias.float())
        parts += [modules.Pooling(weight.shape[1], POOLING[model.config.text_pooling]), dense]
    prompts = dict.fromkeys(("query", "document"), processor.text_prefix)
    whole = sentence_transformer(
        modules=[*parts, modules.Normalize()],
        device="cpu",
        prompts=prompts,
        default_prompt_name="query" if processor.text_prefix else None,
        similarity_fn_name="cosine",
    )
    whole.save_pretrained(str(work), create_model_card=False)
    shutil.rmtree(scratch)


def write_sentence_transformers(
    model: NrccrModel,
    processor: NrccrTextProcessor,
    folder: str | Path,
    name: str,
    languages: Sequence[str] = (),
    batch_size: int = 32,
) -> dict:
    """
    Write the text side in the active language, and the picture side where the base is a dual encoder whose class has
    one, or nothing.

    Args:
        model: in float32, on the CPU.
        name: of the model, as it was loaded.
        languages: as they were loaded; where the report of one is found.

    Returns:
        As `write_transformers`, with "texts_only": why pictures were left out, None where they were not.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: for a model that cannot be folded, and where the folder reads anything otherwise than the model.
    """
    sentence_transformer, *_ = load_sentence_transformers()
    folder, report = Path(folder), find_report(name, model.language, languages)
    model, processor = one_text_side(model, processor, name)
    folded = texts_only = None
    try:
        folded = fold_language(model)
    except ValueError as error:  # its texts may go without its class
        text_map(model), plain_text_encoder(model)
        texts_only = str(error).partition(": take")[0]
    with replacing_folder(folder, partial(is_exported_folder, folder), "an export") as work:
        write_modules(model, processor, folded, work)
        opened = sentence_transformer(str(work), device="cpu")

        def embed(rows: list[str] | list[Image.Image]) -> torch.Tensor:
            return opened.encode(rows, convert_to_tensor=True, show_progress_bar=False)

        what, pictures = "sentence-transformers", None if folded is None else embed
        found = compare_embeddings(what, model, processor, embed, pictures, batch_size)
        base = (model.config.dual_encoder or {"name": name})["name"]
        notes = [f"texts alone: {texts_only}"] if folded is None else [PICTURES]
        if folded is not None:
            notes.append('pictures: `model.encode([Image.open("..."), ...])`')
        write_readme(work, what, model, base, found, report, SNIPPET.replace("FOLDER", str(folder)), notes)
    return {
        "model": name,
        "language": model.language,
        "verdict": report.get("verdict"),
        "compared": found,
        "texts_only": texts_only,
        "summary": summarize(found) + (f"\ntexts alone: {texts_only}" if texts_only else ""),
    }

"""What sentence-transformers reads beside a saved model: https://sbert.net (6.2, routing by modality)."""

import json
from pathlib import Path

from ..files import write_file


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
]


def modality_config(has_pictures: bool = True) -> dict[str, dict[str, str]]:
    """Return how a model that embeds texts, and pictures, in one space is called by the Transformer module."""
    call = {"text": "get_text_features"} | ({"image": "get_image_features"} if has_pictures else {})
    return {name: {"method": method, "method_output_name": "pooler_output"} for name, method in call.items()}


def write_sentence_transformers_files(directory: str | Path, has_pictures: bool = True):
    """Write what sentence-transformers reads: `SentenceTransformer(directory, trust_remote_code=True)` then encodes
    texts, and pictures where the model has a vision tower, to the embeddings of `get_text_features` and
    `get_image_features`."""
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": modality_config(has_pictures),
        "module_output_name": "sentence_embedding",
    }
    files = {
        "modules.json": MODULES,
        "sentence_bert_config.json": settings,
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        write_file(Path(directory, name), json.dumps(content, indent=2) + "\n")

"""Checkpoint files of the released implementation (arXiv 2208.12526), which are pickled: read with an allow-list
(tensors, numbers, the training options); anything else is refused.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig

from ..files import write_file
from ..loading.wheels import new_folder
from ..processing_nrccr import NrccrTextProcessor
from .conversion import OPTIONS, PARTS, convert_original_checkpoint, unwrap


# the options, and the numbers that the training loop kept (numpy 1 and 2 name their own differently)
ALLOWED = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
]

CARD = """---
library_name: transformers
tags: [sentence-similarity, image-text-retrieval, nrccr]
---
# Converted NRCCR checkpoint

Converted from a checkpoint of the released implementation of "Cross-Lingual Cross-Modal Retrieval with Noise-Robust
Learning" (Wang et al., ACM MM 2022, arXiv 2208.12526), with its published behaviour: padding is pooled, so an
embedding depends on the longest caption or video of its batch. It takes {visual}, as `visual_feats` of width {width}.
{tokenizer}
```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
```

Trained with: {options}
"""


def read_checkpoint(path: str | Path) -> dict:
    """Return `{"model": [state dicts], "opt": {options}, ...}` of a released file; ValueError for anything else."""
    try:
        with torch.serialization.safe_globals(ALLOWED):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = re.search(r"GLOBAL \S+|WeightsUnpickler error: .*", str(error))
        reason = reason.group() if reason else (str(error) or "empty").splitlines()[0]
        raise ValueError(f"{path} is refused: not a checkpoint of tensors, numbers and options ({reason})") from error
    if not isinstance(checkpoint, Mapping) or not {"model", "opt"} <= set(checkpoint):
        found = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"{path} holds {found}: a released checkpoint is a dict with 'model' and 'opt'")
    if not isinstance(checkpoint["model"], (list, tuple)):
        raise ValueError(
            f"'model' in {path} is a {type(checkpoint['model']).__name__}, not a list: {', '.join(PARTS)}"
        )
    options = checkpoint["opt"]
    return {**checkpoint, "opt": dict(options if isinstance(options, Mapping) else vars(options))}


def bert_config_of(text_encoder: Mapping[str, torch.Tensor]) -> dict:
    """Return the sizes of a BERT, read from its tensors; its heads are 64 wide, as in every published one. Raises
    ValueError for tensors of no such BERT."""
    sizes = {name.removeprefix("text_bert.text_bert."): t.shape for name, t in unwrap(text_encoder).items()}
    try:
        vocab_size, hidden_size = sizes["embeddings.word_embeddings.weight"]
        config = dict(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            max_position_embeddings=sizes["embeddings.position_embeddings.weight"][0],
            type_vocab_size=sizes["embeddings.token_type_embeddings.weight"][0],
            intermediate_size=sizes["encoder.layer.0.intermediate.dense.weight"][0],
            num_hidden_layers=len([name for name in sizes if name.endswith("attention.self.query.weight")]),
            num_attention_heads=hidden_size // 64,
        )
    except KeyError as error:
        raise ValueError(f"the text encoder has no {error}, so it is no BERT: give --text_config") from None
    if hidden_size % 64:
        raise ValueError(f"a text encoder of width {hidden_size} has no 64-wide heads: give --text_config")
    return config


def convert_original(
    path: str | Path, folder: str | Path, text_config: str | None = None, tokenizer: str | None = None
) -> str:
    """
    Write a released checkpoint as a folder that `AutoModel` loads; it appears whole, or not at all.

    Args:
        path: the `.pth.tar` file.
        folder: a new one.
        text_config: the text encoder's: hub id, folder or JSON file; default: as its tensors say, of a BERT.
        tokenizer: the text encoder's: hub id or folder; default: no processor is written.

    Returns:
        What is to be known of its processor, in a sentence.

    Raises:
        ValueError: `folder` is not empty, or the file is no checkpoint of that implementation.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a new folder")
    checkpoint = read_checkpoint(path)
    options, state_dicts = checkpoint["opt"], checkpoint["model"]
    if text_config:
        config, _ = PreTrainedConfig.get_config_dict(text_config)
    else:
        config = checkpoint.get("bert_config") or bert_config_of(state_dicts[1])
    model, _, _ = convert_original_checkpoint(state_dicts, options, config)
    note = "No tokenizer was given to the conversion, so there is no processor here."
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        if tokenizer:
            # as released: captions are lower-cased and lose their accents, though the vocabulary is cased
            words = AutoTokenizer.from_pretrained(tokenizer, do_lower_case=True, strip_accents=True)
            NrccrTextProcessor(words, visual_feat_dim=model.config.visual_feat_dim).save_pretrained(unfinished)
            note = "Its tokenizer lower-cases and strips accents, as in training."
        card = CARD.format(
            visual="videos" if options["model_type"] == "video" else "pictures",
            width=model.config.visual_feat_dim,
            tokenizer=f"{note}\n",
            folder=folder.name,
            options=", ".join(f"{name} {options[name]}" for name in OPTIONS),  # not its paths
        )
        write_file(unfinished / "README.md", card)
    return note

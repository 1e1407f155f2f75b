"""Loads a model of ours, or another dual encoder, with the languages that are asked for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor

from ..configuration_nrccr import NrccrConfig
from ..dual_encoders import read_config
from ..languages import LANGUAGE_FILE
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from .encoders import find_encoder


DTYPES = ("float32", "bfloat16", "float16")
BASE = "base"  # in the place of a language: no adapter, the model's own text side


def load_model(name: str, device: str | None = None, dtype: str | None = None) -> tuple[NrccrModel, NrccrProcessor]:
    """
    Load a trained model, or another dual encoder (see `from_dual_encoder`), ready to encode, and its processor.

    Args:
        name: folder or hub id.
        device: as torch names it; default: a GPU where there is one.
        dtype: of the weights: float32, bfloat16 or float16; default: as they were saved.

    Raises:
        ValueError: there is none, or no such device or type.
    """
    try:
        name = find_encoder(name)
        if read_config(name).model_type != NrccrConfig.model_type:  # CLIP, SigLIP 2, ...
            model, processor = NrccrModel.from_dual_encoder(name), NrccrProcessor.from_dual_encoder(name)
        else:
            model, processor = NrccrModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "" if Path(name).is_dir() else " (`make demo` trains outputs/demo)"
        raise ValueError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}{hint}") from error
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: there are {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:  # torch's own words for what is not there
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return model.eval(), processor


def language_code(spec: str) -> str | None:
    """Return the code of what `--language` takes, as the model knows it; None for the base's own language."""
    code = spec.partition("=")[0]
    return None if code == BASE else code


def load_with_languages(
    name: str, languages: Sequence[str], device: str | None = None, dtype: str | None = None
) -> tuple[NrccrModel, NrccrProcessor]:
    """
    Load a model as `load_model` does, and languages; the first of `languages` is the active one.

    Args:
        languages: as `--language` takes them: `CODE=FOLDER` or `CODE=FILE` of what `save_language` wrote, `CODE` of
            what the model has.

    Raises:
        ValueError: where there is no model, for a language that is not there, or was made for another model.
    """
    model, processor = load_model(name, device, dtype)
    for spec in reversed(languages):
        code, named, source = spec.partition("=")
        if not code or bool(named) != bool(source):
            raise ValueError(f"--language {spec!r}: give CODE of what the model has, or CODE=FOLDER")
        if source:
            path = Path(source)
            model.load_language(code, path.parent if path.name == LANGUAGE_FILE and path.is_file() else source)
        model.set_language(language_code(spec))
    return model, processor


def read_by(model: NrccrModel, target: str, languages: Sequence[str]) -> str | None:
    """Return which of the model's languages reads texts in `target`: of those that `--language` gave the one of that
    code, else the first; where none was given, the model's of that code, else the active one."""
    given = [language_code(spec) for spec in languages]
    if given:
        return target if target in given else given[0]
    return target if target in model.language_adapters else model.language

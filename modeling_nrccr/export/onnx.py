"""ONNX, text and pictures apart: `text.onnx` (`input_ids`, `attention_mask` -> `text_embeds`), `image.onnx`
(`pixel_values` -> `image_embeds`; of a model of features `visual_feats`, `visual_attention_mask`), with `int8` also
`text.int8.onnx` and `image.int8.onnx`, and the processor's files.

Batches and texts may have any size: random ones are compared with the model, and where two numbers are more than 1e-4
apart nothing is written.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_nrccr import NrccrConfig
from ..files import replacing_folder
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from .report import SUFFIXES, count_found, machine, measure
from .sides import Inputs, Side, compare, list_sides, one_text_side


TOLERANCE = 1e-4  # of float32: the largest difference between two numbers of an embedding of length 1


def load_onnx():
    try:
        import onnxruntime
        import onnxruntime.quantization as quantization
        import onnxscript  # noqa: F401  torch's exporter imports it
    except ImportError as error:
        raise ImportError('an export needs onnx and its runtime: pip install "modeling_nrccr[export]"') from error
    return onnxruntime, quantization


class OnnxModel(nn.Module):
    """
    Stands for a model by exported files: `encode_texts`, `encode_images` and an evaluation take it.

    Args:
        folder: of the files.
        config: of the model.
        sides: those that were exported.
        suffix: ".int8" for the quantized ones.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, config: NrccrConfig, sides: Sequence[Side], suffix: str = ""):
        super().__init__()
        onnxruntime, _ = load_onnx()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.config, self.suffix = config, suffix
        self.sessions = {
            side.name: onnxruntime.InferenceSession(
                folder / f"{side.name}{suffix}.onnx", options, providers=["CPUExecutionProvider"]
            )
            for side in sides
        }

    def embed(self, name: str, inputs: Inputs) -> torch.Tensor:
        """Return embeddings of shape `(batch, projection_dim)`; `name`: of the side."""
        (embeds,) = self.sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return torch.from_numpy(embeds)

    def get_text_features(self, **inputs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.embed("text", inputs))

    def get_image_features(self, **inputs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.embed("image", inputs))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say of steps that they left out; `compare` says whether that matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace(side: Side) -> torch.export.ExportedProgram:
    """Return the program of a side, for any batch."""
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} for axes in side.axes.values())
    inputs = side.draw(3, 5, torch.Generator().manual_seed(0))
    with quiet():
        # strict: otherwise `len(tensor)`, which the model's code says, is a constant
        return torch.export.export(side.module.eval(), tuple(inputs.values()), dynamic_shapes=shapes, strict=True)


def export_side(side: Side, program: torch.export.ExportedProgram, folder: Path):
    """Write `NAME.onnx`; above 1.5 GB its weights into a file beside it."""
    path = folder / f"{side.name}.onnx"
    names = {"input_names": list(side.axes), "output_names": [side.output]}
    with quiet():
        torch.onnx.export(
            program, f=path, dynamo=True, external_data=False, dynamic_shapes=side.axes, verbose=False, **names
        )


def quantize(side: Side, folder: Path):
    """Write `NAME.int8.onnx`: weights of linear layers and word embeddings in 8 bits, activations as they come."""
    _, quantization = load_onnx()
    path = folder / f"{side.name}.onnx"
    with quiet():
        quantization.quantize_dynamic(
            path,
            folder / f"{side.name}.int8.onnx",
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # convolutions would be slower: see docs/export.md
            use_external_data_format=path.with_suffix(".onnx.data").exists(),
        )


def is_exported(path: Path) -> bool:
    """Return whether a file may be of an export: a side, or what a processor is saved as."""
    return path.is_file() and path.name.endswith((".onnx", ".onnx.data", ".json", ".txt", ".model", ".jinja", ".py"))


def write_onnx(
    model: NrccrModel,
    processor: NrccrProcessor,
    sides: Sequence[Side],
    folder: Path,
    int8: bool = False,
    torch_export: Path | None = None,
) -> dict[str, dict[str, float]]:
    """
    Write all files, or none, and leave none of an earlier export.

    Args:
        sides: of `list_sides`.
        torch_export: folder for the `.pt2` archives, outside `folder`.

    Returns:
        By file what `compare` found: `{"text.onnx": {"max_difference": ..., "min_cosine": ...}, ...}`.

    Raises:
        ValueError: where a file in float32 gives other embeddings than the model; or `folder` holds what is no export.
    """
    load_onnx()
    if torch_export is not None and torch_export.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"torch_export {torch_export} lies in {folder}: .pt2 archives may hold pickled parts, which a published "
            "folder must not. Name a folder elsewhere"
        )
    found, programs = {}, {}
    with replacing_folder(folder, is_exported, "an export") as work, model.lora(model.language):
        for side in sides:
            programs[side.name] = trace(side)
            export_side(side, programs[side.name], work)
            if int8:
                quantize(side, work)
        for suffix in SUFFIXES.values() if int8 else ("",):
            onnx = OnnxModel(work, model.config, sides, suffix)
            for side in sides:
                file = f"{side.name}{suffix}.onnx"
                difference, cosine = compare(side, onnx.embed)
                found[file] = {"max_difference": difference, "min_cosine": cosine}
                if not suffix and not difference <= TOLERANCE:  # also where it is no number
                    raise ValueError(
                        f"{file} differs by {difference:.1e} from the model, more than {TOLERANCE}: "
                        "nothing was written; try another version of torch or onnxruntime"
                    )
        processor.save_pretrained(work)
    if torch_export is not None:
        torch_export.mkdir(parents=True, exist_ok=True)
        for name, program in programs.items():
            torch.export.save(program, torch_export / f"{name}.pt2")
    return found


def export_onnx(
    model: NrccrModel,
    processor: NrccrProcessor,
    folder: str | Path,
    name: str,
    sides: Sequence[str] = ("text", "image"),
    int8: bool = False,
    torch_export: str | Path | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    query_language: str | None = None,
    batch_size: int = 32,
) -> dict:
    """
    Export a model, measure each file beside it, and test each on human captions where there are some.

    Args:
        model: in float32, on the CPU; its active language reads the texts.
        name: of the model, as it was loaded.
        sides: of "text", "image".
        int8: also with weights of 8 bits.
        torch_export: folder for the programs of `torch.export`, `.pt2` archives, outside `folder`.
        data: builders of `datasets_scripts`, joined by "+", on whose test split each file is tested.
        query_language: of that test; default: the active language.

    Returns:
        What `format_report` shows.

    Raises:
        ValueError: the model cannot be exported so, or a file gives other embeddings than the model.
    """
    load_onnx()
    if data is None and (data_dir or query_language):
        raise ValueError("data_dir and query_language are of a test: name its data set, --data")
    if data is not None and not (query_language := query_language or model.language):
        raise ValueError("name the language of the queries that each file is tested with: --query_language CODE")
    model, processor = one_text_side(model, processor, name)
    folder, parts = Path(folder), list_sides(model, processor, sides)
    compared = write_onnx(model, processor, parts, folder, int8, torch_export and Path(torch_export))
    engines = {
        engine: OnnxModel(folder, model.config, parts, suffix)
        for engine, suffix in SUFFIXES.items()
        if int8 or not suffix
    }
    models = {"torch": model} | engines
    return {
        "model": name,
        "language": model.language,
        "data": data,
        "query_language": query_language if data else None,
        "compared": compared,
        "rows": measure(parts, folder, engines),
        "sum_recall": count_found(name, models, processor, data, query_language, data_dir, batch_size) if data else {},
        "machine": machine(),
    }

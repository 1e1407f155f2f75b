"""Exports a model to ONNX, text and pictures apart, and shows that nothing changed:

    python examples/export_onnx.py outputs/demo outputs/demo-onnx --int8

writes `text.onnx` (`input_ids`, `attention_mask` -> `text_embeds`), `image.onnx` (`pixel_values` -> `image_embeds`; of
a model of features `visual_feats`, `visual_attention_mask`), with `--int8` also `text.int8.onnx` and
`image.int8.onnx`, and the processor's files. Batches and texts may have any size: random ones are compared with the
model, and where two numbers are more than 1e-4 apart nothing is written. A file reads texts in one language, the
model's or `--language gl` (`gl=FOLDER` for one of add_language.py). `--dataset` counts what each file finds,
`--report` keeps the numbers.

`--torch_export FOLDER` writes `text.pt2` and `image.pt2` for `torch.export.load`: elsewhere, since these archives may
hold pickled parts, and a folder that is published holds none. See docs/export.md.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..cli.common import command
from ..configuration_nrccr import NrccrConfig
from ..data.load import load_caption_dataset
from ..data.trained_split import check_unseen, source_captions, split_seed
from ..files import replacing_folder, write_file
from ..loading.models import load_with_languages
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor
from ..publishing.tables import markdown_table
from ..retrieval.evaluation import evaluate_dataset


TOLERANCE = 1e-4  # of float32: the largest difference between two numbers of an embedding of length 1
BATCHES = ((1, 1), (1, 16), (2, 3), (7, 11), (33, 16))  # size and length; from 32 the model groups texts by length
SUFFIXES = {"onnx": "", "onnx int8": ".int8"}  # of files, by engine
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
Inputs = dict[str, torch.Tensor]


def load_onnx():
    try:
        import onnxruntime
        import onnxruntime.quantization as quantization
        import onnxscript  # noqa: F401  torch's exporter imports it
    except ImportError as error:
        raise ImportError('an export needs onnx and its runtime: pip install "modeling_nrccr[export]"') from error
    return onnxruntime, quantization


# --------------------------------------------------------------------------------------------------------- the sides


class TextSide(nn.Module):
    """`NrccrModel.get_text_features` of one language, without what depends on the number of rows and their lengths."""

    def __init__(self, model: NrccrModel):
        super().__init__()
        self.tower, self.head, self.projection = model.text_tower, model.text_head, model.text_projection
        self.adapter = nn.Identity() if model.language is None else model.language_adapters[model.language]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.tower(input_ids, attention_mask)
        return self.projection(self.adapter(self.head(states, attention_mask)))


class ImageSide(nn.Module):
    def __init__(self, model: NrccrModel):
        super().__init__()
        self.tower, self.head, self.projection = model.visual_tower, model.visual_head, model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.tower(pixel_values)
        return self.projection(self.head(features, features.new_ones(features.shape[:2])))


class FeatureSide(nn.Module):
    def __init__(self, model: NrccrModel):
        super().__init__()
        self.head, self.projection = model.visual_head, model.visual_projection

    def forward(self, visual_feats: torch.Tensor, visual_attention_mask: torch.Tensor) -> torch.Tensor:
        return self.projection(self.head(visual_feats, visual_attention_mask))


@dataclass
class Side:
    """
    What becomes a file.

    Args:
        name: of the file.
        output: name of the embeddings in it, of shape `(batch, projection_dim)`.
        module: takes the inputs by position.
        axes: names of each input's dynamic axes, by axis.
        draw: random inputs of a size and length.
        embed: what the model itself makes of them.
    """

    name: str
    output: str
    module: nn.Module
    axes: dict[str, dict[int, str]]
    draw: Callable[[int, int, torch.Generator], Inputs]
    embed: Callable[[Inputs], torch.Tensor]


def list_sides(model: NrccrModel, processor: NrccrProcessor, wanted: Sequence[str]) -> list[Side]:
    """Those of `wanted` that the model has. Raises ValueError for a tower that cannot be exported."""
    config, fixed = model.config, model.config.text_length
    exported = model
    if model.has_lora(model.language):  # a copy, as what is compared with it stays as it was
        exported = deepcopy(model).merge_language(model.language)

    def draw_text(size: int, length: int, generator: torch.Generator) -> Inputs:
        length = fixed or min(length, processor.max_text_length)
        pad = processor.tokenizer.pad_token_id
        ids = torch.randint(config.text_config.vocab_size, (size, length), generator=generator)
        ids[ids == pad] = 1 if pad == 0 else 0  # some encoders number the places of what is no padding
        if fixed:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        mask = mask.flip(1) if processor.tokenizer.padding_side == "left" else mask
        return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}

    def draw_image(size: int, length: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(size, *shape, generator=generator)}

    def draw_features(size: int, length: int, generator: torch.Generator) -> Inputs:
        mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=generator)).long()
        mask[0] = 1
        return {
            "visual_feats": torch.randn(size, length, config.visual_feat_dim, generator=generator) * mask[..., None],
            "visual_attention_mask": mask,
        }

    def embed_text(inputs: Inputs) -> torch.Tensor:
        return model.get_text_features(**inputs).pooler_output

    def embed_image(inputs: Inputs) -> torch.Tensor:
        return model.get_image_features(**inputs).pooler_output

    axes = {0: "batch"} if fixed else {0: "batch", 1: "length"}
    axes = {"input_ids": axes, "attention_mask": axes}
    sides = [Side("text", "text_embeds", TextSide(exported), axes, draw_text, embed_text)]
    if "image" in wanted and model.visual_tower is not None:
        inputs = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        if set(inputs) != {"pixel_values"}:
            raise ValueError(
                f"{type(model.visual_tower.encoder).__name__} reads pictures of any shape ({', '.join(inputs)}): its "
                "positions depend on each, and no exporter can follow. Export its texts alone: --sides text"
            )
        shape, axes = inputs["pixel_values"].shape[1:], {"pixel_values": {0: "batch"}}
        sides.append(Side("image", "image_embeds", ImageSide(exported), axes, draw_image, embed_image))
    elif "image" in wanted and model.visual_head is not None:
        axes = {0: "batch", 1: "frames"}
        axes = {"visual_feats": axes, "visual_attention_mask": axes}
        sides.append(Side("image", "image_embeds", FeatureSide(exported), axes, draw_features, embed_image))
    sides = [side for side in sides if side.name in wanted]
    if not sides:
        raise ValueError(f"This model has no side of {', '.join(wanted)}: export its texts, --sides text")
    return sides


# ------------------------------------------------------------------------------------------------------------ export


class OnnxModel(nn.Module):
    """
    Exported files in the place of a model: `encode_texts`, `encode_images` and an evaluation take it.

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
        """Of shape `(batch, projection_dim)`; `name`: of the side."""
        (embeds,) = self.sessions[name].run(None, {key: value.numpy() for key, value in inputs.items()})
        return torch.from_numpy(embeds)

    def get_text_features(self, **inputs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.embed("text", inputs))

    def get_image_features(self, **inputs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.embed("image", inputs))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of steps that they left out; `compare` says whether that matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace(side: Side) -> torch.export.ExportedProgram:
    """The program of a side, for any batch."""
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} for axes in side.axes.values())
    inputs = side.draw(3, 5, torch.Generator().manual_seed(0))
    with quiet():
        # strict: otherwise `len(tensor)`, which the model's code says, is a constant
        return torch.export.export(side.module.eval(), tuple(inputs.values()), dynamic_shapes=shapes, strict=True)


def export_side(side: Side, program: torch.export.ExportedProgram, folder: Path):
    """Writes `NAME.onnx`; above 1.5 GB its weights into a file beside it."""
    path = folder / f"{side.name}.onnx"
    names = {"input_names": list(side.axes), "output_names": [side.output]}
    with quiet():
        torch.onnx.export(
            program, f=path, dynamo=True, external_data=False, dynamic_shapes=side.axes, verbose=False, **names
        )


def quantize(side: Side, folder: Path):
    """Writes `NAME.int8.onnx`: weights of linear layers and word embeddings in 8 bits, activations as they come."""
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


@torch.no_grad()
def compare(side: Side, onnx: OnnxModel) -> tuple[float, float]:
    """The largest difference to the model's embeddings, and the lowest cosine, over `BATCHES` of random inputs."""
    largest, cosine = 0.0, 1.0
    for seed, (size, length) in enumerate(BATCHES):
        inputs = side.draw(size, length, torch.Generator().manual_seed(seed))
        expected, given = side.embed(inputs), onnx.embed(side.name, inputs)
        largest = max(largest, float((expected - given).abs().max()))
        cosine = min(cosine, float((expected * given).sum(1).min()))
    return largest, cosine


def is_exported(path: Path) -> bool:
    """Whether a file may be of an export: a side, or what a processor is saved as."""
    return path.is_file() and path.name.endswith((".onnx", ".onnx.data", ".json", ".txt", ".model", ".jinja", ".py"))


def export(
    model: NrccrModel,
    processor: NrccrProcessor,
    sides: Sequence[Side],
    folder: Path,
    int8: bool = False,
    torch_export: Path | None = None,
) -> dict[str, dict[str, float]]:
    """
    Writes all files, or none, and leaves none of an earlier export.

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
            f"--torch_export {torch_export} lies in {folder}: .pt2 archives may hold pickled parts, which a published "
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
                difference, cosine = compare(side, onnx)
                found[file] = {"max_difference": difference, "min_cosine": cosine}
                print(f"{file}: largest difference to the model {difference:.1e}, lowest cosine {cosine:.6f}")
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


# ------------------------------------------------------------------------------------------------------------ report


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int = 40) -> dict[str, float]:
    """The median of each; they take turns, so that what else the machine does slows down all alike."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(each[3:]) for name, each in times.items()}


@torch.no_grad()
def measure(sides: list[Side], folder: Path, engines: dict[str, OnnxModel]) -> list[dict]:
    """Size, and latency of one input and of 32 (texts of 12 tokens), of each side in torch and each engine."""
    rows = []
    for side in sides:
        sizes, ways = {"torch": sum(p.nbytes for p in side.module.parameters())}, {"torch": side.embed}
        for engine, onnx in engines.items():
            sizes[engine] = sum(path.stat().st_size for path in folder.glob(f"{side.name}{onnx.suffix}.onnx*"))
            ways[engine] = partial(onnx.embed, side.name)
        one, many = (side.draw(size, 12, torch.Generator().manual_seed(0)) for size in (1, 32))
        ms_1, ms_32 = (milliseconds({k: partial(embed, x) for k, embed in ways.items()}) for x in (one, many))
        for engine, size in sizes.items():
            times = {"ms_1": ms_1[engine], "ms_32": ms_32[engine]}
            rows.append({"side": side.name, "engine": engine, "megabytes": size / 1e6} | times)
    return rows


def count_found(name: str, models: dict[str, nn.Module], processor: NrccrProcessor, args) -> dict[str, float]:
    """SumR of the human test captions of `args.dataset` by model; `name`: of the folder of the trained one."""
    options = {"data_dir": args.data_dir} if args.data_dir else {}
    test = load_caption_dataset(args.dataset, args.target, split_seed(name, None, args.dataset), **options)["test"]
    check_unseen(name, source_captions(test), f"the test of {args.dataset}")
    results = {key: evaluate_dataset(model, processor, test, show_progress=False) for key, model in models.items()}
    return {key: result["all"]["metrics"]["sum_recall"] for key, result in results.items()}


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def format_report(report: dict) -> str:
    """As Markdown."""
    machine, versions = report["machine"], ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    head = ["", "MB", "one, ms", "32, ms", "largest difference", "lowest cosine"]
    lines = []
    for row in report["rows"]:
        found = report["compared"].get(f"{row['side']}{SUFFIXES.get(row['engine'])}.onnx")
        found = [f"{found['max_difference']:.0e}", f"{found['min_cosine']:.4f}"] if found else ["", ""]
        numbers = [f"{row['megabytes']:.0f}", f"{row['ms_1']:.1f}", f"{row['ms_32']:.0f}"]
        lines.append([f"{row['side']}, {row['engine']}", *numbers, *found])
    parts = [markdown_table(head, lines)]
    parts.append(
        f"\n{machine['cpu']}, {machine['cores']} cores (load average {machine['load_average']}), "
        f"{machine['threads']} thread(s); {versions}."
    )
    if report["sum_recall"]:
        values = ", ".join(f"{engine} {value:.1f}" for engine, value in report["sum_recall"].items())
        parts.append(f"SumR of {report['dataset']}, human {report['target']} queries: {values}.")
    return "\n".join(parts)


@command()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0].rstrip(":"), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder or hub id of a trained model, or of a dual encoder such as CLIP")
    parser.add_argument("output", help="folder of the files")
    parser.add_argument("--language", help="whose adapter reads texts: CODE, or CODE=FOLDER of add_language.py")
    parser.add_argument("--sides", nargs="+", default=["text", "image"], choices=["text", "image"])
    parser.add_argument("--int8", action="store_true", help="also with weights of 8 bits")
    parser.add_argument("--torch_export", type=Path, help="folder for torch.export programs, not within the output")
    parser.add_argument("--dataset", help='test each file on it: builders, joined by "+", such as tuxpaint+cldr_emoji')
    parser.add_argument("--data_dir", help="folder of its data; fetched where not given")
    parser.add_argument("--target", default="gl", help="language of the data set's queries")
    parser.add_argument("--report", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args(argv)
    run(args)


def run(args: argparse.Namespace):
    load_onnx()
    model, processor = load_with_languages(args.model, [args.language] if args.language else [])
    if model.source_text_side is not None:
        if model.language is None:
            raise ValueError(
                f"{args.model} reads its source language by the text side of its base: export that base, or name the "
                "language whose side is exported, --language CODE"
            )
        model, processor = model.language_side(), processor.language_side()
    folder = Path(args.output)
    sides = list_sides(model, processor, args.sides)
    compared = export(model, processor, sides, folder, args.int8, args.torch_export)
    engines = {
        engine: OnnxModel(folder, model.config, sides, suffix)
        for engine, suffix in SUFFIXES.items()
        if args.int8 or not suffix
    }
    report = {
        "model": args.model,
        "language": model.language,
        "dataset": args.dataset,
        "target": args.target,
        "compared": compared,
        "rows": measure(sides, folder, engines),
        "sum_recall": count_found(args.model, {"torch": model} | engines, processor, args) if args.dataset else {},
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(f"\n{format_report(report)}")
    if args.report:
        write_file(args.report, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

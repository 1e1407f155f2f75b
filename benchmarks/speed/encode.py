"""Embeddings of 2,000 captions beside sentence-transformers' `encode`, and of 2,000 pictures beside a DataLoader over
`AutoModel`, same weights, same results:

    python -m benchmarks.speed.encode --captions ../shared/data/multi30k --output benchmarks/results/speed.jsonl

Captions: the first training captions of Multi30K in four languages. Pictures: stamps and emoji as PNG files. On an
accelerator: `--bf16`, of both sides, and `--count 8000`; `--folder` keeps what was prepared for a machine without
network.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import (
    bandwidth,
    best_time,
    clock,
    device,
    encoder_operations,
    in_turns,
    machine,
    matmul_rate,
    peak_gigabytes,
    rates,
    save_report,
)


LANGUAGES = ("en", "de", "fr", "cs")
# each peer at the sizes that its users meet: the fastest one counts
CAPTION_SIDES = ["captions", "sentence-transformers 32", "sentence-transformers 128"]
PICTURE_SIDES = ["pictures", "dataloader 0", "dataloader 2"]
if device().type != "cpu":
    CAPTION_SIDES += ["sentence-transformers 1024"]
    PICTURE_SIDES += ["dataloader 8"]


def prepare(captions: str | None, count: int, folder: Path):
    """Writes what both sides read, where it is not there yet: captions as JSON, pictures as files, and models."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "captions.json").exists():
        prepare_captions(captions, count, folder)
    if not (folder / "pictures").is_dir():
        prepare_pictures(count, folder)
    if not (folder / "dual").is_dir():
        prepare_models(folder)


def prepare_captions(captions: str | None, count: int, folder: Path):
    from datasets_scripts.multi30k import Multi30k

    texts = []
    for language in LANGUAGES[1:]:
        builder = Multi30k(config_name=f"task1-{language}", data_dir=captions)
        builder.download_and_prepare()
        train = builder.as_dataset()["train"][: count // len(LANGUAGES)]
        texts += train["source_caption"] if language == LANGUAGES[1] else []
        rows = Multi30k(config_name=f"task1-{language}", data_dir=captions, target="human")
        rows.download_and_prepare()
        texts += rows.as_dataset()["train"][: count // len(LANGUAGES)]["target_caption"]
    (folder / "captions.json").write_text(json.dumps(texts))


def prepare_pictures(count: int, folder: Path):
    from modeling_nrccr.data.load import load_caption_dataset

    (folder / "pictures").mkdir()
    dataset = load_caption_dataset("tuxpaint+cldr_emoji")
    images = [image for split in dataset.values() for image in split["image"]]
    for number, image in enumerate(images[:count]):
        image.save(folder / "pictures" / f"{number:04}.png")


def prepare_models(folder: Path):
    from benchmarks.translation.multi30k_text import text_model
    from modeling_nrccr.loading.encoders import find_encoder

    for name, (model, processor) in (
        ("text", text_model(find_encoder("multilingual-e5-small"))),
        ("dual", picture_side()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def timed(run: Callable, items: list) -> tuple[float, torch.Tensor]:
    """Return the seconds and the result of `run(items)`, after a first call that warms up."""
    run(items[:96] if device().type == "cpu" else items)
    start = clock()
    embeds = run(items)
    return clock() - start, embeds.float().cpu()


def load_ours(folder: Path, dtype: torch.dtype):
    """Load our model as who only encodes does: `search.load_model` brings the retriever, whose imports would count as
    memory."""
    from transformers import AutoProcessor

    from modeling_nrccr import NrccrModel

    return NrccrModel.from_pretrained(folder).eval().to(device(), dtype), AutoProcessor.from_pretrained(folder)


def captions_of_ours(folder: Path, dtype: torch.dtype) -> tuple[float, torch.Tensor, dict]:
    from modeling_nrccr import encode_texts

    texts = json.loads((folder / "captions.json").read_text())
    model, processor = load_ours(folder / "text", dtype)
    seconds, embeds = timed(lambda part: encode_texts(model, part, processor), texts)
    lengths = torch.tensor([len(processor.tokenizer(f"query: {text}")["input_ids"]) for text in set(texts)])
    reached = rates(seconds, lengths, encoder_operations(lengths, 384, 12), 384, dtype)
    return seconds, embeds, reached | {"tokens": int(lengths.sum()), "captions": len(texts)}


def captions_of_peer(folder: Path, dtype: torch.dtype, batch_size: int) -> tuple[float, torch.Tensor, dict]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    from modeling_nrccr.loading.encoders import find_encoder

    texts = json.loads((folder / "captions.json").read_text())
    transformer = Transformer(find_encoder("multilingual-e5-small"))
    pooling = Pooling(transformer.get_word_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device())).to(dtype)
    seconds, embeds = timed(
        lambda part: model.encode(part, prompt="query: ", batch_size=batch_size, convert_to_tensor=True), texts
    )
    return seconds, embeds, {}


def picture_model():
    from transformers import AutoImageProcessor, AutoModel

    import modeling_nrccr  # noqa: F401  (registers the tower)
    from modeling_nrccr.loading.encoders import find_encoder

    encoder = find_encoder("efficientnet-lite0")
    tower = AutoModel.from_pretrained(encoder).eval().to(device())
    return tower, AutoImageProcessor.from_pretrained(encoder), encoder


def picture_side():
    """Return a model of ours that gives the tower's features, normalised, and its processor."""
    from transformers import AutoTokenizer

    from modeling_nrccr import NrccrModel, NrccrProcessor
    from modeling_nrccr.loading.encoders import find_encoder

    _, image_processor, encoder = picture_model()
    text_encoder = find_encoder("multilingual-e5-small")
    model = NrccrModel.from_encoders(
        text_encoder, encoder, text_head="pooling", visual_head="pooling", projection_dim=1280, teacher_view="source"
    )
    torch.nn.init.eye_(model.visual_projection.dense.weight)
    torch.nn.init.zeros_(model.visual_projection.dense.bias)
    return model, NrccrProcessor(AutoTokenizer.from_pretrained(text_encoder), image_processor, pad_to_square=False)


def pictures_of_ours(folder: Path, dtype: torch.dtype) -> tuple[float, torch.Tensor, dict]:
    from modeling_nrccr import encode_images

    tower, image_processor, _ = picture_model()
    model, processor = load_ours(folder / "dual", dtype)
    files = [str(path) for path in sorted((folder / "pictures").iterdir())]
    seconds, embeds = timed(lambda part: encode_images(model, part, processor), files)
    pixels = image_processor(images=[torch.zeros(3, 128, 128)] * 32, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(device(), dtype)
    tower.to(dtype)
    with torch.inference_mode():
        tower_alone = min(best_time(lambda size=size: tower(pixels[:size])) / size for size in (8, 16, 32))
    return (
        seconds,
        embeds,
        {
            "floor_seconds": tower_alone * len(files),
            "pictures": len(files),
            "pictures_per_second": round(len(files) / seconds),
        },
    )


def pictures_of_peer(folder: Path, dtype: torch.dtype, workers: int) -> tuple[float, torch.Tensor, dict]:
    from torch.utils.data import DataLoader

    from modeling_nrccr.media import load_image  # the same pixels

    model, processor, _ = picture_model()
    model.to(dtype)
    files = [str(path) for path in sorted((folder / "pictures").iterdir())]

    def collate(batch: list[str]):
        return processor(images=[load_image(name) for name in batch], return_tensors="pt")

    def run(part: list[str]) -> torch.Tensor:
        loader = DataLoader(part, batch_size=32, num_workers=workers, collate_fn=collate)
        with torch.inference_mode():
            parts = [model(**batch.to(device(), dtype)).pooler_output for batch in loader]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    return *timed(run, files), {}


def run_side(side: str, folder: Path, dtype: torch.dtype):
    name, _, size = side.partition(" ")
    run = {
        "captions": captions_of_ours,
        "sentence-transformers": captions_of_peer,
        "pictures": pictures_of_ours,
        "dataloader": pictures_of_peer,
    }[name]
    seconds, embeds, more = run(folder, dtype, *([int(size)] if size else []))
    torch.save(embeds, folder / f"{side}.pt")
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gigabytes()} | more))


def compare(sides: list[str], folder: Path, rounds: int, bf16: bool) -> dict:
    ours, *peers = sides
    found = in_turns(__spec__.name, sides, rounds, ("--folder", str(folder), *(["--bf16"] if bf16 else [])))
    peer = min(peers, key=lambda side: found[side]["seconds"])
    embeds = [torch.load(folder / f"{side}.pt", weights_only=True) for side in (ours, peer)]
    return {
        "peer": peer,
        "ratio": round(found[ours]["seconds"] / found[peer]["seconds"], 3),
        "memory_ratio": round(found[ours]["peak_gb"] / found[peer]["peak_gb"], 3),
        "over_floor": round(found[ours]["seconds"] / found[ours]["floor_seconds"], 3),
        "largest_difference": float((embeds[0] - embeds[1]).abs().max()),
        "sides": found,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    parser.add_argument("--captions", help="folder of Multi30K's text; downloaded where not given")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many processes counts")
    parser.add_argument("--only", choices=("captions", "pictures"))
    parser.add_argument("--bf16", action="store_true", help="of both sides")
    parser.add_argument("--folder", type=Path, help="of what is encoded; prepared where it is not there, and kept")
    parser.add_argument("--output", help="file of JSON lines that gets the report")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if args.side:
        return run_side(args.side, args.folder, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        prepare(args.captions, args.count, folder)
        report = machine() | {
            "dtype": str(dtype),
            "bandwidth_gb_s": round(bandwidth() / 1e9, 1),
            "matmul_gflop_s": round(matmul_rate(384, dtype) / 1e9, 1),
        }
        for name, sides in (("captions", CAPTION_SIDES), ("pictures", PICTURE_SIDES)):
            if args.only in (None, name):
                report[name] = compare(sides, folder, args.rounds, args.bf16)
    print(json.dumps(report, indent=1))
    if args.output:
        save_report(args.output, "encode", report)


if __name__ == "__main__":
    main()

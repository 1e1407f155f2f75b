"""Indexing 5,000 small pictures by `nrccr index`, beside an older revision of this repository, in turns:

    python -m benchmarks.speed.index --before 16d10b6

Prints the ratio of the best times: of a first run, and of a second one, which finds nothing new. The model is tiny and
of random weights, so that the time is that of reading, hashing, decoding, writing and saving.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import ROOT


MODEL = """
import sys
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil
from modeling_nrccr import EfficientNetLiteConfig, NrccrConfig, NrccrModel, NrccrProcessor
torch.manual_seed(0)
text = dict(vocab_size=7, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=9)
vision = EfficientNetLiteConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_size=37, image_size=32)
NrccrModel(NrccrConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(sys.argv[1])
backend = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
NrccrProcessor(tokenizer, ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(sys.argv[1])
"""


def unpack(revision: str, folder: Path):
    content = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")


def draw(gallery: Path, count: int):
    """Write pictures of 64 x 48 pixels, a hundred to a folder, of which every fifth is a PNG and the others are
    JPEGs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        folder = gallery / f"{number // 100:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.{'jpg' if number % 5 else 'png'}")


def run(tree: Path, arguments: list[str], cache: Path) -> np.ndarray:
    """Return the seconds of a command by the code of `tree`, and those that processors spent on it."""
    environment = os.environ | {"PYTHONPATH": str(tree), "NRCCR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([time.perf_counter() - started, spent])


def index_command(tree: Path, model: str, gallery: str, index: str) -> list[str]:
    """Return the command that indexes a folder, as the revision in `tree` has it."""
    if (script := tree / "examples/index_gallery.py").exists():
        return [str(script), "--model", model, "--gallery", gallery, "--index", index]
    return ["-m", "modeling_nrccr", "index", model, gallery, index]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("--before", required=True, help="the older revision, as git knows it")
    parser.add_argument("--count", type=int, default=5_000, help="pictures")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns; the best counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        unpack(args.before, work / "before")
        draw(work / "gallery", args.count)
        run(work / "before", ["-c", MODEL, str(work / "model")], work / "cache")
        seconds = {}
        for number in range(args.rounds):
            for name, tree in (("before", work / "before"), ("now", ROOT)):
                index = work / f"index {name} {number}"
                command = index_command(tree, *map(str, (work / "model", work / "gallery", index)))
                for kind in ("first", "second"):
                    seconds.setdefault((kind, name), []).append(run(tree, command, work / "cache"))
    for kind in ("first", "second"):
        best = {name: np.min(seconds[kind, name], axis=0) for name in ("now", "before")}
        for number, what in enumerate(("time", "processor time")):
            now, before = best["now"][number], best["before"][number]
            print(
                f"{kind} run over {args.count:,} pictures, {what}: {now:.1f} s, {args.before} {before:.1f} s, "
                f"ratio {now / before:.2f}"
            )


if __name__ == "__main__":
    main()

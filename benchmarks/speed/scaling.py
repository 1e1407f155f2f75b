"""How cost grows: seconds of encoding by captions, pictures, tokens of a caption and processes, with the slope of each
on logarithmic axes (1: linear), and what they say of 10 million pictures and 100 million captions:

    python -m benchmarks.speed.scaling
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.machine import SPEED, machine, peak_gigabytes, save_report


CAPTIONS, PICTURES, TOKENS, PROCESSES = (
    (250, 500, 1000, 2000, 4000),
    (125, 250, 500, 1000),
    (8, 16, 32, 64, 128, 256),
    (1, 2),
)
TEXTS = 250  # of each length


def captions(count: int, words: int, seed: int = 0) -> list[str]:
    """Return `count` different texts of that many common words (about 1.4 tokens each)."""
    from datasets_scripts.reading.wordnet import common_words

    draw, known = random.Random(seed), common_words(2000)
    return [" ".join(draw.choice(known) for _ in range(words)) for _ in range(count)]


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def slope(points: dict[int, float]) -> float:
    """Return the slope of the straight line through the points on logarithmic axes, by least squares."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def measure(folder: Path) -> dict[str, dict[int, float]]:
    from benchmarks.translation.multi30k_text import text_model
    from modeling_nrccr import encode_images, encode_texts
    from modeling_nrccr.data.load import load_caption_dataset
    from modeling_nrccr.loading.encoders import find_encoder
    from modeling_nrccr.loading.models import load_model

    model, processor = text_model(find_encoder("multilingual-e5-small"))
    processor.max_text_length = 512
    encode_texts(model, captions(50, 8), processor)
    found = {"captions": {}, "tokens of a caption": {}, "pictures": {}, "processes": {}}
    for count in CAPTIONS:
        texts = captions(count, 8)
        found["captions"][count] = seconds(lambda texts=texts: encode_texts(model, texts, processor))
    for tokens in TOKENS:
        texts = captions(TEXTS, max(1, round((tokens - 4) / 1.4)))
        found["tokens of a caption"][tokens] = seconds(lambda texts=texts: encode_texts(model, texts, processor))
    dataset = load_caption_dataset("tuxpaint+cldr_emoji")["train"]
    for number in range(max(PICTURES)):
        dataset[number]["image"].save(folder / f"{number:04}.png")
    files = [str(path) for path in sorted(folder.iterdir())]
    model, processor = load_model(str(ROOT / "outputs/demo"))
    encode_images(model, files[:64], processor)
    for count in PICTURES:
        found["pictures"][count] = seconds(lambda count=count: encode_images(model, files[:count], processor))
    for processes in PROCESSES:
        index = folder.parent / f"index{processes}"
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command = [*launcher, "-m", "modeling_nrccr", "index", str(ROOT / "outputs/demo"), str(folder), str(index)]
        start = time.perf_counter()
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        found["processes"][processes] = time.perf_counter() - start
    return found


def on_paper(found: dict[str, dict[int, float]], dim: int = 512) -> dict:
    """Reckon 10 million pictures and 100 million captions on machines like this one, from the dearest measured
    point."""
    a_picture = found["pictures"][max(PICTURES)] / max(PICTURES)
    a_caption = found["captions"][max(CAPTIONS)] / max(CAPTIONS)
    return {
        "pictures_hours_on_one": round(1e7 * a_picture / 3600, 1),
        "captions_hours_on_one": round(1e8 * a_caption / 3600, 1),
        "machines_for_a_day": math.ceil((1e7 * a_picture + 1e8 * a_caption) / 86_400),
        "index_gigabytes": round(1e7 * dim * 4 / 1e9, 1),
        "cached_states_gigabytes": round(1e8 * 384 * 4 / 1e9, 1),
    }


def figure(found: dict[str, dict[int, float]], path: Path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(figsize=(6.5, 4.5))
    for (name, points), marker in zip(found.items(), "osD^"):
        axes.loglog(list(points), list(points.values()), marker=marker, label=f"{name} (slope {slope(points):.2f})")
    axes.set_xlabel("how many")
    axes.set_ylabel("seconds, two cores")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    drawn.savefig(path.with_suffix(".tmp.png"), dpi=150, bbox_inches="tight")
    os.replace(path.with_suffix(".tmp.png"), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    parser.add_argument("--output", type=Path, default=SPEED, help="file of JSON lines; beside it scaling.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "pictures")
        folder.mkdir()
        found = measure(folder)
    report = machine() | {
        "seconds": {name: {x: round(y, 3) for x, y in points.items()} for name, points in found.items()},
        "slopes": {name: round(slope(points), 3) for name, points in found.items()},
        "on_paper": on_paper(found),
        "peak_gb": round(peak_gigabytes(), 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=1))
    save_report(args.output, "scaling", report)
    figure(found, args.output.with_name("scaling.png"))


if __name__ == "__main__":
    main()

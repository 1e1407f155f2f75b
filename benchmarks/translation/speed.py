"""Translations per second against a plain loop over the same engine, one caption a call, in one run:

    python -m benchmarks.translation.speed --model FOLDER_OF_A_SEQ2SEQ_MODEL

Captions are the English ones of Tux Paint's stamps, all distinct; Debian packages are fetched. Without `--model`, the
engines are Apertium and the dictionary. Loop and batches take turns; the best round of each counts, since a busy
machine only ever makes them slower. Writes docs/translation_speed.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import ROOT
from modeling_nrccr.files import write_file


RESULT = ROOT / "docs/translation_speed.json"


def stamp_captions(count: int) -> list[str]:
    from datasets_scripts.tuxpaint import Tuxpaint

    builder = Tuxpaint(config_name="gl")
    builder.download_and_prepare()
    splits = builder.as_dataset()
    texts = splits["train"]["source_caption"][:] + splits["test"]["reference_source_caption"][:]
    captions = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    if len(captions) < count:
        raise ValueError(f"there are {len(captions)} distinct captions, not {count}")
    return captions[:count]


def measure(
    translator, captions: list[str], pair: tuple[str, str], rounds: int, loop_rounds: int | None = None
) -> dict:
    """Return the seconds of both ways, and how many answers are the same."""

    def one_by_one() -> list[str]:
        return [translator.translate([caption], *pair, show_progress=False)[0] for caption in captions]

    def together() -> list[str]:
        return translator.translate(captions, *pair, show_progress=False)

    translator.translate(captions[:2], *pair, show_progress=False)  # what is loaded at first use
    seconds = {one_by_one: [], together: []}
    answers = {}
    for number in range(rounds):
        for way in (one_by_one, together):
            if way is one_by_one and number >= (loop_rounds or rounds):
                continue
            start = time.perf_counter()
            answers[way] = way()
            seconds[way].append(time.perf_counter() - start)
    loop, batched = min(seconds[one_by_one]), min(seconds[together])
    same = sum(a == b for a, b in zip(answers[one_by_one], answers[together]))
    print(
        f"{translator.name} {'-'.join(pair)}: {len(captions) / loop:.1f} -> {len(captions) / batched:.1f} a second",
        flush=True,
    )
    return {
        "pair": "-".join(pair),
        "captions": len(captions),
        "loop_per_second": round(len(captions) / loop, 1),
        "per_second": round(len(captions) / batched, 1),
        "ratio": round(loop / batched, 1),
        "same_answers": same,
    }


def run(model: str | None, count: int, rounds: int, beams: list[int]) -> dict:
    from modeling_nrccr.translation.engines import load_translator, prepare_translator

    captions = stamp_captions(count)
    engines = {}
    for name, pair in (
        ("apertium", ("en", "gl")),
        ("apertium+es+apertium", ("en", "gl")),
        ("dictionary", ("en", "cs")),
    ):
        spec, options = prepare_translator(name, *pair)
        engines[name] = measure(load_translator(spec, **options), captions, pair, rounds, loop_rounds=1)
    packages = ["torch", "transformers"]
    if model is not None:
        from modeling_nrccr.translation.ctranslate2 import convert_to_ctranslate2

        packages += ["ctranslate2", "sentencepiece"]
        with tempfile.TemporaryDirectory() as folder:
            for quantization in ("float32", "int8"):
                convert_to_ctranslate2(model, Path(folder, quantization), quantization)
            for num_beams in beams:
                loop = None
                for name, spec in (
                    ("seq2seq", f"seq2seq:{model}"),
                    ("ctranslate2 float32", f"ctranslate2:{folder}/float32"),
                    ("ctranslate2 int8", f"ctranslate2:{folder}/int8"),
                ):
                    translator = load_translator(spec, num_beams=num_beams, name=Path(model).name)
                    pair = translator.supported_pairs()[0]
                    pair = ("en", pair[1]) if ("en", pair[1]) in translator.supported_pairs() else pair[::-1]
                    result = measure(translator, captions, pair, rounds)
                    loop = loop or result["loop_per_second"]
                    result["ratio_to_transformers_loop"] = round(result["per_second"] / loop, 1)
                    engines[f"{name}, {num_beams} beam{'s' if num_beams > 1 else ''}"] = result
    return {
        "engines": engines,
        "settings": {
            "captions": f"first {count} distinct English captions of Tux Paint's stamps (training, test)",
            "loop": "the same engine, one caption a call; Apertium: a process a caption",
            "rounds": rounds,
            "model": None if model is None else Path(model).name,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("--model", help="folder of a Transformers encoder-decoder that translates from English")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = run(args.model, args.captions, args.rounds, args.beams)
    write_file(args.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

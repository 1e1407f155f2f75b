"""The real Multi30K captions, all the way but the pictures: build, translate by Apertium, measure the noise, retrieve.

    python benchmarks/multi30k_text.py --data_dir ../shared/data/multi30k

Writes docs/multi30k_text.json and its tables into docs/datasets.md. Nothing is drawn at random.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
BLOCK = re.compile(r"(<!-- multi30k_text: [^\n]*-->\n).*?(<!-- end of multi30k_text -->)", re.S)
LANGUAGES = ("de", "fr", "cs")
WORD = re.compile(r"[^\W\d_]+")


def word_f1(text: str, other: str) -> float:
    """F1 of the words of two texts, 0 to 1: how much of a caption survives the way there and back."""
    words, others = (Counter(WORD.findall(part.casefold())) for part in (text, other))
    common = (words & others).total()
    return 2 * common / max(words.total() + others.total(), 1)


def noise(sources: list[str], targets: list[str], backs: list[str]) -> dict[str, float]:
    """What translation does to captions. A word of four letters or more that stands in both languages' captions is
    counted as untranslated."""
    total = left = with_left = 0
    for source, target in zip(sources, targets):
        words = {word for word in WORD.findall(source.casefold()) if len(word) > 3}
        kept = words.intersection(WORD.findall(target.casefold()))
        total, left, with_left = total + len(words), left + len(kept), with_left + bool(kept)
    scores = torch.tensor([word_f1(source, back) for source, back in zip(sources, backs)])
    return {
        "captions": len(sources),
        "untranslated_words": 100 * left / total,
        "captions_with_untranslated_words": 100 * with_left / len(sources),
        "round_trip_word_f1": 100 * scores.mean().item(),
        "round_trip_identical": 100 * (scores == 1).double().mean().item(),
        "round_trip_word_f1_below_half": 100 * (scores < 0.5).double().mean().item(),
    }


def encode(folder: str, texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """Masked mean of a frozen encoder's last states, L2-normalised, of shape `(len(texts), hidden_size)`."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for start in tqdm(range(0, len(texts), batch_size), desc="captions", disable=None):
            rows = order[start : start + batch_size]
            batch = tokenizer([f"query: {texts[i]}" for i in rows], padding=True, return_tensors="pt")
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            result[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    return result


def run(data_dir: str, translated: int | None) -> dict:
    from encoders import find_encoder

    from datasets_scripts.debian import apertium_root
    from datasets_scripts.multi30k import Multi30k
    from modeling_nrccr.metrics import compute_retrieval_metrics
    from modeling_nrccr.translation import load_translator

    seconds, start = {}, time.perf_counter()
    splits = {}
    for language in LANGUAGES:
        builder = Multi30k(config_name=f"task1-{language}", data_dir=data_dir)
        builder.download_and_prepare()
        splits[language] = builder.as_dataset()
    seconds["build"] = time.perf_counter() - start

    pairs = [("en", "gl"), ("gl", "en")]
    translator = load_translator("apertium", root=apertium_root(pairs))
    sources = splits["de"]["train"]["source_caption"][:translated]
    start = time.perf_counter()
    targets = translator.translate(sources, *pairs[0])
    seconds["en-gl"] = time.perf_counter() - start
    start = time.perf_counter()
    backs = translator.translate(targets, *pairs[1])
    seconds["gl-en"] = time.perf_counter() - start

    start = time.perf_counter()
    captions = {"en": splits["de"]["test"]["reference_source_caption"][:]}
    captions |= {language: splits[language]["test"]["target_caption"][:] for language in LANGUAGES}
    embeds = encode(find_encoder("multilingual-e5-small"), [text for texts in captions.values() for text in texts])
    embeds = dict(zip(captions, embeds.split([len(texts) for texts in captions.values()])))
    retrieval = {}
    for first, second in combinations(captions, 2):
        metrics = compute_retrieval_metrics(embeds[first], embeds[second], torch.arange(len(embeds[first])))
        for way, pair in (("t2v", f"{first}-{second}"), ("v2t", f"{second}-{first}")):
            retrieval[pair] = {f"recall@{k}": metrics[f"{way}_recall@{k}"] for k in (1, 5, 10)}
    seconds["retrieval"] = time.perf_counter() - start
    examples = [dict(zip(("en", "gl", "back"), row)) for row in list(zip(sources, targets, backs))[:3]]
    return {
        "noise": noise(sources, targets, backs),
        "examples": examples,
        "retrieval": retrieval,
        "settings": {
            "data": "Multi30K task 1: first training captions for noise, test 2016 for retrieval",
            "translator": translator.name,
            "encoder": "multilingual-e5-small (4-bit weights, dequantised), frozen, 'query: ', masked mean",
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
        },
    }


def tables(report: dict) -> str:
    """Markdown of the report."""
    noise, seconds, settings = report["noise"], report["settings"]["seconds"], report["settings"]
    languages = ["en", *LANGUAGES]
    lines = [
        f"{noise['captions']:,} English training captions into Galician by {settings['translator']} in "
        f"{seconds['en-gl']:.0f} s and back in {seconds['gl-en']:.0f} s ({settings['machine']}):",
        "",
        "| noise | % |",
        "|---|---:|",
        f"| words (of four letters or more) left in English | {noise['untranslated_words']:.1f} |",
        f"| captions with such a word | {noise['captions_with_untranslated_words']:.1f} |",
        f"| word F1 of caption and back-translation, mean | {noise['round_trip_word_f1']:.1f} |",
        f"| captions whose back-translation has the same words | {noise['round_trip_identical']:.1f} |",
        f"| captions whose word F1 is below 50 % | {noise['round_trip_word_f1_below_half']:.1f} |",
        "",
        *(f"- “{row['en']}” → “{row['gl']}” → “{row['back']}”" for row in report["examples"]),
        "",
        "R@1 / R@5 / R@10 in percent of text-to-text retrieval between the human captions of the 1,000 test pictures "
        f"of 2016, before any training: {settings['encoder']}. A row asks, a column answers; chance: 0.1 / 0.5 / 1.0.",
        "",
        "| | " + " | ".join(languages) + " |",
        "|---|" + "---|" * len(languages),
    ]
    for query in languages:
        cells = [
            ""
            if query == answer
            else " / ".join(f"{v:.1f}" for v in report["retrieval"][f"{query}-{answer}"].values())
            for answer in languages
        ]
        lines.append(f"| {query} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="folder of Multi30K; downloaded where not given")
    parser.add_argument("--translated", type=int, help="training captions to translate; default: all")
    args = parser.parse_args()
    report = run(args.data_dir, args.translated)
    write(ROOT / "docs/multi30k_text.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    docs = ROOT / "docs/datasets.md"
    write(docs, BLOCK.sub(lambda match: match[1] + tables(report) + match[2], docs.read_text(encoding="utf-8")))
    print(tables(report))


def write(path: Path, text: str):
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()

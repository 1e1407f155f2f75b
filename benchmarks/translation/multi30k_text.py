"""The real Multi30K captions, all the way but the pictures: build, translate by Apertium, retrieve, train on text
alone (English and its Galician translation), retrieve again. The translation's noise: benchmarks/translation/noise.py.

    python -m benchmarks.translation.multi30k_text --data_dir ../shared/data/multi30k

Writes docs/multi30k_text.json and its tables into docs/datasets.md. Seeded.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from itertools import combinations

import torch
from transformers import AutoTokenizer, set_seed

from benchmarks import ROOT
from benchmarks.pages import block, fill
from modeling_nrccr.files import write_file


BLOCK = block("multi30k_text")
LANGUAGES = ("de", "fr", "cs")


def text_model(folder: str):
    """Return a model of texts alone over a frozen encoder, and its processor. Its projection is the identity: it gives
    the normalised mean of the encoder's states, which training starts from."""
    from modeling_nrccr import NrccrModel, NrccrTextProcessor

    set_seed(0)
    model = NrccrModel.from_encoders(
        folder, text_head="pooling", teacher_view="source", projection_dim=384, text_dropout=0.05
    ).set_trained_layers(0)
    torch.nn.init.eye_(model.text_projection.dense.weight)
    torch.nn.init.zeros_(model.text_projection.dense.bias)
    return model, NrccrTextProcessor(AutoTokenizer.from_pretrained(folder), text_prefix="query: ")


def train_on_text(model, processor, rows: dict[str, list[dict]], output_dir: str):
    """Trains it on captions and their machine translations both ways, to the best on validation (machine-translated
    too: no human translation is seen)."""
    from modeling_nrccr import (
        DataCollatorForCrossLingualRetrieval,
        FeatureCache,
        NrccrTrainer,
        NrccrTrainingArguments,
    )

    cache = FeatureCache(model, processor)
    names = ("source_caption", "target_caption", "back_translation", "reference_source_caption")
    cache.add_texts(row.get(name) for split in rows.values() for row in split for name in names)
    args = NrccrTrainingArguments(
        output_dir=output_dir,
        text_only=True,
        losses={"target_contrastive": 1.0, "distillation": 0.4, "feature_distillation": 0.1, "back_translation": 0.5},
        eval_gallery_column="reference_source_caption",
        keep_best_in_memory=True,
        save_strategy="no",
        load_best_model_at_end=False,
        num_train_epochs=10,
        per_device_train_batch_size=256,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        seed=0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    collator = DataCollatorForCrossLingualRetrieval(cache)
    NrccrTrainer(model, args, rows["train"], rows["validation"], processor, collator).train()


def text_retrieval(model, processor, captions: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Return the recalls of each language's captions among those of each other, one caption each way."""
    from modeling_nrccr.retrieval.encoding import encode_texts
    from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics

    retrieval, embeds = {}, {name: encode_texts(model, texts, processor) for name, texts in captions.items()}
    for first, second in combinations(embeds, 2):
        metrics = compute_retrieval_metrics(embeds[first], embeds[second], torch.arange(len(embeds[first])))
        for way, pair in (("t2v", f"{first}-{second}"), ("v2t", f"{second}-{first}")):
            retrieval[pair] = {f"recall@{k}": metrics[f"{way}_recall@{k}"] for k in (1, 5, 10)}
    return retrieval


def run(data_dir: str, trained: int) -> dict:
    from datasets_scripts.multi30k import Multi30k
    from modeling_nrccr.loading.encoders import find_encoder
    from modeling_nrccr.translation.engines import load_translator
    from modeling_nrccr.translation.packages import apertium_root

    seconds, start = {}, time.perf_counter()
    splits = {}
    for language in LANGUAGES:
        builder = Multi30k(config_name=f"task1-{language}", data_dir=data_dir)
        builder.download_and_prepare()
        splits[language] = builder.as_dataset()
    seconds["build"] = time.perf_counter() - start

    pairs = [("en", "gl"), ("gl", "en")]
    translator = load_translator("apertium", root=apertium_root(pairs))
    sources = splits["de"]["train"]["source_caption"][:trained]
    start = time.perf_counter()
    targets = translator.translate(sources, *pairs[0])
    seconds["en-gl"] = time.perf_counter() - start
    start = time.perf_counter()
    backs = translator.translate(targets, *pairs[1])
    seconds["gl-en"] = time.perf_counter() - start

    start = time.perf_counter()
    captions = {"en": splits["de"]["test"]["reference_source_caption"][:]}
    captions |= {language: splits[language]["test"]["target_caption"][:] for language in LANGUAGES}
    model, processor = text_model(find_encoder("multilingual-e5-small"))
    retrieval = text_retrieval(model, processor, captions)
    seconds["retrieval"] = time.perf_counter() - start

    start = time.perf_counter()
    rows = {
        "train": [
            {"image_id": str(i), "source_caption": source, "target_caption": target, "back_translation": back}
            for i, (source, target, back) in enumerate(zip(sources, targets, backs))
        ]
    }
    held_out = splits["de"]["validation"]["reference_source_caption"][:]
    rows["validation"] = [
        {"image_id": str(i), "target_caption": target, "reference_source_caption": source}
        for i, (source, target) in enumerate(zip(held_out, translator.translate(held_out, *pairs[0])))
    ]
    with tempfile.TemporaryDirectory() as output_dir:
        train_on_text(model, processor, rows, output_dir)
    after = text_retrieval(model, processor, captions)
    seconds["text-only training"] = time.perf_counter() - start
    examples = [dict(zip(("en", "gl", "back"), row)) for row in list(zip(sources, targets, backs))[:3]]
    return {
        "examples": examples,
        "retrieval": retrieval,
        "retrieval_after": after,
        "settings": {
            "data": "Multi30K task 1: the first training captions, test 2016 for retrieval",
            "translator": translator.name,
            "trained_captions": len(rows["train"]),
            "encoder": "multilingual-e5-small (4-bit weights, dequantised), frozen, 'query: ', masked mean",
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
        },
    }


def tables(report: dict) -> str:
    """Return the report as Markdown."""
    seconds, settings = report["settings"]["seconds"], report["settings"]
    languages = ["en", *LANGUAGES]
    lines = [
        f"{settings['trained_captions']:,} English training captions into Galician by {settings['translator']} in "
        f"{seconds['en-gl']:.0f} s and back in {seconds['gl-en']:.0f} s ({settings['machine']}), such as:",
        "",
        *(f"- “{row['en']}” → “{row['gl']}” → “{row['back']}”" for row in report["examples"]),
        "",
        "R@1 / R@5 / R@10 in percent of text-to-text retrieval between the human captions of the 1,000 test pictures "
        f"of 2016, before any training: {settings['encoder']}. A row asks, a column answers; chance: 0.1 / 0.5 / 1.0.",
        "",
        "| | " + " | ".join(languages) + " |",
        "|---|" + "---|" * len(languages),
    ]
    lines += retrieval_lines(report["retrieval"], languages)
    pairs = report["retrieval"].keys()
    before, after = (sum(report[key][pair]["recall@1"] for pair in pairs) / len(pairs) for key in RETRIEVALS)
    lines += [
        "",
        f"After text-only training (`text_only: true`) of one linear layer over the same frozen encoder, from the "
        f"identity, on {settings['trained_captions']:,} of these English captions and their Galician machine "
        f"translations alone, seed 0; no German, French or Czech was seen, nor any human translation. Mean R@1 of the "
        f"{len(pairs)} directions {before:.1f} before, {after:.1f} after:",
        "",
        "| | " + " | ".join(languages) + " |",
        "|---|" + "---|" * len(languages),
        *retrieval_lines(report["retrieval_after"], languages),
    ]
    return "\n".join(lines) + "\n"


RETRIEVALS = ("retrieval", "retrieval_after")


def retrieval_lines(retrieval: dict, languages: list[str]) -> list[str]:
    lines = []
    for query in languages:
        cells = [
            "" if query == answer else " / ".join(f"{v:.1f}" for v in retrieval[f"{query}-{answer}"].values())
            for answer in languages
        ]
        lines.append(f"| {query} | " + " | ".join(cells) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="folder of Multi30K; downloaded where not given")
    parser.add_argument("--trained", type=int, default=6000, help="training captions, from the first")
    args = parser.parse_args()
    report = run(args.data_dir, args.trained)
    write_file(ROOT / "docs/multi30k_text.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    fill(ROOT / "docs/datasets.md", {"multi30k_text": tables(report)})
    print(tables(report))


if __name__ == "__main__":
    main()

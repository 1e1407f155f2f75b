"""Checks the languages that were added to a base of the bench, in a process of its own, and prints JSON.

    python -m benchmarks.bases.checks clip outputs/bases/clip

The folder holds what `benchmarks/bases/table.py` made: `index` (of the held-out pictures, by the base alone), and a
folder of `nrccr add-language` for each step. A check gives a number, or the first line of its error.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from sentence_transformers import SentenceTransformer
from starlette.testclient import TestClient
from transformers import AutoModel, AutoProcessor

from benchmarks.bases.build import DATASET, base_folder, captioned, pictures_of_nrccr
from modeling_nrccr import FeatureCache, NrccrModel, NrccrProcessor, NrccrRetriever
from modeling_nrccr.data.load import load_caption_dataset
from modeling_nrccr.export.formats import export_model
from modeling_nrccr.export.onnx import OnnxModel
from modeling_nrccr.export.sides import list_sides
from modeling_nrccr.publishing.sentence_transformers_files import write_sentence_transformers_files
from modeling_nrccr.retrieval.encoding import encode_images, encode_texts
from modeling_nrccr.retrieval.metrics import compute_retrieval_metrics
from modeling_nrccr.retrieval.search import search
from modeling_nrccr.serving import service as serve


SAMPLE = 48  # captions and pictures that are compared
LANGUAGE = "gl"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


class Examined:
    """A base, what one step made of it, opened afresh, and what is asked of both."""

    def __init__(self, name: str, step: Path, index: Path):
        self.base, self.step, self.index = str(base_folder(name)), step, index
        has_own_side = (step / "model").is_dir()
        self.folder = str(step / "model") if has_own_side else self.base
        test = load_caption_dataset(DATASET, LANGUAGE)["test"]
        self.asked, self.english = list(test["target_caption"]), list(test["reference_source_caption"])
        self.sample = self.asked[:SAMPLE]
        self.pictures = captioned("test")[1]
        self.model, self.processor = self.open()
        self.has_pictures = self.model.visual_tower is not None
        self.embeds = self.embed(self.model, self.sample)

    def open(self) -> tuple[NrccrModel, NrccrProcessor]:
        """Load the model with the language active, and its processor."""
        model = NrccrModel.from_dual_encoder(self.folder).eval()
        model.load_language(LANGUAGE, self.step)
        return model.set_language(LANGUAGE), NrccrProcessor.from_dual_encoder(self.folder)

    def embed(self, model, texts: Sequence[str], language: str | None = LANGUAGE) -> torch.Tensor:
        return encode_texts(model, texts, self.processor, languages=language)

    # what it finds

    def sum_recall(self, images: torch.Tensor) -> dict[str, float]:
        queries = {
            "before": self.of_base(self.asked),
            "english before": self.of_base(self.english),
            "after": self.embed(self.model, self.asked),
            "english after": self.embed(self.model, self.english, None),
        }
        owner = torch.arange(len(images))
        return {name: compute_retrieval_metrics(part, images, owner)["sum_recall"] for name, part in queries.items()}

    def of_base(self, texts: Sequence[str]) -> torch.Tensor:
        base, processor = NrccrModel.from_dual_encoder(self.base).eval(), NrccrProcessor.from_dual_encoder(self.base)
        return encode_texts(base, texts, processor, languages=None)

    # checks, each a number

    def pictures_changed(self, before: torch.Tensor) -> float:
        """Count the numbers of the sample's picture embeddings that are not the base's, bit for bit."""
        after = encode_images(self.model, self.pictures[:SAMPLE], self.processor)
        return float((after != before[:SAMPLE]).sum())

    def english_changed(self) -> float:
        """Count the numbers of the embeddings of English texts that are not the base's, bit for bit."""
        texts = self.english[:SAMPLE]
        return float((self.embed(self.model, texts, None) != self.of_base(texts)).sum())

    def report_differs(self, found: dict[str, float]) -> float:
        """Compare the SumR that `nrccr add-language` reported after training with that of this process."""
        report = json.loads((self.step / "report.json").read_text(encoding="utf-8"))["found"]
        names = [name for name in report if name.removeprefix(f"{LANGUAGE}: ") == "this language"]
        return abs(report[names[0]]["sum_recall"] - found["after"])

    def cached(self) -> float:
        """Compare cached states with full passes, at the boundary of its training."""
        model = self.open()[0].language_side().train_language(LANGUAGE).eval()
        cache = FeatureCache(model, self.processor.language_side())
        cache.add_texts(self.sample)
        if not cache.is_exact:
            raise RuntimeError("not cached: cached states would differ")
        return difference(encode_texts(model, self.sample, cache, languages=LANGUAGE), self.embeds)

    def alone(self) -> float:
        """Compare each text alone with all in a batch, and beside texts of the base's own language."""
        alone = torch.cat([self.embed(self.model, [text]) for text in self.sample])
        english = self.english[:SAMPLE]
        languages = [LANGUAGE] * len(alone) + [None] * len(english)
        mixed = encode_texts(self.model, [*self.sample, *english], self.processor, languages=languages)
        apart = torch.cat([self.embeds, self.embed(self.model, english, None)])
        return max(difference(alone, self.embeds), difference(mixed, apart))

    def bfloat16(self) -> float:
        """Return 1 - the lowest cosine of bfloat16 and float32, of texts and pictures."""
        model, processor = self.open()
        model.to(torch.bfloat16)
        cosines = [(self.embed(model, self.sample).float() * self.embeds).sum(1)]
        if self.has_pictures:
            parts = [encode_images(of, self.pictures[:SAMPLE], processor).float() for of in (model, self.model)]
            cosines.append((parts[0] * parts[1]).sum(1))
        return 1 - float(torch.cat(cosines).min())

    def merged(self) -> float:
        """Compare the model with itself once its LoRA is folded in, saved and opened again."""
        model = self.open()[0]
        model.merge_language(LANGUAGE)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            opened = NrccrModel.from_pretrained(folder).eval()
        return max(difference(self.embed(of, self.sample), self.embeds) for of in (model, opened))

    @contextlib.contextmanager
    def saved(self) -> Iterator[str]:
        """Yield one folder with the language in it, as it is published."""
        with tempfile.TemporaryDirectory() as folder:
            model, processor = self.open()
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            write_sentence_transformers_files(folder, self.has_pictures)
            yield folder

    def published(self) -> float:
        """Compare the model with what was saved whole and opened by `AutoModel` and `AutoProcessor`."""
        with self.saved() as folder:
            model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        return difference(encode_texts(model, self.sample, processor), self.embeds)

    def sentence_transformers(self) -> float:
        with self.saved() as folder:
            model = SentenceTransformer(folder, device="cpu")
        found = [(torch.from_numpy(model.encode(self.sample)), self.embeds)]
        found.append((torch.from_numpy(model.encode(self.sample[0]))[None], self.embeds[:1]))
        if self.has_pictures:
            pictures = self.pictures[:4]
            images = encode_images(self.model, pictures, self.processor)
            found.append((torch.from_numpy(model.encode(pictures)), images))
        return max(difference(*pair) for pair in found)

    def onnx(self) -> float:
        """Compare the exported files with the model, both asked the sample."""
        with tempfile.TemporaryDirectory() as folder:
            naflex = self.has_pictures and self.model.visual_tower.patch_size is not None
            sides = ["text"] if naflex else None  # no exporter follows pictures of any shape
            export_model(self.folder, folder, ["onnx"], [f"{LANGUAGE}={self.step}"], sides=sides)
            processor = AutoProcessor.from_pretrained(folder)
            side = list_sides(self.model.language_side(), processor, ["text"])[0]
            exported = OnnxModel(Path(folder), self.model.config, [side])
            return difference(encode_texts(exported, self.sample, processor), self.embeds)

    def served(self) -> float:
        """Compare embeddings over HTTP, and the hits of a search in the index that the base made before."""
        with mock.patch.object(serve.uvicorn, "run") as run:  # as it is typed, but for the socket
            serve.serve(self.folder, str(self.index), languages=[f"{LANGUAGE}={self.step}"])
        with TestClient(run.call_args.args[0], base_url="http://127.0.0.1") as client:
            answer = client.post("/embed", json={"texts": self.sample}).raise_for_status().json()
            hits = client.post("/search", json={"text": self.sample[0], "k": 5}).raise_for_status().json()["hits"]
        if [hit["id"] for hit in hits] != self.best(self.embeds[0]):
            raise RuntimeError(f"other pictures were found: {[hit['id'] for hit in hits]}")
        return difference(torch.tensor(answer["text_embeds"]), self.embeds)

    def best(self, query: torch.Tensor, k: int = 5) -> list[str]:
        index = NrccrRetriever.load(self.index, self.model, self.processor)
        return [hit.id for hit in index.search(query, k)]

    def searched(self, images: torch.Tensor, ids: list[str]) -> float:
        """Compare the scores of the index that the base made before with a product of embeddings; and search it."""
        retriever, worst = NrccrRetriever.load(self.index, self.model, self.processor), 0.0
        row = {name: number for number, name in enumerate(ids)}
        for text, embed in zip(self.sample, self.embeds):
            hits, scores = retriever.search(text, 5), images @ embed
            worst = max(worst, *(abs(hit.score - float(scores[row[hit.id]])) for hit in hits))
            worst = max(worst, abs(hits[0].score - float(scores.max())))
        with self.saved() as folder:
            search(self.sample[:1], self.index, model=folder)
        return worst


def attempt(call: Callable[[], float]) -> float | str:
    """Return what `call` gives, or the first line of its error."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"


def check(name: str, work: Path, steps: Sequence[str]) -> dict[str, dict]:
    """Return what each step finds, and what each check of it gives."""
    found, images = {}, None
    ids = [f"{number:04d}.png" for number in range(len(captioned("test")[1]))]
    for step in steps:
        try:
            one = Examined(name, work / step, work / "index")
        except Exception as error:
            found[step] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        if images is None:
            base, processor = NrccrModel.from_dual_encoder(one.base).eval(), NrccrProcessor.from_dual_encoder(one.base)
            own = base.visual_tower is not None
            images = encode_images(base, one.pictures, processor) if own else pictures_of_nrccr("test")
        recalls = one.sum_recall(images)
        checks = {
            "loaded": partial(one.report_differs, recalls),
            "pictures": partial(one.pictures_changed, images),
            "english": one.english_changed,
            "cached": one.cached,
            "alone": one.alone,
            "bfloat16": one.bfloat16,
            "merged": one.merged,
            "published": one.published,
            "sentence_transformers": one.sentence_transformers,
            "onnx": one.onnx,
            "served": one.served,
            "searched": partial(one.searched, images, ids),
        }
        if not one.has_pictures:  # they stay with the base, and `nrccr add-language` is given none to test with
            checks.pop("pictures")
            checks.pop("loaded")
        if not one.model.has_lora(LANGUAGE):
            checks.pop("merged")
        found[step] = {"sum_recall": recalls, "checks": {}}
        for key, call in checks.items():
            found[step]["checks"][key] = attempt(call)
            print(f"{step}, {key}: {found[step]['checks'][key]}", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip("."))
    parser.add_argument("name")
    parser.add_argument("work", type=Path)
    parser.add_argument("steps", nargs="+")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        found = check(args.name, args.work, args.steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

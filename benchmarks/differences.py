"""Measures what each repair of the released behaviour changes, and writes it into docs/differences.md:

    python -m benchmarks.differences            # prints the cheap effects, seconds
    python -m benchmarks.differences --all --write   # trains and times too, a minute; rewrites the table's last column

Seeded, on random weights; "published -> here" in each line. Models are small: the effects show that a difference is
there, not how large it is in a trained model.
"""

import argparse
import ast
import gzip
import json
import re
import resource
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature, PrinterCallback

from benchmarks import ROOT
from modeling_nrccr import (
    DataCollatorForCrossLingualRetrieval,
    EfficientNetLiteConfig,
    LanguageDiscriminator,
    NrccrConfig,
    NrccrLoss,
    NrccrModel,
    NrccrOutput,
    NrccrTrainer,
    NrccrTrainingArguments,
    compute_retrieval_metrics,
)
from modeling_nrccr.retrieval.metrics import fuse_query_embeds
from modeling_nrccr.training.conversion import check_options
from modeling_nrccr.training.losses import same_item, triplet_loss


PAGE = ROOT / "docs/differences.md"
CAPTIONS = ROOT.parent / "shared/data/multi30k/task1/raw"
PUBLISHED = dict(
    pool_padding=True,
    attention_score_scale="hidden",
    projection_norm="batch_norm",
    projection_dropout=0.2,
    visual_head="attention",
)
TEXT = dict(vocab_size=99, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
BATCH, DIM = 128, 1536  # of the paper's runs

EFFECTS: dict[str, Callable[[], str | None]] = {}
COSTLY: set[str] = set()


def effect(row: str, costly: bool = False):
    """Registers the measurement of the table's row that begins with `row`."""

    def register(function):
        EFFECTS[row] = function
        if costly:
            COSTLY.add(row)
        return function

    return register


def models(**changes) -> tuple[NrccrModel, NrccrModel]:
    """The same weights with published and with repaired behaviour."""
    config = dict(text_config=TEXT, visual_feat_dim=64, projection_dim=64, visual_head="attention") | changes
    torch.manual_seed(0)
    repaired = NrccrModel(NrccrConfig(**config)).eval()
    published = NrccrModel(NrccrConfig(**(config | PUBLISHED))).eval()
    published.load_state_dict(repaired.state_dict(), strict=False)
    return published, repaired


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def arrow(published: float, repaired: float, digits: int = 2) -> str:
    return f"{published:.{digits}f} -> {repaired:.{digits}f}"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def caption(length: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, TEXT["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, length, dtype=torch.long)
    return F.pad(ids, (0, padded - length)), F.pad(mask, (0, padded - length))


# ------------------------------------------------------------------------------------------------- architecture


@effect("Padding of captions")
@torch.no_grad()
def padded_caption() -> str:
    values = [
        cosine(*(model.get_text_features(*caption(4, length)).pooler_output for length in (4, 38)))
        for model in models()
    ]
    return f"a caption of 4 tokens alone and padded to 38, cosine {arrow(*values)}"


@effect("Padding of videos")
@torch.no_grad()
def padded_video() -> str:
    frames, values = unit(1, 3, 64, seed=2) * 8, []
    for model in models():
        mask = F.pad(torch.ones(1, 3), (0, 61))
        alone = model.get_image_features(visual_feats=frames).pooler_output
        padded = model.get_image_features(visual_feats=F.pad(frames, (0, 0, 0, 61)), visual_attention_mask=mask)
        values.append(cosine(alone, padded.pooler_output))
    return f"a video of 3 frames alone and padded to 64, cosine {arrow(*values)}"


@effect("Padding in the discriminator")
@torch.no_grad()
def padded_discriminator() -> str:
    values = []
    tower = models()[1].text_tower
    states, mask = tower(*caption(4, 4)), caption(4, 38)[1]
    padded = tower(*caption(4, 38))
    for pool_padding in (True, False):
        torch.manual_seed(0)
        judge = LanguageDiscriminator(64, "weak", pool_padding)
        values.append((judge(states, mask[:, :4]) - judge(padded, mask)).abs().max().item())
    return f"the same caption moves a logit by {arrow(*values)}"


@effect("Scale of attention scores")
def score_scale() -> str:
    scales = {width: (512 / width) ** 0.5 for width in (768, 1024)}
    return "scores " + ", ".join(f"x{scale:.2f} at width {width}" for width, scale in scales.items()) + " -> x1"


@effect("BatchNorm in the projections")
@torch.no_grad()
def batch_norm() -> str:
    values = []
    for model in models(projection_dropout=0.0):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        mine, *others = unit(63, 64, seed=3).split([1, 31, 31])
        values.append(cosine(*(model.text_projection(torch.cat([mine, rest]))[0] for rest in others)))
    return f"a row in two training batches of 32, cosine {arrow(*values)}"


@effect("Layers of the video head")
def video_layers() -> str:
    options = json.loads((ROOT / "tests/fixtures/reference/forward_video.json").read_text())["opt"]
    try:
        check_options(options | {"video_layer": 2})
    except ValueError as error:
        return f"a checkpoint with two is refused: `{error}`"
    raise AssertionError("a checkpoint with two video layers was taken")


@effect("Dropout inside frozen layers")
@torch.no_grad()
def frozen_dropout() -> str:
    values = []
    for dropout in (True, False):
        model = models()[1]
        model.set_trained_layers(0, frozen_dropout=dropout)
        model.train()
        torch.manual_seed(4)
        values.append(cosine(*(model.text_tower(*caption(12, 12)) for _ in range(2))))
    return f"two passes of one caption through a frozen encoder, cosine {arrow(*values)}"


@effect("Training the picture tower")
def picture_tower() -> str:
    tower = EfficientNetLiteConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_size=16)
    model = NrccrModel(NrccrConfig(text_config=TEXT, vision_config=tower, projection_dim=16))
    model.set_trained_layers(0, vision=True)
    features = model.visual_tower(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    counts = []
    for handed_on in (torch.tensor(features.tolist(), requires_grad=True), features):  # re-wrapped, as released
        model.visual_tower.zero_grad()
        model.visual_projection(model.visual_head(handed_on, torch.ones(2, 1)))[0, 0].backward(retain_graph=True)
        counts.append(sum(p.grad is not None for p in model.visual_tower.parameters()))
    return f"tensors of a tower in training that get a gradient: {counts[0]} -> {counts[1]}"


# --------------------------------------------------------------------------------------------------------- losses


def outputs(seed: int = 6) -> NrccrOutput:
    """Embeddings of a batch half way through training: views near their pictures, some nearer than others."""
    images = unit(BATCH, DIM, seed=seed)
    views = {
        name: F.normalize(images + noise * unit(BATCH, DIM, seed=seed + i + 1), dim=-1).requires_grad_()
        for i, (name, noise) in enumerate(
            [
                ("text_embeds", 2.0),
                ("target_text_embeds", 4.0),
                ("teacher_text_embeds", 3.0),
                ("back_translation_text_embeds", 3.0),
            ]
        )
    }
    return NrccrOutput(image_embeds=images.requires_grad_(), logit_scale=torch.tensor(1 / 0.07), **views)


def losses() -> tuple[NrccrLoss, NrccrLoss]:
    return NrccrLoss.published(), NrccrLoss()


def gradients(loss: NrccrLoss, term: str, names: list[str], batch=None) -> list[torch.Tensor]:
    """Of one weighted term, with respect to the embeddings of these names."""
    batch = batch or outputs()
    value = loss.weights[term] * loss(batch)[term]
    inputs = [getattr(batch, name) for name in names]
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(inputs, torch.autograd.grad(value, inputs, allow_unused=True))
    ]


@effect("Feature view")
def feature_view() -> str:
    batch = outputs()
    near = F.cosine_similarity(batch.target_text_embeds, batch.teacher_text_embeds).mean().item()
    values = [loss(batch)["feature_distillation_loss"].item() for loss in losses()]
    return f"its value where target and teacher have cosine {near:.2f}: {values[0]:.5f} -> {values[1]:.2f}"


@effect("Target of the feature view")
def feature_target() -> str:
    values = []
    for loss in losses():
        student, teacher = gradients(loss, "feature_distillation_loss", ["target_text_embeds", "teacher_text_embeds"])
        values.append(100 * teacher.norm() / (teacher.norm() + student.norm()))
    return f"share of its gradient that moves the teacher: {values[0]:.0f} % -> {values[1]:.0f} %"


@effect("Sums and means")
def term_scales() -> str:
    values = []
    for loss, contrast in zip(losses(), ("target_triplet_loss", "target_contrastive_loss")):
        (similarity,) = gradients(loss, "distillation_loss", ["target_text_embeds"])
        (other,) = gradients(loss, contrast, ["target_text_embeds"])
        values.append(100 * similarity.norm() / (similarity.norm() + other.norm()))
    return f"the similarity view's share of the gradient on target captions: {values[0]:.1f} % -> {values[1]:.1f} %"


@effect("Targets of the similarity view")
def similarity_targets() -> str:
    published, repaired = losses()
    a, b = (gradients(loss, "distillation_loss", ["image_embeds"])[0] for loss in (published, repaired))
    share = 100 * (a - b).norm() / a.norm()
    return f"of the norm of the gradient on pictures, the part through the targets has {share:.0f} % -> 0 %"


@effect("Captions of the same item")
def false_negatives() -> str:
    generator, shares = torch.Generator().manual_seed(7), []
    for items, captions in ((29000, 5), (25991, 10)):
        rows = torch.randint(items * captions, (2000, BATCH), generator=generator).sort(1).values
        item, other = rows // captions, rows.diff(dim=1) > 0
        shares.append(100 * ((item.diff(dim=1) == 0) & other).any(1).double().mean().item())
    images = unit(BATCH, DIM, seed=8)
    images[1] = images[0]
    ids = torch.arange(BATCH)
    ids[1] = 0
    ignored = [same_item(known, BATCH, images.device) for known in (None, ids)]
    values = [triplet_loss(images, images, pairs, reduction="sum").item() for pairs in ignored]
    return (
        f"{shares[0]:.0f} % of the batches of Multi30K task 2 hold such a pair, {shares[1]:.0f} % of VATEX; then the "
        f"hinge of perfect embeddings is {arrow(*values, 1)}"
    )


# ------------------------------------------------------------------------------------------------ text, evaluation


@effect("Letters and accents", costly=True)
def lower_casing() -> str | None:
    """None where the captions are not there."""
    if not CAPTIONS.is_dir():
        return None
    parts = []
    for language in ("cs", "de", "fr"):
        words = re.findall(r"\w+", gzip.open(CAPTIONS / f"train.{language}.gz", "rt", encoding="utf-8").read())

        def released(word: str) -> str:
            decomposed = unicodedata.normalize("NFD", word.lower())
            return "".join(character for character in decomposed if unicodedata.category(character) != "Mn")

        changed = np.mean([released(word) != word for word in words])
        parts.append(f"{language} {100 * changed:.0f} %")
    return f"words of Multi30K's captions that reach the tokenizer changed: {', '.join(parts)} -> 0 %"


@effect("Query fusion")
@torch.no_grad()
def query_fusion() -> str:
    images, weight = unit(1000, 64, seed=10), 0.2
    translated, queries = (F.normalize(images + 1.5 * unit(1000, 64, seed=seed), dim=-1) for seed in (11, 12))
    scores = [part @ images.t() for part in (translated, queries)]

    def fused(dim: tuple[int, ...]) -> torch.Tensor:
        low, high = ([f(score, dim, keepdim=True) for score in scores] for f in (torch.amin, torch.amax))
        scaled = [(score - a) / (b - a) for score, a, b in zip(scores, low, high)]
        return (weight * scaled[0] + (1 - weight) * scaled[1]).argmax(1)

    changed = (fused((0, 1)) != fused((1,))).sum()  # among all queries, and each query alone
    online = fuse_query_embeds(queries, translated, weight)
    assert torch.equal(online[:1], fuse_query_embeds(queries[:1], translated[:1], weight))
    return f"of 1,000 queries, so many find another best picture when asked alone: {changed} -> 0"


@effect("Unsafe files")
def unsafe_files() -> str:
    calls = []
    for path in (*ROOT.glob("modeling_nrccr/*.py"), *ROOT.glob("datasets_scripts/*.py"), *ROOT.glob("examples/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, safe = ast.unparse(node.func), any(keyword.arg == "weights_only" for keyword in node.keywords)
            if name in ("eval", "exec") or name.startswith("pickle.") or name == "torch.load" and not safe:
                calls.append(f"{path.name}:{node.lineno}")
    with tempfile.TemporaryDirectory() as folder:
        models()[1].save_pretrained(folder)
        pickled = [p.name for p in Path(folder).iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".tar")]
    return f"here: pickled files in a saved model {len(pickled)}, calls that could run a file's code {len(calls)}"


def captioned(items: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of five captions an item, of the items, and the item of each caption."""
    images, owner = unit(items, dim, seed=13), torch.arange(5 * items) // 5
    return images[owner] + 3 * unit(5 * items, dim, seed=14), images, owner


def whole_evaluation() -> tuple[float, float]:
    """CPU seconds of the metrics, and the peak memory of this process in GB."""
    torch.set_num_threads(1)
    embeds, start = captioned(5000, DIM), time.process_time()
    compute_retrieval_metrics(*embeds)
    return time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rank_by_sorting(texts: torch.Tensor, images: torch.Tensor, owner: torch.Tensor) -> list[int]:
    def order(scores: list[float]) -> list[int]:
        return sorted(range(len(scores)), key=lambda j: -scores[j])

    ranks = [order(scores).index(item) for scores, item in zip((texts @ images.t()).tolist(), owner.tolist())]
    for item, scores in enumerate((images @ texts.t()).tolist()):
        ordered = order(scores)
        ranks.append(min(ordered.index(caption) for caption in range(5 * item, 5 * item + 5)))
    return ranks


@effect("Speed of the evaluation", costly=True)
def evaluation_speed() -> str:
    seconds, embeds = [], captioned(1000, 256)
    for rank in (rank_by_sorting, compute_retrieval_metrics):
        start = time.process_time()
        rank(*embeds)
        seconds.append(time.process_time() - start)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process of its own has a peak of its own
        whole, peak = pool.submit(whole_evaluation).result()
    return (
        f"CPU seconds, 1,000 items x 5,000 captions: {arrow(*seconds, 1)} (plain sorting, not the released code); "
        f"5,000 x 25,000: 94 and 6.8 GB (as recorded of the released code) -> {whole:.0f} and {peak:.1f} GB"
    )


# -------------------------------------------------------------------------------------------------------- training


def toy_rows(count: int, seed: int) -> list[dict]:
    """Pictures that are bags of words; the translation has three words in ten wrong."""
    generator, rows = np.random.default_rng(seed), []
    for i in range(count):
        chosen = generator.choice(30, 3, replace=False)
        heard = [int(word) if generator.random() > 0.3 else int(generator.integers(30)) for word in chosen]
        source, target = (
            " ".join(f"{start}{word}" for word in words) for start, words in (("", chosen), ("9", heard))
        )
        rows.append(
            {
                "image_id": f"{i}",
                "visual_feats": np.eye(30, dtype="float32")[chosen].sum(0, keepdims=True),
                "source_caption": source,
                "target_caption": target,
                "back_translation": source,
            }
        )
    return rows


def words_to_ids(text=None, visual_feats=None, **kwargs) -> BatchFeature:
    if text is None:
        feats = torch.stack([torch.as_tensor(feat) for feat in visual_feats])
        return BatchFeature({"visual_feats": feats})
    ids = torch.tensor([[2 + int(word) % 97 for word in line.split()] for line in text])
    return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def trainer(folder: str, seed: int = 0, epochs: int = 8, **changes) -> NrccrTrainer:
    args = NrccrTrainingArguments(
        output_dir=folder,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        trained_text_layers=1,
        disable_tqdm=True,
        use_cpu=True,
        load_best_model_at_end=False,
        save_strategy="no",
        **changes,
    )
    torch.manual_seed(seed)
    heads = dict(text_head="pooling", visual_head="pooling", teacher_view="source")
    model = NrccrModel(NrccrConfig(text_config=TEXT, visual_feat_dim=30, projection_dim=32, **heads))
    collator = DataCollatorForCrossLingualRetrieval(words_to_ids)
    run = NrccrTrainer(model, args, toy_rows(256, seed=1), toy_rows(100, seed=2), data_collator=collator)
    run.remove_callback(PrinterCallback)
    return run


def weights(trained: NrccrTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


@effect("Choice of the model", costly=True)
def model_choice() -> str:
    """Which epoch validation chooses, and what it gives in both directions on other rows."""
    gains, different = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(5):
            run = trainer(folder, seed, eval_strategy="epoch")
            run.eval_dataset = {"chosen_by": toy_rows(100, seed=2), "tested": toy_rows(100, seed=3)}
            run.args.metric_for_best_model = "chosen_by_sum_recall"
            run.train()
            log: dict[float, dict] = {}
            for entry in run.state.log_history:
                log.setdefault(entry["epoch"], {}).update(entry)
            one = max(log.values(), key=lambda e: sum(e[f"eval_chosen_by_t2v_recall@{k}"] for k in (1, 5, 10)))
            both = max(log.values(), key=lambda e: e["eval_chosen_by_sum_recall"])
            different += one["epoch"] != both["epoch"]
            gains.append(both["eval_tested_sum_recall"] - one["eval_tested_sum_recall"])
    return (
        f"toy rows, 5 seeds: another epoch is chosen in {different}; test SumR of that choice {np.mean(gains):+.1f} "
        f"(from {min(gains):+.1f} to {max(gains):+.1f})"
    )


@effect("Seeds", costly=True)
def seeds() -> str:
    with tempfile.TemporaryDirectory() as folder:
        runs = [trainer(folder, seed, epochs=2, eval_strategy="no") for seed in (0, 0, 1)]
        for run in runs:
            run.train()
        same, other = ((weights(runs[0]) - weights(runs[i])).abs().max().item() for i in (1, 2))
    return (
        f"largest difference of a weight between two runs: {other:.2f} (seeds 0 and 1) -> {same:.0f} (the same seed)"
    )


@effect("Resuming", costly=True)
def resuming() -> str:
    with tempfile.TemporaryDirectory() as folder:
        options = dict(eval_strategy="no", lr_scheduler_type="constant", save_steps=8, save_total_limit=None)
        whole, resumed, weights_only = (trainer(f"{folder}/{i}", epochs=4, **options) for i in range(3))
        whole.args.save_strategy = "steps"
        whole.train()
        checkpoint = f"{folder}/0/checkpoint-16"
        resumed.train(resume_from_checkpoint=checkpoint)
        weights_only.model.load_state_dict(NrccrModel.from_pretrained(checkpoint).state_dict())
        weights_only.args.num_train_epochs = 2
        weights_only.train()
        lost, kept = ((weights(run) - weights(whole)).abs().max().item() for run in (weights_only, resumed))
    return (
        f"largest difference of a weight to the uninterrupted run: {lost:.3f} (weights alone restored) -> {kept:.0g}"
    )


# ------------------------------------------------------------------------------------------------------------- page


def write(page: str, results: dict[str, str]) -> str:
    """The page with the last cell of each row replaced."""
    for row, result in results.items():
        pattern = re.compile(rf"(?m)^(\| {re.escape(row)} \|.*\| )[^|\n]*\|$")
        page, count = pattern.subn(lambda match, result=result: f"{match[1]}{result} |", page)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} rows that begin with {row!r}, not one")
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="train and time too")
    parser.add_argument("--write", action="store_true", help="write the results into docs/differences.md")
    options = parser.parse_args()
    results = {}
    for row, measure in EFFECTS.items():
        if row in COSTLY and not options.all:
            continue
        start = time.perf_counter()
        result = measure()
        if result is None:
            print(f"{row}: not measured, its data is not there", file=sys.stderr)
            continue
        results[row] = result
        print(f"{row}: {result} ({time.perf_counter() - start:.1f} s)")
    if options.write:
        PAGE.write_text(write(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

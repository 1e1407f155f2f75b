"""A training step beside the stock Trainer, and a large contrastive batch beside sentence-transformers:

    python -m benchmarks.speed.training --output benchmarks/results/speed.jsonl

`step`: a BERT of mBERT's size (12 layers, vocabulary 119,547, random weights), top 9 layers trained, 128 captions in
three views of 10 to 22 tokens, 2048-d features, dropout 0. Stock: `AutoModel` under `Trainer`, dynamic padding, a pass
for each view. Both have the same heads, rows, order and loss. `contrast`: 2,048 pairs through all of e5-small, one
forward and backward with the gradient of the whole batch, in the memory of a small one. On an accelerator:
`--batch 1024 --steps 20`, which stock runs in bf16 too, and `--texts FILE` where there is no network.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import (
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


VIEWS = ("", "target_", "back_translation_")
TRAINED, WIDTH = 9, 768
PAIRS = 2048
STEP_SIDES = ["ours", "ours recompute", "ours bf16", "stock"]
if device().type != "cpu":
    STEP_SIDES += ["stock bf16"]
CONTRAST_SIDES = ["cached", "sentence-transformers 32", "sentence-transformers 128"]


class Tokens:
    """Stands in for a processor: a caption is its token ids, written with blanks."""

    def __call__(self, text=None, visual_feats=None, return_tensors=None, **kwargs):
        from transformers import BatchFeature

        if visual_feats is not None:
            return BatchFeature({"visual_feats": torch.stack([torch.as_tensor(row) for row in visual_feats])})
        ids = [torch.tensor(list(map(int, caption.split()))) for caption in text]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return BatchFeature({"input_ids": ids, "attention_mask": (ids > 0).long()})


def training_rows(count: int) -> list[dict]:
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    names = ("source_caption", "target_caption", "back_translation")
    return [
        {name: " ".join(str(draw.randrange(100, 119_000)) for _ in range(draw.randint(10, 22))) for name in names}
        | {"image_id": str(i), "visual_feats": torch.randn(1, 2048, generator=generator)}
        for i in range(count)
    ]


def build_model():
    from transformers import BertConfig

    from modeling_nrccr import NrccrConfig, NrccrModel

    torch.manual_seed(0)
    text = BertConfig(vocab_size=119_547, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = NrccrConfig(text_config=text, visual_feat_dim=2048, head_dropout=0.0)
    return NrccrModel(config)


def step_side(kind: str, steps: int, batch: int) -> dict:
    """Return the seconds a step, from the second one on, and the loss of each."""
    from transformers import TrainerCallback

    from modeling_nrccr import (
        DataCollatorForCrossLingualRetrieval,
        FeatureCache,
        NrccrLoss,
        NrccrTrainer,
        NrccrTrainingArguments,
    )

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-clock())

        def on_step_end(self, *args, **kwargs):
            times[-1] += clock()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    stock, rows, model = kind.startswith("stock"), training_rows(steps * batch), build_model().to(device())
    args = dict(
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        bf16="bf16" in kind,
    )
    with tempfile.TemporaryDirectory() as scratch:
        ours = NrccrTrainingArguments(
            output_dir=scratch,
            eval_strategy="no",
            load_best_model_at_end=False,
            trained_text_layers=TRAINED,
            gradient_cache="recompute" in kind,
            **args,
        )
        model.set_trained_layers(TRAINED)
        filled, processor = 0.0, Tokens()
        if not stock:
            start = clock()
            processor = FeatureCache(model, Tokens())
            processor.add_texts(
                row[name] for row in rows for name in ("source_caption", "target_caption", "back_translation")
            )
            filled = clock() - start
        collator = DataCollatorForCrossLingualRetrieval(processor)
        if stock:
            trainer = stock_trainer(model, scratch, args, rows, collator, NrccrLoss.from_arguments(ours))
            trainer.add_callback(Clock())
        else:
            trainer = NrccrTrainer(model, ours, rows, data_collator=collator, callbacks=[Clock()])
        trainer.train()
    lengths = torch.tensor(
        [len(row[n].split()) for row in rows for n in ("source_caption", "target_caption", "back_translation")]
    )
    operations = encoder_operations(lengths, WIDTH, TRAINED) / steps * 3  # forward, and twice that backward
    seconds, peak_gb, dtype = min(times[1:]), peak_gigabytes(), torch.bfloat16 if "bf16" in kind else torch.float32
    reached = rates(seconds, lengths / steps, operations, WIDTH, dtype)
    return {"seconds": seconds, "peak_gb": peak_gb, "losses": losses, "cache_seconds": filled} | reached


def stock_trainer(model, scratch: str, args: dict, rows: list[dict], collator, loss):
    from transformers import Trainer, TrainingArguments

    class Stock(torch.nn.Module):
        """What a user writes: the encoder once for each view, padded as it comes, then heads and loss."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image_ids, visual_feats, visual_attention_mask=None, **batch):
            encoder, states, masks = self.model.text_tower.encoder, {}, {}
            for prefix, view in zip(VIEWS, ("source", "target", "back_translation")):
                masks[view] = batch[f"{prefix}attention_mask"]
                states[view] = encoder(batch[f"{prefix}input_ids"], attention_mask=masks[view]).last_hidden_state
            read = self.model.read_views(states, masks, cross=True)
            embeds = {name: self.model.text_projection(features) for name, features in read.items()}
            from modeling_nrccr import NrccrOutput

            outputs = NrccrOutput(
                text_embeds=embeds["source"],
                target_text_embeds=embeds["target"],
                back_translation_text_embeds=embeds["back_translation"],
                teacher_text_embeds=embeds["teacher"],
                image_embeds=self.model.get_image_features(visual_feats=visual_feats).pooler_output,
                logit_scale=self.model.logit_scale.exp(),
            )
            return {"loss": loss(outputs, image_ids)["loss"]}

    trainer = Trainer(Stock(), TrainingArguments(output_dir=scratch, **args), collator, rows)
    trainer.model_accepts_loss_kwargs = False
    return trainer


def pairs() -> tuple[list[str], list[str]]:
    from modeling_nrccr.data.load import load_translated_dataset

    dataset, _ = load_translated_dataset("tuxpaint+cldr_emoji", "en", "gl", 0, "translated", "apertium", None)
    rows = [row for split in dataset.values() for row in split.remove_columns("image")]
    sources = [row["reference_source_caption"] or row["source_caption"] for row in rows]
    draw = random.Random(0)  # longer ones, as captions of photographs are: some captions in a row
    return tuple(
        [" ".join(texts[(i + j) % len(texts)] for j in range(counts[i])) for i in range(PAIRS)]
        for counts in [[draw.randint(1, 5) for _ in range(PAIRS)]]
        for texts in (sources, [row["target_caption"] or row["back_translation"] for row in rows])
    )


def contrast_side(kind: str, texts: Path) -> dict:
    """Time the forward and backward of one large batch."""
    from modeling_nrccr.loading.encoders import find_encoder

    encoder, (sources, targets) = find_encoder("multilingual-e5-small"), json.loads(texts.read_text())
    if kind == "cached":
        from benchmarks.translation.multi30k_text import text_model
        from modeling_nrccr import NrccrLoss

        model, processor = text_model(encoder)
        model.to(device()).set_trained_layers(None).train()
        model.recompute_passes = True
        loss_of = NrccrLoss(losses={"target_contrastive": 1.0})

        def step(sources, targets):
            batch = dict(processor(text=sources, return_tensors="pt"))
            batch |= {f"target_{key}": value for key, value in processor(text=targets, return_tensors="pt").items()}
            batch = {key: value.to(device()) for key, value in batch.items()}
            loss = loss_of(model(**batch, return_teacher=False))["loss"]
            loss.backward()
            return loss
    else:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.models import Normalize, Pooling, Transformer

        transformer = Transformer(encoder)
        model = SentenceTransformer(
            modules=[transformer, Pooling(transformer.get_word_embedding_dimension(), "mean"), Normalize()],
            device=str(device()),
        ).train()
        loss_of = CachedMultipleNegativesRankingLoss(model, mini_batch_size=int(kind.split()[1]))

        def step(sources, targets):
            features = [model.tokenize([f"query: {text}" for text in texts]) for texts in (sources, targets)]
            features = [{k: v.to(device()) if hasattr(v, "to") else v for k, v in side.items()} for side in features]
            loss = loss_of(features, None)
            loss.backward()
            return loss

    torch.manual_seed(0)
    step(sources[:64], targets[:64])  # warms up
    model.zero_grad()
    start = clock()
    loss = step(sources, targets)
    return {"seconds": clock() - start, "peak_gb": peak_gigabytes(), "loss": loss.item()}


def ratios(found: dict[str, dict], ours: str, peer: str) -> dict:
    result = {
        "peer": peer,
        "ratio": round(found[ours]["seconds"] / found[peer]["seconds"], 3),
        "memory_ratio": round(found[ours]["peak_gb"] / found[peer]["peak_gb"], 3),
    }
    if "floor_seconds" in found[ours]:
        result["over_floor"] = round(found[ours]["seconds"] / found[ours]["floor_seconds"], 3)
    if "losses" in found[ours]:
        pairs = zip(found[ours]["losses"], found[peer]["losses"])
        result["first_loss_difference"] = abs(found[ours]["losses"][0] - found[peer]["losses"][0])
        result["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=("step", "contrast"))
    parser.add_argument("--output", help="file of JSON lines that gets the report")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128, help="captions of a step, in three views each")
    parser.add_argument(
        "--texts", type=Path, help="JSON of the pairs of `contrast`; prepared where it is not there, and kept"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side in STEP_SIDES:
        return print(json.dumps(step_side(args.side, args.steps, args.batch)))
    if args.side:
        return print(json.dumps(contrast_side(args.side, args.texts)))
    report = machine() | {"batch": args.batch, "matmul_gflop_s": round(matmul_rate(WIDTH) / 1e9, 1)}
    if args.only in (None, "step"):
        found = in_turns(
            __spec__.name, STEP_SIDES, args.rounds, ("--steps", str(args.steps), "--batch", str(args.batch))
        )
        report["step"] = {side: ratios(found, side, "stock") for side in STEP_SIDES if side != "stock"} | {
            "sides": found
        }
        if "stock bf16" in found:
            report["step"]["ours bf16"]["ratio_to_bf16"] = ratios(found, "ours bf16", "stock bf16")["ratio"]
    if args.only in (None, "contrast"):
        with tempfile.TemporaryDirectory() as scratch:
            texts = args.texts or Path(scratch, "pairs.json")
            if not texts.exists():
                texts.write_text(json.dumps(pairs()))
            found = in_turns(__spec__.name, CONTRAST_SIDES, args.rounds, ("--texts", str(texts)))
        peer = min(CONTRAST_SIDES[1:], key=lambda side: found[side]["seconds"])
        report["contrast"] = ratios(found, "cached", peer) | {"sides": found}
    print(json.dumps(report, indent=1))
    if args.output:
        save_report(args.output, "training", report)


if __name__ == "__main__":
    main()

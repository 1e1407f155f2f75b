"""One data set, one pair of encoders, the cache of their outputs: what a recipe is trained and tested on."""

import json
import random
import shutil
from copy import copy, deepcopy
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import AutoImageProcessor, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from datasets_scripts.reading.videos import read_frames

from ..configuration_nrccr import NrccrConfig
from ..data.collator import COLUMNS, MEDIA_COLUMNS, DataCollatorForCrossLingualRetrieval
from ..data.lexicon import check_lexicon, lexicon_rows
from ..data.load import load_translated_dataset
from ..data.trained_split import split_seed
from ..loading.encoders import find_encoder
from ..loading.models import load_model
from ..modeling_nrccr import NrccrModel
from ..processing_nrccr import NrccrProcessor, NrccrTextProcessor
from ..recipes.fields import ExperimentArguments, ModelArguments
from ..retrieval.encoding import picture_rows
from ..retrieval.metrics import compute_retrieval_metrics, fuse_query_embeds
from ..translation.base import Translator
from ..translation.engines import split_engines
from .arguments import NrccrTrainingArguments
from .checkpoints import last_complete_checkpoint
from .feature_cache import FeatureCache
from .teacher import add_teacher_embeds as teach
from .trainer import NrccrTrainer


logger = logging.get_logger(__name__)
load_tokenizer = lru_cache(AutoTokenizer.from_pretrained)  # a large vocabulary is read for a second


def build_model(fields: ModelArguments, encoders: NrccrModel | None = None) -> tuple[NrccrModel, NrccrProcessor]:
    """Return a new model and its processor; over the towers of `encoders` where they are given. Raises ValueError for
    `do_lower_case` with a tokenizer that ignores it."""
    with PartialState().main_process_first():  # it may fetch and build them
        text_encoder = find_encoder(fields.text_encoder)
        vision_encoder = None if fields.vision_encoder == "none" else find_encoder(fields.vision_encoder)
    names = vars(fields).keys() & NrccrConfig.__dataclass_fields__.keys()
    settings = {name: getattr(fields, name) for name in names}
    if encoders is not None:
        model = encoders.with_new_heads(**settings)
    else:
        model = NrccrModel.from_encoders(text_encoder, vision_encoder, **settings)
    tokenizer = load_tokenizer(text_encoder, **({"do_lower_case": True} if fields.do_lower_case else {}))
    if fields.do_lower_case and tokenizer.tokenize("ÉTÉ") != tokenizer.tokenize("ete"):
        raise ValueError(f"do_lower_case is BERT's: {type(tokenizer).__name__} of {fields.text_encoder} ignores it")
    options = {
        "text_prefix": fields.text_prefix,
        "max_text_length": fields.max_text_length,
        "visual_feat_dim": model.config.visual_feat_dim,
    }
    if vision_encoder is None:
        return model, NrccrTextProcessor(tokenizer, **options)
    image_processor = AutoImageProcessor.from_pretrained(vision_encoder)
    return model, NrccrProcessor(tokenizer, image_processor, pad_to_square=fields.pad_to_square, **options)


class Experiment:
    """One data set, one pair of encoders, the cache of their outputs; trains and tests models on them."""

    def __init__(self, script: ExperimentArguments, model: ModelArguments, args: NrccrTrainingArguments):
        self.script, self.model, self.args = script, model, args
        check_lexicon(script.lexicon, args.text_only)
        with PartialState().main_process_first():
            self.dataset, self.translator = self.load(script.target_captions, script.translator)
            self.kept: set[str] | None = None  # captions of training, where not all are
            if script.train_captions >= 0:
                self.keep_captions(script.train_captions)
            if script.human_captions:
                self.add_human_captions(script.human_captions)
            languages = (script.source_language, script.language)
            self.lexicon = []
            if script.lexicon != "none":
                self.lexicon = lexicon_rows(script.lexicon, *languages, script.translator, script.data_dir)
                logger.info(f"lexicon: {len(self.lexicon):,} pairs of {script.lexicon}")
        columns = self.dataset["train"].column_names
        self.media = next(column for column in MEDIA_COLUMNS if column in columns)
        # what is cached; features come from their files as they are
        self.rows = self.dataset if self.media == "visual_feats" else self.dataset.remove_columns(self.media)
        if self.media == "visual_feats" and model.vision_encoder == "none" and model.visual_feat_dim is None:
            model.visual_feat_dim = self.dataset["train"][0]["visual_feats"].shape[-1]
        if script.base is not None:
            split_seed(script.base, script.split_seed, script.data)  # an error where it has seen the test
        self.encoders: NrccrModel | None = None
        self.english: NrccrTrainer | None = None  # that holds the base
        self.caches: dict[tuple, FeatureCache] = {}  # by what of the text is cached

    def load(self, target: str, translator: str) -> tuple[DatasetDict, Translator]:
        script = self.script
        return load_translated_dataset(
            script.data,
            script.source_language,
            script.language,
            script.split_seed,
            target,
            translator,
            script.data_dir,
            visual_feature=script.visual_feature,
            media_dir=script.media_dir,
            strict=script.strict,
            dataset_options=json.loads(script.dataset_options or "{}"),
        )

    def keep_captions(self, count: int):
        """Keep so many of the training captions, each with all its translations. Raises ValueError for fewer than 2,
        or more than there are."""
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
        """Add the human target caption of so many training captions (-1: all), drawn by the split seed; beside the
        translated ones, or with `target="human"` alone. Raises ValueError for more than there are."""
        rows = self.of_kept(self.load("human", split_engines(self.script.translator)[0])[0]["train"])
        if count > len(rows):
            raise ValueError(f"human_captions={count}, but there are {len(rows)}: -1 takes all")
        if count >= 0:
            rows = rows.select(random.Random(self.script.split_seed).sample(range(len(rows)), count))
        beside = [] if self.script.target_captions == "human" else [self.dataset["train"]]
        self.dataset["train"] = concatenate_datasets([*beside, rows])

    def cached(self, model: NrccrModel, processor: NrccrProcessor) -> FeatureCache:
        """Return the cache of all splits; the first process of each machine computes them, the others read what it
        wrote."""
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
                        strict=self.script.strict,
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
            logger.info(f"left out: {len(broken)} of {pictures} {self.media}s with {captions} captions")
            logger.info("\n".join(f"  {reason}" for reason in broken.values()))

    def picture(self, split: str, row: int):
        """Return a row's picture, or the frames of its video."""
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
        """Return a trainer of `base` as it is, to be asked in English and to teach."""
        args = copy(self.args)
        args.train_language, args.trained_text_layers, args.distillation_relation = None, 0, "picture"
        self.english = self.trainer(args)
        self.english.model.set_language(None)
        return self.english

    def train(self, name: str, **changes) -> NrccrTrainer:
        """Train a model and return its trainer, with the best on validation; `changes`: to the training arguments."""
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
        """Build new heads, drawn from the seed, over encoders that are loaded once; a copy of them where they train.
        With `base`, its own."""
        if self.script.base is not None:
            model, processor = load_model(self.script.base)
            set_seed(args.seed)
            return self.with_language(model, args), processor
        if self.encoders is None:
            self.encoders, _ = build_model(self.model)
        frozen = args.trained_text_layers == 0 and not args.train_vision_tower
        frozen = frozen and (args.train_language is None or self.model.adapter["kind"] != "lora")
        encoders = self.encoders if frozen else deepcopy(self.encoders)
        set_seed(args.seed)
        model, processor = build_model(self.model, encoders)
        return self.with_language(model, args), processor

    def with_language(self, model: NrccrModel, args: NrccrTrainingArguments) -> NrccrModel:
        """Return the model with the adapter of `args.train_language`, which alone is then trained; on its device."""
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
        """Tell whether every row of validation and test has a caption in `column`; human English is no machine's
        query."""
        held_out = [self.rows[split] for split in ("validation", "test")]
        if column == "source_caption" and self.script.translator == "none":
            if any(rows[column] == rows["reference_source_caption"] for rows in held_out):
                return False
        return not any(rows.data.column(column).null_count for rows in held_out)

    def test(self, trainer: NrccrTrainer, query_column: str, split: str = "test"):
        """Encode the test split. Return embeddings of queries and pictures, and the picture of each query."""
        rows = self.rows[split] if isinstance(trainer.data_collator.processor, FeatureCache) else self.dataset[split]
        return trainer.encode_dataset(rows, query_column)

    def queries(self, trainer: NrccrTrainer, query_column: str, split: str = "test") -> torch.Tensor:
        """Return embeddings of other queries for pictures that `test` has encoded."""
        return trainer.encode_captions(self.rows[split], query_column)


def best_fusion_weight(target: torch.Tensor, source: torch.Tensor, images: torch.Tensor, owner: torch.Tensor) -> float:
    """Find the share of the translated query that gives the best sum of recalls."""
    weights = [i / 10 for i in range(11)]
    return max(
        weights,
        key=lambda w: compute_retrieval_metrics(fuse_query_embeds(target, source, w), images, owner)["sum_recall"],
    )

"""The fields of recipes, which are flags and arguments of Python too; none of it is slow to import."""

from dataclasses import dataclass, field

from ..adapter_settings import DEFAULTS as ADAPTER
from ..adapter_settings import check_adapter
from .mappings import read_mapping


RECIPE = "Name of a recipe (`nrccr list recipes`), or a YAML file of one's own: any of these fields."
ANCHORS = {"none": (), "captions": ("captions",), "words": ("words",), "both": ("captions", "words")}
RIVALS = ("embed_distillation", "m2m", "trunk_calibration")  # what a team would try instead of an adapter


def option(default, help: str):
    """Return a field of a dataclass with what `--help` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass
class ExperimentArguments:
    """What is trained on, and what is written."""

    LEAST = {"human_captions": -1}
    RENAMED = {"config": "recipe", "dataset": "data", "target_language": "language", "target": "target_captions"}

    recipe: str = option("joint", RECIPE)
    data: str = option("tuxpaint+cldr_emoji", "Data sets of `nrccr list data`, joined by '+'; or a file, or a folder.")
    dataset_options: str | None = option(None, "More of a builder's options, as JSON: '{\"num_train\": 500}'.")
    data_dir: str | None = option(None, "Folder of the data; Debian packages are fetched where it is not given.")
    visual_feature: str | None = option(None, "Features: a folder, a name in data_dir/FeatureData, or none.")
    media_dir: str | None = option(None, "Folder of pictures or videos; default: images or videos in data_dir.")
    base: str | None = option(
        None,
        "A model of ours, which answers in English: the language is added to it. Or the YAML file that trains one, "
        "which stands beside the recipe's and is run first, on the same data.",
    )
    teacher: str | None = option(None, "A model of ours over the same frozen text encoder, whose embeddings teach.")
    num_frames: int = option(8, "Frames of each video, sampled uniformly.")
    source_language: str = option("en", "Language of the captions that exist.")
    language: str = option("gl", "Language of the searches.")
    translator: str = option(
        "apertium", "Machine translation engine, or several for training captions, joined by ','; none: as they came."
    )
    lexicon: str = option(
        "none", "Words to translate and train on beside the captions, of text_only: wordnet:5000, or a file; or none."
    )
    target_captions: str = option("translated", "Of training: 'translated', or 'human' (the upper bound).")
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

    RENAMED = {f"adapter_{name}": f"adapter: {{{name}: ...}}" for name in ADAPTER}

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

    def __post_init__(self):
        self.adapter = check_adapter(read_mapping(self.adapter, "adapter"))


@dataclass
class LanguageArguments:
    """What is added to what."""

    LEAST = {"split_seed": 0}
    RENAMED = {name: f"adapter: {{{name}: ...}}" for name in ADAPTER} | {
        "config": "recipe",
        "dataset": "data",
        "captions": "data",
        "eval": "test",
        "target_language": "language",
        "base": "the first argument: nrccr add-language BASE",
    }

    base: str = field(init=False)
    recipe: str = option("linear", RECIPE)
    text_encoder: str | None = option(None, "Another text encoder in the place of the base's own, e.g. multilingual.")
    text_prefix: str = option("", "Of text_encoder, e.g. 'query: ' for e5.")
    data: str | None = option(
        None,
        "English captions: .csv or .jsonl with a column caption, or .txt; or parallel sentences: .tsv, or columns "
        "source and target. Of each language: gl=FILE;ca=FILE. Or data sets of `nrccr list data`, joined by '+', "
        "which bring a test of human captions.",
    )
    data_dir: str | None = option(None, "Folder of the data sets.")
    split_seed: int | None = option(None, "Seed of the splits by groups of captions; default: the base's own.")
    test: str | None = option(
        None, "Human captions: .csv or .jsonl with image, target_caption and perhaps caption; or gl=FILE;ca=FILE."
    )
    source_language: str = option("en", "Language of the captions.")
    language: str = option("gl", "Language that is added; several, joined by ',', in one adapter.")
    translator: str = option(
        "apertium", "Machine translation engines, joined by ','; or of each language: gl=A,B;ca=C."
    )
    lexicon: str = option("none", "Words that are translated too: wordnet:5000, or a file, a word a line; or none.")
    source_anchor: str = option(
        "none",
        "Source text that is taught beside its translations, as the base reads it: captions, words (the lexicon's), "
        "both, or none. One text side then reads both languages, and none need be given.",
    )
    rivals: str = option("none", f"Trained and tested beside it: none, all, or some of {', '.join(RIVALS)}.")
    adapter: dict | str | None = option(
        None, "kind=lora,rank=32; also center, noise, layers. `nrccr list adapters` has the kinds."
    )

    def __post_init__(self):
        self.adapter = check_adapter(read_mapping(self.adapter, "adapter"))
        if self.source_anchor not in ANCHORS:
            raise ValueError(f"source_anchor={self.source_anchor!r}: one of {', '.join(ANCHORS)}")


@dataclass
class TranslatorArguments:
    """What is translated, and by how large a model."""

    RENAMED = {"config": "recipe", "dataset": "data", "target_language": "language"}

    recipe: str = option("marian_en_cs", RECIPE)
    data: str = option("multi30k:task1", "Data sets that have human captions in both languages, joined by '+'.")
    data_dir: str | None = option(None, "Folder of the data; fetched where it is not given.")
    also_test_on: str | None = option(None, "More data sets, whose test split is translated too.")
    source_language: str = option("en", "Language of the captions that exist.")
    language: str = option("cs", "Language that they are translated into.")
    both_directions: bool = option(True, "One model for both ways; a source then begins with a tag such as '>>cs<<'.")
    plain_rate: float = option(0.0, "Share of pairs without capital and full stop, as names and queries are written.")
    vocab_size: int = option(6000, "Pieces of the vocabulary that both languages share.")
    d_model: int = option(256, "Width of the model.")
    layers: int = option(3, "Layers of the encoder, and of the decoder.")
    ffn_dim: int = option(1024, "Width inside the feed-forward blocks.")
    attention_heads: int = option(4, "Heads of each attention block.")
    dropout: float = option(0.1, "Dropout on embeddings and after each block.")
    overwrite: bool = option(False, "Replaces the checkpoints of an earlier run in the same output_dir.")

"""Cross-lingual picture and video retrieval that survives translation noise, for Hugging Face."""

import importlib
from typing import TYPE_CHECKING

from transformers import AutoProcessor

from .configuration_nrccr import EfficientNetLiteConfig, NrccrConfig
from .data_collator import DataCollatorForCrossLingualRetrieval
from .discriminator import LanguageDiscriminator
from .encoding import encode_images, encode_texts
from .feature_cache import FeatureCache
from .losses import NrccrLoss, NrccrLossArguments
from .metrics import compute_retrieval_metrics
from .modeling_efficientnet_lite import EfficientNetLiteModel
from .modeling_nrccr import NrccrModel, NrccrOutput
from .processing_nrccr import NrccrProcessor, NrccrTextProcessor
from .translation import Translator, add_translations, load_translator
from .two_text_sides import NrccrTwoSidedProcessor, NrccrTwoSidedTextProcessor, join_text_sides


if TYPE_CHECKING:
    from .retriever import Hit, NrccrRetriever
    from .trainer import NrccrTrainer
    from .training_args import NrccrTrainingArguments

# AutoProcessor finds a saved processor by its class name among these; only the first has a config type of its own.
AutoProcessor.register(NrccrConfig, NrccrProcessor, exist_ok=True)
for _processor in (NrccrTextProcessor, NrccrTwoSidedProcessor, NrccrTwoSidedTextProcessor):
    AutoProcessor.register(_processor, _processor, exist_ok=True)

__version__ = "0.1.0"

# These bring `datasets` or the whole Trainer, 100 MB and half a second that encoding does without: on first use.
_LATER = {
    "Hit": "retriever",
    "NrccrRetriever": "retriever",
    "NrccrTrainer": "trainer",
    "NrccrTrainingArguments": "training_args",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})

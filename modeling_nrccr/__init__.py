"""Cross-lingual picture and video retrieval that survives translation noise, for Hugging Face."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# Each public name and its module, imported on first use: a query on the terminal need not wait for the Trainer.
_PUBLIC = {
    "DataCollatorForCrossLingualRetrieval": "data.collator",
    "EfficientNetLiteConfig": "configuration_nrccr",
    "EfficientNetLiteModel": "modeling_efficientnet_lite",
    "FeatureCache": "training.feature_cache",
    "Hit": "retrieval.retriever",
    "LanguageDiscriminator": "training.adversary",
    "NrccrConfig": "configuration_nrccr",
    "LossTerm": "training.losses",
    "NrccrLoss": "training.losses",
    "NrccrLossArguments": "training.losses",
    "NrccrModel": "modeling_nrccr",
    "NrccrOutput": "modeling_nrccr",
    "NrccrProcessor": "processing_nrccr",
    "NrccrRetriever": "retrieval.retriever",
    "NrccrTextProcessor": "processing_nrccr",
    "NrccrTrainer": "training.trainer",
    "NrccrTrainingArguments": "training.arguments",
    "NrccrTwoSidedProcessor": "two_text_sides",
    "NrccrTwoSidedTextProcessor": "two_text_sides",
    "Translator": "translation.base",
    "add_translations": "translation.columns",
    "compute_retrieval_metrics": "retrieval.metrics",
    "encode_images": "retrieval.encoding",
    "encode_texts": "retrieval.encoding",
    "join_text_sides": "two_text_sides",
    "load_translator": "translation.engines",
}

if TYPE_CHECKING:
    from .configuration_nrccr import EfficientNetLiteConfig, NrccrConfig
    from .data.collator import DataCollatorForCrossLingualRetrieval
    from .modeling_efficientnet_lite import EfficientNetLiteModel
    from .modeling_nrccr import NrccrModel, NrccrOutput
    from .processing_nrccr import NrccrProcessor, NrccrTextProcessor
    from .retrieval.encoding import encode_images, encode_texts
    from .retrieval.metrics import compute_retrieval_metrics
    from .retrieval.retriever import Hit, NrccrRetriever
    from .training.adversary import LanguageDiscriminator
    from .training.arguments import NrccrTrainingArguments
    from .training.feature_cache import FeatureCache
    from .training.losses import LossTerm, NrccrLoss, NrccrLossArguments
    from .training.trainer import NrccrTrainer
    from .translation.base import Translator
    from .translation.columns import add_translations
    from .translation.engines import load_translator
    from .two_text_sides import NrccrTwoSidedProcessor, NrccrTwoSidedTextProcessor, join_text_sides


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# `AutoModel` and `AutoProcessor` must find our classes once this package is imported, whatever is imported later. The
# command loads no model by them before it needs one, and `nrccr --help` must not wait for torch. `-m` is what Python
# calls itself while it looks for the module that it runs.
if Path(sys.argv[0] if sys.argv else "").stem not in ("nrccr", "-m"):
    from .loading import auto_classes

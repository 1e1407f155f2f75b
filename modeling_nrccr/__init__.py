"""Cross-lingual picture and video retrieval that survives translation noise, for Hugging Face."""

from .configuration_nrccr import EfficientNetLiteConfig, NrccrConfig
from .data_collator import DataCollatorForCrossLingualRetrieval
from .discriminator import LanguageDiscriminator
from .encoding import encode_images, encode_texts
from .feature_cache import FeatureCache
from .losses import NrccrLoss, NrccrLossArguments
from .metrics import compute_retrieval_metrics
from .modeling_efficientnet_lite import EfficientNetLiteModel
from .modeling_nrccr import NrccrModel, NrccrOutput
from .trainer import NrccrTrainer
from .training_args import NrccrTrainingArguments


__version__ = "0.1.0"

"""Tells the Auto classes of transformers of ours; to import it is enough."""

from transformers import AutoProcessor

from .. import modeling_efficientnet_lite, modeling_nrccr, open_clip  # noqa: F401  (each registers its own)
from ..configuration_nrccr import NrccrConfig
from ..processing_nrccr import NrccrProcessor, NrccrTextProcessor
from ..two_text_sides import NrccrTwoSidedProcessor, NrccrTwoSidedTextProcessor


# AutoProcessor finds a saved processor by its class name among these; only the first has a config type of its own.
AutoProcessor.register(NrccrConfig, NrccrProcessor, exist_ok=True)
for _processor in (NrccrTextProcessor, NrccrTwoSidedProcessor, NrccrTwoSidedTextProcessor):
    AutoProcessor.register(_processor, _processor, exist_ok=True)

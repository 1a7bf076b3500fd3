"""Lumina-mGPT, Lumina-mGPT 2.0 and PURE: one decoder, one processor, one pipeline.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints load without
`trust_remote_code`. Folders on the Hub carry the sibling files but not this one.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# By its file: older releases hide it from the top level where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_lumina_mgpt import LuminaMGPTConfig
from .image_processing_lumina_mgpt import LuminaMGPTImageProcessor
from .modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration, LuminaMGPTModel
from .processing_lumina_mgpt import LuminaMGPTProcessor
from .uni_rep import UniRep

__all__ = [
    "LuminaMGPTConfig",
    "LuminaMGPTForConditionalGeneration",
    "LuminaMGPTImageProcessor",
    "LuminaMGPTProcessor",
    "UniRep",
]

AutoConfig.register(LuminaMGPTConfig.model_type, LuminaMGPTConfig, exist_ok=True)
AutoImageProcessor.register(LuminaMGPTConfig, LuminaMGPTImageProcessor, exist_ok=True)
AutoProcessor.register(LuminaMGPTConfig, LuminaMGPTProcessor, exist_ok=True)
AutoModel.register(LuminaMGPTConfig, LuminaMGPTModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, exist_ok=True)

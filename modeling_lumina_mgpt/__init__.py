"""Lumina-mGPT, Lumina-mGPT 2.0 and PURE: one decoder, one processor, one pipeline.

Importing the package registers its classes with transformers' Auto classes, so that checkpoints load without
`trust_remote_code`. Folders on the Hub carry the sibling files but not this one.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .configuration_lumina_mgpt import LuminaMGPTConfig
from .modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration, LuminaMGPTModel

_LAZY = {
    "LuminaMGPTImageProcessor": "image_processing_lumina_mgpt",
    "LuminaMGPTProcessor": "processing_lumina_mgpt",
    "UniRep": "uni_rep",
}
__all__ = [
    "LuminaMGPTConfig",
    "LuminaMGPTForConditionalGeneration",
    "LuminaMGPTImageProcessor",
    "LuminaMGPTProcessor",
    "UniRep",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


AutoConfig.register(LuminaMGPTConfig.model_type, LuminaMGPTConfig, exist_ok=True)
AutoModel.register(LuminaMGPTConfig, LuminaMGPTModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, exist_ok=True)

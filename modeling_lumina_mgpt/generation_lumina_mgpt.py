"""Guidance, state-aware sampling and the decoding loops."""

from transformers import GenerationMixin


class LuminaMGPTGenerationMixin(GenerationMixin):
    """Generation of text and images in one stream."""

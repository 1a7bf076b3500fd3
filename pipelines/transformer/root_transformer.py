"""Lets diffusers load the transformer from the root of its repo, where transformers keeps it."""

from pathlib import Path

from torch import nn
from transformers import AutoModelForMultimodalLM


class RootTransformer(nn.Module):
    """Never made itself. It is a module so that diffusers hands `from_pretrained` the dtype and the quantization."""

    @classmethod
    def from_pretrained(cls, folder: str, dtype=None, torch_dtype=None, **kwargs):
        """The model in the parent of `folder`, in the dtype that either name gives or as it was saved."""
        dtype = dtype or torch_dtype or "auto"
        return AutoModelForMultimodalLM.from_pretrained(
            Path(folder).parent, dtype=dtype, trust_remote_code=True, **kwargs
        )

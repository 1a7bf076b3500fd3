"""Lets diffusers load the processor from the root of its repo, where transformers keeps it."""

from pathlib import Path

from transformers import AutoProcessor


class RootProcessor:
    """Never made itself."""

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs):
        """The processor in the parent of `folder`."""
        return AutoProcessor.from_pretrained(Path(folder).parent, trust_remote_code=True, **kwargs)

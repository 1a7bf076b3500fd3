"""What a user runs: the diffusers pipeline, the task behind `transformers.pipeline`, the `lumina-mgpt` command.

Installed as `modeling_lumina_mgpt.pipelines`. The pipeline is imported when first asked for. `transformer/` and
`processor/` hold what `save_pretrained` puts into folders of those names.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline_lumina_mgpt import LuminaMGPTPipeline, MemoryEstimate, VerifierError

__all__ = ["LuminaMGPTPipeline", "MemoryEstimate", "VerifierError"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline_lumina_mgpt

    return getattr(pipeline_lumina_mgpt, name)

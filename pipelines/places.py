"""Where a model, an adapter or a dataset may be, a folder here or a repo on the Hub, and where a model is run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .pipeline_lumina_mgpt import LuminaMGPTPipeline

HUB_SECONDS = 5  # to wait for an answer where a name is more likely a folder's


def folder_or_repo(name: str, what: str, others: str = "", repo_type: str = "model") -> str:
    """`name` again, if something is there or may be on the Hub.

    The Hub is asked only about a name that begins with a folder's, such as runs/no-such-run: without a connection a
    loader would try for a minute, and speak of the network then.

    Args:
        what: the argument's name, and `others`: what else it accepts, for the error.
        repo_type: "model" or "dataset".

    Raises:
        ValueError: if it is neither.
    """
    path = Path(name)
    if path.exists():
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{what} {name!r}: neither {others}a folder nor a repo NAMESPACE/NAME")
    if path.parent.is_dir() and not _is_known(name, repo_type):
        raise ValueError(f"{what} {name!r}: {path.parent} has no {path.name}, and no such repo was found on the Hub")
    return name


def _is_known(name: str, repo_type: str) -> bool:
    """Whether a repo is in the cache, or the Hub says that there is one."""
    from huggingface_hub import HfApi, constants

    if (Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{name.replace('/', '--')}").is_dir():
        return True
    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=HUB_SECONDS)
    except (OSError, ValueError, http_error()):  # the second for what cannot be a repo's name
        return False
    return True


def http_error() -> type[Exception]:
    """What the Hub's HTTP library raises without a connection; which library it is differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def best_device() -> "torch.device":
    """The accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_pipeline(folder: str | Path) -> "LuminaMGPTPipeline":
    """The pipeline of a model's folder or repo: on an accelerator, in bfloat16, or on the CPU, in float32."""
    import torch

    from .pipeline_lumina_mgpt import LuminaMGPTPipeline

    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return LuminaMGPTPipeline.from_pretrained(folder, dtype=dtype).to(device)

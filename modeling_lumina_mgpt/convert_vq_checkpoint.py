"""Published VQ checkpoints to `diffusers.VQModel`: Chameleon's VQGAN, SBER's MoVQ and LlamaGen's VQ-8.

All three are one architecture under different names, so one table renames them, and the shapes of the weights say
which variant is at hand. Decoder weights need no conversion: `LuminaMGPTForConditionalGeneration` loads them as is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Published names on the left: the taming-transformers spelling (Chameleon, MoVQ) or LlamaGen's.
RENAMES = (
    (r"^encoder\.(?:down|conv_blocks)\.", "encoder.down_blocks."),
    (r"^decoder\.(?:up|conv_blocks)\.", "decoder.up_blocks."),
    (r"\.mid\.(?:block_1|0)\.", ".mid_block.resnets.0."),
    (r"\.mid\.(?:attn_1|1)\.", ".mid_block.attentions.0."),
    (r"\.mid\.(?:block_2|2)\.", ".mid_block.resnets.1."),
    (r"\.(?:block|res)\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"(attentions\.\d+)\.norm\.(weight|bias)$", r"\1.group_norm.\2"),
    (r"(attentions\.\d+)\.norm\.", r"\1.spatial_norm."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
USAGE_COUNTER = "quantize.codebook_used"  # LlamaGen's training statistics


def convert_vq_state_dict(state_dict: dict[str, Tensor]) -> VQModel:
    """The published VQ model that these weights are, in eval mode, sharing their memory.

    `state_dict` holds exactly one model's tensors under their published names, none nested deeper.

    Raises:
        ValueError: naming every tensor that is missing, unexpected, or of another shape or kind.
    """
    published = {name: tensor for name, tensor in state_dict.items() if name != USAGE_COUNTER}
    num_levels = _count(published, "decoder.up")
    names = {_renamed(name, num_levels): name for name in published}
    weights = {new: _as_linear(new, published[old]) for new, old in names.items()}
    config = _config(weights)
    try:
        with torch.device("meta"):
            model = VQModel(**config)
    except ValueError as error:
        raise ValueError(f"no VQ model of a known layout: {error}") from error
    if faults := weight_faults(weights, model.state_dict(), names.__getitem__):
        raise ValueError("not the weights of one VQ model: " + "; ".join(faults))
    if any(name.startswith("encoder.conv_blocks.") for name in published):
        # LlamaGen compares unit vectors; scaling the latent leaves the nearest of unit codes the same.
        weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _renamed(name: str, num_levels: int) -> str:
    """A published name as diffusers has it."""
    if level := re.match(r"decoder\.up\.(\d+)\.", name):
        # taming counts the decoder's levels from the pixels, diffusers (like LlamaGen) from the codes
        name = f"decoder.up.{num_levels - 1 - int(level[1])}.{name[level.end() :]}"
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """A 1x1 convolution of an attention, as the linear layer that diffusers has there."""
    is_projection = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0] if is_projection else tensor


def _count(names, prefix: str) -> int:
    """How many indices follow `prefix` in these names."""
    return len({match[1] for name in names if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})


def _config(weights: dict[str, Tensor]) -> dict:
    """What `VQModel` these weights, under diffusers' names, are of."""

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"no VQ model of a known layout: missing {name}")
        if not weights[name].numel() or not weights[name].ndim:
            raise ValueError(f"no VQ model of a known layout: {name} has shape {list(weights[name].shape)}")
        return weights[name].shape

    num_levels = _count(weights, "encoder.down_blocks")
    attended = [_count(weights, f"encoder.down_blocks.{level}.attentions") > 0 for level in range(num_levels)]
    return {
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)],
        "block_out_channels": [
            shape(f"encoder.down_blocks.{level}.resnets.0.conv2.bias")[0] for level in range(num_levels)
        ],
        "layers_per_block": _count(weights, "encoder.down_blocks.0.resnets"),
        "latent_channels": shape("encoder.conv_out.bias")[0],
        "num_vq_embeddings": shape("quantize.embedding.weight")[0],
        "vq_embed_dim": shape("quantize.embedding.weight")[-1],
        "norm_type": "spatial" if any("conv_norm_out.conv_y" in name for name in weights) else "group",
        "lookup_from_codebook": True,
    }


def weight_faults(
    given: Mapping[str, Any], wanted: Mapping[str, Tensor], named: Callable[[str], str] = str
) -> list[str]:
    """All that keeps weights from being a model's; each has a `shape` and a `dtype`, `named` says what to call it."""
    faults = [f"unexpected {named(name)}" for name in sorted(given.keys() - wanted.keys())]
    faults += [f"missing {name}" for name in sorted(wanted.keys() - given.keys())]
    for name in sorted(given.keys() & wanted.keys()):
        weight = given[name]
        if weight.shape != wanted[name].shape:
            faults.append(f"{named(name)} has shape {list(weight.shape)}, not {list(wanted[name].shape)}")
        if weight.dtype not in DTYPES.values():
            dtypes = ", ".join(DTYPES)
            faults.append(f"{named(name)} has dtype {str(weight.dtype).removeprefix('torch.')}, accepted are {dtypes}")
    return faults

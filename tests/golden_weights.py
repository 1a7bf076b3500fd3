"""The golden tokenizers, and the weights behind the golden outputs: a rule over the published names makes them."""

import gzip
import json
import lzma
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.uni_rep import ImageLayout

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED_LAYOUT = ImageLayout(  # of Lumina-mGPT
    start_id=8197,
    end_id=8196,
    end_of_line_id=8803,
    end_of_turn_id=8710,
    size_ids=list(range(8805, 8933)),
    code_id_ranges=[[4, 8196]],
    size_unit_px=32,
    codes_per_size_unit=2,
)


def load_golden(name: str):
    """The content of `tests/golden/{name}.json.gz`."""
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


def load_golden_xz(name: str):
    """The content of `tests/golden/{name}.json.xz`."""
    return json.loads(lzma.decompress((GOLDEN / f"{name}.json.xz").read_bytes()))


def golden_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's names and ids; 2.0's has no BOS."""
    names = {"eos_token": "<|endoftext|>"} if name == "tokenizer_2" else {"bos_token": "<s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(load_golden_xz(name))), **names)


def seeded(shapes: dict[str, list[int]], seed: int, std: float) -> dict[str, torch.Tensor]:
    """Float32 tensors of these shapes, drawn in key order: norms about one (biases about zero), others N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key in sorted(shapes):
        noise = torch.randn(list(shapes[key]), generator=generator)
        if "norm" in key:
            state_dict[key] = 1 + 0.2 * noise if key.endswith("weight") else 0.2 * noise
        else:
            state_dict[key] = std * noise
    return state_dict


def published_decoder(config: LuminaMGPTConfig, seed: int, std: float) -> dict[str, torch.Tensor]:
    """Seeded weights as published checkpoints hold them: one `q_norm` and `k_norm` row per model-parallel shard."""
    with torch.device("meta"):
        shapes = {
            key: list(value.shape) for key, value in LuminaMGPTForConditionalGeneration(config).state_dict().items()
        }
    for key, shape in shapes.items():
        if "q_norm" in key or "k_norm" in key:
            shape[0] = config.model_parallel_size
    return seeded(shapes, seed, std)


def build_golden_decoder(record: dict, **config_kwargs) -> LuminaMGPTForConditionalGeneration:
    """The tiny float32 decoder of a golden `generation` record, loaded through the published layout."""
    config = LuminaMGPTConfig(**record["config"], **config_kwargs)
    state_dict = published_decoder(config, record["weight_seed"], record["weight_std"])
    return LuminaMGPTForConditionalGeneration.from_pretrained(None, config=config, state_dict=state_dict).eval()


def published_vq(name: str, num_codes: int | None = None) -> dict[str, torch.Tensor]:
    """Seeded weights of a narrow published VQ model under its own names: "chameleon", "movq" or "llamagen"."""
    record, codebook = load_golden("vq")[name], "quantize.embedding.weight"
    shapes = record["shapes"] | {codebook: [num_codes or record["shapes"][codebook][0], record["shapes"][codebook][1]]}
    state_dict = seeded(shapes, record["weight_seed"], record["weight_std"])
    generator = torch.Generator().manual_seed(record["weight_seed"] + 1)
    state_dict[codebook] = record["codebook_scale"] * torch.randn(shapes[codebook], generator=generator)
    return state_dict

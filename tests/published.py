"""Synthetic checkpoints as the published ones lie on the Hub: their names, files and nesting, with narrow shapes."""

import json
import re
from functools import cache
from pathlib import Path

import torch
from golden_weights import golden_tokenizer, published_decoder, published_vq
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_lumina_mgpt import LuminaMGPTConfig
from modeling_lumina_mgpt.training.train_tokenizer import build_tokenizer

NUM_CODES = 256  # as the golden VQ models have
VQ_FILES = {  # model: file, key under which its tensors lie
    "chameleon": ("vqgan.ckpt", "state_dict"),
    "movq": ("movqgan_270M.ckpt", None),
    "llamagen": ("vq_ds8_c2i.pt", "model"),
}
FAMILIES = {  # tokenizer, its codes, VQ model; the small ones have few codes and no text but bytes
    "small": ("small", NUM_CODES, "chameleon"),
    "small-2": ("small-2", NUM_CODES, "movq"),
    "lumina": ("tokenizer", 8192, "chameleon"),
    "lumina-2": ("tokenizer_2", 16384, "movq"),
    "pure": ("tokenizer_pure", 16384, "llamagen"),
}
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FOREIGN = {  # what published configurations hold beside the decoder's shape; the ids are the wrong ones of LLaMA
    "model_type": "chameleon",
    "architectures": ["ChameleonForConditionalGeneration"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.05,
    "mask_image_logits": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocabulary_map": {"<image>": 8711},
    "vq_config": {"embed_dim": 256},
}


@cache
def tokenizer_of(name: str):
    if not name.startswith("small"):
        return golden_tokenizer(name)
    tokenizer = build_tokenizer([], NUM_CODES, num_sizes=32, vocab_size=600)
    if name == "small":
        return tokenizer
    letters = str.maketrans("ABCDEFGHIJ", "0123456789")
    content = tokenizer.backend_tokenizer.to_str()
    content = re.sub("IMGIMG([A-J]+)Z", lambda match: f"<MOVQGAN{match[1].translate(letters)}>", content)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), eos_token="</s>")  # without BOS


def publish(
    folder: Path,
    family: str = "small",
    num_files: int = 2,
    suffix: str = "safetensors",
    row_per_head: bool = False,
    **values,
) -> Path:
    """Writes a checkpoint; `values` go to its configuration.

    Its norms of queries and keys have a row for each model-parallel shard; in facebook's, `row_per_head`.
    """
    name, num_codes, vq = FAMILIES[family]
    folder.mkdir()
    tokenizer_of(name).save_pretrained(folder)
    shape: dict = {
        **NARROW,
        "vocab_size": max(tokenizer_of(name).get_vocab().values()),
        **values,
    }  # the last is <|image|>
    (folder / "config.json").write_text(json.dumps({**FOREIGN, **shape}))

    state_dict = published_decoder(LuminaMGPTConfig(**shape), seed=0, std=0.1)
    if row_per_head:
        heads = {
            "q": shape["num_attention_heads"],
            "k": shape.get("num_key_value_heads", shape["num_attention_heads"]),
        }
        for key in [key for key in state_dict if "_norm." in key and "self_attn" in key]:
            state_dict[key] = state_dict[key].repeat_interleave(
                heads[key.split(".")[-2][0]] // len(state_dict[key]), 0
            )
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(num_files):
        file = f"{stem}-{i + 1:05d}-of-{num_files:05d}.{suffix}" if num_files > 1 else f"{stem}.{suffix}"
        part = {key: state_dict[key] for key in sorted(state_dict)[i::num_files]}
        if i == 0 and vq == "chameleon":
            part["model.vqmodel.encoder.conv_in.bias"] = torch.zeros(3)  # as in Chameleon's starting points
        weight_map |= dict.fromkeys(part, file)
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))

    (file, key), weights = VQ_FILES[vq], repeated_vq(vq, num_codes)
    torch.save({key: weights} if key else weights, folder / file)
    return folder


def repeated_vq(vq: str, num_codes: int) -> dict[str, torch.Tensor]:
    """A golden VQ model with its codebook as often as there are codes: they are the golden ones modulo NUM_CODES."""
    weights = published_vq(vq)
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"].repeat(num_codes // NUM_CODES, 1)
    return weights

"""Synthetic checkpoints as the published ones lie on the Hub: their names, files and nesting, with narrow shapes."""

import json
from functools import cache
from pathlib import Path

import torch
from golden_weights import golden_tokenizer, published_decoder, published_vq
from safetensors.torch import save_file

from modeling_lumina_mgpt import LuminaMGPTConfig
from modeling_lumina_mgpt.training.train_tokenizer import build_tokenizer

NUM_CODES = 64
VQ_FILES = {  # model: file, key under which its tensors lie
    "chameleon": ("vqgan.ckpt", "state_dict"),
    "movq": ("movqgan_270M.ckpt", None),
    "llamagen": ("vq_ds8_c2i.pt", "model"),
}
FAMILIES = {  # tokenizer, its codes, VQ model; "small" is Lumina-mGPT's with few codes and no text but bytes
    "small": ("small", NUM_CODES, "chameleon"),
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
    if name == "small":
        return build_tokenizer([], NUM_CODES, num_sizes=32, vocab_size=400)
    return golden_tokenizer(name)


def publish(folder: Path, family: str = "small", num_files: int = 2, suffix: str = "safetensors", **values) -> Path:
    """Writes a checkpoint; `values` go to its configuration."""
    name, num_codes, vq = FAMILIES[family]
    folder.mkdir()
    tokenizer_of(name).save_pretrained(folder)
    shape = {**NARROW, "vocab_size": max(tokenizer_of(name).get_vocab().values()), **values}  # the last is <|image|>
    (folder / "config.json").write_text(json.dumps({**FOREIGN, **shape}))

    state_dict = published_decoder(LuminaMGPTConfig(**shape), seed=0, std=0.1)
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

    (file, key), weights = VQ_FILES[vq], published_vq(vq, num_codes)
    torch.save({key: weights} if key else weights, folder / file)
    return folder

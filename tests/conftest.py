"""Fixtures that every test may ask for: a tiny processor with its parts, all made in code."""

import os

import pytest
import torch
from diffusers import VQModel

from hub_server import hub
from modeling_lumina_mgpt import (
    LuminaMGPTConfig,
    LuminaMGPTForConditionalGeneration,
    LuminaMGPTImageProcessor,
    LuminaMGPTProcessor,
)
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training.train_tokenizer import build_tokenizer

__all__ = ["hub"]
torch.set_num_threads(1)  # tests run in as many processes as there are cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what they start, too
NUM_CODES, SIZE_UNIT_PX, CODES_PER_SIZE_UNIT = 64, 16, 2
TEXTS = ["Generate an image of 64x32 according to the following prompt:\na red sphere and a blue cube."]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tokenizer(TEXTS, NUM_CODES, num_sizes=10, vocab_size=400)


@pytest.fixture(scope="session")
def tiny_vqvae():
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
        lookup_from_codebook=True,
    )


@pytest.fixture
def tiny_processor(tiny_tokenizer, tiny_vqvae):
    processor = LuminaMGPTProcessor(
        LuminaMGPTImageProcessor(),
        tiny_tokenizer,
        size_unit_px=SIZE_UNIT_PX,
        codes_per_size_unit=CODES_PER_SIZE_UNIT,
        target_px=64,
    )
    processor.vqvae = tiny_vqvae
    return processor


@pytest.fixture
def tiny_config(tiny_processor):
    """Makes configurations of a tiny decoder for `tiny_processor`: `tiny_config(swin_norm=True)`."""

    def make(**overrides):
        tokenizer, uni_rep = tiny_processor.tokenizer, tiny_processor.uni_rep
        values = {
            "vocab_size": len(tokenizer) - 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": uni_rep.end_of_turn_id,
            "image_layout": uni_rep.layout_dict(),
            "image_token_id": tiny_processor.image_token_id,
            "default_height_px": 32,
            "default_width_px": 32,
        }
        return LuminaMGPTConfig(**{**values, **overrides})

    return make


@pytest.fixture
def tiny_pipe(tiny_config, tiny_processor, tiny_vqvae):
    torch.manual_seed(0)
    pipe = LuminaMGPTPipeline(LuminaMGPTForConditionalGeneration(tiny_config()).eval(), tiny_vqvae, tiny_processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_folder(tiny_pipe, tmp_path):
    """A Hub folder of the tiny model."""
    tiny_pipe.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"

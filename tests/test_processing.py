"""Conversations, prompts and messages become the reference's ids, by one path, and come back as text and pictures."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_lumina_mgpt import LuminaMGPTImageProcessor, LuminaMGPTProcessor

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {"lumina_mgpt": ("tokenizer", 2), "lumina_mgpt_2": ("tokenizer_2", 4), "pure": ("tokenizer_pure", 4)}


def load(name):
    return json.loads(lzma.open(GOLDEN / f"{name}.json.xz").read())


@pytest.fixture(scope="module")
def golden():
    return load("sequences")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, golden):
    name, codes_per_size_unit = FAMILIES[request.param]
    backend = Tokenizer.from_str(json.dumps(load(name)))
    names = {"eos_token": "<|endoftext|>"} if name == "tokenizer_2" else {"bos_token": "<s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    processor = LuminaMGPTProcessor(LuminaMGPTImageProcessor(), tokenizer, codes_per_size_unit=codes_per_size_unit)
    return processor, golden[request.param]


def numbered_pictures(sizes):
    return [Image.new("RGB", tuple(size), (i, 0, 0)) for i, size in enumerate(sizes)]


def answer_codes(processor, monkeypatch, codes):
    """Has the VQ model see the codes with the number that a picture is painted in."""
    code_px = processor.size_unit_px // processor.codes_per_size_unit

    def encode(pixels):
        numbers = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        return torch.stack([torch.tensor(codes[i]).view(pixels.shape[2] // code_px, -1) for i in numbers])

    monkeypatch.setattr(processor, "_encode_pixels", encode)


def test_conversations_have_the_reference_ids_and_labels(family, monkeypatch):
    processor, golden = family
    for record in golden["conversations"]:
        images, target_px = numbered_pictures(record["image_sizes"]), record.get("target", 512)
        answer_codes(processor, monkeypatch, record["codes"])
        encoded = processor.encode_conversation(record["turns"], images, target_px)
        assert encoded == {"input_ids": record["input_ids"], "labels": record["labels"]}

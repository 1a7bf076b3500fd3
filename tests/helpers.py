"""What several test modules share: pictures, columns, a stand-in for tokenizers, drawing, files, new interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL import Image

CAPTIONED = Features({"image": ImageFeature(), "caption": Value("string")})
WITHOUT_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_lumina_mgpt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())

import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

CODE = {"trust_remote_code": True}

def assert_same(image):
    assert np.array_equal(image, Image.open("expected.png"))

def call():
    return {"height": 48, "width": 32, "generator": torch.Generator().manual_seed(0)}
"""


class Vocabulary(dict):
    """Names and ids, as `UniRep` asks a tokenizer for them."""

    def get_vocab(self):
        return self


def random_picture(width_px: int = 64, height_px: int = 32, seed: int = 0) -> Image.Image:
    """Noise, which no other seed has."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8))


def prompts(processor) -> list:
    """Four of several lengths, each by itself."""
    return [
        processor(text, return_tensors="pt") for text in ("a", "a red sphere and", "a blue", "a cube and a sphere")
    ]


def draw(model, inputs, seeds=None, **kwargs):
    generator = [torch.Generator().manual_seed(s) for s in seeds] if seeds is not None else None
    return model.generate(**inputs, generator=generator, **kwargs)


def continuation(model, row, prompt_length) -> list[int]:
    """The new tokens of a returned row, padding left out."""
    return [i for i in row[prompt_length:].tolist() if i != model.config.pad_token_id]


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_without_package(code: str, cwd: Path) -> str:
    """Runs code in a new process where the package cannot be imported; returns what it wrote to stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(cwd / "hf_home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + code]
    result = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stderr

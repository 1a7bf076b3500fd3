"""One folder serves every loader of transformers and diffusers where the package is not installed."""

import numpy as np
import pytest
import torch

from helpers import run_without_package
from modeling_lumina_mgpt.checkpoints import link_code
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

EVERY_LOADER = """
pipe = DiffusionPipeline.from_pretrained("tiny", **CODE)
assert_same(pipe("a red sphere", **call()).images[0])
pipe.save_pretrained("again")

for folder in ("tiny", "again"):
    model, processor = (auto.from_pretrained(folder, **CODE) for auto in (AutoModelForMultimodalLM, AutoProcessor))
    inputs = processor(processor.task_prompt("text-to-image", "a red sphere", 48, 32))
    ids = model.generate(**inputs, **call(), max_new_tokens=34)
    assert_same(processor.decode_ids(ids[0, inputs["input_ids"].shape[1]:])[0])

for task in ("text-to-image", None):
    assert_same(pipeline(task, model="again", **CODE)("a red sphere", **call())[0])
question = [{"type": "image", "image": Image.open("expected.png")}, {"type": "text", "text": "What is it?"}]
answer = pipeline("image-text-to-text", model="tiny", **CODE)
output = answer([{"role": "user", "content": question}], max_new_tokens=8, return_full_text=False)
assert isinstance(output[0]["generated_text"], str)

pipe = DiffusionPipeline.from_pretrained("again", dtype=torch.bfloat16, **CODE)
assert pipe.transformer.dtype == pipe.vqvae.dtype == torch.bfloat16
"""
COMPLAINTS = ("newly initialized", "unexpected", "missing", "not used", "were not", "warning")


def files(folder):
    """A folder's files by name, with their bytes where they do not depend on where the folder was loaded from."""
    varying = (
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "tokenizer_config.json",
        "vqvae/config.json",
    )
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): None if str(path).endswith(varying) else path.read_bytes() for path in paths
    }


@pytest.fixture
def expected(tiny_pipe, tiny_folder):
    """The picture that the folder `tiny` draws, in `expected.png` beside it."""
    image = tiny_pipe("a red sphere", height=48, width=32, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(tiny_folder.parent / "expected.png")
    return image


@pytest.mark.slow
def test_every_loader_draws_the_same_picture_and_saves_the_same_folder(expected, tiny_folder, tmp_path):
    link_code(tiny_folder)
    messages = run_without_package(EVERY_LOADER, tmp_path)
    assert not [complaint for complaint in COMPLAINTS if complaint in messages.lower()], messages
    assert files(tmp_path / "again") == files(tiny_folder)
    pipe = LuminaMGPTPipeline.from_pretrained(tmp_path / "again")
    image = pipe("a red sphere", height=48, width=32, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(image, expected)


def test_a_folder_with_links_can_be_saved_to_without_touching_what_they_lead_to(tiny_pipe, tiny_folder):
    copies = files(tiny_folder)
    link_code(tiny_folder)
    links = [path for path in tiny_folder.rglob("*.py") if path.is_symlink()]
    sources = {link.resolve(): link.stat().st_mtime_ns for link in links}
    assert len(links) == sum(name.endswith(".py") for name in copies) and files(tiny_folder) == copies
    tiny_pipe.save_pretrained(tiny_folder)
    assert not [path for path in tiny_folder.rglob("*") if path.is_symlink()] and files(tiny_folder) == copies
    assert sources == {source: source.stat().st_mtime_ns for source in sources}

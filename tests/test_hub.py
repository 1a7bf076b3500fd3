"""Models go to a Hub and come back by repo, by revision and offline, with the package and without it."""

import pytest

from helpers import WITHOUT_PACKAGE
from hub_server import run_python
from modeling_lumina_mgpt.checkpoints import link_code

pytestmark = [pytest.mark.hub, pytest.mark.slow]

PUSH = """
import torch
from huggingface_hub import HfApi, ModelCard
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

def draw(path):
    call = {{"height": 48, "width": 32, "generator": torch.Generator().manual_seed(0)}}
    pipe("a red sphere", **call).images[0].save(path)

pipe = LuminaMGPTPipeline.from_pretrained("tiny")
pipe.push_to_hub({repo!r})
HfApi().create_tag({repo!r}, tag="v1")
draw("v1.png")

torch.nn.init.normal_(pipe.transformer.lm_head.weight)
pipe.transformer.push_to_hub({repo!r})
pipe.processor.push_to_hub({repo!r})
card = b"---\\nlicense: apache-2.0\\n---\\nA tiny model."  # older ModelCards have the real Hub check it
HfApi().upload_file(repo_id={repo!r}, path_or_fileobj=card, path_in_repo="README.md")
draw("main.png")
assert "A tiny model." in ModelCard.load({repo!r}).text
"""
PULL = """
import os
from huggingface_hub import snapshot_download

for revision in ("v1", "main"):
    def assert_same(image):
        assert np.array_equal(image, Image.open(f"{{revision}}.png")), revision

    at = {{"revision": revision, **CODE}}
    model, processor = (auto.from_pretrained({repo!r}, **at) for auto in (AutoModelForMultimodalLM, AutoProcessor))
    inputs = processor(processor.task_prompt("text-to-image", "a red sphere", 48, 32))
    ids = model.generate(**inputs, **call(), max_new_tokens=34)
    assert_same(processor.decode_ids(ids[0, inputs["input_ids"].shape[1]:])[0])
    assert_same(pipeline(model={repo!r}, **at)("a red sphere", **call())[0])

    if "HF_HUB_OFFLINE" in os.environ:  # with code of a repo's own, diffusers needs the Hub or a folder
        pipe = DiffusionPipeline.from_pretrained(snapshot_download({repo!r}, revision=revision), **CODE)
    else:
        pipe = DiffusionPipeline.from_pretrained({repo!r}, **at)
    assert_same(pipe("a red sphere", **call()).images[0])
    assert_same(type(pipe).from_pretrained({repo!r}, **at)("a red sphere", **call()).images[0])
"""


def test_a_pushed_pipeline_comes_back_at_every_revision_and_offline(hub, tiny_folder, tmp_path):
    repo = hub.repo_id("tiny")
    run_python(PUSH.format(repo=repo), hub.env, tmp_path)
    pull = WITHOUT_PACKAGE + PULL.format(repo=repo)
    run_python(pull, hub.env, tmp_path)
    run_python(pull, hub.env | {"HF_HUB_OFFLINE": "1"}, tmp_path)


def test_the_push_command_uploads_code_weights_and_card_but_no_training_state(hub, tiny_folder, tmp_path):
    repo = hub.repo_id("pushed")
    link_code(tiny_folder)
    wanted = {str(path.relative_to(tiny_folder)) for path in tiny_folder.rglob("*") if path.is_file()} | {"README.md"}
    (tiny_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny model.\n")
    (tiny_folder / "trainer").mkdir()
    (tiny_folder / "trainer" / "optimizer.pt").touch()
    code = f"""
        from modeling_lumina_mgpt.pipelines.cli import app
        app(["push", "tiny", {repo!r}], standalone_mode=False)
        from huggingface_hub import HfApi, snapshot_download
        print(sorted(HfApi().list_repo_files({repo!r})))
        snapshot_download({repo!r}, local_dir="copy")
    """
    printed = run_python(code, hub.env, tmp_path)
    assert repo in printed and str(sorted({*wanted, ".gitattributes"})) in printed
    assert all((tmp_path / "copy" / name).read_bytes() == (tiny_folder / name).read_bytes() for name in wanted)

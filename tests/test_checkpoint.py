"""The checkpoint that comes along: whole, with code that is there, and able to draw."""

import warnings
from importlib.resources import files

import pytest
import torch

from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.convert_lumina_mgpt_checkpoint import check
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training.evaluate import judge, passes
from modeling_lumina_mgpt.training.tabletop import parse


@pytest.fixture
def folder():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of links that became text
        return default_checkpoint()


def test_it_has_all_that_a_converted_folder_has(folder):
    assert check(folder)[1] == "4096 image codes, 16 sizes found by name"
    assert all(path.exists() for path in folder.rglob("*"))  # a link to nothing does not


def test_its_code_is_the_packages_own(folder):
    packages = [files(name) for name in ("modeling_lumina_mgpt", "modeling_lumina_mgpt.pipelines")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    assert {"modeling_lumina_mgpt.py", "pipeline_lumina_mgpt.py", "transformer/root_transformer.py"} < found.keys()
    for name, content in found.items():
        (own,) = [package / name for package in packages if (package / name).is_file()]
        assert own.read_bytes() == content, name


def test_it_draws_what_a_sentence_says(folder):
    pipe = LuminaMGPTPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a large red sphere", image_top_k=1).images[0]
    assert picture.size == (64, 64) and passes(parse("a large red sphere"), judge(picture))
    assert not passes(parse("a large blue sphere"), judge(picture))

import pytest
import torch
from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline


@pytest.fixture
def pipe(tiny_config, tiny_processor, tiny_vqvae):
    torch.manual_seed(0)
    pipe = LuminaMGPTPipeline(LuminaMGPTForConditionalGeneration(tiny_config()).eval(), tiny_vqvae, tiny_processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_saved_folder_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "tiny")
    again = LuminaMGPTPipeline.from_pretrained(tmp_path / "tiny")
    call = dict(height=48, width=32, generator=seeded(), output_type="np")
    assert (
        pipe("a red sphere", **{**call, "generator": seeded()}).images == again("a red sphere", **call).images
    ).all()

"""The three published VQ models become `diffusers.VQModel`: same codes, same pixels, every tensor accounted for."""

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, load_golden, published_vq

from modeling_lumina_mgpt.convert_vq_checkpoint import convert_vq_state_dict

MODELS = ("chameleon", "movq", "llamagen")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_codes_and_pixels_are_the_references(name):
    golden = np.load(GOLDEN / f"vq_{name}.npz")
    codes = torch.from_numpy(golden["codes"]).long()  # (rows, cols)
    model = convert_vq_state_dict(published_vq(name))

    pixels = torch.from_numpy(golden["image"]).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, height, width)
    found = model.quantize(model.encode(pixels).latents)[2][2]
    assert torch.equal(found.view(codes.shape), codes)

    shape = (1, *codes.shape, model.config.vq_embed_dim)
    decoded = model.decode(codes, force_not_quantize=True, shape=shape).sample[0]
    torch.testing.assert_close(decoded, torch.from_numpy(golden["pixels"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_full_size_name_and_shape_has_its_place(name):
    shapes = load_golden("vq_manifest")[name]
    model = convert_vq_state_dict({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    num_published = sum(np.prod(shape) for key, shape in shapes.items() if key != "quantize.codebook_used")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == num_published


def test_a_converted_model_survives_its_folder(tmp_path):
    model = convert_vq_state_dict(published_vq("movq"))
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def test_faulty_weights_are_all_named():
    weights = published_vq("chameleon")
    weights.pop("decoder.mid.attn_1.q.weight")
    weights["decoder.conv_in.bias"] = torch.zeros(7)
    weights["loss.logvar"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        convert_vq_state_dict(weights)
    assert "missing decoder.mid_block.attentions.0.to_q.weight" in str(error.value)
    assert "unexpected loss.logvar" in str(error.value)
    assert "decoder.conv_in.bias has shape [7], not [128]" in str(error.value)


@pytest.mark.parametrize("weights", [{}, {"lm_head.weight": torch.zeros(2, 2)}])
def test_something_else_is_refused(weights):
    with pytest.raises(ValueError, match="no VQ model"):
        convert_vq_state_dict(weights)

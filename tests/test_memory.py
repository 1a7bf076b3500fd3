"""Memory: estimates are what real tensors take, a call that will not fit fails first, tiles need less."""

import random
from importlib.resources import files

import pytest
import torch
from diffusers import VQModel
from golden_weights import published_vq
from torch.profiler import ProfilerActivity, profile

from modeling_lumina_mgpt import LuminaMGPTProcessor
from modeling_lumina_mgpt.convert_vq_checkpoint import convert_vq_state_dict
from modeling_lumina_mgpt.decoding_lumina_mgpt import COLUMNS
from modeling_lumina_mgpt.pipelines import pipeline_lumina_mgpt
from modeling_lumina_mgpt.processing_lumina_mgpt import SharedNorms, _decoded, _float_bytes_per_code
from modeling_lumina_mgpt.training.tabletop_renderer import render, to_image
from modeling_lumina_mgpt.training.tabletop_scenes import sample_scene

DEFAULT = files("modeling_lumina_mgpt.checkpoints") / "lumina-mgpt-tabletop"


def peak_bytes(run) -> int:
    """Most bytes that PyTorch had allocated at a time, kernels' own included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def psnr(one, other) -> float:
    """In decibels, of pixels in [-1, 1]."""
    error = (one.clamp(-1, 1) - other.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


@pytest.fixture
def scene_codes(default_processor):
    """Codes (32, 32) of a rendered scene."""
    scene = sample_scene(random.Random(0), 256, 256)
    return default_processor.encode_images([to_image(render([scene], 256, 256).rgb[0])], size=(256, 256))[0]


@pytest.fixture
def default_processor():
    return LuminaMGPTProcessor.from_pretrained(DEFAULT)


@pytest.mark.parametrize("name", ["default", "chameleon", "movq", "llamagen"])
def test_decoding_takes_what_was_counted(name):
    vqvae = convert_vq_state_dict(published_vq(name)) if name != "default" else None
    vqvae = vqvae or VQModel.from_pretrained(DEFAULT, subfolder="vqvae")
    codes = torch.zeros(2, 12, 8, dtype=torch.long)
    counted = codes.numel() * _float_bytes_per_code(vqvae)
    assert counted <= peak_bytes(lambda: _decoded(vqvae, codes)) <= (1.3 if name == "default" else 1.02) * counted


def test_weights_are_counted_as_they_are_loaded(tiny_pipe):
    def num_values(module):
        return sum(weight.numel() for weight in module.parameters())

    vq_bytes = 4 * num_values(tiny_pipe.vqvae)
    assert tiny_pipe.estimate_memory(32, 32).weights == 4 * num_values(tiny_pipe.transformer) + vq_bytes
    tiny_pipe.transformer.to(torch.bfloat16)
    found = tiny_pipe.estimate_memory(32, 32)
    assert found.weights == 2 * num_values(tiny_pipe.transformer) + vq_bytes
    assert found.total == found.weights + found.cache + found.vq_decode
    assert str(found).startswith(f"weights {found.weights / 1e6:.1f} MB, cache")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_cache_is_not_larger_than_was_estimated_and_not_much_smaller(tiny_pipe, guidance_scale):
    seen: dict = {}
    tiny_pipe.transformer.model.register_forward_pre_hook(lambda _, args, call: seen.update(call), with_kwargs=True)
    tiny_pipe(["a", "a red sphere"], height=64, width=32, guidance_scale=guidance_scale)
    keys = seen["past_key_values"].keys
    found = sum(2 * key.nbytes for key in keys)
    num_tokens = keys[0].shape[2]
    prompt_tokens = num_tokens - tiny_pipe.processor.uni_rep.num_tokens(8, 4)
    estimate = tiny_pipe.estimate_memory(64, 32, 2, guidance_scale, prompt_tokens).cache
    assert found <= estimate <= found / num_tokens * (num_tokens + 2 * COLUMNS)


@pytest.mark.parametrize(
    ("values", "accepted"),
    [
        ({"height": 40}, "height 40 px: accepted are multiples of 16"),
        ({"width": None}, "width None px: accepted are multiples of 16"),
        ({"batch": 0}, "batch 0: accepted are 1 and more"),
        ({"guidance_scale": "4"}, "guidance_scale '4': accepted are numbers"),
        ({"prompt_tokens": 0.5}, "prompt_tokens 0.5: accepted are 1 and more"),
    ],
)
def test_impossible_estimates_are_refused(tiny_pipe, values, accepted):
    with pytest.raises(ValueError, match=accepted):
        tiny_pipe.estimate_memory(**{"height": 32, "width": 32, **values})


def needed_bytes(pipe, height, width, batch):
    """What a call for this prompt compares with what is free."""
    length = pipe.processor(
        pipe.processor.task_prompt("text-to-image", "a", height, width), height=height, width=width
    )
    estimate = pipe.estimate_memory(height, width, batch, prompt_tokens=length["input_ids"].shape[1])
    return estimate.cache + estimate.vq_decode


def test_what_will_not_fit_fails_before_it_begins_and_says_what_fits(tiny_pipe, monkeypatch):
    def refused(free, **call) -> str:
        monkeypatch.setattr(pipeline_lumina_mgpt, "free_bytes", lambda device: free)
        with monkeypatch.context() as patch, pytest.raises(MemoryError) as caught:
            patch.setattr(tiny_pipe.transformer, "forward", None)  # whoever calls it fails otherwise
            tiny_pipe("a", **call)
        return str(caught.value)

    call = {"height": 64, "width": 96}
    three = needed_bytes(tiny_pipe, **call, batch=3)
    message = refused(three, **call, num_images_per_prompt=5)
    assert message.startswith("pictures of 96x64 px, 5 at a time, need ") and message.endswith(": 3 at a time fit")
    assert len(tiny_pipe("a", **call, num_images_per_prompt=3).images) == 3
    one = needed_bytes(tiny_pipe, 32, 48, batch=1)
    assert refused(one, **call).endswith("one of 48x32 px fits")
    assert tiny_pipe("a", height=32, width=48).images[0].size == (48, 32)
    assert refused(100, **call).endswith("not even the smallest fits")
    with pytest.raises(MemoryError, match=r"2 at a time.* 1 at a time fit"):
        monkeypatch.setattr(pipeline_lumina_mgpt, "free_bytes", lambda device: one)
        next(tiny_pipe.stream(["a", "a"], height=32, width=48))
    with pytest.raises(ValueError, match="max_new_tokens is 'x'"):  # what is wrong anyway is refused as ever
        tiny_pipe("a", max_new_tokens="x")


def test_where_nothing_is_guided_nothing_is_counted_for_it(tiny_pipe, monkeypatch):
    asked, estimate = [], tiny_pipe._cache_bytes
    monkeypatch.setattr(tiny_pipe, "_cache_bytes", lambda *call: asked.append(call[2]) or estimate(*call))
    picture = tiny_pipe("a", height=32, width=32, guidance_scale=3.0).images[0]
    tiny_pipe(image=picture, task="caption", max_new_tokens=2)  # words are not guided
    tiny_pipe.transformer.generation_config.image_to_image = {"guidance_scale": 1.0}
    tiny_pipe(image=picture, task="depth")
    assert asked == [[3.0], [1.0], [1.0]]


def test_where_free_memory_is_not_known_nothing_is_refused(tiny_pipe, monkeypatch):
    free_bytes = pipeline_lumina_mgpt.free_bytes
    assert free_bytes(torch.device("cpu")) > 2**20
    monkeypatch.setattr(tiny_pipe, "_cache_bytes", lambda *call: 2**60)
    with pytest.raises(MemoryError, match="not even the smallest fits"):
        tiny_pipe("a")
    monkeypatch.setattr(pipeline_lumina_mgpt, "free_bytes", lambda device: free_bytes(torch.device("mps")))
    assert tiny_pipe("a").images[0].size == (32, 32)


def test_tiles_look_like_the_whole_and_take_less_memory(default_processor, scene_codes):
    codes = scene_codes[None]
    whole = default_processor._decode_codes(codes)
    whole_bytes = peak_bytes(lambda: default_processor._decode_codes(codes))
    assert 1 <= whole_bytes / default_processor.decode_bytes(32, 32) < 1.3
    default_processor.vq_tile_px = 128
    tiled = default_processor._decode_codes(codes)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert psnr(tiled, whole) > 33
    tiled_bytes = peak_bytes(lambda: default_processor._decode_codes(codes))
    assert tiled_bytes < 0.4 * whole_bytes
    assert 0.8 <= tiled_bytes / default_processor.decode_bytes(32, 32) < 1.3
    sizes = [picture.size for picture in default_processor.decode_images([scene_codes, scene_codes[:20, :8]])]
    assert sizes == [(256, 256), (64, 160)]


@pytest.mark.parametrize("name", ["chameleon", "movq", "llamagen"])
@torch.no_grad()
def test_shared_norms_of_the_whole_are_those_of_the_model(name):
    vqvae = convert_vq_state_dict(published_vq(name))
    codes = torch.randint(256, (1, 6, 4), generator=torch.Generator().manual_seed(0))
    wanted, norms = _decoded(vqvae, codes), SharedNorms()
    for _ in range(2):
        with norms:
            torch.testing.assert_close(_decoded(vqvae, codes), wanted, atol=1e-3, rtol=0)
    with norms:  # a part alone finds what the whole had
        part = _decoded(vqvae, codes[:, :3])
    assert not torch.allclose(part, _decoded(vqvae, codes[:, :3]), atol=1e-3)


@pytest.mark.parametrize("vq_tile_px", [60, 32, 0, None, 64.0])
def test_tiles_are_large_enough(tiny_processor, vq_tile_px):
    tiny_processor.vq_tile_px = vq_tile_px
    with pytest.raises(ValueError, match="accepted are multiples of 8 from 64"):
        tiny_processor.decode_image(torch.zeros(4, 4, dtype=torch.long))

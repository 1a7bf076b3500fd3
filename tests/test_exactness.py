"""Speculative decoding is exact: "jacobi" has the distribution of plain decoding, "gumbel" its very tokens."""

import pytest
import torch
from scipy.stats import chi2
from toy_model import KINDS, broken, chi_squared, draw, joint_probs, toy_model

from helpers import random_picture
from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration

NUM_SAMPLES = 1200  # of each of the four kinds of rows
UNLIKELY = 1e-8  # the distribution itself is rejected less often than once in a million runs of all these tests
JACOBI = {"decoding": "jacobi", "window": 4, "draft": "uniform"}
PICTURE = random_picture(64, 32)


@pytest.fixture(scope="module")
def toy():
    return toy_model()


@pytest.fixture(scope="module")
def probs(toy):
    """By schedule of guidance."""
    return {schedule: [joint_probs(toy, kind, schedule) for kind in KINDS] for schedule in (None, "decay")}


def smallest_p_value(model, probs, **settings):
    samples = draw(model, NUM_SAMPLES, seed=0, **settings)
    own = probs[settings.get("guidance_schedule")]
    return min(chi2.sf(*chi_squared(rows, *table)) for rows, table in zip(samples, own, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"decoding": "ar"},
        JACOBI,
        {**JACOBI, "window": 8},
        {**JACOBI, "draft": "above"},
        {**JACOBI, "window": 3, "draft": "left"},
        {**JACOBI, "guidance_schedule": "decay"},
        {"decoding": "gumbel", "window": 4, "draft": "above"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_answers_follow_the_models_distribution(toy, probs, settings):
    assert smallest_p_value(toy, probs, **settings) > UNLIKELY


@pytest.mark.parametrize("fault", ["resampling from P", "keeping the old Q"])
def test_a_wrong_decoder_would_be_found_out(toy, probs, fault):
    with broken(fault):
        assert smallest_p_value(toy, probs, **JACOBI) < UNLIKELY


# Tokens


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return LuminaMGPTForConditionalGeneration(tiny_config(initializer_range=0.4)).eval()


@pytest.fixture
def pipe(tiny_pipe, model):
    tiny_pipe.register_modules(transformer=model)
    return tiny_pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.mark.parametrize(("window", "draft"), [(2, "left"), (8, "above"), (64, "uniform")])
def test_gumbel_draws_the_tokens_of_plain_decoding(model, tiny_processor, window, draft):
    """Rows of four sizes, one free, and four scales in one batch; then each by itself."""
    texts, sizes = ["a", "a red sphere and", "a blue", "a cube"], ([32, 16, 64, None], [32, 64, 16, None])
    scales, common = [4.0, 1.0, 2.5, 3.0], {"max_new_tokens": 50, "text_top_k": 400}
    batch = tiny_processor(texts, return_tensors="pt")

    def run(inputs, height, width, scale, numbers, **settings):
        size = {"height": height, "width": width, "guidance_scale": scale, "generator": seeds(*numbers)}
        return model.generate(**inputs, **size, **common, **settings)

    gumbel = {"decoding": "gumbel", "window": window, "draft": draft}
    plain = run(batch, *sizes, scales, range(4))
    assert torch.equal(plain, run(batch, *sizes, scales, range(4), **gumbel))
    for i, text in enumerate(texts):
        inputs = tiny_processor(text, return_tensors="pt")
        alone = run(inputs, sizes[0][i], sizes[1][i], scales[i], [i], **gumbel)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(alone, plain[i, batch["input_ids"].shape[1] :][: len(alone)])


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_schedule": "decay", "guidance_scale": 9.0},
        {"top_k_schedule": "entropy"},
        {"image_temperature": 0.5, "image_top_k": 7},
        {"guidance_end": 0.4},
        {"do_sample": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_of_the_distribution_counts_alike(pipe, settings):
    asked = {"prompt": ["a", "a red cube"], "height": [32, 48], "width": [48, 16], "output_type": "latent"}

    def draw_codes(**decoding):
        return pipe(**asked, generator=seeds(0, 1), **settings, **decoding).images

    plain = draw_codes()
    kinds = [{"decoding": "gumbel"}] + [{"decoding": "jacobi"}] * ("do_sample" in settings)
    for found in (draw_codes(**kind, window=window) for kind in kinds for window in (4, 16)):
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_gumbel_answers_every_task_alike(pipe):
    for name, task in pipe.processor.tasks.items():
        words = {word: "a" if f"{{{word}}}" in task.template else None for word in ("prompt", "condition")}
        image = PICTURE if task.needs_image else None

        call = {**words, "image": image, "task": name, "max_new_tokens": 90, "image_top_k": 8}
        plain, fast = (pipe(**call, generator=seeds(3)[0], decoding=d, window=8) for d in ("ar", "gumbel"))
        assert (plain.images, plain.text) == (fast.images, fast.text), name


def test_gumbel_chats_alike(model, tiny_processor):
    """Text, pictures where the model likes, and text again, after a picture that was given."""
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": PICTURE}]
    chat = [{"role": "user", "content": content}]
    inputs = tiny_processor.apply_chat_template([chat], tokenize=True, return_dict=True)
    common = {"text_top_k": 400, "text_temperature": 3.0, "max_new_tokens": 120, "num_return_sequences": 16}
    plain, fast = (
        model.generate(**inputs, **common, generator=seeds(*range(16)), decoding=decoding, window=8)
        for decoding in ("ar", "gumbel")
    )
    assert torch.equal(plain, fast)
    answers = [tiny_processor.split_ids(ids) for ids in plain[:, inputs["input_ids"].shape[1] :]]
    assert any([type(part) for part in parts] == [str, torch.Tensor, str] for parts in answers)

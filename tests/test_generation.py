"""Decoding: the reference's tokens, one row's result whatever its neighbours, and never a malformed grid."""

import pytest
import torch
from golden_weights import PUBLISHED_LAYOUT, build_golden_decoder, golden_tokenizer, load_golden
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from helpers import continuation, draw, prompts
from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.decoding_lumina_mgpt import entropy_top_k, gumbel_noise
from modeling_lumina_mgpt.uni_rep import ImageLayout, UniRep

SEEDS = range(4)


@pytest.fixture(scope="module")
def golden():
    return load_golden("generation")["generation"]


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    config = tiny_config(swin_norm=False, initializer_range=0.4)
    return LuminaMGPTForConditionalGeneration(config).eval()


@pytest.fixture
def layout(model):
    return ImageLayout(**model.config.image_layout)


@pytest.mark.parametrize("decoding", ["ar", "jacobi", "gumbel"])
@pytest.mark.parametrize("index", [0, 1])
def test_greedy_tokens_are_the_references(golden, index, decoding):
    model = build_golden_decoder(golden[index], image_layout=PUBLISHED_LAYOUT.layout_dict())
    for record in golden[index]["greedy"]:
        output = model.generate(
            torch.tensor([record["prompt_ids"]]),
            guidance_scale=record["cfg"],
            do_sample=False,
            eos_token_id=PUBLISHED_LAYOUT.end_id,
            decoding=decoding,
            window=6,
        )
        assert output[0, len(record["prompt_ids"]) :].tolist() == record["new_ids"]


@pytest.mark.parametrize("decoding", ["ar", "jacobi", "gumbel"])
@pytest.mark.parametrize(("family", "tokenizer"), [("lumina_mgpt_2", "tokenizer_2"), ("pure", "tokenizer_pure")])
def test_the_other_families_differ_by_configuration_alone(family, tokenizer, decoding):
    """2.0 with its decaying guidance, PURE with a scale under one; four codes per size unit."""
    record = load_golden("generation")[family]
    uni_rep = UniRep.from_tokenizer(golden_tokenizer(tokenizer), size_unit_px=32, codes_per_size_unit=4)
    model = build_golden_decoder(record, image_layout=uni_rep.layout_dict())
    for greedy in record["greedy"]:
        output = model.generate(
            torch.tensor([greedy["prompt_ids"]]),
            guidance_scale=greedy["cfg"],
            guidance_schedule="decay" if family == "lumina_mgpt_2" else None,
            do_sample=False,
            eos_token_id=uni_rep.end_id,
            decoding=decoding,
            window=6,
        )
        assert output[0, len(greedy["prompt_ids"]) :].tolist() == greedy["new_ids"]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_row_equals_the_single_run(model, tiny_processor, do_sample, cache):
    """Prompts of four lengths, four sizes (one free), four guidance scales."""
    heights, widths, scales = [32, 16, 48, None], [32, 48, 16, None], [4.0, 1.0, 2.5, 3.0]
    singles = []
    for i, prompt in enumerate(prompts(tiny_processor)):
        kwargs = {"guidance_scale": scales[i], "do_sample": do_sample, "max_new_tokens": 60}
        output = draw(model, prompt, [i], height=heights[i], width=widths[i], **kwargs)
        singles.append(continuation(model, output[0], prompt["input_ids"].shape[1]))
    texts = [tiny_processor.decode(p["input_ids"][0, 1:-1]) for p in prompts(tiny_processor)]
    batch = tiny_processor(texts, return_tensors="pt")
    output = draw(
        model,
        batch,
        SEEDS,
        height=heights,
        width=widths,
        guidance_scale=scales,
        do_sample=do_sample,
        max_new_tokens=60,
        **cache,
    )
    assert [continuation(model, row, batch["input_ids"].shape[1]) for row in output] == singles


def test_sampling_never_breaks_the_grid(model, layout, tiny_processor):
    """Free and forced images of untrained weights: whatever is drawn decodes, and the wanted sizes come first."""
    batch = tiny_processor(["a", "b", "c", "d"], return_tensors="pt")
    sizes = ([16, 32, 48, None], [64, 16, 32, None])
    output = draw(model, batch, range(4), height=sizes[0], width=sizes[1], text_top_k=400, max_new_tokens=200)
    for row, height, width in zip(output, *sizes, strict=True):
        ids = continuation(model, row, batch["input_ids"].shape[1])
        images = [part for part in tiny_processor.split_ids(ids) if isinstance(part, torch.Tensor)]
        if height is not None:
            assert images[0].shape == layout.grid(height, width)
            assert ids[0] == layout.start_id


def test_unconditional_branch_sees_the_image_only(model, layout, tiny_processor):
    """At a huge scale the guided argmax is decided by the difference to a run that had no prompt at all."""
    prompt = tiny_processor("a red sphere", height=32, width=32, return_tensors="pt")
    header = prompt["input_ids"][:, -3:]
    output = model.generate(**prompt, guidance_scale=3.0, do_sample=False, max_new_tokens=1)
    conditional = model(**prompt).logits[:, -1]
    unconditional = model(input_ids=header).logits[:, -1]
    guided = unconditional + 3.0 * (conditional - unconditional)
    codes = torch.arange(*layout.code_id_ranges[0])
    assert output[0, -1] == codes[guided[0, codes].argmax()]


def test_negative_prompt_is_the_unconditional_context(model, layout, tiny_processor):
    prompt = tiny_processor("a red sphere", height=32, width=32, return_tensors="pt")
    negative = tiny_processor("a blue cube and a sphere and a cube and a sphere", return_tensors="pt")
    output = model.generate(
        **prompt,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
        guidance_scale=3.0,
        do_sample=False,
        max_new_tokens=1,
    )
    conditional = model(**prompt).logits[:, -1]
    unconditional = model(torch.cat([negative["input_ids"], prompt["input_ids"][:, -3:]], 1)).logits[:, -1]
    guided = unconditional + 3.0 * (conditional - unconditional)
    codes = torch.arange(*layout.code_id_ranges[0])
    assert output[0, -1] == codes[guided[0, codes].argmax()]
    assert output.shape[1] == prompt["input_ids"].shape[1] + 1


def test_returned_sequences_have_seeds_of_their_own(model, tiny_processor):
    prompt = tiny_processor(["a", "b"], height=32, width=32, return_tensors="pt")
    output = draw(model, prompt, range(6), num_return_sequences=3, max_new_tokens=24)
    alone = draw(model, tiny_processor(["a"], height=32, width=32, return_tensors="pt"), [2], max_new_tokens=24)
    assert len({tuple(row.tolist()) for row in output}) == 6
    assert torch.equal(output[2], alone[0])


def test_callbacks_see_the_rows_drawn_so_far(model, tiny_processor):
    seen = []

    class Watch(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            seen.append(tiny_processor.uni_rep.decode(ids[0, prompt["input_ids"].shape[1] - 3 :]).shape[0])
            return torch.full((len(ids),), len(seen) == 12)

    class Stream:
        tokens: list[int] = []  # noqa: RUF012

        def put(self, ids):
            self.tokens.extend(ids.flatten().tolist())

        def end(self):
            self.tokens.append(-1)

    prompt = tiny_processor("a", height=32, width=32, return_tensors="pt")
    output = model.generate(**prompt, stopping_criteria=StoppingCriteriaList([Watch()]), streamer=Stream())
    assert seen == [0] * 3 + [1] * 4 + [2] * 4 + [3]  # an end-of-line comes with the code before it
    assert Stream.tokens == [*output[0].tolist(), -1]


def test_values_that_switch_stock_sampling_off_change_nothing(model, tiny_processor):
    inputs = tiny_processor("a", return_tensors="pt")
    options = {"seeds": [0], "max_new_tokens": 8}
    plain = draw(model, inputs, **options)
    for name, value in {"top_p": 1.0, "min_p": 0.0, "typical_p": None, "epsilon_cutoff": 0.0, "num_beams": 1}.items():
        assert torch.equal(draw(model, inputs, **options, **{name: value}), plain), name


def test_a_generation_config_counts_like_the_call(model, tiny_processor):
    inputs = tiny_processor("a", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    negative = {"negative_prompt_ids": inputs["input_ids"], "height": 32, "width": 32}
    for extra in ({}, negative):
        asked = {"max_length": length + 30, "num_return_sequences": 2, "do_sample": True}
        in_call = draw(model, inputs, seeds=[0, 1], **asked, **extra)
        in_config = draw(model, inputs, seeds=[0, 1], generation_config=GenerationConfig(**asked), **extra)
        assert torch.equal(in_call, in_config) and len(in_call) == 2 and in_call.shape[1] <= length + 30


def test_the_any_to_any_pipelines_wish_for_a_picture_is_granted(model, tiny_processor):
    ids = draw(model, tiny_processor("a"), seeds=[0], generation_mode="image")
    (picture,) = tiny_processor.post_process_multimodal_output(ids, generation_mode="image")
    assert picture.size == (model.config.default_width_px, model.config.default_height_px)


def test_specific_settings_win_over_stock_and_call_over_configuration(model):
    model.generation_config.image_top_k, model.generation_config.guidance_scale = 7, 2.0
    settings = model._decoding_settings(None, {"top_k": 3, "text_top_k": 9, "temperature": 0.5})
    assert (settings.image_top_k, settings.text_top_k, settings.guidance_scale) == (3, 9, 2.0)
    assert settings.image_temperature == settings.text_temperature == 0.5


def test_noise_is_gumbel_and_reproducible():
    noise = gumbel_noise(torch.arange(64) * 7919**4, torch.arange(64)[:, None], torch.arange(1024))[:, 0]
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(1.6449, abs=0.04)
    again = gumbel_noise(torch.tensor([5 * 7919**4]), torch.tensor([[5]]), torch.arange(2048))[0, 0, :1024]
    assert torch.equal(noise[5], again)
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_what_is_no_beginning_of_a_picture_is_refused(model, tiny_processor):
    (begun,) = tiny_processor("a", height=32, width=32)["input_ids"].tolist()
    uni_rep = tiny_processor.uni_rep
    whole = [*begun[:-3], *uni_rep.encode(uni_rep.code_ids[:16].view(4, 4)).tolist()]
    code = int(uni_rep.code_ids[0])
    for ids in (
        [*begun[:-2], code, code],  # no sizes
        [*whole[:-1], *begun[:-3]],  # an end that was taken for the end of the answer, and the next question
        [*begun, code, begun[1]],  # a word among the codes
        [*begun, *[code] * 5],  # no end of the line
    ):
        with pytest.raises(ValueError, match=r"row 0: what follows the image's start, token \d+, is the beginning of"):
            model.generate(torch.tensor([ids]), max_new_tokens=400)


def test_a_picture_has_room_however_it_begins(model, tiny_processor):
    """Asked for, or begun in the prompt by the start token, a size, all sizes or some codes."""
    (begun,) = tiny_processor("a", height=32, width=32)["input_ids"].tolist()
    bos, start, size = begun[0], *begun[-3:-1]
    codes = tiny_processor.uni_rep.code_ids[:3].tolist()
    model.generate(torch.tensor([begun]), height=160, width=160, max_new_tokens=3)  # another size than the one begun
    model.generate(torch.tensor([begun]), max_new_tokens=None)  # as if not given
    for ids, asked, needed in (
        ([bos], {"height": 32, "width": 32}, 24),
        (begun, {"height": 32, "width": 32}, 21),
        (begun + codes, {"height": 32, "width": 32}, 18),
        ([bos, start], {}, 9),
        ([bos, start, size], {}, 14),
    ):
        for short in (0, 1):
            call = {**asked, "max_new_tokens": needed - short, "do_sample": False}
            if not short:
                tiny_processor.split_ids(model.generate(torch.tensor([ids]), **call)[0])
                continue
            with pytest.raises(ValueError, match=f"takes {needed} more tokens, and {needed - 1} are left"):
                model.generate(torch.tensor([ids]), **call)


def test_entropy_top_k_is_the_references():
    """Scores of PURE's vocabulary, masked to its image codes; from flat to steep."""
    generator = torch.Generator().manual_seed(11)
    wanted = {0.2: 1982, 1.0: 1971, 2.0: 1892, 4.0: 716, 8.0: 17, 20.0: 17}
    scores = torch.cat([torch.randn(1, 73728, generator=generator) * scale for scale in wanted])
    is_code = torch.zeros(73728, dtype=torch.bool)
    is_code[4:8196] = is_code[65536:] = True
    assert entropy_top_k(scores.masked_fill(~is_code, -torch.inf)).tolist() == [*wanted.values()]

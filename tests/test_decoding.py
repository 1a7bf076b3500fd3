"""The engine: what speculation may not change, what is shared, and what is left out when it is not needed."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig

from helpers import continuation, draw, prompts
from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration, decoding_lumina_mgpt
from modeling_lumina_mgpt.decoding_lumina_mgpt import WINDOWS, Decoder


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return LuminaMGPTForConditionalGeneration(tiny_config(swin_norm=False, initializer_range=0.4)).eval()


def seen_by(model, monkeypatch):
    """Shapes of the ids of all forwards from here on."""
    shapes, forward = [], model.model.forward

    def see(*args, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", see)
    return shapes


@pytest.mark.parametrize("options", [{}, {"guidance_schedule": "decay"}, {"top_k_schedule": "entropy"}])
@pytest.mark.parametrize("draft", ["uniform", "above", "left"])
def test_gumbel_draws_what_plain_decoding_does(model, tiny_processor, draft, options):
    """Rows of other sizes, scales and temperatures; one draws as it likes, after text."""
    batch = tiny_processor(["a", "a red sphere and", "a blue", "a cube"], return_tensors="pt")
    asked = {
        "height": [32, 16, 48, None],
        "width": [32, 64, 16, None],
        "guidance_scale": [6.0, 1.0, 2.5, 3.0],
        "image_temperature": [0.3, 1.0, 0.7, 0.5],
        "max_new_tokens": 70,
        "text_top_k": 400,
        **options,
    }
    plain = draw(model, batch, range(4), **asked)
    for window in (2, 5, 16):
        assert torch.equal(draw(model, batch, range(4), **asked, decoding="gumbel", window=window, draft=draft), plain)


def test_a_speculative_row_equals_the_single_run(model, tiny_processor):
    """Also of jacobi, whose random numbers are of the row's own steps."""
    sizes, scales = [32, 48, 16], [4.0, 1.0, 2.0]
    for decoding in ("jacobi", "gumbel"):
        options = {"decoding": decoding, "window": 6, "image_temperature": 0.3, "max_new_tokens": 70}
        texts = [tiny_processor.decode(p["input_ids"][0, 1:-1]) for p in prompts(tiny_processor)[:3]]
        batch = tiny_processor(texts, return_tensors="pt")
        sized = {"height": sizes, "width": sizes, "guidance_scale": scales}
        together = draw(model, batch, range(3), **sized, **options)
        for i, prompt in enumerate(prompts(tiny_processor)[:3]):
            one = {"height": sizes[i], "width": sizes[i], "guidance_scale": scales[i]}
            alone = draw(model, prompt, [i], **one, **options)
            assert continuation(model, alone[0], prompt["input_ids"].shape[1]) == continuation(
                model, together[i], batch["input_ids"].shape[1]
            )


@pytest.mark.parametrize("decoding", ["ar", "jacobi", "gumbel"])
def test_streamed_rows_are_those_of_one_batch_in_any_order(model, tiny_processor, decoding):
    texts, sizes = ["a", "a red sphere and", "a blue", "a cube", "a sphere"], [16, 48, 32, 16, 64]
    batch = tiny_processor(texts, return_tensors="pt")
    options = {"decoding": decoding, "eos_token_id": tiny_processor.uni_rep.end_id, "window": 6}
    whole = draw(model, batch, range(5), height=sizes, width=sizes, **options)
    length, finished = batch["input_ids"].shape[1], []
    order = [4, 2, 0, 3, 1]
    turned = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    own = {"height": [sizes[i] for i in order], "width": [sizes[i] for i in order], **options}
    generators = [torch.Generator().manual_seed(i) for i in order]
    for place, output in model.stream(**turned, batch_size=2, generator=generators, **own):
        finished.append(order[place])
        assert output.sequences[0].tolist() == continuation(model, whole[order[place]], length)
    assert finished[0] == 2 and sorted(finished) == [0, 1, 2, 3, 4]  # the smaller of the first two


def test_copies_share_their_prompts_forward_and_guidance_its_steps(model, tiny_processor, monkeypatch):
    prompt = tiny_processor("a red sphere", return_tensors="pt")
    shapes = seen_by(model, monkeypatch)
    options = {"height": 16, "width": 32, "eos_token_id": tiny_processor.uni_rep.end_id}
    draw(model, prompt, range(3), num_return_sequences=3, **options)
    length = prompt["input_ids"].shape[1] + 3  # start and sizes
    assert shapes[:2] == [(1, length), (1, 3)] and set(shapes[2:]) == {(6, 1), (6, 2)} and len(shapes) == 2 + 8
    shapes.clear()
    draw(model, prompt, range(3), num_return_sequences=3, guidance_scale=1.0, **options)
    assert shapes[0] == (1, length) and set(shapes[1:]) == {(3, 1), (3, 2)} and len(shapes) == 1 + 8


def test_guidance_may_end_before_the_image(model, tiny_processor, monkeypatch):
    prompt = tiny_processor("a red sphere", return_tensors="pt")
    options = {"height": 32, "width": 32, "eos_token_id": tiny_processor.uni_rep.end_id}
    full, half, none = (draw(model, prompt, [0], guidance_end=end, **options) for end in (1.0, 0.5, 0.0))
    assert torch.equal(none, draw(model, prompt, [0], guidance_scale=1.0, **options))
    first = prompt["input_ids"].shape[1] + 3 + 2 * 5  # two lines of four codes
    assert torch.equal(half[0, :first], full[0, :first]) and not torch.equal(half, full)
    shapes = seen_by(model, monkeypatch)
    draw(model, prompt, [0], guidance_end=0.5, **options)
    assert [rows for rows, _ in shapes[2:]] == [2] * 8 + [1] * 8


def test_a_window_of_its_own_choice_is_told(model, tiny_processor):
    prompt = tiny_processor("a", height=32, width=32, return_tensors="pt")
    options = {"decoding": "gumbel", "return_dict_in_generate": True, "eos_token_id": tiny_processor.uni_rep.end_id}
    chosen = draw(model, prompt, [0], window="auto", **options)
    assert chosen.window in WINDOWS
    assert torch.equal(chosen.sequences, draw(model, prompt, [0], window=4, **options).sequences)
    assert draw(model, prompt, [0], **{**options, "decoding": "ar"}).window == 1


def test_a_callback_ends_all_rows_and_those_that_wait(model, tiny_processor):
    batch = tiny_processor(["a", "b", "c"], height=32, width=32, return_tensors="pt")
    seen = []

    def stop(new_ids, num_new):
        seen.append(new_ids.shape)
        return len(seen) == 4

    outputs = dict(model.stream(**batch, batch_size=2, callback_on_step_end=stop))
    assert sorted(outputs) == [0, 1] and seen == [(2, 1), (2, 2), (2, 3), (2, 5)]


def test_a_head_with_a_hook_draws_the_same(model, tiny_processor):
    """A head that is not a plain matrix is called whole."""
    prompt = tiny_processor("a", height=32, width=32, return_tensors="pt")
    plain = draw(model, prompt, [0])
    model.lm_head._hf_hook = None  # as an offloaded one has
    assert torch.equal(draw(model, prompt, [0]), plain)


@pytest.mark.parametrize("decoding", ["ar", "gumbel"])
def test_an_adapted_head_draws_what_the_merged_one_does(model, tiny_processor, decoding):
    prompt = tiny_processor(["a", "a red sphere"], height=32, width=32, return_tensors="pt")
    options = {"decoding": decoding, "eos_token_id": tiny_processor.uni_rep.end_id}
    plain = draw(model, prompt, [0, 1], **options)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    found = draw(model, prompt, [0, 1], **options)
    assert not torch.equal(found, plain)
    assert torch.equal(found, draw(adapted.merge_and_unload(), prompt, [0, 1], **options))


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_other_attention_draws_the_same(model, tiny_processor, implementation):
    """What cannot do with masks is set aside."""
    prompt = tiny_processor("a", height=32, width=32, return_tensors="pt")
    plain = draw(model, prompt, [0])
    model.config._attn_implementation = implementation
    assert torch.equal(draw(model, prompt, [0]), plain)
    assert model.config._attn_implementation == implementation


def test_a_call_leaves_nothing_behind(model, tiny_processor, monkeypatch):
    """At once, without waiting for a collection of garbage."""
    made, prompt = [], tiny_processor("a", return_tensors="pt")
    monkeypatch.setattr(Decoder, "_call_in", lambda decoder: made.append(weakref.ref(decoder)))
    gc.collect()
    gc.disable()
    try:
        draw(model, prompt, [0], height=32, width=32)
        model.generate(**prompt, max_new_tokens=3, callback_on_step_end=lambda *_: False)
    finally:
        gc.enable()
    assert made and not any(decoder() for decoder in made)


def test_a_compiled_call_leaves_the_weights_of_others_alone(model, tiny_processor):
    prompt, traced = tiny_processor("a", return_tensors="pt"), CompileConfig(backend="eager")
    options = {"height": 32, "width": 32, "compile_config": traced}
    draw(model, prompt, [0], **options)
    head = model.lm_head.weight
    before = head.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(2 * before)  # as another adapter would bring one
    draw(model, prompt, [0], **options)
    assert torch.equal(head, before)


@pytest.mark.parametrize("decoding", ["ar", "jacobi", "gumbel"])
def test_a_step_is_one_graph_and_draws_the_same(model, tiny_processor, decoding):
    """As the compiler sees it; what it then makes of the graph is PyTorch's, and takes minutes."""
    batch = tiny_processor(["a", "a red sphere"], return_tensors="pt")
    options = {"height": [32, 48], "width": [32, 16], "decoding": decoding, "max_new_tokens": 40}
    plain = draw(model, batch, [0, 1], **options)
    traced = CompileConfig(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    assert torch.equal(draw(model, batch, [0, 1], compile_config=traced, **options), plain)
    place = model._last_decoder.tokens.data_ptr(), model._last_decoder.cache.keys[0].data_ptr()
    assert torch.equal(draw(model, batch, [0, 1], compile_config=traced, **options), plain)
    assert place == (model._last_decoder.tokens.data_ptr(), model._last_decoder.cache.keys[0].data_ptr())
    assert model._last_decoder.model is model._last_decoder.run_step is None  # or it would keep what keeps it
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"], counters


def test_what_listeners_get_they_may_train_on(model, tiny_processor):
    prompt = tiny_processor("a", height=32, width=32, return_tensors="pt")
    kept = []

    def keep(ids, scores):
        kept.append(ids)
        return scores

    kept.append(model.generate(**prompt, logits_processor=[keep], max_new_tokens=24))
    kept.append(model.generate(**prompt, callback_on_step_end=lambda ids, _: kept.append(ids)))
    for ids in kept:
        model(ids).logits.sum().backward()


def test_compiled_calls_of_two_sizes_follow_each_other(model, tiny_processor, monkeypatch):
    """A large picture's cache stays, but a small one does not read it all."""
    columns, plan = [], Decoder._plan

    def planned(self, seen):
        columns.append(plan(self, seen)[1]["num_columns"])
        return plan(self, seen)

    monkeypatch.setattr(Decoder, "_plan", planned)
    monkeypatch.setattr(decoding_lumina_mgpt, "COMPILED_COLUMNS", 32)
    prompt, traced = tiny_processor("a", return_tensors="pt"), CompileConfig(backend="eager")
    calls = [
        {"height": px, "width": px, "max_new_tokens": room, "decoding": "ar"} for px, room in ((64, 90), (16, 12))
    ]
    plain = [draw(model, prompt, [0], **call) for call in calls]
    read = []
    for large_or_small in (1, 0, 1):
        columns.clear()
        with torch.inference_mode(large_or_small == 0):  # whose tensors others may not write to
            drawn = draw(model, prompt, [0], compile_config=traced, **calls[large_or_small])
        assert torch.equal(drawn, plain[large_or_small])
        read.append(max(columns))
        draw(model, prompt, [0], **calls[1])  # in between, one that is not compiled
    assert read[0] == read[2] < read[1] == model._last_decoder.cache.num_columns

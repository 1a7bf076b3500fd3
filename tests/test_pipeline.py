"""The pipeline: every task and form of output, what a call may list per row, callbacks, and what it refuses."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from helpers import random_picture
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline, VerifierError
from modeling_lumina_mgpt.pipelines.text_to_image_lumina_mgpt import LuminaMGPTTextToImagePipeline

PICTURE = random_picture(64, 48)  # its bucket is the same size


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_sizes_are_those_asked_for_the_default_or_the_input_pictures(tiny_pipe):
    assert tiny_pipe("a", height=48, width=32).images[0].size == (32, 48)
    assert tiny_pipe("a").images[0].size == (32, 32)
    assert tiny_pipe("a", image=PICTURE).images[0].size == PICTURE.size
    sizes = [image.size for image in tiny_pipe(["a", "b"], height=[48, None], width=[32, None]).images]
    assert sizes == [(32, 48), (32, 32)]


def test_rows_of_a_batch_are_those_of_single_calls(tiny_pipe):
    prompts, heights, widths = ["a red sphere", "b"], [48, 32], [32, 64]
    batch = tiny_pipe(prompts, height=heights, width=widths, generator=[seeded(0), seeded(1)]).images
    single = [
        tiny_pipe(p, height=h, width=w, generator=seeded(i)).images[0]
        for i, (p, h, w) in enumerate(zip(prompts, heights, widths, strict=True))
    ]
    assert same(batch, single)


def test_a_prompts_pictures_follow_each_other(tiny_pipe):
    images = tiny_pipe(["a", "b"], num_images_per_prompt=2, generator=[seeded(i) for i in range(4)]).images
    assert same(images[2:], [tiny_pipe("b", generator=seeded(i)).images[0] for i in (2, 3)])
    assert len({image.tobytes() for image in images}) == 4


def test_output_types_hold_the_same_picture(tiny_pipe):
    def draw(kind, **kwargs):
        return tiny_pipe(["a", "b"], generator=seeded(), output_type=kind, **kwargs).images

    images, array, tensor, codes = (draw(kind) for kind in ("pil", "np", "pt", "latent"))
    assert array.shape == (2, 32, 32, 3) and tensor.shape == (2, 3, 32, 32) and codes.shape == (2, 4, 4)
    assert same(images, (array * 255).round()) and torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert same(images, [tiny_pipe.processor.decode_image(grid) for grid in codes])
    assert [x.shape for x in draw("np", height=[32, 48], width=[32, 32])] == [(32, 32, 3), (48, 32, 3)]
    assert isinstance(tiny_pipe("a", return_dict=False), tuple)


def test_codes_and_pictures_are_the_same_input(tiny_pipe):
    codes = tiny_pipe.processor.encode_image(PICTURE)
    one, other = (tiny_pipe("a", image=image, generator=seeded()).images for image in (PICTURE, codes))
    assert same(one, other)


def test_the_negative_prompt_takes_the_unconditional_context(tiny_pipe):
    def draw(**kwargs):
        return tiny_pipe("a", generator=seeded(), output_type="latent", **kwargs).images

    assert not torch.equal(draw(negative_prompt="b", guidance_scale=5.0), draw(guidance_scale=5.0))
    assert torch.equal(draw(negative_prompt="a", guidance_scale=5.0), draw(guidance_scale=1.0))
    generators = {"generator": [seeded(), seeded()], "output_type": "latent"}
    without, with_itself = tiny_pipe(["a", "a"], negative_prompt=["", "a"], guidance_scale=5.0, **generators).images
    assert torch.equal(without, draw(guidance_scale=5.0)[0])
    assert torch.equal(with_itself, draw(guidance_scale=1.0)[0])


def test_pictures_of_any_size_are_restored_in_squares(tiny_pipe, monkeypatch):
    uni_rep = tiny_pipe.processor.uni_rep
    sizes = []

    def see_and_repeat(inputs, num_rows, at_once, *args, num_return_sequences, **kwargs):
        """Says what it saw, a whole picture of 64 px, once more."""
        sizes.append((num_rows, at_once))
        starts = (inputs["input_ids"] == uni_rep.start_id).int().argmax(1)
        length = uni_rep.num_tokens(*uni_rep.grid(64, 64))
        seen = [ids[start : start + length] for ids, start in zip(inputs["input_ids"], starts, strict=True)]
        for row in reversed(range(num_rows)):
            yield row, seen[row // num_return_sequences], 1

    monkeypatch.setattr(tiny_pipe, "_generate", see_and_repeat)

    def restore(picture, **kwargs):
        return tiny_pipe(image=picture, task="restore", **kwargs).images

    square, large = PICTURE.resize((64, 64)), PICTURE.resize((130, 70))
    seen = tiny_pipe.processor.decode_image(tiny_pipe.processor.encode_image(square))
    assert same(restore(square, color_fix=None), [seen])
    assert same(restore(PICTURE.resize((32, 32)), color_fix=None)[0].size, (64, 64))
    options = {"num_images_per_prompt": 2, "tile_batch_size": 4}
    assert [x.size for x in restore([large, square], **options)] == [(130, 70)] * 2 + [(64, 64)] * 2
    assert sizes == [(1, 1), (1, 1), ((6 + 1) * 2, 4 * 2)]
    for wrong in ({"color_fix": "sepia"}, {"height": 64, "width": 64}, {"output_type": "latent"}):
        with pytest.raises(ValueError, match=r"accepted are wavelet, adain|takes no height|put together from pixels"):
            restore(square, **wrong)


def test_a_picture_is_completed_below_its_upper_rows(tiny_pipe):
    call = {"task": "complete", "height": 64, "width": 32, "generator": seeded(), "output_type": "latent"}
    (drawn,) = tiny_pipe("a", image=PICTURE.resize((64, 48)), **call).images
    upper = tiny_pipe.processor.encode_images([PICTURE.resize((64, 48))], size=(32, 24))[0]
    assert drawn.shape == (8, 4) and torch.equal(drawn[:3], upper)
    high = Image.linear_gradient("L").resize((32, 256))  # more than fits: its top
    (of_high,) = tiny_pipe("a", image=high, **call).images
    top = tiny_pipe.processor.encode_images([high.crop((0, 0, 32, 56))], size=(32, 56))[0]
    assert torch.equal(of_high[:7], top)
    (again,) = tiny_pipe("a", image=drawn[:5], **{**call, "generator": seeded(1)}).images
    assert torch.equal(again[:5], drawn[:5]) and not torch.equal(again, drawn)


def test_two_panels_are_drawn_or_the_second_to_a_given_first(tiny_pipe):
    def draw(**kwargs):
        return tiny_pipe(["a", "b"], output_type="latent", num_images_per_prompt=2, generator=seeded(), **kwargs)

    pair = draw(task="pair", condition="depth", height=32, width=48)
    assert pair.images.shape == pair.panels.shape == (4, 4, 6)
    given = tiny_pipe.processor.encode_images([PICTURE], size=(32, 48))[0]
    panel = draw(task="panel", image=[PICTURE, PICTURE], condition=["pose", "a brass lamp"], height=48, width=32)
    assert panel.images.shape == (4, 6, 4) and all(torch.equal(x, given) for x in panel.panels)
    unsized = draw(task="panel", image=[PICTURE] * 2, condition="hed")
    assert unsized.images.shape == unsized.panels.shape == (4, 4, 4)
    with pytest.raises(ValueError, match="takes a condition"):
        draw(task="pair")
    with pytest.raises(ValueError, match="an image of 8x8 codes takes 37 more tokens, and 20 are left"):
        draw(task="complete", image=[torch.zeros(4, 8, dtype=torch.long)] * 2, height=64, width=64, max_new_tokens=20)
    with pytest.raises(ValueError, match=r"upper rows of \(8, 8\) codes for a picture of 8x8"):
        draw(task="complete", image=[torch.zeros(8, 8, dtype=torch.long)] * 2, height=64, width=64)


def test_the_canny_condition_is_found_in_a_photo(tiny_pipe):
    photo = random_picture(64, 32)
    photo.paste("black", (16, 8, 48, 24))
    edges = tiny_pipe.processor.image_processor.canny(photo)
    assert {*edges.get_flattened_data()} == {(0, 0, 0), (255, 255, 255)}
    call = {"task": "panel", "condition": "canny", "height": 32, "width": 64, "output_type": "latent"}
    of_photo, of_edges = (tiny_pipe("a", image=x, generator=seeded(), **call) for x in (photo, edges))
    assert torch.equal(of_photo.panels[0], tiny_pipe.processor.encode_images([edges], size=(64, 32))[0])
    assert torch.equal(of_photo.images[0], of_edges.images[0])


def test_dense_predictions_are_numbers(tiny_pipe):
    def predict(task, kind="np"):
        return tiny_pipe(image=PICTURE, task=task, generator=seeded(), output_type=kind).images[0]

    size = tiny_pipe(image=PICTURE, task="depth", generator=seeded()).images[0].size[::-1]
    depth, normals = predict("depth"), predict("normal")
    assert depth.shape == size and 0 <= depth.min() < depth.max() <= 1
    assert normals.shape == (*size, 3) and np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert predict("normal", "pt").shape == (3, *size)
    with pytest.raises(ValueError, match=r"no palette .* set `image_processor.palette` to"):
        predict("segmentation")
    tiny_pipe.processor.image_processor.palette = [["ground", 0, 0, 0], ["thing", 255, 255, 255]]
    labels = predict("segmentation", "pt")
    assert labels.shape == size and labels.dtype == torch.uint8 and labels.max() <= 1


def test_the_best_rows_of_each_prompt_come_first(tiny_pipe):
    def brightness(prompt, images):
        seen.append((prompt, len(images)))
        return [np.asarray(image).mean() for image in images]

    seen: list = []
    generators = [seeded(i) for i in range(8)]
    drawn = tiny_pipe(["a", "b"], num_images_per_prompt=4, generator=[seeded(i) for i in range(8)]).images
    call = {"num_images_per_prompt": 2, "best_of": 4, "verifier": brightness, "prompt_enhancer": str.upper}
    best = tiny_pipe(["a", "b"], generator=generators, **call)
    assert seen == [("a", 4), ("b", 4)] and best.prompts == ["A", "A", "B", "B"]
    expected = tiny_pipe(["A", "B"], num_images_per_prompt=4, generator=[seeded(i) for i in range(8)]).images
    expected = [sorted(own, key=lambda x: -np.asarray(x).mean())[:2] for own in (expected[:4], expected[4:])]
    assert same(best.images, [*expected[0], *expected[1]]) and not same(best.images, drawn[:4])
    assert best.scores == [np.asarray(image).mean() for image in best.images]


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], ["good", "bad"], 3, None])
def test_pictures_survive_a_verifier_that_fails(tiny_pipe, scores):
    with pytest.raises(VerifierError, match=r"the verifier failed on 'a': .*Error: ") as caught:
        tiny_pipe("a", best_of=2, verifier=lambda prompt, images: scores, generator=seeded())
    assert same(caught.value.output.images, tiny_pipe("a", num_images_per_prompt=2, generator=seeded()).images)


def test_callbacks_see_rows_as_they_are_drawn_and_may_interrupt(tiny_pipe):
    rows = []

    def watch(pipe, step, timestep, kwargs):
        (ids,) = kwargs["generated_ids"]
        assert step == timestep == len(rows) and len(ids) > step  # with the size tokens and ends of lines
        rows.append(sum(part.height for part in pipe.processor.decode_ids(ids)) // 8)
        pipe._interrupt = rows[-1] == 3

    whole = tiny_pipe("a", height=48, width=32, generator=seeded(), output_type="latent").images[0]
    part = tiny_pipe(
        "a", height=48, width=32, generator=seeded(), output_type="latent", callback_on_step_end=watch
    ).images[0]
    assert sorted(set(rows)) == [0, 1, 2, 3] and torch.equal(part, whole[:3])


def test_the_progress_bar_ends_with_the_picture(tiny_pipe, capsys):
    tiny_pipe.set_progress_bar_config(disable=False)
    tiny_pipe("a", height=48, width=32)
    assert "34/34" in capsys.readouterr().err  # 6 x (4 + 1) + 4


def test_a_chat_goes_on_with_its_own_pictures_as_codes(tiny_pipe):
    first = tiny_pipe.chat([{"role": "user", "content": "Draw."}], height=32, width=32, max_new_tokens=24)
    assert first.images[0].size == (32, 32) and [m["role"] for m in first.messages] == ["user", "assistant"]
    codes = first.messages[1]["content"][0]["image"]
    assert codes.shape == (4, 4) and same([tiny_pipe.processor.decode_image(codes)], first.images[:1])
    question = {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Like it?"}]}
    second = tiny_pipe.chat([*first.messages, question], max_new_tokens=5)
    assert len(second.messages) == 4 and isinstance(second.text[0], str)


def test_a_chat_remembers_the_tokens_of_text_and_pictures(tiny_pipe, monkeypatch):
    """Two pictures in; a text, two pictures and a text out, tokenized as no tokenizer would."""
    processor = tiny_pipe.processor
    uni_rep = processor.uni_rep
    drawn = [torch.full((2, 4), 5), torch.full((4, 2), 9)]
    letters = processor.tokenizer.convert_tokens_to_ids(["a", "p", "i", "c"])
    said = [*letters, *uni_rep.encode(drawn[0]), *uni_rep.encode(drawn[1]), *letters, uni_rep.end_of_turn_id]
    prompts = []

    def say(input_ids, **kwargs):
        prompts.append(input_ids[0].tolist())
        yield 0, SimpleNamespace(sequences=torch.tensor([said]), window=1)

    monkeypatch.setattr(tiny_pipe.transformer, "stream", say)
    pictures = [{"type": "image", "image": x} for x in (PICTURE, PICTURE.rotate(90))]
    first = tiny_pipe.chat([{"role": "user", "content": [{"type": "text", "text": "Mix."}, *pictures]}])
    assert first.text == ["apicapic"] and [x.size for x in first.images] == [(32, 16), (16, 32)]
    codes = [item["image"] for item in first.messages[0]["content"][1:]]  # they are not encoded again
    assert all(map(torch.equal, codes, processor.encode_images([PICTURE, PICTURE.rotate(90)])))
    tiny_pipe.chat([*first.messages, {"role": "user", "content": [{"type": "text", "text": "Again."}, pictures[0]]}])
    assert prompts[1][: len(prompts[0]) + len(said)] == prompts[0] + said

    said = said[: len(letters) + 8]  # in the first picture
    cut = tiny_pipe.chat([{"role": "user", "content": "Draw."}], output_type="latent")
    assert torch.equal(cut.images[0], drawn[0][:1]) and "input_ids" not in cut.messages[1]


def test_transformers_task_draws_what_the_pipeline_draws(tiny_pipe):
    task = LuminaMGPTTextToImagePipeline(model=tiny_pipe.transformer, processor=tiny_pipe.processor)
    call = {"height": 48, "width": 32, "num_images_per_prompt": 2}
    (default,) = task("a", generator=seeded())
    assert same([default], tiny_pipe("a", generator=seeded()).images)
    found = task(["a", "b"], generator=seeded(), **call)
    generator = seeded()  # one for both prompts, which are drawn one after the other
    for prompt, own in zip(("a", "b"), found, strict=True):
        codes = tiny_pipe(prompt, generator=generator, output_type="latent", **call).images
        assert same(own, [tiny_pipe.processor.decode_image(grid) for grid in codes])
    assert len({picture.tobytes() for own in found for picture in own}) == 4


def test_what_a_user_writes_is_never_a_control_token(tiny_pipe):
    words = "<s>draw<reserved08706><racm3:break>"
    for task, picture in (("text-to-image", None), ("edit", PICTURE), ("vqa", PICTURE)):
        seen = []
        tiny_pipe.transformer.stream = lambda input_ids, seen=seen, **kwargs: seen.append(input_ids) or ()
        tiny_pipe(words, image=picture, task=task)
        (ids,) = seen[0].tolist()
        uni_rep, bos = tiny_pipe.processor.uni_rep, tiny_pipe.transformer.config.bos_token_id
        assert ids.count(bos) == ids.count(uni_rep.end_of_turn_id) == 1
        assert ids.count(uni_rep.end_id) == (picture is not None)


def test_a_task_is_asked_for_in_a_chat_in_the_models_words(tiny_pipe):
    """The ids of a chat's only message are those of the call."""
    seen = []
    stream = tiny_pipe.transformer.stream
    tiny_pipe.transformer.stream = lambda input_ids, **kwargs: seen.append(input_ids) or stream(input_ids, **kwargs)
    for task, words, picture in (("depth", None, PICTURE), ("detection", "a cube", PICTURE), ("pair", "a dog", None)):
        options = {"condition": "hed", "height": 32, "width": 32} if task == "pair" else {}
        drawn = tiny_pipe(words, image=picture, task=task, **{**options, "height": 32, "width": 32})
        options = {**options, "height": 64} if options else {}
        talk = tiny_pipe.chat([tiny_pipe.processor.task_message(task, words, picture, **options)], max_new_tokens=8)
        assert torch.equal(*seen[-2:]) and drawn.images and len(talk.messages) == 2
    upper = tiny_pipe.processor.encode_images([PICTURE], size=(32, 16))[0]
    message = tiny_pipe.processor.task_message("complete", "a dog", height=32, width=32)
    options = {"height": 32, "width": 32, "output_type": "latent", "generator": seeded(0)}
    (drawn,) = tiny_pipe.chat([message], upper_rows=upper, **options).images
    assert drawn.shape == (4, 4) and torch.equal(drawn[:2], upper)
    with pytest.raises(ValueError, match="'depth' takes an image"):
        tiny_pipe.processor.task_message("depth")


def test_a_stream_yields_what_a_call_returns(tiny_pipe):
    prompts, generators = ["a", "b", "c"], [[seeded(i) for i in range(6)] for _ in range(2)]
    options = {"num_images_per_prompt": 2, "height": [32, 48, 32], "width": [32, 32, 48], "image_top_k": [9, 60, 64]}
    called = tiny_pipe(prompts, generator=generators[0], **options).images
    watched = {"callback_on_step_end_tensor_inputs": ["generated_ids"], "callback_on_step_end": lambda *a: None}
    streamed = list(tiny_pipe.stream(prompts, batch_size=2, generator=generators[1], **options, **watched))
    assert [index for index, _ in streamed] == [0, 1, 2]
    assert same([image for _, output in streamed for image in output.images], called)


def test_a_saved_folder_draws_the_same(tiny_pipe, tiny_folder):
    again = LuminaMGPTPipeline.from_pretrained(tiny_folder)
    again.set_progress_bar_config(disable=True)
    assert again.processor.vqvae is again.vqvae
    assert same(*(pipe("a", generator=seeded()).images for pipe in (tiny_pipe, again)))


def test_weights_are_stored_once_in_shards_as_small_as_asked(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path, max_shard_size="60KB")
    weights = {path.relative_to(tmp_path): path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert len(weights) > 3 and {str(path.parent) for path in weights} == {".", "vqvae"}
    num_bytes = sum(4 * p.numel() for model in (tiny_pipe.transformer, tiny_pipe.vqvae) for p in model.parameters())
    assert sum(weights.values()) < 1.2 * num_bytes
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipe.save_pretrained(tmp_path, safe_serialization=False)


def test_dtype_and_device_move_every_component(tiny_pipe, tiny_folder):
    moved = LuminaMGPTPipeline.from_pretrained(tiny_folder).to("cpu", torch.bfloat16)
    assert moved.transformer.dtype == moved.processor.vqvae.dtype == torch.bfloat16
    assert moved("a", image=PICTURE).images[0].size == PICTURE.size
    loaded = LuminaMGPTPipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert (loaded.transformer.dtype, loaded.vqvae.dtype) == (torch.bfloat16, torch.float32)
    kept = LuminaMGPTPipeline.from_pretrained(tiny_folder, transformer=tiny_pipe.transformer)
    assert kept.transformer is tiny_pipe.transformer


@pytest.fixture
def own_pipe(tiny_pipe):
    """With a VQ model that no other test has, as hooks stay."""
    tiny_pipe.register_modules(vqvae=deepcopy(tiny_pipe.vqvae))
    tiny_pipe.processor.vqvae = tiny_pipe.vqvae
    return tiny_pipe


def test_offloaded_components_draw_the_same(own_pipe):
    own_pipe.enable_model_cpu_offload()
    device = own_pipe._execution_device
    assert device.type == "cpu" or own_pipe.transformer.device.type == "cpu"
    images = [own_pipe("a", image=PICTURE, generator=seeded(), output_type="latent").images]
    own_pipe.enable_model_cpu_offload(device=device)
    images += [own_pipe("a", image=PICTURE, generator=seeded(), output_type="latent").images for _ in range(2)]
    assert all(torch.equal(images[0], codes) for codes in images)
    assert own_pipe.transformer.device.type == "cpu"


def test_components_offloaded_part_by_part_draw_the_same(own_pipe):
    whole = own_pipe("a", image=PICTURE, generator=seeded(), output_type="np").images
    for part in (own_pipe.transformer, own_pipe.vqvae):  # as `enable_sequential_cpu_offload` does it for a GPU
        cpu_offload(part, torch.device("cpu"))
    assert own_pipe.vqvae.device.type == "meta"
    assert np.array_equal(whole, own_pipe("a", image=PICTURE, generator=seeded(), output_type="np").images)


def test_answers_to_pictures_have_sampling_of_their_own(tiny_pipe):
    config = tiny_pipe.transformer.generation_config
    config.guidance_scale, config.image_top_k = 3.0, 50

    def drawn(**sampling):
        asked = {"image": PICTURE, "generator": seeded(), "output_type": "latent"}
        return tiny_pipe("a", **asked, **sampling).images[0]

    def said(**sampling):
        content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "a"}]
        asked = {"height": 32, "width": 32, "generator": seeded(), "max_new_tokens": 40}
        return tiny_pipe.chat([{"role": "user", "content": content}], **asked, **sampling).messages[-1]["input_ids"]

    own, greedy = {"guidance_scale": 3.0, "image_top_k": 50}, {"guidance_scale": 1.0, "image_top_k": 1}
    expected = {answer: (answer(**own), answer(**greedy)) for answer in (drawn, said)}
    config.image_to_image = greedy
    for answer, (as_own, as_greedy) in expected.items():
        assert not same(as_own, as_greedy) and same(answer(), as_greedy) and same(answer(**own), as_own)
        assert same(answer(guidance_scale=3.0, top_k=50), answer(**own, text_top_k=50))

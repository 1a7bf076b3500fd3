"""Conversations, prompts and messages become the reference's ids, by one path, and come back as text and pictures."""

import json
import random

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, golden_tokenizer, load_golden_xz
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from transformers import AutoProcessor, PreTrainedTokenizerFast

from helpers import random_picture as picture
from hub_server import run_python
from modeling_lumina_mgpt import LuminaMGPTImageProcessor, LuminaMGPTProcessor
from modeling_lumina_mgpt.image_processing_lumina_mgpt import COLOR_FIXES, Tiling
from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS
from modeling_lumina_mgpt.training.tabletop import (
    FAR,
    NEAR,
    SEGMENT_COLORS,
    SHAPES,
    depth_image,
    normal_image,
    render,
    sample_scene,
    segmentation_image,
    to_image,
)

FAMILIES = {"lumina_mgpt": ("tokenizer", 2), "lumina_mgpt_2": ("tokenizer_2", 4), "pure": ("tokenizer_pure", 4)}


@pytest.fixture(scope="module")
def golden():
    return load_golden_xz("sequences")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, golden):
    name, codes_per_size_unit = FAMILIES[request.param]
    tokenizer = golden_tokenizer(name)
    processor = LuminaMGPTProcessor(LuminaMGPTImageProcessor(), tokenizer, codes_per_size_unit=codes_per_size_unit)
    return processor, golden[request.param]


def numbered_pictures(sizes):
    return [Image.new("RGB", tuple(size), (i, 0, 0)) for i, size in enumerate(sizes)]


def answer_codes(processor, monkeypatch, codes):
    """Has the VQ model see the codes with the number that a picture is painted in."""
    code_px = processor.size_unit_px // processor.codes_per_size_unit

    def encode(pixels):
        numbers = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        return torch.stack([torch.tensor(codes[i]).view(pixels.shape[2] // code_px, -1) for i in numbers])

    monkeypatch.setattr(processor, "_encode_pixels", encode)


def test_conversations_have_the_reference_ids_and_labels(family, monkeypatch):
    processor, golden = family
    for record in golden["conversations"]:
        images, target_px = numbered_pictures(record["image_sizes"]), record.get("target", 512)
        answer_codes(processor, monkeypatch, record["codes"])
        encoded = processor.encode_conversation(record["turns"], images, target_px)
        assert encoded == {"input_ids": record["input_ids"], "labels": record["labels"]}


def test_prompts_have_the_reference_ids_as_messages_and_as_a_rendered_template(family, monkeypatch):
    processor, golden = family
    for record in golden["conversations"]:
        turns, target_px = record["turns"][:-1], record.get("target", 512)
        images = numbered_pictures(record["image_sizes"][: len(record["prompt_codes"])])
        answer_codes(processor, monkeypatch, record["prompt_codes"])
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        ids = processor.apply_chat_template(messages, tokenize=True, images=images, target_px=target_px)
        assert ids[0].tolist() == record["prompt_ids"]
        rendered = processor.apply_chat_template(messages)
        assert processor(rendered, images, target_px=target_px)["input_ids"][0].tolist() == record["prompt_ids"]


def test_ids_of_codes_and_of_half_a_panel_are_the_reference_ones(family):
    processor, golden = family
    for code, id_ in golden.get("img2id", {}).items():
        assert processor.uni_rep.code_ids[int(code)] == id_
    if panel := golden.get("dual_panel"):
        width_px, height_px = panel["upper_image_size"]
        rows, cols = processor.uni_rep.grid(2 * height_px, width_px)
        codes = torch.tensor(panel["codes"]).view(rows // 2, cols)
        assert processor.uni_rep.encode(codes, rows=rows).tolist() == panel["given_ids"]


def test_pictures_are_scaled_to_the_reference_sizes(golden):
    image_processor = LuminaMGPTImageProcessor()
    for choice in golden["lumina_mgpt"]["crop_choices"][::4]:
        scaled = image_processor.resize_to_cover(Image.new("L", tuple(choice["size"])), *choice["bucket"])
        assert scaled.size == tuple(choice["resized"])


def test_pictures_in_a_batch_have_the_codes_that_they_have_alone(tiny_processor):
    given = torch.zeros(2, 4, dtype=torch.long)
    images = [picture(48, 32), picture(90, 31, 1), given, picture(48, 32, 2), picture(30, 100, 3)]
    together = tiny_processor.encode_images(images)
    for image, codes in zip(images, together, strict=True):
        assert codes.equal(tiny_processor.encode_image(image))
    pictures = tiny_processor.decode_images(together)
    for codes, decoded in zip(together, pictures, strict=True):
        assert decoded.size == (8 * codes.shape[1], 8 * codes.shape[0])
        alone = np.asarray(tiny_processor.decode_image(codes), dtype=int)
        assert abs(np.asarray(decoded, dtype=int) - alone).max() <= 1


def test_the_vq_model_sees_bounded_chunks(tiny_processor, monkeypatch):
    tiny_processor.vq_tile_px = 96  # two pictures of 64 x 64
    sizes, encode = [], tiny_processor._encode_pixels

    def spy(pixels):
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(tiny_processor, "_encode_pixels", spy)
    tiny_processor.encode_images([picture(64, 64)] * 5)
    assert sizes == [2, 2, 1]


def test_every_kind_of_picture_is_the_same_picture(tmp_path):
    expected = picture()
    array = np.asarray(expected)
    expected.save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    chw = torch.from_numpy(array.copy()).movedim(-1, 0)
    transparent, gray = expected.convert("RGBA"), Image.fromarray(array[..., 0])
    for image in (gray.convert("I"), Image.fromarray(array[..., 0] / np.float32(255))):
        assert np.array_equal(np.asarray(LuminaMGPTImageProcessor().load(image)), array[..., [0, 0, 0]])
    kinds = [tmp_path / "picture.png", str(tmp_path / "picture.png"), data, array, array / 255, chw, chw / 255]
    for image in [*kinds, transparent]:
        assert np.array_equal(np.asarray(LuminaMGPTImageProcessor().load(image)), array)
    transparent.putalpha(0)
    assert (np.asarray(LuminaMGPTImageProcessor().load(transparent)) == 255).all()
    assert np.array_equal(np.asarray(LuminaMGPTImageProcessor().load(array[..., 0])), array[..., [0, 0, 0]])


def test_pixels_return_rounded_or_truncated():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])[None, None, None].expand(1, 3, 1, 5)
    truncated, rounded = (LuminaMGPTImageProcessor(flag).postprocess(pixels)[0] for flag in (False, True))
    assert np.asarray(truncated)[0, :, 0].tolist() == [0, 0, 127, 255, 255]
    assert np.asarray(rounded)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    exact = LuminaMGPTImageProcessor(round_pixels=True)
    pixels = exact(picture(), [(64, 32)])["pixel_values"][0]
    assert np.array_equal(np.asarray(exact.postprocess(pixels[None])[0]), np.asarray(picture()))


def test_color_fixes_take_the_sources_colors():
    arrays = np.load(GOLDEN / "wavelet.npz")
    target, source = (Image.fromarray(arrays[name]) for name in ("target", "source"))
    fixed = np.array(COLOR_FIXES["wavelet"](target, source)).astype(int)
    assert np.abs(fixed - arrays["fixed"]).max() <= 1
    matched, wanted = np.array(COLOR_FIXES["adain"](target, source)), arrays["source"]
    assert np.abs(matched.mean((0, 1)) - wanted.mean((0, 1))).max() < 8  # but for what was clipped
    with pytest.raises(ValueError, match="accepted are two of one size"):
        COLOR_FIXES["wavelet"](target, source.resize((5, 5)))


@pytest.mark.parametrize("box", [(5, 7, 40, 60), (2, 30, 62, 40), (10, 3, 18, 44)])
@pytest.mark.parametrize("width_px", [1, 3])
def test_the_box_that_was_drawn_is_found(box, width_px):
    noise = np.random.default_rng(0).integers(-20, 20, (64, 64, 3))
    source = np.broadcast_to(np.linspace(60, 160, 64)[:, None, None], (64, 64, 3)).astype(np.uint8)
    drawn = Image.fromarray((source + noise).astype(np.uint8))
    drawn.paste("blue", (50, 2, 54, 6))  # the model changed something else as well
    left, top, right, bottom = box
    ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), outline="red", width=width_px)
    find_box = LuminaMGPTImageProcessor().find_box
    assert find_box(drawn, Image.fromarray(source)) == box
    ImageDraw.Draw(drawn).line((left, top, left, bottom - 1), "gray", 5)  # an open one is none
    others = [drawn, Image.fromarray(source), Image.new("RGB", (64, 64), "red")]
    assert [find_box(other, Image.fromarray(source)) for other in others] == [None] * 3


def test_a_box_is_found_that_is_hardly_seen_on_one_side():
    source = Image.new("RGB", (64, 64), "gray")
    source.paste((225, 20, 20), (20, 40, 64, 64))  # what is framed is nearly of the frame's color
    drawn = source.copy()
    drawn.paste((140, 120, 130), (0, 0, 64, 30))  # all above has changed a little
    ImageDraw.Draw(drawn).rectangle((20, 24, 51, 55), outline=(255, 0, 0), width=2)
    assert LuminaMGPTImageProcessor().find_box(drawn, source) == (20, 24, 52, 56)


def test_arrays_are_what_the_pictures_of_maps_show():
    scene = sample_scene(random.Random(0), 64, 64, num_objects=3)
    rendering = render([scene], 64, 64, maps=True)
    depth, normals, segmentation = rendering.depth[0], rendering.normals[0], rendering.segmentation[0]
    palette = [[name, *(round(255 * value) for value in color)] for name, color in SEGMENT_COLORS.items()]
    to_array = LuminaMGPTImageProcessor(palette=palette).to_array
    nearness = ((FAR - depth) / (FAR - NEAR)).clamp(0, 1)
    assert np.abs(to_array(to_image(depth_image(depth)), "depth") - nearness.numpy()).max() < 0.005
    assert np.abs(to_array(to_image(normal_image(normals)), "normal") - normals.numpy()).max() < 0.01
    classes = torch.tensor([0, *(SHAPES.index(o.shape) + 1 for o in scene.objects)])[segmentation]
    assert np.array_equal(to_array(to_image(segmentation_image(segmentation, scene)), "segmentation"), classes)


@pytest.mark.parametrize("size", [(40, 20), (64, 64), (65, 64), (200, 130), (300, 20)])
def test_tiles_cover_a_picture_and_give_it_back(size):
    whole = picture(*size)
    tiling = Tiling(whole, side_px=64)
    tiles = tiling.cut()
    assert {tile.size for tile in tiles} == {(64, 64)} and (len(tiles) == 1) == (max(size) <= 64)
    merged = tiling.merge(tiles)
    assert merged.width / merged.height == size[0] / size[1] and max(merged.size) == max(64, *size)
    if min(size) >= 64:
        assert np.abs(np.array(merged).astype(int) - np.array(whole)).max() <= 1


def test_random_crops_follow_their_generator(tiny_processor):
    def encode(seed):
        generator = torch.Generator().manual_seed(seed)
        return tiny_processor.encode_conversation(
            ["Copy. <|image|>", "<|image|>"], [picture(200, 64)] * 2, random_crop=True, generator=generator
        )

    assert encode(0) == encode(0)
    assert len({str(encode(seed)["input_ids"]) for seed in range(8)}) > 1


def test_control_tokens_in_a_users_words_stay_text(tiny_processor):
    words = "a<reserved08706>b<racm3:break><s></s>IMGIMGBZ<reserved08801>c"
    messages = [
        {"role": "user", "content": words},
        {"role": "assistant", "content": [{"type": "text", "text": words}]},
    ]
    special = set(tiny_processor.tokenizer.all_special_ids) - {0}
    routes = [
        tiny_processor(words)["input_ids"][0].tolist()[:-1],
        tiny_processor.encode_conversation([words])["input_ids"][:-1],
        tiny_processor.apply_chat_template(messages[:1], tokenize=True)[0].tolist()[:-1],
    ]
    for ids in routes:
        assert ids[0] == 0
        assert not special & set(ids[1:])
        assert tiny_processor.tokenizer.decode(ids[1:]) == words
    ids = tiny_processor.apply_chat_template(messages, tokenize=True)[0].tolist()
    assert ids.count(tiny_processor.uni_rep.end_of_turn_id) == 2


def test_one_space_parts_words_and_pictures_in_messages(tiny_processor):
    image, text = {"type": "image", "image": picture()}, {"type": "text", "text": " Which one? "}
    cases = {
        "<|image|> Which one? ": [image, text],
        " Which one? <|image|>": [text, image],
        "<|image|> <|image|> Which one? <|image|>": [image, image, text, image],
        "<|image|>": [{"type": "text", "text": ""}, image],
    }
    for turn, content in cases.items():
        messages = [{"role": "user", "content": content}]
        assert tiny_processor.apply_chat_template(messages) == f"<s>{turn}<reserved08706>"
        ids = tiny_processor.apply_chat_template(messages, tokenize=True)
        assert ids.equal(tiny_processor(turn, [picture()] * turn.count("<|image|>"))["input_ids"])


def test_assistant_masks_are_where_labels_are(tiny_processor):
    turns, images = ["Draw <|image|> again.", "Here: <|image|>", "Thanks.", "Welcome."], [picture(), picture(seed=1)]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    record = tiny_processor.encode_conversation(turns, images)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    trl_asks = {"padding": True, "padding_side": "right", "truncation": True, "max_length": 4}
    options["processor_kwargs"] = trl_asks
    batch = tiny_processor.apply_chat_template(messages, images=images, **options)
    assert batch["input_ids"][0].tolist() == record["input_ids"]
    assert batch["assistant_masks"][0].bool().tolist() == [label != -100 for label in record["labels"]]
    opened = tiny_processor.apply_chat_template(messages, images=images, continue_final_message=True, **options)
    for name, rows in opened.items():
        assert rows.equal(batch[name][:, :-1])


def test_prompts_of_a_batch_are_padded_left_and_end_with_their_sizes(tiny_processor):
    texts, images = ["a red sphere", "<|image|> a cube, a cone and <|image|>", "a"], [picture(), picture(seed=1)]
    sizes = [(32, 64), (None, None), (16, 160)]
    heights, widths = zip(*sizes, strict=True)
    batch = tiny_processor(texts, images, height=list(heights), width=list(widths))
    nested = tiny_processor(texts, [None, images, []], height=list(heights), width=list(widths))
    assert batch["input_ids"].equal(nested["input_ids"])
    rep = tiny_processor.uni_rep
    for row, (text, own, (height, width)) in enumerate(zip(texts, [[], images, []], sizes, strict=True)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert ids.equal(tiny_processor(text, own, height=height, width=width)["input_ids"][0])
        assert batch["attention_mask"][row].sort().values.equal(batch["attention_mask"][row])
        if height:
            assert ids[-3:].tolist() == rep.header(*rep.grid(height, width))


def test_pictures_without_a_place_come_first(tiny_processor):
    images = [picture(), picture(seed=1)]
    placed = tiny_processor(["<|image|> a", "<|image|> b"], images)
    for texts in (["a", "b"], ["a", "<|image|> b"]):
        assert tiny_processor(texts, images)["input_ids"].equal(placed["input_ids"])
    both = tiny_processor("<|image|> <|image|> a", images)["input_ids"]
    assert tiny_processor("a", images)["input_ids"].equal(both)
    assert tiny_processor("<s>a<reserved08706>", images)["input_ids"].equal(both)


def test_text_and_pictures_come_back_in_order_and_unfinished_ones_in_part(tiny_processor):
    codes = [tiny_processor.encode_image(picture(seed=seed)) for seed in range(2)]
    ids = tiny_processor("Is it <|image|> or <|image|> ?", codes)["input_ids"][0]
    first, image, between, other, last = tiny_processor.split_ids(ids)
    assert (first, between, last) == ("Is it ", " or ", " ?")
    assert image.equal(codes[0])
    assert other.equal(codes[1])
    start = int((ids == tiny_processor.uni_rep.start_id).nonzero()[0])
    cols = codes[0].shape[1]
    *_, text, part = tiny_processor.decode_ids(ids[: start + 3 + 2 * (cols + 1) + 3])
    assert (text, part.size) == ("Is it ", (8 * cols, 16))
    assert tiny_processor.decode_ids(ids[: start + 2]) == ["Is it "]
    padding = torch.full((5,), tiny_processor.tokenizer.pad_token_id)  # as in a batch whose other rows go on
    assert tiny_processor.decode_ids(torch.cat([ids[: start + 3 + 2 * (cols + 1) + 3], padding]))[-1].size == part.size
    pictures = tiny_processor.post_process_multimodal_output([ids, ids[:start]], generation_mode="image")
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(tiny_processor.decode_image(codes[1])))
    assert pictures[1] is None
    assert tiny_processor.post_process_multimodal_output([ids[:start]]) == ["Is it "]


def test_every_task_has_a_prompt_with_a_place_for_its_picture(tiny_processor):
    for name, task in TASKS.items():
        prompt = "a {red} cube" if "{prompt}" in task.template else None
        condition = "depth" if task.num_panels > 1 else None
        turn = tiny_processor.task_prompt(name, prompt, height=32, width=48, condition=condition)
        assert turn.count("<|image|>") == (task.needs_image and not task.continues)
        assert prompt is None or prompt in turn
        assert condition is None or "<depth map>" in turn
    sized = tiny_processor.task_prompt("text-to-image", "a cube", height=32, width=48)
    assert sized == "Generate an image of 48x32 according to the following prompt:\na cube"
    unsized = tiny_processor.task_prompt("text-to-image", "a cube")
    assert unsized == "Generate an image according to the following prompt:\na cube"


def test_a_saved_processor_comes_back_with_its_vq_model(tiny_processor, tiny_vqvae, tmp_path):
    tiny_processor.task_templates = {"segmentation": "Segmentic segmentation. <|image|>"}
    tiny_processor.save_pretrained(tmp_path)
    loaded = LuminaMGPTProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no VQ model in vqvae/"):
        loaded("What?", images=picture())
    tiny_vqvae.save_pretrained(tmp_path / "vqvae")
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for processor in (loaded, again):
        assert processor("What?", picture())["input_ids"].equal(tiny_processor("What?", picture())["input_ids"])
        for name in ("chat_template", "size_unit_px", "codes_per_size_unit", "target_px"):
            assert getattr(processor, name) == getattr(tiny_processor, name)
        assert processor.task_prompt("segmentation") == "Segmentic segmentation. <|image|>"
    assert tiny_processor.vqvae is tiny_vqvae


@pytest.mark.hub
def test_a_processor_on_the_hub_takes_its_vq_model_from_its_own_revision(hub, tiny_processor, tiny_config, tmp_path):
    repo_id, folder = hub.repo_id("processor"), tmp_path / "folder"
    tiny_config().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    tiny_processor.vqvae.save_pretrained(folder / "vqvae")
    load = f"""
        import numpy as np
        from transformers import AutoProcessor
        def codes(**revision):
            processor = AutoProcessor.from_pretrained({repo_id!r}, trust_remote_code=True, **revision)
            return processor.encode_image(np.zeros((32, 32, 3), np.uint8)).tolist()
        print(codes(revision="v1"))
    """
    upload = f"""
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo({repo_id!r})
        api.upload_folder(repo_id={repo_id!r}, folder_path="folder")
        api.create_tag({repo_id!r}, tag="v1")
        api.delete_folder("vqvae", {repo_id!r})
    """
    without = """
        try:
            codes()
        except ValueError as error:
            assert "no VQ model" in str(error), error
        else:
            raise AssertionError
    """
    expected = str(tiny_processor.encode_image(np.zeros((32, 32, 3), np.uint8)).tolist())
    for code, env in ((upload + load + without, hub.env), (load, hub.env | {"HF_HUB_OFFLINE": "1"})):
        assert run_python(code, env, tmp_path).strip() == expected


def test_a_missing_placeholder_is_added_to_the_tokenizer(tiny_tokenizer):
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|image|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>")
    processor = LuminaMGPTProcessor(LuminaMGPTImageProcessor(), tokenizer, size_unit_px=16)
    assert processor.image_token_id == len(tokenizer) - 1

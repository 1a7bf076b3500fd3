"""Every adapter on small local datasets with exactly the columns and types that public ones have.

Where the columns were looked up stands beside each; names and types are theirs, pictures and words are made here.
"""

import random
import struct
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_lumina_mgpt import training
from modeling_lumina_mgpt.processing_lumina_mgpt import IMAGE
from modeling_lumina_mgpt.training import drawing
from modeling_lumina_mgpt.training.degradation import Degradation, degrade
from modeling_lumina_mgpt.training.mixture import Mixture
from modeling_lumina_mgpt.training.recipe import read_recipe
from modeling_lumina_mgpt.training.tasks import ADAPTERS, ColumnError, RecordError, check_columns, conversation

TEXT, WHOLE, REAL, PICTURE = Value("string"), Value("int64"), Value("float64"), ImageFeature()
PALETTE = [["floor", 0, 0, 255], ["wall", 255, 255, 0], ["bed", 0, 255, 0]]


class Encoded(NamedTuple):
    """A record on its way to ids; `answers` holds the text and codes of each answer, read back from its labels."""

    turns: list
    pictures: list
    answers: list
    ids: list


@pytest.fixture
def encode(tiny_processor):
    """Takes a record of a dataset through its adapter to ids and checks what is true of every record."""
    tiny_processor.image_processor.palette = PALETTE

    def run(task, features, record, columns=None, options=None, seed=0, **kwargs):
        columns, options = columns or {}, options or {}
        dataset = Dataset.from_dict({name: [record[name]] for name in features}, features=Features(features))
        check_columns(task, dataset.column_names, columns, options)
        rng = random.Random(seed)
        turns, pictures = conversation(task, dataset[0], tiny_processor, rng, columns, options, target_px=64, **kwargs)
        encoded = tiny_processor.encode_conversation(turns, pictures, target_px=64)
        pairs = zip(encoded["labels"], encoded["input_ids"], strict=True)
        runs = [[i for _, i in run] for is_answer, run in groupby(pairs, lambda pair: pair[0] >= 0) if is_answer]
        assert len(runs) == len(turns) // 2
        assert all(run[-1] == tiny_processor.uni_rep.end_of_turn_id for run in runs)
        return Encoded(turns, pictures, [tiny_processor.split_ids(run[:-1]) for run in runs], encoded["input_ids"])

    def is_drawn(codes, picture):
        wanted = picture if tiny_processor.is_codes(picture) else tiny_processor.encode_image(picture, 64)
        return torch.equal(codes, wanted)

    run.is_drawn, run.processor = is_drawn, tiny_processor
    return run


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture that no other seed has, dark enough for what is drawn over it to be seen."""
    values = np.random.default_rng(seed).integers(0, 120, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB")))


# Text to image


def test_webdatasets_of_pictures_with_a_struct(encode):
    # jackyhate/text-to-image-2M: github.com/Yuanshi9815/OminiControl src/train/data.py
    features = {"jpg": PICTURE, "json": {"prompt": TEXT}, "__key__": TEXT, "__url__": TEXT}
    record = {"jpg": noise(90, 40), "json": {"prompt": "a cat"}, "__key__": "0", "__url__": "x.tar"}
    columns = {"image": "jpg", "caption": "json.prompt"}
    found = encode("text-to-image", features, record, columns)
    width, height = encode.processor.uni_rep.best_bucket(90, 40, 64)
    assert found.turns[0] == f"Generate an image of {width}x{height} according to the following prompt:\na cat"
    assert encode.is_drawn(found.answers[0][0], record["jpg"])
    assert found.answers[0][0].shape == encode.processor.uni_rep.grid(height, width)
    without = encode("text-to-image", features, record, columns, {"drop_size": 1.0})
    assert without.turns[0] == "Generate an image according to the following prompt:\na cat"
    half = [encode("text-to-image", features, record, columns, {"drop_size": 0.5}, seed) for seed in range(8)]
    assert {drawn.turns[0] for drawn in half} == {found.turns[0], without.turns[0]}


def test_webdatasets_of_pictures_with_text(encode):
    # pixparse/cc12m-wds: huggingface.co/datasets/pixparse/cc12m-wds
    features = {"jpg": PICTURE, "txt": TEXT, "json": {"caption": TEXT, "key": TEXT}, "__key__": TEXT, "__url__": TEXT}
    struct_ = {"caption": "a dog", "key": "0"}
    record = {"jpg": noise(), "txt": "a dog\n", "json": struct_, "__key__": "0", "__url__": "x.tar"}
    found = encode("text-to-image", features, record, {"image": "jpg", "caption": "txt"})
    assert found.turns[0].endswith("\na dog") and encode.is_drawn(found.answers[0][0], record["jpg"])


def test_laion_has_addresses_and_several_captions(encode, monkeypatch):
    # huggingface.co/datasets/Mayfull/laion-coco-1m README.md
    features = {"URL": TEXT, "TEXT": TEXT, "top_caption": TEXT, "all_captions": List(TEXT), "WIDTH": WHOLE}
    record = {"URL": "https://example.com/a.jpg", "TEXT": "Cat", "top_caption": "a cat", "WIDTH": 64}
    record["all_captions"] = ["a cat", "the cat", ""]
    fetched = []
    module = "modeling_lumina_mgpt.image_processing_lumina_mgpt.load_image"
    monkeypatch.setattr(module, lambda url, timeout: fetched.append(url) or noise())
    columns = {"image": "URL", "caption": "all_captions"}
    prompts = {
        encode("text-to-image", features, record, columns, seed=i).turns[0].rpartition("\n")[2] for i in range(9)
    }
    assert prompts == {"a cat", "the cat"} and set(fetched) == {record["URL"]}


# Text and questions


def test_openhermes_is_chat(encode):
    # teknium/OpenHermes-2.5: dataset_info.json in huggingface.co/datasets/ByteResearch/OpenHermes-2.5-Filtered-240405
    features = {
        "conversations": [{"from": TEXT, "value": TEXT, "weight": REAL}],
        **dict.fromkeys(("category", "topic", "title", "source", "model", "language"), TEXT),
    }
    said = [("system", "Be brief."), ("human", "Hi?"), ("gpt", "Hello."), ("human", "Why?"), ("gpt", "So.")]
    talk = [{"from": role, "value": text, "weight": None} for role, text in said]
    found = encode("chat", features, {**dict.fromkeys(features, ""), "conversations": talk})
    assert found.turns == ["Be brief.\n\nHi?", "Hello.", "Why?", "So."]
    assert found.answers == [["Hello."], ["So."]]
    empty, placeholder = {**talk[1], "value": " "}, {**talk[1], "value": IMAGE}
    for broken in (talk[:4], talk[2:], [], [empty, talk[2]], [placeholder, talk[2]]):
        with pytest.raises(RecordError):
            encode("chat", features, {**dict.fromkeys(features, ""), "conversations": broken})


def test_messages_are_chat(encode):
    features = {"messages": List({"role": TEXT, "content": TEXT})}
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    assert encode("chat", features, {"messages": talk}).answers == [["Hello."]]
    other = [{**turn, "content": turn["content"].upper()} for turn in talk]
    both = {"messages": features["messages"], "chosen": features["messages"]}
    record = {"messages": talk, "chosen": other}
    assert encode("chat", both, record, {"conversations": "chosen"}).answers == [["HELLO."]]  # what is named counts


LLAVA = {"id": TEXT, "image": TEXT, "conversations": List({"from": TEXT, "value": TEXT})}


def test_llava_and_mini_gemini_name_files(encode, tmp_path):
    # liuhaotian/LLaVA-Instruct-150K: github.com/haotian-liu/LLaVA docs/Finetune_Custom_Data.md
    # YanweiLi/MGM-Instruction: the same, with records of text alone (github.com/dvlab-research/MGM README.md)
    (tmp_path / "coco").mkdir()
    noise(seed=3).save(tmp_path / "coco" / "1.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    record = {"id": "1", "image": "coco/1.png", "conversations": talk}
    found = encode("image-to-text", LLAVA, record, options={"folder": str(tmp_path)})
    assert found.turns == [f"{IMAGE} What is it?", "A cat."] and same(found.pictures[0], noise(seed=3))
    assert found.answers == [["A cat."]]
    behind = [{"from": "human", "value": "What is it?\n<image>"}, talk[1]]
    found = encode("image-to-text", LLAVA, {**record, "conversations": behind}, options={"folder": str(tmp_path)})
    assert found.turns[0] == f"What is it? {IMAGE}"
    plain = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
    assert encode("image-to-text", LLAVA, {"id": "2", "image": None, "conversations": plain}).turns[0] == "Hi?"
    with pytest.raises(RecordError, match="0 pictures for 1"):
        encode("image-to-text", LLAVA, {**record, "image": None})
    with pytest.raises(RecordError, match="No such file"):
        encode("image-to-text", LLAVA, record)


def test_messages_with_items(encode):
    # huggingface.co/datasets/HuggingFaceH4/llava-instruct-mix-vsft README.md
    item = {"index": WHOLE, "text": TEXT, "type": TEXT}
    features = {"messages": List({"content": List(item), "role": TEXT}), "images": List(PICTURE)}
    question = [{"index": None, "text": "What is it?\n", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    answer = [{"index": None, "text": "A cat.", "type": "text"}]
    talk = [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
    found = encode("image-to-text", features, {"messages": talk, "images": [noise()]}, {"image": "images"})
    assert found.turns == [f"What is it? {IMAGE}", "A cat."] and same(found.pictures[0], noise())


def test_the_format_of_lumina_mgpt_itself(encode):
    # github.com/Alpha-VLLM/Lumina-mGPT lumina_mgpt/TRAIN.md
    features = {"conversations": List({"from": TEXT, "value": TEXT}), "image": List(PICTURE)}
    talk = [{"from": "human", "value": f"Depth {IMAGE} please"}, {"from": "gpt", "value": f"Sure. {IMAGE}"}]
    found = encode("image-to-text", features, {"conversations": talk, "image": [noise(), noise(seed=1)]})
    assert found.turns == [f"Depth {IMAGE} please", f"Sure. {IMAGE}"]
    assert found.answers[0][0].strip() == "Sure." and encode.is_drawn(found.answers[0][1], noise(seed=1))


def test_captions_are_one_of_several(encode):
    # lmms-lab/COCO-Caption and nlphuji/flickr30k have lists of captions
    features = {"image": PICTURE, "answer": List(TEXT)}
    record = {"image": noise(), "answer": ["A cat.", "The cat."]}
    found = [encode("caption", features, record, {"caption": "answer"}, seed=i) for i in range(9)]
    assert {f.answers[0][0] for f in found} == {"A cat.", "The cat."}
    assert found[0].turns[0] == encode.processor.task_prompt("caption")


def test_vqav2(encode):
    # huggingface.co/datasets/lmms-lab/VQAv2 README.md
    answer = {"answer": TEXT, "answer_confidence": TEXT, "answer_id": WHOLE}
    texts = dict.fromkeys(("question_type", "multiple_choice_answer", "answer_type", "question"), TEXT)
    features = {**texts, "answers": List(answer), "image_id": WHOLE, "question_id": WHOLE, "image": PICTURE}
    record = {"question_type": "what", "multiple_choice_answer": "cat", "answer_type": "other", "question": "What?"}
    answers = [{"answer": word, "answer_confidence": "yes", "answer_id": 1} for word in ("cat", "kitten")]
    record |= {"answers": answers, "image_id": 1, "question_id": 1, "image": noise()}
    found = encode("vqa", features, record, {"answer": "multiple_choice_answer"})
    assert found.turns == [f"What? {IMAGE}", "cat"] and found.answers == [["cat"]]
    every = [encode("vqa", features, record, {"answer": "answers.answer"}, seed=i).turns[1] for i in range(9)]
    assert set(every) == {"cat", "kitten"}


# Editing


def test_magicbrush(encode):
    # huggingface.co/datasets/osunlp/MagicBrush README.md
    pictures = dict.fromkeys(("source_img", "mask_img", "target_img"), PICTURE)
    features = {"img_id": TEXT, "turn_index": Value("int32"), **pictures, "instruction": TEXT}
    record = {name: noise(seed=i) for i, name in enumerate(pictures)}
    record |= {"img_id": "1", "turn_index": 1, "instruction": "Add a hat."}
    found = encode("edit", features, record)
    assert found.turns == [f"Add a hat. {IMAGE}", IMAGE] and same(found.pictures[0], record["source_img"])
    assert encode.is_drawn(found.answers[0][0], record["target_img"])
    with pytest.raises(RecordError, match="instruction is empty"):
        encode("edit", features, {**record, "instruction": ""})


def test_seed_data_edit_in_one_turn(encode, tmp_path):
    # AILab-CVC/SEED-Data-Edit, parts 1 and 2: file names. Fields are assumed: the cards list none
    for i, name in enumerate(("a.jpg", "b.jpg")):
        noise(seed=i).save(tmp_path / name, quality=95)
    features = dict.fromkeys(("source_image", "target_image", "instruction"), TEXT)
    record = {"source_image": "a.jpg", "target_image": "b.jpg", "instruction": "Remove it."}
    columns = {"source_img": "source_image", "target_img": "target_image"}
    found = encode("edit", features, record, columns, {"folder": str(tmp_path)})
    assert encode.is_drawn(found.answers[0][0], Image.open(tmp_path / "b.jpg"))


def test_seed_data_edit_in_several_turns(encode, tmp_path):
    # AILab-CVC/SEED-Data-Edit-Part2-3 multi_turn_editing: up to 5 turns in numbered columns, as its readers say
    for i in range(3):
        noise(seed=i).save(tmp_path / f"{i}.png")
    names = ["source_image", *(f"{name}_{i}" for i in range(1, 6) for name in ("edit_image", "instruction"))]
    record = dict.fromkeys(names) | {"source_image": "0.png", "edit_image_1": "1.png", "edit_image_2": "2.png"}
    record |= {"instruction_1": "Add a hat.", "instruction_2": "Make it red."}
    columns = {"source_img": "source_image", "target_img": "edit_image_*", "instruction": "instruction_*"}
    found = encode("edit", dict.fromkeys(names, TEXT), record, columns, {"folder": str(tmp_path)})
    assert found.turns == [f"Add a hat. {IMAGE}", IMAGE, "Make it red.", IMAGE]
    assert [encode.is_drawn(a[0], noise(seed=i + 1)) for i, a in enumerate(found.answers)] == [True, True]
    with pytest.raises(RecordError, match="1 instructions for 3 pictures"):
        record["instruction_2"] = None
        encode("edit", dict.fromkeys(names, TEXT), record, columns, {"folder": str(tmp_path)})


def test_lists_of_pictures_and_instructions(encode):
    features = {"images": List(PICTURE), "instructions": List(TEXT)}
    record = {"images": [noise(seed=i) for i in range(3)], "instructions": ["Add a hat.", "Make it red."]}
    found = encode("edit", features, record)
    assert found.turns[2] == "Make it red." and encode.is_drawn(found.answers[1][0], noise(seed=2))


# Maps


def test_virtual_kitti_has_centimetres_in_16_bits(encode, tmp_path):
    # github.com/DepthAnything/Depth-Anything-V2 metric_depth/dataset/vkitti2.py; files beside each other
    depth = np.full((64, 64), 65535, np.uint16)  # the sky
    depth[32:], depth[:, :16] = 500, 1000
    Image.fromarray(depth).save(tmp_path / "depth.png")
    noise().save(tmp_path / "rgb.jpg")
    features, record = {"image": TEXT, "depth": TEXT}, {"image": "rgb.jpg", "depth": "depth.png"}
    options = {"folder": str(tmp_path), "metres_per_unit": 0.01, "range_m": [5, 80]}
    found = encode("depth", features, record, options=options)
    assert found.turns == [f"Depth estimation. {IMAGE}", IMAGE]
    read = encode.processor.image_processor.to_array(found.pictures[1], "depth")
    assert read[40, 40] == 1 and read[0, 40] == 0
    assert read[0, 0] == pytest.approx((1 / 10 - 1 / 80) / (1 / 5 - 1 / 80), abs=0.01)
    assert encode.is_drawn(found.answers[0][0], found.pictures[1])
    linear = encode("depth", features, record, options={**options, "linear": True}).pictures[1]
    assert encode.processor.image_processor.to_array(linear, "depth")[0, 0] == pytest.approx(70 / 75, abs=0.01)


def test_sintel_has_files_of_its_own(encode, tmp_path):
    # huggingface.co/spaces/tencent/DepthCrafter benchmark/dataset_extract_sintel.py: tag, width, height, float32
    depth = np.linspace(1, 100, 64 * 32, dtype="<f4").reshape(32, 64)
    data = struct.pack("<f2i", 202021.25, 64, 32) + depth.tobytes()
    (tmp_path / "frame_0001.dpt").write_bytes(data)
    noise(64, 32).save(tmp_path / "frame_0001.png")
    features, record = {"image": TEXT, "depth": TEXT}, {"image": "frame_0001.png", "depth": "frame_0001.dpt"}
    found = encode("depth", features, record, options={"folder": str(tmp_path)})
    read = encode.processor.image_processor.to_array(found.pictures[1], "depth")
    np.testing.assert_allclose(read, (1 / depth - 1 / 100) / (1 - 1 / 100), atol=1 / 255)
    for broken in (data[:500], b"PIEH", b"nonsense"):
        (tmp_path / "frame_0001.dpt").write_bytes(broken)
        with pytest.raises(RecordError, match="depth"):
            encode("depth", features, record, options={"folder": str(tmp_path)})


def test_nyu_depth_has_float_pictures(encode):
    # huggingface.co/datasets/sayakpaul/nyu_depth_v2 README.md and nyu_depth_v2.py: metres
    depth = np.full((48, 64), 2.0, np.float32)
    depth[:, 32:], depth[0] = 8.0, 0.0  # the first row is not known
    record = {"image": noise(64, 48), "depth_map": Image.fromarray(depth)}
    features = {"image": PICTURE, "depth_map": PICTURE}
    found = encode("depth", features, record, {"depth": "depth_map"})
    read = encode.processor.image_processor.to_array(found.pictures[1], "depth")
    assert read[5, 5] == 1 and read[5, 40] == 0 and read[0, 5] == 0
    with pytest.raises(RecordError, match="not known"):
        encode("depth", features, {**record, "depth_map": Image.fromarray(0 * depth)}, {"depth": "depth_map"})


def nyuv2():
    """huggingface.co/datasets/tanganke/nyuv2 README.md, with smaller arrays."""
    shape = (48, 64)
    features = {
        "image": Array3D((3, *shape), "float32"),
        "segmentation": Array2D(shape, "int64"),
        "depth": Array3D((1, *shape), "float32"),
        "normal": Array3D((3, *shape), "float32"),
        "noise": Array3D((1, *shape), "float32"),
    }
    labels = np.full(shape, -1)
    labels[:, :20], labels[:, 20:40] = 2, 1
    normal = np.zeros((3, *shape), np.float32)
    normal[:, :, :32], normal[:, :, 32:] = np.reshape([0.6, -0.8, 0], (3, 1, 1)), np.reshape([0, 0, -1], (3, 1, 1))
    normal[:, :4] = 0  # not known
    image = np.asarray(noise(64, 48), np.float32).transpose(2, 0, 1) / 255
    depth = np.linspace(1, 2, 48 * 64, dtype=np.float32).reshape(1, *shape)
    return features, {"image": image, "segmentation": labels, "depth": depth, "normal": normal, "noise": depth}


def test_nyuv2_has_arrays(encode):
    features, record = nyuv2()
    image_processor = encode.processor.image_processor
    depth = encode("depth", features, record)
    assert same(depth.pictures[0], noise(64, 48))
    assert image_processor.to_array(depth.pictures[1], "depth")[0, 0] == 1
    normal = encode("normal", features, record, options={"flip": "yz"})
    assert normal.turns == [f"Surface normal estimation. {IMAGE}", IMAGE]
    read = image_processor.to_array(normal.pictures[1], "normal")
    np.testing.assert_allclose(read[10, 10], [0.6, 0.8, 0], atol=0.01)
    np.testing.assert_allclose(read[10, 40], [0, 0, 1], atol=0.01)
    assert normal.pictures[1].getpixel((40, 0)) == (0, 0, 0)
    segmentation = encode("segmentation", features, record)
    assert [segmentation.pictures[1].getpixel((x, 5)) for x in (0, 30, 50)] == [(0, 255, 0), (255, 255, 0), (0, 0, 0)]


def test_scannet_normals_are_drawn_already(encode, tmp_path):
    # ScanNet frames of FrameNet (github.com/hjwdzh/FrameNet): color and normal.png, as its loaders read them
    normals = np.zeros((64, 64, 3), np.uint8)
    normals[:, :32], normals[:, 32:] = (128, 128, 0), (0, 128, 128)
    normals[0] = 0  # not known
    Image.fromarray(normals).save(tmp_path / "frame-000000-normal.png")
    noise().save(tmp_path / "frame-000000-color.png")
    features = {"image": TEXT, "normal": TEXT}
    record = {"image": "frame-000000-color.png", "normal": "frame-000000-normal.png"}
    found = encode("normal", features, record, options={"folder": str(tmp_path), "flip": "xyz"})
    read = encode.processor.image_processor.to_array(found.pictures[1], "normal")
    np.testing.assert_allclose(read[5, [5, 40]], [[0, 0, 1], [1, 0, 0]], atol=0.02)
    assert found.pictures[1].getpixel((0, 0)) == (0, 0, 0)


COCO_PERSON = [[10 + 2 * i, 5 + 3 * i, 1 + i % 2] for i in range(17)]
COCO_PERSON[4] = [0, 0, 0]  # an ear that cannot be seen


def test_coco_keypoints_in_annotations(encode):
    # huggingface.co/datasets/hero-nq1310/coco-kpt17 README.md: x, y, visibility, flat, a struct for each person
    person = {"category_id": WHOLE, "bbox": List(REAL), "keypoints": List(WHOLE), "image_id": WHOLE, "id": WHOLE}
    features = {"image": PICTURE, "annotations": List(person)}
    flat = [number for keypoint in COCO_PERSON for number in keypoint]
    about = {"category_id": 1, "bbox": [0, 0, 60, 60], "image_id": 1, "id": 1}
    people = [{**about, "keypoints": keypoints} for keypoints in (flat, [0] * 51)]
    record = {"image": noise(), "annotations": people}
    found = encode("pose", features, record, {"keypoints": "annotations.keypoints"})
    assert found.turns == [f"Human pose estimation. {IMAGE}", IMAGE]
    joints = {found.pictures[1].getpixel(tuple(joint[:2])) for joint in COCO_PERSON if joint[2]}
    assert len(joints) == 16 and (0, 0, 0) not in joints and found.pictures[1].getpixel((0, 0)) == (0, 0, 0)
    for broken, reason in ((people[1:], "nobody"), ([{**people[0], "keypoints": [1, 2]}], "17"), ([], "nobody")):
        with pytest.raises(RecordError, match=reason):
            encode("pose", features, {**record, "annotations": broken}, {"keypoints": "annotations.keypoints"})


def test_coco_keypoints_as_triples(encode):
    # huggingface.co/datasets/whyen-wang/coco_keypoints README.md
    features = {"image": PICTURE, "bboxes": List(List(REAL)), "keypoints": List(List(List(WHOLE)))}
    record = {"image": noise(), "bboxes": [[0, 0, 60, 60]], "keypoints": [COCO_PERSON]}
    drawn = encode("pose", features, record).pictures[1]
    assert same(drawn, drawing.draw_skeletons(np.array([COCO_PERSON]), 64, 64))


def test_ade20k_has_label_maps(encode):
    # scene_parse_150 (zhoubolei; as Parquet danjacobellis): huggingface.co/datasets/zhoubolei/scene_parse_150
    labels = np.zeros((64, 64), np.uint8)
    labels[:20], labels[20:40] = 1, 2
    features = {"image": PICTURE, "annotation": PICTURE, "scene_category": ClassLabel(names=["beach"])}
    record = {"image": noise(), "annotation": Image.fromarray(labels), "scene_category": 0}
    columns = {"segmentation": "annotation"}
    found = encode("segmentation", features, record, columns)
    assert found.turns == [f"Semantic segmentation. {IMAGE}", IMAGE]
    np.testing.assert_array_equal(encode.processor.image_processor.to_array(found.pictures[1], "segmentation"), labels)
    voc = encode("segmentation", features, record, columns, {"palette": "voc"}).pictures[1]
    assert [voc.getpixel((0, y)) for y in (50, 0, 30)] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    own = encode("segmentation", features, record, columns, {"palette": [[1, 2, 3], [4, 5, 6]]}).pictures[1]
    assert [own.getpixel((0, y)) for y in (50, 0, 30)] == [(1, 2, 3), (4, 5, 6), (0, 0, 0)]
    with pytest.raises(ValueError, match="'nonsense': accepted is 'voc'"):
        encode("segmentation", features, record, columns, {"palette": "nonsense"})


def test_captioned_ade20k_has_both(encode):
    # huggingface.co/datasets/limingcv/Captioned_ADE20K README.md: labels as lists, and drawn
    texts = dict.fromkeys(("detailed_prompt", "image_path", "prompt"), TEXT)
    features = {"image": PICTURE, "control_seg": PICTURE, "seg_map": List(List(Value("uint8"))), **texts}
    labels = np.zeros((64, 64), np.uint8)
    labels[:20] = 1
    record = {"image": noise(), "control_seg": noise(seed=1), "seg_map": labels.tolist(), "prompt": "a beach"}
    record |= {"detailed_prompt": "a wide beach", "image_path": "1.jpg"}
    drawn = encode("segmentation", features, record, {"segmentation": "control_seg"}).pictures[1]
    assert same(drawn, record["control_seg"])
    own = encode("segmentation", features, record, {"segmentation": "seg_map"}).pictures[1]
    assert [own.getpixel((0, y)) for y in (0, 50)] == [(255, 255, 0), (0, 0, 255)]
    found = encode("control", features, record, {"segmentation": "control_seg", "caption": "prompt"})
    assert same(found.pictures[0], record["control_seg"]) and encode.is_drawn(found.answers[0][0], record["image"])


def test_refcoco_with_ends(encode, tmp_path):
    # huggingface.co/datasets/jxu124/refcoco README.md; boxes: left, top, right, bottom (Hugging Face's cookbook)
    sentence = {"raw": TEXT, "sent": TEXT, "sent_id": WHOLE, "tokens": List(TEXT)}
    features = {"image_path": TEXT, "sentences": List(sentence), "bbox": List(REAL), "captions": List(TEXT)}
    noise(80, 48).save(tmp_path / "1.png")
    sentences = [{"raw": text, "sent": text, "sent_id": 1, "tokens": text.split()} for text in ("left cat", "the cat")]
    record = {"image_path": "1.png", "sentences": sentences, "bbox": [10.2, 8.1, 60.4, 40.0], "captions": ["left cat"]}
    columns = {"image": "image_path", "phrase": "sentences.sent", "box": "bbox"}
    found = [encode("detection", features, record, columns, {"folder": str(tmp_path)}, seed=i) for i in range(9)]
    assert {f.turns[0] for f in found} == {f"Detect: left cat {IMAGE}", f"Detect: the cat {IMAGE}"}
    source, framed = found[0].pictures
    assert same(source, noise(80, 48)) and encode.is_drawn(found[0].answers[0][0], framed)
    assert encode.processor.image_processor.find_box(framed, source) == (10, 8, 60, 40)
    for box in ([10, 8, 11, 40], [200, 8, 300, 40], [1, 2, 3], None):
        with pytest.raises(RecordError, match="box"):
            encode("detection", features, {**record, "bbox": box}, columns, {"folder": str(tmp_path)})


def test_refcoco_with_sizes(encode):
    # huggingface.co/datasets/lmms-lab/RefCOCO README.md; its boxes are COCO's: left, top, width, height
    features = {"question_id": TEXT, "image": PICTURE, "question": TEXT, "answer": List(TEXT), "bbox": List(REAL)}
    record = {"question_id": "1", "image": noise(80, 48), "question": "?", "answer": ["cat"], "bbox": [10, 8, 50, 32]}
    columns = {"phrase": "answer", "box": "bbox"}
    source, framed = encode("detection", features, record, columns, {"box_format": "xywh"}).pictures
    assert encode.processor.image_processor.find_box(framed, source) == (10, 8, 60, 40)
    record["bbox"] = [0.25, 0.25, 0.5, 0.5]
    source, framed = encode("detection", features, record, columns, {"relative": True}).pictures
    assert encode.processor.image_processor.find_box(framed, source) == (20, 12, 40, 24)
    with pytest.raises(ValueError, match="box_format 'cxcywh'"):
        encode("detection", features, record, columns, {"box_format": "cxcywh"})


def test_a_box_is_drawn_around_what_is_left_of_a_crop(encode):
    features = {"image": PICTURE, "phrase": TEXT, "box": List(REAL)}
    record = {"image": noise(640, 100), "phrase": "the cat", "box": [40.0, 20.0, 300.0, 80.0]}
    source, framed = encode("detection", features, record).pictures
    assert source.size == framed.size == (128, 32)  # of 205 columns the middle ones
    assert encode.processor.image_processor.find_box(framed, source) == (0, 6, 58, 26)
    with pytest.raises(RecordError, match="box"):
        encode("detection", features, record | {"box": [0.0, 20.0, 60.0, 80.0]})


def test_a_map_is_cropped_as_its_picture(encode):
    record = {"image": noise(402, 80), "depth": noise(402, 80).resize((201, 40))}
    features = {"image": PICTURE, "depth": PICTURE}
    for seed in range(4):
        picture, shown = encode("depth", features, record, random_crop=True, seed=seed).pictures
        assert np.abs(np.asarray(picture, int) - np.asarray(shown)).mean() < 4
    with pytest.raises(RecordError, match="20x100 px for a picture of 402x80"):
        encode("depth", features, record | {"depth": noise(24, 104).resize((20, 100))})


# From maps to pictures


def test_control_from_drawn_depth(encode):
    # huggingface.co/datasets/limingcv/MultiGen-20M_depth README.md
    features = {"image": PICTURE, "control_depth": PICTURE, "text": TEXT}
    record = {"image": noise(), "control_depth": noise(seed=1).convert("L"), "text": "a cat"}
    found = encode("control", features, record, {"depth": "control_depth", "caption": "text"})
    assert found.turns == [encode.processor.task_prompt("control", "a cat"), IMAGE]
    assert same(found.pictures[0], record["control_depth"]) and encode.is_drawn(found.answers[0][0], record["image"])


def test_control_from_drawn_skeletons(encode):
    # huggingface.co/datasets/WeiChow/mscoco_keypoint README.md
    features = {"id": TEXT, "caption": TEXT, "image": PICTURE, "cond": PICTURE}
    record = {"id": "1", "caption": "a cat", "image": noise(), "cond": noise(seed=1)}
    found = encode("control", features, record, {"pose": "cond"}, {"condition": "pose"})
    assert same(found.pictures[0], record["cond"])


def test_control_draws_one_of_the_maps(encode):
    features, record = nyuv2()
    features, record = {**features, "caption": TEXT}, {**record, "caption": "a bed"}
    drawn = [encode("control", features, record, options={"flip": "yz"}, seed=i).pictures[0] for i in range(12)]
    maps = [encode(t, features, record, options=o).pictures[1] for t, o in (("depth", {}), ("segmentation", {}))]
    maps.append(encode("normal", features, record, options={"flip": "yz"}).pictures[1])
    assert all(any(same(picture, wanted) for picture in drawn) for wanted in maps)
    options = {"condition": ["depth", "segmentation"]}
    drawn = [encode("control", features, record, options=options, seed=i).pictures[0] for i in range(12)]
    assert not any(same(picture, maps[2]) for picture in drawn)


# Panels


def halves(picture):
    return [picture.crop((0, y, picture.width, y + picture.height // 2)) for y in (0, picture.height // 2)]


@pytest.mark.parametrize("task", ["pair", "panel"])
def test_panels_from_edges(encode, task):
    # jackyhate/text-to-image-2M, as OminiControl makes edges of it
    features = {"jpg": PICTURE, "json": {"prompt": TEXT}}
    record = {"jpg": noise(90, 40), "json": {"prompt": "a cat"}}
    columns = {"image": "jpg", "caption": "json.prompt"}
    found = encode(task, features, record, columns, {"condition": "canny"})
    (both,) = found.pictures
    wanted = encode.processor.task_prompt(task, "a cat", height=both.height, width=both.width, condition="canny")
    assert found.turns == [wanted, IMAGE] and f"{both.width}x{both.height}" in wanted
    size = both.width, both.height // 2
    image_processor = encode.processor.image_processor
    photo, edges = (image_processor.crop(p, *size) for p in (record["jpg"], image_processor.canny(record["jpg"])))
    upper, lower = halves(both)
    assert [same(upper, p) for p in (photo, edges)] == [task == "pair", task == "panel"]
    assert [same(lower, p) for p in (photo, edges)] == [task == "panel", task == "pair"]
    assert both.size in encode.processor.uni_rep.buckets(64) and encode.is_drawn(found.answers[0][0], both)


def test_subjects200k(encode):
    # huggingface.co/datasets/Yuanshi/Subjects200K README.md; two pictures side by side with a margin around each
    description = dict.fromkeys(("item", "description_0", "description_1", "category"), TEXT)
    features = {
        "image": PICTURE,
        "collection": TEXT,
        "quality_assessment": dict.fromkeys(("compositeStructure", "objectConsistency", "imageQuality"), WHOLE),
        "description": {**description, "description_valid": Value("bool")},
    }
    both = Image.new("RGB", (2 * 32 + 3 * 8, 32 + 2 * 8))
    both.paste(noise(32, 32, 1), (8, 8))
    both.paste(noise(32, 32, 2), (48, 8))
    words = {"item": "a red hat", "description_0": "on a bed", "description_1": "in the rain", "category": "hats"}
    record = {"image": both, "collection": "collection_1", "description": {**words, "description_valid": True}}
    record["quality_assessment"] = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}
    columns = {"reference": "image", "subject": "description.item", "caption": "description.description_1"}
    options = {"condition": "subject", "crop": {"reference": [8, 8, 40, 40], "image": [48, 8, 80, 40]}}
    found = encode("panel", features, record, columns, options)
    assert "<a red hat>" in found.turns[0] and found.turns[0].endswith("\nin the rain")
    upper, lower = halves(found.pictures[0])
    crop = encode.processor.image_processor.crop
    assert same(upper, crop(noise(32, 32, 1), *upper.size)) and same(lower, crop(noise(32, 32, 2), *lower.size))


# Better pictures


def test_refine_disturbs_codes(encode):
    found = encode("refine", {"image": PICTURE}, {"image": noise(90, 40)}, options={"share": [0.2, 0.3]})
    disturbed, codes = found.pictures
    assert found.turns == [f"No edit. {IMAGE}", IMAGE] and encode.is_drawn(codes, noise(90, 40))
    assert 0.05 < (disturbed != codes).float().mean() < 0.5 and torch.equal(found.answers[0][0], codes)
    assert disturbed.max() < 64 and disturbed.dtype == torch.int64


def test_lsdir_is_degraded(encode):
    # huggingface.co/datasets/danjacobellis/LSDIR_raw README.md, with a caption added
    features = {"path": TEXT, "image": PICTURE, "w": WHOLE, "h": WHOLE, "mode": TEXT, "aspect": REAL, "caption": TEXT}
    record = {"path": "1.png", "image": noise(96, 80), "w": 96, "h": 80, "mode": "RGB", "aspect": 1.2}
    record["caption"] = "A cat."
    found = encode("restore", features, record)
    words = found.turns[1]
    assert words.startswith("The image is ") and words.endswith(f" compressed. A cat. {IMAGE}")
    degraded, sharp = found.pictures
    assert degraded.size == sharp.size == (64, 64) and not same(degraded, sharp)
    assert same(sharp, encode.processor.image_processor.crop(record["image"], 64, 64))
    assert found.answers[0][0].strip() == words.removesuffix(IMAGE).strip() and encode.is_drawn(
        found.answers[0][1], sharp
    )


def test_degradation_says_what_was_done():
    picture = noise(128, 96)
    outcomes = [degrade(picture, 4, random.Random(seed)) for seed in range(12)]
    assert {small.size for small, _ in outcomes} == {(32, 24)}
    assert same(outcomes[0][0], degrade(picture, 4, random.Random(0))[0])
    assert len({str(done) for _, done in outcomes}) > 6
    assert str(Degradation()) == "The image is slightly blurred, slightly noisy and slightly compressed."
    worst = Degradation(blur_px=9, noise=50, jpeg_quality=30)
    assert str(worst) == "The image is heavily blurred, heavily noisy and heavily compressed."


# What all have in common


def test_a_record_gives_the_same_conversation_each_time(encode):
    features, record = nyuv2()
    record = {**record, "caption": "a bed"}
    for task in ("control", "restore", "refine", "text-to-image"):
        values = {**features, "caption": TEXT}
        assert encode(task, values, record, seed=5).ids == encode(task, values, record, seed=5).ids


def test_random_crops_are_alike_in_a_record(encode):
    features = {"image": PICTURE, "pose": PICTURE}
    record = {"image": noise(200, 40), "pose": noise(200, 40)}
    crops = [encode("pose", features, record, random_crop=True, seed=seed).pictures for seed in range(4)]
    assert all(same(*pictures) and pictures[0].size == (128, 32) for pictures in crops)
    assert len({pictures[0].tobytes() for pictures in crops}) > 1


def test_maps_that_are_null_are_not_drawn_from(encode):
    record = {"image": noise(), "caption": "a cat", "depth": None, "pose": None, "keypoints": [[9.0, 9.0, 2.0] * 17]}
    shown = [conversation("control", record, encode.processor, random.Random(seed))[1][0] for seed in range(8)]
    assert all(np.asarray(picture).max() > 0 and not same(picture, noise()) for picture in shown)
    for keypoints in (None, [[float("nan"), 9.0, 2.0] * 17], [[900.0, 9.0, 2.0] * 17]):
        with pytest.raises(RecordError, match=r"keypoints|none of"):
            conversation("control", record | {"keypoints": keypoints}, encode.processor, random.Random(0))


def test_pictures_in_16_bits_keep_their_light(encode):
    gray = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    record = {"image": Image.fromarray(gray), "caption": "a cat"}
    (picture,) = conversation("caption", record, encode.processor, random.Random(0))[1]
    assert (np.asarray(picture)[..., 0] == gray // 256).all()


def test_empty_system_messages_are_passed_over(encode):
    said = [{"from": "system", "value": ""}, {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    assert conversation("chat", {"conversations": said}, encode.processor, random.Random(0))[0] == ["Hello", "Hi"]
    for content in (["Hello"], [{"text": "Hello"}], [{"type": "video", "video": "1.mp4"}]):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Hi"}]
        with pytest.raises(RecordError, match="accepted are items"):
            conversation("chat", {"messages": messages}, encode.processor, random.Random(0))


def test_wrong_columns_are_named():
    with pytest.raises(ColumnError, match="'caption': the dataset has no 'caption', it has image, text"):
        check_columns("text-to-image", ["image", "text"])
    with pytest.raises(ColumnError, match="'caption': the dataset has no 'txt'"):
        check_columns("text-to-image", ["image", "text"], {"caption": "txt"})
    with pytest.raises(ColumnError, match=r"columns \['text'\]: task 'text-to-image' has image, caption"):
        check_columns("text-to-image", ["image", "text"], {"text": "caption"})
    with pytest.raises(ColumnError, match="'source_img'"):
        check_columns("edit", ["images", "text"])
    with pytest.raises(ColumnError, match="'control' needs one of depth, normal"):
        check_columns("control", ["image", "caption"])
    with pytest.raises(ColumnError, match="'reference': the dataset has no 'reference'"):
        check_columns("panel", ["image", "caption"], options={"condition": "subject"})
    check_columns("panel", ["image", "caption"], options={"condition": "canny"})
    check_columns("control", ["image", "caption", "keypoints"], options={"condition": ["pose"]})


def test_unknown_tasks_and_options_are_named(encode):
    with pytest.raises(ValueError, match="task 'paint': accepted are text-to-image, chat"):
        check_columns("paint", [])
    with pytest.raises(ValueError, match="task 'paint'"):
        conversation("paint", {}, encode.processor, random.Random(0))
    with pytest.raises(ValueError, match=r"options \['flip'\]: task 'depth' has metres_per_unit, range_m, linear"):
        check_columns("depth", ["image", "depth"], options={"flip": "z"})
    with pytest.raises(ValueError, match="condition 'canny': accepted for 'control' are depth"):
        check_columns("control", ["image", "caption"], options={"condition": "canny"})
    for crop in ([1, 2], {"picture": [0, 0, 8, 8]}, {"image": [0, 0, 8]}, {"image": [8, 0, 8, 8]}):
        with pytest.raises(ValueError, match=r"crop .* accepted is \{column: "):
            check_columns("caption", ["image", "caption"], options={"crop": crop})
    features, record = nyuv2()
    for task, options in (("normal", {"flip": "w"}), ("depth", {"range_m": [0, 5]}), ("refine", {"share": [0.5, 2]})):
        with pytest.raises(ValueError, match="accepted") as raised:
            encode(task, features, record, options=options)
        assert not isinstance(raised.value, RecordError)


def test_broken_records_are_told_from_wrong_columns(encode):
    features = {"image": PICTURE, "caption": TEXT}
    for record, reason in (
        ({"image": noise(), "caption": "  "}, "caption is empty"),
        ({"image": noise(), "caption": None}, "caption is empty"),
        ({"image": noise(), "caption": f"a {IMAGE}"}, "stands for a picture"),
        ({"image": None, "caption": "a cat"}, "image is empty"),
        ({"image": noise(6400, 16), "caption": "a cat"}, "100 to 1"),
    ):
        with pytest.raises(RecordError, match=reason):
            encode("text-to-image", features, record)
    undecoded = {"image": ImageFeature(decode=False), "caption": TEXT}
    with pytest.raises(RecordError, match=r"image: .*damaged"):
        encode("text-to-image", undecoded, {"image": {"bytes": b"nonsense", "path": None}, "caption": "a cat"})
    swapped = {"image": "caption", "caption": "image"}
    with pytest.raises(ColumnError, match="'caption' holds PngImageFile: accepted is text"):
        encode("caption", features, {"image": noise(), "caption": "a cat"}, swapped)
    with pytest.raises(ColumnError, match="no 'promt' in prompt"):
        record = {"image": noise(), "json": {"prompt": "a cat"}}
        encode("caption", {"image": PICTURE, "json": {"prompt": TEXT}}, record, {"caption": "json.promt"})
    with pytest.raises(ColumnError, match="conversations 'Hello': accepted are lists"):
        encode("chat", {"text": TEXT}, {"text": "Hello"}, {"conversations": "text"})
    with pytest.raises(ColumnError, match=r"'depth' holds numbers of shape \(3, 4, 5, 6\): accepted are 2 axes"):
        conversation("depth", {"image": noise(), "depth": np.ones((3, 4, 5, 6))}, encode.processor, random.Random(0))
    with pytest.raises(ColumnError, match="'image' holds int: accepted is a picture"):
        encode("caption", {"image": WHOLE, "caption": TEXT}, {"image": 3, "caption": "a cat"})


def test_drawn_boxes_are_found_again(encode):
    rng = random.Random(0)
    for seed in range(20):
        picture = noise(160, 120, seed)
        left, top = rng.randrange(80), rng.randrange(60)
        box = left, top, rng.randrange(left + 24, 160), rng.randrange(top + 24, 120)
        assert encode.processor.image_processor.find_box(drawing.draw_box(picture, box), picture) == box


PUBLIC_COLUMNS = {
    "hf://datasets/jackyhate/text-to-image-2M": ["jpg", "json", "__key__", "__url__"],
    "teknium/OpenHermes-2.5": ["conversations", "source", "category"],
    "hf://datasets/YanweiLi/MGM-Instruction": ["id", "image", "conversations"],
    "HuggingFaceH4/llava-instruct-mix-vsft": ["messages", "images"],
    "osunlp/MagicBrush": ["img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"],
    "hf://datasets/AILab-CVC/SEED-Data-Edit-Part2-3": ["source_image", "edit_image_1", "instruction_1"],
    "tanganke/nyuv2": ["image", "segmentation", "depth", "normal", "noise"],
    "hero-nq1310/coco-kpt17": ["image", "annotations"],
    "limingcv/Captioned_ADE20K": ["image", "detailed_prompt", "control_seg", "seg_map", "image_path", "prompt"],
    "jxu124/refcoco": ["sentences", "image_path", "bbox", "captions"],
    "hf://datasets/limingcv/MultiGen-20M_depth": ["image", "control_depth", "text"],
    "WeiChow/mscoco_keypoint": ["id", "caption", "image", "cond"],
    "Yuanshi/Subjects200K": ["image", "collection", "quality_assessment", "description"],
    "data/virtual_kitti_2.jsonl": ["image", "depth"],
    "data/sintel.jsonl": ["image", "depth"],
    "data/scannet_normals.jsonl": ["image", "normal"],
    "data/normals_captioned.jsonl": ["image", "normal", "caption"],
}
RECIPES = Path(training.__file__).parent / "recipes"


@pytest.mark.parametrize("recipe", ["lumina-mgpt", "lumina-mgpt-2", "pure"])
def test_recipes_name_columns_that_their_sources_have(recipe):
    for path in (RECIPES / recipe).glob("*.yaml"):
        values = read_recipe(path)
        for mixture in (Mixture(**values["mixture"]), Mixture(**values["evaluation"])):
            for source in mixture.sources:
                found = next(columns for place, columns in PUBLIC_COLUMNS.items() if source.path.startswith(place))
                check_columns(source.task, found, source.columns, source.options)


def test_every_task_but_completion_has_an_adapter(encode):
    assert ADAPTERS.keys() - encode.processor.tasks.keys() == {"chat", "image-to-text"}
    assert encode.processor.tasks.keys() - ADAPTERS.keys() == {"complete"}

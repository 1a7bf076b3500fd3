"""Tabletop: reproducible and disjoint records; pictures, maps and words that agree with the scenes they are of."""

import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lumina_mgpt.training import tabletop, tabletop_language
from modeling_lumina_mgpt.training.tabletop import (
    COLUMNS,
    FAR,
    HELD_OUT,
    NUMBER_WORDS,
    SPLITS,
    TabletopSource,
    describe,
    parse,
    render,
    sample_scene,
    split_of,
    split_of_sentence,
    tabletop_texts,
    to_image,
)
from modeling_lumina_mgpt.training.tabletop_language import QUESTIONS, referring_phrases
from modeling_lumina_mgpt.training.tabletop_scenes import joints_px, project

SIZES = [(48, 32), (32, 48), (40, 40)]


def scenes(split: str = "any", count: int = 12, size: tuple[int, int] = (48, 48)) -> list[tabletop.Scene]:
    return [sample_scene(random.Random(i), *size, split=split) for i in range(count)]


def plans(task: str, count: int, split: str = "train", seed: int = 0) -> list[tabletop.Plan]:
    source = TabletopSource(task, [(48, 48)], seed, split, count)
    return [source.plan(i) for i in range(count)]


def test_pictures_are_those_that_the_checkpoint_was_trained_on():
    """The judge and the default checkpoint know these colors, lights and solids."""
    scene = sample_scene(random.Random(2024), 32, 32, 4, "any")
    golden = np.asarray(Image.open(Path(__file__).parent / "golden" / "tabletop_scene.png"), int)
    assert np.abs(np.asarray(to_image(render([scene], 32, 32).rgb[0]), int) - golden).max() <= 1


@pytest.mark.parametrize("task", COLUMNS)
def test_a_record_depends_on_its_index_alone(task):
    source = TabletopSource(task, SIZES, 3, "train", 5)
    together, (alone,) = source.fetch(range(5)), source.fetch([3])
    assert len(source) == 5 and all(set(record) | {"pose"} == {*source.column_names, "pose"} for record in together)
    assert _comparable(together[3]) == _comparable(alone)
    assert TabletopSource(task, SIZES, 4, "train", 5).plan(3) != source.plan(3)
    assert task == "chat" or all(picture.size in SIZES for r in together for picture in _pictures(r))


def _pictures(record) -> list[Image.Image]:
    values = [v for value in record.values() for v in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, Image.Image)]


def _comparable(record) -> tuple:
    words = {k: v for k, v in record.items() if not isinstance(v, Image.Image) and k != "images"}
    return words, [picture.tobytes() for picture in _pictures(record)]


@pytest.mark.parametrize("task", COLUMNS)
def test_splits_are_disjoint(task):
    for split in SPLITS:
        for plan in plans(task, 20, split):
            assert all(split_of(scene) == split for scene in plan.scenes[: None if split == "train" else 1])
            assert split == "test" or not HELD_OUT & {o.combination for scene in plan.scenes for o in scene.objects}
            sentences = [plan.words["caption"]] if "caption" in plan.words else []
            sentences += [m["value"] for m in plan.words["conversations"][::2]] if task == "chat" else []
            assert all(split_of_sentence(sentence) == split for sentence in sentences)


def test_pictures_to_restore_are_square():
    """Others are cut, while their captions name what was there."""
    assert TabletopSource("restore", SIZES, 0, "train", 1).sizes == [(40, 40)]


def test_an_answer_is_true_of_the_scene():
    answers: dict[str, Counter] = {kind: Counter() for kind in QUESTIONS}
    for plan in plans("vqa", 150):
        (kind,), question, answer = plan.kinds, plan.words["question"], plan.words["answer"]
        answers[kind][answer] += 1
        assert answer == _answer(plan.scenes[0].objects, question), (question, plan.scenes[0])
    assert min(counts.total() for counts in answers.values()) > 8
    for kind, possible in tabletop_language.ANSWERS.items():
        assert {*answers[kind]} <= {*possible}
        assert max(answers[kind].values()) < (0.3 + 1 / len(possible)) * answers[kind].total()


def _meant(objects, phrase: str) -> list:
    words = phrase.split()
    known = "object", "the", "a", "an"
    return [o for o in objects if all(w in (o.shape, o.color, o.size, o.surface, *known) for w in words)]


def _answer(objects, question: str) -> str:
    """By reading the question, which is not how it was made."""
    if match := re.fullmatch(r"How many (.*?)s? are there\?", question):
        return NUMBER_WORDS[len(_meant(objects, match[1]))]
    if match := re.fullmatch(r"What (color|shape|surface) (?:is|does) (.*?)(?: have)?\?", question):
        (one,) = _meant(objects, match[2])
        return getattr(one, match[1])
    if match := re.fullmatch(r"Is there (.*)\?", question):
        return "yes" if _meant(objects, match[1]) else "no"
    if match := re.fullmatch(r"Are there (more|as many) (.*)s (?:than|as) (.*)s\?", question):
        a, b = (len(_meant(objects, match[i])) for i in (2, 3))
        return "yes" if (a > b if match[1] == "more" else a == b) else "no"
    if match := re.fullmatch(r"Which is (larger|smaller), (.*) or (.*)\?", question):
        (a,), (b,) = (_meant(objects, match[i]) for i in (2, 3))
        return match[2] if (a.radius > b.radius) == (match[1] == "larger") else match[3]
    relation, phrase = re.findall(r"What is (left of|right of|in front of|behind) (.*)\?", question)[0]
    (one,) = _meant(objects, phrase)
    found = [o for o in objects if o is not one and _is(o, relation, one)]
    assert len(found) < 2
    article = "an" if found and found[0].color == "orange" else "a"
    return f"{article} {found[0].color} {found[0].shape}" if found else "nothing"


def _is(a, word: str, b) -> bool:
    return {"left of": a.x < b.x, "right of": a.x > b.x, "in front of": a.z < b.z, "behind": a.z > b.z}[word]


def test_a_phrase_singles_out_one_object():
    for scene in scenes(count=60):
        for index, target in enumerate(scene.objects):
            for phrase in referring_phrases(scene, index):
                assert _singled_out(scene.objects, phrase) is target, phrase


def _singled_out(objects, phrase: str):
    ends = {"on the left": "leftmost", "on the right": "rightmost", "in front": "nearest", "in the back": "farthest"}
    for end, word in ends.items():
        if phrase.endswith(end):
            phrase = phrase.removesuffix(" " + end).replace("the ", f"the {word} ")
    if match := re.fullmatch(r"the (leftmost|rightmost|nearest|farthest) (.*)", phrase):
        axis, sign = {"leftmost": ("x", 1), "rightmost": ("x", -1), "nearest": ("z", 1), "farthest": ("z", -1)}[
            match[1]
        ]
        return min(_meant(objects, match[2]), key=lambda o: sign * getattr(o, axis))
    if match := re.fullmatch(r"(.*) (left of|right of|in front of|behind) (.*)", phrase):
        (anchor,) = _meant(objects, match[3])
        found = [o for o in _meant(objects, match[1]) if o is not anchor and _is(o, match[2], anchor)]
    else:
        found = _meant(objects, phrase)
    (one,) = found
    return one


def test_the_box_is_that_of_the_object_that_is_meant():
    source = TabletopSource("detection", SIZES, 0, "test", 8)
    for record, plan in zip(source.fetch(range(8)), map(source.plan, range(8)), strict=True):
        assert _singled_out(plan.scenes[0].objects, record["phrase"]) is plan.scenes[0].objects[plan.target]
        segmentation = render(plan.scenes, *plan.size, maps=True).segmentation[0]
        rows, columns = np.nonzero(segmentation.numpy() == plan.target + 1)
        assert record["box"] == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_an_edit_does_what_it_says_and_nothing_else():
    kinds: Counter[str] = Counter()
    for plan in plans("edit", 120):
        assert len(plan.scenes) == len(plan.kinds) + 1 == len(plan.words["instructions"]) + 1
        for before, after, kind, words in zip(
            plan.scenes, plan.scenes[1:], plan.kinds, plan.words["instructions"], strict=False
        ):
            kinds[kind] += 1
            lost, won = ({*a.objects} - {*b.objects} for a, b in ((before, after), (after, before)))
            assert (before.table, before.wall) == (after.table, after.wall)
            assert (len(lost), len(won)) == {"remove": (1, 0), "add": (0, 1), "swap": (2, 2)}.get(kind, (1, 1)), words
            if kind in ("recolor", "resize", "move"):
                (old,), (new,) = lost, won
                stays = {"recolor": {"color"}, "resize": {"size"}, "move": {"x", "z"}}[kind]
                assert {name for name in vars(old) if vars(old)[name] != vars(new)[name]} <= stays
                assert kind != "recolor" or new.color in words
            if kind == "add":
                (new,) = won
                assert new.surface == "matte" or new.surface in words
            if kind == "swap":
                assert {(o.x, o.z) for o in lost} == {(o.x, o.z) for o in won}
    assert kinds.keys() == tabletop_language.EDITS.keys() and kinds.total() > 150
    assert max(kinds.values()) < 2 * min(kinds.values())


def test_pictures_of_an_edit_differ_only_where_the_edit_is():
    source = TabletopSource("edit", [(64, 64)], 1, "train", 14)
    for i, record in enumerate(source.fetch(range(14))):
        plan, pictures = source.plan(i), [np.asarray(picture, int) for picture in record["images"]]
        for before, after, old, new in zip(plan.scenes, plan.scenes[1:], pictures, pictures[1:], strict=False):
            changed = np.abs(new - old).max(-1) > 3
            assert changed.any()
            for o in {*before.objects} ^ {*after.objects}:
                left, top, right, bottom = _reach(o)
                changed[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = False
            assert not changed.any(), plan.words


def _reach(o, side_px: int = 64) -> tuple[int, int, int, int]:
    """Box (pixels) around an object and the darker ground where it stands."""
    ends = [(o.x + dx * o.radius, o.z + dz * o.radius) for dx in (-1, 1) for dz in (-1, 1)]
    us, vs = zip(*(project(x, y, z, side_px, side_px) for x, z in ends for y in (0, o.height)), strict=True)
    return math.floor(min(us)) - 1, math.floor(min(vs)) - 1, math.ceil(max(us)) + 1, math.ceil(max(vs)) + 1


def test_a_long_caption_is_true():
    for scene in scenes(count=40):
        text = tabletop_language.describe_at_length(scene, random.Random(0), split_of_sentence("a cube"))
        assert (f"{NUMBER_WORDS[len(scene.objects)]} objects" in text) == (len(scene.objects) > 1)
        assert f"{scene.table}" in text and f"The wall is {('white', 'gray')[scene.wall]}." in text
        for before in re.findall(r"(?:of|behind) (the \w+ (?!table)\w+)\.", text):
            assert len(_meant(scene.objects, before)) == 1, text
        named = re.findall(r"(?i)\ban? (small|large) (\w+) (?:(metal|wooden) )?(\w+)", text)
        assert Counter((s, c, z, m or "matte") for z, c, m, s in named) == Counter(
            (*o.combination, o.surface) for o in scene.objects
        )


@pytest.mark.parametrize("size_px", [64, 96])
def test_surfaces_look_different(size_px):
    for scene in scenes(count=6, size=(size_px, size_px)):
        made = [replace(scene, objects=tuple(replace(o, surface=s) for o in scene.objects)) for s in tabletop.SURFACES]
        pictures = (255 * render(made, size_px, size_px).rgb).round()
        inside = render(made[:1], size_px, size_px, maps=True).segmentation[0] > 0
        for a, b in ((0, 1), (0, 2), (1, 2)):
            differs = (pictures[a] - pictures[b]).abs().amax(-1) > 24
            assert differs[inside].float().mean() > 0.25 and not differs[~inside].float().mean() > 0.02


def test_an_object_looks_the_same_wherever_it_stands():
    """In steps of a patch: so a VQ model's codes of it are those of all its places."""
    scene = next(s for s in scenes(count=40, size=(64, 64)) if len(s.objects) == 1)
    (one,) = scene.objects
    columns = [
        replace(one, x=x) for x in (-0.5 * tabletop_language.SPACING["x"], 0.5 * tabletop_language.SPACING["x"])
    ]
    left, right = render([replace(scene, objects=(o,)) for o in columns], 64, 64).rgb
    assert torch.allclose(left[:, :-8], right[:, 8:], atol=1e-4)


def test_dialogue_is_right():
    found = Counter()
    for plan in plans("chat", 300):
        said = [message["value"] for message in plan.words["conversations"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            if match := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question):
                found[match[2]] += 1
                assert int(answer) == int(match[1]) + int(match[3]) * (1 if match[2] == "+" else -1)
            if match := re.fullmatch(r"Which is (\w+)\? (\S+) or (\S+)", question):
                found[match[1]] += 1
                assert answer == (min if match[1] == "smaller" else max)(match[2], match[3], key=float)
            if match := re.fullmatch(r"Is (\S+) less than (\S+)\?", question):
                found[answer] += 1
                assert answer == ("Yes." if float(match[1]) < float(match[2]) else "No.")
    assert found.keys() == {*"+-", "bigger", "larger", "smaller", "Yes.", "No."} and min(found.values()) >= 5


def test_joints_lie_on_the_mannequin():
    batch = [plan.scenes[0] for plan in plans("pose", 24)]
    rendering = render(batch, 48, 48, maps=True)
    seen, poses = 0, {scene.mannequin.pose for scene in batch}
    for row, scene in enumerate(batch):
        joints = joints_px(scene, 48, 48)
        assert joints.shape == (14, 2) and (joints >= 0).all() and (joints < 48).all()
        for x, y in joints.astype(int):  # an object may hide it, the background cannot
            assert rendering.segmentation[row, y, x] > 0
            seen += int(rendering.segmentation[row, y, x]) == len(scene.objects) + 1
        assert len(rendering.boxes(row)) == len(scene.objects) + 1
    assert seen > 0.7 * 14 * len(batch) and len(poses) > 5


def test_only_tasks_that_show_shape_have_a_mannequin():
    for task in COLUMNS:
        has = [any(scene.mannequin for scene in plan.scenes) for plan in plans(task, 12)]
        if task == "pose":
            assert all(has)
        elif task in ("depth", "normal", "segmentation", "control", "pair", "panel"):
            assert any(has) and not all(has)
        else:
            assert not any(has)


def test_a_tokenizer_is_trained_on_the_words_of_every_task():
    texts = tabletop_texts(2)
    for task in COLUMNS:
        for value in TabletopSource(task, [(64, 64)], 0, "train", 2).plan(1).words.values():
            said = value if isinstance(value, list) else [value]
            assert {v["value"] if isinstance(v, dict) else v for v in said} <= {*texts}


@pytest.mark.parametrize("width_px, height_px", [(64, 64), (96, 32), (32, 96)])
def test_objects_are_whole_in_the_frame_and_visible(width_px, height_px):
    batch = scenes(size=(width_px, height_px))
    rendering = render(batch, width_px, height_px, maps=True)
    assert rendering.rgb.shape == (len(batch), height_px, width_px, 3)
    assert rendering.rgb.min() >= 0 and rendering.rgb.max() <= 1
    for row, scene in enumerate(batch):
        boxes = rendering.boxes(row)
        assert len(boxes) == len(scene.objects)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width_px and 0 <= top < bottom <= height_px
            assert (right - left) * (bottom - top) >= 9


def test_the_maps_agree():
    batch = scenes(count=8)
    rendering = render(batch, 48, 48, maps=True)
    assert torch.allclose(rendering.normals.norm(dim=-1), torch.ones(8, 48, 48), atol=1e-5)
    assert rendering.depth.min() > 0 and rendering.depth.max() <= FAR
    for row, scene in enumerate(batch):
        segmentation = rendering.segmentation[row]
        assert set(segmentation.unique().tolist()) == set(range(len(scene.objects) + 1))
        for index, (left, top, right, bottom) in enumerate(rendering.boxes(row), 1):
            outside = segmentation.clone()
            outside[top:bottom, left:right] = 0
            assert not (outside == index).any()


def test_a_nearer_object_has_less_depth():
    for scene, depth, segmentation in zip(scenes(), *_maps(scenes()), strict=True):
        nearest = [depth[segmentation == i].min().item() for i in range(1, len(scene.objects) + 1)]
        for a, near_a in zip(scene.objects, nearest, strict=True):
            for b, near_b in zip(scene.objects, nearest, strict=True):
                assert a.z + 1.5 > b.z or near_a < near_b


def _maps(batch):
    rendering = render(batch, 48, 48, maps=True)
    return rendering.depth, rendering.segmentation


def test_a_sentence_commits_to_what_the_scene_holds():
    rng = random.Random(0)
    for scene in scenes(count=60):
        caption = describe(scene, rng, split="any")
        assert sum(count for count, *_ in caption.mentions) == len(scene.objects)
        for count, shape, color, size in caption.mentions:
            named = [
                o for o in scene.objects if shape == o.shape and color in (None, o.color) and size in (None, o.size)
            ]
            assert len(named) >= count
            assert all(word is None or word in caption.text for word in (shape, color, size))
        if caption.relation:
            first, word, second = caption.relation
            a, b = (_named(scene, caption.mentions[i]) for i in (first, second))
            assert {"left of": a.x < b.x, "right of": a.x > b.x, "in front of": a.z < b.z, "behind": a.z > b.z}[word]


def _named(scene, mention):
    _, shape, color, _ = mention
    return next(o for o in scene.objects if o.shape == shape and color in (None, o.color))


def test_a_sentence_is_read_back():
    named: Counter[bool] = Counter()
    for scene in scenes(count=300):
        for seed in range(4):
            caption = describe(scene, random.Random(f"{seed}/{scene}"), split="any")
            assert parse(caption.text) == caption
            assert all(s in [o.surface for o in scene.objects] for s in caption.surfaces)
            named[bool(caption.surfaces)] += 1
    assert 0.1 < named[True] / named.total() < 0.3
    assert parse(" Two large red cubes, a cone, and an object ").mentions == (
        (2, "cube", "red", "large"),
        (1, "cone", None, None),
        (1, None, None, None),
    )


@pytest.mark.parametrize(
    "sentence",
    ["", "a dog", "a red cubes", "two cube", "five cubes", "a cube and", "a cube behind", "cube", "a red small cube",
     "two cubes behind a cone", "a cube behind a cone and a sphere", "three cubes and two cones"],
)  # fmt: skip
def test_what_is_no_sentence_of_this_world_is_refused(sentence):
    with pytest.raises(ValueError, match=f"'{sentence}' is no sentence"):
        parse(sentence)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="'dev'"):
        sample_scene(random.Random(0), 48, 48, split="dev")
    with pytest.raises(ValueError, match="5"):
        sample_scene(random.Random(0), 48, 48, num_objects=5)
    with pytest.raises(ValueError, match="'dance'"):
        TabletopSource("dance", SIZES, 0, "train", 1)
    with pytest.raises(ValueError, match="'any'"):
        TabletopSource("vqa", SIZES, 0, "any", 1)
    with pytest.raises(ValueError, match="sizes"):
        TabletopSource("vqa", [], 0, "train", 1)
    with pytest.raises(IndexError, match="7 of 1"):
        TabletopSource("vqa", SIZES, 0, "train", 1).fetch([7])

"""Tabletop scenes: reproducible, inside the frame, and described by maps and sentences that agree with them."""

import random

import numpy as np
import pytest
import torch

from modeling_lumina_mgpt.training import tabletop
from modeling_lumina_mgpt.training.tabletop import (
    FAR,
    describe,
    parse,
    render,
    sample_scene,
    tabletop_records,
)

SIZES = [(48, 32), (32, 48), (40, 40)]


def scenes(split: str = "any", count: int = 12, size: tuple[int, int] = (48, 48)) -> list[tabletop.Scene]:
    return [sample_scene(random.Random(i), *size, split=split) for i in range(count)]


def test_a_record_depends_on_its_index_alone():
    together = list(tabletop_records(range(6), SIZES, seed=3))
    alone = next(tabletop_records([4], SIZES, seed=3))
    assert together[4]["caption"] == alone["caption"] and together[4]["scene"] == alone["scene"]
    for key in ("image", *tabletop.MAPS):
        assert np.array_equal(np.asarray(together[4][key]), np.asarray(alone[key]))
    assert next(tabletop_records([4], SIZES, seed=4))["scene"] != alone["scene"]


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
            assert 0 < left < right < width_px and 0 < top < bottom < height_px
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
        assert not rendering.outline[row][segmentation == 0].all()


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
    for scene in scenes(count=300):
        for seed in range(4):
            caption = describe(scene, random.Random(seed), split="any")
            assert parse(caption.text) == caption
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

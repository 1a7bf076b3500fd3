"""The judge reads true renders, and fails pictures that show something else."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_lumina_mgpt.pipelines.cli import app
from modeling_lumina_mgpt.training import evaluate as scores
from modeling_lumina_mgpt.training.tabletop import (
    HELD_OUT,
    Caption,
    SceneObject,
    render,
    sample_scene,
    split_of,
    split_of_sentence,
    to_image,
)


def picture(*objects: tuple[str, str, float, float]) -> Image.Image:
    """A render of small objects (shape, color, x, z)."""
    solids = tuple(SceneObject(shape, color, "small", x, z) for shape, color, x, z in objects)
    scene = sample_scene(random.Random(0), 64, 64)
    scene = replace(scene, objects=solids, table="wooden", wall=1)
    return to_image(render([scene], 64, 64).rgb[0])


def seen(image: Image.Image) -> list[tuple[str, str]]:
    return [(d.shape, d.color) for d in scores.judge(image)]


@pytest.mark.parametrize("color", scores.COLORS)
def test_a_color_is_named_under_shading(color):
    regions, _ = scores.find_regions(picture(("sphere", color, -1.2, 7.0), ("cube", color, 1.2, 7.0)))
    assert [name for name, _ in regions] == [color, color]


@pytest.mark.parametrize("shape", scores.SHAPES)
def test_a_shape_is_named(shape):
    assert seen(picture((shape, "blue", -1.2, 6.5), ("sphere", "red", 1.4, 7.5))) == [
        (shape, "blue"),
        ("sphere", "red"),
    ]


def test_touching_objects_of_one_color_are_told_apart():
    assert seen(picture(("sphere", "green", -0.5, 6.0), ("sphere", "green", 0.8, 7.4))) == [("sphere", "green")] * 2


def test_a_gray_picture_has_no_object():
    assert scores.judge(Image.new("RGB", (80, 48), (150, 150, 150))) == []


def test_a_wrong_picture_fails():
    image = picture(("cube", "red", -1.2, 6.0), ("cone", "cyan", 1.2, 8.0))
    detections = scores.judge(image)
    cube, cone = (1, "cube", "red", None), (1, "cone", "cyan", None)
    assert scores.passes(Caption("", (cube,)), detections)
    assert scores.passes(Caption("", (cube, cone)), detections)
    assert not scores.passes(Caption("", ((1, "sphere", None, None),)), detections)
    assert not scores.passes(Caption("", ((1, "cube", "cyan", None), (1, "cone", "red", None))), detections)
    assert not scores.passes(Caption("", ((2, "cube", None, None),)), detections)
    for true, false in (("left of", "right of"), ("in front of", "behind")):
        assert scores.passes(Caption("", (cube, cone), (0, true, 1)), detections)
        assert not scores.passes(Caption("", (cube, cone), (0, false, 1)), detections)


def test_counting_wants_the_exact_number_of_what_is_named():
    detections = scores.judge(
        picture(("cube", "red", -1.5, 7.0), ("cube", "blue", 0.0, 8.0), ("cone", "red", 1.5, 7.0))
    )
    assert scores.passes(Caption("", ((2, "cube", None, None),)), detections)
    assert not scores.passes(Caption("", ((3, "cube", None, None),)), detections)


def test_a_failed_picture_is_graded_by_what_it_holds():
    def grade(mentions, relation, *objects):
        found = [
            scores.Detection(shape, color, (0, 0, 1, 1), (x, 0.0), 0.0) for x, (shape, color) in enumerate(objects)
        ]
        return scores.grade(Caption("", mentions, relation), found)

    cube, cone, cubes = (1, "cube", "red", None), (1, "cone", "blue", None), (2, "cube", None, None)
    red_cube, red_cone, blue_cone = ("cube", "red"), ("cone", "red"), ("cone", "blue")
    related = [grade((cube, cone), (0, "left of", 1), *found) for found in ((blue_cone, red_cube), (red_cube,), ())]
    assert related == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0]
    pair = [(red_cube, blue_cone), (red_cube, red_cone), (red_cube,), (red_cone,), ()]
    assert [grade((cube, cone), None, *found) for found in pair] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [grade((cubes,), None, *[red_cube] * n) for n in range(4)] == [0.0, 0.5, 1.0, pytest.approx(2 / 3)]


def test_examples_are_held_out_reproducible_and_of_their_category():
    examples = scores.held_out_examples(2, 64, 64)
    assert [e.category for e in examples] == [c for c in scores.CATEGORIES for _ in range(2)]
    assert all(scores.category_of(e.caption) == e.category for e in examples)
    assert all(split_of_sentence(e.caption.text) == "test" for e in examples)
    assert [e for e in scores.held_out_examples(3, 64, 64) if e in examples] == examples
    new = [any(o.combination in HELD_OUT for o in e.scene.objects) for e in examples]
    assert new == [False, True] * len(scores.CATEGORIES)
    chosen_by = scores.held_out_examples(2, 64, 64, split="validation")
    assert (
        {split_of(e.scene) for e in chosen_by}
        == {split_of_sentence(e.caption.text) for e in chosen_by}
        == {"validation"}
    )
    with pytest.raises(ValueError, match="split 'train': accepted are test, validation"):
        scores.held_out_examples(1, 64, 64, split="train")


def test_true_renders_pass_and_shuffled_ones_fail(tmp_path):
    examples = scores.held_out_examples(4, 64, 64)
    rendered = {(e.caption.text, e.seed): to_image(render([e.scene], 64, 64).rgb[0]) for e in examples}

    def draw(sentences, seeds):
        return [rendered[key] for key in zip(sentences, seeds, strict=True)]

    def lacks(scene, caption):
        """Whether the scene has none of something that the sentence names, or another number of it than it counts."""
        for number, shape, color, _ in caption.mentions:
            found = sum(shape in (None, o.shape) and color in (None, o.color) for o in scene.objects)
            if not found or (number > 1 and found != number):
                return True
        return False

    def draw_shuffled(sentences, seeds):
        """Of each sentence, the render of another one that does not hold what it names."""
        captions = [{e.caption.text: e.caption for e in examples}[sentence] for sentence in sentences]
        return [next(rendered[e.caption.text, e.seed] for e in examples if lacks(e.scene, c)) for c in captions]

    report, images = scores.evaluate(draw, 4, 64, 64)
    assert report["scores"]["overall"]["rate"] >= 0.95
    assert report["validation"]["scores"] == report["scores"]
    assert json.loads(json.dumps(report))["scores"]["overall"]["of"] == 24
    assert report["scores"]["new combinations"]["of"] == 12
    assert scores.contact_sheet(report["pictures"], images).width > 8 * 64
    shuffled, _ = scores.evaluate(draw_shuffled, 4, 64, 64)
    assert shuffled["scores"]["overall"]["rate"] == 0


def test_a_judge_that_fails_validation_says_so():
    table = {"single_object": {"rate": 0.5, "of": 2, "interval": scores.wilson(1, 2)}}
    report = {"scores": table, "validation": {"valid": False, "scores": table, "confusion": {}}}
    assert "WARNING" in scores.format_report(report)


def test_the_command_scores_the_better_one_of_several(tiny_folder, tmp_path, monkeypatch):
    def brightness(image):
        return [scores.Detection("cube", "red", (0, 0, 1, 1), (0.0, 0.0), float(np.asarray(image).mean()))]

    monkeypatch.setattr(scores, "judge", brightness)
    monkeypatch.setattr(scores, "grade", lambda caption, detections: detections[0].ground_px)
    reports = []
    for best_of in ("1", "2"):
        folder = tmp_path / best_of
        options = ["--num-per-category", "1", "--best-of", best_of, "--output-dir", str(folder), "--size", "48x32"]
        done = CliRunner().invoke(app, ["evaluate", *options, "--model", str(tiny_folder)])
        assert done.exit_code == 0 and "color_attribution" in done.stdout, done.output
        assert Image.open(folder / "contact_sheet.png").width > 8 * 48
        reports.append(json.loads((folder / "scores.json").read_text()))
    one, two = ([picture["seen"][0]["ground_px"] for picture in report["pictures"]] for report in reports)
    assert all(b >= a for a, b in zip(one, two, strict=True)) and one != two
    assert [len({picture["category"] for picture in report["pictures"]}) for report in reports] == [6, 6]
    assert [(r["best_of"], r["width_px"], r["height_px"], r["split"]) for r in reports] == [
        (n, 48, 32, "test") for n in (1, 2)
    ]

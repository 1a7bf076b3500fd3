"""The scoreboard measures what it says: the truth scores best, and each kind of error costs what it should."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training import metrics, scoreboard, trials
from modeling_lumina_mgpt.training.card import HEADLINES, write_card
from modeling_lumina_mgpt.training.evaluate import Detection, true_pictures
from modeling_lumina_mgpt.training.tabletop import TabletopSource
from modeling_lumina_mgpt.training.tabletop_scenes import joints_px
from modeling_lumina_mgpt.training.trials import Board

SIZE = (64, 64)


def source(task: str, num_records: int = 40) -> TabletopSource:
    return TabletopSource(task, [SIZE], 0, "test", num_records)


def value(values: list[metrics.Values], name: str) -> float:
    return metrics.interval([v[name] for v in values if name in v])["value"]


def detections(state: metrics.State) -> list[Detection]:
    """What a perfect judge sees."""
    return [Detection(o.shape, o.color, box, (0.0, 0.0), 0.0) for o, box in state.boxes.items()]


def test_an_interval_is_of_cases_and_holds_the_score():
    scores = metrics.interval([(1, 2), (0, 0), (3, 4), 1.0])
    assert scores["value"] == 5 / 7 and scores["of"] == 3 and 0.5 <= scores["low"] < 5 / 7 < scores["high"] <= 1
    assert metrics.interval([(1, 2), (3, 4), 1.0]) == scores
    assert metrics.interval([(0, 0)])["value"] is None and metrics.interval([])["of"] == 0


def test_a_picture_is_most_like_itself():
    picture = source("refine").fetch([0])[0]["image"]
    shifted = Image.fromarray(np.roll(np.asarray(picture), 4, 1))
    same, other = metrics.likeness(picture, picture), metrics.likeness(picture, shifted)
    assert same == {"PSNR": metrics.MAX_PSNR_DB, "SSIM": pytest.approx(1), "GMS": pytest.approx(1)}
    assert all(other[name] < same[name] - 0.02 for name in same)
    half = np.zeros((64, 64), bool)
    half[:, :32] = True
    patched = picture.copy()
    patched.paste("red", (32, 0, 64, 64))
    assert metrics.psnr(picture, patched, half) == metrics.MAX_PSNR_DB > metrics.psnr(picture, patched)


@pytest.mark.parametrize(("task", "best", "rounding"), [("depth", 0, 0), ("normal", 0, 0.05), ("segmentation", 1, 0)])
def test_a_true_map_has_no_error_and_another_one_has(task, best, rounding):
    truth, other = (record[task] for record in source(task).fetch([0, 1]))
    measure = getattr(metrics, task)
    name = next(iter(measure(truth, truth)))
    assert measure(truth, truth)[name] == pytest.approx(best, abs=rounding)
    assert abs(measure(truth, other)[name] - best) > rounding + 0.004


def test_depth_is_in_table_units():
    near, far = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    assert metrics.depths(near).mean() == metrics.NEAR and metrics.depths(far).mean() == metrics.FAR
    assert metrics.depth(near, far) == {"AbsRel": pytest.approx(12.5 / 1.5), "delta1": 0.0}


def test_joints_are_read_from_a_drawn_skeleton():
    poses = source("pose")
    plans, records = [poses.plan(i) for i in range(8)], poses.fetch(range(8))
    joints = [joints_px(plan.scenes[0], *SIZE) for plan in plans]
    scores = [metrics.pose(own, record["pose"]) for own, record in zip(joints, records, strict=True)]
    assert value(scores, "PCK@0.2") > 0.97
    assert value([metrics.pose(own, Image.new("RGB", SIZE)) for own in joints], "PCK@0.2") == 0
    on = [metrics.joints_on_figure(record["pose"], record["image"]) for record in records]
    assert metrics.interval(on)["value"] > 0.8


def test_a_box_is_held_against_the_true_one():
    assert metrics.box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert metrics.box_iou(None, (0, 0, 2, 2)) == 0 == metrics.box_iou((4, 4, 5, 5), (0, 0, 2, 2))
    assert metrics.detection((0, 0, 4, 4), (0, 0, 4, 2)) == {"box IoU": 0.5, "IoU at least 0.5": 1.0}


def test_true_captions_name_every_object_and_lies_are_counted():
    captions = source("caption", 60)
    said = [(plan.scenes[0], plan.words["caption"]) for plan in map(captions.plan, range(60))]
    for name in ("objects, precision", "objects, recall", "attributes, precision"):
        assert value([metrics.caption(*case) for case in said], name) == 1
    scene = next(scene for scene, _ in said if len(scene.objects) == 1)
    color = "red" if scene.objects[0].color == "blue" else "blue"
    wrong = metrics.caption(scene, f"One can see two {color} {scene.objects[0].shape}s.")
    assert wrong["objects, precision"] == (1, 2) and wrong["objects, recall"] == (1, 1)
    assert wrong["attributes, precision"] == (0, 2)
    assert metrics.read_objects("A small red metal cube stands behind the cone.") == [
        {"shape": "cube", "size": "small", "color": "red", "surface": "metal"}
    ]


def test_masks_of_a_true_picture_are_those_of_its_maps():
    records = [record for record in source("control").fetch(range(12)) if "pose" in record]
    for condition in ("depth", "pose"):
        assert np.mean([metrics.condition_iou(condition, r["segmentation"], r["image"]) for r in records]) > 0.8
    ious = [metrics.mask_iou(metrics.raised(r["depth"]), metrics.foreground(r["image"])) for r in records]
    assert np.mean(ious) > 0.75


def test_an_edit_is_done_when_all_else_is_as_it_was(monkeypatch):
    edits = source("edit")
    for plan in map(edits.plan, range(12)):
        states = [metrics.State(*state) for state in true_pictures(plan.scenes[:2], *SIZE)]
        before, after = states
        seen = {id(state.picture): detections(state) for state in states}
        monkeypatch.setattr(metrics, "judge", lambda picture, seen=seen: list(seen[id(picture)]))
        true, unchanged = (metrics.edit(before, after, state.picture) for state in (after, before))
        assert true["done and rest untouched"] == 1 and unchanged["done"] == 0 and unchanged["rest untouched"] == 1
        assert unchanged.get("PSNR outside", metrics.MAX_PSNR_DB) == metrics.MAX_PSNR_DB
        stray = replace(seen[id(after.picture)][0], color="none of ours", box=(-9, -9, -1, -1))
        seen[id(after.picture)].append(stray)
        assert metrics.edit(before, after, after.picture)["rest untouched"] == 0  # something more
        if plan.kinds[0] == "remove":
            (gone,) = before.boxes.keys() - after.boxes.keys()
            seen[id(after.picture)][-1] = replace(stray, box=before.boxes[gone])  # something else in its place
            assert metrics.edit(before, after, after.picture)["done"] == 0
        monkeypatch.setattr(metrics, "judge", lambda picture: [])
        kept = set(before.boxes) & set(after.boxes)
        assert metrics.edit(before, after, after.picture)["rest untouched"] == (not kept)


def test_a_subject_keeps_shape_color_and_size(monkeypatch):
    small, large = (Detection("cube", "red", (0, 0, px, px), (0, 0), 0) for px in (15, 23))
    picture = Image.new("RGB", SIZE)
    monkeypatch.setattr(metrics, "judge", lambda picture: [small])
    assert set(metrics.subject("small red cube", [picture]).values()) == {1.0}
    monkeypatch.setattr(metrics, "judge", lambda picture: [large])
    kept = metrics.subject("small red cube", [picture])
    assert kept == {"subject's shape": 1, "subject's color": 1, "subject's size": 0, "subject kept": 0}


def test_questions_of_a_talk_are_told_apart_by_kind():
    kinds = {q: trials._chat_kind(q) for i in range(40) for q, _ in trials._dialogue(source("chat").plan(i))}
    assert set(kinds.values()) == {"number comparison", "arithmetic", "dialogue"}
    assert trials._chat_kind("Which is bigger? 9.9 or 9.11") == trials._chat_kind("Is 3 less than 2.5?")
    assert metrics.same("Yes.", "yes") and not metrics.same("9.9", "9.11")


def test_shuffled_answers_are_all_of_another_case():
    assert all(a != b for a, b in enumerate(trials._shuffled(range(9))))
    assert sorted(trials._shuffled(range(9))) == list(range(9))


def test_cases_are_shared_among_conditions(tiny_pipe):
    found = [*Board(tiny_pipe, 8, SIZE, 0).by_condition("control", SIZE, trials.CONTROLS)]
    assert sorted(condition for condition, _ in found) == sorted(trials.CONTROLS * 2)
    assert all(record[condition] for condition, record in found)


def test_conditions_are_found_again_where_maps_were_trained(tiny_pipe, monkeypatch):
    board = Board(tiny_pipe, 8, SIZE, 0)
    asked = lambda self, task, images: [trials.Answer((task, image), "", None, None) for image in images]  # noqa: E731
    monkeypatch.setattr(Board, "ask", asked)
    conditions, pictures = ["depth", "pose", "depth", "normal"], ["a", "b", "c", "d"]
    found = trials._found_again(board, conditions, pictures)
    assert found == [*zip(conditions, pictures, strict=True)]
    tiny_pipe.processor.trained_tasks = ["control", "depth"]
    assert trials._found_again(board, conditions, pictures) == [found[0], None, found[2], None]


def test_a_skeleton_that_nobody_can_read_counts_for_nothing():
    assert metrics.pose(np.full((14, 2), np.nan), Image.new("RGB", SIZE)) == {"PCK@0.2": (0, 0)}


def test_sizes_are_in_proportion_and_fit_the_context(score, long_pipe, monkeypatch):
    long_pipe.processor.trained_tasks, long_pipe.processor.target_px = ["text-to-image"], 32
    monkeypatch.setattr(
        trials, "IMAGE_SIZES", "48x48 64x64 128x64 160x160"
    )  # halved: 24 px are no size, 80 x 80 too large
    monkeypatch.setattr(long_pipe.transformer.config, "max_position_embeddings", 192)
    report = score(height=32, width=32)
    found = {score["metric"] for score in report["tasks"]["sizes"]["scores"]}
    assert found == {"overall, 32x32", "overall, 64x32"}


@pytest.fixture
def long_pipe(tiny_config, tiny_processor, tiny_vqvae):
    """With room for three edits."""
    transformer = LuminaMGPTForConditionalGeneration(tiny_config(max_position_embeddings=2048)).eval()
    return LuminaMGPTPipeline(transformer, tiny_vqvae, tiny_processor)


@pytest.fixture
def score(long_pipe, tmp_path, monkeypatch):
    """Scores the tiny model on few cases with a judge that sees nothing."""
    for module in (metrics, trials):
        monkeypatch.setattr(module, "judge", lambda picture: [])
    for name, few in {"NUM_TRAINING": 40, "NUM_MAPS": 2, "NUM_SENTENCES": 1, "IMAGE_SIZES": "64x64"}.items():
        monkeypatch.setattr(trials, name, few)
    for module in (scoreboard, trials):
        monkeypatch.setattr(module, "CURVES", {"guidance_scale": (1, 2), "image_temperature": (0.5, 1.0)})
    return partial(scoreboard.run_scoreboard, long_pipe, tmp_path, num_cases=2, height=64, width=64)


def test_every_task_is_scored_and_what_is_scored_is_kept(score, long_pipe, tmp_path, monkeypatch, capsys):
    report = score()
    assert list(report["tasks"]) == list(trials.SCORED) and not report["left_out"]
    assert json.loads((tmp_path / "scoreboard.json").read_text()) == report
    assert all((tmp_path / "sheets" / f"{task}.png").exists() for task in trials.SCORED)
    assert (tmp_path / "curves.png").exists()
    table = (tmp_path / "scoreboard.md").read_text()
    assert table in capsys.readouterr().out and "| depth | AbsRel ↓ | 2 |" in table and "curves" not in table
    (tmp_path / "model").mkdir()
    write_card(long_pipe, tmp_path, {"fp_sft_64": 40.4, "omni_sft": 20.0}, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    headlines = {(result.metric_name, round(result.metric_value, 3)) for result in card.data.eval_results}
    depth = {score["metric"]: score["ours"]["value"] for score in report["tasks"]["depth"]["scores"]}
    assert 0 < len(headlines) <= len(HEADLINES) and ("depth: delta1", round(depth["delta1"], 3)) in headlines
    assert json.loads((tmp_path / "model" / "scoreboard.json").read_text()) == report
    assert card.data.license == "apache-2.0" and table in card.content and "| fp_sft_64 | 40 |" in card.content
    pictures = set(re.findall(r"\((pictures/.*?)\)", card.content))
    assert len(pictures) == len(trials.SCORED) + 1 and all((tmp_path / "model" / name).exists() for name in pictures)

    monkeypatch.setattr(Board, "ask", None)
    assert score() == report
    with pytest.raises(ValueError, match="seed 0, this is 1: take another output_dir"):
        score(seed=1)
    next(long_pipe.transformer.parameters()).data += 1
    with pytest.raises(ValueError, match="weights"):
        score()


def test_what_does_not_fit_the_context_is_left_out(score, long_pipe, tmp_path, capsys):
    """A picture has 75 tokens, what it is asked for in words some more."""
    long_pipe.transformer.config.max_position_embeddings = 256
    report = score()
    assert json.loads((tmp_path / "scoreboard.json").read_text()) == report
    assert report["left_out"].keys() == {"edit", "pair", "panel"}  # four pictures in turn, and four areas at once
    assert report["left_out"].keys() | report["tasks"].keys() == trials.SCORED.keys()
    assert "- edit: " in capsys.readouterr().out


def test_tasks_without_training_are_left_out_and_sizes_are_buckets(score, long_pipe, capsys):
    long_pipe.processor.trained_tasks = ["vqa"]
    report = score()
    assert list(report["tasks"]) == ["vqa", "chat"]
    assert "- depth: the checkpoint was not trained for it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="split 'train': accepted are test, validation"):
        score(split="train")
    with pytest.raises(ValueError, match=r"size 32x32: this checkpoint crops what it is given to .*64x64"):
        score(height=32, width=32)

"""Tabletop: the synthetic world that the default checkpoint is trained and judged on, as a dataset for every task.

Scenes come from `tabletop_scenes.py`, pictures from `tabletop_renderer.py`, and what is said about them from
`tabletop_language.py`. Train, validation and test are disjoint by construction: `HELD_OUT` combinations of shape,
color and size never occur in training, nor do sets of objects kept for validation, nor captions and dialogue by their
hash. Questions, edits and phrases are the same in all three, of other scenes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from .drawing import draw_skeletons
from .tabletop_language import (
    ANSWERS,
    EDITS,
    QUESTIONS,
    describe_at_length,
    describe_with_mannequin,
    questions,
    refer,
    sample_dialogue,
    sample_edits,
    sample_question,
)
from .tabletop_mannequin import LIMBS
from .tabletop_renderer import (
    SEGMENT_COLORS,
    SEGMENT_PALETTE,
    Rendering,
    depth_image,
    normal_image,
    render,
    segmentation_image,
    to_image,
)
from .tabletop_scenes import (
    COLORS,
    FAR,
    HELD_OUT,
    NEAR,
    NUMBER_WORDS,
    SHAPES,
    SIZES,
    SPLITS,
    SURFACES,
    TABLES,
    WALLS,
    Caption,
    Scene,
    SceneObject,
    describe,
    fits,
    joints_px,
    noun_phrase,
    parse,
    sample_scene,
    sample_split_scene,
    split_of,
    split_of_sentence,
)

__all__ = [
    "COLORS", "COLUMNS", "FAR", "HELD_OUT", "MAPS", "NEAR", "NUMBER_WORDS", "SEGMENT_COLORS", "SEGMENT_PALETTE",
    "SHAPES", "SIZES", "SPLITS", "SURFACES", "TABLES", "WALLS", "Caption", "Plan", "Rendering", "Scene", "SceneObject",
    "TabletopSource", "depth_image", "describe", "normal_image", "noun_phrase",
    "parse", "render", "sample_scene", "sample_split_scene", "segmentation_image", "split_of", "split_of_sentence",
    "tabletop_texts", "to_image",
]  # fmt: skip

MAPS = ("depth", "normal", "segmentation")
COLUMNS = {
    "text-to-image": ("image", "caption"),
    "chat": ("conversations",),
    "image-to-text": ("image", "conversations"),
    "caption": ("image", "caption"),
    "vqa": ("image", "question", "answer"),
    "edit": ("images", "instructions"),
    "depth": ("image", "depth"),
    "normal": ("image", "normal"),
    "pose": ("image", "pose"),
    "segmentation": ("image", "segmentation"),
    "detection": ("image", "phrase", "box"),
    "control": ("image", "caption", "depth", "normal", "segmentation", "pose"),
    "refine": ("image",),
    "restore": ("image", "caption"),
    "pair": ("image", "caption", "depth", "pose", "reference", "subject"),
    "panel": ("image", "caption", "depth", "pose", "reference", "subject"),
}
MANNEQUIN_SHARE = {"pose": 1.0, **dict.fromkeys(("depth", "normal", "segmentation", "control", "pair", "panel"), 0.3)}
RENDERED_PX = 2**17  # in one batch: beyond, memory grows and nothing is faster


@dataclass(frozen=True)
class Plan:
    """A record before it is drawn, and all that is known about it.

    Attributes:
        size: of its pictures, (width_px, height_px).
        scenes: of its pictures; an edit has one before each turn and one after the last; of panels with a subject the
            second is the reference.
        words: the columns that are no pictures.
        kinds: of the question (`QUESTIONS`), or of each edit.
        target: place in the scene of the object that is meant, where a phrase means one.
    """

    size: tuple[int, int]
    scenes: tuple[Scene, ...]
    words: dict[str, Any]
    kinds: tuple[str, ...] = ()
    target: int = 0


class TabletopSource:
    """Records of one task, drawn when they are fetched, with the columns that `training/tasks.py` has for it.

    Record i depends on `seed`, `split`, `task`, i and `sizes` alone. About a third of the scenes of maps, control and
    panels, and all for pose, have a mannequin; a control record without one has no "pose" column.

    Args:
        task: a key of `COLUMNS`.
        sizes: (width_px, height_px) of pictures, to choose from.
        split: "train", "validation" or "test".
    """

    def __init__(self, task: str, sizes: Sequence[tuple[int, int]], seed: int, split: str, num_records: int):
        if task not in COLUMNS:
            raise ValueError(f"task {task!r}: Tabletop has {', '.join(COLUMNS)}")
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: Tabletop has {', '.join(SPLITS)}")
        if not sizes:
            raise ValueError("sizes is empty: accepted is a list of (width_px, height_px)")
        if task == "restore":  # whose pictures are made square: what was cut off would still be in the caption
            sizes = [size for size in sizes if size[0] == size[1]] or [(max(map(max, sizes)),) * 2]
        self.task, self.sizes, self.seed, self.split, self.num_records = task, list(sizes), seed, split, num_records

    @property
    def column_names(self) -> list[str]:
        return list(COLUMNS[self.task])

    def __len__(self) -> int:
        return self.num_records

    def plan(self, index: int) -> Plan:
        """What record `index` will show and say; nothing is drawn for it."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records}")
        rng = random.Random(f"{self.seed}/{self.split}/{self.task}/{index}")
        return _sample_plan(self.task, rng, rng.choice(self.sizes), self.split)

    def fetch(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records, with pictures in PIL."""
        plans = [self.plan(index) for index in indices]
        records: list[dict[str, Any]] = [{} for _ in plans]
        for size in {plan.size for plan in plans}:
            places = [i for i, plan in enumerate(plans) if plan.size == size]
            step = max(1, RENDERED_PX // (size[0] * size[1] * max(1, *(len(plans[i].scenes) for i in places))))
            for start in range(0, len(places), step):
                batch = places[start : start + step]
                for i, record in zip(batch, self._draw([plans[i] for i in batch], size), strict=True):
                    records[i] = record
        return records

    def _draw(self, plans: list[Plan], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        scenes = [scene for plan in plans for scene in plan.scenes]
        needs_maps = not {"box", *MAPS}.isdisjoint(COLUMNS[self.task])
        rendering = render(scenes, *size, needs_maps) if scenes else Rendering(torch.empty(0))
        row = 0
        for plan in plans:
            rows = range(row, row := row + len(plan.scenes))
            drawn = {name: draw(rendering, rows, plan) for name, draw in DRAWN.items() if name in COLUMNS[self.task]}
            yield {**plan.words, **{name: value for name, value in drawn.items() if value is not None}}


def _sample_plan(task: str, rng: random.Random, size: tuple[int, int], split: str) -> Plan:
    """A record's scenes and words, drawn until there is something to say of them in the split."""
    if task == "chat":
        return Plan(size, (), {"conversations": _messages(sample_dialogue(rng, split))})
    with_mannequin = rng.random() < MANNEQUIN_SHARE.get(task, 0.0)
    kinds, answer = _sample_kinds(task, rng)
    while True:
        num_objects = rng.randint(1, 4) if task in ("vqa", "image-to-text") else None
        scene = sample_split_scene(rng, *size, split, num_objects=num_objects, with_mannequin=with_mannequin)
        plan = _say(task, rng, size, split, scene, kinds, answer)
        if plan is not None:
            return plan


def _sample_kinds(task: str, rng: random.Random) -> tuple[tuple[str, ...], str | None]:
    """Kinds of what a record asks for, and the answer, each as likely: what scene allows them is seen later."""
    if task == "edit":
        return tuple(rng.choices(list(EDITS), k=rng.choice((1, 1, 2, 3)))), None
    kind = rng.choice(list(QUESTIONS))
    return (kind,), rng.choice(ANSWERS[kind]) if kind in ANSWERS else None


def _say(
    task: str,
    rng: random.Random,
    size: tuple[int, int],
    split: str,
    scene: Scene,
    kinds: tuple[str, ...],
    answer: str | None,
) -> Plan | None:
    """The words of a task about a scene, and what else they need; None if there are none."""
    try:
        if task in ("text-to-image", "restore"):
            return Plan(size, (scene,), {"caption": describe(scene, rng, split).text})
        if task == "caption":
            long = rng.random() < 0.5
            text = describe_at_length(scene, rng, split) if long else describe(scene, rng, split).text
            return Plan(size, (scene,), {"caption": text}, ("long" if long else "short",))
        if task == "control":
            return Plan(size, (scene,), {"caption": describe_with_mannequin(scene, rng, split)})
        if task in ("pair", "panel"):
            return _with_subject(rng, size, split, scene)
    except ValueError:  # no sentence in this split
        return None
    if task == "vqa":
        asked = sample_question(scene, kinds[0], rng, answer)
        return Plan(size, (scene,), {"question": asked[0], "answer": asked[1]}, kinds) if asked else None
    if task == "image-to-text":
        return _talk(rng, size, scene)
    if task == "edit":
        edits = sample_edits(scene, rng, *size, kinds, split)
        if not edits:
            return None
        words = {"instructions": [edit.instruction for edit in edits]}
        return Plan(size, (scene, *(e.scene for e in edits)), words, kinds)
    if task == "detection":
        target = rng.randrange(len(scene.objects))
        phrase = refer(scene, target, rng)
        return Plan(size, (scene,), {"phrase": phrase}, target=target) if phrase else None
    return Plan(size, (scene,), {})


def _with_subject(rng: random.Random, size: tuple[int, int], split: str, scene: Scene) -> Plan | None:
    """The scene, and another one with one of its objects alone; None if that one is of a split to be kept unseen."""
    target = rng.randrange(len(scene.objects))
    subject = scene.objects[target]
    shape, color, size_word = subject.combination
    while True:
        alone = sample_scene(rng, *size, 1, "any")
        moved = replace(alone.objects[0], shape=shape, color=color, size=size_word, surface=subject.surface)
        if fits(moved, (), *size):
            break
    reference = replace(alone, objects=(moved,))
    if split == "train" != split_of(reference):
        return None
    words = {"caption": describe_with_mannequin(scene, rng, split), "subject": " ".join(subject.combination[::-1])}
    return Plan(size, (scene, reference), words, target=target)


def _talk(rng: random.Random, size: tuple[int, int], scene: Scene) -> Plan:
    """Up to eight questions about one picture, which stands before or after the first of them."""
    kinds = rng.choices([kind for kind in QUESTIONS if questions(scene, kind)], k=rng.randint(3, 8))
    turns = dict(turn for kind in kinds if (turn := sample_question(scene, kind, rng)))
    messages = _messages([*turns.items()])
    messages[0]["value"] = rng.choice(("<image>\n{}", "{} <image>")).format(messages[0]["value"])
    return Plan(size, (scene,), {"conversations": messages}, tuple(kinds))


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [message for q, a in turns for message in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def _pose_picture(rendering: Rendering, rows: range, plan: Plan) -> Image.Image | None:
    """With joints that are hidden, too: their place can be told from the others."""
    if plan.scenes[0].mannequin is None:
        return None
    joints = np.pad(joints_px(plan.scenes[0], *plan.size), ((0, 0), (0, 1)), constant_values=1)  # all are to be drawn
    return draw_skeletons(joints[None], *plan.size, limbs=LIMBS)


DRAWN: dict[str, Callable[[Rendering, range, Plan], Any]] = {
    "image": lambda r, rows, _: to_image(r.rgb[rows[0]]),
    "images": lambda r, rows, _: [to_image(r.rgb[row]) for row in rows],
    "reference": lambda r, rows, _: to_image(r.rgb[rows[1]]),
    "depth": lambda r, rows, _: to_image(depth_image(r.depth[rows[0]])),
    "normal": lambda r, rows, _: to_image(normal_image(r.normals[rows[0]])),
    "segmentation": lambda r, rows, plan: to_image(segmentation_image(r.segmentation[rows[0]], plan.scenes[0])),
    "pose": _pose_picture,
    "box": lambda r, rows, plan: r.boxes(rows[0])[plan.target],
}


def tabletop_texts(num_records: int = 250, seed: int = 0) -> list[str]:
    """The world's language, to train a tokenizer on: the words of so many training records of each task."""
    texts: list[str] = []
    for task in COLUMNS:
        source = TabletopSource(task, [(64, 64)], seed, "train", num_records)
        if {"image", *MAPS, "pose"}.issuperset(source.column_names):
            continue
        for index in range(num_records):
            for value in source.plan(index).words.values():
                values = value if isinstance(value, list) else [value]
                texts += [v["value"] if isinstance(v, dict) else v for v in values]
    return texts

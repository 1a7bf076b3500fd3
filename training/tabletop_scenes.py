"""Tabletop's scenes: what stands on the table, how it is sampled, and the sentences that describe it.

A scene is one to four solids (sphere, cube, cylinder, cone) of two sizes, eight colors and three surfaces on a table;
for pose, a jointed mannequin stands among them. It is sampled from a seed and known completely.

What no sentence speaks of must not outweigh, in a model's loss, what it speaks of. So there is one light, cubes turn
one way, and the view is a parallel projection of one scale: larger pictures show more of the table. Objects stand on a
lattice of 8 pixels, so that a VQ model of such patches sees the same ones wherever an object stands.

Axes: x right, y up, z away from the viewer; the table is y = 0; a large object is 2 table units wide.
"""

import hashlib
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .tabletop_mannequin import CAPSULES, JOINTS, POSES, Mannequin, sample_mannequin

SHAPES = ("sphere", "cube", "cylinder", "cone")
SIZES = {"small": 0.66, "large": 1.0}  # half the width
SURFACES = {"matte": 3, "metal": 1, "wooden": 1}  # and how often each is
COLORS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.96, 0.84, 0.10),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.10, 0.74, 0.78),
    "blue": (0.13, 0.27, 0.86),
    "purple": (0.50, 0.15, 0.72),
    "pink": (0.98, 0.42, 0.70),
}
TABLES = {
    "white": (0.90, 0.90, 0.89),
    "dark": (0.27, 0.28, 0.31),
    "wooden": (0.68, 0.58, 0.47),
}
WALLS = ((0.93, 0.93, 0.92), (0.42, 0.44, 0.48))
LIGHT_AZIMUTH, LIGHT_ELEVATION = -0.8, 0.9  # radians; azimuth 0 is from the viewer, positive from the right
YAW = math.pi / 6  # of cubes

PITCH = math.radians(35)  # of the view, downward
UNIT_PX = 11.6  # pixels in a table unit, in pictures of 56 x 56 and more; smaller ones show as much as that
PATCH_PX = 8
SPACING = {"x": PATCH_PX / UNIT_PX, "z": PATCH_PX / UNIT_PX / math.sin(PITCH)}  # of the lattice
EDGE_Z, EDGE_DEPTH = 10.0, 13.5  # where the table ends and the wall begins
NEAR, FAR = 1.5, 14.0  # depth range of the depth map, in table units

CUBE_WIDTH = 0.72  # in widths of the others, so that a turned cube is as wide as they

# One combination of shape, color and size for each color, two for each shape: seen in the test split only.
HELD_OUT = frozenset((SHAPES[i % 4], color, ("small", "large")[(i // 4 + i) % 2]) for i, color in enumerate(COLORS))
SPLITS = ("train", "validation", "test")

Mention = tuple[int, str | None, str | None, str | None]


@dataclass(frozen=True)
class SceneObject:
    shape: str
    color: str
    size: str
    x: float
    z: float
    surface: str = "matte"

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def height(self) -> float:
        return self.radius * {"sphere": 2.0, "cube": 2 * CUBE_WIDTH, "cylinder": 1.5, "cone": 2.0}[self.shape]

    @property
    def combination(self) -> tuple[str, str, str]:
        return (self.shape, self.color, self.size)


@dataclass(frozen=True)
class Scene:
    """Objects, left to right, and how they are seen. Everything that the renderer and the captions need."""

    objects: tuple[SceneObject, ...]
    table: str
    wall: int
    mannequin: Mannequin | None = None


@dataclass(frozen=True)
class Caption:
    """A sentence and what it commits to. `None` marks an attribute that the sentence leaves open.

    `mentions`: (count, shape, color, size) for each phrase; `relation`: (index, word, index) into `mentions`;
    `surfaces`: one for each phrase, if they are named.
    """

    text: str
    mentions: tuple[Mention, ...]
    relation: tuple[int, str, int] | None = None
    surfaces: tuple[str | None, ...] = ()


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_scene(
    rng: random.Random,
    width_px: int,
    height_px: int,
    num_objects: int | None = None,
    split: str = "train",
    with_mannequin: bool = False,
) -> Scene:
    """Draws a scene whose objects all lie inside a picture of that shape, apart, and mostly visible.

    Args:
        num_objects: 1 to 4; drawn if None.
        split: "train" has no held-out combination (and may be of "validation", which `sample_split_scene` leaves out),
            "test" at least one, "any" whatever comes.
    """
    allowed = {"train": ("train", "validation"), "any": SPLITS}.get(split, (split,))
    if not {*allowed} <= {*SPLITS}:
        raise ValueError(f"split is {split!r}; accepted are {', '.join(SPLITS)} and any")
    count = num_objects or rng.choices((1, 2, 3, 4), weights=(3, 1, 0, 0) if with_mannequin else (3, 4, 2, 2))[0]
    if not 1 <= count <= 4:
        raise ValueError(f"num_objects is {num_objects}; a scene holds 1 to 4 objects.")
    while True:
        combinations = _sample_combinations(rng, count)
        if _split_of(combinations) not in allowed:
            continue
        mannequin = _place_mannequin(rng, width_px, height_px) if with_mannequin else None
        objects = _place(rng, combinations, width_px, height_px, mannequin)
        if objects is not None:
            break
    return Scene(
        objects=left_to_right(objects),
        table=rng.choice(list(TABLES)),
        wall=rng.randrange(len(WALLS)),
        mannequin=mannequin,
    )


def sample_split_scene(rng: random.Random, width_px: int, height_px: int, split: str, **options) -> Scene:
    """As `sample_scene`, but from "train", "validation" or "test" by `split_of`: none has another's scenes."""
    while True:
        scene = sample_scene(rng, width_px, height_px, split=split, **options)
        if split_of(scene) == split:
            return scene


def left_to_right(objects: Iterable[SceneObject]) -> tuple[SceneObject, ...]:
    return tuple(sorted(objects, key=lambda o: (o.x, o.z)))


def split_of(scene: Scene) -> str:
    """ "test" with a held-out combination; of the others a sixteenth is "validation", by which objects it holds."""
    return _split_of([o.combination for o in scene.objects])


def _split_of(combinations: Iterable[tuple[str, str, str]]) -> str:
    if HELD_OUT.intersection(combinations):
        return "test"
    return "validation" if _hash(repr(sorted(combinations))) % 16 == 1 else "train"


def _sample_combinations(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Free draws; in a third of the scenes one kind of object repeated, so that counting has something to count.

    Four objects are small, else there is hardly a place for them.
    """
    sizes = list(SIZES) if count < 4 else ["small"]

    def draw() -> tuple[str, str, str]:
        return rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(sizes)

    if rng.random() < 0.65:
        return [draw() for _ in range(count)]
    shape, color, size = draw()
    if rng.random() < 0.5:
        return [(shape, color, size)] * count
    return [(shape, rng.choice(list(COLORS)), rng.choice(sizes)) for _ in range(count)]


def _place_mannequin(rng: random.Random, width_px: int, height_px: int) -> Mannequin:
    """Anywhere in the frame."""
    pose, places = rng.choice(POSES), _lattice(width_px, height_px)
    while True:
        mannequin = sample_mannequin(rng, pose, *rng.choice(places))
        if fits(mannequin, [], width_px, height_px):
            return mannequin


def _place(rng, combinations, width_px, height_px, mannequin=None) -> list[SceneObject] | None:
    """Places by rejection: in the frame, apart on the table, and not hidden behind one another."""
    objects: list[SceneObject] = []
    places = _lattice(width_px, height_px)
    for _ in range(30 * len(combinations)):
        shape, color, size = combinations[len(objects)]
        (surface,) = rng.choices(list(SURFACES), [*SURFACES.values()])
        x, z = rng.choice(places)
        candidate = SceneObject(shape, color, size, x, z, surface)
        if fits(candidate, [*objects, mannequin] if mannequin else objects, width_px, height_px):
            objects.append(candidate)
            if len(objects) == len(combinations):
                return objects
    return None


@lru_cache(maxsize=64)
def _lattice(width_px: int, height_px: int) -> list[tuple[float, float]]:
    """(x, z) of all places in the frame: columns half a step from the middle, rows from a step before the wall on."""
    step_px = PATCH_PX * unit_px(width_px, height_px) / UNIT_PX
    columns, rows = math.ceil(width_px / 2 / step_px), math.ceil(height_px / step_px)
    xs = [(i + 0.5) * SPACING["x"] for i in range(-columns, columns)]
    return [(round(x, 4), round(EDGE_Z - (i + 1.5) * SPACING["z"], 4)) for x in xs for i in range(rows)]


def fits(
    candidate: SceneObject | Mannequin, others: Sequence[SceneObject | Mannequin], width_px: int, height_px: int
) -> bool:
    """Whether it lies inside the frame, apart from the others, neither hidden by nor hiding much of them."""
    if not all(_apart(candidate, o) for o in others):
        return False
    box = projected_box(candidate, width_px, height_px)
    inside = min(box) > 0.15 and box[2] < width_px - 0.15 and box[3] < height_px - 0.15
    return inside and all(_visible(candidate, box, o, projected_box(o, width_px, height_px)) for o in others)


def _apart(a: SceneObject | Mannequin, b: SceneObject | Mannequin) -> bool:
    return math.hypot(a.x - b.x, a.z - b.z) >= 1.2 * (a.radius + b.radius)


def _visible(a: SceneObject | Mannequin, box_a, b: SceneObject | Mannequin, box_b) -> bool:
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    hidden = box_a if a.z > b.z else box_b
    share = 0.05 if isinstance(a, Mannequin) or isinstance(b, Mannequin) else 0.1  # its limbs are thin
    return max(width, 0) * max(height, 0) < share * (hidden[2] - hidden[0]) * (hidden[3] - hidden[1])


def unit_px(width_px: int, height_px: int) -> float:
    """Pixels in a table unit."""
    return UNIT_PX * min(1.0, math.sqrt(width_px * height_px) / 56)


def horizon_px(height_px: int) -> int:
    """The row where the wall meets the table: about a quarter of the picture is wall."""
    return PATCH_PX * max(1, height_px // (4 * PATCH_PX))


def project(x: float, y: float, z: float, width_px: int, height_px: int) -> tuple[float, float]:
    """Where a point is in a picture: pixels from the left and from the top."""
    scale = unit_px(width_px, height_px)
    up = y * math.cos(PITCH) + (z - EDGE_Z) * math.sin(PITCH)
    return width_px / 2 + scale * x, horizon_px(height_px) - scale * up


def joints_px(scene: Scene, width_px: int, height_px: int) -> np.ndarray:
    """Where the mannequin's joints are in a picture, hidden ones, too: `(14, 2)`, pixels from the left and the top."""
    if scene.mannequin is None:
        raise ValueError("the scene has no mannequin")
    return np.array([project(*point, width_px, height_px) for point in scene.mannequin.points[: len(JOINTS)]])


@lru_cache(maxsize=4096)
def projected_box(o: SceneObject | Mannequin, width_px: int, height_px: int) -> tuple[float, float, float, float]:
    """Box in pixels (left, top, right, bottom); a cube's is that of a cylinder around it."""
    if isinstance(o, Mannequin):
        balls = [(*o.points[i], radius) for a, b, radius in CAPSULES for i in (a, b)]
    elif o.shape == "sphere":
        balls = [(o.x, o.radius, o.z, o.radius)]
    else:
        top = 0.0 if o.shape == "cone" else o.radius
        rims, around = [(0.0, o.radius), (o.height, top)], ((-1, 0), (1, 0), (0, -1), (0, 1))
        balls = [(o.x + dx * r, y, o.z + dz * r, 0.0) for y, r in rims for dx, dz in around]
    scale = unit_px(width_px, height_px)
    places = [(*project(x, y, z, width_px, height_px), scale * radius) for x, y, z, radius in balls]
    left, top_px = min(u - r for u, _, r in places), min(v - r for _, v, r in places)
    return left, top_px, max(u + r for u, _, r in places), max(v + r for _, v, r in places)


# --- sentences -------------------------------------------------------------------------------------------------------

OPENINGS = ("", "", "", "a picture of ", "a photo of ", "there is ", "an image showing ")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
RELATION_MARGIN = {"x": 0.55, "z": 1.0}  # table units by which objects must differ before a sentence compares them


def describe(scene: Scene, rng: random.Random, split: str = "train") -> Caption:
    """A sentence that names every object of the scene, in varied wording and detail; lists go from left to right.

    Sentences of two splits never coincide; "any" is all of them. ValueError if this scene has none in its split.
    """
    for _ in range(100):
        caption = _describe(scene, rng)
        if split in ("any", split_of_sentence(caption.text)):
            return caption
    raise ValueError(f"the scene has no sentence in the {split} split")


def split_of_sentence(sentence: str) -> str:
    """ "train", "validation" or "test": of sixteen sentences fourteen, one and one, by their hash."""
    return {0: "test", 1: "validation"}.get(_hash(sentence) % 16, "train")


def _hash(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def _describe(scene: Scene, rng: random.Random) -> Caption:
    kinds = {(o.shape, o.color) for o in scene.objects}
    shapes = {o.shape for o in scene.objects}
    styles = [_list_sentence] * 2 if len(kinds) == len(scene.objects) else [_counting_sentence] * 4
    if len(scene.objects) == 2:
        styles += [_relation_sentence] * 2
    if len(scene.objects) > 1 and len(shapes) == 1:
        styles += [_shape_counting_sentence] * 2
    caption = rng.choice(styles)(scene, rng)
    place = f" on a {scene.table} table" if rng.random() < 0.3 else ""
    opening = rng.choice(OPENINGS)
    if opening == "there is " and caption.mentions[0][0] > 1:
        opening = "there are "
    return replace(caption, text=opening + caption.text + place + rng.choice(("", ".")))


def _list_sentence(scene: Scene, rng: random.Random) -> Caption:
    repeated = len({o.shape for o in scene.objects}) < len(scene.objects)
    sized, colored, surfaced = rng.random() < 0.5, repeated or rng.random() < 0.8, rng.random() < 0.2
    mentions = tuple((1, o.shape, o.color if colored else None, o.size if sized else None) for o in scene.objects)
    return _listed(mentions, tuple(o.surface for o in scene.objects) if surfaced else ())


def _listed(mentions: tuple[Mention, ...], surfaces: tuple[str | None, ...]) -> Caption:
    phrases = map(noun_phrase, mentions, surfaces or [None] * len(mentions))
    return Caption(join_phrases([*phrases]), mentions, surfaces=surfaces)


def _counting_sentence(scene: Scene, rng: random.Random) -> Caption:
    """Groups of equal shape and color: "two red cubes and a blue sphere"."""
    sized, surfaced = rng.random() < 0.3, rng.random() < 0.2
    groups: dict[tuple, int] = {}
    for o in scene.objects:
        key = (o.shape, o.color, o.size if sized else None, o.surface if surfaced else None)
        groups[key] = groups.get(key, 0) + 1
    mentions = tuple((count, *key[:3]) for key, count in groups.items())
    return _listed(mentions, tuple(surface for *_, surface in groups) if surfaced else ())


def _shape_counting_sentence(scene: Scene, rng: random.Random) -> Caption:
    mention = (len(scene.objects), scene.objects[0].shape, None, None)
    return Caption(noun_phrase(mention), (mention,))


def _relation_sentence(scene: Scene, rng: random.Random) -> Caption:
    left, right = scene.objects
    if (left.shape, left.color) == (right.shape, right.color):
        return _counting_sentence(scene, rng)
    options = []
    if right.x - left.x > RELATION_MARGIN["x"]:
        options += [(0, "left of", 1), (1, "right of", 0)]
    if abs(left.z - right.z) > RELATION_MARGIN["z"]:
        near = 0 if left.z < right.z else 1
        options += [(near, "in front of", 1 - near), (1 - near, "behind", near)]
    if not options:
        return _list_sentence(scene, rng)
    first, word, second = rng.choice(options)
    listed = _list_sentence(scene, rng)
    mentions = listed.mentions[first], listed.mentions[second]
    surfaces = (listed.surfaces[first], listed.surfaces[second]) if listed.surfaces else ()
    article = rng.choice(("", "to the ")) if word in ("left of", "right of") else ""
    a, b = map(noun_phrase, mentions, surfaces or (None, None))
    return Caption(f"{a} {article}{word} {b}", mentions, (0, word, 1), surfaces)


def noun_phrase(mention: Mention, surface: str | None = None) -> str:
    count, shape, color, size = mention
    words = [w for w in (size, color, surface, shape or "object") if w]
    if count > 1:
        return " ".join([NUMBER_WORDS[count], *words]) + "s"
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def parse(sentence: str) -> Caption:
    """Reads a sentence as `describe` writes them, for what it commits to. ValueError for any other."""
    body = sentence.strip().lower().removesuffix(".")
    body = re.sub(rf"^(?:{'|'.join(filter(None, OPENINGS))}|there are )| on a (?:{'|'.join(TABLES)}) table$", "", body)
    related = re.fullmatch(r"(.+?) ((?:to the )?(?:left|right) of|in front of|behind) (.+)", body)
    phrases = [*map(_read_phrase, related.group(1, 3) if related else re.split(", and | and |, ", body))]
    readable = [mention for mention, _ in filter(None, phrases)]
    surfaces = tuple(surface for _, surface in filter(None, phrases))
    num_objects = sum(count for count, *_ in readable)
    if len(readable) < len(phrases) or num_objects > (2 if related else 4):
        raise ValueError(
            f"{sentence!r} is no sentence of the Tabletop world; those name one to four objects, "
            "such as 'two red cubes and a small sphere' or 'a red cube left of a sphere'"
        )
    relation = (0, related[2].removeprefix("to the "), 1) if related else None
    return Caption(sentence, tuple(readable), relation, surfaces if any(surfaces) else ())


def _read_phrase(phrase: str) -> tuple[Mention, str | None] | None:
    """The inverse of `noun_phrase`; None if there is none."""
    one_or_more = rf"(?:an?|one|({'|'.join(NUMBER_WORDS[2:])}))"
    size, color, surface, shape = (f"({'|'.join(words)})" for words in (SIZES, COLORS, SURFACES, (*SHAPES, "object")))
    match = re.fullmatch(rf"{one_or_more} (?:{size} )?(?:{color} )?(?:{surface} )?{shape}(s?)", phrase)
    if match is None or bool(match[1]) != bool(match[6]):
        return None
    shape_word = None if match[5] == "object" else match[5]
    return (NUMBER_WORDS.index(match[1] or "one"), shape_word, match[3], match[2]), match[4]


def join_phrases(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]

"""Tabletop: the synthetic world that the default checkpoint is trained and judged on.

A scene is one to four solids (sphere, cube, cylinder, cone) of two sizes and eight colors on a table, seen through
a pinhole camera. It is sampled from a seed, rendered by exact ray casting in torch, batch by batch, and known
completely: RGB, depth, surface normals, segmentation, boxes, outline and sentences that describe it.

Axes: x right, y up, z away from the viewer; the table is y = 0; a large object is 2 table units wide.
Train and test scenes are disjoint by construction: `HELD_OUT` combinations of shape, color and size never occur in
training, and neither do sentences whose hash falls into the test share.
"""

import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

if TYPE_CHECKING:
    import datasets

SHAPES = ("sphere", "cube", "cylinder", "cone")
SIZES = {"small": 0.66, "large": 1.0}  # half the width
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
# Few lights, tables, walls and turns: what no sentence speaks of must not outweigh, in the loss, what it speaks of.
LIGHT_AZIMUTHS = (-0.8, 0.8)  # radians
YAWS = (0.0, math.pi / 8, math.pi / 4, 3 * math.pi / 8)
LIGHT_ELEVATION = 0.9

FOCAL_LENGTH = 2.9  # in halves of the picture's shorter side
CAMERA_HEIGHT = 3.4
TARGET = (0.5, 7.2)  # (y, z) of the point that the camera looks at
PITCH = math.atan2(CAMERA_HEIGHT - TARGET[0], TARGET[1])  # downward, radians
NEAR, FAR = 4.0, 14.0  # depth range of the depth map, in table units

# One combination of shape, color and size for each color, two for each shape: seen in the test split only.
HELD_OUT = frozenset((SHAPES[i % 4], color, ("small", "large")[(i // 4 + i) % 2]) for i, color in enumerate(COLORS))


@dataclass(frozen=True)
class SceneObject:
    shape: str
    color: str
    size: str
    x: float
    z: float
    yaw: float  # radians; matters for cubes only

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def height(self) -> float:
        return 2.3 * self.radius if self.shape == "cone" else 2 * self.radius * (0.85 if self.shape == "cube" else 1)

    @property
    def combination(self) -> tuple[str, str, str]:
        return (self.shape, self.color, self.size)


@dataclass(frozen=True)
class Scene:
    """Objects, left to right, and how they are seen. Everything that the renderer and the captions need."""

    objects: tuple[SceneObject, ...]
    table: str
    wall: int
    light_azimuth: float  # radians, 0 is from the viewer, positive from the right


@dataclass(frozen=True)
class Caption:
    """A sentence and what it commits to. `None` marks an attribute that the sentence leaves open.

    `mentions`: (count, shape, color, size) for each phrase; `relation`: (index, word, index) into `mentions`.
    """

    text: str
    mentions: tuple[tuple[int, str | None, str | None, str | None], ...]
    relation: tuple[int, str, int] | None = None


@dataclass
class Rendering:
    """A batch of rendered scenes, all of one size.

    Attributes:
        rgb: float in [0, 1], `(batch, height, width, 3)`.
        depth: distance along the viewing axis in table units, float `(batch, height, width)`, at most `FAR`.
        normals: unit vectors in camera axes (x right, y up, z toward the viewer), `(batch, height, width, 3)`.
        segmentation: 0 for the background, else 1 + the object's index in its scene, long `(batch, height, width)`.
    """

    rgb: torch.Tensor
    depth: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    normals: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    segmentation: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def outline(self) -> torch.Tensor:
        """Edges of the objects, bool `(batch, height, width)`."""
        seg = self.segmentation
        edge = torch.zeros_like(seg, dtype=torch.bool)
        edge[:, :, 1:] |= seg[:, :, 1:] != seg[:, :, :-1]
        edge[:, 1:, :] |= seg[:, 1:, :] != seg[:, :-1, :]
        return edge

    def boxes(self, row: int) -> list[tuple[int, int, int, int]]:
        """Pixel boxes (left, top, right, bottom), ends excluded, of the visible part of each object of scene `row`."""
        boxes = []
        for index in range(1, int(self.segmentation[row].max()) + 1):
            ys, xs = torch.nonzero(self.segmentation[row] == index, as_tuple=True)
            boxes.append(
                (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else (0, 0, 0, 0)
            )
        return boxes


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_scene(
    rng: random.Random, width_px: int, height_px: int, num_objects: int | None = None, split: str = "train"
) -> Scene:
    """Draws a scene whose objects all lie inside a picture of that shape, apart, and mostly visible.

    Args:
        num_objects: 1 to 4; drawn if None.
        split: "train" has no held-out combination, "test" at least one, "any" whatever comes.
    """
    if split not in ("train", "test", "any"):
        raise ValueError(f"split is {split!r}; accepted are 'train', 'test' and 'any'.")
    count = num_objects or rng.choices((1, 2, 3, 4), weights=(3, 4, 2, 2))[0]
    if not 1 <= count <= 4:
        raise ValueError(f"num_objects is {num_objects}; a scene holds 1 to 4 objects.")
    while True:
        combinations = _sample_combinations(rng, count)
        held_out = sum(c in HELD_OUT for c in combinations)
        if (split == "train" and held_out) or (split == "test" and not held_out):
            continue
        objects = _place(rng, combinations, width_px, height_px)
        if objects is not None:
            break
    return Scene(
        objects=tuple(sorted(objects, key=lambda o: o.x / o.z)),
        table=rng.choice(list(TABLES)),
        wall=rng.randrange(len(WALLS)),
        light_azimuth=rng.choice(LIGHT_AZIMUTHS),
    )


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


def _place(rng, combinations, width_px, height_px) -> list[SceneObject] | None:
    """Positions by rejection: in the frame, apart on the table, and not hidden behind one another."""
    half_w, half_h = width_px / min(width_px, height_px), height_px / min(width_px, height_px)
    objects: list[SceneObject] = []
    boxes: list[tuple[float, float, float, float]] = []
    for _ in range(30 * len(combinations)):
        shape, color, size = combinations[len(objects)]
        z = rng.uniform(5.2, 8.8)
        reach = max(half_w * z / FOCAL_LENGTH - SIZES[size], 0.05)
        candidate = SceneObject(shape, color, size, rng.uniform(-reach, reach), z, rng.choice(YAWS))
        if not all(_apart(candidate, o) for o in objects):
            continue
        box = _projected_box(candidate)
        inside = (
            -0.96 * half_w < box[0] and box[2] < 0.96 * half_w and -0.96 * half_h < box[1] and box[3] < 0.96 * half_h
        )
        if inside and all(_visible(candidate, box, o, b) for o, b in zip(objects, boxes, strict=True)):
            objects.append(candidate)
            boxes.append(box)
            if len(objects) == len(combinations):
                return objects
    return None


def _apart(a: SceneObject, b: SceneObject) -> bool:
    return math.hypot(a.x - b.x, a.z - b.z) >= 1.25 * (a.radius + b.radius)


def _visible(a: SceneObject, box_a, b: SceneObject, box_b) -> bool:
    width = min(box_a[2], box_b[2]) - max(box_a[0], box_b[0])
    height = min(box_a[3], box_b[3]) - max(box_a[1], box_b[1])
    hidden = box_a if a.z > b.z else box_b
    return max(width, 0) * max(height, 0) < 0.2 * (hidden[2] - hidden[0]) * (hidden[3] - hidden[1])


def _project(x: float, y: float, z: float) -> tuple[float, float]:
    """Picture coordinates in halves of the shorter side, (right, up) from the center."""
    cos, sin = math.cos(PITCH), math.sin(PITCH)
    depth = z * cos - (y - CAMERA_HEIGHT) * sin
    return FOCAL_LENGTH * x / depth, FOCAL_LENGTH * ((y - CAMERA_HEIGHT) * cos + z * sin) / depth


def _projected_box(o: SceneObject) -> tuple[float, float, float, float]:
    """Box of the object's bounding cylinder in picture coordinates (left, bottom, right, top)."""
    radius = o.radius * (1.2 if o.shape == "cube" else 1.0)
    points = [
        _project(o.x + dx * radius, y, o.z + dz * radius)
        for dx, dz in ((-1, 0), (1, 0), (0, -1), (0, 1))
        for y in (0.0, o.height)
    ]
    us, vs = zip(*points, strict=True)
    return min(us), min(vs), max(us), max(vs)


# --- sentences -------------------------------------------------------------------------------------------------------

OPENINGS = ("", "", "", "a picture of ", "a photo of ", "there is ", "an image showing ")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
RELATION_MARGIN = {"x": 0.55, "z": 1.0}  # table units by which objects must differ before a sentence compares them


def describe(scene: Scene, rng: random.Random, split: str = "train") -> Caption:
    """A sentence that names every object of the scene, in varied wording and detail; lists go from left to right.

    Sentences of the train and the test split never coincide. ValueError if this scene has none in its split.
    """
    for _ in range(100):
        caption = _describe(scene, rng)
        if split == "any" or in_test_split(caption.text) == (split == "test"):
            return caption
    raise ValueError(f"the scene has no sentence in the {split} split")


def sample_described_scene(rng: random.Random, width_px: int, height_px: int, split: str) -> tuple[Scene, Caption]:
    """A scene that has a sentence in the split, and that sentence."""
    while True:
        scene = sample_scene(rng, width_px, height_px, split=split)
        try:
            return scene, describe(scene, rng, split)
        except ValueError:
            continue


def in_test_split(sentence: str) -> bool:
    """One sentence in sixteen, by its hash."""
    return hashlib.sha256(sentence.encode()).digest()[0] % 16 == 0


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
    return Caption(opening + caption.text + place + rng.choice(("", ".")), caption.mentions, caption.relation)


def _list_sentence(scene: Scene, rng: random.Random) -> Caption:
    repeated = len({o.shape for o in scene.objects}) < len(scene.objects)
    sized, colored = rng.random() < 0.5, repeated or rng.random() < 0.8
    mentions = [(1, o.shape, o.color if colored else None, o.size if sized else None) for o in scene.objects]
    return Caption(_join([_phrase(m) for m in mentions]), tuple(mentions))


def _counting_sentence(scene: Scene, rng: random.Random) -> Caption:
    """Groups of equal shape and color: "two red cubes and a blue sphere"."""
    sized = rng.random() < 0.3
    groups: dict[tuple, int] = {}
    for o in scene.objects:
        key = (o.shape, o.color, o.size if sized else None)
        groups[key] = groups.get(key, 0) + 1
    mentions = [(count, *key) for key, count in groups.items()]
    return Caption(_join([_phrase(m) for m in mentions]), tuple(mentions))


def _shape_counting_sentence(scene: Scene, rng: random.Random) -> Caption:
    mention = (len(scene.objects), scene.objects[0].shape, None, None)
    return Caption(_phrase(mention), (mention,))


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
    named = _list_sentence(scene, rng).mentions
    article = rng.choice(("", "to the ")) if word in ("left of", "right of") else ""
    text = f"{_phrase(named[first])} {article}{word} {_phrase(named[second])}"
    return Caption(text, (named[first], named[second]), (0, word, 1))


def _phrase(mention: tuple[int, str | None, str | None, str | None]) -> str:
    count, shape, color, size = mention
    words = [w for w in (size, color, shape or "object") if w]
    if count > 1:
        return " ".join([NUMBER_WORDS[count], *words]) + "s"
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def parse(sentence: str) -> Caption:
    """Reads a sentence as `describe` writes them, for what it commits to. ValueError for any other."""
    body = sentence.strip().lower().removesuffix(".")
    body = re.sub(rf"^(?:{'|'.join(filter(None, OPENINGS))}|there are )| on a (?:{'|'.join(TABLES)}) table$", "", body)
    related = re.fullmatch(r"(.+?) ((?:to the )?(?:left|right) of|in front of|behind) (.+)", body)
    mentions = tuple(map(_read_phrase, related.group(1, 3) if related else re.split(", and | and |, ", body)))
    readable = [mention for mention in mentions if mention]
    num_objects = sum(count for count, *_ in readable)
    if len(readable) < len(mentions) or num_objects > (2 if related else 4):
        raise ValueError(
            f"{sentence!r} is no sentence of the Tabletop world; those name one to four objects, "
            "such as 'two red cubes and a small sphere' or 'a red cube left of a sphere'"
        )
    return Caption(sentence, tuple(readable), (0, related[2].removeprefix("to the "), 1) if related else None)


def _read_phrase(phrase: str) -> tuple[int, str | None, str | None, str | None] | None:
    """The inverse of `_phrase`; None if there is none."""
    one_or_more = rf"(?:an?|one|({'|'.join(NUMBER_WORDS[2:])}))"
    size, color, shape = (f"({'|'.join(words)})" for words in (SIZES, COLORS, (*SHAPES, "object")))
    match = re.fullmatch(rf"{one_or_more} (?:{size} )?(?:{color} )?{shape}(s?)", phrase)
    if match is None or bool(match[1]) != bool(match[5]):
        return None
    return NUMBER_WORDS.index(match[1] or "one"), None if match[4] == "object" else match[4], match[3], match[2]


def edit(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """An instruction and the scene after it: one object removed or given another color."""
    index = rng.randrange(len(scene.objects))
    target = scene.objects[index]
    name = f"the {target.color} {target.shape}"
    if len(scene.objects) > 1 and rng.random() < 0.5:
        objects = scene.objects[:index] + scene.objects[index + 1 :]
        return f"Remove {name}.", replace(scene, objects=objects)
    color = rng.choice([c for c in COLORS if c != target.color])
    objects = (*scene.objects[:index], replace(target, color=color), *scene.objects[index + 1 :])
    return f"Make {name} {color}.", replace(scene, objects=objects)


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer."""
    shapes = [o.shape for o in scene.objects]
    single = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if single and rng.random() < 0.6:
        asked = rng.choice(single)
        return f"What color is the {asked.shape}?", asked.color
    if rng.random() < 0.5:
        return "How many objects are there?", NUMBER_WORDS[len(shapes)]
    shape = rng.choice(SHAPES)
    return f"How many {shape}s are there?", NUMBER_WORDS[shapes.count(shape)]


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


# --- rendering -------------------------------------------------------------------------------------------------------


def render(scenes: Sequence[Scene], width_px: int, height_px: int, maps: bool = False) -> Rendering:
    """Renders scenes at one size, with 2 x 2 samples a pixel for RGB and one at the pixel's center for the maps.

    Each of the four samples looks at another point of the light, which makes the shadows soft.
    """
    rgb = torch.zeros(len(scenes), height_px, width_px, 3)
    for sample, (dx, dy) in enumerate(((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))):
        origin, directions = _rays(scenes, width_px, height_px, dx, dy)
        rgb += 0.25 * _shade(scenes, origin, directions, sample).view(rgb.shape)
    if not maps:
        return Rendering(rgb.clamp(0, 1))
    origin, directions = _rays(scenes, width_px, height_px, 0.5, 0.5)
    depth, normals, segmentation = _maps(scenes, origin, directions)
    shape = (len(scenes), height_px, width_px)
    return Rendering(rgb.clamp(0, 1), depth.view(shape), normals.view(*shape, 3), segmentation.view(shape))


def _rays(scenes, width_px, height_px, dx, dy) -> tuple[torch.Tensor, torch.Tensor]:
    """Camera position `(3,)` and unit directions `(batch, pixels, 3)`."""
    half = min(width_px, height_px) / 2
    u = (torch.arange(width_px) + dx - width_px / 2) / half
    v = (height_px / 2 - torch.arange(height_px) - dy) / half
    v, u = torch.meshgrid(v, u, indexing="ij")
    camera = torch.stack([u, v, torch.full_like(u, FOCAL_LENGTH)], -1).view(1, -1, 3)
    directions = torch.nn.functional.normalize(camera @ _camera_to_world().T, dim=-1)
    return torch.tensor([0.0, CAMERA_HEIGHT, 0.0]), directions.expand(len(scenes), -1, -1)


def _camera_to_world() -> torch.Tensor:
    cos, sin = math.cos(PITCH), math.sin(PITCH)
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])


def _light_directions(scenes: Sequence[Scene], sample: int) -> torch.Tensor:
    """Unit vectors toward the light `(batch, 1, 3)`; the four samples are the corners of a square lamp."""
    azimuth = torch.tensor([s.light_azimuth for s in scenes]) + (0.09, -0.09, -0.05, 0.05)[sample]
    elevation = torch.full_like(azimuth, LIGHT_ELEVATION + (0.05, -0.05, 0.09, -0.09)[sample])
    return torch.stack([elevation.cos() * azimuth.sin(), elevation.sin(), -elevation.cos() * azimuth.cos()], -1)[
        :, None
    ]


def _shade(scenes, origin, directions, sample) -> torch.Tensor:
    """Colors `(batch, pixels, 3)`: Lambert shading, a soft highlight, cast shadow, darkening where objects stand."""
    distance, normals, index = _intersect(scenes, origin, directions)
    light = _light_directions(scenes, sample)
    points = origin + directions * distance[..., None].clamp(max=60.0)
    on_table = (index == 0) & (directions[..., 1] < 0)
    lit = ~_occluded(scenes, points + 1e-3 * normals, light.expand_as(points))
    lit = lit | ((index == 0) & ~on_table)

    albedo = _albedo(scenes, index, points)
    diffuse = (normals * light).sum(-1).clamp(min=0) * lit
    halfway = torch.nn.functional.normalize(light - directions, dim=-1)
    highlight = (normals * halfway).sum(-1).clamp(min=0) ** 30 * lit * (index > 0)
    ambient = 0.42 + 0.10 * normals[..., 1]
    ambient = ambient * torch.where(on_table, _contact_shadow(scenes, points), 1.0)
    color = albedo * (ambient + 0.62 * diffuse)[..., None] + 0.28 * highlight[..., None]
    walls = torch.tensor([WALLS[s.wall] for s in scenes])[:, None]
    fade = ((points[..., 2] - 9.5) / 6.0).clamp(0, 1) * on_table + ((index == 0) & ~on_table)
    fade = (fade * fade * (3 - 2 * fade))[..., None]
    return color * (1 - fade) + walls * fade


def _albedo(scenes, index, points) -> torch.Tensor:
    palette = torch.zeros(len(scenes), 5, 3)
    for row, scene in enumerate(scenes):
        palette[row, 0] = torch.tensor(TABLES[scene.table])
        for slot, o in enumerate(scene.objects):
            palette[row, slot + 1] = torch.tensor(COLORS[o.color])
    return palette.gather(1, index[..., None].expand(-1, -1, 3))


def _contact_shadow(scenes, points) -> torch.Tensor:
    shade = torch.ones(points.shape[:2])
    for row, scene in enumerate(scenes):
        for o in scene.objects:
            squared = (points[row, :, 0] - o.x) ** 2 + (points[row, :, 2] - o.z) ** 2
            shade[row] *= 1 - 0.6 * torch.exp(-squared / (1.1 * o.radius) ** 2)
    return shade


def _maps(scenes, origin, directions):
    distance, normals, index = _intersect(scenes, origin, directions)
    rotation = _camera_to_world()
    depth = (distance * (directions * rotation[:, 2]).sum(-1)).clamp(max=FAR)
    camera_normals = normals @ rotation * torch.tensor([1.0, 1.0, -1.0])
    toward_viewer = torch.tensor([0.0, 0.0, 1.0]).expand_as(camera_normals)
    camera_normals = torch.where((distance < 60.0)[..., None], camera_normals, toward_viewer)
    return depth, camera_normals, index


def _intersect(scenes, origin, directions):
    """Nearest hit of each ray: distance `(batch, rays)` (inf: none), normal, and 1 + object index (0: no object)."""
    batch, rays = directions.shape[:2]
    down = directions[..., 1]
    table = torch.where(down < -1e-6, -origin[..., 1] / down.clamp(max=-1e-6), torch.inf)
    distances = torch.full((batch, 5, rays), torch.inf)
    distances[:, 0] = table
    normals = torch.zeros(batch, 5, rays, 3)
    normals[:, 0, :, 1] = 1.0
    for rows, slots, t, n in _object_hits(scenes, origin.expand_as(directions), directions):
        distances[rows, slots] = t
        normals[rows, slots] = n
    distance, index = distances.min(1)
    normal = normals.gather(1, index[:, None, :, None].expand(-1, 1, -1, 3))[:, 0]
    return distance, normal, index


def _occluded(scenes, points, directions) -> torch.Tensor:
    blocked = torch.zeros(points.shape[:2], dtype=torch.bool)
    for rows, _, t, _ in _object_hits(scenes, points, directions):
        blocked.index_put_((rows,), torch.isfinite(t), accumulate=True)
    return blocked


def _object_hits(
    scenes, origins, directions
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each shape: scene rows, object slots (from 1), distances `(objects, rays)` and world normals."""
    for shape, hit in _HITS.items():
        found = [
            (r, s + 1, o) for r, scene in enumerate(scenes) for s, o in enumerate(scene.objects) if o.shape == shape
        ]
        if not found:
            continue
        rows = torch.tensor([r for r, _, _ in found])
        slots = torch.tensor([s for _, s, _ in found])
        center = torch.tensor([[o.x, 0.0, o.z] for _, _, o in found])[:, None]
        radius = torch.tensor([o.radius for _, _, o in found])[:, None]
        height = torch.tensor([o.height for _, _, o in found])[:, None]
        turn = torch.stack([_turn(o.yaw) for _, _, o in found])
        t, normals = hit((origins[rows] - center) @ turn, directions[rows] @ turn, radius, height)
        yield rows, slots, t, normals @ turn.mT


def _turn(yaw: float) -> torch.Tensor:
    cos, sin = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])


def _first_root(a, b, c):
    """Nearest root of a t^2 + 2 b t + c = 0 (inf for none) and the other one."""
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    near, far = (-b - root) / a, (-b + root) / a
    miss = discriminant < 0
    return near.masked_fill(miss, torch.inf), far.masked_fill(miss, torch.inf)


def _hit_sphere(o, d, radius, height):
    o = o - torch.stack([torch.zeros_like(radius), radius, torch.zeros_like(radius)], -1)
    t, _ = _first_root((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - radius**2)
    t = t.masked_fill(t < 1e-3, torch.inf)
    return t, _finite_normal(o + d * t[..., None], t)


def _hit_cube(o, d, radius, height):
    """Slabs of a box of half-width 0.85 radius, so that its diagonal is not much wider than a sphere."""
    half = torch.stack([0.85 * radius, height / 2, 0.85 * radius], -1)
    o = o - torch.stack([torch.zeros_like(radius), height / 2, torch.zeros_like(radius)], -1)
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    near = -o * inverse - half * inverse.abs()
    far = (-o * inverse + half * inverse.abs()).amin(-1)
    t, axis = near.max(-1)
    t = t.masked_fill((t > far) | (t < 1e-3), torch.inf)
    normal = torch.zeros_like(d).scatter(-1, axis[..., None], -d.gather(-1, axis[..., None]).sign())
    return t, normal


def _hit_cylinder(o, d, radius, height):
    a = (d[..., 0] ** 2 + d[..., 2] ** 2).clamp(min=1e-9)
    b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2]
    c = o[..., 0] ** 2 + o[..., 2] ** 2 - radius**2
    side, _ = _first_root(a, b, c)
    y = o[..., 1] + side * d[..., 1]
    side = side.masked_fill((side < 1e-3) | (y < 0) | (y > height), torch.inf)
    lid = (height - o[..., 1]) / torch.where(d[..., 1].abs() < 1e-9, 1e-9, d[..., 1])
    on_lid = (o[..., 0] + lid * d[..., 0]) ** 2 + (o[..., 2] + lid * d[..., 2]) ** 2 < radius**2
    lid = lid.masked_fill((lid < 1e-3) | ~on_lid, torch.inf)
    t = torch.minimum(side, lid)
    point = o + d * t[..., None]
    around = _finite_normal(point * torch.tensor([1.0, 0.0, 1.0]), t)
    up = torch.tensor([0.0, 1.0, 0.0]).expand_as(around)
    return t, torch.where((lid < side)[..., None], up, around)


def _hit_cone(o, d, radius, height):
    """x^2 + z^2 = k^2 (height - y)^2 below the apex, k = radius / height."""
    k2 = (radius / height) ** 2
    below = height - o[..., 1]
    a = d[..., 0] ** 2 + d[..., 2] ** 2 - k2 * d[..., 1] ** 2
    a = torch.where(a.abs() < 1e-9, 1e-9, a)
    b = o[..., 0] * d[..., 0] + o[..., 2] * d[..., 2] + k2 * below * d[..., 1]
    c = o[..., 0] ** 2 + o[..., 2] ** 2 - k2 * below**2
    best = torch.full_like(a, torch.inf)
    for t in _first_root(a, b, c):
        y = o[..., 1] + t * d[..., 1]
        best = torch.minimum(best, t.masked_fill((t < 1e-3) | (y < 0) | (y > height), torch.inf))
    point = o + d * best[..., None]
    normal = torch.stack([point[..., 0], k2 * (height - point[..., 1]), point[..., 2]], -1)
    return best, _finite_normal(normal, best)


def _finite_normal(vector, t) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.where(torch.isfinite(t)[..., None], vector, 0.0), dim=-1)


_HITS = {"sphere": _hit_sphere, "cube": _hit_cube, "cylinder": _hit_cylinder, "cone": _hit_cone}


# --- pictures of the maps --------------------------------------------------------------------------------------------


def to_image(rgb: torch.Tensor) -> Image.Image:
    """Float `(height, width, 3)` in [0, 1] to PIL."""
    return Image.fromarray((rgb * 255).round().to(torch.uint8).numpy())


def depth_image(depth: torch.Tensor) -> torch.Tensor:
    """Depth `(height, width)` to gray RGB in [0, 1], near is bright: linear in depth between NEAR and FAR."""
    return ((FAR - depth) / (FAR - NEAR)).clamp(0, 1)[..., None].expand(*depth.shape, 3)


def normal_image(normals: torch.Tensor) -> torch.Tensor:
    """Unit normals in camera axes to RGB in [0, 1]: (n + 1) / 2."""
    return (normals + 1) / 2


SEGMENT_COLORS = {
    "background": (0.0, 0.0, 0.0),
    "sphere": (1.0, 0.2, 0.2),
    "cube": (0.2, 0.9, 0.2),
    "cylinder": (0.25, 0.35, 1.0),
    "cone": (1.0, 0.9, 0.1),
}


def segmentation_image(segmentation: torch.Tensor, scene: Scene) -> torch.Tensor:
    """Object indices `(height, width)` to RGB in [0, 1]: one color of `SEGMENT_COLORS` for each shape."""
    palette = torch.tensor([SEGMENT_COLORS["background"], *(SEGMENT_COLORS[o.shape] for o in scene.objects)])
    return palette[segmentation]


# --- datasets --------------------------------------------------------------------------------------------------------


MAPS = ("depth", "normal", "segmentation")
RENDER_BATCH = 32


def tabletop_records(
    indices: Sequence[int], sizes: Sequence[tuple[int, int]], seed: int = 0, split: str = "train", maps: bool = True
) -> Iterator[dict]:
    """Rendered scenes as plain records; record i depends on (seed, split, i) and `sizes` alone.

    Args:
        sizes: (width_px, height_px) to choose from.
        maps: also give "depth", "normal", "segmentation", "edited" and "outline" pictures, and "boxes".

    Yields:
        "image" (PIL), "caption", "question", "answer", "instruction", "scene" (a `Scene`), and the maps (PIL).
    """
    for start in range(0, len(indices), RENDER_BATCH):
        yield from _render_records(indices[start : start + RENDER_BATCH], sizes, seed, split, maps)


def _render_records(indices, sizes, seed, split, maps) -> list[dict]:
    records: list[dict[str, Any]] = []
    by_size: dict[tuple[int, int], list[dict]] = {}
    for index in indices:
        rng = random.Random(f"{seed}/{split}/{index}")
        width_px, height_px = size = rng.choice(sizes)
        scene, caption = sample_described_scene(rng, width_px, height_px, split)
        record: dict[str, Any] = {"scene": scene, "caption": caption.text}
        record["question"], record["answer"] = question(scene, rng)
        record["instruction"], record["edited_scene"] = edit(scene, rng)
        records.append(record)
        by_size.setdefault(size, []).append(record)
    for size, group in by_size.items():
        rendering = render([r["scene"] for r in group], *size, maps)
        edited = render([r["edited_scene"] for r in group], *size) if maps else None
        for row, record in enumerate(group):
            record["image"] = to_image(rendering.rgb[row])
            if edited is not None:
                record["depth"] = to_image(depth_image(rendering.depth[row]))
                record["normal"] = to_image(normal_image(rendering.normals[row]))
                record["segmentation"] = to_image(segmentation_image(rendering.segmentation[row], record["scene"]))
                record["edited"] = to_image(edited.rgb[row])
                record["outline"] = to_image(rendering.outline[row].float()[..., None].expand(-1, -1, 3))
                record["boxes"] = rendering.boxes(row)
    return records


def tabletop_dataset(
    num_scenes: int, sizes: Sequence[tuple[int, int]], seed: int = 0, split: str = "train", maps: bool = False
) -> "datasets.Dataset":
    """The first records as a `datasets.Dataset`, rendered once and cached by `datasets`.

    Columns: "image", "caption", "question", "answer", "instruction", "objects" (`SceneObject` fields, from left to
    right); with `maps` also the pictures `MAPS`, "edited", "outline", and "boxes" (left, top, right, bottom; pixels).
    """
    import datasets

    def rows() -> Iterator[dict]:
        for record in tabletop_records(range(num_scenes), sizes, seed, split, maps):
            objects = [asdict(o) for o in record.pop("scene").objects]
            record.pop("edited_scene")
            yield {**record, "objects": objects}

    texts, pictures = ("caption", "question", "answer", "instruction"), (*MAPS, "edited", "outline") if maps else ()
    words, numbers = ("shape", "color", "size"), ("x", "z", "yaw")
    solid = {**dict.fromkeys(words, datasets.Value("string")), **dict.fromkeys(numbers, datasets.Value("float64"))}
    columns = {
        **dict.fromkeys(("image", *pictures), datasets.Image()),
        **dict.fromkeys(texts, datasets.Value("string")),
        "objects": datasets.List(solid),
        **({"boxes": datasets.List(datasets.List(datasets.Value("int32"), length=4))} if maps else {}),
    }
    return datasets.Dataset.from_generator(rows, features=datasets.Features(columns))


def tabletop_texts(num_scenes: int = 4000, seed: int = 0) -> list[str]:
    """The world's language, to train a tokenizer on: captions, questions, answers and instructions."""
    texts: list[str] = []
    for index in range(num_scenes):
        rng = random.Random(f"{seed}/train/{index}")
        scene = sample_scene(rng, 64, 64)
        texts += [describe(scene, rng).text, *question(scene, rng), edit(scene, rng)[0]]
    return texts

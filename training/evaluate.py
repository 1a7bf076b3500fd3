"""Scores a model on Tabletop in GenEval's six categories (arXiv 2310.11513), by a judge without a neural network.

    lumina-mgpt evaluate --output-dir runs/tabletop/scores

The judge finds objects in three steps. Each pixel takes the name of the nearest color that the renderer can make: a
palette color under some shading and highlight, or a table or a wall. Connected pixels of one color are one object,
unless their outline is not convex, as every solid's is: then they are cut where the parts become most convex. The
shape is a vote of known objects, weighted by likeness: kernel ridge regression over 8 x 8 thumbnails of silhouette,
shading and surroundings. Known objects come from training scenes rendered sharp, blurred and mirrored, anew in each
process. Before the scores, the judge is validated on true renders of the very scenes that the sentences are about.

As in GenEval, a stray object fails a picture in counting only, where the number of objects that match must be exact.
Sizes in words are not judged: in one picture a small near object and a large far one may look alike.
"""

import itertools
import json
import math
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage
from scipy.interpolate import RBFInterpolator
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull, QhullError, cKDTree
from tqdm.auto import tqdm

from .tabletop import (
    COLORS,
    HELD_OUT,
    SHAPES,
    TABLES,
    WALLS,
    Caption,
    Scene,
    describe,
    render,
    sample_scene,
    split_of_sentence,
    to_image,
)

if TYPE_CHECKING:
    from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
REQUIRED_VALIDATION = 0.98
MIN_AREA = 0.005  # of the square of the shorter side: less is noise, the smallest object has three times as much
MAX_HOLLOW = 0.05  # share of missing hull above which a region is more than one object
GROUND = {"sphere": 0.03, "cube": 0.2, "cylinder": 0.19, "cone": 0.19}  # lower edge to the base's middle, in widths

Draw = Callable[[list[str], list[int]], list[Image.Image]]


@dataclass(frozen=True)
class Detection:
    """One object that the judge sees. Pixels; box ends excluded; `ground_px` is the row of the base's middle."""

    shape: str
    color: str
    box: tuple[int, int, int, int]
    center: tuple[float, float]
    ground_px: float


@dataclass(frozen=True)
class Example:
    """A held-out sentence, the scene that it was said of, and the seed for its picture."""

    category: str
    caption: Caption
    scene: Scene
    seed: int


# --- the judge -------------------------------------------------------------------------------------------------------


def judge(image: Image.Image) -> list[Detection]:
    """The objects in a picture, from left to right."""
    regions, foreground = find_regions(image)
    if not regions:
        return []
    features = np.stack([_features(image, mask, foreground) for _, mask in regions])
    shapes = [SHAPES[i] for i in _fit_shapes()(features).argmax(1)]
    found = [_detection(shape, color, mask) for shape, (color, mask) in zip(shapes, regions, strict=True)]
    return sorted(found, key=lambda d: d.center[0])


def _detection(shape: str, color: str, mask: np.ndarray) -> Detection:
    (top, bottom), (left, right) = _extent(mask)
    ground_px = bottom - GROUND[shape] * (right - left)
    return Detection(shape, color, (left, top, right, bottom), ((left + right) / 2, (top + bottom) / 2), ground_px)


def _extent(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def find_regions(image: Image.Image) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Color and mask of each object, and the mask of all of them; masks are bool `(height, width)`."""
    labels = look_up(image, _nearest_names())
    min_area = MIN_AREA * min(labels.shape) ** 2
    whole = [
        (i, part) for i in range(1, len(COLORS) + 1) for part in _connected(labels == i) if part.sum() >= min_area
    ]
    foreground = np.any([part for _, part in whole], axis=0) if whole else np.zeros(labels.shape, bool)
    regions = []
    for i, region in whole:
        others = ndimage.binary_dilation(foreground & (labels != i))  # with the mixed pixels at their edge
        filled = ndimage.binary_fill_holes(region | ndimage.binary_closing(region, np.ones((3, 3))))
        parts = _convex_parts(filled, others, min_area)
        regions += [(list(COLORS)[i - 1], part) for part in parts]
    return regions, foreground


def _connected(mask: np.ndarray) -> Iterator[np.ndarray]:
    labels, count = ndimage.label(mask)
    for i in range(1, count + 1):
        yield labels == i


@cache
def _nearest_names() -> np.ndarray:
    """uint8 `(32, 32, 32)`, by the high bits of red, green, blue: 0 for background, else 1 + palette index."""
    samples, labels = [], []
    for i, color in enumerate(COLORS.values(), 1):
        for shading, highlight in itertools.product(np.linspace(0.25, 1.16, 15), np.linspace(0, 0.28, 5)):
            if highlight == 0 or shading >= 0.6:
                samples.append(np.array(color) * shading + highlight)
                labels.append(i)
    for table, wall in itertools.product(TABLES.values(), WALLS):
        for shading, fade in itertools.product(np.linspace(0.1, 1.16, 18), np.linspace(0, 1, 5)):
            samples.append(np.array(table) * shading * (1 - fade) + np.array(wall) * fade)
            labels.append(0)
    return nearest_labels(samples, np.array(labels, np.uint8))


def nearest_labels(colors: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Of any color, by the high bits of R, G, B: the label of the nearest of `colors` in [0, 1]; `(32, 32, 32)`."""
    grid = (np.indices((32, 32, 32)).reshape(3, -1).T + 0.5) / 32
    _, nearest = cKDTree(np.clip(colors, 0, 1)).query(grid)
    return labels[nearest].reshape(32, 32, 32)


def look_up(picture: Image.Image, labels: np.ndarray) -> np.ndarray:
    """Labels `(height, width)` of a picture's pixels, by a table of `nearest_labels`."""
    pixels = np.asarray(picture.convert("RGB")) >> 3
    return labels[pixels[..., 0], pixels[..., 1], pixels[..., 2]]


def _convex_parts(mask: np.ndarray, others: np.ndarray, min_area: float, max_cuts: int = 3) -> Iterator[np.ndarray]:
    """The region, or its parts if it is hollow; what `others` cover is not missing."""
    cut = _best_cut(mask, min_area) if max_cuts and _hollow(mask, others) > MAX_HOLLOW else None
    if cut is None:
        yield mask
        return
    for part in (cut, mask & ~cut):
        largest = max(_connected(part), key=np.count_nonzero)
        if largest.sum() >= min_area:
            yield from _convex_parts(largest, others, min_area, max_cuts - 1)


def _hollow(mask: np.ndarray, others: np.ndarray) -> float:
    """The part of the convex hull that belongs to nothing, as a share of the region's area."""
    try:
        edges = ConvexHull(np.argwhere(mask)).equations  # (edges, 3)
    except QhullError:  # a straight line
        return 0.0
    points = np.indices(mask.shape)
    inside = (np.tensordot(edges[:, :2], points, 1) + edges[:, 2, None, None] <= 1e-9).all(0)
    return float((inside & ~mask & ~others).sum() / mask.sum())


def _best_cut(mask: np.ndarray, min_area: float) -> np.ndarray | None:
    """One side of the straight cut that leaves the smallest hulls; None if no cut makes them clearly smaller."""
    points, border = np.argwhere(mask), np.argwhere(mask & ~ndimage.binary_erosion(mask))
    best, best_area = None, _hull_area(border) - MAX_HOLLOW * len(points)
    for angle in np.arange(12) * math.pi / 12:
        direction = np.array([math.sin(angle), math.cos(angle)])
        along, along_border = points @ direction, border @ direction
        for offset in np.linspace(along.min(), along.max(), 26)[1:-1]:
            if not min_area <= (along < offset).sum() <= len(points) - min_area:
                continue
            area = _hull_area(border[along_border < offset]) + _hull_area(border[along_border >= offset])
            if area < best_area:
                best, best_area = along < offset, area
    if best is None:
        return None
    cut = np.zeros_like(mask)
    cut[tuple(points[best].T)] = True
    return cut


def _hull_area(points: np.ndarray) -> float:
    try:
        return ConvexHull(points).volume
    except QhullError:  # a straight line
        return 0.0


def _features(image: Image.Image, mask: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Thumbnails of the region's box, `(193,)`: silhouette, standardized brightness, others; and proportion."""
    box = tuple(slice(*ends) for ends in _extent(mask))
    inside, others = mask[box], (foreground & ~mask)[box]
    brightness = np.asarray(image.convert("RGB"), np.float32)[box].max(-1)  # for blue, too, this is bright
    mean, deviation = brightness[inside].mean(), brightness[inside].std() + 8  # 8 of 255: what noise alone may do
    shading = np.where(inside, (brightness - mean) / deviation, 0)
    thumbnails = [_thumbnail(layer).ravel() for layer in (inside, 0.9 * shading, 0.5 * others)]
    return np.concatenate([*thumbnails, [2 * math.log(inside.shape[0] / inside.shape[1])]])


def _thumbnail(layer: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(layer.astype(np.float32)).resize((8, 8), Image.Resampling.BOX))


@cache
def _fit_shapes() -> RBFInterpolator:
    rngs = [random.Random(f"judge/{i}") for i in range(300)]
    scenes = [sample_scene(rng, 64, 64, num_objects=rng.choice((2, 3, 4)), split="train") for rng in rngs]
    features, shapes = [], []
    for image, segmentation, scene in true_pictures(scenes, 64, 64):
        for blur in (0.0, 0.8):
            picture = image.filter(ImageFilter.GaussianBlur(blur))
            regions, foreground = find_regions(picture)
            for _, mask in regions:
                index = int(np.bincount(segmentation[mask]).argmax())  # what the region shows most of; 0: no object
                if index:
                    features.append(_features(picture, mask, foreground))
                    features.append(_features(ImageOps.mirror(picture), mask[:, ::-1], foreground[:, ::-1]))
                    shapes += [scene.objects[index - 1].shape] * 2
    votes = np.array([[shape == s for s in SHAPES] for shape in shapes], float)
    likeness = {"kernel": "gaussian", "epsilon": 0.05**0.5, "degree": -1}
    return RBFInterpolator(np.stack(features), votes, smoothing=0.03, **likeness)


def true_pictures(
    scenes: Sequence[Scene], width_px: int, height_px: int
) -> Iterator[tuple[Image.Image, np.ndarray, Scene]]:
    """Picture and segmentation (height, width) of each scene."""
    for start in range(0, len(scenes), 32):
        batch = scenes[start : start + 32]
        rendering = render(batch, width_px, height_px, maps=True)
        for row, scene in enumerate(batch):
            yield to_image(rendering.rgb[row]), rendering.segmentation[row].numpy(), scene


# --- the sentences ---------------------------------------------------------------------------------------------------


def held_out_examples(
    num_per_category: int, width_px: int, height_px: int, seed: int = 0, split: str = "test"
) -> list[Example]:
    """Sentences of the "test" or the "validation" split, which are in no training data, nor in each other's.

    Of the test's, every second is about a scene with a combination of shape, color and size that no other split has;
    the validation's are all of combinations that training has. Example i of a category depends on `seed`, `split` and
    i alone.
    """
    examples, of_scenes = [], scene_splits(split)
    for category in CATEGORIES:
        for i in range(num_per_category):
            rng = random.Random(f"{seed}/{category}/{i}")
            of_scene = of_scenes[i % len(of_scenes)]
            scene, caption = _draw_example(category, rng, width_px, height_px, of_scene, split)
            examples.append(Example(category, caption, scene, rng.getrandbits(32)))
    return examples


def scene_splits(split: str) -> tuple[str, ...]:
    """Where the scenes are from that a split's sentences are about in turn; ValueError for what is not scored by."""
    if split not in (known := {"test": ("train", "test"), "validation": ("validation",)}):
        raise ValueError(f"split {split!r}: accepted are {', '.join(known)}")
    return known[split]


def _draw_example(
    category: str, rng: random.Random, width_px: int, height_px: int, of_scene: str, of_sentence: str
) -> tuple[Scene, Caption]:
    counts = {"single_object": (1,), "colors": (1,), "counting": (2, 3, 4)}.get(category, (2,))
    num_objects = rng.choice(counts)
    while True:
        scene = sample_scene(rng, width_px, height_px, num_objects, of_scene)
        for caption in (describe(scene, rng, split="any") for _ in range(16)):
            if category_of(caption) == category and split_of_sentence(caption.text) == of_sentence:
                return scene, caption


def category_of(caption: Caption) -> str | None:
    """GenEval's category of a sentence, by what it commits to; None for sentences that mix several."""
    if caption.relation:
        return "position"
    counts, colors = [m[0] for m in caption.mentions], [m[2] for m in caption.mentions]
    if len(counts) == 1:
        return "counting" if counts[0] > 1 else "colors" if colors[0] else "single_object"
    if counts != [1, 1]:
        return None
    if colors == [None, None]:
        return "two_objects"
    return "color_attribution" if all(colors) and colors[0] != colors[1] else None


# --- the scores ------------------------------------------------------------------------------------------------------


def passes(caption: Caption, detections: Sequence[Detection]) -> bool:
    """Whether the picture holds what the sentence names: distinct objects, their exact number, a pair so related."""
    if len(caption.mentions) == 1 and caption.mentions[0][0] > 1:
        return sum(_matches(caption.mentions[0], d) for d in detections) == caption.mentions[0][0]
    wanted = [mention for mention in caption.mentions for _ in range(mention[0])]
    return any(
        all(map(_matches, wanted, chosen)) and (caption.relation is None or _holds(caption.relation, chosen))
        for chosen in itertools.permutations(detections, len(wanted))
    )


def grade(caption: Caption, detections: Sequence[Detection]) -> float:
    """1 for a picture that passes, else the share of what the sentence names that is there, which is less.

    The shape or the color alone is half an object; a relation is as much as an object, and so, in counting, is each
    object too many.
    """
    if passes(caption, detections):
        return 1.0
    wanted = [mention for mention in caption.mentions for _ in range(mention[0])]
    likeness = np.array([[(m[1] in (None, d.shape)) + (m[2] in (None, d.color)) for d in detections] for m in wanted])
    found = likeness[linear_sum_assignment(likeness, maximize=True)].sum() / 2  # (wanted, seen) -> ()
    is_count = len(caption.mentions) == 1 and len(wanted) > 1
    num_too_many = max(0, sum(_matches(wanted[0], d) for d in detections) - len(wanted)) if is_count else 0
    return float(found / (len(wanted) + num_too_many + (caption.relation is not None)))


def _matches(mention: tuple[int, str | None, str | None, str | None], detection: Detection) -> bool:
    _, shape, color, _ = mention
    return shape in (None, detection.shape) and color in (None, detection.color)


def _holds(relation: tuple[int, str, int], chosen: Sequence[Detection]) -> bool:
    first, second = chosen[relation[0]], chosen[relation[2]]
    return {
        "left of": first.center[0] < second.center[0],
        "right of": first.center[0] > second.center[0],
        "in front of": first.ground_px > second.ground_px,
        "behind": first.ground_px < second.ground_px,
    }[relation[1]]


def validate(examples: Sequence[Example], width_px: int, height_px: int) -> dict:
    """The judge's verdict on true renders of the sentences' own scenes, with confusion counts `[truth][seen]`."""
    passed = []
    confusion = {
        kind: {name: dict.fromkeys((*names, "missed"), 0) for name in names} for kind, names in _KINDS.items()
    }
    pictures = true_pictures([e.scene for e in examples], width_px, height_px)
    for example, (image, segmentation, scene) in zip(examples, pictures, strict=True):
        detections = judge(image)
        passed.append(passes(example.caption, detections))
        for index, truth in enumerate(scene.objects, 1):
            overlaps = {
                d: np.mean(segmentation[d.box[1] : d.box[3], d.box[0] : d.box[2]] == index) for d in detections
            }
            seen = max(overlaps, key=overlaps.__getitem__, default=None)
            for kind in _KINDS:
                found = getattr(seen, kind) if seen and overlaps[seen] > 0.3 else "missed"
                confusion[kind][getattr(truth, kind)][found] += 1
    scores = _score_table(examples, passed)
    valid = all(score["rate"] >= REQUIRED_VALIDATION for score in scores.values())
    return {"valid": valid, "scores": scores, "confusion": confusion}


_KINDS = {"shape": SHAPES, "color": tuple(COLORS)}


def _score_table(examples: Sequence[Example], passed: Sequence[bool]) -> dict[str, dict]:
    """The rate, its count and its 95% Wilson interval: by category, overall, and by whether training has had the
    scene's combinations of shape, color and size."""
    groups: dict[str, list[bool]] = {}
    for example, hit in zip(examples, passed, strict=True):
        is_new = any(o.combination in HELD_OUT for o in example.scene.objects)
        for name in (example.category, "overall", "new combinations" if is_new else "seen combinations"):
            groups.setdefault(name, []).append(hit)
    order = [*CATEGORIES, "overall", "seen combinations", "new combinations"]
    return {
        name: {"rate": sum(hits) / len(hits), "of": len(hits), "interval": wilson(sum(hits), len(hits))}
        for name in order
        if (hits := groups.get(name))
    }


def wilson(hits: float, of: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson 1927)."""
    z2, rate = 1.96**2, hits / of
    middle, half = rate + z2 / (2 * of), math.sqrt(z2 * (rate * (1 - rate) / of + z2 / (4 * of**2)))
    return max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of))


def evaluate(
    draw: Draw,
    num_per_category: int,
    height_px: int,
    width_px: int,
    seed: int = 0,
    batch_size: int = 16,
    split: str = "test",
) -> tuple[dict, list[Image.Image]]:
    """Validates the judge, lets `draw(sentences, seeds)` draw every held-out sentence, and judges the pictures.

    Returns:
        `{"validation", "scores", "pictures", ...}`, all of it JSON, and the pictures themselves in the same order.
    """
    examples = held_out_examples(num_per_category, width_px, height_px, seed, split)
    validation = validate(examples, width_px, height_px)
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(examples), batch_size), desc="drawing"):
        batch = examples[start : start + batch_size]
        images += draw([e.caption.text for e in batch], [e.seed for e in batch])
    pictures, passed = [], []
    for example, image in zip(examples, images, strict=True):
        detections = judge(image)
        passed.append(passes(example.caption, detections))
        verdict = {"passed": passed[-1], "seen": [asdict(d) for d in detections]}
        pictures.append(
            {"category": example.category, "sentence": example.caption.text, "seed": example.seed, **verdict}
        )
    cases = {"num_per_category": num_per_category, "split": split, "seed": seed}
    report = {"height_px": height_px, "width_px": width_px, **cases, "validation": validation}
    return {**report, "scores": _score_table(examples, passed), "pictures": pictures}, images


# --- the report ------------------------------------------------------------------------------------------------------


def format_report(report: dict) -> str:
    """Plain text: the scores with their intervals beside the judge's own on true renders, then its confusion."""
    validation = report["validation"]
    lines = [f"{'category':<18} {'score':>7}   {'95% interval':<15} {'of':>4}   {'true renders':>12}"]
    for name, score in report["scores"].items():
        low, high = score["interval"]
        true = validation["scores"][name]["rate"]
        lines.append(f"{name:<18} {score['rate']:>7.1%}   {low:>6.1%} - {high:<6.1%} {score['of']:>4}   {true:>12.1%}")
    for kind, rows in validation["confusion"].items():
        columns = list(next(iter(rows.values())))
        lines += ["", f"{kind + ' (true renders)':<22}" + "".join(f"{c:>9}" for c in columns)]
        lines += [f"{truth:<22}" + "".join(f"{row[c]:>9}" for c in columns) for truth, row in rows.items()]
    if not validation["valid"]:
        lines += [
            "",
            f"WARNING: THE JUDGE IS BELOW {REQUIRED_VALIDATION:.0%} ON TRUE RENDERS: DO NOT TRUST ITS SCORES.",
        ]
    return "\n".join(lines)


def contact_sheet(pictures: Sequence[dict], images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Every picture over its sentence, framed in green where it passed and in red where it failed."""
    width, height, text_px = max(image.width for image in images), max(image.height for image in images), 48
    cell_w, cell_h = max(width, 112) + 8, height + text_px + 8
    sheet = Image.new("RGB", (columns * cell_w, math.ceil(len(images) / columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        left, top = i % columns * cell_w + 4, i // columns * cell_h + 4
        mark = "green" if picture["passed"] else "red"
        pen.rectangle((left - 3, top - 3, left + image.width + 2, top + image.height + 2), outline=mark, width=2)
        sheet.paste(image, (left, top))
        text = ("pass: " if picture["passed"] else "FAIL: ") + picture["sentence"]
        lines = textwrap.fill(text, (cell_w - 4) // 5, max_lines=4, placeholder="...")
        pen.multiline_text((left, top + height + 4), lines, fill=mark, font_size=9, spacing=2)
    return sheet


def score(
    pipe: "LuminaMGPTPipeline",
    num_per_category: int = 50,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    guidance_scale: float | None = None,
    best_of: int = 1,
    split: str = "test",
) -> tuple[dict, list[Image.Image]]:
    """Judges what a pipeline draws of held-out sentences: `evaluate`'s report, with the settings, and the pictures.

    Args:
        height, width: in pixels; the model's default size if None.
        guidance_scale: the model's own, from its generation config, if None.
        best_of: pictures drawn of each sentence, of which the judge chooses the one that counts.
        split: "test", or "validation", whose sentences settings may be chosen by.
    """
    config = pipe.transformer.config
    height_px, width_px = height or config.default_height_px, width or config.default_width_px
    pipe.processor.uni_rep.grid(height_px, width_px)  # raises for what cannot be drawn
    if guidance_scale is None:
        guidance_scale = pipe.transformer.generation_config.guidance_scale
    options: dict[str, Any] = {"height": height_px, "width": width_px, "guidance_scale": guidance_scale}
    if best_of > 1:
        from modeling_lumina_mgpt.pipelines.verifiers import TabletopVerifier  # which imports this file

        options |= {"best_of": best_of, "verifier": TabletopVerifier()}

    def draw(sentences: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(sentences, generator=[g for g in generators for _ in range(best_of)], **options).images

    pipe.set_progress_bar_config(disable=True)  # one for each batch says little
    report, images = evaluate(draw, num_per_category, height_px, width_px, seed, max(1, batch_size // best_of), split)
    return {"model": config.name_or_path, "guidance_scale": guidance_scale, "best_of": best_of, **report}, images


def run_evaluation(
    pipe: "LuminaMGPTPipeline", output_dir: str | Path, num_per_category: int = 50, **options: Any
) -> dict:
    """Scores a pipeline, with the options of `score`: prints the table, writes scores.json and contact_sheet.png."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: accepted is a folder")
    report, images = score(pipe, num_per_category, **options)
    print(format_report(report))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(report["pictures"], images).save(folder / "contact_sheet.png")
    return report

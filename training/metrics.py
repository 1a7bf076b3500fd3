"""What the scoreboard measures: an answer against the truth, case by case, as the field of each task does.

A measure gives `{metric: value}`, or `(sum, of)` where a case counts for several (joints, objects); a score is the
sum of all cases over the sum of `of`. Maps, joints and masks are read from pictures by color, without a network.
"""

import itertools
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from modeling_lumina_mgpt import LuminaMGPTImageProcessor

from .drawing import joint_color
from .evaluate import Detection, find_regions, judge, look_up, nearest_labels
from .tabletop import (
    COLORS,
    FAR,
    NEAR,
    SEGMENT_COLORS,
    SEGMENT_PALETTE,
    SHAPES,
    SIZES,
    SURFACES,
    TABLES,
    WALLS,
    Caption,
    Scene,
    SceneObject,
    parse,
    render,
)
from .tabletop_mannequin import COLOR as MANNEQUIN_COLOR
from .tabletop_mannequin import JOINTS
from .tabletop_scenes import unit_px

Values = dict[str, float | tuple[float, float]]
Box = Sequence[float]  # left, top, right, bottom; ends excluded

MAX_PSNR_DB = 60.0  # of pictures that are equal
RESAMPLES = 1000
MAPS = LuminaMGPTImageProcessor(palette=SEGMENT_PALETTE)


def interval(values: Sequence[float | tuple[float, float]], seed: int = 0) -> dict:
    """A score, the bounds of its 95% bootstrap interval over cases, and how many cases it is of."""
    pairs = np.array([x if isinstance(x, tuple) else (x, 1.0) for x in values], float).reshape(-1, 2)  # (cases, 2)
    pairs = pairs[pairs[:, 1] > 0]
    if not len(pairs):
        return {"value": None, "low": None, "high": None, "of": 0}
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sums = pairs[drawn].sum(1)  # (resamples, 2)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5))
    value = pairs[:, 0].sum() / pairs[:, 1].sum()
    return {"value": float(value), "low": float(low), "high": float(high), "of": len(pairs)}


# --- pictures --------------------------------------------------------------------------------------------------------


def psnr(truth: Image.Image, picture: Image.Image, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, at most `MAX_PSNR_DB`, of the pixels in a mask `(height, width)`."""
    squares = (_rgb(truth) - _rgb(picture)) ** 2
    error = squares.mean() if where is None else squares[where].mean()
    return float(min(MAX_PSNR_DB, 10 * np.log10(255**2 / max(error, 1e-9))))


def ssim(truth: Image.Image, picture: Image.Image) -> float:
    """Structural similarity of luminance, mean over Gaussian windows of 11 x 11. (Wang et al. 2004)"""
    x, y = _luminance(truth), _luminance(picture)

    def blur(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, radius=5)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def gms(truth: Image.Image, picture: Image.Image) -> float:
    """Mean similarity of gradient magnitudes of luminance at half the size. (Xue et al. 2014, arXiv 1308.3052)"""

    def gradient(values: np.ndarray) -> np.ndarray:
        half = ndimage.uniform_filter(values, 2)[::2, ::2]
        return np.hypot(ndimage.prewitt(half, 0), ndimage.prewitt(half, 1)) / 3

    x, y = gradient(_luminance(truth)), gradient(_luminance(picture))
    return float(((2 * x * y + 170) / (x * x + y * y + 170)).mean())


def likeness(truth: Image.Image, picture: Image.Image) -> Values:
    return {"PSNR": psnr(truth, picture), "SSIM": ssim(truth, picture), "GMS": gms(truth, picture)}


def _rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), float)


def _luminance(picture: Image.Image) -> np.ndarray:
    return _rgb(picture) @ np.array([0.299, 0.587, 0.114])


# --- maps ------------------------------------------------------------------------------------------------------------


def depths(picture: Image.Image) -> np.ndarray:
    """Table units `(height, width)` of a depth map; 8 bits round them to 0.05."""
    return FAR - MAPS.to_array(picture, "depth") * (FAR - NEAR)


def depth(truth: Image.Image, picture: Image.Image) -> Values:
    """Mean relative error, and the share of pixels within a factor of 1.25. (Eigen et al. 2014)"""
    true, seen = depths(truth), depths(picture)
    ratio = np.maximum(true / seen, seen / true)
    return {"AbsRel": float((np.abs(seen - true) / true).mean()), "delta1": float((ratio < 1.25).mean())}


def normal(truth: Image.Image, picture: Image.Image) -> Values:
    """Angles between normals, in degrees; the median is each picture's."""
    cosines = (MAPS.to_array(truth, "normal") * MAPS.to_array(picture, "normal")).sum(-1)
    angles = np.degrees(np.arccos(cosines.clip(-1, 1)))
    below = float((angles < 11.25).mean())
    return {"mean angle": float(angles.mean()), "median angle": float(np.median(angles)), "under 11.25°": below}


def classes(picture: Image.Image) -> np.ndarray:
    """Places in `SEGMENT_COLORS`, uint8 `(height, width)`, of a segmentation."""
    return MAPS.to_array(picture, "segmentation")


def segmentation(truth: Image.Image, picture: Image.Image) -> Values:
    """Intersection over union, mean over the classes that are present in the truth."""
    true, seen = classes(truth), classes(picture)
    return {"mIoU": float(np.mean([mask_iou(true == i, seen == i) for i in np.unique(true)]))}


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def read_joints(picture: Image.Image) -> np.ndarray:
    """Where the 14 joints of a drawn skeleton are, `(14, 2)` x and y in pixels; NaN for those that are not seen.

    A joint is where most of its hue is, and little of any other: a VQ model may darken it.
    """
    pixels, joints = _rgb(picture) / 255, np.full((len(JOINTS), 2), np.nan)
    for i in range(len(JOINTS)):
        hue = np.array(joint_color(i, len(JOINTS))) / np.linalg.norm(joint_color(i, len(JOINTS)))
        along = pixels @ hue  # (height, width)
        others = np.linalg.norm(pixels - along[..., None] * hue, axis=-1)
        alike = (along - 4 * others).clip(0)
        around = ndimage.uniform_filter(alike, 3)
        row, column = np.unravel_index(around.argmax(), around.shape)
        if around[row, column] > 0.02:
            rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
            y, x = ndimage.center_of_mass(alike[rows, columns])
            joints[i] = columns.start + x + 0.5, rows.start + y + 0.5
    return joints


def pose(truth: np.ndarray, picture: Image.Image) -> Values:
    """PCK@0.2: joints nearer to the true ones `(14, 2)` than 0.2 of the longer side of these joints' box.

    Joints that are NaN in the truth do not count.
    """
    known = ~np.isnan(truth).any(-1)
    if not known.any():
        return {"PCK@0.2": (0.0, 0.0)}
    away = np.linalg.norm(read_joints(picture) - truth, axis=-1)[known]
    return {"PCK@0.2": (float((away < 0.2 * np.ptp(truth[known], 0).max()).sum()), float(known.sum()))}


def box_iou(a: Box | None, b: Box) -> float:
    """Intersection over union; 0 for no box."""
    if a is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def detection(truth: Box, box: Box | None) -> Values:
    overlap = box_iou(box, truth)
    return {"box IoU": overlap, "IoU at least 0.5": float(overlap >= 0.5)}


# --- masks -----------------------------------------------------------------------------------------------------------


def figure(picture: Image.Image) -> np.ndarray:
    """Where the mannequin is, bool `(height, width)`: its color is the nearest of all that the renderer can make."""
    return look_up(picture, _figure_colors())


@cache
def _figure_colors() -> np.ndarray:
    shadings = np.linspace(0.25, 1.16, 20)
    own = [np.array(MANNEQUIN_COLOR) * s for s in shadings]
    others = [np.array(c) * s + gloss for c in COLORS.values() for s in shadings for gloss in (0, 0.13, 0.26)]
    others += [np.array(c) * s for c in TABLES.values() for s in (0.65, 1)] + [np.array(c) for c in WALLS]
    return nearest_labels(own + others, np.arange(len(own + others)) < len(own))


def foreground(picture: Image.Image) -> np.ndarray:
    """Where solids or the mannequin are, bool `(height, width)`."""
    return find_regions(picture)[1] | figure(picture)


def raised(depth_map: Image.Image) -> np.ndarray:
    """Where a depth map is clearly nearer than table and wall, bool `(height, width)`."""
    return _empty_depths(*depth_map.size) - depths(depth_map) > 0.3


@cache
def _empty_depths(width_px: int, height_px: int) -> np.ndarray:
    return render([Scene((), next(iter(TABLES)), 0)], width_px, height_px, maps=True).depth[0].numpy()


def condition_iou(condition: str, truth: Image.Image, picture: Image.Image) -> float:
    """How well what stands in a picture covers what stands in a segmentation: the figure if it is drawn from a pose,
    else the solids, whose colors are found as the judge finds them."""
    true, mannequin = classes(truth), [*SEGMENT_COLORS].index("mannequin")
    if condition == "pose":
        return mask_iou(true == mannequin, figure(picture))
    return mask_iou((true > 0) & (true != mannequin), find_regions(picture)[1])


def joints_on_figure(skeleton: Image.Image, picture: Image.Image) -> tuple[float, float]:
    """How many of a drawn skeleton's joints are on the mannequin of another picture, or next to it."""
    is_figure, joints = ndimage.binary_dilation(figure(picture)), read_joints(skeleton)
    return float(sum(is_figure[int(y), int(x)] for x, y in joints if not np.isnan(x))), float(len(joints))


# --- objects ---------------------------------------------------------------------------------------------------------


class State:
    """A scene as it is before or after an edit: its picture, and the boxes of what is to be seen of its objects."""

    def __init__(self, picture: Image.Image, segmentation: np.ndarray, scene: Scene):
        self.picture = picture
        slices = ndimage.find_objects(segmentation, len(scene.objects))
        boxes = [found and (found[1].start, found[0].start, found[1].stop, found[0].stop) for found in slices]
        self.boxes: dict[SceneObject, Box] = dict(zip(scene.objects, boxes, strict=True))


def edit(before: State, after: State, picture: Image.Image) -> Values:
    """Whether the judge finds what is new or changed and nothing in its old place, all else where it was and nothing
    more, and both.

    A detection stands for the object of its shape and color that it covers best, with a box IoU of 0.5 or more. One
    that stands for none is in the old place by the same measure, and is something more if it touches no box of what is
    edited. PSNR is of the pixels that are 8 px away from any that the true edit changes.
    """
    places = before.boxes | after.boxes
    matched = [(_best_covered(places, d), d.box) for d in judge(picture)]
    found = {o for o, _ in matched}
    strays = [box for o, box in matched if o not in after.boxes]
    old = [box for o, box in before.boxes.items() if o not in after.boxes]
    new = [box for o, box in after.boxes.items() if o not in before.boxes]
    is_gone = not any(box_iou(place, box) >= 0.5 for place in old for box in strays)
    is_more = any(all(box_iou(place, box) == 0 for place in old + new) for box in strays)
    done = is_gone and all(o in found for o in after.boxes if o not in before.boxes)
    rest = not is_more and all(o in found for o in after.boxes if o in before.boxes)
    values: Values = {
        "done": float(done),
        "rest untouched": float(rest),
        "done and rest untouched": float(done and rest),
    }
    changed = (_rgb(before.picture) != _rgb(after.picture)).any(-1)
    outside = ~ndimage.binary_dilation(changed, np.ones((17, 17)))
    return values | ({"PSNR outside": psnr(after.picture, picture, outside)} if outside.any() else {})


def _best_covered(places: dict[SceneObject, Box], seen: Detection) -> SceneObject | None:
    alike = [o for o in places if (o.shape, o.color) == (seen.shape, seen.color)]
    best = max(alike, key=lambda o: box_iou(places[o], seen.box), default=None)
    return best if best and box_iou(places[best], seen.box) >= 0.5 else None


def subject(words: str, pictures: Sequence[Image.Image]) -> Values:
    """Whether all pictures hold the subject; its size is told by the width, as all are in one scale."""
    (wanted,) = read_objects(f"a {words}")
    kept = dict.fromkeys(("shape", "color", "size"), True)
    for picture in pictures:
        middle_px = 2 * unit_px(*picture.size) * np.sqrt(SIZES["small"] * SIZES["large"])
        right = []
        for d in judge(picture):
            size = "large" if d.box[2] - d.box[0] > middle_px else "small"
            seen = {"shape": d.shape, "color": d.color, "size": size}
            right.append({kind: seen[kind] == wanted[kind] for kind in kept})
        best = max(right, key=lambda own: sum(own.values()), default=dict.fromkeys(kept, False))
        kept = {kind: kept[kind] and best[kind] for kind in kept}
    values: Values = {f"subject's {kind}": float(is_kept) for kind, is_kept in kept.items()}
    return values | {"subject kept": float(all(kept.values()))}


# --- words -----------------------------------------------------------------------------------------------------------

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
KINDS = {"color": tuple(COLORS), "size": tuple(SIZES), "surface": tuple(SURFACES)}
ADJECTIVES = "|".join(itertools.chain(*KINDS.values()))
PHRASE = re.compile(rf"\b({'|'.join(NUMBERS)}) ((?:(?:{ADJECTIVES}) )*)({'|'.join(SHAPES)})s?\b")


def read_objects(text: str) -> list[dict[str, str]]:
    """What a text introduces: shape, and color, size and surface where they are named, of each object."""
    found = []
    for count, adjectives, shape in PHRASE.findall(text.lower()):
        named = {kind: word for word in adjectives.split() for kind, words in KINDS.items() if word in words}
        found += [{"shape": shape, **named}] * NUMBERS[count]
    return found


def read_caption(text: str) -> Caption:
    """What a sentence commits to, also one with a mannequin, of whose objects only what they are is read."""
    try:
        return parse(text)
    except ValueError:
        return Caption(text, tuple((1, o["shape"], o.get("color"), o.get("size")) for o in read_objects(text)))


def caption(scene: Scene, text: str) -> Values:
    """Objects that text and scene share, and their attributes; of these, size and surface count where they are named.

    Each object of the text is held against the one that it is most like; that has the same shape, or it is no match.
    """
    said = read_objects(text)
    alike = np.array([[_alike(words, o) for o in scene.objects] for words in said]).reshape(-1, len(scene.objects))
    matches = [(said[i], scene.objects[j]) for i, j in zip(*linear_sum_assignment(alike, maximize=True), strict=True)]
    matches = [(words, o) for words, o in matches if words["shape"] == o.shape]
    right = sum(words.get(kind) == getattr(o, kind) for words, o in matches for kind in KINDS)
    named = sum(kind in words for words in said for kind in KINDS)
    wanted = len(scene.objects) + sum(kind in words for words, _ in matches for kind in ("size", "surface"))
    return {
        "objects, precision": (len(matches), len(said)),
        "objects, recall": (len(matches), len(scene.objects)),
        "attributes, precision": (right, named),
        "attributes, recall": (right, wanted),
    }


def _alike(words: dict[str, str], o) -> float:
    return 4.0 * (words["shape"] == o.shape) + sum(words.get(kind) == getattr(o, kind) for kind in KINDS)


def same(truth: str, text: str) -> float:
    """Whether two answers are the same, but for case and a full stop."""
    return float(truth.strip().rstrip(".").lower() == text.strip().rstrip(".").lower())

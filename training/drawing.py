"""Numbers -> the pictures that a model learns to draw: depth, normals, labels, skeletons and boxes.

Each is drawn as the image processor reads it back: maps by `to_array`, boxes by `find_box`.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

BOX_COLOR = (255, 0, 0)
NUM_KEYPOINTS = 17
LIMBS = (  # pairs of COCO's keypoints: head, arms, trunk, legs
    *((0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    *((5, 7), (7, 9), (6, 8), (8, 10)),
    *((5, 6), (5, 11), (6, 12), (11, 12)),
    *((11, 13), (13, 15), (12, 14), (14, 16)),
)


def draw_depth(
    depth: np.ndarray, metres_per_unit: float = 1.0, range_m: Sequence[float] | None = None, linear: bool = False
) -> Image.Image:
    """Near is bright and far is dark; what is not known (not positive, or not finite) is black.

    Args:
        depth: (height, width) along the viewing axis, in units of `metres_per_unit`; known somewhere.
        range_m: the depths `(near, far)` of white and black; None: the picture's own extremes.
        linear: brightness falls with the depth; else with its inverse, which leaves room for what is near.
    """
    depth = depth.astype(np.float64) * metres_per_unit
    known = np.isfinite(depth) & (depth > 0)
    near, far = range_m or (depth[known].min(), depth[known].max())
    if not 0 < near <= far:
        raise ValueError(f"range_m {range_m!r}: accepted is (near, far), above 0")
    depth = depth.clip(near, far, where=known, out=np.full_like(depth, far))
    falling, darkest, brightest = (-depth, -far, -near) if linear else (1 / depth, 1 / far, 1 / near)
    brightness = (falling - darkest) / max(brightest - darkest, 1e-12)
    return _to_gray(np.where(known, brightness, 0))


def draw_normals(normals: np.ndarray, flip: str = "") -> Image.Image:
    """Unit vectors as colors, (n + 1) / 2; what is none, as zeros are, is not known and black.

    Args:
        normals: (height, width, 3) right, up and toward the viewer, once the axes in `flip` are turned round.
        flip: of "xyz"; "yz" for vectors that point down and away, as cameras have them in computer vision.
    """
    if not isinstance(flip, str) or set(flip) - set("xyz"):
        raise ValueError(f"flip {flip!r}: accepted are letters of 'xyz'")
    signs = np.array([-1.0 if axis in flip else 1.0 for axis in "xyz"])
    colors = ((normals * signs + 1) / 2 * 255).round().clip(0, 255)
    known = np.abs(np.linalg.norm(normals, axis=-1, keepdims=True) - 1) < 0.5
    return Image.fromarray(np.where(known, colors, 0).astype(np.uint8))


def draw_labels(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Whole numbers (height, width) in the colors that `palette` has in their places; others are black."""
    colors = np.array([*palette, (0, 0, 0)], np.uint8)  # (classes + 1, 3)
    places = np.where((labels >= 0) & (labels < len(palette)), labels, len(palette))
    return Image.fromarray(colors[places.astype(np.int64)])


def voc_palette() -> list[list[int]]:
    """PASCAL VOC's 256 colors: a label's bits, dealt out to red, green and blue, from the highest bit of each on."""
    return [
        [sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
        for label in range(256)
    ]


def draw_skeletons(
    people: np.ndarray, width_px: int, height_px: int, limbs: Sequence[tuple[int, int]] = LIMBS
) -> Image.Image:
    """Limbs and joints in colors of their own on black.

    Args:
        people: (people, joints, 3) x, y in pixels and visibility, which is 0 for what is not labelled.
        limbs: pairs of joints; COCO's if not given.
    """
    picture = Image.new("RGB", (width_px, height_px))
    draw = ImageDraw.Draw(picture)
    thickness_px = max(1, round(0.5 + min(width_px, height_px) / 100))
    for person in people:
        for i, limb in enumerate(limbs):
            (*start, start_seen), (*end, end_seen) = (person[joint].tolist() for joint in limb)
            if start_seen > 0 and end_seen > 0:
                draw.line([*start, *end], _hue(i / len(limbs), 0.6), thickness_px)
        for i, (x, y, seen) in enumerate(person.tolist()):
            if seen > 0:
                draw.circle((x, y), thickness_px, joint_color(i, len(person)))
    return picture


def draw_box(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """The picture with a red frame just inside `box` (left, top, right, bottom; pixels, ends excluded)."""
    left, top, right, bottom = (round(side) for side in box)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
    if right - left < 4 or bottom - top < 4:
        raise ValueError(
            f"box {[left, top, right, bottom]} in {picture.width}x{picture.height} px: too small to be drawn"
        )
    thickest_px = min(right - left, bottom - top) // 8  # of 2 pixels at least, which survive a VQ model
    thickness_px = max(1, min(max(2, round(max(picture.size) / 160)), thickest_px))
    drawn = picture.copy()
    ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), outline=BOX_COLOR, width=thickness_px)
    return drawn


def joint_color(joint: int, num_joints: int) -> tuple[int, ...]:
    """Red, green and blue (0 to 255) that `draw_skeletons` gives a joint; limbs are darker."""
    return _hue(joint / num_joints, 1.0)


def _hue(place: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(place, 1.0, value))


def _to_gray(brightness: np.ndarray) -> Image.Image:
    return Image.fromarray((brightness * 255).round().astype(np.uint8)).convert("RGB")

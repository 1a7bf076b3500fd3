"""A jointed wooden mannequin of 14 joints: its poses, and the capsules that it is made of."""

import math
import random
from dataclasses import dataclass

JOINTS = (
    *("head", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
)
LIMBS = ((0, 1), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13))
# Pairs of points and a radius in table units. Points 14 to 17 are no joints: toes (right, left), belly, chest.
CAPSULES = (
    *((0, 0, 0.31), (0, 1, 0.12), (2, 5, 0.14), (17, 16, 0.30), (8, 11, 0.19)),
    *((2, 3, 0.14), (3, 4, 0.13), (5, 6, 0.14), (6, 7, 0.13)),
    *((8, 9, 0.17), (9, 10, 0.14), (11, 12, 0.17), (12, 13, 0.14), (10, 14, 0.12), (13, 15, 0.12)),
)
COLOR = (0.90, 0.74, 0.50)
UPPER_ARM, FOREARM, THIGH, SHIN, FOOT, TRUNK = 0.65, 0.60, 0.76, 0.72, 0.28, 0.96
VARIANTS = 8  # of each pose, and three ways to turn it: few enough for a small model to know them
POSES = (
    "standing",
    "walking",
    "waving",
    "sitting",
    "bowing",
    "kicking",
    "with both arms raised",
    "with both arms out",
)

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Mannequin:
    """A figure on the table; it faces the viewer more or less, so that its right hand is never taken for its left.

    `points`: where the 14 `JOINTS` are and four points more, in the table's axes.
    """

    pose: str
    x: float
    z: float
    points: tuple[Vector, ...]

    radius = 0.55  # of what it needs around it


def sample_mannequin(rng: random.Random, pose: str, x: float, z: float) -> Mannequin:
    """One in one of the `POSES`, its lowest point on the table at about (x, z)."""
    body = _bend(pose, random.Random(f"{pose}/{rng.randrange(VARIANTS)}"))
    lift = -min(min(body[a][1], body[b][1]) - radius for a, b, radius in CAPSULES)
    yaw = math.radians(rng.choice((-35, 0, 35)))
    cos, sin = math.cos(yaw), math.sin(yaw)
    points = tuple((x + left * cos + front * sin, up + lift, z + left * sin - front * cos) for left, up, front in body)
    return Mannequin(pose, x, z, points)


def _bend(pose: str, rng: random.Random) -> list[Vector]:
    """All points in the figure's own axes (its left, up, front) from the middle of its hips; angles in degrees."""
    arms = {side: [rng.uniform(6, 25), rng.uniform(-15, 25), rng.uniform(0, 40)] for side in (-1, 1)}
    legs = {side: [rng.uniform(2, 14), rng.uniform(-6, 8), rng.uniform(0, 8)] for side in (-1, 1)}
    bow, one = rng.uniform(-3, 8), rng.choice((-1, 1))
    if pose == "walking":
        stride = rng.uniform(22, 36)
        legs = {side: [3, side * one * stride, rng.uniform(2, 25)] for side in (-1, 1)}
        arms = {side: [8, -side * one * stride, rng.uniform(15, 50)] for side in (-1, 1)}
    elif pose == "waving":
        arms[one] = [rng.uniform(85, 140), 10, rng.uniform(25, 75)]
    elif pose == "sitting":
        legs = {side: [rng.uniform(6, 20), rng.uniform(78, 90), rng.uniform(0, 50)] for side in (-1, 1)}
    elif pose == "bowing":
        bow = rng.uniform(35, 60)
    elif pose == "kicking":
        legs[one] = [rng.uniform(2, 20), rng.uniform(45, 80), rng.uniform(0, 50)]
        arms = {side: [rng.uniform(25, 60), 0, rng.uniform(0, 40)] for side in (-1, 1)}
    elif pose == "with both arms raised":
        arms = {side: [rng.uniform(130, 170), 10, rng.uniform(0, 35)] for side in (-1, 1)}
    elif pose == "with both arms out":
        arms = {side: [rng.uniform(72, 100), 5, rng.uniform(0, 15)] for side in (-1, 1)}

    sway, bow = math.radians(rng.uniform(-6, 6)), math.radians(bow)
    trunk = (math.sin(sway), math.cos(sway) * math.cos(bow), math.cos(sway) * math.sin(bow))
    across = (math.cos(sway), -math.sin(sway), 0.0)
    neck = _along((0.0, 0.0, 0.0), trunk, TRUNK)
    points: dict[int, Vector] = {0: _along(neck, trunk, 0.46), 1: neck, 16: _along((0.0, 0.0, 0.0), trunk, 0.25)}
    points[17] = _along(neck, trunk, -0.26)
    for side, shoulder, hip, toe in ((-1, 2, 8, 14), (1, 5, 11, 15)):
        points[shoulder] = _along(_along(neck, trunk, -0.10), across, 0.41 * side)
        points[shoulder + 1], points[shoulder + 2] = _limb(
            points[shoulder], side, arms[side], UPPER_ARM, FOREARM, (0.0, math.sin(math.radians(arms[side][0])), 1.0)
        )
        points[hip] = (0.22 * side, 0.0, 0.0)
        points[hip + 1], points[hip + 2] = _limb(points[hip], side, legs[side], THIGH, SHIN, (0.0, 0.0, -1.0))
        points[toe] = _toe(points[hip + 1], points[hip + 2])
    return [points[i] for i in range(18)]


def _limb(
    start: Vector, side: int, degrees: list[float], upper: float, lower: float, hinge: Vector
) -> tuple[Vector, Vector]:
    """Elbow and wrist, or knee and ankle: spread to the side, swung to the front, bent toward `hinge`."""
    spread, swing, bend = (math.radians(angle) for angle in degrees)
    direction = (
        side * math.sin(spread),
        -math.cos(spread) * math.cos(swing),
        math.cos(spread) * math.sin(swing),
    )
    toward = _unit(_along(hinge, direction, -_dot(hinge, direction)))
    bent = _along(_along((0.0, 0.0, 0.0), direction, math.cos(bend)), toward, math.sin(bend))
    joint = _along(start, direction, upper)
    return joint, _along(joint, bent, lower)


def _toe(knee: Vector, ankle: Vector) -> Vector:
    """At a right angle to the shin, to the front and up."""
    shin = _unit(_along(ankle, knee, -1.0))
    return _along(ankle, _unit(_along((0.0, 0.1, 1.0), shin, -_dot((0.0, 0.1, 1.0), shin))), FOOT)


def _along(start: Vector, direction: Vector, distance: float) -> Vector:
    return tuple(s + distance * d for s, d in zip(start, direction, strict=True))  # type: ignore[return-value]


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _unit(vector: Vector) -> Vector:
    return _along((0.0, 0.0, 0.0), vector, 1 / math.hypot(*vector))

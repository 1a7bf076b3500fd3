"""Draws Tabletop's scenes by exact ray casting in torch, batch by batch: RGB, depth, normals, segmentation, boxes.

Table and wall are flat in color and no object casts a shadow beyond its own base: what a patch of the picture shows
depends on the object that it shows, and on nothing far away.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from .tabletop_mannequin import CAPSULES, Mannequin
from .tabletop_mannequin import COLOR as MANNEQUIN_COLOR
from .tabletop_scenes import (
    COLORS,
    CUBE_WIDTH,
    EDGE_DEPTH,
    EDGE_Z,
    FAR,
    LIGHT_AZIMUTH,
    LIGHT_ELEVATION,
    NEAR,
    PITCH,
    SURFACES,
    TABLES,
    WALLS,
    YAW,
    Scene,
    SceneObject,
    horizon_px,
    projected_box,
    unit_px,
)

Hits = tuple[torch.Tensor, torch.Tensor]  # distances (objects, rays), inf for none, and normals (objects, rays, 3)


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

    def boxes(self, row: int) -> list[tuple[int, int, int, int]]:
        """Pixel boxes (left, top, right, bottom), ends excluded, of the visible part of each object of scene `row`."""
        boxes = []
        for index in range(1, int(self.segmentation[row].max()) + 1):
            ys, xs = torch.nonzero(self.segmentation[row] == index, as_tuple=True)
            boxes.append(
                (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else (0, 0, 0, 0)
            )
        return boxes


def render(scenes: Sequence[Scene], width_px: int, height_px: int, maps: bool = False) -> Rendering:
    """Renders scenes at one size, with 2 x 2 samples a pixel for RGB and one at the pixel's center for the maps."""
    rgb, size = torch.zeros(len(scenes), height_px, width_px, 3), (width_px, height_px)
    for dx, dy in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        rgb += 0.25 * _shade(scenes, _origins(*size, dx, dy), size).view(rgb.shape)
    if not maps:
        return Rendering(rgb.clamp(0, 1))
    depth, normals, segmentation = _maps(scenes, _origins(*size, 0.5, 0.5), size)
    shape = (len(scenes), height_px, width_px)
    return Rendering(rgb.clamp(0, 1), depth.view(shape), normals.view(*shape, 3), segmentation.view(shape))


def _origins(width_px: int, height_px: int, dx: float, dy: float) -> torch.Tensor:
    """Where each pixel's ray starts, `(pixels, 3)`; all go along `_axes()[2]`."""
    scale = unit_px(width_px, height_px)
    u = (torch.arange(width_px) + dx - width_px / 2) / scale
    v = (horizon_px(height_px) - torch.arange(height_px) - dy) / scale
    v, u = torch.meshgrid(v, u, indexing="ij")
    right, up, forward = _axes()
    edge = torch.tensor([0.0, 0.0, EDGE_Z]) - EDGE_DEPTH * forward
    return edge + u.reshape(-1, 1) * right + v.reshape(-1, 1) * up


def _axes() -> torch.Tensor:
    """Rows: the view's right, up and forward, in table axes."""
    cos, sin = math.cos(PITCH), math.sin(PITCH)
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, sin], [0.0, -sin, cos]])


def _shade(scenes: Sequence[Scene], origins: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Colors `(batch, pixels, 3)`: Lambert shading and what each surface adds; a darker table where objects stand."""
    distance, normals, index = _intersect(scenes, origins, size)
    points = origins + distance[..., None] * _axes()[2]
    palette, bases, surfaces = _properties(scenes)
    level = math.cos(LIGHT_ELEVATION)
    x, y, z = level * math.sin(LIGHT_AZIMUTH), math.sin(LIGHT_ELEVATION), -level * math.cos(LIGHT_AZIMUTH)
    lit = 0.42 + 0.10 * normals[..., 1] + 0.62 * (normals * torch.tensor([x, y, z])).sum(-1).clamp(min=0)
    factor, gloss = _surface(points, bases.gather(1, index[..., None].expand(-1, -1, 3)), surfaces.gather(1, index))
    color = palette.gather(1, index[..., None].expand(-1, -1, 3)) * (lit * factor)[..., None] + gloss[..., None]
    tables = torch.tensor([TABLES[scene.table] for scene in scenes])[:, None]
    walls = torch.tensor([WALLS[scene.wall] for scene in scenes])[:, None]
    ground = torch.where((normals[..., 1] > 0.5)[..., None], tables * _shadow(bases, points)[..., None], walls)
    return torch.where((index == 0)[..., None], ground, color)


def _properties(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each slot, 0 for none: color `(batch, 5, 3)`, x, z and radius `(batch, 5, 3)`, surface `(batch, 5)`."""
    palette, bases = torch.zeros(len(scenes), 5, 3), torch.zeros(len(scenes), 5, 3)
    surfaces = torch.zeros(len(scenes), 5, dtype=torch.long)
    for row, scene in enumerate(scenes):
        for slot, o in enumerate(scene.objects, 1):
            palette[row, slot] = torch.tensor(COLORS[o.color])
            bases[row, slot] = torch.tensor([o.x, o.z, o.radius])
            surfaces[row, slot] = [*SURFACES].index(o.surface)
        if m := scene.mannequin:
            palette[row, len(scene.objects) + 1] = torch.tensor(MANNEQUIN_COLOR)
            bases[row, len(scene.objects) + 1] = torch.tensor([m.x, m.z, m.radius])
    return palette, bases, surfaces


def _surface(points: torch.Tensor, bases: torch.Tensor, surfaces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the light is multiplied by, and what is added: wood has darker rings around its axis, metal two streaks."""
    x, y, z = points[..., 0] - bases[..., 0], points[..., 1], points[..., 2] - bases[..., 1]
    radius = bases[..., 2].clamp(min=1e-3)
    ring = (y + 0.8 * torch.hypot(x, z)) / radius % 0.62 < 0.28
    across = (0.8 * x + 0.6 * (y * math.cos(PITCH) + z * math.sin(PITCH))) / radius
    streak = ((across - 0.55).abs() < 0.16) | ((across - 0.05).abs() < 0.07)
    is_metal, is_wooden = (surfaces == [*SURFACES].index(name) for name in ("metal", "wooden"))
    return 1 - 0.34 * (is_wooden & ring) - 0.2 * (is_metal & ~streak), 0.26 * (is_metal & streak)


def _shadow(bases: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """What the table is multiplied by: less within each object's width."""
    x, z, radius = bases[:, 1:, None].unbind(-1)  # (batch, slots, 1)
    away = torch.hypot(points[:, None, :, 0] - x, points[:, None, :, 2] - z)  # (batch, slots, pixels)
    return 1 - 0.35 * (away < 0.98 * radius).any(1)


def _maps(scenes, origins, size):
    distance, normals, index = _intersect(scenes, origins, size)
    camera_normals = normals @ _axes().T * torch.tensor([1.0, 1.0, -1.0])
    return distance.clamp(NEAR, FAR), camera_normals, index


def _intersect(
    scenes: Sequence[Scene], origins: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nearest hit of each ray: distance `(batch, rays)`, normal, and 1 + object index (0: table or wall)."""
    batch, forward = len(scenes), _axes()[2]
    ground = torch.stack([-origins[:, 1] / forward[1], (EDGE_Z - origins[:, 2]) / forward[2]])  # table, wall
    distance, is_wall = ground.min(0)
    distances = torch.full((batch, 5, len(origins)), torch.inf)
    distances[:, 0] = distance
    normals = torch.zeros(batch, 5, len(origins), 3)
    normals[:, 0] = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])[is_wall]
    for rows, slots, rays, (t, hit_normals) in _object_hits(scenes, origins, size, forward):
        distances[rows, slots, rays], normals[rows, slots, rays] = t, hit_normals
    nearest, index = distances.min(1)
    return nearest, normals.gather(1, index[:, None, :, None].expand(-1, 1, -1, 3))[:, 0], index


def _object_hits(
    scenes: Sequence[Scene], origins: torch.Tensor, size: tuple[int, int], forward: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Hits]]:
    """For each shape: scene rows and object slots (from 1) `(objects, 1)`, rays near them, and what these hit."""
    for shape in _HITS:
        found = [
            (r, s, o) for r, scene in enumerate(scenes) for s, o in enumerate(scene.objects, 1) if o.shape == shape
        ]
        if found:
            rows, slots, solids = zip(*found, strict=True)
            rays = _window(solids, size)  # (objects, rays)
            hits = _hit_solids(shape, origins[rays], forward, solids)
            yield torch.tensor(rows)[:, None], torch.tensor(slots)[:, None], rays, hits
    standing = [(r, len(scene.objects) + 1, scene.mannequin) for r, scene in enumerate(scenes) if scene.mannequin]
    if standing:
        rows, slots, mannequins = zip(*standing, strict=True)
        rays = _window(mannequins, size)
        hits = _hit_mannequins(origins[rays], forward.expand(*rays.shape, 3), mannequins)
        yield torch.tensor(rows)[:, None], torch.tensor(slots)[:, None], rays, hits


def _window(standing: Sequence[SceneObject | Mannequin], size: tuple[int, int]) -> torch.Tensor:
    """Indices of the rays around each, `(objects, rays)`; all windows are as large as the largest."""
    width_px, height_px = size
    boxes = torch.tensor([projected_box(o, *size) for o in standing]).floor().long()  # left, top, right, bottom
    columns, rows = (min(int((boxes[:, i + 2] - boxes[:, i]).max()) + 1, size[i]) for i in (0, 1))
    left = boxes[:, 0].clamp(0, width_px - columns)[:, None] + torch.arange(columns)
    top = boxes[:, 1].clamp(0, height_px - rows)[:, None] + torch.arange(rows)
    return (top[:, :, None] * width_px + left[:, None]).flatten(1)


def _hit_solids(shape: str, origins: torch.Tensor, forward: torch.Tensor, solids: Sequence[SceneObject]) -> Hits:
    center = torch.tensor([[o.x, 0.0, o.z] for o in solids])[:, None]
    radius = torch.tensor([o.radius for o in solids])[:, None]
    height = torch.tensor([o.height for o in solids])[:, None]
    cos, sin = math.cos(YAW), math.sin(YAW)
    turn = torch.tensor([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])
    local = (origins - center) @ turn
    t, normals = _HITS[shape](local, (forward @ turn).expand_as(local), radius, height)
    return t, normals @ turn.mT


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
    """Slabs of a box."""
    half = torch.stack([CUBE_WIDTH * radius, height / 2, CUBE_WIDTH * radius], -1)
    o = o - torch.stack([torch.zeros_like(radius), height / 2, torch.zeros_like(radius)], -1)
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    near = -o * inverse - half * inverse.abs()
    far = (-o * inverse + half * inverse.abs()).amin(-1)
    t, axis = near.max(-1)
    t = t.masked_fill((t > far) | (t < 1e-3), torch.inf)
    return t, torch.zeros_like(d).scatter(-1, axis[..., None], -d.gather(-1, axis[..., None]).sign())


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
    around = _finite_normal((o + d * t[..., None]) * torch.tensor([1.0, 0.0, 1.0]), t)
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


def _hit_mannequins(o, d, mannequins: Sequence[Mannequin]):
    """The nearest capsule of each row's mannequin; tried are rays that pass near one. `d` has unit length."""
    points = torch.tensor([m.points for m in mannequins])  # (batch, 18, 3)
    ends, radii = torch.tensor([(a, b) for a, b, _ in CAPSULES]), torch.tensor([r for *_, r in CAPSULES])
    start, axis = points[:, ends[:, 0]], points[:, ends[:, 1]] - points[:, ends[:, 0]]
    center, reach = start + axis / 2, axis.norm(dim=-1) / 2 + radii + 1e-2
    forward = d @ center.mT - (o * d).sum(-1, keepdim=True)  # (batch, rays, capsules), as all below
    away2 = (o * o).sum(-1, keepdim=True) - 2 * o @ center.mT + (center * center).sum(-1)[:, None]
    row, ray, part = torch.nonzero(
        (away2 - forward**2 < reach[:, None] ** 2) & (forward > -reach[:, None]), as_tuple=True
    )
    t, normals = _hit_capsules(o[row, ray] - start[row, part], d[row, ray], axis[row, part], radii[part])
    distances = torch.full(forward.shape, torch.inf)
    distances[row, ray, part] = t
    nearest, first = distances.min(-1)
    found = torch.zeros_like(d)
    is_first = (part == first[row, ray]) & torch.isfinite(t)
    found[row[is_first], ray[is_first]] = normals[is_first]
    return nearest, found


def _hit_capsules(o, d, axis, radius):
    """Rays `(n, 3)`, each with a capsule that starts at the origin: distances `(n,)` and normals."""
    length2, along_d, along_o = (axis * axis).sum(-1).clamp(min=1e-9), (axis * d).sum(-1), (axis * o).sum(-1)
    o_d, o_o = (o * d).sum(-1), (o * o).sum(-1)
    a = (length2 - along_d**2).clamp(min=1e-6)
    t, _ = _first_root(a, length2 * o_d - along_o * along_d, length2 * (o_o - radius**2) - along_o**2)
    place = along_o + t * along_d  # on the axis, in squares of its length
    t = t.masked_fill(~((place > 0) & (place < length2)) | (t < 1e-3), torch.inf)
    at_end = (o_d - along_d, o_o - 2 * along_o + length2)
    for b, c in ((o_d, o_o), at_end):  # the balls at both ends
        ball, _ = _first_root(torch.ones_like(t), b, c - radius**2)
        t = torch.minimum(t, ball.masked_fill(ball < 1e-3, torch.inf))
    point = o + d * t[:, None]
    nearest = ((point * axis).sum(-1) / length2).clamp(0, 1)[:, None] * axis
    return t, _finite_normal(point - nearest, t)


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
    "mannequin": (0.9, 0.4, 1.0),
}


SEGMENT_PALETTE = [[name, *(round(255 * value) for value in color)] for name, color in SEGMENT_COLORS.items()]


def segmentation_image(segmentation: torch.Tensor, scene: Scene) -> torch.Tensor:
    """Object indices `(height, width)` to RGB in [0, 1]: one color of `SEGMENT_COLORS` for each shape."""
    names = ("background", *(o.shape for o in scene.objects), "mannequin")
    return torch.tensor([SEGMENT_COLORS[name] for name in names])[segmentation]

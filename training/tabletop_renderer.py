"""Draws Tabletop's scenes by exact ray casting in torch, batch by batch: RGB, depth, normals, segmentation, boxes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image

from .tabletop_mannequin import CAPSULES, JOINTS, Mannequin
from .tabletop_mannequin import COLOR as MANNEQUIN_COLOR
from .tabletop_scenes import (
    CAMERA_HEIGHT,
    COLORS,
    FAR,
    FOCAL_LENGTH,
    LIGHT_ELEVATION,
    NEAR,
    PITCH,
    TABLES,
    WALLS,
    Scene,
    project,
)

Normals = Callable[[], torch.Tensor]  # shadows need none
MAX_FLESH = 0.3  # table units from the surface to a joint, if no other limb is in between


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
        if scene.mannequin:
            palette[row, len(scene.objects) + 1] = torch.tensor(MANNEQUIN_COLOR)
    return palette.gather(1, index[..., None].expand(-1, -1, 3))


def _contact_shadow(scenes, points) -> torch.Tensor:
    shade = torch.ones(points.shape[:2])
    for row, scene in enumerate(scenes):
        for o in scene.objects:
            squared = (points[row, :, 0] - o.x) ** 2 + (points[row, :, 2] - o.z) ** 2
            shade[row] *= 1 - 0.6 * torch.exp(-squared / (1.1 * o.radius) ** 2)
        points_of = scene.mannequin.points if scene.mannequin else ()
        for a, b, radius in CAPSULES if points_of else ():
            x, y, z = (sum(ends) / 2 for ends in zip(points_of[a], points_of[b], strict=True))
            squared = (points[row, :, 0] - x) ** 2 + (points[row, :, 2] - z) ** 2 + y**2
            shade[row] *= 1 - 0.4 * torch.exp(-squared / (radius + 0.25) ** 2)
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
    for rows, slots, t, find_normals in _object_hits(scenes, origin.expand_as(directions), directions):
        distances[rows, slots] = t
        normals[rows, slots] = find_normals()
    distance, index = distances.min(1)
    normal = normals.gather(1, index[:, None, :, None].expand(-1, 1, -1, 3))[:, 0]
    return distance, normal, index


def _occluded(scenes, points, directions) -> torch.Tensor:
    blocked = torch.zeros(points.shape[:2], dtype=torch.bool)
    for rows, _, t, _ in _object_hits(scenes, points, directions):
        blocked.index_put_((rows,), torch.isfinite(t), accumulate=True)
    return blocked


def _object_hits(scenes, origins, directions) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Normals]]:
    """For each shape: scene rows, object slots (from 1), distances `(objects, rays)` and what finds world normals."""
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
        t, find_normals = hit((origins[rows] - center) @ turn, directions[rows] @ turn, radius, height)
        yield rows, slots, t, partial(_turned_back, find_normals, turn)
    found = [(r, len(scene.objects) + 1, scene.mannequin) for r, scene in enumerate(scenes) if scene.mannequin]
    if found:
        rows, slots = torch.tensor([r for r, _, _ in found]), torch.tensor([s for _, s, _ in found])
        yield rows, slots, *_hit_mannequins(origins[rows], directions[rows], [m for *_, m in found])


def _turned_back(find_normals: Normals, turn: torch.Tensor) -> torch.Tensor:
    return find_normals() @ turn.mT


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
    return t, lambda: _finite_normal(o + d * t[..., None], t)


def _hit_cube(o, d, radius, height):
    """Slabs of a box of half-width 0.85 radius, so that its diagonal is not much wider than a sphere."""
    half = torch.stack([0.85 * radius, height / 2, 0.85 * radius], -1)
    o = o - torch.stack([torch.zeros_like(radius), height / 2, torch.zeros_like(radius)], -1)
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    near = -o * inverse - half * inverse.abs()
    far = (-o * inverse + half * inverse.abs()).amin(-1)
    t, axis = near.max(-1)
    t = t.masked_fill((t > far) | (t < 1e-3), torch.inf)
    return t, lambda: torch.zeros_like(d).scatter(-1, axis[..., None], -d.gather(-1, axis[..., None]).sign())


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

    def find_normals() -> torch.Tensor:
        around = _finite_normal((o + d * t[..., None]) * torch.tensor([1.0, 0.0, 1.0]), t)
        up = torch.tensor([0.0, 1.0, 0.0]).expand_as(around)
        return torch.where((lid < side)[..., None], up, around)

    return t, find_normals


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

    def find_normals() -> torch.Tensor:
        point = o + d * best[..., None]
        normal = torch.stack([point[..., 0], k2 * (height - point[..., 1]), point[..., 2]], -1)
        return _finite_normal(normal, best)

    return best, find_normals


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

    def find_normals() -> torch.Tensor:
        found = torch.zeros_like(d)
        is_first = (part == first[row, ray]) & torch.isfinite(t)
        found[row[is_first], ray[is_first]] = normals[is_first]
        return found

    return nearest, find_normals


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


def segmentation_image(segmentation: torch.Tensor, scene: Scene) -> torch.Tensor:
    """Object indices `(height, width)` to RGB in [0, 1]: one color of `SEGMENT_COLORS` for each shape."""
    names = ("background", *(o.shape for o in scene.objects), "mannequin")
    return torch.tensor([SEGMENT_COLORS[name] for name in names])[segmentation]


def find_joints(rendering: Rendering, row: int, scene: Scene) -> torch.Tensor:
    """Where the mannequin's joints are in the picture of scene `row`, with maps: `(14, 3)`, x and y in pixels, and 1
    for joints in sight, else 0: hidden by an object, or by another limb."""
    if scene.mannequin is None:
        raise ValueError("the scene has no mannequin")
    height_px, width_px = rendering.segmentation.shape[1:]
    half, points = min(width_px, height_px) / 2, torch.tensor(scene.mannequin.points[: len(JOINTS)])
    places = torch.tensor([project(*point) for point in points.tolist()])  # (14, 2)
    x, y = width_px / 2 + half * places[:, 0], height_px / 2 - half * places[:, 1]
    rows, columns = y.long().clamp(0, height_px - 1), x.long().clamp(0, width_px - 1)
    is_mannequin = rendering.segmentation[row][rows, columns] == len(scene.objects) + 1
    away = torch.tensor([0.0, CAMERA_HEIGHT, 0.0])
    depth = (points - away) @ _camera_to_world()[:, 2]
    is_near = depth - rendering.depth[row][rows, columns] < MAX_FLESH
    return torch.stack([x, y, (is_mannequin & is_near).float()], -1)

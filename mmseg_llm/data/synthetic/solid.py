"""Solid scenes: where primitives stand, and their exact masks and planar depth by analytic ray casting.

Legend: H W pixels of the image, h w pixels of the window around an object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.data.synthetic.camera import Viewpoint
from mmseg_llm.data.synthetic.primitives import intersect
from mmseg_llm.data.synthetic.vocabulary import COLOURS, pick, uniform

if TYPE_CHECKING:
    from mmseg_llm.data.synthetic.levels import Level

MAX_DEPTH = 40.0  # metres; farther ground is hazy and unlabelled
_PLACEMENT_TRIES = 40
_ASPECTS = {
    "sphere": (1.0, 1.0),
    "cube": (1.0, 1.0),
    "cylinder": (0.9, 1.45),
    "cone": (1.0, 1.5),
    "pyramid": (0.8, 1.2),
}


@dataclass(frozen=True)
class SolidObject:
    """A primitive on the ground.

    Attributes:
        shape, colour, size, texture: attribute words.
        x, y: where it stands, metres right and forward of the point below the camera.
        radius, height: half the width, and height, in metres.
        yaw: radians about the vertical.
        rgb: colour 0..255.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    height: float
    yaw: float
    rgb: tuple[float, float, float]

    @property
    def reach(self) -> float:
        """Radius of the circle on the ground that holds the base at any yaw."""
        return self.radius * (1.4143 if self.shape in ("cube", "pyramid") else 1.0)


@dataclass(frozen=True)
class Buffers:
    """What every pixel sees.

    Attributes:
        depth: float64 `(H, W)` planar metres, 0 where nothing within `MAX_DEPTH` is seen.
        owner: int16 `(H, W)` position in the list of objects, -1 for ground and sky.
        whole: pixels that each object would show if nothing hid it.
        windows: rows and columns `(top, bottom, left, right)` that hold each object.
    """

    depth: np.ndarray
    owner: np.ndarray
    whole: tuple[int, ...]
    windows: tuple[tuple[int, int, int, int], ...]


def place_camera(level: Level, rng: np.random.Generator) -> Viewpoint:
    """A camera above eye level of the objects, looking down at the middle of the stage."""
    near, far = level.depth_range
    height = uniform(rng, (1.7, 2.6))
    aim = near + (far - near) * uniform(rng, (0.3, 0.5))
    tilt = math.atan2(height - 0.3, aim)
    return Viewpoint(height, tilt, level.size * uniform(rng, (0.85, 1.25)), level.size)


def place_solids(level: Level, view: Viewpoint, rng: np.random.Generator) -> list[SolidObject]:
    """Random primitives on the stage that do not touch each other and are in the picture."""
    low, high = level.num_objects
    top = max(view.row(level.depth_range[1]), 0.12 * level.size)
    rows = (top, max(top + 4, min(view.row(level.depth_range[0]), 0.93 * level.size)))
    placed: list[SolidObject] = []
    for _ in range(low + int(rng.random() * (high - low + 1))):
        shape, size = pick(rng, level.shapes), pick(rng, tuple(level.sizes))
        radius = uniform(rng, level.sizes[size]) / 2
        height = 2 * radius * uniform(rng, _ASPECTS[shape])
        colour, texture = pick(rng, level.colours), pick(rng, level.textures)
        red, green, blue = (min(255.0, max(0.0, c + uniform(rng, (-10, 10)))) for c in COLOURS[colour])
        yaw = uniform(rng, (0, math.pi / 2))
        for _ in range(_PLACEMENT_TRIES):
            spot = view.ground(uniform(rng, (0.06 * level.size, 0.94 * level.size)), uniform(rng, rows))
            if spot is None:
                continue
            thing = SolidObject(shape, colour, size, texture, *spot[:2], radius, height, yaw, (red, green, blue))
            if _is_framed(view, thing) and all(_is_apart(thing, other) for other in placed):
                placed.append(thing)
                break
    return placed


def _is_apart(one: SolidObject, other: SolidObject) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > one.reach + other.reach + 0.06


def _is_framed(view: Viewpoint, thing: SolidObject) -> bool:
    """Whether the middle axis and most of the width are in the picture."""
    x, top, depth = view.project(thing.x, thing.y, thing.height)
    half = thing.radius * view.focal / max(depth, 0.1)
    _, bottom, _ = view.project(thing.x, thing.y, 0.0)
    slack = 0.3 * half
    return half - slack < x < view.size - half + slack and top > 1 and bottom < view.size - 0.25 * half


def _window(view: Viewpoint, thing: SolidObject) -> tuple[int, int, int, int]:
    """Rows and columns that surely hold the projection: the box around the object's eight outer corners."""
    corners = [
        view.project(thing.x + dx, thing.y + dy, z)
        for dx in (-thing.reach, thing.reach)
        for dy in (-thing.reach, thing.reach)
        for z in (0.0, thing.height)
    ]
    if min(depth for _, _, depth in corners) < 0.05:  # reaches behind the camera, where projection turns over
        return 0, view.size, 0, view.size
    columns, rows = [x for x, _, _ in corners], [y for _, y, _ in corners]
    left, right = max(0, math.floor(min(columns))), min(view.size, math.ceil(max(columns)) + 1)
    top, bottom = max(0, math.floor(min(rows))), min(view.size, math.ceil(max(rows)) + 1)
    return top, max(top, bottom), left, max(left, right)


def to_local(
    thing: SolidObject, x: np.ndarray | float, y: np.ndarray | float
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Turn world x, y (already relative to the object's base) into its own frame."""
    cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
    return x * cos + y * sin, y * cos - x * sin


def cast(view: Viewpoint, objects: list[SolidObject]) -> Buffers:
    """Which object each pixel sees and how far away it is (z-buffer over analytic first hits)."""
    dx, dy, dz = view.rays
    with np.errstate(divide="ignore"):
        ground = np.where(dz < 0, -view.height / dz, np.inf)  # (H, 1)
    depth = np.repeat(ground, view.size, axis=1)  # (H, W)
    owner = np.full((view.size, view.size), -1, np.int16)
    whole, windows = [], []
    for i, thing in enumerate(objects):
        top, bottom, left, right = window = _window(view, thing)
        windows.append(window)
        if bottom <= top or right <= left:
            whole.append(0)
            continue
        local = to_local(thing, dx[:, left:right], dy[top:bottom])
        origin = to_local(thing, -thing.x, -thing.y)
        directions = (np.asarray(local[0]), np.asarray(local[1]), dz[top:bottom])
        start = (float(origin[0]), float(origin[1]), view.height)
        t = intersect(thing.shape, start, directions, thing.radius, thing.height)  # (h, w)
        whole.append(int(np.count_nonzero(t < np.inf)))
        seen = depth[top:bottom, left:right]
        is_nearer = t < seen
        np.copyto(seen, t, where=is_nearer)
        owner[top:bottom, left:right][is_nearer] = i
    depth[depth > MAX_DEPTH] = 0.0
    return Buffers(depth, owner, tuple(whole), tuple(windows))

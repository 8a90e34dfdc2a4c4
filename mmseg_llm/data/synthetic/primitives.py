"""Rays against primitives that stand on the ground, in closed form.

Local frame of a primitive: origin at the centre of its base, z up, turned by its yaw. `r` is half the width, `height`
the extent along z. Cameras are above all tops and outside all objects, so bases are never seen.

Legend: h w pixels of a window, P pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]
Point = tuple[float, float, float]
_EPSILON = 1e-6


def _roots(a: np.ndarray, b: np.ndarray, c: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of `a t^2 + 2 b t + c = 0`, NaN where there are none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _sphere(o: Point, d: Vector, r: float, height: float) -> np.ndarray:
    oz = o[2] - r
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + oz * d[2]
    near, _ = _roots(a, b, o[0] * o[0] + o[1] * o[1] + oz * oz - r * r)
    return np.where(near > 0, near, np.inf)


def _cylinder(o: Point, d: Vector, r: float, height: float) -> np.ndarray:
    a = d[0] * d[0] + d[1] * d[1]
    b = o[0] * d[0] + o[1] * d[1]
    near, _ = _roots(a, b, o[0] * o[0] + o[1] * o[1] - r * r)
    z = o[2] + near * d[2]
    side = np.where((z >= 0) & (z <= height), near, np.inf)
    top = (height - o[2]) / d[2]
    x, y = o[0] + top * d[0], o[1] + top * d[1]
    return np.minimum(side, np.where((x * x + y * y <= r * r) & (top > 0), top, np.inf))


def _cone(o: Point, d: Vector, r: float, height: float) -> np.ndarray:
    slope = r / height
    oz = height - o[2]  # distance below the apex, growing downwards
    square = slope * slope
    a = d[0] * d[0] + d[1] * d[1] - square * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + square * oz * d[2]
    first, second = _roots(a, b, o[0] * o[0] + o[1] * o[1] - square * oz * oz)
    best = np.full(a.shape, np.inf)
    for t in (first, second):
        z = o[2] + t * d[2]
        best = np.minimum(best, np.where((z >= 0) & (z <= height) & (t > 0), t, np.inf))
    return best


def _clip(o: Point, d: Vector, faces: list[tuple[float, float, float, float]]) -> np.ndarray:
    """Entry into the convex body of all points with `x nx + y ny + z nz <= limit` for each face."""
    enter, leave = np.zeros(d[0].shape), np.full(d[0].shape, np.inf)
    for nx, ny, nz, limit in faces:
        speed = nx * d[0] + ny * d[1] + nz * d[2]
        t = (limit - (nx * o[0] + ny * o[1] + nz * o[2])) / speed
        enter = np.where(speed < 0, np.maximum(enter, t), enter)
        leave = np.where(speed > 0, np.minimum(leave, t), leave)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _cube(o: Point, d: Vector, r: float, height: float) -> np.ndarray:
    # Slabs: enter all three, before leaving any.
    spans = []
    for origin, speed, low, high in ((o[0], d[0], -r, r), (o[1], d[1], -r, r), (o[2], d[2], 0.0, height)):
        inverse = 1 / speed
        first, second = (low - origin) * inverse, (high - origin) * inverse
        spans.append((np.minimum(first, second), np.maximum(first, second)))
    enter = np.maximum(np.maximum(spans[0][0], spans[1][0]), spans[2][0])
    leave = np.minimum(np.minimum(spans[0][1], spans[1][1]), spans[2][1])
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _pyramid(o: Point, d: Vector, r: float, height: float) -> np.ndarray:
    limit = r * height
    sides = [(height, 0.0, r, limit), (-height, 0.0, r, limit), (0.0, height, r, limit), (0.0, -height, r, limit)]
    return _clip(o, d, [*sides, (0.0, 0.0, -1.0, 0.0)])


_INTERSECT: dict[str, Callable[[Point, Vector, float, float], np.ndarray]] = {
    "sphere": _sphere,
    "cylinder": _cylinder,
    "cone": _cone,
    "cube": _cube,
    "pyramid": _pyramid,
}


def intersect(shape: str, origin: Point, directions: Vector, r: float, height: float) -> np.ndarray:
    """First hit of rays `origin + t * direction` with a primitive, all in its local frame.

    Args:
        shape: a word of `SOLID_SHAPES`.
        origin: camera centre, metres.
        directions: x, y, z of the rays, each `(h, w)`.
        r, height: half width and height in metres.

    Returns:
        t `(h, w)` float64, infinite where the ray misses.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return _INTERSECT[shape](origin, directions, r, height)


def normals(shape: str, x: np.ndarray, y: np.ndarray, z: np.ndarray, r: float, height: float) -> Vector:
    """Outward unit normals at surface points `(P,)` of a primitive, in its local frame."""
    if shape == "sphere":
        return x / r, y / r, (z - r) / r
    if shape == "cylinder":
        is_top = z > height - _EPSILON
        return np.where(is_top, 0.0, x / r), np.where(is_top, 0.0, y / r), is_top.astype(np.float64)
    if shape == "cone":
        rho = np.hypot(x, y) + _EPSILON
        norm = 1 / math.hypot(r, height)
        return x / rho * (height * norm), y / rho * (height * norm), np.full(x.shape, r * norm)
    ax, ay = abs(x), abs(y)
    if shape == "cube":
        is_top = z > height - _EPSILON
        is_x = (ax > ay) & ~is_top
        is_y = ~is_x & ~is_top
        return np.sign(x) * is_x, np.sign(y) * is_y, is_top.astype(np.float64)
    norm = 1 / math.hypot(r, height)
    is_x = ax > ay
    return np.sign(x) * is_x * (height * norm), np.sign(y) * ~is_x * (height * norm), np.full(x.shape, r * norm)

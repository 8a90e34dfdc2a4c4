"""How solid scenes look: ground, sky, cast shadows, Lambert shading with a highlight, textures.

Legend: H W pixels, G rows of ground, P pixels of an object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.data.synthetic.flat import soft_field
from mmseg_llm.data.synthetic.primitives import normals
from mmseg_llm.data.synthetic.solid import MAX_DEPTH, to_local
from mmseg_llm.data.synthetic.vocabulary import pick, uniform

if TYPE_CHECKING:
    from mmseg_llm.data.synthetic.camera import Viewpoint
    from mmseg_llm.data.synthetic.solid import Buffers, SolidObject

_GROUNDS = (
    (150.0, 146.0, 140.0),
    (172.0, 160.0, 140.0),
    (128.0, 136.0, 144.0),
    (188.0, 186.0, 182.0),
    (140.0, 150.0, 134.0),
)
_SKIES = ((196.0, 214.0, 232.0), (226.0, 224.0, 220.0), (206.0, 206.0, 214.0), (232.0, 220.0, 206.0))
_AMBIENT, _DIFFUSE, _HIGHLIGHT = 0.46, 0.66, 60.0
_SHADOW = 0.55


@dataclass(frozen=True)
class Look:
    """What a scene looks like beyond its objects.

    Attributes:
        light: unit vector towards the light, world axes.
        ground, sky: RGB 0..255.
        pattern: `plain`, `tiles` or `planks`.
        pitch: metres between pattern lines.
        mottle: float32 `(H, W)` relative brightness of the ground and sky.
        origin: where the camera stands on the pattern of the ground, metres right and forward.
    """

    light: tuple[float, float, float]
    ground: tuple[float, float, float]
    sky: tuple[float, float, float]
    pattern: str
    pitch: float
    mottle: np.ndarray
    origin: tuple[float, float] = (0.0, 0.0)


def choose_look(size: int, rng: np.random.Generator) -> Look:
    """A random light from behind or beside the camera, and a random place."""
    elevation, azimuth = uniform(rng, (0.75, 1.15)), uniform(rng, (-2.6, -0.5))
    flat = math.cos(elevation)
    light = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation))
    mottle = soft_field(rng, size, 0.93, 1.07, cells=6)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    pattern = pick(rng, ("plain", "tiles", "planks"))
    return Look(
        light,
        pick(rng, _GROUNDS),
        pick(rng, _SKIES),
        pattern,
        uniform(rng, (0.5, 1.0)),
        mottle + grain * np.float32(0.014),
    )


def _shade_ground(view: Viewpoint, look: Look, objects: list[SolidObject], first: int) -> np.ndarray:
    """Relative brightness of the ground rows from `first` on, float32 `(G, W)`."""
    dx, dy, dz = (ray.astype(np.float32) for ray in view.rays)
    depth = -np.float32(view.height) / dz[first:]  # (G, 1)
    x, y = dx * depth, dy[first:] * depth  # (G, W), (G, 1)
    light = look.mottle[first:].copy()
    fade = np.float32(0.13) * np.exp(depth * np.float32(-0.12))  # far pattern lines would alias
    pattern_x, pattern_y = x + np.float32(look.origin[0]), y + np.float32(look.origin[1])
    if look.pattern == "tiles":
        cells = (np.floor(places * np.float32(1 / look.pitch)) for places in (pattern_x, pattern_y))
        parity = sum(cells) % 2
        light += (parity - np.float32(0.5)) * fade
    elif look.pattern == "planks":
        board = np.floor(pattern_x * np.float32(2 / look.pitch))
        light += (board * np.float32(0.618) % 1 - np.float32(0.5)) * fade
    for thing in objects:
        _cast_shadow(view, look, thing, (x, y, light), first)
    return light


def _shadow_capsule(thing: SolidObject, look: Look) -> tuple[float, float, float, float]:
    """Start and end of the shadow's axis along the ground (metres from the base), its radius, and how far it tapers."""
    reach_per_metre = math.hypot(*look.light[:2]) / look.light[2]
    radius = thing.radius * (1.12 if thing.shape in ("cube", "pyramid") else 1.0)
    if thing.shape == "sphere":
        middle, extra = radius * reach_per_metre, radius / look.light[2] - radius
        return middle - extra, middle + extra, radius, 0.0
    taper = 1.0 if thing.shape in ("cone", "pyramid") else 0.0
    return 0.0, thing.height * reach_per_metre, radius, taper


def _cast_shadow(
    view: Viewpoint, look: Look, thing: SolidObject, ground: tuple[np.ndarray, np.ndarray, np.ndarray], first: int
) -> None:
    """Darken the ground in the shadow of an object, in place, within the window that can hold it."""
    x, y, light = ground
    start, end, radius, taper = _shadow_capsule(thing, look)
    flat = math.hypot(*look.light[:2])
    ux, uy = -look.light[0] / flat, -look.light[1] / flat
    pad = radius + 0.15
    points = [
        view.project(thing.x + ux * along + dx, thing.y + uy * along + dy, 0.0)
        for along in (start, end)
        for dx in (-pad, pad)
        for dy in (-pad, pad)
    ]
    top, bottom, left, right = 0, view.size - first, 0, view.size
    if min(depth for _, _, depth in points) > 0.2:
        top = max(0, int(min(row for _, row, _ in points)) - first)
        bottom = max(top, min(bottom, int(max(row for _, row, _ in points)) + 2 - first))
        left = max(0, int(min(column for column, _, _ in points)))
        right = max(left, min(view.size, int(max(column for column, _, _ in points)) + 2))
    qx = x[top:bottom, left:right] - np.float32(thing.x)
    qy = y[top:bottom] - np.float32(thing.y)
    along = qx * np.float32(ux) + qy * np.float32(uy)
    across = qx * np.float32(uy) - qy * np.float32(ux)
    inside = along.clip(np.float32(start), np.float32(end))
    distance = np.hypot(along - inside, across)
    share = (inside - np.float32(start)) * np.float32(1 / max(end - start, 1e-3))
    softness = np.float32(0.05) + np.float32(0.12) * share
    shade = ((radius * (1 - np.float32(taper) * share) - distance) / softness + np.float32(0.5)).clip(0, 1)
    light[top:bottom, left:right] *= 1 - np.float32(1 - _SHADOW) * shade


def _texture(thing: SolidObject, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray | None:
    """Share of the second colour at surface points `(P,)`, None when plain."""
    if thing.texture == "striped":
        return (np.sin(z * (2 * math.pi * 3.5 / thing.height) + 0.6) > 0).astype(np.float64)
    if thing.texture == "checkered":
        cell = thing.radius / 1.5
        return (np.floor(x / cell + 0.02) + np.floor(y / cell + 0.02) + np.floor(z / cell + 0.02)) % 2
    return None


def _shade_object(view: Viewpoint, look: Look, thing: SolidObject, rays: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """RGB `(P, 3)` of the visible pixels of an object, from their world rays `(3, P)` and planar depth `(P,)`."""
    x, y = to_local(thing, rays[0] * depth - thing.x, rays[1] * depth - thing.y)
    x, y, z = np.asarray(x), np.asarray(y), rays[2] * depth + view.height
    nx, ny, nz = normals(thing.shape, x, y, z, thing.radius, thing.height)
    lx, ly = to_local(thing, look.light[0], look.light[1])
    diffuse = (nx * lx + ny * ly + nz * look.light[2]).clip(0, 1)
    rgb = np.asarray(thing.rgb)
    colour = np.broadcast_to(rgb, (len(depth), 3))
    share = _texture(thing, x, y, z)
    if share is not None:
        second = rgb * 0.35 + (255.0 if sum(thing.rgb) < 600 else 60.0) * 0.65
        colour = rgb + (second - rgb) * share[:, None]
    shaded = colour * (_AMBIENT + _DIFFUSE * diffuse)[:, None]
    if thing.shape in ("sphere", "cylinder", "cone"):  # flat faces would light up as a whole
        shaded += (_HIGHLIGHT * diffuse**24)[:, None]
    return shaded


def shade(view: Viewpoint, look: Look, objects: list[SolidObject], buffers: Buffers) -> np.ndarray:
    """The picture, uint8 `(H, W, 3)`."""
    size = view.size
    dx, dy, dz = view.rays
    image = np.empty((size, size, 3), np.float32)
    first = int(np.searchsorted(-dz[:, 0], view.height / MAX_DEPTH))  # first row of labelled ground
    sky = np.asarray(look.sky, np.float32)
    image[:first] = sky * look.mottle[:first, :, None]
    if first < size:
        haze = (1 - np.exp((view.height / dz[first:]).astype(np.float32) * np.float32(0.03)))[:, :, None]  # (G, 1, 1)
        ground = np.asarray(look.ground, np.float32)
        light = _shade_ground(view, look, objects, first)
        image[first:] = light[:, :, None] * (ground * (1 - haze) + sky * haze)
    for i, thing in enumerate(objects):
        top, bottom, left, right = buffers.windows[i]
        rows, columns = np.nonzero(buffers.owner[top:bottom, left:right] == i)
        if not len(rows):
            continue
        rows += top
        columns += left
        rays = np.stack((dx[0, columns], dy[rows, 0], dz[rows, 0]))  # (3, P)
        image[rows, columns] = _shade_object(view, look, thing, rays, buffers.depth[rows, columns])
    _soften_edges(image, buffers.owner)
    return image.clip(0, 255).astype(np.uint8)


def _soften_edges(image: np.ndarray, owner: np.ndarray) -> None:
    """Average the pixels on both sides of an outline with their neighbours, in place: cheap antialiasing."""
    is_edge = np.zeros(owner.shape, bool)
    across, down = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    is_edge[:, 1:] |= across
    is_edge[:, :-1] |= across
    is_edge[1:] |= down
    is_edge[:-1] |= down
    rows, columns = np.nonzero(is_edge[1:-1, 1:-1])
    rows += 1
    columns += 1
    around = image[rows - 1, columns] + image[rows + 1, columns] + image[rows, columns - 1] + image[rows, columns + 1]
    image[rows, columns] = (image[rows, columns] * 3 + around) / 7

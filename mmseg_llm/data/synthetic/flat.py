"""Flat scenes: antialiased two-dimensional shapes drawn over each other from signed distances.

Legend: H W pixels of the image, h w pixels of the window around a shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmseg_llm.data.synthetic.vocabulary import COLOURS, pick, uniform

if TYPE_CHECKING:
    from mmseg_llm.data.synthetic.levels import Level

_PLACEMENT_TRIES = 30
_STAR_EDGE = (0.45 * math.sin(math.pi / 5), 1 - 0.45 * math.cos(math.pi / 5))


@dataclass(frozen=True)
class FlatObject:
    """A shape to draw: centre and radius in pixels, angle in radians, attribute words, colour as RGB 0..255."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1, negative inside; exact near the outline away from corners.

    Args:
        shape: a word of `FLAT_SHAPES`.
        u, v: coordinates with the centre at 0, v pointing down.
    """
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.85
    if shape == "triangle":
        return np.maximum(v - 0.6, 0.866 * abs(u) - 0.5 * v - 0.6)
    if shape == "diamond":
        return (abs(u) / 0.6 + abs(v) - 1) * (1 / math.hypot(1 / 0.6, 1))
    if shape == "cross":
        across, along = abs(u), abs(v)
        return np.minimum(np.maximum(across - 0.95, along - 0.32), np.maximum(across - 0.32, along - 0.95))
    rho = np.hypot(u, v)
    if shape == "circle":
        return rho - 0.95
    if shape == "ring":
        return abs(rho - 0.72) - 0.24
    if shape == "crescent":
        return np.maximum(rho - 0.95, 0.82 - np.hypot(u - 0.5, v))
    # A star: fold the plane into half of one of its five points.
    folded = abs((np.arctan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    normal_x, normal_y = _STAR_EDGE
    edge = (rho * np.cos(folded) - 1) * normal_x + rho * np.sin(folded) * normal_y
    return edge * (1 / math.hypot(normal_x, normal_y))


def place_flat(level: Level, rng: np.random.Generator) -> list[FlatObject]:
    """Random objects, in drawing order, whole inside the image and apart as the level asks."""
    low, high = level.num_objects
    placed: list[FlatObject] = []
    for _ in range(low + int(rng.random() * (high - low + 1))):
        size = pick(rng, tuple(level.sizes))
        radius = uniform(rng, level.sizes[size]) / 2
        for _ in range(_PLACEMENT_TRIES):
            x, y = (uniform(rng, (radius + 1, level.size - radius - 1)) for _ in range(2))
            if all(math.hypot(x - o.x, y - o.y) > level.separation * (radius + o.radius) for o in placed):
                break
        else:
            continue
        colour = pick(rng, level.colours)
        red, green, blue = (min(255.0, max(0.0, c + uniform(rng, (-10, 10)))) for c in COLOURS[colour])
        angle = uniform(rng, (-0.25, 0.25))
        shape, texture = pick(rng, level.shapes), pick(rng, level.textures)
        placed.append(FlatObject(shape, colour, size, texture, x, y, radius, angle, (red, green, blue)))
    return placed


def soft_field(rng: np.random.Generator, size: int, low: float, high: float, cells: int = 4) -> np.ndarray:
    """A smooth random grey field, float32 `(size, size)` between about `low` and `high`."""
    coarse = (low + (high - low) * rng.random((cells, cells))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def flat_background(level: Level, rng: np.random.Generator) -> np.ndarray:
    """A soft, pale, slightly tinted and grainy background, float32 `(H, W, 3)`."""
    grey = soft_field(rng, level.size, *pick(rng, ((120.0, 165.0), (150.0, 205.0), (185.0, 225.0))))
    grey = grey + rng.standard_normal((level.size, level.size), dtype=np.float32) * uniform(rng, (1.0, 5.0))
    tint = np.asarray([uniform(rng, (-14, 14)) for _ in range(3)], np.float32)
    return grey[:, :, None] + tint  # (H, W, 3)


def _paint(thing: FlatObject, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Colour of each pixel of the window, float32 `(h, w, 3)` or `(3,)` when plain."""
    rgb = np.asarray(thing.rgb, np.float32)
    if thing.texture == "plain":
        return rgb
    edge = thing.radius / math.pi  # pixels per radian at pattern frequency 1: keeps pattern edges one pixel soft
    if thing.texture == "striped":
        frequency = 2 * math.pi / 0.62
        pattern = np.sin((u + v) * (0.707 * frequency)) * (edge * math.pi / frequency) + 0.5
    else:
        frequency = 2 * math.pi / 0.6
        pattern = (np.cos(u * frequency) * np.cos(v * frequency) - 0.35) * (edge * math.pi / frequency) + 0.5
    light = 110.0 if sum(thing.rgb) < 150 else 255.0
    second = rgb + (light - rgb) * 0.75
    share = pattern.clip(0, 1)[:, :, None]
    return rgb + (second - rgb) * share


def draw_flat(level: Level, objects: list[FlatObject], canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the objects over the float32 canvas `(H, W, 3)`, which is left unchanged.

    Returns:
        image: uint8 `(H, W, 3)`.
        owner: int16 `(H, W)`, position in `objects` of what is seen, -1 for the background.
        whole: int `(len(objects),)`, pixels that each object would show if nothing hid it.
    """
    image = canvas.copy()
    owner = np.full((level.size, level.size), -1, np.int16)
    whole = np.zeros(len(objects), np.int64)
    for i, thing in enumerate(objects):
        reach = thing.radius * 1.3 + 2
        left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
        right, bottom = min(level.size, int(thing.x + reach) + 1), min(level.size, int(thing.y + reach) + 1)
        window = np.s_[top:bottom, left:right]
        across = (np.arange(left, right, dtype=np.float32) - np.float32(thing.x)) / np.float32(thing.radius)
        down = (np.arange(top, bottom, dtype=np.float32) - np.float32(thing.y))[:, None] / np.float32(thing.radius)
        cos, sin = np.float32(math.cos(thing.angle)), np.float32(math.sin(thing.angle))
        u, v = across * cos + down * sin, down * cos - across * sin  # (h, w)
        distance = signed_distance(thing.shape, u, v) * np.float32(thing.radius)
        cover = (0.5 - distance).clip(0, 1)[:, :, None]
        view = image[window]
        view += (_paint(thing, u, v) - view) * cover
        inside = distance < 0
        owner[window][inside] = i
        whole[i] = np.count_nonzero(inside)
    return image.clip(0, 255).astype(np.uint8), owner, whole

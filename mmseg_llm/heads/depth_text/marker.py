"""The arrow that points at a pixel (DepthLM, specification section A): drawn on the picture, not sent beside it.

A marker of size s at (x, y) points right: a shaft of s pixels left of the target and floor(s / 2) pixels on each side of a head.
The target itself is never painted. Strokes are one pixel wide, without anti-aliasing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from mmseg_llm.masks import Size

SIZE = 5
RED, BLUE = (255, 0, 0), (0, 0, 255)


@cache
def _offsets(size: int) -> np.ndarray:
    """Painted pixels relative to the target, int64 `(n, 2)` as (x, y)."""
    shaft = [(-k, 0) for k in range(1, size + 1)]
    head = [(-k - 1, side * k) for k in range(1, size // 2 + 1) for side in (-1, 1)]
    return np.array(shaft + head, np.int64)


def draw_marker(
    image: Image.Image, point: tuple[int, int], size: int = SIZE, colour: tuple[int, int, int] = RED
) -> Image.Image:
    """A copy of an RGB image with an arrow whose tip is beside the pixel `(x, y)`.

    Raises:
        ValueError: if the arrow does not fit into the image there.
    """
    if not fits((image.height, image.width), np.array(point), size):
        raise ValueError(f"an arrow of {size} pixels cannot be drawn at {point} in an image of {image.size} (W, H)")
    pixels = np.array(image)
    columns, rows = (np.array(point) + _offsets(size)).T
    pixels[rows, columns] = colour
    return Image.fromarray(pixels)


def draw_markers(
    image: Image.Image, points: np.ndarray, size: int = SIZE, colours: tuple[tuple[int, int, int], ...] = (RED, BLUE)
) -> Image.Image:
    """A copy with an arrow per pixel `(P, 2)`, each in its colour; no arrow covers what another one points at."""
    drawn = image
    for point, colour in zip(points.tolist(), colours, strict=False):
        drawn = draw_marker(drawn, (point[0], point[1]), size, colour)
    pixels = np.array(drawn)
    columns, rows = points.T
    pixels[rows, columns] = np.asarray(image)[rows, columns]
    return Image.fromarray(pixels)


def fits(size: Size, points: np.ndarray, marker: int = SIZE) -> np.ndarray:
    """Whether arrows can be drawn at pixels `(..., 2)` of an image `(H, W)`; bool `(...)` (specification A.3)."""
    x, y = points[..., 0], points[..., 1]
    height, width = size
    return (x >= marker) & (x < width - marker) & (y >= marker) & (y < height - marker)


def snap(size: Size, points: np.ndarray, marker: int = SIZE) -> np.ndarray:
    """The nearest pixels `(..., 2)` where arrows can be drawn.

    Raises:
        ValueError: if the image is too small for any.
    """
    height, width = size
    if min(size) <= 2 * marker:
        raise ValueError(f"an image of size {size} (H, W) is too small for arrows of {marker} pixels")
    return np.clip(points, marker, np.array([width, height]) - marker - 1)

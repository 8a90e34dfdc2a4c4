"""Cell labels from pixel masks (STAMP specification section 3.3).

All rules are separable: one matrix weighs the rows of the mask, another one its columns. `centre_strict` is the reference's rule,
bilinear interpolation at the cell's centre that has to reach 1; it biases boundaries to the background and drops thin structures.

Legend: H W pixels of the original, h w cells.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from mmseg_llm.masks import Mask, Size
from mmseg_llm.structures import Canvas

LabelRule = Literal["area", "coverage", "centre", "centre_strict"]
ALMOST_ONE = 1 - 1e-4
"""The reference truncates to an integer; in float32 its "exactly 1" fails by rounding, which this bound repairs."""


def check_rule(rule: str) -> None:
    """Raise ValueError for an unknown rule."""
    if rule not in get_args(LabelRule):
        raise ValueError(f"unknown label rule '{rule}'; use one of {', '.join(get_args(LabelRule))}")


def cell_labels(mask: Mask, canvas: Canvas, grid: Size, rule: LabelRule) -> np.ndarray:
    """Labels of the cells that a canvas is cut into.

    Args:
        mask: at original size.
        canvas: whose whole area the grid covers.
        grid: `(h, w)`.
        rule: `area` (at least half of the cell), `coverage` (the share itself), `centre` (the pixel under the centre), or
            `centre_strict` (all pixels around the centre).

    Returns:
        float32 `(h, w)` in [0, 1].

    Raises:
        ValueError: if the mask is not of the original image's size.
    """
    if mask.size != canvas.original_size:
        raise ValueError(f"mask of size {mask.size} does not fit an image of size {canvas.original_size}")
    if mask.area == 0:
        return np.zeros(grid, np.float32)
    weights = []
    for axis in (0, 1):
        edges = np.arange(grid[axis] + 1, dtype=np.float64) * (canvas.size[axis] / grid[axis])
        edges = (edges - canvas.offset[1 - axis]) / canvas.scale[1 - axis]  # in pixels of the original
        weights.append(_weights(edges, mask.size[axis], rule))
    values = weights[0] @ mask.array.astype(np.float64) @ weights[1].T  # (h, w)
    if rule == "coverage":
        return values.clip(0, 1).astype(np.float32)
    return (values >= {"area": 0.5, "centre": 0.5, "centre_strict": ALMOST_ONE}[rule]).astype(np.float32)


def _weights(edges: np.ndarray, length: int, rule: LabelRule) -> np.ndarray:
    """`(cells, length)`: how much each pixel counts in each cell, along one axis."""
    start, stop = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)
    if rule in {"area", "coverage"}:
        overlap = np.minimum(stop, pixels + 1) - np.maximum(start, pixels)
        return overlap.clip(0) / (stop - start)
    centres = (start + stop) / 2
    if rule == "centre":
        return (np.floor(centres + 1e-9) == pixels).astype(np.float64)  # a centre on an edge belongs to the right of it
    at = (centres - 0.5).clip(0, length - 1)  # bilinear, borders repeated
    return (1 - np.abs(at - pixels)).clip(0)

"""From sparse depth on a grid to every pixel, guided by colour: a joint bilateral fit of planes.

The inverse of planar depth of a plane in space is affine in the pixel. Around every pixel such an affine function is fitted to
the nearest cells, each weighted by how near it is, how alike in colour, and how alike in depth to the cell that fits best. So
slanted planes come back exactly and edges follow the image, without points that float between two surfaces.

Legend: H W pixels, R C rows and columns of the grid, h rows of a strip of the image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

REACH = 2
"""Cells that count in either direction."""
NEARNESS, LIKENESS, SAME_DEPTH = 1.0, 20.0, 0.2
"""Standard deviations of the weights: cells, grey levels of all channels together, and logarithm of the depth ratio."""
STRANGE, TEXTURE = 1e-3, 0.03
"""What colours unlike that of the pixel count at least. In finding the cell that fits best, so that a pixel like no other
takes the nearest; in fitting, as cells at the depth of that one may be another spot of the same surface."""
RIDGE = 1e-3
"""Keeps the slope of a fit to few cells small; cells squared."""
STRIP = 1 << 19
"""Pixels at once, which bounds the memory."""


def densify(metres: np.ndarray, points: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """Metres float32 `(H, W)`, nan farther than a cell from any answer.

    Args:
        metres: `(R, C)` planar metres, nan where there is none.
        points: `(R, C, 2)` pixels (x, y) they are of, near the centres of the cells.
        guide: uint8 `(H, W, 3)`.
    """
    height, width = guide.shape[:2]
    inverse = np.zeros(metres.shape, np.float32)
    np.divide(1, metres, out=inverse, where=np.isfinite(metres) & (metres > 0))
    colours = _colours_at(guide, points)
    step = max(1, STRIP // width)
    strips = [
        _fit(inverse, points, colours, guide[top : top + step].astype(np.float32), top, height)
        for top in range(0, height, step)
    ]
    found = np.concatenate(strips)  # (H, W)
    with np.errstate(divide="ignore"):
        return np.where(found > 0, 1 / found, np.nan).astype(np.float32)


def _colours_at(guide: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Colours float32 `(R, C, 3)` at points, each the mean of 3x3 pixels, as a single one may be noise."""
    import cv2

    blurred = cv2.blur(guide, (3, 3)).astype(np.float32)
    x, y = (np.rint(points[..., axis]).astype(np.int64).clip(0, guide.shape[1 - axis] - 1) for axis in (0, 1))
    return blurred[y, x]


def _fit(
    inverse: np.ndarray, points: np.ndarray, colours: np.ndarray, guide: np.ndarray, top: int, height: int
) -> np.ndarray:
    """Inverse metres `(h, W)` of the strip of the image that begins in row `top`; 0 where there is none."""
    shape = guide.shape[:2]
    best, reference = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    near = np.zeros(shape, bool)
    for values, dx, dy, weight in _cells(inverse, points, colours, guide, top, height, STRANGE):
        is_better = weight > best
        best, reference = np.where(is_better, weight, best), np.where(is_better, values, reference)
        near |= (values > 0) & (np.maximum(abs(dx), abs(dy)) <= 1.001)
    logarithm = np.log(np.where(reference > 0, reference, 1))
    sums = np.zeros((9, *shape), np.float32)
    low, high = np.full(shape, np.inf, np.float32), np.zeros(shape, np.float32)
    for values, dx, dy, weight in _cells(inverse, points, colours, guide, top, height, TEXTURE):
        contrast = np.log(np.where(values > 0, values, 1)) - logarithm
        weight = weight * np.exp(-(contrast**2) / (2 * SAME_DEPTH**2))
        terms = (1, dx, dy, dx * dx, dx * dy, dy * dy, values, dx * values, dy * values)
        for total, term in zip(sums, terms, strict=True):
            total += weight * term
        counts = weight > 0.02 * best
        low, high = np.where(counts, np.minimum(low, values), low), np.where(counts, np.maximum(high, values), high)
    slack = (high - low) / 2  # half a cell beyond the outermost centres
    found = _at_origin(*sums)
    return np.where(near, found.clip(np.maximum(low - slack, low / 2), high + slack), 0)


def _cells(
    inverse: np.ndarray,
    points: np.ndarray,
    colours: np.ndarray,
    guide: np.ndarray,
    top: int,
    height: int,
    floor: float,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The cells around each pixel, one neighbour after the other: value, offset in cells and weight, `(h, W)` each."""
    (rows, columns), (strip, width) = inverse.shape, guide.shape[:2]
    x, y = np.arange(width, dtype=np.float32), np.arange(top, top + strip, dtype=np.float32)
    at_row = np.floor((y + 0.5) * rows / height).astype(np.int64)
    at_column = np.floor((x + 0.5) * columns / width).astype(np.int64)
    across, down = (points[..., axis].astype(np.float32) for axis in (0, 1))
    for i in range(-REACH, REACH + 1):
        for j in range(-REACH, REACH + 1):
            row, column = at_row + i, at_column + j
            inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
            cell = np.ix_(row.clip(0, rows - 1), column.clip(0, columns - 1))
            values = np.where(inside, inverse[cell], 0)
            dx = (across[cell] - x[None, :]) * (columns / width)
            dy = (down[cell] - y[:, None]) * (rows / height)
            contrast = ((colours[cell] - guide) ** 2).sum(axis=-1)
            alike = np.exp(-contrast / (2 * LIKENESS**2)) + floor
            weight = np.exp(-(dx * dx + dy * dy) / (2 * NEARNESS**2)) * alike
            yield values, dx, dy, np.where(values > 0, weight, 0)


def _at_origin(
    total: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    xx: np.ndarray,
    xy: np.ndarray,
    yy: np.ndarray,
    value: np.ndarray,
    x_value: np.ndarray,
    y_value: np.ndarray,
) -> np.ndarray:
    """Weighted least squares of an affine function from its sums, evaluated at offset 0."""
    total = np.where(total > 0, total, 1)
    x, y, value = x / total, y / total, value / total
    xx, yy, xy = xx / total - x * x + RIDGE, yy / total - y * y + RIDGE, xy / total - x * y
    x_value, y_value = x_value / total - x * value, y_value / total - y * value
    determinant = xx * yy - xy * xy
    slope_x = (x_value * yy - y_value * xy) / determinant
    slope_y = (y_value * xx - x_value * xy) / determinant
    return value - slope_x * x - slope_y * y

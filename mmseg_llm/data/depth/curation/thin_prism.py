"""THIN_PRISM_FISHEYE, the lens of ETH3D: COLMAP's equidistant fisheye with radial, tangential and thin-prism terms.

Legend: N pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STEPS = 50
CLOSE = 1e-12


def thin_prism_rays(pixels: np.ndarray, params: Sequence[float]) -> np.ndarray:
    """Directions `(N, 3)` with Z = 1 of pixels `(N, 2)`, whose centres are whole numbers; inverse of `thin_prism_pixels`.

    Solved by Newton's method; a pixel that no direction is seen in gives NaN.

    Args:
        pixels: `(N, 2)`.
        params: fx, fy, cx, cy, k1, k2, p1, p2, k3, k4, sx1, sy1; cx and cy counted from the corner of the image.
    """
    fx, fy, cx, cy = params[:4]
    wanted = (np.asarray(pixels, np.float64) + 0.5 - (cx, cy)) / (fx, fy)
    spots = wanted.copy()
    for _ in range(STEPS):
        error = _distort(spots, params[4:]) - wanted
        if not np.abs(error).max(initial=0) > CLOSE:
            break
        spots -= _solve(spots, error, params[4:])
    far = np.abs(_distort(spots, params[4:]) - wanted).max(axis=-1, initial=0) > 1e-9
    angle = np.linalg.norm(spots, axis=-1)
    far |= angle >= np.pi / 2  # behind the camera
    scale = np.where(angle > 1e-12, np.tan(angle) / np.maximum(angle, 1e-12), 1.0)
    rays = np.concatenate((spots * scale[:, None], np.ones((len(spots), 1))), axis=-1)
    rays[far] = np.nan
    return rays


def thin_prism_pixels(rays: np.ndarray, params: Sequence[float]) -> np.ndarray:
    """Pixels `(N, 2)` where directions `(N, 3)` in front of the camera are seen."""
    rays = np.asarray(rays, np.float64)
    plane = rays[:, :2] / rays[:, 2:]
    radius = np.linalg.norm(plane, axis=-1, keepdims=True)
    spots = plane * np.where(radius > 1e-12, np.arctan(radius) / np.maximum(radius, 1e-12), 1.0)
    fx, fy, cx, cy = params[:4]
    return _distort(spots, params[4:]) * (fx, fy) + (cx, cy) - 0.5


def _distort(spots: np.ndarray, params: Sequence[float]) -> np.ndarray:
    """Where equidistant points `(N, 2)` are moved to."""
    k1, k2, p1, p2, k3, k4, sx, sy = params
    u, v = spots[:, 0], spots[:, 1]
    square = u * u + v * v
    radial = 1 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
    x = u * radial + 2 * p1 * u * v + p2 * (square + 2 * u * u) + sx * square
    y = v * radial + 2 * p2 * u * v + p1 * (square + 2 * v * v) + sy * square
    return np.stack((x, y), axis=-1)


def _solve(spots: np.ndarray, error: np.ndarray, params: Sequence[float]) -> np.ndarray:
    """A step of Newton's method `(N, 2)`, by central differences."""
    small = 1e-6
    along_u, along_v = np.array([small, 0.0]), np.array([0.0, small])
    by_u = (_distort(spots + along_u, params) - _distort(spots - along_u, params)) / (2 * small)
    by_v = (_distort(spots + along_v, params) - _distort(spots - along_v, params)) / (2 * small)
    determinant = by_u[:, 0] * by_v[:, 1] - by_v[:, 0] * by_u[:, 1]
    determinant = np.where(np.abs(determinant) < 1e-9, 1e-9, determinant)
    du = (by_v[:, 1] * error[:, 0] - by_v[:, 0] * error[:, 1]) / determinant
    dv = (by_u[:, 0] * error[:, 1] - by_u[:, 1] * error[:, 0]) / determinant
    return np.stack((du, dv), axis=-1)

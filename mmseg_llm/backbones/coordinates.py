"""Coordinate codecs: how a model family writes a pixel of its canvas as numbers, invertibly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CoordinateCodec:
    """Quantised coordinates relative to the canvas: `bins` equal cells per axis, a point is written as its cell.

    InternVL and Qwen2/3-VL write 0..1000 relative to the image (1001 values are accepted on input, 1000 cells written).

    Attributes:
        bins: number of cells per axis; 0 writes pixels of the canvas instead.
    """

    bins: int = 1000

    def encode(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Cells of canvas points.

        Args:
            points: `(..., 2)` as (x, y), pixel centres at integers + 0.
            size: `(h, w)` of the canvas.

        Returns:
            int64 `(..., 2)`.

        Raises:
            ValueError: if a point lies outside of the canvas.
        """
        points = np.asarray(points, np.float64) + 0.5
        extent = np.array([size[1], size[0]], np.float64)
        if ((points < 0) | (points > extent)).any():
            raise ValueError(f"a point lies outside of the canvas of size {size} (height, width); map it there first")
        cells = np.array([self.bins, self.bins], np.float64) if self.bins else extent
        return np.minimum(np.floor(points / extent * cells), cells - 1).astype(np.int64)

    def decode(self, cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Centres of the cells as canvas points `(..., 2)`; inverse of `encode` within half a cell."""
        extent = np.array([size[1], size[0]], np.float64)
        count = np.array([self.bins, self.bins], np.float64) if self.bins else extent
        return (np.asarray(cells, np.float64) + 0.5) / count * extent - 0.5

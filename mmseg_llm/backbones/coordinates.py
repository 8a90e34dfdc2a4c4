"""Coordinate codecs: how a model family writes a pixel of its canvas as numbers, invertibly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmseg_llm.masks import Size


@dataclass(frozen=True)
class CoordinateCodec:
    """Quantised coordinates on the canvas: a point is written as the cell it lies in.

    InternVL and Qwen2-VL/Qwen3-VL write 0..1000 relative to the image (1001 values are accepted on input, 1000 cells
    written), Qwen2.5-VL pixels of the resized canvas, LLaVA fractions in 0..1.

    Attributes:
        bins: number of cells per axis; 0 takes the pixels of the canvas as cells.
        style: cells are written as `integer`, or as `fraction` (cell / bins) with as many decimals as that needs.
    """

    bins: int = 1000
    style: Literal["integer", "fraction"] = "integer"

    def __post_init__(self) -> None:
        """Raises: ValueError for fractions of pixels."""
        if self.style == "fraction" and self.bins <= 0:
            raise ValueError("coordinates written as fractions need bins > 0, such as 1000")

    def _cells(self, size: Size) -> np.ndarray:
        return np.array([self.bins or size[1], self.bins or size[0]], np.float64)

    def encode(self, points: np.ndarray, size: Size) -> np.ndarray:
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
        if not ((points >= 0) & (points <= extent)).all():  # nan, too, lies nowhere
            raise ValueError(f"a point lies outside of the canvas of size {size} (height, width); map it there first")
        cells = self._cells(size)
        return np.minimum(np.floor(points / extent * cells), cells - 1).astype(np.int64)

    def decode(self, cells: np.ndarray, size: Size) -> np.ndarray:
        """Centres of the cells as canvas points `(..., 2)`; inverse of `encode` within half a cell."""
        extent = np.array([size[1], size[0]], np.float64)
        return (np.asarray(cells, np.float64) + 0.5) / self._cells(size) * extent - 0.5

    def write(self, points: np.ndarray, size: Size) -> list[str]:
        """The numbers of points `(..., 2)` as the family writes them, flat: x, y, x, y, ..."""
        cells = self.encode(points, size).ravel().tolist()
        if self.style == "integer":
            return [str(cell) for cell in cells]
        decimals = len(str(self.bins - 1))
        return [f"{cell / self.bins:.{decimals}f}" for cell in cells]

    def read(self, text: str, size: Size) -> np.ndarray:
        """All points in a text as canvas points `(n, 2)`; inverse of `write` within half a cell.

        Raises:
            ValueError: if the numbers are no pairs, or one lies outside of the canvas.
        """
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
        if len(numbers) % 2:
            raise ValueError(f"{len(numbers)} numbers in {text!r} are no (x, y) pairs")
        values = np.array(numbers, np.float64).reshape(-1, 2)
        cells = np.rint(values * self.bins) if self.style == "fraction" else values
        limit = self._cells(size)
        if ((cells < 0) | (cells > limit)).any():
            raise ValueError(f"a number in {text!r} lies outside of the canvas of size {size} (height, width)")
        return self.decode(np.minimum(cells, limit - 1), size)

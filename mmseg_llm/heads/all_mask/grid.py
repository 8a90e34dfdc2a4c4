"""From mask tokens to cells and back to pixels.

A mask token stands for one image token, or for one of s x s parts of it (`scale`); it decides about r x r cells (`cells`).

Legend: B images, T image tokens, K masks, M mask tokens, D width, C classes, h w grid of image tokens, s r as above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as functional

from mmseg_llm.backbones.features import VisionFeatures
from mmseg_llm.geometry import canvas_to_original
from mmseg_llm.masks import Size
from mmseg_llm.structures import Canvas


@dataclass(frozen=True)
class MaskGrid:
    """How fine a mask is predicted.

    Attributes:
        scale: mask tokens per image token and axis; 1 is the reference.
        cells: cells per mask token and axis; 1 is the reference.
        position: `sequential` rotary positions as in the reference, or `grid`: rows and columns on the axes of M-RoPE (the
            reference's unused variant, specification 2.5).
    """

    scale: int = 1
    cells: int = 1
    position: Literal["sequential", "grid"] = "sequential"

    def __post_init__(self) -> None:
        """Raises: ValueError for a factor below one, or an unknown kind of positions."""
        if self.position not in ("sequential", "grid"):
            raise ValueError(f"grid position is '{self.position}'; use one of sequential, grid")
        if self.scale < 1 or self.cells < 1:
            raise ValueError(f"grid scale {self.scale} and cells per token {self.cells} must be at least 1")

    def tokens(self, grid: Size) -> Size:
        """Rows and columns of mask tokens on an image of `(h, w)` image tokens."""
        return (grid[0] * self.scale, grid[1] * self.scale)

    def shape(self, grid: Size) -> Size:
        """Rows and columns of cells."""
        return (grid[0] * self.scale * self.cells, grid[1] * self.scale * self.cells)

    def offsets(self, grid: Size, rope_axes: int) -> np.ndarray:
        """Rotary positions of the mask tokens behind their trigger, int64 `(A, M)` (STAMP section 2.2)."""
        rows, columns = self.tokens(grid)
        if self.position == "grid":
            row, column = (index.ravel() for index in np.indices((rows, columns)))
            return np.stack([np.zeros_like(row), row, column])
        return np.broadcast_to(np.arange(rows * columns), (rope_axes, rows * columns)).copy()

    def features(self, features: VisionFeatures, place: torch.Tensor | None) -> torch.Tensor:
        """What is added to the embedding of each mask token: its image token (STAMP section 2.2), `(B, M, D)`.

        Args:
            features: of the images.
            place: `(s * s, D)` embedding of a token's place within its image token, on grids finer than the visual one.
        """
        if self.scale == 1:
            return features.tokens
        assert place is not None
        rows = [
            self._finer(features.tokens[i, : grid[0] * grid[1]], grid, place) for i, grid in enumerate(features.grids)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _finer(self, tokens: torch.Tensor, grid: Size, place: torch.Tensor) -> torch.Tensor:
        """Image tokens `(T, D)` interpolated between their centres, `(M, D)`."""
        coarse = tokens.T.unflatten(1, grid)[None]  # (1, D, h, w)
        fine = functional.interpolate(coarse.float(), self.tokens(grid), mode="bilinear", align_corners=False)
        pattern = place.T.unflatten(1, (self.scale, self.scale)).repeat(1, *grid)  # (D, s h, s w)
        return (fine[0].to(place.dtype) + pattern).flatten(1).T.to(tokens.dtype)

    def arrange(self, values: torch.Tensor, grid: Size, num_classes: int) -> torch.Tensor:
        """Outputs of the classifier `(K, M, C r r)` as cells `(K, C, s r h, s r w)`."""
        rows, columns = self.tokens(grid)
        planes = values.transpose(1, 2).unflatten(2, (rows, columns))  # (K, C r r, s h, s w)
        cells = functional.pixel_shuffle(planes, self.cells)
        assert cells.shape[1] == num_classes
        return cells


def upsample(logits: torch.Tensor, frame: Canvas, rule: Literal["bilinear", "nearest"]) -> torch.Tensor:
    """Logits of cells `(K, h, w)` at the size of the original image, `(K, H, W)`.

    `nearest` is the reference's rule: the cell of a pixel is its index times the ratio of the sizes, rounded down.
    """
    if rule == "bilinear":
        return canvas_to_original(logits, frame)
    return functional.interpolate(logits[None], frame.original_size, mode="nearest")[0]

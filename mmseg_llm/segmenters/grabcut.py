"""GrabCutRefiner: sharp masks without any weights, by OpenCV's GrabCut (Rother et al., SIGGRAPH 2004, section 3).

The coarse mask says where object and background certainly are; colours decide in the band between. This is for trying
out and for machines without SAM: it follows colour edges and knows nothing of objects.

Legend: H W pixels of the image, h w cells of the coarse map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.base import RefineError, Refiner
from mmseg_llm.segmenters.prompts import upsample_logits

if TYPE_CHECKING:
    import torch
    from PIL import Image

# Share of the largest distance from the border of a mask that is sure at least, so that thin masks keep a core.
CORE = 0.6

# OpenCV's rectangle, which is not read where a mask is given.
NO_BOX = (0, 0, 0, 0)


class GrabCutRefiner(Refiner):
    """Lets colours decide in a band around the border of the coarse mask.

    Distances are in cells of the coarse map (`max(H / h, W / w)` pixels), because that is how far its border can be off.
    The defaults were chosen on rendered scenes and photographs with masks of 28-pixel and of H/16-pixel cells.

    The coarse mask itself is the answer where GrabCut cannot work or runs away: no background in the image, or a result
    whose area is not within `1 / max_change` and `max_change` of the coarse area.

    Args:
        inner: pixels deeper than this inside of the mask are sure foreground.
        outer: pixels farther than this outside are sure background.
        context: width of the background seen around the mask.
        min_cell: cells are not taken for finer than this share of the square root of the mask's area; what counts where
            a mask at full resolution is given.
        iterations: of GrabCut.
        max_change: largest factor between the coarse and the refined area.
        max_side: larger crops are worked on at this size in pixels, and their result is scaled up.
        seed: of OpenCV's generator, which starts the colour clusters.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        inner: float = 0.5,
        outer: float = 0.75,
        context: float = 3.0,
        min_cell: float = 0.1,
        iterations: int = 3,
        max_change: float = 8.0,
        max_side: int = 800,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("inner", inner, 0.0),
            ("outer", outer, 0.0),
            ("context", context, outer),
            ("min_cell", min_cell, 0.0),
            ("iterations", iterations, 1),
            ("max_change", max_change, 1.0),
            ("max_side", max_side, 32),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.inner = inner
        self.outer = outer
        self.context = context
        self.min_cell = min_cell
        self.iterations = iterations
        self.max_change = max_change
        self.max_side = max_side
        self.seed = seed

    def _refine(self, image: Image.Image, coarse_logits: torch.Tensor) -> list[Mask]:
        pixels = np.asarray(image)[..., ::-1]  # OpenCV's order of colours
        size = (image.height, image.width)
        cell = max(size[0] / coarse_logits.shape[1], size[1] / coarse_logits.shape[2])
        coarse_logits = coarse_logits.cpu()
        smooth = (upsample_logits(coarse_logits, size, "bilinear") > 0).numpy()  # (Q, H, W)
        blocks = (upsample_logits(coarse_logits, size, "nearest") > 0).numpy()
        return [Mask.from_array(self._cut(pixels, a if a.any() else b, cell)) for a, b in zip(smooth, blocks)]

    def _cut(self, pixels: np.ndarray, coarse: np.ndarray, cell: float) -> np.ndarray:
        """Refine one bool mask `(H, W)` on the BGR image `(H, W, 3)`."""
        cell = max(cell, self.min_cell * float(coarse.sum()) ** 0.5)
        if not coarse.any() or coarse.all():
            return coarse
        window = crop_around(coarse, round(self.context * cell))
        refined = self._cut_crop(pixels[window], coarse[window], cell)
        ratio = float(refined.sum()) / float(coarse.sum())
        if not 1 / self.max_change <= ratio <= self.max_change:
            return coarse
        result = np.zeros_like(coarse)
        result[window] = refined
        return result

    def _cut_crop(self, pixels: np.ndarray, coarse: np.ndarray, cell: float) -> np.ndarray:
        """GrabCut on a crop, at a size of at most `max_side`."""
        try:
            import cv2
        except ImportError as error:
            raise RefineError("GrabCut needs OpenCV; `pip install opencv-python-headless`") from error

        height, width = coarse.shape
        scale = min(1.0, self.max_side / max(height, width))
        small: Any = np.ascontiguousarray(pixels)
        mask: Any = coarse.astype(np.uint8)
        if scale < 1:
            side = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = cv2.resize(small, side, interpolation=cv2.INTER_AREA)
            mask = cv2.resize(mask, side, interpolation=cv2.INTER_NEAREST)
        labels = self._labels(mask, cell * scale)
        if not (
            np.isin(labels, (cv2.GC_BGD, cv2.GC_PR_BGD)).any() and np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).any()
        ):
            return coarse
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # colour models, filled by OpenCV
        cv2.setRNGSeed(self.seed)
        try:
            cv2.grabCut(small, labels, NO_BOX, background, foreground, self.iterations, cv2.GC_INIT_WITH_MASK)
        except cv2.error as error:
            raise RefineError(f"GrabCut failed on a crop of {coarse.shape} (height, width): {error}") from error
        refined: Any = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
        if scale < 1:
            refined = cv2.resize(refined, (width, height), interpolation=cv2.INTER_LINEAR)
        return refined > 0.5

    def _labels(self, mask: np.ndarray, cell: float) -> np.ndarray:
        """GrabCut's four classes, uint8 `(h, w)`, by distance from the border of a 0/1 mask."""
        import cv2

        # The mask goes on where the image ends: its edge is no border of the object.
        padded = np.pad(mask, 1, mode="edge")
        inside, outside = (cv2.distanceTransform(side, cv2.DIST_L2, 5)[1:-1, 1:-1] for side in (padded, 1 - padded))
        labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        labels[(mask == 1) & (inside > min(self.inner * cell, CORE * float(inside.max())))] = cv2.GC_FGD
        labels[(mask == 0) & (outside > self.outer * cell)] = cv2.GC_BGD
        return labels


def crop_around(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the bool `(H, W)` mask's box, widened by `margin` pixels within the image."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    first, second = (slice(max(0, int(found[0]) - margin), int(found[-1]) + 1 + margin) for found in (rows, columns))
    return first, second

"""ImageGeometry: which canvas a backbone takes of an image, and how it is cut into patches and tokens.

Sizes are `(height, width)` in pixels, grids `(rows, columns)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmseg_llm.masks import Size

MAX_ASPECT_RATIO = 200
CLIP_STATISTICS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF_STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class ImageGeometry:
    """View of an image: pixels, patches of the vision tower and tokens of the language model.

    Without bounds every canvas has `image_size`. With them the canvas keeps the aspect ratio of the image and its sides are
    multiples of `patch * merge`: the nearest within bounds on the area (dynamic resolution of the Qwen-VL families), or the next
    ones above an image whose longer side is bounded (Pixtral).

    Attributes:
        image_size: of a fixed canvas; with bounds the square canvas of heads that need one.
        patch: side of a patch in pixels.
        merge: patches per token and axis (the inverse of the pixel-unshuffle ratio).
        mean, std: channel statistics on the 0..1 scale.
        min_pixels, max_pixels: bounds on the area of a dynamic canvas.
        max_side: longer images are scaled down to it before their sides are rounded up; nothing is scaled up.
    """

    image_size: Size = (448, 448)
    patch: int = 14
    merge: int = 2
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError if the image size is not a whole number of tokens, or the pixel bounds are no bounds."""
        if self.merge > 1 and (self.image_size[0] % self.step or self.image_size[1] % self.step):
            raise ValueError(f"image size {self.image_size} must be a multiple of patch * merge = {self.step}")
        if (self.min_pixels is None) != (self.max_pixels is None):
            raise ValueError("give both min_pixels and max_pixels for a dynamic canvas, or neither for a fixed one")
        if self.max_side is not None:
            if self.min_pixels is not None:
                raise ValueError("max_side and pixel bounds are two rules for a dynamic canvas; give one of them")
            if self.max_side < self.step:
                raise ValueError(f"max_side {self.max_side} must be at least one token ({self.step} pixels)")
        elif self.is_dynamic and not self.step**2 <= (self.min_pixels or 0) <= (self.max_pixels or 0):
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels} must be at least one token "
                f"({self.step**2} pixels) and in this order"
            )

    @property
    def step(self) -> int:
        """Side of a token in canvas pixels."""
        return self.patch * self.merge

    @property
    def is_dynamic(self) -> bool:
        """Whether the canvas follows the shape of the image."""
        return self.min_pixels is not None or self.max_side is not None

    def canvas_size(self, original: Size) -> Size:
        """Canvas of an image of `original` size, by the rule of the stock processor.

        With pixel bounds that is the one of Qwen2-VL (STAMP specification 1.2), with `max_side` the one of Pixtral (DepthLM
        specification B.4).

        Raises:
            ValueError: if the image is empty or too elongated to be cut into tokens.
        """
        height, width = original
        if min(height, width) < 1:
            raise ValueError(f"an image of size {tuple(original)} (height, width) has no pixels")
        if self.max_side is not None:
            return self._rounded_up(original, self.max_side)
        if self.min_pixels is None or self.max_pixels is None:
            return self.image_size
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"an image of size {tuple(original)} (height, width) is more than {MAX_ASPECT_RATIO} times as long as it is "
                "wide, which no token grid fits; crop it into pieces"
            )
        step = self.step
        rows, columns = (round(side / step) * step for side in (height, width))
        if rows * columns > self.max_pixels:
            ratio = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(step, math.floor(side / ratio / step) * step) for side in (height, width))
        elif rows * columns < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * ratio / step) * step for side in (height, width))
        return (rows, columns)

    def _rounded_up(self, original: Size, longest: int) -> Size:
        height, width = original
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if min(height, width) < 1:
            raise ValueError(
                f"an image of size {tuple(original)} (height, width) is more than {longest} times as long as it is wide, so that "
                f"nothing is left of it at {longest} pixels; crop it into pieces"
            )
        step = self.step
        return (math.ceil(height / step) * step, math.ceil(width / step) * step)

    def patch_grid(self, size: Size | None = None) -> Size:
        """Vision patches of a canvas; of the fixed one when None."""
        height, width = size or self.image_size
        return (height // self.patch, width // self.patch)

    def token_grid(self, size: Size | None = None) -> Size:
        """Image tokens of a canvas in the language model."""
        rows, columns = self.patch_grid(size)
        return (rows // self.merge, columns // self.merge)

    def num_tokens(self, size: Size | None = None) -> int:
        """Number of image tokens of a canvas."""
        rows, columns = self.token_grid(size)
        return rows * columns

    def covered(self, size: Size | None = None) -> Size:
        """What the tokens see of a canvas: towers whose size is no multiple of the patch drop the last pixels."""
        rows, columns = self.token_grid(size)
        return (rows * self.step, columns * self.step)

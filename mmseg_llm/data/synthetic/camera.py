"""The pinhole camera of solid scenes: where it stands, its rays, and where points of the world appear.

World: origin on the ground below the camera, x right, y forward (horizontal), z up, metres. A pixel `(x, y)`, whole
numbers at pixel centres, looks along `((x - cx) / f, (y - cy) / f, 1)` in camera axes (right, down, forward), so a ray
parameter is a planar depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.structures import Camera

if TYPE_CHECKING:
    from mmseg_llm.data.synthetic.primitives import Vector


@dataclass(frozen=True)
class Viewpoint:
    """A camera above the ground, without roll.

    Attributes:
        height: metres above the ground.
        tilt: radians below the horizon.
        focal: pixels.
        size: side of the square image in pixels.
    """

    height: float
    tilt: float
    focal: float
    size: int

    @property
    def centre(self) -> float:
        """Principal point along both axes: the middle of the image, in pixel indices."""
        return (self.size - 1) / 2

    @property
    def camera(self) -> Camera:
        """Intrinsics."""
        return Camera(self.focal, self.focal, self.centre, self.centre, "planar")

    @cached_property
    def rays(self) -> Vector:
        """World directions of all pixels: x `(1, W)`, y `(H, 1)`, z `(H, 1)`; planar depth 1 each."""
        offsets = (np.arange(self.size) - self.centre) / self.focal
        down = offsets[:, None]
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        return offsets[None, :], cos - down * sin, -sin - down * cos

    def ground(self, x: float, y: float) -> tuple[float, float, float] | None:
        """The ground point `(right, forward)` seen at a pixel and its planar depth, None above the horizon."""
        down = (y - self.centre) / self.focal
        fall = math.sin(self.tilt) + down * math.cos(self.tilt)
        if fall <= 1e-6:
            return None
        depth = self.height / fall
        forward = depth * (math.cos(self.tilt) - down * math.sin(self.tilt))
        return depth * (x - self.centre) / self.focal, forward, depth

    def row(self, depth: float) -> float:
        """The image row at which the ground is at this planar depth."""
        down = (self.height / depth - math.sin(self.tilt)) / math.cos(self.tilt)
        return down * self.focal + self.centre

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """Pixel `(x, y)` and planar depth of a world point."""
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        depth = y * cos + (self.height - z) * sin
        down = (self.height - z) * cos - y * sin
        scale = self.focal / max(depth, 1e-3)
        return x * scale + self.centre, down * scale + self.centre, depth

"""A made-up dataset for tests of what all curators share."""

from __future__ import annotations

from functools import partial

from slanted import PLANE, grid, pinhole_rays

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import Curator, Frame, View
from mmseg_llm.data.depth.points import Unusable

LENS = (60.0, 62.0, 30.0, 22.0)
CAMERA = Camera(*LENS, "planar")


class Toy(Curator):
    """Images 0 to 9 of a plane; those in `broken` cannot be read."""

    name, distance, valid_range = "toy", "ray", (0.005, 100.0)
    label_source, splits, split_rule = "made up", ("all",), "all"

    def __init__(self, broken=(), count=10):
        self.broken, self.count = broken, count

    def frames(self, root, split):
        for number in range(self.count):
            yield Frame(f"{number}.png", f"scene {number // 2}", partial(self.view, number), camera_name="left")

    def view(self, number):
        if number in self.broken:
            raise Unusable("it is made to fail", "made to fail")
        pixels = grid(64, 48).reshape(-1, 2)
        return View((48, 64), CAMERA, pixels, PLANE.along_axis(pinhole_rays(pixels, *LENS)))

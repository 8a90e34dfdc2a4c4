"""iBims-1: 100 indoor images with laser-scanned depth, for evaluation (`ibims1_core_raw`).

imagelist.txt  rgb/<name>.png  depth/<name>.png  calib/<name>.txt  mask_invalid/<name>.png  mask_transp/<name>.png
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, folder_of
from mmseg_llm.data.depth.curation.reading import labelled, read_numbers, read_values
from mmseg_llm.data.depth.points import image_size

UNIT = 50 / 65535
"""Metres per unit of the 16-bit depth."""


class Ibims1(Curator):
    """Depth along the axis, of pixels that are neither invalid nor transparent. A scene is a kind of room (`corridor`, ...)."""

    name = "ibims1"
    distance = "planar"
    valid_range = (0.005, 50.0)
    label_source = "laser scan: depth/*.png x 50/65535, without mask_invalid and mask_transp"
    splits = ("test",)
    split_rule = "official: all images are for evaluation"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """One per image of `rgb`, by name."""
        pictures = folder_of(root / "rgb", "give the folder ibims1_core_raw, which holds rgb, depth and calib")
        for path in sorted(pictures.glob("*.png")):
            scene = path.stem.rpartition("_")[0] or path.stem
            yield Frame(f"rgb/{path.name}", scene, partial(_view, root, path))


def _view(root: Path, image: Path) -> View:
    size = image_size(image)
    numbers = read_numbers(root / "calib" / f"{image.stem}.txt", 4, 9)
    fx, fy, cx, cy = numbers if len(numbers) == 4 else (numbers[place] for place in (0, 4, 2, 5))
    trusted = [read_values(root / folder / image.name, size) > 0 for folder in ("mask_invalid", "mask_transp")]
    depth = read_values(root / "depth" / image.name, size) * UNIT
    pixels, metres = labelled(depth, trusted[0] & trusted[1])
    return View(size, Camera(fx, fy, cx, cy, "planar"), pixels, metres)

"""SUN RGB-D: indoor frames of four sensors, and the NYU frames among them.

<sensor>/<collection>/.../<frame>/  image/*.jpg  depth/*.png  depth_bfx/*.png  intrinsics.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import BY_SCENE, Curator, Frame, View, is_in_split, lacking, scene_rule
from mmseg_llm.data.depth.curation.reading import labelled, read_numbers, read_values
from mmseg_llm.data.depth.points import Unusable, image_size

VAL_SHARE = 0.05
NYU = "NYUdata"
_FRAME = re.compile(r"_rgbf\d+.*$")  # what tells the frames of one Kinect v2 recording apart


class SunRgbd(Curator):
    """Distance along the ray by refined depth; up to 8 metres, where the toolbox clips and filled holes are unreliable.

    NYU frames are left out: they are a dataset of their own.
    """

    name = "sunrgbd"
    distance = "ray"
    valid_range = (0.005, 8.0)
    label_source = "depth_bfx, ((v >> 3) | (v << 13)) / 1000"
    splits: ClassVar[tuple[str, ...]] = BY_SCENE
    split_rule = scene_rule(VAL_SHARE)
    depth_folder = "depth_bfx"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """One per folder with intrinsics or an image, by path."""
        marks = {*root.rglob("intrinsics.txt"), *(path for path in root.rglob("image") if path.is_dir())}
        for path in sorted({mark.parent for mark in marks}):
            folder = path.relative_to(root).as_posix()
            scene = scene_of(folder)
            if self.includes(folder) and is_in_split(scene, split, VAL_SHARE):
                images = sorted((path / "image").glob("*.jpg"))
                if not images:
                    yield lacking(f"{folder}/image", scene, "image", "there is no JPEG in it")
                for image in images:
                    view = partial(_view, path, image, self.depth_folder)
                    yield Frame(f"{folder}/image/{image.name}", scene, view)

    def includes(self, folder: str) -> bool:
        """Whether the frame in this folder belongs to the dataset."""
        return NYU not in PurePosixPath(folder).parts


class NyuInSunRgbd(SunRgbd):
    """The 1449 NYU frames as SUN RGB-D keeps them, cropped and with raw Kinect depth. For official numbers take `nyuv2`."""

    name = "nyuv2_sun"
    valid_range = (0.005, 10.0)
    label_source = "raw depth, ((v >> 3) | (v << 13)) / 1000"
    splits = ("all",)
    split_rule = "all NYU frames of train and test"
    depth_folder = "depth"

    def includes(self, folder: str) -> bool:
        """Whether the frame in this folder belongs to the dataset."""
        return not super().includes(folder)


def decode(values: np.ndarray) -> np.ndarray:
    """Metres of stored 16-bit values: SUN RGB-D rotates the bits of millimetres by three."""
    values = values.astype(np.uint16)
    return ((values >> 3) | (values << 13)).astype(np.float64) / 1000


def scene_of(folder: str) -> str:
    """What frames of one room share: their recording. SUN3D frames lie in the folder of it, Kinect v2 frames name it."""
    path = PurePosixPath(folder)
    return str(path.parent) if "sun3ddata" in path.parts else _FRAME.sub("", folder)


def _view(folder: Path, image: Path, depth_folder: str) -> View:
    size = image_size(image)
    if not (folder / "intrinsics.txt").is_file():
        raise Unusable(f"{folder} has no intrinsics.txt", "missing intrinsics")
    numbers = read_numbers(folder / "intrinsics.txt", 9)
    fx, fy, cx, cy = (numbers[place] for place in (0, 4, 2, 5))
    files = sorted((folder / depth_folder).glob("*.png"))
    if len(files) != 1:
        raise Unusable(f"{folder / depth_folder} holds {len(files)} depth files instead of one", "missing depth")
    pixels, metres = labelled(decode(read_values(files[0], size)))
    return View(size, Camera(fx, fy, cx, cy, "planar"), pixels, metres)

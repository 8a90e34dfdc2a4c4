"""NYU Depth v2, the labelled set: 1449 indoor Kinect frames in one MATLAB 7.3 (HDF5) file, with the official split.

nyu_depth_v2_labeled.mat (images, rawDepths, scenes)  splits.mat (trainNdxs: 795, testNdxs: 654)
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, need, reading
from mmseg_llm.data.depth.curation.reading import labelled

FILE = "nyu_depth_v2_labeled.mat"
INTRINSICS = (518.857901, 519.469611, 324.582449, 252.736166)
"""fx, fy, cx, cy of the colour camera by the toolbox, whose pixels count from 1."""
REGION = (slice(44, 471), slice(40, 601))
"""Rows and columns that the depth camera sees (`get_projection_mask` of the toolbox)."""


class NyuV2(Curator):
    """Distance along the ray by raw, not filled-in, Kinect depth. Images are written as PNG, as they are in no file."""

    name = "nyuv2"
    distance = "ray"
    valid_range = (0.005, 10.0)
    label_source = "Kinect: rawDepths, holes not filled, inside the projection mask"
    splits = ("train", "test", "all")
    split_rule = "official: splits.mat, by scene"
    exports_images = True

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """One per image of the split, by number from 1."""
        h5py = need("h5py", f"{FILE} of NYU Depth v2")
        path = root / FILE
        if not path.is_file():
            raise ValueError(f"{path} does not exist; download the labelled dataset of NYU Depth v2 into {root}")
        with reading(path), h5py.File(path) as file:
            count = len(file["images"])
            names = file["scenes"][()].ravel()
            scenes = ["".join(map(chr, np.asarray(file[name]).ravel())) for name in names]
        for number in range(1, count + 1) if split == "all" else read_split(root, split, count):
            image = f"nyuv2_images/{number:04d}.png"
            yield Frame(image, scenes[number - 1], partial(_view, path, number), partial(_picture, path, number))


def read_split(root: Path, split: str, count: int) -> list[int]:
    """Numbers from 1 of the images of an official split, in order.

    Raises:
        ValueError: if `splits.mat` is missing, broken, or of another set.
    """
    path = root / "splits.mat"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; download splits.mat of NYU Depth v2 into {root}, or take the split 'all'"
        )
    matlab = need("scipy.io", "splits.mat of NYU Depth v2")
    with reading(path):
        content: dict[str, Any] = matlab.loadmat(path)
    key = f"{split}Ndxs"
    if key not in content:
        raise ValueError(f"{path} lacks '{key}'; download splits.mat of NYU Depth v2 again")
    numbers = sorted(int(number) for number in content[key].ravel())
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= count:
        raise ValueError(f"{path} names images that are not among the {count} of {FILE}; download both again")
    return numbers


def _view(path: Path, number: int) -> View:
    import h5py

    with h5py.File(path) as file:
        depth = np.asarray(file["rawDepths"][number - 1]).T  # MATLAB stores columns first
    is_seen = np.zeros(depth.shape, bool)
    is_seen[REGION] = True
    pixels, metres = labelled(depth, is_seen)
    return View(depth.shape, Camera(*INTRINSICS, "planar"), pixels, metres)


def _picture(path: Path, number: int) -> bytes:
    import h5py
    from PIL import Image

    with h5py.File(path) as file:
        values = np.asarray(file["images"][number - 1]).transpose(2, 1, 0)  # (3, W, H) -> (H, W, 3)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(buffer, "PNG")
    return buffer.getvalue()

"""ScanNet++, iPhone part: indoor video frames with the phone's lidar depth (after `prepare_iphone_data` of the toolkit).

data/<scene>/iphone/  rgb/frame_*.jpg  depth/frame_*.png  rgb_masks/frame_*.png (optional)  pose_intrinsic_imu.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.base import read_json
from mmseg_llm.data.depth.curation.base import (
    BY_SCENE,
    Curator,
    Frame,
    View,
    each_frame,
    folder_of,
    is_in_split,
    lacking,
    scene_rule,
)
from mmseg_llm.data.depth.curation.reading import read_values
from mmseg_llm.data.depth.points import Unusable, image_size
from mmseg_llm.masks import Size

VAL_SHARE = 0.02
EVERY = 10
RECORDED = (1440, 1920)
"""Size `(H, W)` that the intrinsics in the JSON belong to."""


class ScanNetPP(Curator):
    """Distance along the ray, z * sqrt(x_n^2 + y_n^2 + 1), with each frame's own intrinsics; zero depth is no label.

    Every tenth frame is taken. Frames, depths, masks and intrinsics are matched by frame number.
    """

    name = "scannetpp"
    distance = "ray"
    valid_range = (0.05, 10.0)
    label_source = "iPhone lidar, 256x192 mm; labels at the centres of depth pixels"
    splits = BY_SCENE
    split_rule = scene_rule(VAL_SHARE)

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Scene by scene, by number."""
        folder = folder_of(root / "data", "give the folder of ScanNet++ that holds data/<scene>/iphone")
        for path in sorted(path / "iphone" for path in folder.iterdir() if path.is_dir()):
            scene = path.parent.name
            if is_in_split(scene, split, VAL_SHARE):
                yield from each_frame(scene, partial(_scene, root, path, scene))


def _scene(root: Path, folder: Path, scene: str) -> Iterator[Frame]:
    images, depths, masks = (_by_number(folder / name) for name in ("rgb", "depth", "rgb_masks"))
    if not images:
        yield lacking(folder.relative_to(root).as_posix(), scene, "image", f"{folder / 'rgb'} holds no frame_*")
    for number in sorted(images)[::EVERY]:
        image = images[number]
        view = partial(_view, folder, number, image, depths.get(number), masks.get(number), bool(masks))
        yield Frame(image.relative_to(root).as_posix(), scene, view)


def _by_number(folder: Path) -> dict[int, Path]:
    """The files of a folder by the number in their name."""
    found = ((re.search(r"\d+", path.stem), path) for path in folder.glob("frame_*"))
    return {int(match.group()): path for match, path in found if match}


@lru_cache(maxsize=2)
def _intrinsics(path: Path) -> dict[int, Any]:
    """The 3x3 intrinsics of every frame, by number."""
    return {int(name.rpartition("_")[2]): content["intrinsic"] for name, content in read_json(path).items()}


def _view(folder: Path, number: int, image: Path, depth: Path | None, mask: Path | None, is_masked: bool) -> View:
    size = image_size(image)
    matrices = _intrinsics(folder / "pose_intrinsic_imu.json")
    if depth is None or number not in matrices or (is_masked and mask is None):
        lacking = "depth" if depth is None else "intrinsics" if number not in matrices else "mask"
        raise Unusable(f"there is no {lacking} of frame {number}", f"missing {lacking}")
    (fx, _, cx), (_, fy, cy), _ = matrices[number]
    (height, width), (tall, wide) = size, RECORDED
    camera = Camera(fx, fy, cx, cy, "planar").scaled((width / wide, height / tall))
    pixels, metres = spread(read_values(depth), size)
    if mask is not None:
        is_kept = read_values(mask, size)[pixels[:, 1], pixels[:, 0]] != 0
        pixels, metres = pixels[is_kept], metres[is_kept]
    return View(size, camera, pixels, metres)


def spread(millimetres: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(N, 2)` of the image `(H, W)` under the centres of depth pixels `(h, w)` with a depth, and metres `(N,)`."""
    rows, columns = np.nonzero(millimetres)
    (height, width), (short, narrow) = size, millimetres.shape
    x, y = (columns + 0.5) * width / narrow - 0.5, (rows + 0.5) * height / short - 0.5
    pixels = np.floor(np.stack((x, y), axis=-1) + 0.5).astype(np.int64)
    return pixels, millimetres[rows, columns] / 1000

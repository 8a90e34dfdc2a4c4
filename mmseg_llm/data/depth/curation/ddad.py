"""DDAD: street scenes, six cameras, long-range lidar (`ddad_train_val`).

ddad.json  <scene>/scene_*.json  <scene>/calibration/<key>.json  <scene>/rgb/CAMERA_*/*.png  <scene>/point_cloud/LIDAR/*.npz
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.base import read_json
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, each_frame, lacking, reading
from mmseg_llm.data.depth.curation.lidar import inverse, move, project, rigid
from mmseg_llm.data.depth.points import Unusable, image_size

CAMERAS = tuple(f"CAMERA_{number:02d}" for number in (1, 5, 6, 7, 8, 9))
LIDAR = "LIDAR"
RADIUS = 3
"""Pixels in which a hiding point is looked for; this lidar is denser than others."""


class Ddad(Curator):
    """Depth along the axis by lidar, each sensor at its own pose in the world, without hidden points. Images are rectified."""

    name = "ddad"
    distance = "planar"
    valid_range = (0.5, 250.0)
    label_source = "lidar, ego-motion compensated, occlusion tested above and below (3 px, 10 %)"
    splits = ("train", "val")
    split_rule = "official: scene_splits of ddad.json"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Six per sample, scene by scene."""
        path = root / "ddad.json"
        content, key = read_json(path), str(self.splits.index(split))  # of the enumeration TRAIN, VAL
        with reading(path):
            places = content.get("scene_splits", {})
            names = [str(PurePosixPath(name)) for name in places[key]["filenames"]] if key in places else None
        if names is None:
            raise ValueError(f"{path} has no scene split {key} ({split}); download it again")
        for name in names:
            yield from each_frame(str(PurePosixPath(name).parent), partial(_scene, root, name))


def _scene(root: Path, name: str) -> Iterator[Frame]:
    content, folder = read_json(root / name), PurePosixPath(name).parent
    data = {row["key"]: row for row in content["data"]}
    for number, sample in enumerate(content["samples"]):
        rows = {data[key]["id"]["name"].upper(): data[key]["datum"] for key in sample["datum_keys"] if key in data}
        calibration = root / folder / "calibration" / f"{sample['calibration_key']}.json"
        cameras = [camera for camera in CAMERAS if camera in rows]
        if not cameras:
            yield lacking(f"{folder}, sample {number}", str(folder), "image", "its sample has no camera")
        for camera in cameras:
            image, cloud = rows[camera]["image"], rows.get(LIDAR, {}).get("point_cloud")
            view = partial(_view, root / folder, camera, image, cloud, calibration)
            yield Frame(f"{folder}/{image['filename']}", str(folder), view, camera_name=camera)


@lru_cache(maxsize=2)
def _intrinsics(path: Path) -> dict[str, dict[str, float]]:
    content = read_json(path)
    return {name.upper(): values for name, values in zip(content["names"], content["intrinsics"], strict=True)}


@lru_cache(maxsize=2)  # the six cameras of a sample share its sweep
def _cloud(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as content:
        return content["data"][:, :3]


def _pose(content: dict[str, dict[str, float]]) -> np.ndarray:
    """The motion `(4, 4)` from a sensor to the world; numbers that are 0 may be left out."""
    rotation, translation = content.get("rotation", {}), content.get("translation", {})
    return rigid(
        [rotation.get(name, 0.0) for name in ("qw", "qx", "qy", "qz")],
        [translation.get(name, 0.0) for name in ("x", "y", "z")],
    )


def _view(folder: Path, name: str, image: dict[str, Any], cloud: dict[str, Any] | None, calibration: Path) -> View:
    if cloud is None:
        raise Unusable("its sample has no lidar", "missing lidar")
    size = image_size(folder / image["filename"])
    values = _intrinsics(calibration)[name]
    camera = Camera(values["fx"], values["fy"], values["cx"], values["cy"], "planar")
    motion = inverse(_pose(image["pose"])) @ _pose(cloud["pose"])
    pixels, metres = project(move(motion, _cloud(folder / cloud["filename"])), camera, size, "planar", RADIUS)
    return View(size, camera, pixels, metres)

"""nuScenes: street scenes, six cameras, keyframes with the sweep of the roof lidar.

v1.0-trainval/*.json or v1.0-mini/*.json  samples/CAM_*/*.jpg  samples/LIDAR_TOP/*.pcd.bin
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.base import read_json
from mmseg_llm.data.depth.curation.base import Curator, Frame, View
from mmseg_llm.data.depth.curation.lidar import camera_from_lidar, move, project, rigid
from mmseg_llm.data.depth.points import image_size

LIDAR = "LIDAR_TOP"
MINI = frozenset({61, 103, 553, 655, 757, 796, 916, 1077, 1094, 1100})
_VAL = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 777-778 "
    "780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
)


def _numbers(ranges: str) -> frozenset[int]:
    ends = [part.split("-") for part in ranges.split()]
    return frozenset(number for end in ends for number in range(int(end[0]), int(end[-1]) + 1))


VAL = _numbers(_VAL)
"""Numbers of the 150 scenes of the official validation split."""


class NuScenes(Curator):
    """Depth along the axis by lidar, with the motion of the vehicle between sweep and image, and without hidden points."""

    name = "nuscenes"
    distance = "planar"
    valid_range = (1.0, 200.0)
    label_source = "LIDAR_TOP of the keyframe, ego-motion compensated, occlusion tested (8 px, 10 %)"
    splits = ("train", "val", "mini", "all")
    split_rule = "official scenes of train and val, train without the ten of mini; mini: v1.0-mini; all: v1.0-trainval"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Six per keyframe, scene by scene."""
        tables = _Tables(root, "v1.0-mini" if split == "mini" else "v1.0-trainval")
        for scene, rows in tables.keyframes():
            number = int(scene.rpartition("-")[2])
            is_wanted = {"train": number not in VAL | MINI, "val": number in VAL}.get(split, True)
            if not is_wanted or LIDAR not in rows:
                continue
            for channel in sorted(name for name in rows if name.startswith("CAM_")):
                row = rows[channel]
                view = partial(_view, root, tables, row, rows[LIDAR])
                yield Frame(row["filename"], scene, view, camera_name=channel)


class _Tables:
    """The tables that are needed, by token."""

    def __init__(self, root: Path, version: str) -> None:
        folder = root / version
        names = ("scene", "sample", "sensor", "calibrated_sensor", "ego_pose")
        self.rows = {name: {row["token"]: row for row in read_json(folder / f"{name}.json")} for name in names}
        self.data = [row for row in read_json(folder / "sample_data.json") if row["is_key_frame"]]

    def keyframes(self) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
        """Scene name and rows by channel of every keyframe, by scene and time."""
        by_sample: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.data:
            sensor = self.rows["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]
            by_sample.setdefault(row["sample_token"], {})[self.rows["sensor"][sensor]["channel"]] = row
        found = []
        for token, rows in by_sample.items():
            sample = self.rows["sample"][token]
            found.append((self.rows["scene"][sample["scene_token"]]["name"], sample["timestamp"], rows))
        found.sort(key=lambda item: item[:2])
        return ((scene, rows) for scene, _, rows in found)

    def mount(self, row: dict[str, Any]) -> dict[str, Any]:
        """How the sensor of a row is mounted."""
        return self.rows["calibrated_sensor"][row["calibrated_sensor_token"]]

    def motions(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Pose of the vehicle when a row was measured, and of its sensor on the vehicle."""
        pose, mount = self.rows["ego_pose"][row["ego_pose_token"]], self.mount(row)
        return rigid(pose["rotation"], pose["translation"]), rigid(mount["rotation"], mount["translation"])


@lru_cache(maxsize=2)  # the six cameras of a keyframe share its sweep
def _sweep(path: Path) -> np.ndarray:
    return np.fromfile(path, np.float32).reshape(-1, 5)[:, :3]


def _view(root: Path, tables: _Tables, row: dict[str, Any], lidar: dict[str, Any]) -> View:
    size = image_size(root / row["filename"])
    (fx, _, cx), (_, fy, cy), _ = tables.mount(row)["camera_intrinsic"]
    camera = Camera(fx, fy, cx, cy, "planar")
    motion = camera_from_lidar(*tables.motions(lidar), *tables.motions(row))
    pixels, metres = project(move(motion, _sweep(root / lidar["filename"])), camera, size, "planar")
    return View(size, camera, pixels, metres)

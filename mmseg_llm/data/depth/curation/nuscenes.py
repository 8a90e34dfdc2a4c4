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
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, lacking, reading
from mmseg_llm.data.depth.curation.lidar import camera_from_lidar, move, project, rigid
from mmseg_llm.data.depth.points import Unusable, image_size

LIDAR = "LIDAR_TOP"
FIELDS = {
    "scene": ("token", "name"),
    "sample": ("token", "scene_token", "timestamp"),
    "sensor": ("token", "channel"),
    "calibrated_sensor": ("token", "sensor_token", "rotation", "translation", "camera_intrinsic"),
    "ego_pose": ("token", "rotation", "translation"),
}
"""Tables that are needed, and their fields."""
DATA_FIELDS = ("sample_token", "ego_pose_token", "calibrated_sensor_token", "filename", "is_key_frame")
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
    label_source = "LIDAR_TOP of the keyframe, ego-motion compensated, occlusion tested above and below (8 px, 10 %)"
    splits = ("train", "val", "mini", "all")
    split_rule = "official scenes of train and val, train without the ten of mini; mini: v1.0-mini; all: v1.0-trainval"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Six per keyframe, scene by scene."""
        tables = _Tables(root, "v1.0-mini" if split == "mini" else "v1.0-trainval")
        for scene, rows in tables.keyframes():
            number = int(scene.rpartition("-")[2])
            if not {"train": number not in VAL | MINI, "val": number in VAL}.get(split, True):
                continue
            channels = sorted(name for name in rows if name.startswith("CAM_"))
            if not channels:
                token = next(iter(rows.values()))["sample_token"]
                yield lacking(f"{scene}, sample {token}", scene, "image", "its keyframe has no camera")
            for channel in channels:
                row = rows[channel]
                view = partial(_view, root, tables, row, rows.get(LIDAR))
                yield Frame(row["filename"], scene, view, camera_name=channel)


def _rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a table.

    Raises:
        ValueError: if they are no rows, or one lacks a field.
    """
    rows = read_json(path)
    with reading(path):
        for row in rows:
            for field in fields:
                row[field]
        return list(rows)


class _Tables:
    """The tables that are needed, by token."""

    def __init__(self, root: Path, version: str) -> None:
        folder = root / version
        self.folder = folder
        self.rows = {
            name: {row["token"]: row for row in _rows(folder / f"{name}.json", fields)}
            for name, fields in FIELDS.items()
        }
        self.data = [row for row in _rows(folder / "sample_data.json", DATA_FIELDS) if row["is_key_frame"]]
        with reading(folder / "scene.json"):
            for row in self.rows["scene"].values():
                int(row["name"].rpartition("-")[2])  # scene-0103

    def keyframes(self) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
        """Scene name and rows by channel of every keyframe, by scene and time."""
        by_sample: dict[str, dict[str, dict[str, Any]]] = {}
        found = []
        with reading(self.folder / "sample_data.json"):
            for row in self.data:
                sensor = self.rows["calibrated_sensor"][row["calibrated_sensor_token"]]["sensor_token"]
                by_sample.setdefault(row["sample_token"], {})[self.rows["sensor"][sensor]["channel"]] = row
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


def _view(root: Path, tables: _Tables, row: dict[str, Any], lidar: dict[str, Any] | None) -> View:
    if lidar is None:
        raise Unusable(f"its keyframe has no {LIDAR}", "missing lidar")
    size = image_size(root / row["filename"])
    (fx, _, cx), (_, fy, cy), _ = tables.mount(row)["camera_intrinsic"]
    camera = Camera(fx, fy, cx, cy, "planar")
    motion = camera_from_lidar(*tables.motions(lidar), *tables.motions(row))
    pixels, metres = project(move(motion, _sweep(root / lidar["filename"])), camera, size, "planar")
    return View(size, camera, pixels, metres)

"""Argoverse 2 sensor dataset: street scenes, seven ring cameras, lidar sweeps in the axes of the vehicle.

<split>/<log>/  sensors/cameras/ring_*/<ns>.jpg  sensors/lidar/<ns>.feather  city_SE3_egovehicle.feather
                calibration/intrinsics.feather  calibration/egovehicle_SE3_sensor.feather
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, each_frame, folder_of, lacking, need
from mmseg_llm.data.depth.curation.lidar import camera_from_lidar, move, project, rigid
from mmseg_llm.data.depth.points import Unusable, image_size

CAMERAS = tuple(
    f"ring_{name}"
    for name in ("front_center", "front_left", "front_right", "rear_left", "rear_right", "side_left", "side_right")
)
FARTHEST_SWEEP = 60_000_000
"""Nanoseconds between an image and its sweep; there is a sweep every 100 ms."""
_POSE = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


class Argoverse2(Curator):
    """Distance along the ray by lidar of all logs, with the motion of the vehicle between sweep and image, without hidden points.

    Images are undistorted already; the coefficients in the calibration say what was taken out. Both focal lengths are written.
    """

    name = "argoverse2"
    distance = "ray"
    valid_range = (1.0, 250.0)
    label_source = "nearest lidar sweep, ego-motion compensated, occlusion tested above and below (8 px, 10 %)"
    splits = ("train", "val", "test")
    split_rule = "official: folders of logs"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """Every image of every log, by log, camera and time."""
        need("pyarrow", "Argoverse 2")
        folder = folder_of(root / split, "give the folder that holds train, val and test")
        for log in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from each_frame(log.name, partial(_log, root, log))


def _log(root: Path, log: Path) -> Iterator[Frame]:
    sweeps = np.array(sorted(int(path.stem) for path in (log / "sensors" / "lidar").glob("*.feather")), np.int64)
    images = {camera: list((log / "sensors" / "cameras" / camera).glob("*.jpg")) for camera in CAMERAS}
    if not any(images.values()):
        yield lacking(log.relative_to(root).as_posix(), log.name, "image", f"{log} has no image of a ring camera")
    for camera in CAMERAS:
        for image in sorted(images[camera], key=lambda path: int(path.stem)):
            view = partial(_view, log, camera, image, sweeps)
            yield Frame(image.relative_to(root).as_posix(), log.name, view, camera_name=camera)


def _columns(path: Path, *names: str) -> list[np.ndarray]:
    from pyarrow import feather

    table = feather.read_table(path, columns=list(names), memory_map=False)
    return [table.column(name).to_numpy() for name in names]


@lru_cache(maxsize=2)
def _cameras(log: Path) -> dict[str, tuple[Camera, np.ndarray]]:
    """Intrinsics and mount of every camera with intrinsics."""
    folder = log / "calibration"
    names, *values = _columns(folder / "intrinsics.feather", "sensor_name", "fx_px", "fy_px", "cx_px", "cy_px")
    sensors, *poses = _columns(folder / "egovehicle_SE3_sensor.feather", "sensor_name", *_POSE)
    mounts = {name: rigid(row[:4], row[4:]) for name, *row in zip(sensors, *poses)}
    return {
        name: (Camera(float(fx), float(fy), float(cx), float(cy), "ray"), mounts[name])
        for name, fx, fy, cx, cy in zip(names, *values)
    }


@lru_cache(maxsize=2)
def _poses(log: Path) -> dict[int, np.ndarray]:
    """Pose of the vehicle by time."""
    times, *values = _columns(log / "city_SE3_egovehicle.feather", "timestamp_ns", *_POSE)
    return {int(time): rigid(row[:4], row[4:]) for time, *row in zip(times, *values)}


@lru_cache(maxsize=2)
def _sweep(path: Path) -> np.ndarray:
    return np.stack(_columns(path, "x", "y", "z"), axis=-1).astype(np.float64)


def _view(log: Path, name: str, image: Path, sweeps: np.ndarray) -> View:
    size, now = image_size(image), int(image.stem)
    camera, mount = _cameras(log)[name]
    poses = _poses(log)
    then = int(sweeps[np.abs(sweeps - now).argmin()]) if len(sweeps) else None
    if then is None or abs(then - now) > FARTHEST_SWEEP:
        raise Unusable(f"no sweep within {FARTHEST_SWEEP / 1e6:g} ms", "no lidar sweep nearby")
    missing = [time for time in (then, now) if time not in poses]
    if missing:
        raise Unusable(f"city_SE3_egovehicle.feather has no pose at {missing[0]}", "no pose of the vehicle")
    motion = camera_from_lidar(poses[then], np.eye(4), poses[now], mount)
    points = move(motion, _sweep(log / "sensors" / "lidar" / f"{then}.feather"))
    pixels, metres = project(points, camera, size, "ray")
    return View(size, camera, pixels, metres)

"""Components of the Waymo Open Dataset v2: what is read of its parquet files, and kept while cameras share it.

Legend: N lidar returns, H W pixels of an image.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.range_image import range_image_points
from mmseg_llm.masks import Size

TIME = "key.frame_timestamp_micros"
_LENS = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")


def rows_of(path: Path, names: tuple[str, ...], time: int | None = None) -> list[dict[str, Any]]:
    """Rows of a component as dicts, all or those of one time."""
    from pyarrow import parquet

    columns = [*names] if "calibration" in path.parent.name else [TIME, *names]
    only = None if time is None else [(TIME, "=", time)]
    table = parquet.read_table(path, columns=columns, filters=only)
    values = {name: table.column(name).to_numpy(zero_copy_only=False) for name in columns}
    return [dict(zip(values, row)) for row in zip(*values.values())]


def _matrix(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(4, 4)


@lru_cache(maxsize=1)  # the five cameras of a time share what is read
def images_of(folder: Path, segment: str, time: int) -> dict[int, tuple[bytes, np.ndarray]]:
    """Bytes of the image and pose of the vehicle when it was taken, by camera."""
    names = ("key.camera_name", "[CameraImageComponent].image", "[CameraImageComponent].pose.transform")
    rows = rows_of(folder / "camera_image" / f"{segment}.parquet", names, time)
    return {row[names[0]]: (row[names[1]], _matrix(row[names[2]])) for row in rows}


@lru_cache(maxsize=2)
def cameras_of(folder: Path, segment: str) -> dict[int, tuple[Camera, np.ndarray, Size]]:
    """Intrinsics, mount and size `(H, W)` of every camera."""
    head = "[CameraCalibrationComponent]"
    lens = [f"{head}.intrinsic.{name}" for name in _LENS]
    mount, height, width = f"{head}.extrinsic.transform", f"{head}.height", f"{head}.width"
    rows = rows_of(
        folder / "camera_calibration" / f"{segment}.parquet", ("key.camera_name", *lens, mount, height, width)
    )
    found = {}
    for row in rows:
        fx, fy, cx, cy, *distortion = (float(row[name]) for name in lens)
        camera = Camera(fx, fy, cx, cy, "ray", tuple(distortion))
        found[row["key.camera_name"]] = (camera, _matrix(row[mount]), (int(row[height]), int(row[width])))
    return found


@lru_cache(maxsize=1)
def cloud_of(folder: Path, segment: str, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Lidar returns `(N, 3)` in the world, and where cameras see them, `(N, 6)`: twice camera, x, y."""

    def image(component: str, head: str) -> dict[int, np.ndarray]:
        values, shape = (f"[{head}].range_image_return1.{name}" for name in ("values", "shape"))
        rows = rows_of(folder / component / f"{segment}.parquet", ("key.laser_name", values, shape), time)
        return {row["key.laser_name"]: np.asarray(row[values]).reshape(row[shape]) for row in rows}

    pose = "[VehiclePoseComponent].world_from_vehicle.transform"
    world = _matrix(rows_of(folder / "vehicle_pose" / f"{segment}.parquet", (pose,), time)[0][pose])
    ranges, spots = image("lidar", "LiDARComponent"), image("lidar_camera_projection", "LiDARCameraProjectionComponent")
    poses = image("lidar_pose", "LiDARPoseComponent")
    head = "[LiDARCalibrationComponent]"
    mount = f"{head}.extrinsic.transform"
    beams = [f"{head}.beam_inclination.{name}" for name in ("values", "min", "max")]
    places, projections = [np.empty((0, 3))], [np.empty((0, 6), np.int64)]
    for row in rows_of(folder / "lidar_calibration" / f"{segment}.parquet", ("key.laser_name", mount, *beams)):
        laser = row["key.laser_name"]
        if laser in ranges and laser in spots:
            inclinations, lowest, highest = (row[name] for name in beams)
            lengths, pose_image = ranges[laser][..., 0], poses.get(laser)
            places.append(
                range_image_points(lengths, _matrix(row[mount]), inclinations, lowest, highest, pose_image, world)
            )
            projections.append(spots[laser][lengths > 0])
    return np.concatenate(places), np.concatenate(projections)

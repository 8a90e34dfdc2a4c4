"""Lidar points as labels: rigid motions, the motion of the vehicle between two sensors, projection, and what hides what.

A rigid motion is a matrix `(4, 4)` that takes points of one frame of axes to another: `world_from_ego @ ego_from_lidar`.

Legend: N points, H W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.masks import Size

NEAREST = 0.1
"""Metres along the axis; what is nearer, or behind, is not projected."""


def rigid(quaternion: Sequence[float], translation: Sequence[float]) -> np.ndarray:
    """The motion `(4, 4)` by a quaternion `(w, x, y, z)` of any length but 0, and a translation in metres.

    Raises:
        ValueError: for a quaternion of length 0.
    """
    norm = float(np.linalg.norm(quaternion))
    if not norm > 0:
        raise ValueError(f"quaternion {list(quaternion)} is no rotation; its length must not be 0")
    w, x, y, z = (float(value) / norm for value in quaternion)
    motion = np.eye(4)
    motion[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    motion[:3, 3] = translation
    return motion


def inverse(motion: np.ndarray) -> np.ndarray:
    """The motion back."""
    back = np.eye(4)
    back[:3, :3] = motion[:3, :3].T
    back[:3, 3] = -motion[:3, :3].T @ motion[:3, 3]
    return back


def move(motion: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points `(N, 3)` in the other frame of axes."""
    return np.asarray(points, np.float64) @ motion[:3, :3].T + motion[:3, 3]


def camera_from_lidar(
    world_from_ego_then: np.ndarray,
    ego_from_lidar: np.ndarray,
    world_from_ego_now: np.ndarray,
    ego_from_camera: np.ndarray,
) -> np.ndarray:
    """The motion from the lidar, at the time of its sweep, to the camera, at the time of its image: the vehicle drove in between.

    Args:
        world_from_ego_then: pose of the vehicle when the lidar measured.
        ego_from_lidar: where the lidar is mounted.
        world_from_ego_now: pose of the vehicle when the image was taken.
        ego_from_camera: where the camera is mounted.
    """
    return inverse(ego_from_camera) @ inverse(world_from_ego_now) @ world_from_ego_then @ ego_from_lidar


def visible_points(
    pixels: np.ndarray, depth: np.ndarray, size: Size, radius: int = 8, tolerance: float = 0.1
) -> np.ndarray:
    """Which points `(N,)` are seen: the nearest of their pixel, unless clearly nearer points lie both above and below them.

    A lidar is mounted elsewhere than the camera, so it sees behind what the camera sees; its points are sparse, so what hides a
    point is looked for in the pixels around it. What stands in front of a point goes on above and below it. Ground is nearer
    below only: far away its rings are less than a few pixels apart, and they hide nothing.

    Args:
        pixels: `(N, 2)` ints inside the image.
        depth: `(N,)` metres.
        size: `(H, W)` of the image.
        radius: how many pixels above, below, left and right are looked at.
        tolerance: a point is clearly nearer than another by more than this share of the other's depth.
    """
    import cv2

    height, width = size
    buffer = np.full((height + 2, width), np.finfo(np.float32).max, np.float32)  # a row above and a row below the image
    x, y, depth = pixels[:, 0], pixels[:, 1], np.asarray(depth, np.float32)
    np.minimum.at(buffer, (y + 1, x), depth)
    is_seen = np.zeros(len(depth), bool)
    by_depth = np.argsort(depth, kind="stable")
    _, first = np.unique((y * width + x)[by_depth], return_index=True)
    is_seen[by_depth[first]] = True
    if radius:
        kernel = np.ones((radius, 2 * radius + 1), np.uint8)
        look = partial(cv2.erode, buffer, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=float(buffer[0, 0]))
        up, down = look(anchor=(radius, radius - 1)), look(anchor=(radius, 0))  # the nearest of a row and those beyond
        is_seen &= depth * (1 - tolerance) <= np.maximum(up[y, x], down[y + 2, x])
    return is_seen


def project(
    points: np.ndarray, camera: Camera, size: Size, distance: Distance, radius: int = 8, tolerance: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of an image by points in space.

    Args:
        points: `(N, 3)` in the axes of the camera (X right, Y down, Z forward).
        camera: its intrinsics and distortion.
        size: `(H, W)` of the image.
        distance: what the metres shall be measured along.
        radius, tolerance: of `visible_points`.

    Returns:
        The pixels `(M, 2)` that points are seen in, each once, and their metres `(M,)`.
    """
    points = points[points[:, 2] > NEAREST]
    spots = camera.project(points)
    is_sane = np.isfinite(spots).all(axis=-1) & (np.abs(spots) < 1e6).all(axis=-1)
    points, pixels = points[is_sane], np.floor(spots[is_sane] + 0.5).astype(np.int64)
    height, width = size
    is_inside = (pixels >= 0).all(axis=-1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
    points, pixels = points[is_inside], pixels[is_inside]
    is_seen = visible_points(pixels, points[:, 2], size, radius, tolerance)
    metres = points[:, 2] if distance == "planar" else np.linalg.norm(points, axis=-1)
    return pixels[is_seen], metres[is_seen]

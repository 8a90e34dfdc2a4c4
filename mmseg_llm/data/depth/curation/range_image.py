"""Range images of Waymo: distances by inclination (rows) and azimuth (columns) of a turning lidar, as points in the world.

Legend: H W rows and columns, N returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmseg_llm.data.depth.curation.lidar import move


def range_image_points(
    ranges: np.ndarray,
    mount: np.ndarray,
    inclinations: Any,
    lowest: float,
    highest: float,
    poses: np.ndarray | None,
    world_from_vehicle: np.ndarray,
) -> np.ndarray:
    """Points `(N, 3)` in the world of all returns, row by row.

    Args:
        ranges: `(H, W)` metres; no return where not positive.
        mount: `(4, 4)`, from the lidar to the vehicle.
        inclinations: radians `(H,)` from the lowest row up, or None: evenly spaced between the next two.
        lowest, highest: radians.
        poses: `(H, W, 6)` roll, pitch, yaw, x, y, z of the vehicle in the world when each pixel was measured; None where the
            lidar is taken to measure all at once.
        world_from_vehicle: `(4, 4)`, at the time of the frame; used without `poses`.
    """
    height, width = ranges.shape
    if inclinations is None or not len(inclinations):
        inclinations = lowest + (np.arange(height) + 0.5) / height * (highest - lowest)
    rows, columns = np.nonzero(ranges > 0)
    inclination = np.asarray(inclinations, np.float64)[::-1][rows]  # the first row looks up
    turned = np.arctan2(mount[1, 0], mount[0, 0])  # the middle column looks ahead along the vehicle
    azimuth = ((width - columns - 0.5) / width * 2 - 1) * np.pi - turned
    flat = np.cos(inclination)
    directions = np.stack((np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(inclination)), axis=-1)
    points = move(mount, directions * ranges[rows, columns, None].astype(np.float64))
    if poses is None:
        return move(world_from_vehicle, points)
    pose = poses[rows, columns].astype(np.float64)  # (N, 6)
    return np.einsum("nij,nj->ni", rotations(*pose[:, :3].T), points) + pose[:, 3:]


def rotations(roll: np.ndarray, pitch: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Matrices `(N, 3, 3)`: roll about x, then pitch about y, then yaw about z, radians."""
    (cr, sr), (cp, sp), (cy, sy) = ((np.cos(angle), np.sin(angle)) for angle in (roll, pitch, yaw))
    rows = (
        (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
        (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
        (-sp, cp * sr, cp * cr),
    )
    return np.moveaxis(np.array(rows), -1, 0)

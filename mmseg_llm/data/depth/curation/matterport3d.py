"""Matterport3D: undistorted colour and depth images of 90 buildings, 18 views per panorama.

    <scan>/undistorted_color_images/*.jpg  <scan>/undistorted_depth_images/*.png  <scan>/undistorted_camera_parameters/<scan>.conf

The folders of scans may lie in `v1/scans`, and a scan's archive may have made a folder of its name in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import BY_SCENE, Curator, Frame, View, each_frame, is_in_split, scene_rule
from mmseg_llm.data.depth.curation.reading import labelled, read_values
from mmseg_llm.data.depth.points import Unusable, image_size

VAL_SHARE = 0.05
UNITS_PER_METRE = 4000
PLACES = ("*", "*/*", "v1/scans/*", "v1/scans/*/*")


class Matterport3d(Curator):
    """Distance along the ray by depth along the axis. Image rows count from above, the files' principal point from below."""

    name = "matterport3d"
    distance = "ray"
    valid_range = (0.05, 50.0)
    label_source = "undistorted_depth_images / 4000"
    splits = BY_SCENE
    split_rule = scene_rule(VAL_SHARE)
    min_points = 50

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """One per `scan` line, building by building."""
        found = {path for place in PLACES for path in root.glob(f"{place}/undistorted_camera_parameters/*.conf")}
        for path in sorted(found, key=lambda path: path.stem):
            if is_in_split(path.stem, split, VAL_SHARE):
                yield from each_frame(path.stem, partial(_scan, root, path))


def _scan(root: Path, path: Path) -> Iterator[Frame]:
    folder = path.parents[1]
    places = {"depth_directory": "undistorted_depth_images", "color_directory": "undistorted_color_images"}
    matrix: list[float] | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] in places:
            places[words[0]] = words[1]
        elif words[0] == "intrinsics_matrix":
            matrix = [float(word) for word in words[1:10]]  # of the lines that follow
        elif words[0] == "scan":
            image, depth = folder / places["color_directory"] / words[2], folder / places["depth_directory"] / words[1]
            yield Frame(image.relative_to(root).as_posix(), path.stem, partial(_view, image, depth, matrix))


def _view(image: Path, depth: Path, matrix: list[float] | None) -> View:
    if matrix is None or len(matrix) != 9:
        raise Unusable(f"there is no intrinsics_matrix above the line of {image.name}", "malformed calibration")
    size = image_size(image)
    fx, fy, cx, cy = (matrix[place] for place in (0, 4, 2, 5))
    camera = Camera(fx, fy, cx, size[0] - 1 - cy, "planar")
    pixels, metres = labelled(read_values(depth, size) / UNITS_PER_METRE)
    return View(size, camera, pixels, metres)

"""ETH3D, high-resolution multi-view: DSLR images of 13 scenes with laser-scanned depth in the distorted images as they are.

<scene>/  images/dslr_images/*.JPG  dslr_calibration_jpg/{cameras,images}.txt  ground_truth_depth/dslr_images/*.JPG
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, each_frame, lacking
from mmseg_llm.data.depth.curation.reading import labelled
from mmseg_llm.data.depth.curation.thin_prism import thin_prism_rays
from mmseg_llm.data.depth.points import Unusable, image_size
from mmseg_llm.masks import Size

CALIBRATION = "dslr_calibration_jpg"
PARTS = ("images", CALIBRATION, "ground_truth_depth")
"""Folders of a scene, any of which makes it one."""


class Lens(NamedTuple):
    """A line of COLMAP's `cameras.txt`; its pixels count from the corner of the image, not from the centre of the first pixel."""

    model: str
    size: Size
    params: tuple[float, ...]

    def camera(self) -> Camera:
        """Focal lengths and principal point, with pixels counted from the centre of the first."""
        fx, fy, cx, cy = self.params[:4]
        return Camera(fx, fy, cx - 0.5, cy - 0.5, "planar")


class Eth3d(Curator):
    """Distance along the ray, by depth along the axis and the whole lens: all eight distortion numbers.

    No OpenCV coefficients can say what this lens does, so records have no `distortion`; their `lens` has COLMAP's model and
    parameters. Distances along the ray need neither.
    """

    name = "eth3d"
    distance = "ray"
    valid_range = (0.005, 1000.0)
    label_source = "laser scan: ground_truth_depth, labels in distorted pixels"
    splits = ("train",)
    split_rule = "official: the 13 training scenes, which alone have public truth"

    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """One per line of `images.txt`, scene by scene. Image and depth have the same path, so no scene takes another's depth."""
        for folder in sorted({path.parent for name in PARTS for path in root.glob(f"*/{name}")}):
            path = folder / CALIBRATION / "images.txt"
            if path.is_file():
                yield from each_frame(folder.name, partial(_scene, path))
            else:
                yield lacking(folder.name, folder.name, "calibration", f"{path} does not exist")


def _scene(path: Path) -> Iterator[Frame]:
    folder, lenses = path.parents[1], read_cameras(path.with_name("cameras.txt"))
    for name, lens in sorted(read_images(path)):
        view = partial(_view, folder, name, lenses.get(lens))
        yield Frame(f"{folder.name}/images/{name}", folder.name, view)


def read_cameras(path: Path) -> dict[str, Lens]:
    """All cameras of a COLMAP `cameras.txt` by id: `CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]`."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {
        row[0]: Lens(row[1], (int(row[3]), int(row[2])), tuple(map(float, row[4:]))) for row in rows if len(row) > 4
    }


def read_images(path: Path) -> list[tuple[str, str]]:
    """Name and camera id of all images of a COLMAP `images.txt`; every second line has key points, maybe none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = [line.split(maxsplit=9) for line in lines[::2] if line.strip()]
    return [(row[9], row[8]) for row in rows]


def _view(folder: Path, name: str, lens: Lens | None) -> View:
    if lens is None:
        raise Unusable(f"cameras.txt of {folder.name} lacks the camera of {name}", "malformed calibration")
    if lens.model not in {"PINHOLE", "THIN_PRISM_FISHEYE"}:
        raise Unusable(f"{folder.name} has the camera model {lens.model}; ETH3D has others", "malformed calibration")
    size = image_size(folder / "images" / name)
    path = folder / "ground_truth_depth" / name
    values = np.fromfile(path, np.float32)
    if lens.size != size or values.size != size[0] * size[1]:
        raise Unusable(
            f"{path} holds {values.size} values and cameras.txt says {lens.size[1]}x{lens.size[0]}, but the image is "
            f"{size[1]}x{size[0]}; download all three again",
            "depth of another size",
        )
    pixels, metres = labelled(values.reshape(size))
    if lens.model == "PINHOLE":
        return View(size, lens.camera(), pixels, metres)
    rays = partial(thin_prism_rays, params=lens.params)
    return View(size, lens.camera(), pixels, metres, rays, {"lens": {"model": lens.model, "params": list(lens.params)}})

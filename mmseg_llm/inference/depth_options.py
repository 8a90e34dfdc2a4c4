"""Options of `predict --task depth`, read and refused before any model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmseg_llm.cameras import Camera, assume_camera
from mmseg_llm.inference.depth_maps import MAX_PIXELS, grid_points, within
from mmseg_llm.inference.depth_queries import Asking, View, open_view

if TYPE_CHECKING:
    from mmseg_llm.masks import Size

CAMERA_FORMS = (
    'write {"fx": ..., "fy": ..., "cx": ..., "cy": ...} or [fx, fy, cx, cy], such cameras by file name, '
    'or {"distance": ..., "images": {file name: camera}}'
)
SIZES = {"width", "height"}
"""What camera files often tell beside the intrinsics, and an image tells itself."""


@dataclass(frozen=True)
class DepthRequest:
    """What is asked of every image: objects, points, a map, or several of them; a map where nothing else is.

    Attributes:
        queries: objects to measure.
        points: pixels (x, y).
        grid: rows and columns of a map.
        camera: intrinsics of all images, or by file name; None looks for EXIF data, then assumes some.
        fov: field of view in degrees to assume.
        max_pixels: of the map of every pixel.
        asking: which depth head, and how.
        mask_head: that finds the objects.
    """

    queries: Sequence[str] = ()
    points: Sequence[tuple[float, float]] = ()
    grid: Size | None = None
    camera: Camera | Mapping[str, Camera] | None = None
    fov: float | None = None
    max_pixels: int = MAX_PIXELS
    asking: Asking = field(default_factory=Asking)
    mask_head: str | None = None

    def camera_of(self, path: Path) -> Camera | None:
        """The given camera of an image: of its name, or of a path that ends like its own.

        Raises:
            ValueError: if the cameras by file name lack it.
        """
        if not isinstance(self.camera, Mapping):
            return self.camera
        parts = path.absolute().parts
        names = [name for name in self.camera if Path(name).parts == parts[-len(Path(name).parts) :]]
        if not names:
            known = ", ".join(sorted(self.camera)[:3])
            raise ValueError(f"the camera file has no camera of {path.name}, only of {known}, ...")
        return self.camera[max(names, key=len)]

    def view(self, path: Path) -> View:
        """An image with its camera.

        Raises:
            ValueError: for an image that cannot be read, or that the cameras by file name lack.
        """
        return open_view(path, self.camera_of(path), self.fov)


def read_request(
    query: Sequence[str] | None,
    *,
    points: Sequence[str] | str | None = None,
    grid: str | None = None,
    camera: str | None = None,
    fov: float | None = None,
    max_pixels: int | None = None,
    asking: Asking | None = None,
    mask_head: str | None = None,
) -> DepthRequest:
    """The options as a request.

    Raises:
        ValueError: for options that cannot be read or mean nothing.
    """
    if camera is not None and fov is not None:
        raise ValueError(f"both a camera and a field of view of {fov} degrees are given; give one of them")
    if fov is not None:
        assume_camera((1, 1), fov)  # refuses what is no angle
    if max_pixels is not None and grid is None and (query or points):
        raise ValueError(
            "--max_pixels is about a map, and none is asked for beside queries or points; give --grid with it"
        )
    within((1, 1), MAX_PIXELS if max_pixels is None else max_pixels)  # refuses what is no number of pixels
    texts = [points] if isinstance(points, str) else list(points or ())
    return DepthRequest(
        queries=tuple(query or ()),
        points=[point for text in texts for point in parse_points(text)],
        grid=None if grid is None else parse_grid(grid),
        camera=None if camera is None else read_cameras(camera),
        fov=fov,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
        asking=asking or Asking(),
        mask_head=mask_head,
    )


def parse_points(text: str) -> list[tuple[float, float]]:
    """`"120,80;40,60"` as pairs (x, y).

    Raises:
        ValueError: for anything else.
    """
    found = [_numbers(pair) for pair in text.strip(" ;").split(";")]
    if any(len(pair) != 2 or not all(map(math.isfinite, pair)) for pair in found):
        raise ValueError(f"points are '{text}'; write them as x,y;x,y such as '120,80;40,60'")
    return [(x, y) for x, y in found]


def parse_grid(text: str) -> Size:
    """`"48x64"` as (rows, columns).

    Raises:
        ValueError: for anything else.
    """
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.strip().isdecimal() and columns.strip().isdecimal()):
        raise ValueError(f"grid is '{text}'; write rows and columns such as 48x64")
    grid = int(rows), int(columns)
    grid_points((1, 1), grid)  # refuses one without cells
    return grid


def read_cameras(text: str) -> Camera | dict[str, Camera]:
    """`"fx,fy,cx,cy"`, or a JSON file.

    The file holds one camera, cameras by file name, or those as `intrinsics.json` of a depth folder has them
    (`{"distance": ..., "images": {file name: camera}}`). A camera is `{"fx", "fy", "cx", "cy", ...}` as `Camera.to_json` writes
    it, or a list of the four numbers; a width and a height beside them do not matter.

    Raises:
        ValueError: for anything else, or intrinsics that no camera has.
    """
    path = Path(text)
    if path.suffix.lower() != ".json":
        values = _numbers(text)
        if len(values) != 4:
            raise ValueError(f"camera is '{text}'; write fx,fy,cx,cy in pixels, or name a .json file")
        fx, fy, cx, cy = values
        return Camera(fx, fy, cx, cy)
    if not path.is_file():
        raise ValueError(f"camera file {path} does not exist; write fx,fy,cx,cy, or name a file that has them")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"camera file {path} holds no camera ({error}); {CAMERA_FORMS}") from error
    if isinstance(content, list) or (isinstance(content, dict) and "fx" in content):
        return _camera(path, "", content)
    common = {}
    if isinstance(content, dict) and isinstance(content.get("images"), dict):
        common = {key: content[key] for key in ("distance",) if content.get(key) is not None}
        content = content["images"]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"camera file {path} holds no camera; {CAMERA_FORMS}")
    return {name: _camera(path, f" of '{name}'", entry, common) for name, entry in content.items()}


def _camera(path: Path, whose: str, entry: Any, common: Mapping[str, Any] | None = None) -> Camera:
    """An entry of a camera file.

    Raises:
        ValueError: if it is no camera, or one that cannot be.
    """
    is_list = isinstance(entry, list) and len(entry) == 4
    fields = dict(zip(("fx", "fy", "cx", "cy"), entry, strict=True)) if is_list else entry
    if not isinstance(fields, dict):
        raise ValueError(f"camera file {path} holds no camera{whose}; {CAMERA_FORMS}")
    try:
        return Camera.from_json({**(common or {}), **{k: v for k, v in fields.items() if k not in SIZES}})
    except TypeError as error:
        said = str(error).removeprefix("Camera.__init__() ")
        fault = f"holds no camera{whose} ({said}); {CAMERA_FORMS}"
    except ValueError as error:
        fault = f"holds a camera{whose} that cannot be: {error}"
    raise ValueError(
        f"camera file {path} {fault}"
    )  # outside of the handlers, as the command line tells the first of chained errors


def _numbers(text: str) -> list[float]:
    """Numbers between commas; none where one of them cannot be read."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []

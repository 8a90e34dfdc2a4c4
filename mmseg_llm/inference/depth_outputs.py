"""What `predict --task depth` leaves behind: pictures, maps, clouds and a JSON of every answer, and what it says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.inference.depth_maps import FARTHEST_MM, GRID, DepthMap, ask_depth_map, to_millimetres
from mmseg_llm.inference.depth_pictures import draw_points
from mmseg_llm.inference.depth_queries import (
    ALONG,
    View,
    ask_points,
    describe_camera,
    describe_failures,
    distance_of,
    failures_of,
    open_view,
    point_record,
    values_of,
)
from mmseg_llm.inference.object_depth import draw_objects
from mmseg_llm.inference.outputs import unique_stems
from mmseg_llm.inference.point_clouds import PointCloud
from mmseg_llm.inference.visualize import _safe_stem

if TYPE_CHECKING:
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.masks import Size
    from mmseg_llm.structures import Prediction


@dataclass(frozen=True)
class DepthRequest:
    """What is asked of every image: objects, points, a map, or several of them; a map where nothing else is.

    Attributes:
        queries: objects to measure.
        points: pixels (x, y).
        grid: rows and columns of a map.
        camera: intrinsics of all images, or by file name; None looks for EXIF data, then assumes some.
        fov: field of view in degrees to assume.
        distance: what the metres are measured along, for heads that do not say.
        head, protocol: of the depth head.
        mask_head: that finds the objects.
    """

    queries: Sequence[str] = ()
    points: Sequence[tuple[float, float]] = ()
    grid: Size | None = None
    camera: Camera | Mapping[str, Camera] | None = None
    fov: float | None = None
    distance: Distance | None = None
    head: str | None = None
    protocol: str | None = None
    mask_head: str | None = None

    def view(self, path: Path) -> View:
        """An image with its camera.

        Raises:
            ValueError: for an image that cannot be read, or that the cameras by file name lack.
        """
        camera = self.camera
        if isinstance(camera, Mapping):
            if path.name not in camera:
                raise ValueError(
                    f"the camera file has no camera of {path.name}, only of {', '.join(sorted(camera)[:3])}, ..."
                )
            camera = camera[path.name]
        return open_view(path, camera, self.fov)


def write_depths(perceiver: Perceiver, files: Sequence[Path], folder: Path, request: DepthRequest) -> Iterator[str]:
    """Answer and write image after image; yields what there is to say about each.

    Args:
        perceiver: with a depth head.
        files: images.
        folder: to write into.
        request: what is asked.

    Raises:
        ValueError: for an image that cannot be read, or a model without the heads that are needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path, stem in zip(files, unique_stems(files), strict=True):
        writer = _Writer(perceiver, path, request.view(path), folder / _safe_stem(stem), request)
        yield from (f"{path.name}: {line}" for line in writer.write())


@dataclass
class _Writer:
    """Answers and writes one image; its methods yield what there is to say.

    Attributes:
        perceiver: with a depth head.
        path: the image.
        view: the image, opened, with its camera.
        base: beginning of the names of all files that are written.
        request: what is asked.
        content: for the JSON file.
    """

    perceiver: Perceiver
    path: Path
    view: View
    base: Path
    request: DepthRequest
    content: dict[str, Any] = field(default_factory=dict)

    def file(self, ending: str) -> Path:
        """A file of this image."""
        return self.base.with_name(self.base.name + ending)

    def write(self) -> Iterator[str]:
        """Everything that is requested."""
        view, request = self.view, self.request
        self.content = {"image": self.path.name, "size": list(view.size), "camera": view.camera.to_json()}
        yield describe_camera(view.camera, view.size)
        if request.queries:
            yield from self._objects()
        if request.points:
            yield from self._points()
        if request.grid or not (request.queries or request.points):
            yield from self._map()
        self.file("_depth.json").write_text(json.dumps(self.content, ensure_ascii=False, indent=1), encoding="utf-8")

    def _objects(self) -> Iterator[str]:
        request = self.request
        objects = self.perceiver.measure(
            *(self.path, list(request.queries), self.view.camera),
            mask_head=request.mask_head,
            depth_head=request.head,
            protocol=request.protocol,
            distance=request.distance,
        )
        draw_objects(self.view.image, objects).save(self.file("_objects.jpg"), quality=92, subsampling=0)
        self.content["objects"] = [thing.to_json() for thing in objects]
        for thing in objects:
            failures = f"; points without an answer: {describe_failures(thing.failures)}" if thing.failures else ""
            yield f"{thing.expression}: {thing.label()}{failures}"

    def _points(self) -> Iterator[str]:
        request = self.request
        answers = ask_points(self.perceiver.model, self.view, request.points, request.head, request.protocol)
        draw_points(self.view.image, answers).save(self.file("_points.jpg"), quality=92, subsampling=0)
        distance = distance_of(answers, request.distance)
        self.content["points"] = _answers(answers, distance)
        for record in self.content["points"]["answers"]:
            found = record["reason"] if record["metres"] is None else f"{record['metres']:.2f} m {ALONG[distance]}"
            yield f"({record['x']:g}, {record['y']:g}): {found}"
        yield _count(answers)

    def _map(self) -> Iterator[str]:
        request = self.request
        depth = ask_depth_map(
            *(self.perceiver.model, self.view, request.grid or GRID),
            head=request.head,
            protocol=request.protocol,
            distance=request.distance,
        )
        dense = depth.resized()
        self.content["map"] = {"grid": list(depth.metres.shape)} | _answers(depth.answers, depth.distance)
        depth.picture().save(self.file("_depth_grid.png"))
        dense.picture().save(self.file("_depth_picture.png"))
        dense.overlay().save(self.file("_depth_overlay.jpg"), quality=92, subsampling=0)
        depth.save(self.file("_depth.npz"))
        yield _count(depth.answers)
        yield from self._millimetres(dense)
        yield from self._clouds(dense)

    def _millimetres(self, dense: DepthMap) -> Iterator[str]:
        millimetres, num_beyond = to_millimetres(dense.metres)
        Image.fromarray(millimetres).save(self.file("_depth.png"))
        if num_beyond:
            yield f"{num_beyond} pixels beyond {FARTHEST_MM / 1000} m are 0 in the 16-bit PNG; the npz has them"

    def _clouds(self, dense: DepthMap) -> Iterator[str]:
        if dense.distance == "unspecified":
            yield "no cloud, as the head does not say what its metres are measured along; give --distance planar or ray"
        elif not dense.is_valid.any():
            yield "no cloud, as no point was answered"
        else:
            cloud = PointCloud.of(dense, self.view.name)
            for suffix in (".ply", ".html"):
                cloud.save(self.file(f"_cloud{suffix}"))


def _answers(answers: Sequence[Prediction], distance: Distance) -> dict[str, Any]:
    """Answers for the JSON: what they are measured along, how many failed why, and each."""
    return {
        "distance": distance,
        "num_answered": len(answers) - sum(failures_of(answers).values()),
        "failures": failures_of(answers),
        "answers": [point_record(answer) for answer in answers],
    }


def _count(answers: Sequence[Prediction]) -> str:
    """How many points were answered, with what, and why the others were not."""
    metres, failures = values_of(answers), failures_of(answers)
    found = metres[np.isfinite(metres)]
    metres_of = f", {found.min():.2f} to {found.max():.2f} m" if found.size else ""
    missing = f"; without an answer: {describe_failures(failures)}" if failures else ""
    num_moved = sum(answer.measurement is not None and answer.measurement.is_snapped for answer in answers)
    moved = f"; {num_moved} moved to where they can be asked" if num_moved else ""
    return f"{found.size} of {len(answers)} points answered{metres_of}{missing}{moved}"


def read_request(
    task: str,
    query: Sequence[str] | None,
    *,
    points: str | None,
    grid: str | None,
    camera: str | None,
    fov: float | None,
    distance: Distance | None,
    head: str | None,
    protocol: str | None,
    mask_head: str | None,
) -> DepthRequest | None:
    """The options of `predict` as a request, None for task segment.

    Raises:
        ValueError: for options that cannot be read, or belong to the other task, or without anything to do.
    """
    options = {
        "points": points,
        "grid": grid,
        "camera": camera,
        "fov": fov,
        "distance": distance,
        "mask_head": mask_head,
    }
    if task != "depth":
        if given := [f"--{name}" for name, value in options.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} needs --task depth")
        if not query:
            raise ValueError("nothing to predict; give --query 'the red cube', or --task depth")
        return None
    return DepthRequest(
        queries=tuple(query or ()),
        points=() if points is None else parse_points(points),
        grid=None if grid is None else parse_grid(grid),
        camera=None if camera is None else read_cameras(camera),
        fov=fov,
        distance=distance,
        head=head,
        protocol=protocol,
        mask_head=mask_head,
    )


def parse_points(text: str) -> list[tuple[float, float]]:
    """`"120,80;40,60"` as pairs (x, y).

    Raises:
        ValueError: for anything else.
    """
    found = [_numbers(pair) for pair in text.strip(" ;").split(";")]
    if any(len(pair) != 2 for pair in found):
        raise ValueError(f"points are '{text}'; write them as x,y;x,y such as '120,80;40,60'")
    return [(x, y) for x, y in found]


def parse_grid(text: str) -> Size:
    """`"48x64"` as (rows, columns).

    Raises:
        ValueError: for anything else.
    """
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.strip().isdigit() and columns.strip().isdigit()):
        raise ValueError(f"grid is '{text}'; write rows and columns such as 48x64")
    return int(rows), int(columns)


def read_cameras(text: str) -> Camera | dict[str, Camera]:
    """`"fx,fy,cx,cy"`, or a JSON file with one camera (`fx`, `fy`, `cx`, `cy`, ...) or with cameras by file name.

    Raises:
        ValueError: for anything else, or intrinsics that no camera has.
    """
    path = Path(text)
    if path.suffix != ".json":
        values = _numbers(text)
        if len(values) != 4:
            raise ValueError(f"camera is '{text}'; write fx,fy,cx,cy in pixels, or name a .json file")
        fx, fy, cx, cy = values
        return Camera(fx, fy, cx, cy)
    if not path.is_file():
        raise ValueError(f"camera file {path} does not exist; write fx,fy,cx,cy, or name a file that has them")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Camera.from_json(content) if "fx" in content else {k: Camera.from_json(v) for k, v in content.items()}
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"camera file {path} holds no camera ({error}); "
            'write {"fx": ..., "fy": ..., "cx": ..., "cy": ...}, or such cameras by file name'
        ) from error


def _numbers(text: str) -> list[float]:
    """Numbers between commas; none where one of them cannot be read."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []

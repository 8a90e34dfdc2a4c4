"""What `predict --task depth` leaves behind: pictures, maps, clouds and a JSON of every answer, and what it says about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.inference.depth_maps import FARTHEST_MM, GRID, DepthMap, ask_depth_map, write_millimetres
from mmseg_llm.inference.depth_options import DepthRequest
from mmseg_llm.inference.depth_pictures import draw_points
from mmseg_llm.inference.depth_queries import (
    ALONG,
    UPRIGHT,
    View,
    ask_points,
    describe_camera,
    describe_failures,
    distance_of,
    failures_of,
    point_record,
    values_of,
)
from mmseg_llm.inference.object_depth import draw_objects
from mmseg_llm.inference.outputs import unique_stems
from mmseg_llm.inference.point_clouds import PointCloud
from mmseg_llm.inference.visualize import safe_stem

if TYPE_CHECKING:
    from mmseg_llm.cameras import Distance
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.structures import Prediction


ENDINGS = (
    "_depth.json",
    "_objects.jpg",
    "_points.jpg",
    "_depth_grid.png",
    "_depth_picture.png",
    "_depth_overlay.jpg",
    "_depth.npz",
    "_depth.png",
    "_cloud.ply",
    "_cloud.html",
)
"""Of the names of all files that may be written about an image."""


def write_depths(
    perceiver: Perceiver, files: Sequence[Path], folder: Path, request: DepthRequest, faults: dict[Path, str]
) -> Iterator[str]:
    """Answer and write image after image; yields what there is to say about each.

    Args:
        perceiver: with a depth head.
        files: images.
        folder: to write into.
        request: what is asked.
        faults: what is wrong with those of the images that are left out; images that turn out to be broken are added.

    Raises:
        ValueError: for a model without the heads that are needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path, stem in zip(files, unique_stems(files), strict=True):
        if path in faults:
            continue
        try:
            view = request.view(path)
        except ValueError as error:  # its header could be read, its pixels cannot
            faults[path] = str(error)
            yield f"{path.name}: left out: {error}"
            continue
        writer = _Writer(perceiver, path, view, folder / safe_stem(stem), request)
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
        about = {"image": self.path.name, "size": list(view.size), "orientation": view.orientation}
        self.content = about | {"camera": view.camera.to_json()}
        yield describe_camera(view.camera, view.size)
        if view.orientation != UPRIGHT:
            yield (
                f"asked as its pixels are stored, but its EXIF orientation is {view.orientation}: the model sees it turned; "
                "turn it first, such as by mogrify -auto-orient"
            )
        if request.queries:
            yield from self._objects()
        if request.points:
            yield from self._points()
        if request.grid or not (request.queries or request.points):
            yield from self._map()
        self.file("_depth.json").write_text(json.dumps(self.content, ensure_ascii=False, indent=1), encoding="utf-8")

    def _objects(self) -> Iterator[str]:
        request, asking = self.request, self.request.asking
        objects = self.perceiver.measure(
            *(self.path, list(request.queries), self.view.camera),
            mask_head=request.mask_head,
            depth_head=asking.head,
            protocol=asking.protocol,
            distance=asking.distance,
        )
        draw_objects(self.view.image, objects).save(self.file("_objects.jpg"), quality=92, subsampling=0)
        self.content["objects"] = [thing.to_json() for thing in objects]
        for thing in objects:
            failures = f"; points without an answer: {describe_failures(thing.failures)}" if thing.failures else ""
            yield f"{thing.expression}: {thing.label()}{failures}"

    def _points(self) -> Iterator[str]:
        request = self.request
        answers = ask_points(self.perceiver.model, self.view, request.points, request.asking)
        draw_points(self.view.image, answers).save(self.file("_points.jpg"), quality=92, subsampling=0)
        distance = distance_of(answers, request.asking.distance)
        self.content["points"] = _answers(answers, distance)
        for record in self.content["points"]["answers"]:
            found = record["reason"] if record["metres"] is None else f"{record['metres']:.2f} m {ALONG[distance]}"
            yield f"({record['x']:g}, {record['y']:g}): {found}"
        yield _count(answers, distance)

    def _map(self) -> Iterator[str]:
        request = self.request
        depth = ask_depth_map(self.perceiver.model, self.view, request.grid or GRID, request.asking)
        dense = depth.resized(max_pixels=request.max_pixels)
        shapes = {"grid": list(depth.metres.shape), "pixels": list(dense.metres.shape), "source": dense.source}
        self.content["map"] = shapes | _answers(depth.answers, depth.distance)
        depth.picture().save(self.file("_depth_grid.png"))
        dense.picture().save(self.file("_depth_picture.png"))
        dense.overlay().save(self.file("_depth_overlay.jpg"), quality=92, subsampling=0)
        dense.save(self.file("_depth.npz"))
        yield _count(depth.answers, depth.distance)
        if dense.metres.shape != tuple(dense.size):
            (rows, columns), (height, width) = dense.metres.shape, dense.size
            yield (
                f"map and cloud have {columns}x{rows} of the {width}x{height} pixels; give --max_pixels {width * height} for all"
            )
        yield from self._millimetres(dense)
        yield from self._clouds(dense)

    def _millimetres(self, dense: DepthMap) -> Iterator[str]:
        if num_beyond := write_millimetres(dense, self.file("_depth.png")):
            yield f"{num_beyond} pixels beyond {FARTHEST_MM / 1000} m are 0 in the 16-bit PNG; the npz has them"

    def _clouds(self, dense: DepthMap) -> Iterator[str]:
        if dense.distance == "unspecified":
            yield "no cloud, as the head does not say what its metres are measured along; give --distance planar or ray"
        elif not dense.is_valid.any():
            yield "no cloud, as no point was answered"
        else:
            cloud = PointCloud.of(dense, self.view.name)
            if cloud.num_unplaced:
                yield f"{cloud.num_unplaced} pixels are not in the cloud, as the camera sees no ray there (its distortion)"
            for suffix in (".ply", ".html") if len(cloud) else ():
                cloud.save(self.file(f"_cloud{suffix}"))


def _answers(answers: Sequence[Prediction], distance: Distance) -> dict[str, Any]:
    """Answers for the JSON: what they are measured along, how many failed why, and each."""
    return {
        "distance": distance,
        "num_answered": len(answers) - sum(failures_of(answers).values()),
        "failures": failures_of(answers),
        "answers": [point_record(answer) for answer in answers],
    }


def _count(answers: Sequence[Prediction], distance: Distance) -> str:
    """How many points were answered, with what, and why the others were not."""
    metres, failures = values_of(answers), failures_of(answers)
    found = metres[np.isfinite(metres)]
    metres_of = f", {found.min():.2f} to {found.max():.2f} m {ALONG[distance]}" if found.size else ""
    missing = f"; without an answer: {describe_failures(failures)}" if failures else ""
    num_moved = sum(answer.measurement is not None and answer.measurement.is_snapped for answer in answers)
    moved = f"; {num_moved} moved to where they can be asked" if num_moved else ""
    return f"{found.size} of {len(answers)} points answered{metres_of}{missing}{moved}"

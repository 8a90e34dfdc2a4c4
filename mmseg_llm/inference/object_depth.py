"""How far and how large objects are: masks of one head, depths of another within them.

Legend: H W pixels, K points of an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.inference.depth_queries import (
    Asking,
    View,
    ask_points,
    distance_of,
    failures_of,
    places_of,
    point_record,
    values_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from mmseg_llm.cameras import Camera, Distance
    from mmseg_llm.masks import Mask
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.structures import Prediction

REASONS = {
    "no_target": "the segmentation head says that nothing fits",
    "empty_mask": "the mask has no pixels",
    "no_depth": "none of the points within the mask was answered",
}
BORDER = 0.01
"""Of the longer side of the image: how near to the border of a mask no point is asked, where the mask is thick enough."""


@dataclass(frozen=True)
class Spread:
    """Metres of the points of an object: median, and 5th and 95th percentile."""

    median: float
    nearest: float
    farthest: float

    @classmethod
    def of(cls, metres: np.ndarray) -> Spread:
        """The spread of `(K,)` metres, K at least 1."""
        nearest, median, farthest = (float(value) for value in np.percentile(metres, (5, 50, 95)))
        return cls(median, nearest, farthest)


@dataclass(frozen=True)
class Extent:
    """Size in metres of what is seen of an object.

    Attributes:
        width, height: of the box of its mask, at the median depth.
        depth: from the nearest to the farthest of its points along the axis; its back is not seen.
    """

    width: float
    height: float
    depth: float


@dataclass(frozen=True)
class ObjectDepth:
    """Where an object is, and how large.

    Attributes:
        expression: what was looked for.
        mask: prediction of the segmentation head, or the given mask as one.
        camera: intrinsics; `camera.origin` says whether they are an assumption.
        measured: what the head's answers are measured along.
        reason: why there is no distance, a key of `REASONS`; empty otherwise.
        raw: the answers as they are; None without any.
        planar, ray: the same along the axis and along the ray; None where nobody says what the answers are measured along.
        centroid: (X, Y, Z) right, down and forward of the camera: the median of the points in space.
        extent: size in metres; None where the camera sees no ray at the edges of the mask.
        failures: number of points without an answer, by reason.
        answers: predictions of all points.
    """

    expression: str
    mask: Prediction
    camera: Camera
    measured: Distance
    reason: str = ""
    raw: Spread | None = None
    planar: Spread | None = None
    ray: Spread | None = None
    centroid: tuple[float, float, float] | None = None
    extent: Extent | None = None
    failures: dict[str, int] = field(default_factory=dict)
    answers: tuple[Prediction, ...] = field(default=(), repr=False)

    @property
    def distance(self) -> float | None:
        """Metres from the camera: median along the ray, or of the answers as they are where nobody says; None without any."""
        spread = self.ray or self.raw
        return None if spread is None else spread.median

    @property
    def num_answered(self) -> int:
        """Number of points with a value."""
        return len(self.answers) - sum(self.failures.values())

    def label(self) -> str:
        """In short: `3.42 m, 0.80 x 0.70 m`, or why not."""
        if self.distance is None:
            return self.reason.replace("_", " ")
        size = "" if self.extent is None else f", {self.extent.width:.2f} x {self.extent.height:.2f} m"
        return f"{self.distance:.2f} m{size}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON, with the mask and every point."""
        parts = {name: getattr(self, name) for name in ("raw", "planar", "ray", "extent")}
        return {
            "expression": self.expression,
            "distance": self.distance,
            "reason": self.reason,
            "measured": self.measured,
            **{name: None if part is None else asdict(part) for name, part in parts.items()},
            "centroid": None if self.centroid is None else list(self.centroid),
            "num_points": len(self.answers),
            "num_answered": self.num_answered,
            "failures": self.failures,
            "camera": self.camera.to_json(),
            "mask": self.mask.to_json(),
            "points": [point_record(answer) for answer in self.answers],
        }


def points_inside(mask: Mask, count: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels of a mask away from its border, int64 `(K, 2)` as (x, y), without repeats; K is less where there are fewer.

    Args:
        mask: with at least one pixel.
        count: wanted K.
        rng: chooses among them, evenly.
    """
    import cv2

    padded = np.pad(mask.array.astype(np.uint8), 1)  # what is cut off by the image's border has its border there
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    margin = min(max(2.0, BORDER * max(mask.size)), float(depth.max()) / 2)
    rows, columns = np.nonzero(depth > margin)
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    return np.stack((columns[chosen], rows[chosen]), axis=-1)


def measure_objects(
    model: PerceptionModel,
    view: View,
    masks: Sequence[Prediction],
    asking: Asking,
    points_per_object: int = 32,
    seed: int = 0,
) -> list[ObjectDepth]:
    """Distance and size of the objects under masks of one image; all points of all objects are asked in one batched call.

    Args:
        model: with a depth head.
        view: image and camera.
        masks: predictions with a mask; their queries name the objects.
        asking: which depth head, and how.
        points_per_object: most points asked within each mask.
        seed: of their choice.

    Raises:
        ValueError: for a mask of another size than the image, fewer than one point, or without a depth head.
    """
    if points_per_object < 1:
        raise ValueError(f"points_per_object is {points_per_object}; it must be at least 1")
    asked: list[np.ndarray] = []
    for index, prediction in enumerate(masks):
        found = prediction.answer_mask
        if found.size != tuple(view.size):
            raise ValueError(
                f"the mask of '{prediction.query}' is {found.size[0]}x{found.size[1]} but its image is "
                f"{view.size[0]}x{view.size[1]} (HxW); give masks of the image itself"
            )
        rng = np.random.default_rng((seed, index))
        asked.append(points_inside(found, points_per_object, rng) if found.area else np.empty((0, 2), np.int64))
    points = np.concatenate(asked) if asked else np.empty((0, 2))
    answers = ask_points(model, view, points, asking) if len(points) else []
    measured = distance_of(answers, asking.distance) if answers else asking.distance or "unspecified"
    ends = np.cumsum([len(own) for own in asked])
    return [
        _measure(prediction, view.camera, measured, answers[end - len(own) : end])
        for prediction, own, end in zip(masks, asked, ends, strict=True)
    ]


def _measure(mask: Prediction, camera: Camera, measured: Distance, answers: Sequence[Prediction]) -> ObjectDepth:
    """One object from its mask and the answers within it."""
    metres, failures = values_of(answers), failures_of(answers)
    is_known = np.isfinite(metres)
    if measured != "unspecified" and is_known.any():
        has_ray = np.isfinite(camera.rays(places_of(answers))).all(axis=-1)
        if num_lost := int((is_known & ~has_ray).sum()):
            failures["bad_camera"] = failures.get("bad_camera", 0) + num_lost
        is_known &= has_ray
    fields: dict[str, Any] = {"failures": failures, "answers": tuple(answers)}
    if not is_known.any():
        reason = "no_depth" if answers else "empty_mask" if mask.exists else "no_target"
        return ObjectDepth(mask.query, mask, camera, measured, reason, **fields)
    metres, points = metres[is_known], places_of(answers)[is_known]
    fields["raw"] = Spread.of(metres)
    if measured != "unspecified":
        fields["planar"] = Spread.of(camera.convert(metres, points, measured, "planar"))
        fields["ray"] = Spread.of(camera.convert(metres, points, measured, "ray"))
        fields["centroid"] = tuple(float(value) for value in np.median(camera.place(points, metres, measured), axis=0))
        fields["extent"] = _extent(mask, camera, fields["planar"])
    return ObjectDepth(mask.query, mask, camera, measured, **fields)


def _extent(mask: Prediction, camera: Camera, planar: Spread) -> Extent | None:
    """The box of a mask at the median depth, and the spread of the depths; None where an edge of the box has no ray."""
    box = mask.answer_mask.box
    assert box is not None, "points were answered within an empty mask"
    left, top, right, bottom = (edge - 0.5 for edge in box)  # edges of pixels, whose centres are whole numbers
    x, y = (left + right) / 2, (top + bottom) / 2
    rays = camera.rays(np.array([(left, y), (right, y), (x, top), (x, bottom)]))
    if not np.isfinite(rays).all():
        return None
    width, height = rays[1, 0] - rays[0, 0], rays[3, 1] - rays[2, 1]
    return Extent(float(width) * planar.median, float(height) * planar.median, planar.farthest - planar.nearest)


def draw_objects(image: str | Path | Image.Image, objects: Sequence[ObjectDepth]) -> Image.Image:
    """The image with the mask of every object, and its distance and size in the legend.

    Args:
        image: that was measured.
        objects: in it.
    """
    from mmseg_llm.inference.visualize import draw_predictions

    return draw_predictions(image, [thing.mask for thing in objects], statuses=[thing.label() for thing in objects])

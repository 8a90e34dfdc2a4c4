"""Numbers that a model says about a scene: metres, seconds, metres per second - with what was asked and why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmseg_llm.cameras import Camera, Distance

REASONS = {
    "no_number": "the answer holds no number",
    "several_numbers": "the answer holds several numbers and does not say which is meant",
    "ambiguous": "the number can be read in more than one way or is no plain statement, as in 2,5 or 1.2.3 or <2",
    "non_positive": "the number is 0 or below",
    "non_finite": "the number is no finite one",
    "no_unit": "the number stands outside the answer tag and without a unit",
    "other_unit": "the number is in another unit than was asked for",
    "out_of_range": "the number is above the largest one that is accepted",
    "truncated": "the answer breaks off before its number is complete",
    "no_answer": "nothing was answered",
    "outside_image": "the point lies outside the image",
    "undrawable": "the point is too near the border for its marker",
    "bad_camera": "the camera is unknown or cannot be used",
    "cut_away": "the point lies in a part of the photograph that undoing its lens distortion cuts away",
    "too_large": "the picture at the unified focal length is larger than the backbone takes",
}
"""Why an answer has no value: key -> the sentence for reports."""


def to_null(number: float) -> float | None:
    """A coordinate for JSON, which knows finite numbers only: None for any other."""
    return number if math.isfinite(number) else None


def from_null(number: float | None) -> float:
    """Inverse of `to_null`: None is nan."""
    return math.nan if number is None else number


@dataclass(frozen=True)
class DepthPoint:
    """A pixel with its labelled distance in metres (None when asked, not labelled)."""

    x: float
    y: float
    metres: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The number in an answer.

    Attributes:
        value: in `unit`; None where there is none to be trusted.
        reason: why there is none (a key of `REASONS`); empty otherwise.
        points: `(x, y)` original pixels that were asked about, after any snapping.
        task: key of the question template.
        unit: `m`, `s` or `m/s`.
        distance: what the value is measured along, where it is a depth.
        camera: intrinsics it was answered with; its `distance` is that of the labels.
        is_snapped: whether a point was moved, as markers cannot be drawn at the border.
        scale: what the number in the text is multiplied by, where the picture had to be shrunk to fit the backbone.
    """

    value: float | None
    reason: str = ""
    points: tuple[tuple[float, float], ...] = ()
    task: str = "depth"
    unit: str = "m"
    distance: Distance = "unspecified"
    camera: Camera | None = None
    is_snapped: bool = False
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON; coordinates that are no numbers are null."""
        return {
            "value": self.value,
            "reason": self.reason,
            "points": [[to_null(x), to_null(y)] for x, y in self.points],
            "task": self.task,
            "unit": self.unit,
            "distance": self.distance,
            "camera": None if self.camera is None else self.camera.to_json(),
            **({"is_snapped": True} if self.is_snapped else {}),
            **({} if self.scale == 1 else {"scale": self.scale}),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measurement:
        """Inverse of `to_json`."""
        camera = content["camera"]
        return cls(
            **content
            | {
                "points": tuple((from_null(x), from_null(y)) for x, y in content["points"]),
                "camera": None if camera is None else Camera.from_json(camera),
            }
        )

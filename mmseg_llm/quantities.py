"""Numbers that a model says about a scene: metres, seconds, metres per second - with what was asked and why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmseg_llm.cameras import Camera, Distance


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
    """

    value: float | None
    reason: str = ""
    points: tuple[tuple[float, float], ...] = ()
    task: str = "depth"
    unit: str = "m"
    distance: Distance = "unspecified"
    camera: Camera | None = None
    is_snapped: bool = False

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {
            "value": self.value,
            "reason": self.reason,
            "points": [list(point) for point in self.points],
            "task": self.task,
            "unit": self.unit,
            "distance": self.distance,
            "camera": None if self.camera is None else self.camera.to_json(),
            **({"is_snapped": True} if self.is_snapped else {}),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measurement:
        """Inverse of `to_json`."""
        camera = content["camera"]
        return cls(
            **content
            | {
                "points": tuple((x, y) for x, y in content["points"]),
                "camera": None if camera is None else Camera.from_json(camera),
            }
        )

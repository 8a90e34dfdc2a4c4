"""DepthRecord: one line of a depth JSONL file, an image with its labelled pixels (DepthLM specification F.5).

Legend: N labelled pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmseg_llm.cameras import Distance

DISTANCE_TYPES: dict[str, Distance] = {
    "z": "planar",
    "planar": "planar",
    "euclidean": "ray",
    "ray": "ray",
    "unspecified": "unspecified",
}
"""What `distance_type` may say in a file, and what it means."""
_WRITTEN = {"planar": "z", "ray": "euclidean"}
_REQUIRED = ("image", "intrinsics", "pixel_coords", "depth")
_OPTIONAL = ("distance_type", "dataset", "scene_id", "camera", "valid_range", "distortion", "label_source")


@dataclass(frozen=True)
class DepthRecord:
    """An image and the metres of some of its pixels. Sequences may be given as lists or arrays; they become tuples.

    Attributes:
        image: path relative to the image folder, with forward slashes.
        intrinsics: `(fx, fy, cx, cy)` or `(fx, fy, cx, cy, width, height)` in pixels of the stored image.
        pixel_coords: N pixels `(x, y)` from the upper left pixel (0, 0).
        depth: N metres.
        distance: what the metres are measured along.
        dataset, scene_id, camera_name, label_source: where it comes from; empty where nobody says.
        valid_range: nearest and farthest metres that the labels can hold.
        distortion: OpenCV coefficients of the image as it is; empty for a pinhole image.
        extra: further fields for JSON.
    """

    image: str
    intrinsics: tuple[float, ...]
    pixel_coords: tuple[tuple[float, float], ...]
    depth: tuple[float, ...]
    distance: Distance = "unspecified"
    dataset: str = ""
    scene_id: str = ""
    camera_name: str = ""
    label_source: str = ""
    valid_range: tuple[float, float] | None = None
    distortion: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError for lists that do not fit together, or values that are no labels."""
        where = f"depth record of image '{self.image}'"
        if not self.image:
            raise ValueError("a depth record has no image; name it relative to the image folder")
        if self.distance not in DISTANCE_TYPES.values():
            raise ValueError(f"{where}: distance is '{self.distance}'; use planar, ray or unspecified")
        intrinsics = _numbers(self.intrinsics, f"{where}: intrinsics")
        if len(intrinsics) not in (4, 6) or min(intrinsics[:2] + intrinsics[4:]) <= 0:
            raise ValueError(
                f"{where}: intrinsics are {list(intrinsics)}; give [fx, fy, cx, cy] or [fx, fy, cx, cy, width, height] "
                "with positive focal lengths and sizes"
            )
        depth = _numbers(self.depth, f"{where}: depth")
        points = _pairs(self.pixel_coords, f"{where}: pixel_coords")
        if len(points) != len(depth):
            raise ValueError(f"{where}: {len(points)} pixels do not fit {len(depth)} depths; give one depth for each")
        if depth and min(depth) <= 0:
            raise ValueError(
                f"{where}: a depth is {min(depth)}; labels are positive metres, leave unlabelled pixels out"
            )
        _set(self, "intrinsics", intrinsics)
        _set(self, "depth", depth)
        _set(self, "pixel_coords", points)
        _set(self, "distortion", _numbers(self.distortion, f"{where}: distortion"))
        if self.valid_range is not None:
            _set(self, "valid_range", _numbers(self.valid_range, f"{where}: valid_range"))
            if len(self.valid_range) != 2 or not self.valid_range[0] < self.valid_range[1]:
                raise ValueError(f"{where}: valid_range is {list(self.valid_range)}; give nearest < farthest metres")

    def to_json(self) -> dict[str, Any]:
        """A plain dict in the order of the reference's files, from which `from_json` restores the record."""
        optional = {
            "distance_type": _WRITTEN.get(self.distance),
            "dataset": self.dataset,
            "scene_id": self.scene_id,
            "camera": self.camera_name,
            "valid_range": list(self.valid_range or ()),
            "distortion": list(self.distortion),
            "label_source": self.label_source,
        }
        return {
            "image": self.image,
            "intrinsics": list(self.intrinsics),
            "pixel_coords": [list(point) for point in self.pixel_coords],
            "depth": list(self.depth),
            **{name: value for name, value in optional.items() if value},
            **self.extra,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DepthRecord:
        """Inverse of `to_json`.

        Raises:
            ValueError: if a field is missing or malformed.
        """
        missing = [name for name in _REQUIRED if name not in content]
        if missing:
            raise ValueError(f"depth record lacks the field '{missing[0]}'; it needs {', '.join(_REQUIRED)}")
        return cls(
            image=content["image"],
            intrinsics=content["intrinsics"],
            pixel_coords=content["pixel_coords"],
            depth=content["depth"],
            distance=read_distance(content.get("distance_type")),
            dataset=str(content.get("dataset", "")),
            scene_id=str(content.get("scene_id", "")),
            camera_name=str(content.get("camera", "")),
            label_source=str(content.get("label_source", "")),
            valid_range=content.get("valid_range") or None,
            distortion=content.get("distortion") or (),
            extra={name: value for name, value in content.items() if name not in _REQUIRED + _OPTIONAL},
        )


def read_distance(value: str | None) -> Distance:
    """What a `distance_type` means; nothing means unspecified.

    Raises:
        ValueError: for another word.
    """
    if value is None:
        return "unspecified"
    if not isinstance(value, str) or value not in DISTANCE_TYPES:
        raise ValueError(f"distance_type is '{value}'; use one of {', '.join(DISTANCE_TYPES)}")
    return DISTANCE_TYPES[value]


def write_depth_jsonl(path: str | Path, records: Iterable[DepthRecord]) -> int:
    """Write one line per record into a file that is never seen half written; gives their number.

    Records are taken one by one, so a generator of any length will do; if it raises, the old file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    number = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
                number += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return number


def _numbers(values: Sequence[float] | np.ndarray, what: str) -> tuple[Any, ...]:
    """Finite builtin numbers; whole ones stay whole."""
    numbers = tuple(values.tolist() if isinstance(values, np.ndarray) else values)
    numbers = tuple(number.item() if isinstance(number, np.generic) else number for number in numbers)
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"{what}: {list(numbers)} holds something that is no finite number; leave such labels out")
    return numbers


def _pairs(values: Sequence[Sequence[float]] | np.ndarray, what: str) -> tuple[tuple[Any, Any], ...]:
    """Finite `(x, y)` pairs."""
    rows = values.tolist() if isinstance(values, np.ndarray) else values
    pairs = tuple(_numbers(row, what) for row in rows)
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{what} are not all pairs; give (x, y) for each pixel")
    return pairs  # type: ignore[return-value]


def _set(record: DepthRecord, name: str, value: Any) -> None:
    """Set a field of a frozen record that is being made."""
    object.__setattr__(record, name, value)

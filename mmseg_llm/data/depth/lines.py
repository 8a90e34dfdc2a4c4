"""Lines of a depth JSONL file: what they say, and which of their points are labels.

Legend: N labelled pixels, H W pixels of the image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmseg_llm.cameras import COEFFICIENTS, Camera, Distance
from mmseg_llm.data.depth.points import Span, Unusable, is_inside, make_camera
from mmseg_llm.data.depth.records import read_distance

if TYPE_CHECKING:
    from mmseg_llm.structures import Size

_FIELDS = ("image", "intrinsics", "pixel_coords", "depth")


class Line(NamedTuple):
    """A line that can be understood; whether its points are any good is another question.

    Attributes:
        image: path relative to the image folder.
        size: of the image, None where the line does not say.
        camera: with what its metres are measured along.
        is_repaired: whether one focal length was taken from the other.
        points: `(N, 2)` pixels, whole numbers where they are written so.
        metres: float64 `(N,)`.
        span: metres that count.
        has_lens: whether it has a `lens`, of a model that intrinsics and distortion cannot say.
    """

    image: str
    size: Size | None
    camera: Camera
    is_repaired: bool
    points: np.ndarray
    metres: np.ndarray
    span: Span
    has_lens: bool = False


class Verdict(NamedTuple):
    """bool `(N,)` each: which points are outside of the image, no number, no distance, of several distances, out of range, and
    which are labels.
    """

    is_outside: np.ndarray
    is_no_number: np.ndarray
    is_no_distance: np.ndarray
    is_contradicted: np.ndarray
    is_out_of_range: np.ndarray
    is_usable: np.ndarray


def judge(line: Line, size: Size) -> Verdict:
    """What is wrong with the points of a line in an image `(H, W)`; every point has one verdict."""
    (height, width), metres = size, line.metres
    x, y = line.points[:, 0], line.points[:, 1]
    is_outside = ~((x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5))
    rest = ~is_outside
    is_no_number = rest & ~np.isfinite(metres)
    rest &= ~is_no_number
    is_no_distance = rest & (metres <= 0)
    rest &= ~is_no_distance
    is_contradicted = _contradicted(line, rest)
    rest &= ~is_contradicted
    is_out_of_range = rest & ~((metres >= line.span.near) & (metres <= line.span.far))
    return Verdict(is_outside, is_no_number, is_no_distance, is_contradicted, is_out_of_range, rest & ~is_out_of_range)


def _contradicted(line: Line, is_asked: np.ndarray) -> np.ndarray:
    """bool `(N,)`: which of the asked points have the pixel of another asked one with other metres."""
    places = np.flatnonzero(is_asked)
    x, y = line.points[places].astype(np.float64).T
    pixels, at = np.unique(x + 1j * y, return_inverse=True)
    found = np.zeros(len(is_asked), bool)
    if len(pixels) < len(places):
        metres = line.metres[places]
        nearest, farthest = np.full(len(pixels), np.inf), np.zeros(len(pixels))
        np.minimum.at(nearest, at, metres)
        np.maximum.at(farthest, at, metres)
        found[places] = (nearest < farthest)[at]
    return found


def fit(line: Line, size: Size) -> Line:
    """The line with focal lengths that are plausible for its image `(H, W)`, one taken from the other if need be.

    Raises:
        Unusable: if neither is.
    """
    camera = line.camera
    intrinsics = (camera.fx, camera.fy, camera.cx, camera.cy)
    camera, is_repaired = make_camera(intrinsics, camera.distance, camera.distortion, size)
    return line._replace(camera=camera, is_repaired=True) if is_repaired else line


def faults_of(line: Line, size: Size, verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Reason and sentence of every point that cannot be a label; ranges are no fault."""
    for reason, is_bad, saying in (
        ("point outside of the image", verdict.is_outside, f"lies outside of the image of {size[1]}x{size[0]} pixels"),
        ("non-finite depth", verdict.is_no_number, "has a depth that is no finite number"),
        ("non-positive depth", verdict.is_no_distance, "has no positive depth"),
        ("pixel with two depths", verdict.is_contradicted, "has another depth in the same line"),
    ):
        for place in np.flatnonzero(is_bad).tolist():
            x, y = line.points[place].tolist()
            yield reason, f"point {place} at ({x}, {y}), {line.metres[place]} metres, {saying}"


def parse_line(content: bytes, default: Distance | None, span: Span) -> Line:
    """Read a line.

    Args:
        content: JSON.
        default: what metres are measured along where the line does not say; it must not say anything else.
        span: metres that count, narrowed by the `valid_range` of the line.

    Raises:
        Unusable: if it cannot be understood.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"no valid JSON ({error})", "broken JSON") from error
    missing = [field for field in _FIELDS if not isinstance(record, dict) or field not in record]
    if missing:
        raise Unusable(f"lacks '{missing[0]}'; a line is an object with {', '.join(_FIELDS)}", "malformed line")
    try:
        points, metres = _points(record["pixel_coords"], record["depth"])
        distance = _distance(record.get("distance_type"), default)
        camera, size, is_repaired = _camera(
            record["intrinsics"], distance, [] if record.get("distortion") is None else record["distortion"]
        )
        image, span = _image(record["image"]), _span(record.get("valid_range"), span)
        return Line(image, size, camera, is_repaired, points, metres, span, "lens" in record)
    except Unusable:
        raise
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise Unusable(f"malformed ({error}); DepthRecord.to_json shows the form", "malformed line") from error


def _image(name: Any) -> str:
    """The image path without leading slash."""
    if not isinstance(name, str):
        raise ValueError(f"image is {_brief(name)} and must be the path of one")
    image = name.lstrip("/")
    if not is_inside(image):
        raise Unusable(
            f"image '{name}' leads out of the image folder; name it relative to the folder", "path out of the folder"
        )
    return image


def _points(pixel_coords: Any, depth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(N, 2)` and metres `(N,)`."""
    pairs: list[Any] = pixel_coords if isinstance(pixel_coords, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"pixel_coords are {_brief(pixel_coords)} and must be a list of [x, y]")
    if not isinstance(depth, list):
        raise ValueError(f"depth is {_brief(depth)} and must be a list of metres")
    if len(pixel_coords) != len(depth):
        raise Unusable(
            f"{len(pixel_coords)} pixel_coords do not fit {len(depth)} depths; give one depth for each pixel",
            "lists of different length",
        )
    if not depth:
        return np.zeros((0, 2)), np.zeros(0)
    points = _numbers(list(chain.from_iterable(pairs)), "pixel_coords").reshape(-1, 2)
    return points, _numbers(depth, "depth").astype(np.float64)


def _numbers(values: Any, field: str) -> np.ndarray:
    """A list of numbers as written, NaN for null.

    Raises:
        ValueError: if it is no list, or some are something else, such as true and false.
    """
    if not isinstance(values, list):
        raise ValueError(f"{field} is {_brief(values)} and must be a list of numbers")
    kinds = set(map(type, values))
    if not kinds <= {int, float, type(None)}:
        raise ValueError(f"{field} holds something that is no number")
    found = np.asarray([math.nan if value is None else value for value in values] if type(None) in kinds else values)
    return found if found.dtype.kind in "iuf" else found.astype(np.float64)  # integers of any length


def _brief(value: Any) -> str:
    """The start of a value as JSON."""
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:40]}..."


def _distance(word: str | None, default: Distance | None) -> Distance:
    """What the metres of a line are measured along."""
    said = read_distance(word)
    if default is None or said == default:
        return said
    if said != "unspecified":
        raise Unusable(
            f"distance_type is '{word}' but the dataset was opened with distance '{default}'; leave the argument out",
            "another distance",
        )
    return default


def _camera(intrinsics: Any, distance: Distance, distortion: Any) -> tuple[Camera, Size | None, bool]:
    """Camera, image size where given, and whether a focal length was repaired."""
    numbers, coefficients = _numbers(intrinsics, "intrinsics").tolist(), _numbers(distortion, "distortion")
    if len(numbers) not in (4, 6) or len(coefficients) not in COEFFICIENTS or not np.isfinite(coefficients).all():
        raise Unusable(
            f"intrinsics {numbers} and distortion {distortion} are no camera; give [fx, fy, cx, cy, width, height], and "
            f"coefficients as OpenCV has them, {', '.join(map(str, COEFFICIENTS))} of them",
            "malformed intrinsics",
        )
    size = None
    if len(numbers) == 6:
        width, height = (float(number) for number in numbers[4:])
        if not (1 <= min(width, height) <= max(width, height) < 2**31 and width.is_integer() and height.is_integer()):
            raise Unusable(f"the image size is {width}x{height}; give whole numbers of pixels", "malformed intrinsics")
        size = (int(height), int(width))
    camera, is_repaired = make_camera(numbers[:4], distance, distortion)
    return camera, size, is_repaired


def _span(valid_range: Any, span: Span) -> Span:
    """The metres that count on a line."""
    if valid_range is None or valid_range == []:
        return span
    ends = _numbers(valid_range, "valid_range").tolist()
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(f"valid_range is {_brief(valid_range)} and must be nearest and farthest metres, near < far")
    near, far = ends
    return Span(max(span.near, near), min(span.far, far))

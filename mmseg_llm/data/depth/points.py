"""What readers of labelled depth share: cameras that may need mending, pixels drawn by seed, and their queries.

Legend: N labelled pixels, K of them drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.structures import DepthPoint, Query

if TYPE_CHECKING:
    from mmseg_llm.data.base import Faults
    from mmseg_llm.structures import Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
REPAIRED = "focal length repaired"
"""Reason under which `skipped` counts images whose one bad focal length was replaced by the other; they are offered."""
MIN_METRES = 0.005
"""Labels below it are written as 0.00 metres (specification D.4)."""


class Unusable(ValueError):
    """An image that gives no sample.

    Attributes:
        reason: what it is counted under.
    """

    def __init__(self, sentence: str, reason: str = "") -> None:
        super().__init__(sentence)
        self.reason = reason


class Span(NamedTuple):
    """Metres that count as labels, both ends included."""

    near: float
    far: float

    @classmethod
    def of(cls, near: float, far: float | None) -> Span:
        """From the arguments of a reader.

        Raises:
            ValueError: if no label can lie in it.
        """
        span = cls(near, math.inf if far is None else far)
        if not 0 <= span.near < span.far:
            raise ValueError(
                f"min_metres {near} and max_metres {far} hold no labels; give 0 <= min_metres < max_metres"
            )
        return span


def check_count(points_per_image: int | None, seed: int) -> None:
    """Refuse to draw nothing.

    Raises:
        ValueError: for fewer points than one, or a negative seed.
    """
    if points_per_image is not None and points_per_image < 1:
        raise ValueError(f"points_per_image is {points_per_image}; draw at least one")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return (
        bool(name)
        and "\0" not in name
        and not any(
            path.is_absolute() or path.anchor or ".." in path.parts
            for path in (PurePosixPath(name), PureWindowsPath(name))
        )
    )


def image_size(path: Path) -> Size:
    """`(H, W)` by the header of an image file, without decoding it.

    Raises:
        Unusable: if the file is missing or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return (image.height, image.width)
    except FileNotFoundError as error:
        raise Unusable(f"image {path} does not exist; check the image folder", "missing image") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable(f"image {path} cannot be opened ({error}); replace the file", "corrupt image") from error


def make_camera(
    intrinsics: Sequence[float], distance: Distance, distortion: Sequence[float] = ()
) -> tuple[Camera, bool]:
    """The camera of `(fx, fy, cx, cy)`, and whether one focal length had to be taken from the other.

    Raises:
        Unusable: if both focal lengths are unusable, or the principal point is no pair of numbers.
    """
    try:
        fx, fy, cx, cy = (float(value) for value in intrinsics)
    except (TypeError, ValueError) as error:
        raise Unusable(
            f"intrinsics {list(intrinsics)} are not fx, fy, cx, cy in numbers", "malformed intrinsics"
        ) from error
    is_good = [math.isfinite(focal) and focal > 0 for focal in (fx, fy)]
    if not any(is_good):
        raise Unusable(
            f"the focal lengths are {fx} and {fy}; give positive numbers of pixels", "zero or NaN focal length"
        )
    if not (math.isfinite(cx) and math.isfinite(cy)):
        raise Unusable(f"the principal point is ({cx}, {cy}); give finite numbers of pixels", "malformed intrinsics")
    fx, fy = (fx if is_good[0] else fy), (fy if is_good[1] else fx)
    return Camera(fx, fy, cx, cy, distance, tuple(float(value) for value in distortion)), not all(is_good)


def draw(count: int, wanted: int | None, seed: int, index: int) -> np.ndarray:
    """int64 `(K,)`: which of `count` points sample `index` offers, all when None are wanted; in random order otherwise.

    Depends on nothing but the arguments: not on workers, nor on what was read before.
    """
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.random.default_rng([seed, index]).choice(count, wanted, replace=False)


def depth_queries(points: Sequence[Sequence[Any]], metres: Sequence[float], ids: Iterable[Any]) -> tuple[Query, ...]:
    """One query per labelled pixel `(x, y)`."""
    return tuple(
        Query(text="", points=(DepthPoint(x, y, label),), id=str(name), task="depth")
        for (x, y), label, name in zip(points, metres, ids, strict=True)
    )


def count_many(faults: Faults, reason: str, number: int) -> None:
    """Count so many records of one reason."""
    for _ in range(number):
        faults.count(reason)

"""What readers of labelled depth share: cameras that may need mending, pixels drawn by seed, and their queries.

Legend: N labelled pixels, K of them drawn.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.structures import DepthPoint, Query

if TYPE_CHECKING:
    from mmseg_llm.data.base import Faults
    from mmseg_llm.structures import Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Of images; small or capital letters."""
BAD_FOCAL = "bad focal length"
"""Reason under which images are counted whose focal lengths are zero, no number, or implausible (`is_plausible_focal`)."""
REPAIRED = "focal length repaired"
"""Reason under which `skipped` counts images whose one bad focal length was replaced by the other; they are offered."""
MIN_METRES = 0.005
"""Labels below it are written as 0.00 metres (specification D.4)."""
MAX_METRES = 1000.0
"""Farther than depth cameras and laser scanners of these datasets measure: what is beyond is in another unit, or no label."""
WIDEST = 170.0
"""Degrees that a pinhole image can see over its longer side; more means a focal length that is not in pixels of this image."""
CHECKS = ("header", "decode")
"""How images are looked at while a dataset is opened: by their header, or all of their pixels."""
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow raises for files that are missing, cut off or no image; and its DecompressionBombError."""


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


def image_size(path: Path, decode: bool = False) -> Size:
    """`(H, W)` by the header of an image file, without decoding it.

    Raises:
        Unusable: if the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return (image.height, image.width)
    except FileNotFoundError as error:
        raise Unusable(f"image {path} does not exist; check the image folder", "missing image") from error
    except (*BROKEN_IMAGE, Image.DecompressionBombError) as error:
        raise Unusable(f"image {path} cannot be opened ({error}); replace the file", "corrupt image") from error


def check_mode(mode: str) -> None:
    """Raises: ValueError if images cannot be looked at in this way."""
    if mode not in CHECKS:
        raise ValueError(f"check_images is '{mode}'; use {' or '.join(CHECKS)}")


def is_plausible_focal(focal: float, size: Size) -> bool:
    """Whether a focal length in pixels is finite, positive, and so long that the longer side of an image `(H, W)` sees no more
    than `WIDEST` degrees; normalised ones, such as 0.9, are not.
    """
    return math.isfinite(focal) and focal > 0 and max(size) <= 2 * focal * math.tan(math.radians(WIDEST / 2))


def make_camera(
    intrinsics: Sequence[float], distance: Distance, distortion: Sequence[float] = (), size: Size | None = None
) -> tuple[Camera, bool]:
    """The camera of `(fx, fy, cx, cy)`, and whether one focal length had to be taken from the other.

    Args:
        intrinsics: in pixels.
        distance: what metres are measured along.
        distortion: OpenCV coefficients.
        size: `(H, W)` of the image, by which focal lengths must be plausible; None where nobody knows it yet.

    Raises:
        Unusable: if both focal lengths are unusable, or the principal point is no pair of numbers.
    """
    try:
        fx, fy, cx, cy = (float(value) for value in intrinsics)
    except (TypeError, ValueError) as error:
        raise Unusable(
            f"intrinsics {list(intrinsics)} are not fx, fy, cx, cy in numbers", "malformed intrinsics"
        ) from error
    is_good = [is_plausible_focal(focal, size or (0, 0)) for focal in (fx, fy)]
    if not any(is_good):
        seen = "" if size is None else f", with which an image of {size[1]}x{size[0]} sees more than {WIDEST:g} degrees"
        seen = seen if max(fx, fy) > 0 else ""
        raise Unusable(f"the focal lengths are {fx} and {fy}{seen}; give positive numbers of pixels", BAD_FOCAL)
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
    if number:
        faults.counts[reason] = faults.counts.get(reason, 0) + number

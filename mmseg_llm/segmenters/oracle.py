"""next_click: the simulated annotator, who clicks where the mask is most deeply wrong (SegAgent specification section 3.1).

Pixels at the end of the image count as lying at the border of an error, so that clicks keep away from it.

Source: SegAgent (CVPR 2025, arXiv 2503.08625), whose rule is that of the SimpleClick evaluation it carries.

Legend: H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from mmseg_llm.structures import Click

ClickRule = Literal["official", "clean"]

# Distances are square roots of integers but OpenCV's carry noise of the last place of float32. What comes within this share
# of the largest is compared as squared integers, which are exact to depths of about 1400 pixels.
NOISE = 1e-6


def next_click(
    target: np.ndarray,
    mask: np.ndarray,
    *,
    ignore: np.ndarray | None = None,
    clicked: Iterable[Click] = (),
    rule: ClickRule = "official",
) -> Click | None:
    """The pixel deepest inside of what is missing (positive) or too much (negative), by exact Euclidean distance.

    Among equally deep pixels the first in row-major order is taken, and between the two kinds of errors the negative
    click, on every machine: OpenCV's own order of equal distances is not reproducible.

    Args:
        target: bool `(H, W)`, what the mask should be.
        mask: bool `(H, W)`, what it is.
        ignore: bool `(H, W)`, pixels where nothing is wrong.
        clicked: earlier clicks, whose pixels are not clicked again; the errors around them are as deep as before.
        rule: `official` answers a negative click at (0, 0) where nothing is left to click, `clean` None; otherwise
            they agree.

    Raises:
        ValueError: for arrays of different or other than two dimensions, an earlier click outside of them, or another rule.
    """
    if rule not in get_args(ClickRule):
        raise ValueError(f"rule is '{rule}'; use one of {', '.join(get_args(ClickRule))}")
    target, mask = _as_mask("target", target), _as_mask("mask", mask, target)
    wrong = target ^ mask
    if ignore is not None:
        wrong &= ~_as_mask("ignore", ignore, target)
    used = [(click.row, click.col) for click in clicked]
    for row, col in used:
        if not (0 <= row < target.shape[0] and 0 <= col < target.shape[1]):
            raise ValueError(
                f"earlier click at row {row}, column {col} lies outside of the mask of size {target.shape} (H, W); "
                "clicks are pixels of the mask, row first"
            )
    missing, surplus = deepest(wrong & target, used), deepest(wrong & mask, used)
    if missing[0] > surplus[0]:
        return Click(missing[1], missing[2], is_positive=True)
    if surplus[0] == 0 and rule == "clean":
        return None
    return Click(surplus[1], surplus[2], is_positive=False)


def deepest(region: np.ndarray, clicked: Sequence[tuple[int, int]] = ()) -> tuple[int, int, int]:
    """Squared distance to the nearest pixel outside of a bool region `(H, W)`, and row and column of where it is largest.

    Pixels in `clicked` are not eligible. All zero where no pixel is.

    The transform runs on the box of the region only: everything in the ring around that box is outside of the region, and
    for any outside pixel beyond the ring, one in the ring is nearer; so distances are the same as on the whole image.
    """
    rows = np.flatnonzero(region.any(1))
    if not len(rows):
        return 0, 0, 0
    cols = np.flatnonzero(region[rows[0] : rows[-1] + 1].any(0))
    top, left = int(rows[0]), int(cols[0])
    distances = distance_inside(region[top : rows[-1] + 1, left : cols[-1] + 1])
    for row, col in clicked:
        if 0 <= row - top < distances.shape[0] and 0 <= col - left < distances.shape[1]:
            distances[row - top, col - left] = 0
    largest = float(distances.max())
    if largest == 0:
        return 0, 0, 0
    near = np.flatnonzero(distances >= largest * (1 - NOISE))  # row-major
    squares = np.rint(np.square(distances.ravel()[near], dtype=np.float64)).astype(np.int64)
    first = int(squares.argmax())
    row, col = divmod(int(near[first]), distances.shape[1])
    return int(squares[first]), top + row, left + col


def distance_inside(region: np.ndarray) -> np.ndarray:
    """Euclidean distance in pixels of each pixel of a bool region `(H, W)` to the nearest outside, beyond the edge included.

    Returns:
        float32 `(H, W)`, 0 outside of the region.
    """
    import cv2

    padded = np.pad(region.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def _as_mask(name: str, array: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """The array as bool, of the size of another."""
    array = np.asarray(array)
    if array.ndim != 2:
        raise ValueError(f"{name} must be a bool array (H, W), got shape {array.shape}")
    if array.dtype != bool:
        if array.size and not np.isin(array, (0, 1)).all():
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}; give a bool array, and what is labelled "
                "to be ignored as `ignore`"
            )
        array = array.astype(bool)
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name} of size {array.shape} (H, W) does not fit the target of size {like.shape}")
    return array

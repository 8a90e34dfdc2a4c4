"""What SimpleClick sees of a labelled photograph in training: one warp to a square, and first clicks on the object in it.

Views are those of the predictor, the whole image or a box around the object stretched to the square, and jittered.

Legend: H W pixels of the image, S side of the view, P points per sign, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mmseg_llm.segmenters.oracle import distance_inside

ColourChange = Literal["none", "official", "strong"]

# Distance of a positive point to the border of its object, as a share of S (three pixels of 448), and how often it is kept.
INNER_SHARE, INNER_CHANCE = 3 / 448, 0.9
# Where a negative point lies: close to the object, on another object, or anywhere outside.
NEGATIVE_CHANCES = (0.5, 0.4, 0.1)
# How far "close" is, in square roots of the object's area.
BORDER_SHARE = 0.1


@dataclass(frozen=True)
class Views:
    """How a view is drawn.

    Attributes:
        whole: share of views of the whole image; the others are boxes around the object.
        expand: least and largest side of a box in sides of the object.
        min_crop: smallest side of a box in pixels of the image.
        shift: largest displacement of a box in its sides.
        rotate: largest angle in degrees.
        flip: chance of a mirrored view.
        min_area: pixels of the view that the object covers at least, else a box is taken.
        colour: `official` changes brightness, contrast and channels a little; `strong` also hue, gamma, sharpness, noise.
    """

    whole: float = 0.4
    expand: tuple[float, float] = (1.1, 2.2)
    min_crop: int = 200
    shift: float = 0.15
    rotate: float = 0.0
    flip: float = 0.5
    min_area: int = 1000
    colour: ColourChange = "official"

    def __post_init__(self) -> None:
        for name in ("whole", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"views: {name} is {getattr(self, name)}; it is a share between 0 and 1")
        if not 1 <= self.expand[0] <= self.expand[1]:
            raise ValueError(f"views: expand is {self.expand}; give the least and the largest, both 1 or more")
        if self.min_crop < 1 or self.min_area < 1:
            raise ValueError(f"views: min_crop {self.min_crop} and min_area {self.min_area} must be 1 or more pixels")


@dataclass(frozen=True)
class PointSampling:
    """How many first points there are and where.

    Attributes:
        max_points: most points of either sign.
        gamma: each further point is this much less likely than the last.
        centre: how often the first point lies in the inner half of the object, as an annotator's would.
    """

    max_points: int = 24
    gamma: float = 0.8
    centre: float = 0.0

    def __post_init__(self) -> None:
        if self.max_points < 1 or not 0 < self.gamma <= 1 or not 0 <= self.centre <= 1:
            raise ValueError(f"{self}: give max_points of 1 or more, gamma above 0 up to 1, and centre between 0 and 1")

    def chances(self, start: int) -> np.ndarray:
        """Chance of `start`, `start + 1`, ... `max_points` points, float64, sums to 1."""
        weights = self.gamma ** np.arange(self.max_points - start + 1)
        return weights / weights.sum()


def draw_points(target: np.ndarray, others: np.ndarray, rng: np.random.Generator, how: PointSampling) -> np.ndarray:
    """First clicks: one or more on the object, any number outside of it (RITM's multi-point sampler).

    Args:
        target: bool `(S, S)`, not empty.
        others: bool `(S, S)`, other objects.
        rng: source of chance.
        how: numbers and places.

    Returns:
        float32 `(2, P, 3)` of (row, col, order), positive ones first, padded with -1; P is `how.max_points`.
    """
    points = np.full((2, how.max_points, 3), -1, np.float32)
    num_positive = 1 + int(rng.choice(how.max_points, p=how.chances(1)))
    num_negative = int(rng.choice(how.max_points + 1, p=how.chances(0)))
    depth = distance_inside(target)
    inner = np.flatnonzero(depth > INNER_SHARE * len(target))
    anywhere, deep = np.flatnonzero(target), np.flatnonzero(depth > depth.max() / 2)
    for index in range(num_positive):
        is_central = index == 0 and rng.random() < how.centre
        places = deep if is_central else inner if len(inner) and rng.random() < INNER_CHANCE else anywhere
        points[0, index] = (*divmod(int(rng.choice(places)), target.shape[1]), index)
    if num_negative and not target.all():
        regions = _outside(target, others)
        kinds = rng.choice(len(regions), num_negative, p=NEGATIVE_CHANCES)
        for index, kind in enumerate(kinds):
            places = regions[kind] if len(regions[kind]) else regions[-1]
            points[1, index] = (*divmod(int(rng.choice(places)), target.shape[1]), num_positive + index)
    return points


def _outside(target: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat indices outside of the object: close to it, on other objects, all."""
    import cv2

    reach = int(np.ceil(BORDER_SHARE * np.sqrt(target.sum())))
    grown = cv2.dilate(target.astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)) > 0
    return tuple(np.flatnonzero(region & ~target) for region in (grown, others, ~target))  # type: ignore[return-value]


def draw_map(target: np.ndarray, side: int, rng: np.random.Generator, views: Views) -> np.ndarray:
    """The affine map `(2, 3)` from pixels (x, y) of a view to those of the image, first and last pixels of the box matched.

    Args:
        target: bool or 0/1 `(H, W)`, not empty.
        side: S.
        rng: source of chance.
        views: how to draw.
    """
    height, width = target.shape
    area = np.count_nonzero(target) * side * side / (height * width)
    if rng.random() < views.whole and area >= views.min_area:
        bounds = [(0.0, width - 1.0), (0.0, height - 1.0)]
    else:
        bounds = [_draw_span(np.asarray(target.any(axis)), rng, views) for axis in (0, 1)]
    (left, right), (top, bottom) = bounds
    scale_x, scale_y = (right - left) / (side - 1), (bottom - top) / (side - 1)
    middle = (side - 1) / 2
    angle = np.deg2rad(rng.uniform(-views.rotate, views.rotate))
    mirror = -1.0 if rng.random() < views.flip else 1.0
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = np.diag([scale_x, scale_y]) @ linear @ np.diag([mirror, 1.0])
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    return np.column_stack((linear, centre - linear @ np.array([middle, middle])))


def _draw_span(covered: np.ndarray, rng: np.random.Generator, views: Views) -> tuple[float, float]:
    """First and last pixel of a box along one axis, within the image."""
    found = np.flatnonzero(covered)
    low, high = int(found[0]), int(found[-1])
    span = max((high - low + 1) * rng.uniform(*views.expand), views.min_crop)
    centre = (low + high) / 2 + rng.uniform(-views.shift, views.shift) * span
    low_bound, high_bound = max(0.0, centre - span / 2), min(len(covered) - 1.0, centre + span / 2)
    return (low_bound, high_bound) if high_bound - low_bound >= 1 else (0.0, len(covered) - 1.0)


def warp(
    image: np.ndarray, masks: Sequence[np.ndarray], matrix: np.ndarray, side: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same view of an image and of masks; what lies outside of the image is its mirror image.

    Args:
        image: uint8 `(H, W, 3)`.
        masks: uint8 0/1 `(H, W)` each.
        matrix: of `draw_map`.
        side: S.

    Returns:
        uint8 `(S, S, 3)` and bool `(S, S)` of each mask.
    """
    import cv2

    options: dict[str, Any] = {"borderMode": cv2.BORDER_REFLECT_101, "flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP}
    seen = cv2.warpAffine(image, matrix, (side, side), **options)
    # Interpolated at full contrast, so that edges lie where they do in the image.
    layers = [cv2.warpAffine(mask * np.uint8(255), matrix, (side, side), **options) > 127 for mask in masks]
    return seen, layers


def colour_changes(kind: ColourChange) -> Any:
    """A photometric augmentation of uint8 `(S, S, 3)`: call `set_random_seed`, then `(image=...)["image"]`; None for `none`."""
    if kind == "none":
        return None
    import albumentations as A

    light = A.RandomBrightnessContrast(brightness_limit=(-0.25, 0.25), contrast_limit=(-0.15, 0.4), p=0.75)
    if kind == "official":
        return A.Compose([light, A.RGBShift(10, 10, 10, p=0.75)])
    return A.Compose(
        [
            light,
            A.RGBShift(25, 25, 25, p=0.5),
            A.HueSaturationValue(30, 50, 20, p=0.5),
            A.RandomGamma((60, 160), p=0.3),
            A.ChannelShuffle(p=0.1),
            A.ToGray(p=0.1),
            A.OneOf([A.GaussianBlur((3, 5)), A.GaussNoise((0.02, 0.1)), A.Sharpen()], p=0.25),
        ]
    )

"""How the pixels, boxes and mask qualities of a click policy become numbers in text (SegAgent specification section 4.1).

A codec belongs to the weights that were trained with it: it is saved with them (`to_metadata`).

Legend: H W pixels of the original image, E the extent along one axis (H for rows, W for columns).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mmseg_llm.masks import Box, Size

AxisOrder = Literal["row_col", "xy"]
Rounding = Literal["round", "truncate"]


@dataclass(frozen=True)
class ClickCodec:
    """Coordinates as numbers from 0 to `scale`, which is the extent of the image.

    Attributes:
        axis_order: which number comes first; `row_col` in the released SegAgent weights, whatever their paper says.
        scale: the number that stands for the whole extent E.
        decimals: digits behind the point; numbers are integers when 0.
        rounding: how a number becomes a pixel: the nearest one (halves to even), or cut off.
        is_closed: whether `scale` itself can be written (edges of boxes), or only what is below.
        iou_scale: the number that stands for an IoU of 1.
    """

    axis_order: AxisOrder = "row_col"
    scale: int = 1000
    decimals: int = 0
    rounding: Rounding = "round"
    is_closed: bool = False
    iou_scale: int = 100

    def __post_init__(self) -> None:
        """Raises: ValueError for a value that is unknown or out of range."""
        for name, value, choices in (
            ("axis_order", self.axis_order, AxisOrder),
            ("rounding", self.rounding, Rounding),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} is '{value}'; choose from {', '.join(get_args(choices))}")
        for name, number in (("scale", self.scale), ("iou_scale", self.iou_scale)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        if not 0 <= self.decimals <= 9:
            raise ValueError(f"decimals is {self.decimals}; choose 0 (integers) to 9")
        if self.scale * 10**self.decimals < 2:
            raise ValueError(
                "integers of scale 1 cannot tell pixels apart; set `decimals`, such as 3, or a larger scale"
            )

    @property
    def largest(self) -> float:
        """The largest number that is written: 999 of 1000, 0.999 of 1."""
        steps = 10**self.decimals
        return (self.scale * steps - (not self.is_closed)) / steps

    def encode(self, row: float, col: float, size: Size) -> tuple[float, float]:
        """The numbers of a pixel, in the order they are written; `decode` returns the pixel wherever E <= steps.

        Args:
            row: from the top.
            col: from the left.
            size: `(H, W)`.

        Raises:
            ValueError: if the pixel lies outside of the image.
        """
        if not (0 <= row < size[0] and 0 <= col < size[1]):
            raise ValueError(f"row {row}, column {col} lies outside of an image of size {size} (H, W)")
        return self._ordered(self._number(row, size[0]), self._number(col, size[1]))

    def decode(self, numbers: tuple[float, float], size: Size, clamp: bool = True) -> tuple[int, int]:
        """The pixel (row, col) of two numbers.

        Args:
            numbers: in the order they are written.
            size: `(H, W)`.
            clamp: keep the pixel in the image; without, 999 can mean the row H, as in the released code.
        """
        row, col = self._ordered(*numbers)
        if not clamp:
            return self._pixel(row, size[0]), self._pixel(col, size[1])
        row, col = (min(max(value, 0.0), float(self.scale)) for value in (row, col))  # an infinity is no pixel
        return min(self._pixel(row, size[0]), size[0] - 1), min(self._pixel(col, size[1]), size[1] - 1)

    def encode_box(self, box: Box, size: Size) -> tuple[float, float, float, float]:
        """The numbers of the two corners of a box `(x1, y1, x2, y2)` in pixels, cut to the image.

        Raises:
            ValueError: if the box is empty, or lies outside of the image.
        """
        x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], size[1]), min(box[3], size[0])
        if not (x1 < x2 and y1 < y2):
            raise ValueError(f"box {box} (x1, y1, x2, y2) has no pixel of an image of size {size} (H, W)")
        corners = ((self._number(y, size[0]), self._number(x, size[1])) for x, y in ((x1, y1), (x2, y2)))
        first, second = (self._ordered(*corner) for corner in corners)
        return (*first, *second)

    def decode_box(self, numbers: tuple[float, float, float, float], size: Size) -> Box:
        """The box `(x1, y1, x2, y2)` in pixels of two corners, cut to the image; empty where they are swapped."""
        edges = [min(max(value, 0.0), float(self.scale)) for value in numbers]
        (y1, x1), (y2, x2) = self._ordered(edges[0], edges[1]), self._ordered(edges[2], edges[3])
        left, top = float(self._pixel(x1, size[1])), float(self._pixel(y1, size[0]))
        return left, top, float(self._pixel(x2, size[1])), float(self._pixel(y2, size[0]))

    def overshoot(self, numbers: tuple[float, ...]) -> float:
        """How far numbers lie beyond what is written, as a fraction of `scale`; 0 inside."""
        return max(0.0, *(max(-value, value - self.largest) for value in numbers)) / self.scale

    def write(self, number: float) -> str:
        """A coordinate as text."""
        return f"{number:.{self.decimals}f}"

    def write_iou(self, iou: float) -> str:
        """An IoU (0 to 1) as text: an integer percentage, or two decimals of a smaller scale.

        Raises:
            ValueError: if it is no IoU.
        """
        if not 0.0 <= iou <= 1.0:
            raise ValueError(f"iou is {iou}; it must lie in [0, 1], whatever scale it is written in")
        return f"{iou * self.iou_scale:.{0 if self.iou_scale >= 100 else 2}f}"

    def to_metadata(self) -> dict[str, Any]:
        """A plain dict for a checkpoint, from which `from_metadata` restores the codec."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> ClickCodec:
        """Inverse of `to_metadata`.

        Raises:
            ValueError: for a missing or unknown field: a guessed axis order would swap all coordinates silently.
        """
        known = {item.name for item in fields(cls)}
        if set(metadata) != known:
            raise ValueError(
                f"codec metadata has the fields {sorted(metadata)} but needs {sorted(known)}; "
                "write it with ClickCodec.to_metadata"
            )
        return cls(**metadata)

    def _ordered(self, first: float, second: float) -> tuple[float, float]:
        """(row, col) as written, and back."""
        return (first, second) if self.axis_order == "row_col" else (second, first)

    def _pixel(self, number: float, extent: int) -> int:
        """In this order of operations float64 rounds as the released code does."""
        pixel = number / self.scale * extent
        return round(pixel) if self.rounding == "round" else int(pixel)

    def _number(self, pixel: float, extent: int) -> float:
        """The number of a pixel or edge that decodes to it."""
        steps = 10**self.decimals
        position = self.scale * steps * pixel / extent
        if self.rounding == "round":
            return min(self.largest, round(position) / steps)
        step = math.ceil(position)
        if self._pixel(step / steps, extent) < math.floor(pixel):  # what is cut off was lost by float64 alone
            step += 1
        return min(self.largest, step / steps)


QWEN_MILLI = ClickCodec()
"""Points of the released SegAgent weights: thousandths, row first."""
UNIT_DECIMAL = ClickCodec(scale=1, decimals=3)
"""Points as fractions of the image, row first (the LLaVA variant of the paper)."""
QWEN_BOX = ClickCodec(axis_order="xy", scale=999, rounding="truncate", is_closed=True)
"""Boxes of Qwen-VL: 0 to 999, x first."""

CODECS = {"qwen_milli": QWEN_MILLI, "unit_decimal": UNIT_DECIMAL, "qwen_box": QWEN_BOX}

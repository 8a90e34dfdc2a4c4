"""How a question says which pixel it means: an arrow on the picture, or coordinates in words (specification sections A, C.4).

Legend: P points of a question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmseg_llm.heads.depth_text.marker import SIZE, draw_markers, fits, snap
from mmseg_llm.heads.depth_text.prompts import ARROWS, DepthPrompts

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.heads.depth_text.views import View

OnBorder = Literal["snap", "skip", "error"]


@dataclass(frozen=True)
class Referred:
    """Points of a question, ready to be asked about.

    Attributes:
        words: of each point.
        image: the picture with arrows; None where it stays as it is.
        moved: `(x, y)` of the original that arrows point at instead, where one had to be moved; the others as they were.
        reason: why the question cannot be asked; empty where it can.
    """

    words: tuple[str, ...] = ()
    image: Image.Image | None = None
    moved: np.ndarray | None = None
    reason: str = ""


@dataclass(frozen=True)
class MarkerReference:
    """An arrow per point: red, then blue.

    Attributes:
        size: of an arrow in pixels of the unified picture.
        on_border: points so near to the border that no arrow can be drawn are moved to the nearest pixel where one can, are not
            asked about, or are an error.
    """

    size: int = SIZE
    on_border: OnBorder = "snap"

    cells = None

    def can(self, view: View, pixels: np.ndarray) -> np.ndarray:
        """Whether pixels `(..., 2)` of a picture can be referred to as they are."""
        return fits(view.inner, pixels, self.size)

    def refer(self, view: View, points: np.ndarray, prompts: DepthPrompts) -> Referred:
        """Draw arrows at original points `(P, 2)` that lie in the image.

        Raises:
            ValueError: for a point at the border if that is an error.
        """
        pixels = view.locate(points)
        moved = None
        if not (drawable := self.can(view, pixels)).all():
            if self.on_border == "error":
                raise ValueError(
                    f"no arrow of {self.size} pixels can be drawn at {pixels.tolist()} in a picture of {view.inner} (H, W); "
                    "ask about points farther from the border, or set on_border to snap"
                )
            if self.on_border == "skip" or min(view.inner) <= 2 * self.size:
                return Referred(reason="undrawable")
            snapped = snap(view.inner, pixels, self.size)
            if len(np.unique(snapped, axis=0)) < len(np.unique(pixels, axis=0)):
                return Referred(reason="undrawable")  # two points would become one
            moved = np.where(drawable[:, None], points, view.back(snapped))
            pixels = snapped
        image = draw_markers(view.picture.image, pixels, self.size)
        names = ARROWS if prompts.wording == "full" else ("the red arrow", "the blue arrow")
        return Referred(names[: len(pixels)], image, moved)


@dataclass(frozen=True)
class TextReference:
    """Normalised coordinates in words, which leave the picture alone, so that all questions about it share it.

    Attributes:
        cells: steps per axis.
    """

    cells: int = 2000

    def __post_init__(self) -> None:
        """Raises: ValueError without cells."""
        if self.cells < 1:
            raise ValueError(f"cells is {self.cells}; coordinates need at least one step per axis")

    def can(self, view: View, pixels: np.ndarray) -> np.ndarray:
        """Whether pixels `(..., 2)` of a picture can be referred to: all can."""
        return np.ones(pixels.shape[:-1], bool)

    def refer(self, view: View, points: np.ndarray, prompts: DepthPrompts) -> Referred:
        """Write original points `(P, 2)` that lie in the image."""
        height, width = view.picture.size
        found = view.locate(points) if view.geometry == "legacy" else view.place(points) + 0.5
        cells = np.floor(np.array(found, np.float64) / (width, height) * self.cells).astype(int).clip(0, self.cells - 1)
        name = "the point at coordinates ({}, {})" if prompts.wording == "full" else "({}, {})"
        return Referred(tuple(name.format(*cell) for cell in cells.tolist()))

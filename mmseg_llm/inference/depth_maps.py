"""Depth maps: metres on a grid of points, or of every pixel; what they are measured along, and where there is no answer.

Legend: H W pixels of the image, R C rows and columns of the map, N = R C.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.geometry import load_image
from mmseg_llm.inference.depth_queries import (
    View,
    ask_points,
    distance_of,
    failures_of,
    places_of,
    values_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.cameras import Camera, Distance
    from mmseg_llm.masks import Size
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.structures import Prediction

GRID: Size = (48, 64)
"""Rows and columns of points that are asked by default."""
FARTHEST_MM = 65_535
"""What a 16-bit PNG of millimetres can hold."""


@dataclass(frozen=True, eq=False)
class DepthMap:
    """Metres on a regular grid over an image.

    Attributes:
        metres: float32 `(R, C)`, nan where there is no answer.
        points: `(R, C, 2)` original pixels (x, y) that the metres are of.
        size: `(H, W)` of the image.
        camera: intrinsics; `camera.origin` says whether they are an assumption.
        distance: what the metres are measured along.
        failures: number of points without an answer, by reason.
        image: what the map is of.
        answers: predictions of the N points, row by row; empty for a resized map.
    """

    metres: np.ndarray
    points: np.ndarray
    size: Size
    camera: Camera
    distance: Distance
    failures: dict[str, int] = field(default_factory=dict)
    image: Image.Image | None = field(default=None, repr=False)
    answers: tuple[Prediction, ...] = field(default=(), repr=False)

    @property
    def is_valid(self) -> np.ndarray:
        """Bool `(R, C)`: where there is an answer."""
        return np.isfinite(self.metres)

    def as_planar(self) -> DepthMap:
        """The same map in metres along the optical axis.

        Raises:
            ValueError: if nobody says what its metres are measured along.
        """
        return self._measured("planar")

    def as_ray(self) -> DepthMap:
        """The same map in metres along the ray; raises as `as_planar`."""
        return self._measured("ray")

    def _measured(self, wanted: Distance) -> DepthMap:
        if self.distance == "unspecified":
            raise ValueError(
                f"metres of unspecified kind cannot become {wanted}; make the map with distance=planar or ray"
            )
        metres = self.camera.convert(self.metres, self.points, self.distance, wanted)
        return replace(self, metres=metres.astype(np.float32), distance=wanted)

    def resized(self, image: str | Path | Image.Image | None = None) -> DepthMap:
        """The map of every pixel, guided by the image: edges stay edges, planes stay planes.

        Pixels farther than one cell from any answer have none either (`is_valid`).

        Args:
            image: as the map is of; its own when None.

        Raises:
            ValueError: without an image, or for one of another size.
        """
        from mmseg_llm.inference.densify import densify

        guide = np.asarray(self._image(image))
        known = (
            self if self.distance == "unspecified" else self.as_planar()
        )  # planes are affine in inverse planar depth
        x, y = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in self.size[::-1]))
        points = np.stack((x, y), axis=-1)  # (H, W, 2)
        metres = densify(known.metres, known.points, guide)
        dense = replace(known, metres=metres, points=points, answers=())
        return dense.as_ray() if self.distance == "ray" else dense

    def picture(self) -> Image.Image:
        """The colours of the metres at the size of the image, above a legend in metres; no answer is grey."""
        from mmseg_llm.inference.depth_pictures import draw_depth

        return draw_depth(self)

    def overlay(self, image: str | Path | Image.Image | None = None, alpha: float = 0.6) -> Image.Image:
        """The colours over the image, above a legend in metres; where there is no answer the image shows.

        Raises:
            ValueError: without an image, for one of another size, or an opacity outside [0, 1].
        """
        from mmseg_llm.inference.depth_pictures import draw_depth

        return draw_depth(self, self._image(image), alpha)

    def save(self, path: str | Path) -> Path:
        """Write by suffix: `.png` millimetres in 16 bits (0: no answer), `.npz` everything but the image, `.jpg` the picture.

        Raises:
            ValueError: for another suffix, or metres that 16 bits of millimetres cannot hold.
        """
        from PIL import Image

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            millimetres, num_beyond = to_millimetres(self.metres)
            if num_beyond:
                raise ValueError(
                    f"{num_beyond} of {self.metres.size} values are beyond {FARTHEST_MM / 1000} m, which 16 bits of "
                    "millimetres cannot hold; save as .npz"
                )
            Image.fromarray(millimetres).save(path)
        elif path.suffix == ".npz":
            about = {"camera": self.camera.to_json(), "distance": self.distance, "failures": self.failures}
            np.savez_compressed(
                path,
                metres=self.metres,
                points=self.points,
                size=np.array(self.size),
                about=np.array(json.dumps(about)),
            )
        elif path.suffix in {".jpg", ".jpeg"}:
            self.picture().save(path, quality=92, subsampling=0)
        else:
            raise ValueError(
                f"cannot save a depth map as '{path.suffix}'; use .png (millimetres), .npz or .jpg (picture)"
            )
        return path

    def _image(self, image: str | Path | Image.Image | None) -> Image.Image:
        chosen = self.image if image is None else image
        if chosen is None:
            raise ValueError("this map carries no image; give the one it was made of")
        loaded = load_image(chosen)
        if (loaded.height, loaded.width) != tuple(self.size):
            raise ValueError(
                f"the image is {loaded.height}x{loaded.width} (HxW) but the map is of one of {self.size[0]}x{self.size[1]}; "
                "give the image that the map was made of"
            )
        return loaded


def to_millimetres(metres: np.ndarray) -> tuple[np.ndarray, int]:
    """Millimetres uint16 of the same shape, 0 where there is no value or one beyond 65.535 m, and how many are beyond."""
    rounded = np.rint(np.nan_to_num(np.asarray(metres, np.float64)) * 1000)
    is_beyond = rounded > FARTHEST_MM
    return np.where(is_beyond, 0, rounded).astype(np.uint16), int(is_beyond.sum())


def grid_points(size: Size, grid: Size) -> np.ndarray:
    """Centres of the cells of a grid `(R, C)` over an image `(H, W)`, float64 `(R, C, 2)` as (x, y); at most one per pixel.

    Raises:
        ValueError: for a grid without cells.
    """
    if min(grid) < 1:
        raise ValueError(
            f"a grid of {grid[0]}x{grid[1]} has no cells; give at least one row and one column, such as 48x64"
        )
    counts = [min(cells, pixels) for cells, pixels in zip(grid, size, strict=True)]
    rows, columns = ((np.arange(n) + 0.5) * pixels / n - 0.5 for n, pixels in zip(counts, size, strict=True))
    return np.stack(np.meshgrid(columns, rows), axis=-1)


def ask_depth_map(
    model: PerceptionModel,
    view: View,
    grid: Size = GRID,
    *,
    head: str | None = None,
    protocol: str | None = None,
    distance: Distance | None = None,
) -> DepthMap:
    """Ask for the depth of every cell of a grid, all in one batched call; see `Perceiver.depth_map`."""
    cells = grid_points(view.size, grid)  # (R, C, 2)
    answers = ask_points(model, view, cells.reshape(-1, 2), head, protocol)
    return DepthMap(
        metres=values_of(answers).reshape(cells.shape[:2]).astype(np.float32),
        points=places_of(answers).reshape(cells.shape),
        size=view.size,
        camera=view.camera,
        distance=distance_of(answers, distance),
        failures=failures_of(answers),
        image=view.image,
        answers=tuple(answers),
    )

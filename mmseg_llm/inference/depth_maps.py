"""Depth maps: metres on a grid of points, or of every pixel; what they are measured along, and where there is no answer.

Legend: H W pixels of the image, R C rows and columns of the map, N = R C.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.geometry import load_image
from mmseg_llm.inference.depth_queries import (
    Asking,
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
MAX_PIXELS = 1_000_000
"""Of an interpolated map unless more are asked for: a photograph of 12 megapixels takes most of a minute and 180 MB of PLY."""


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
        answers: predictions of the N points, row by row; empty for an interpolated map.
        grid: the map of answers that this one is interpolated from; None for that one itself.
    """

    metres: np.ndarray
    points: np.ndarray
    size: Size
    camera: Camera
    distance: Distance
    failures: dict[str, int] = field(default_factory=dict)
    image: Image.Image | None = field(default=None, repr=False)
    answers: tuple[Prediction, ...] = field(default=(), repr=False)
    grid: DepthMap | None = field(default=None, repr=False)

    @property
    def is_valid(self) -> np.ndarray:
        """Bool `(R, C)`: where there is an answer."""
        return np.isfinite(self.metres)

    @property
    def source(self) -> str:
        """What an interpolated map is made of, such as `interpolated from 768 answers (24x32)`; empty for answers themselves."""
        if self.grid is None:
            return ""
        rows, columns = self.grid.metres.shape
        return f"interpolated from {int(self.grid.is_valid.sum())} answers ({rows}x{columns})"

    @property
    def pixel_camera(self) -> Camera:
        """Intrinsics in pixels of the map, which may have less of them than the image."""
        rows, columns = self.metres.shape
        return self.camera.scaled((columns / self.size[1], rows / self.size[0]))

    def as_planar(self) -> DepthMap:
        """The same map in metres along the optical axis; where the camera sees no ray there is no answer (`bad_camera`).

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
        metres = self.camera.convert(self.metres, self.points, self.distance, wanted).astype(np.float32)
        grid = None if self.grid is None else self.grid._measured(wanted)
        num_lost = int((self.is_valid & ~np.isfinite(metres)).sum())
        failures = self.failures if grid is None else grid.failures  # which count questions, not pixels
        if num_lost and grid is None:
            failures = failures | {"bad_camera": failures.get("bad_camera", 0) + num_lost}
        return replace(self, metres=metres, distance=wanted, failures=failures, grid=grid)

    def resized(self, image: str | Path | Image.Image | None = None, max_pixels: int = MAX_PIXELS) -> DepthMap:
        """The map of every pixel, guided by the image: edges stay edges, planes stay planes.

        Its metres are interpolated (`source`). Pixels farther than one cell from any answer have none either (`is_valid`).

        Args:
            image: as the map is of; its own when None.
            max_pixels: of the map; one of a larger image has fewer pixels than the image, as equal cells of it.

        Raises:
            ValueError: without an image, for one of another size, or fewer than one pixel.
        """
        from PIL import Image

        from mmseg_llm.inference.densify import densify

        guide = self._image(image)
        height, width = within(self.size, max_pixels)
        if (height, width) != tuple(self.size):
            guide = guide.resize((width, height), Image.Resampling.BOX)
        known = (
            self if self.distance == "unspecified" else self.as_planar()
        )  # planes are affine in inverse planar depth
        scale = (width / self.size[1], height / self.size[0])
        metres = densify(known.metres, (known.points + 0.5) * scale - 0.5, np.asarray(guide))
        points = grid_points(self.size, (height, width)).astype(np.float32)
        dense = replace(known, metres=metres, points=points, answers=(), grid=known)
        return dense.as_ray() if self.distance == "ray" else dense

    def picture(self) -> Image.Image:
        """The colours of the metres at the size of the image (see `MAX_PIXELS`) above a legend in metres; no answer is grey."""
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

        The PNG tells in text chunks what the metres are measured along and the intrinsics in its own pixels. The npz holds
        `metres` and `points`, and of an interpolated map also `grid_metres` and `grid_points`, the answers it is made of.

        Raises:
            ValueError: for another suffix, or metres that 16 bits of millimetres cannot hold.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            if num_beyond := to_millimetres(self.metres)[1]:
                raise ValueError(
                    f"{num_beyond} of {self.metres.size} values are beyond {FARTHEST_MM / 1000} m, which 16 bits of "
                    "millimetres cannot hold; save as .npz"
                )
            write_millimetres(self, path)
        elif path.suffix == ".npz":
            arrays: dict[str, Any] = {"metres": self.metres, "points": self.points, "size": np.array(self.size)}
            if self.grid is not None:
                arrays |= {"grid_metres": self.grid.metres, "grid_points": self.grid.points}
            np.savez_compressed(path, about=np.array(json.dumps(self.about())), **arrays)
        elif path.suffix in {".jpg", ".jpeg"}:
            self.picture().save(path, quality=92, subsampling=0)
        else:
            raise ValueError(
                f"cannot save a depth map as '{path.suffix}'; use .png (millimetres), .npz or .jpg (picture)"
            )
        return path

    def about(self) -> dict[str, Any]:
        """Everything but the numbers of the points, as a plain dict for JSON."""
        return {
            "camera": self.camera.to_json(),
            "distance": self.distance,
            "failures": self.failures,
            **({"source": self.source} if self.source else {}),
        }

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


def write_millimetres(depth: DepthMap, path: Path) -> int:
    """Write a map as a PNG of millimetres in 16 bits with what they are in its text chunks; how many are beyond and became 0."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    millimetres, num_beyond = to_millimetres(depth.metres)
    text = PngInfo()
    text.add_text("unit", "millimetres, 0 where there is none")
    text.add_text("distance", depth.distance)
    text.add_text("camera", json.dumps(depth.pixel_camera.to_json()))
    if depth.source:
        text.add_text("source", depth.source)
    Image.fromarray(millimetres).save(path, pnginfo=text)
    return num_beyond


def within(size: Size, max_pixels: int) -> Size:
    """The size `(H, W)` itself, or a smaller one of about the same shape with at most so many pixels.

    Raises:
        ValueError: for fewer than one pixel.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; a map has at least one pixel, and {MAX_PIXELS} by default")
    height, width = size
    factor = min(1.0, math.sqrt(max_pixels / (height * width)))
    rows = max(1, min(int(height * factor), max_pixels))
    return rows, max(1, min(int(width * factor), max_pixels // rows))


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
    grid: Size,
    asking: Asking,
) -> DepthMap:
    """Ask for the depth of every cell of a grid, all in one batched call; see `Perceiver.depth_map`."""
    cells = grid_points(view.size, grid)  # (R, C, 2)
    answers = ask_points(model, view, cells.reshape(-1, 2), asking)
    return DepthMap(
        metres=values_of(answers).reshape(cells.shape[:2]).astype(np.float32),
        points=places_of(answers).reshape(cells.shape),
        size=view.size,
        camera=view.camera,
        distance=distance_of(answers, asking.distance),
        failures=failures_of(answers),
        image=view.image,
        answers=tuple(answers),
    )

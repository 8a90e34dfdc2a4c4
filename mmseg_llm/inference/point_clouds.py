"""Clouds of coloured points in space, from depth maps (DepthLM specification, section G.5).

Legend: N points, H W pixels, R C rows and columns of a map.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmseg_llm.cameras import Camera, Distance
    from mmseg_llm.inference.depth_maps import DepthMap
    from mmseg_llm.masks import Size

VERTEX = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
)  # without padding, as PLY has none
_PLY_TYPES = {"<f4": "float", "|u1": "uchar"}


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Points in space, in the axes of the camera: X right, Y down, Z forward, metres.

    Attributes:
        points: float32 `(N, 3)`.
        colours: uint8 `(N, 3)`.
        camera: intrinsics; `camera.origin` says whether they are an assumption.
        distance: what the metres behind the points were measured along.
        size: `(H, W)` of the image.
        spacing: pixels between neighbouring points.
        failures: number of questions without an answer, by reason; they have no point here.
        name: of the image.
        cells: int32 `(N, 2)`, row and column of each point in the map.
        source: what the points are interpolated from, in words; empty where each is an answer.
        num_unplaced: metres without a place, as the camera sees no ray there; they have no point here.
    """

    points: np.ndarray
    colours: np.ndarray
    camera: Camera
    distance: Distance
    size: Size
    spacing: float = 1.0
    failures: dict[str, int] = field(default_factory=dict)
    name: str = ""
    cells: np.ndarray | None = field(default=None, repr=False)
    source: str = ""
    num_unplaced: int = 0

    @classmethod
    def of(cls, depth: DepthMap, name: str = "") -> PointCloud:
        """The points of a map with an image; where it has no answer, or the camera no ray, there is no point.

        Raises:
            ValueError: if the map has no image, or nobody says what its metres are measured along.
        """
        if depth.image is None:
            raise ValueError(
                "this map carries no image to take colours from; set it with dataclasses.replace(map, image=...)"
            )
        if depth.distance == "unspecified":
            raise ValueError(
                "metres of unspecified kind have no place in space; say what the head's answers are with distance=planar or ray"
            )
        cells = np.argwhere(depth.is_valid)
        places = depth.camera.place(depth.points[depth.is_valid], depth.metres[depth.is_valid], depth.distance)
        is_placed = np.isfinite(places).all(axis=-1)
        cells, places = cells[is_placed], places[is_placed]  # (N, 2), (N, 3)
        pixels = depth.points[cells[:, 0], cells[:, 1]]
        x, y = (np.rint(pixels[:, axis]).astype(np.int64).clip(0, depth.size[1 - axis] - 1) for axis in (0, 1))
        return cls(
            points=places.astype(np.float32),
            colours=np.asarray(depth.image.convert("RGB"))[y, x],
            camera=depth.camera,
            distance=depth.distance,
            size=depth.size,
            spacing=float(np.sqrt(depth.size[0] * depth.size[1] / depth.metres.size)),
            failures=depth.failures,
            name=name,
            cells=cells.astype(np.int32),
            source=depth.source,
            num_unplaced=int((~is_placed).sum()),
        )

    def __len__(self) -> int:
        return len(self.points)

    def save(self, path: str | Path) -> Path:
        """Write by suffix: `.ply` (binary, with colours), `.npz` everything, `.html` a page to look around in.

        Raises:
            ValueError: for another suffix, or a page without points.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ply":
            path.write_bytes(self.to_ply())
        elif path.suffix == ".npz":
            about = np.array(json.dumps(self.about()))
            np.savez_compressed(path, points=self.points, colours=self.colours, about=about)
        elif path.suffix == ".html":
            from mmseg_llm.inference.cloud_view import page

            path.write_text(page(self), encoding="utf-8")
        else:
            raise ValueError(f"cannot save a point cloud as '{path.suffix}'; use .ply, .npz or .html")
        return path

    def about(self) -> dict[str, object]:
        """Everything but the points, as a plain dict for JSON."""
        return {
            "name": self.name,
            "camera": self.camera.to_json(),
            "distance": self.distance,
            "size": list(self.size),
            "spacing": self.spacing,
            "failures": self.failures,
            "num_unplaced": self.num_unplaced,
            **({"source": self.source} if self.source else {}),
        }

    def to_ply(self) -> bytes:
        """A PLY file, binary little endian, that common tools read."""
        vertices = np.empty(len(self), VERTEX)
        for axis, name in enumerate(VERTEX.names or ()):
            vertices[name] = self.points[:, axis] if axis < 3 else self.colours[:, axis - 3]
        camera = " ".join(f"{key} {value}" for key, value in self.camera.to_json().items())
        lines = [
            "ply",
            "format binary_little_endian 1.0",
            "comment metres; X right, Y down, Z forward",
            *([f"comment {self.source}"] if self.source else []),
            f"comment camera {camera}",
            f"element vertex {len(self)}",
            *(f"property {_PLY_TYPES[VERTEX[name].str]} {name}" for name in VERTEX.names or ()),
            "end_header",
        ]
        return ("\n".join(lines) + "\n").encode("ascii") + vertices.tobytes()

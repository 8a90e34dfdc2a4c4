"""What tests of curators share: a slanted plane of known depth, pictures, and reading what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation import curate
from mmseg_llm.data.depth.jsonl import DepthJsonlDataset

MIXTURE = Path(__file__).parents[4] / "configs" / "data" / "depth_mixture.yaml"


class Plane(NamedTuple):
    """Points with `normal . P = offset` in the axes of a camera."""

    normal: tuple[float, float, float]
    offset: float

    def along_axis(self, rays: np.ndarray) -> np.ndarray:
        return self.offset / (rays @ np.array(self.normal))


PLANE = Plane((0.3, -0.2, 1.0), 4.0)


def grid(width: int, height: int) -> np.ndarray:
    """All pixels `(H, W, 2)`."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)


def pinhole_rays(pixels: np.ndarray, fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    x, y = (pixels[..., 0] - cx) / fx, (pixels[..., 1] - cy) / fy
    return np.stack((x, y, np.ones_like(x)), axis=-1)


def moved(motion: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points `(N, 3)` after a motion `(4, 4)`."""
    return (np.concatenate((points, np.ones((len(points), 1))), -1) @ motion.T)[:, :3]


def picture(path: Path, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(path)


def png16(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


def png8(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def as_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def labels(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(N, 2)` and metres `(N,)`."""
    return np.array(record["pixel_coords"]), np.array(record["depth"])


def camera_of(record: dict) -> Camera:
    fx, fy, cx, cy = record["intrinsics"][:4]
    return Camera(fx, fy, cx, cy)


def expected(record: dict, plane: Plane = PLANE) -> np.ndarray:
    """What a pinhole record ought to say about a plane, by its own camera and distance type."""
    pixels, _ = labels(record)
    rays = pinhole_rays(pixels, *record["intrinsics"][:4])
    depth = plane.along_axis(rays)
    return depth if record["distance_type"] == "z" else depth * np.sqrt((rays**2).sum(-1))


def sun_rooms(root: Path, count: int = 8) -> None:
    """SUN RGB-D frames of four rooms, 2 m away everywhere."""
    for number in range(count):
        folder = root / "xtion" / "sun3ddata" / f"room{number % 4}" / f"frame{number}"
        picture(folder / "image" / "0.jpg")
        (folder / "intrinsics.txt").write_text("60 0 30 0 62 22 0 0 1")
        (folder / "depth_bfx").mkdir()
        Image.fromarray(np.full((48, 64), 2000 << 3, np.uint16)).save(folder / "depth_bfx" / "0.png")


def open_as_configured(root: Path, name: str, split: str) -> DepthJsonlDataset:
    """Curate `root/data/raw/<name>` as the head of `depth_mixture.yaml` says, and open it as its part for the dataset does."""
    annotations = f"data/depth/{name}_{split}.jsonl"
    curate(name, root / "data" / "raw" / name, root / annotations, split)

    def parts(content: object) -> list[dict]:
        inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        own = [content] if isinstance(content, dict) and content.get("annotations") == annotations else []
        return own + [part for value in inner for part in parts(value)]

    (part,) = parts(yaml.safe_load(MIXTURE.read_text()))
    return DepthJsonlDataset(**part | {key: root / part[key] for key in ("annotations", "images")})

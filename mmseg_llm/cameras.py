"""Pinhole cameras: rays, metres along the axis and along the ray, points in space, and what to assume where nothing is known.

Pixel coordinates count pixel centres: the upper left pixel is (0, 0). Axes of space: X right, Y down, Z forward, metres.

Legend: N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.masks import Size

Distance = Literal["planar", "ray", "unspecified"]
"""What metres are measured along: the optical axis (z), the ray to the point (Euclidean), or nobody says."""
Origin = Literal["given", "exif", "assumed"]
"""Where intrinsics come from: the caller or the dataset, the photograph's own data, or an assumed field of view."""

MAX_ROUNDS = 50  # of undoing a distortion; five do for usual lenses
MAX_STEP, SMALL = 0.3, 1e-6  # of a round, and of a derivative, at Z = 1
MAX_ERROR = 1e-3  # pixels
COEFFICIENTS = (0, 4, 5, 8, 12, 14)
"""How many numbers a distortion may have (OpenCV)."""
ASSUMED_FOV = 60.0  # degrees over the longer side; a usual phone or webcam
FULL_FRAME = (36.0, 24.0)  # mm


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics in pixels of the original image.

    Attributes:
        fx, fy: focal lengths in pixels.
        cx, cy: principal point.
        distance: what the labelled metres of this image are measured along.
        distortion: OpenCV coefficients (k1, k2, p1, p2[, k3, ...]) of the image as it is; empty for a pinhole image.
        origin: where the intrinsics come from.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    distance: Distance = "planar"
    distortion: tuple[float, ...] = ()
    origin: Origin = "given"

    def __post_init__(self) -> None:
        """Raises: ValueError for a focal length that is no positive number, or a principal point that is no number."""
        for name in ("fx", "fy", "cx", "cy"):  # numpy's numbers do not go into JSON
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "distortion", tuple(float(value) for value in self.distortion))
        for name in ("fx", "fy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; a focal length is a positive number of pixels")
        for name in ("cx", "cy"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; the principal point is a pair of finite numbers")
        for name, kind in (("distance", Distance), ("origin", Origin)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is '{getattr(self, name)}'; use one of {', '.join(get_args(kind))}")
        if len(self.distortion) not in COEFFICIENTS or not all(map(math.isfinite, self.distortion)):
            raise ValueError(
                f"distortion is {self.distortion}; give 4, 5, 8, 12 or 14 finite OpenCV coefficients (k1, k2, p1, p2, k3, ...)"
            )

    @property
    def _matrix(self) -> np.ndarray:
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], np.float64)

    @property
    def pinhole(self) -> Camera:
        """The same camera without distortion: that of an undistorted image."""
        return replace(self, distortion=())

    def rays(self, points: np.ndarray) -> np.ndarray:
        """Directions `(..., 3)` with Z = 1 of pixels `(..., 2)`, the distortion of the image undone.

        NaN where no ray is seen at a pixel: strong distortions fold the picture over.
        """
        points = np.asarray(points, np.float64)
        ideal = self._ideal(points)
        return np.insert(self._undistorted(ideal) if self.distortion else ideal, 2, 1.0, axis=-1)

    def _undistorted(self, seen: np.ndarray) -> np.ndarray:
        """Rays at Z = 1 that a distortion brought to `seen` `(..., 2)`, by Newton's method; nan where it finds none."""
        ideal = seen.copy()
        right, down = np.array((SMALL, 0.0)), np.array((0.0, SMALL))
        with np.errstate(all="ignore"):  # what runs away becomes nan below
            for _ in range(MAX_ROUNDS):
                at = self._distorted(ideal)
                error = seen - at
                if not np.abs(error).max(initial=0.0) >= 1e-13:
                    break
                a, c = np.moveaxis((self._distorted(ideal + right) - at) / SMALL, -1, 0)
                b, d = np.moveaxis((self._distorted(ideal + down) - at) / SMALL, -1, 0)
                x, y = np.moveaxis(error, -1, 0)
                step = np.stack((d * x - b * y, a * y - c * x), -1) / (a * d - b * c)[..., None]
                ideal += step.clip(-MAX_STEP, MAX_STEP)
            missed = (np.abs(seen - self._distorted(ideal)) * (self.fx, self.fy)).max(-1)
        ideal[~(missed <= MAX_ERROR)] = np.nan
        return ideal

    def _distorted(self, ideal: np.ndarray) -> np.ndarray:
        """Where rays `(..., 2)` at Z = 1 seem to come from."""
        return self._ideal(self.project(np.insert(ideal, 2, 1.0, axis=-1)))

    def _ideal(self, points: np.ndarray) -> np.ndarray:
        """Pixels `(..., 2)` as a pinhole camera sees them, at Z = 1."""
        return (points - (self.cx, self.cy)) / (self.fx, self.fy)

    def stretch_of(self, points: np.ndarray) -> np.ndarray:
        """Metres along the ray per metre along the axis, `(...)`, of pixels `(..., 2)`; at least 1."""
        return np.linalg.norm(self.rays(points), axis=-1)

    def convert(self, metres: Any, points: np.ndarray, given: Distance, wanted: Distance) -> np.ndarray:
        """Metres measured along one thing as metres along another; nothing is converted from or to `unspecified`.

        Args:
            metres: `(...)`.
            points: `(..., 2)` pixels they belong to.
            given, wanted: what they are measured along, and shall be.
        """
        metres = np.asarray(metres, np.float64)
        if given == wanted or "unspecified" in (given, wanted):
            return metres
        stretch = self.stretch_of(points)
        return metres * stretch if wanted == "ray" else metres / stretch

    def place(self, points: np.ndarray, metres: Any, distance: Distance) -> np.ndarray:
        """Points in space `(..., 3)` of pixels `(..., 2)` at so many metres.

        Raises:
            ValueError: if nobody says what the metres are measured along.
        """
        if distance == "unspecified":
            raise ValueError("metres of unspecified kind have no place in space; say whether they are planar or ray")
        depth = self.convert(metres, points, distance, "planar")
        return self.rays(points) * depth[..., None]

    def project(self, places: np.ndarray) -> np.ndarray:
        """Pixels `(..., 2)` of points in space `(..., 3)` in front of the camera; inverse of `place`."""
        places = np.asarray(places, np.float64)
        if self.distortion and places.size:
            import cv2

            flat = places.reshape(-1, 1, 3)
            found, _ = cv2.projectPoints(flat, np.zeros(3), np.zeros(3), self._matrix, np.array(self.distortion))
            return found.reshape(*places.shape[:-1], 2)
        x, y = places[..., 0] / places[..., 2], places[..., 1] / places[..., 2]
        return np.stack((x * self.fx + self.cx, y * self.fy + self.cy), axis=-1)

    def scaled(self, scale: tuple[float, float], offset: tuple[float, float] = (0.0, 0.0)) -> Camera:
        """The camera of a canvas with this scale and offset (see `structures.Canvas`)."""
        (sx, sy), (ox, oy) = scale, offset
        return replace(
            self,
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx + ox - 0.5,
            cy=(self.cy + 0.5) * sy + oy - 0.5,
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dict, from which `Camera(**...)` restores it (lists become tuples by `from_json`)."""
        content: dict[str, Any] = {name: getattr(self, name) for name in ("fx", "fy", "cx", "cy", "distance", "origin")}
        return content | ({"distortion": list(self.distortion)} if self.distortion else {})

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Camera:
        """Inverse of `to_json`."""
        return cls(**content | {"distortion": tuple(content.get("distortion", ()))})


def assume_camera(size: Size, fov: float = ASSUMED_FOV) -> Camera:
    """A camera with its axis in the middle of an image `(H, W)` and this field of view in degrees over the longer side.

    Raises:
        ValueError: for a field of view that is no angle of a pinhole camera.
    """
    if not 1 <= fov < 179:
        raise ValueError(f"a field of view of {fov} degrees fits no pinhole camera; give one from 1 to below 179")
    height, width = size
    focal = max(size) / 2 / math.tan(math.radians(fov) / 2)
    return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, "unspecified", origin="assumed")


def exif_camera(image: Image.Image) -> Camera | None:
    """The camera by a photograph's 35 mm equivalent focal length, None where it carries none.

    The equivalent is by the diagonal of the sensor, as CIPA DCG-001 defines it.
    """
    value = image.getexif().get_ifd(0x8769).get(0xA405)  # Exif IFD, FocalLengthIn35mmFilm
    try:
        millimetres = float(value) if value is not None else 0.0
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not (math.isfinite(millimetres) and millimetres > 0):
        return None
    width, height = image.size
    focal = millimetres * math.hypot(width, height) / math.hypot(*FULL_FRAME)
    return Camera(focal, focal, (width - 1) / 2, (height - 1) / 2, "unspecified", origin="exif")


def find_camera(image: Image.Image, camera: Camera | None = None, fov: float | None = None) -> Camera:
    """The camera that is given, else the one of the photograph's own data, else an assumed one; `origin` says which.

    Args:
        image: as opened from its file, with its EXIF data.
        camera: what is known.
        fov: field of view in degrees over the longer side, instead of EXIF data and of the usual assumption.
    """
    if camera is not None:
        return camera
    size = (image.height, image.width)
    found = exif_camera(image) if fov is None else None
    return found or assume_camera(size, ASSUMED_FOV if fov is None else fov)

"""What the model sees of a photograph: all pictures as if taken with one focal length (DepthLM, specification section B).

`clean` geometry scales each axis to the unified focal length, up to whole pixels, and pads to whole tokens, so nothing is
resampled twice and points keep their subpixel place. `legacy` is the arithmetic of the released weights: both axes by fx, sizes
and points truncated, then stretched to the processor's size after markers were drawn.

Legend: H W pixels of the original, h w of the unified picture, N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.geometry import crop, stretch
from mmseg_llm.structures import Canvas

if TYPE_CHECKING:
    from mmseg_llm.backbones.image_geometry import ImageGeometry
    from mmseg_llm.masks import Size

FAR = -(2.0**31)
WIDEST = 170  # degrees; wider pictures are no pinhole's
Geometry = Literal["clean", "legacy"]
Overflow = Literal["error", "shrink"]


class UnviewableError(ValueError):
    """A photograph that cannot be seen at the unified focal length; `reason` is a key of `quantities.REASONS`."""

    def __init__(self, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class View:
    """A photograph at the unified focal length.

    Attributes:
        picture: what markers are drawn on and coordinates refer to; in `clean` geometry padded to whole tokens.
        inner: `(h, w)` of the photograph on it, from the upper left corner.
        camera: of the original image.
        geometry: the arithmetic it was made with.
        scale: unified pixels per original pixel and axis by the focal length, before sizes were rounded.
        ratio: focal length of the picture by the unified one; 1 unless it had to be shrunk. Metres said are read times this.
    """

    picture: Canvas
    inner: Size
    camera: Camera
    geometry: Geometry
    scale: tuple[float, float]
    ratio: float = 1.0
    _made: dict[str, Canvas] = field(default_factory=dict, compare=False, repr=False)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Where original points `(N, 2)` are on the picture, float64 `(N, 2)`, pixel centres at whole numbers (`clean`)."""
        points = np.asarray(points, np.float64)
        if self.camera.distortion:
            points = self.camera.pinhole.project(self.camera.rays(points))
        return self.picture.to_canvas(points)

    def locate(self, points: np.ndarray) -> np.ndarray:
        """Pixels of the picture, int64 `(N, 2)`, of original points `(N, 2)`; nothing is clipped."""
        if self.geometry == "clean":
            return _whole(np.rint(self.place(points)))
        found = np.asarray(points, np.float64) * self.scale + self.picture.offset
        return _whole(np.floor(found + 1e-9))  # a product that is a whole number must not fall below it

    def back(self, pixels: np.ndarray) -> np.ndarray:
        """Original points float64 `(N, 2)` that `locate` puts on pixels `(N, 2)` of the picture."""
        pixels = np.asarray(pixels, np.float64)
        if self.geometry == "legacy":
            return (pixels + 0.5 - self.picture.offset) / self.scale
        points = self.picture.to_original(pixels)
        return self.camera.project(self.camera.pinhole.rays(points)) if self.camera.distortion else points

    def shows(self, pixels: np.ndarray) -> np.ndarray:
        """Whether pixels `(N, 2)` of the picture show the photograph, bool `(N,)`."""
        height, width = self.inner
        return np.all((pixels >= 0) & (pixels < np.array([width, height])), axis=-1)

    def shared(self, target: ImageGeometry) -> Canvas:
        """The canvas without markers, one object for all who ask."""
        if "canvas" not in self._made:
            self._made["canvas"] = self.finish(target)
        return self._made["canvas"]

    def finish(self, target: ImageGeometry, image: Image.Image | None = None) -> Canvas:
        """The canvas for a backbone, of the picture or of a copy of it with markers."""
        shown = self.picture if image is None else replace(self.picture, image=image)
        return shown if self.geometry == "clean" else _through(shown, target.canvas_size(shown.size))


def _whole(pixels: np.ndarray) -> np.ndarray:
    """As int64; what is no number, or far away, lies outside of every picture."""
    return np.nan_to_num(pixels, nan=FAR, posinf=-FAR, neginf=FAR).clip(FAR, -FAR).astype(np.int64)


def unified_size(size: Size, camera: Camera, focal: float, geometry: Geometry = "clean") -> Size:
    """`(h, w)` of an image `(H, W)` at the unified focal length.

    Raises:
        UnviewableError: if nothing is left of it.
    """
    scale = (focal / camera.fx, focal / (camera.fx if geometry == "legacy" else camera.fy))
    turn = int if geometry == "legacy" else round
    unified = (turn(size[0] * scale[1]), turn(size[1] * scale[0]))
    if min(unified) < 1:
        raise UnviewableError(
            f"at a focal length of {focal:g} pixels nothing is left of an image of {size} (H, W) taken with {camera.fx:g}; check "
            "the intrinsics",
            "bad_camera",
        )
    return unified


def unify(image: Image.Image, camera: Camera, focal: float, geometry: Geometry = "clean") -> View:
    """Resize an RGB image so that its focal length is `focal` pixels; bicubic, anti-aliased (specification B.1, B.2).

    Lens distortion, where the camera has any, is undone first (`clean` only; the reference never undid it).

    Raises:
        ValueError: if nothing is left of the image.
    """
    scale = (focal / camera.fx, focal / (camera.fx if geometry == "legacy" else camera.fy))
    height, width = unified_size((image.height, image.width), camera, focal, geometry)
    if geometry == "clean" and camera.distortion:
        image = undistort(image, camera)
    return View(stretch(image, (height, width)), (height, width), camera, geometry, scale)


def undistort(image: Image.Image, camera: Camera) -> Image.Image:
    """The image a pinhole camera with the same intrinsics would have taken; black where nothing was seen."""
    import cv2

    matrix = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]])
    return Image.fromarray(cv2.undistort(np.asarray(image), matrix, np.array(camera.distortion)))


def squeeze(view: View, size: Size) -> View:
    """Stretch a unified picture to `(h, w)` in height only: noise of the intrinsics (specification B.6)."""
    scale = (view.scale[0], view.scale[1] * size[0] / view.inner[0])
    return replace(view, picture=_through(view.picture, size), inner=size, scale=scale)


def central_crop(view: View, size: Size) -> View:
    """The middle `(h, w)` of a picture, or all of it along axes where it is smaller (specification B.5)."""
    height, width = min(size[0], view.inner[0]), min(size[1], view.inner[1])
    left, top = (view.inner[1] - width) // 2, (view.inner[0] - height) // 2
    return replace(view, picture=crop(view.picture, left, top, (height, width)), inner=(height, width))


def _through(canvas: Canvas, size: Size) -> Canvas:
    """A canvas stretched to another size."""
    again = stretch(canvas.image, size)
    (ax, ay), (sx, sy), (ox, oy) = again.scale, canvas.scale, canvas.offset
    return Canvas(again.image, canvas.original_size, (sx * ax, sy * ay), (ox * ax, oy * ay))


@dataclass(frozen=True)
class Augmentation:
    """What training does to unified pictures; the defaults are those of the reference at a focal length of 1000 pixels.

    Attributes:
        crop_height, crop_width: ranges in pixels that the size of a central crop is drawn from.
        squeeze: datasets (`Sample.source`) with noisy intrinsics, whose height is divided by a factor of this range instead.
    """

    crop_height: tuple[float, float] = (700, 1200)
    crop_width: tuple[float, float] = (1000, 1400)
    squeeze: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError for a range that is none."""
        for name, (low, high) in {
            "crop_height": self.crop_height,
            "crop_width": self.crop_width,
            **self.squeeze,
        }.items():
            if not 0 < low <= high:
                raise ValueError(f"the range {(low, high)} of {name} must hold positive numbers, the smaller one first")

    def draw(self, rng: np.random.Generator, source: str = "") -> Change:
        """What to do to a sample of a dataset."""
        if source in self.squeeze:
            return Change(factor=float(rng.uniform(*self.squeeze[source])))
        return Change((int(rng.uniform(*self.crop_height)), int(rng.uniform(*self.crop_width))))


@dataclass(frozen=True)
class Change:
    """A drawn augmentation: a central crop `(h, w)`, a squeeze, or neither."""

    crop: Size | None = None
    factor: float | None = None

    def size(self, size: Size, ratio: float) -> Size:
        """`(h, w)` after the change of a picture `(h, w)` at this ratio of the unified focal length that crops are for."""
        if self.factor is not None:
            return (max(1, int(size[1] / self.factor)), size[1])
        if self.crop is None:
            return size
        return (min(size[0], max(1, int(self.crop[0] * ratio))), min(size[1], max(1, int(self.crop[1] * ratio))))

    def __call__(self, view: View, ratio: float) -> View:
        """The changed view."""
        if self.factor is not None:
            return squeeze(view, self.size(view.inner, ratio))
        return view if self.crop is None else central_crop(view, self.size(view.inner, ratio))


def make_view(
    image: Image.Image,
    camera: Camera,
    focal: float,
    target: ImageGeometry,
    geometry: Geometry = "clean",
    overflow: Overflow = "error",
    change: Change | None = None,
) -> View:
    """A photograph as a backbone takes it.

    Args:
        image: RGB.
        camera: its intrinsics.
        focal: the unified focal length.
        target: image geometry of the backbone.
        geometry: arithmetic.
        overflow: what to do where the backbone's bounds would shrink the picture, which would falsify the metres: refuse, or
            shrink it knowingly and read the metres accordingly.
        change: augmentation.

    Raises:
        ValueError: if the picture does not fit and may not be shrunk, or the backbone takes one size only in `legacy` geometry.
    """
    if geometry == "legacy" and not target.is_dynamic:
        raise ValueError("legacy geometry stretches pictures, which needs a backbone that takes any size; use clean")
    change, ratio = change or Change(), 1.0
    original = (image.height, image.width)
    if max(original) / 2 / min(camera.fx, camera.fy) > math.tan(math.radians(WIDEST / 2)):
        raise UnviewableError(
            f"a focal length of {min(camera.fx, camera.fy):g} pixels in an image of {image.size} (W, H) is a field of view of "
            f"more than {WIDEST} degrees; give intrinsics in pixels of this image",
            "bad_camera",
        )
    # Sizes are known before anything is resized: a wrong focal length asks for a picture that no memory holds.
    while (share := _room(change.size(unified_size(original, camera, focal * ratio, geometry), ratio), target)) < 1:
        if overflow == "error":
            size = unified_size(original, camera, focal, geometry)
            raise UnviewableError(
                f"at a focal length of {focal:g} the picture has {size} (H, W) pixels, more than the backbone takes; raise its "
                f"bounds, set the head's focal to at most {int(focal * share)}, or set overflow to shrink",
                "too_large",
            )
        ratio *= min(share, 0.999)  # sizes are whole numbers, so that a share alone might never be enough
    view = replace(change(unify(image, camera, focal * ratio, geometry), ratio), ratio=ratio)
    return replace(view, picture=_pad(view.picture, target)) if geometry == "clean" else view


def _room(size: Size, target: ImageGeometry) -> float:
    """How much of a picture's scale a backbone can take: 1, or less where its bounds would shrink the picture."""
    height, width = size
    if not target.is_dynamic:
        return min(1.0, target.image_size[0] / height, target.image_size[1] / width)
    padded = _padded(size, target)
    most = target.canvas_size(padded)
    return 1.0 if most[0] >= padded[0] and most[1] >= padded[1] else min(most[0] / padded[0], most[1] / padded[1])


def _pad(canvas: Canvas, target: ImageGeometry) -> Canvas:
    """Black on the right and at the bottom."""
    height, width = _padded(canvas.size, target)
    if (height, width) == canvas.size:
        return canvas
    image = Image.new("RGB", (width, height))
    image.paste(canvas.image)
    return replace(canvas, image=image)


def _padded(size: Size, target: ImageGeometry) -> Size:
    """Whole tokens, or the one size that a backbone takes."""
    step = target.step
    return (-(-size[0] // step) * step, -(-size[1] // step) * step) if target.is_dynamic else target.image_size

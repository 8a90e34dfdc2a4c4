"""Asking a model how far pixels are away: an image with its camera, points of it, one batched call.

Legend: H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.cameras import Camera, Distance, find_camera
from mmseg_llm.geometry import load_image
from mmseg_llm.structures import DepthPoint, Prediction, Query, Sample

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.masks import Size
    from mmseg_llm.model import PerceptionModel

ALONG: dict[Distance, str] = {
    "planar": "along the optical axis",
    "ray": "along the ray",
    "unspecified": "of unspecified kind",
}
"""What metres are measured along, in words."""
UPRIGHT = 1
"""EXIF orientation of a photograph whose pixels are stored as they are looked at."""


@dataclass(frozen=True)
class Asking:
    """How depth is asked.

    Attributes:
        head: name of the depth head; the first one when None.
        protocol: way of predicting; the head's first one when None.
        distance: what the metres are measured along, for heads that do not say.
    """

    head: str | None = None
    protocol: str | None = None
    distance: Distance | None = None


@dataclass(frozen=True)
class View:
    """An image and the camera it is looked at with.

    Attributes:
        image: RGB, as its pixels are stored (EXIF rotation is not applied).
        camera: as given, or found; `camera.origin` says which.
        name: file name, or a number.
        orientation: how its EXIF data want it turned (1 to 8); 1 as it is.
    """

    image: Image.Image
    camera: Camera
    name: str = "image_0"
    orientation: int = UPRIGHT

    @property
    def size(self) -> Size:
        """`(H, W)`."""
        return (self.image.height, self.image.width)


def open_view(image: str | Path | Image.Image, camera: Camera | None = None, fov: float | None = None) -> View:
    """An image of any mode as RGB, with its camera: given, else by its EXIF data, else by an assumed field of view.

    Args:
        image: path or PIL image.
        camera: intrinsics in pixels of the stored image.
        fov: field of view in degrees over the longer side, instead of EXIF data and of the usual assumption.

    Raises:
        ValueError: for an image that cannot be read, an impossible field of view, or both a camera and a field of view.
    """
    from PIL import Image

    if camera is not None and fov is not None:
        raise ValueError(f"both a camera and a field of view of {fov} degrees are given; give one of them")
    loaded = load_image(image)
    if isinstance(image, Image.Image):
        return View(loaded, find_camera(image, camera, fov), orientation=_orientation(image))
    with Image.open(image) as handle:  # RGB pixels no longer carry the EXIF data
        return View(loaded, find_camera(handle, camera, fov), Path(image).name, _orientation(handle))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or none that EXIF knows."""
    found = image.getexif().get(0x0112, UPRIGHT)
    return found if found in range(1, 9) else UPRIGHT


def find_depth_head(model: PerceptionModel, name: str | None = None) -> str:
    """Name of the head that answers how far points are: the one of this name, or the first of its kind.

    Raises:
        ValueError: if there is none.
    """
    if name is not None and hasattr(model.head(name), "distance"):
        return name
    found = [key for key, head in model.heads.items() if hasattr(head, "distance")]
    if name is None and found:
        return found[0]
    lead = "the model has no head" if name is None else f"head '{name}' is none"
    mend = (
        f"use head '{found[0]}'" if found else f"it has {', '.join(model.heads)}; take a model with a depth_text head"
    )
    raise ValueError(f"{lead} that measures depth; {mend}")


def ask_points(
    model: PerceptionModel,
    view: View,
    points: Sequence[tuple[float, float]] | np.ndarray,
    asking: Asking,
) -> list[Prediction]:
    """One prediction per point, in order; all of them are asked in one batched call.

    Args:
        model: with a depth head.
        view: image and camera.
        points: `(N, 2)` as (x, y) in pixels of the stored image; points outside are answered by a reason.
        asking: which head, and how.

    Raises:
        ValueError: without points, for points that are no pairs of finite numbers, or without a depth head.
    """
    places = np.asarray(points, np.float64)
    if places.ndim != 2 or places.shape[-1] != 2 or not len(places) or not np.isfinite(places).all():
        raise ValueError(f"points of shape {places.shape} are asked; give one or more pairs (x, y) of finite numbers")
    name = find_depth_head(model, asking.head)
    queries = tuple(
        Query(text="", points=(DepthPoint(float(x), float(y)),), task="depth", id=str(index))
        for index, (x, y) in enumerate(places)
    )
    sample = Sample(image=view.image, size=view.size, queries=queries, id=view.name, camera=view.camera)
    return model.predict([sample], name, asking.protocol or model.head(name).protocols[0])


def values_of(answers: Sequence[Prediction]) -> np.ndarray:
    """Metres float64 `(N,)` of answers, nan where there is none."""
    return np.array([np.nan if answer.depth is None else answer.depth for answer in answers], np.float64)


def places_of(answers: Sequence[Prediction]) -> np.ndarray:
    """Pixels float64 `(N, 2)` that the answers are about, after any snapping."""
    return np.array([answer.measurement.points[0] for answer in answers if answer.measurement is not None], np.float64)


def failures_of(answers: Sequence[Prediction]) -> dict[str, int]:
    """How many answers have no value, by reason; the most frequent reason first."""
    reasons = Counter(item.measurement.reason for item in answers if item.measurement and item.depth is None)
    return dict(reasons.most_common())


def distance_of(answers: Sequence[Prediction], assumed: Distance | None = None) -> Distance:
    """What the metres of all these answers are measured along.

    Args:
        answers: of one head about one image.
        assumed: what to believe where the head does not say.

    Raises:
        ValueError: if the head says, and says something else than is assumed.
    """
    said: set[Distance] = {answer.measurement.distance for answer in answers if answer.measurement is not None}
    assert len(said) == 1, f"answers of one image are measured along {said}"
    (found,) = said
    if assumed is None or found == assumed:
        return found
    if found != "unspecified":
        raise ValueError(
            f"the head answers {found} metres; leave out distance={assumed}, which is for heads that do not say"
        )
    return assumed


def point_record(answer: Prediction) -> dict[str, Any]:
    """One answer for a JSON file that tells camera and image once for all: place, metres or why none, and what was said."""
    assert answer.measurement is not None
    x, y = answer.measurement.points[0]
    return {
        "x": x,
        "y": y,
        "metres": answer.depth,
        "reason": answer.measurement.reason,
        "text": answer.text,
        "score": round(float(answer.score), 6),
        **({"is_snapped": True} if answer.measurement.is_snapped else {}),
    }


def describe_camera(camera: Camera, size: Size) -> str:
    """Intrinsics and where they come from, in one sentence without a stop."""
    degrees = 2 * np.degrees(np.arctan(max(size) / 2 / (camera.fx if size[1] >= size[0] else camera.fy)))
    what = f"fx {camera.fx:.1f}, fy {camera.fy:.1f}, cx {camera.cx:.1f}, cy {camera.cy:.1f} px ({degrees:.0f} degrees)"
    return {
        "given": f"intrinsics as given: {what}",
        "exif": f"intrinsics by the focal length in the EXIF data: {what}",
        "assumed": f"intrinsics are an assumption, and metres scale with it: {what}; give a camera or a field of view",
    }[camera.origin]


def describe_failures(failures: dict[str, int]) -> str:
    """Reasons with their counts, such as `no_number 3, outside_image 1`."""
    return ", ".join(f"{reason or 'no reason given'} {count}" for reason, count in failures.items())

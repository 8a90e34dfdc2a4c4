"""Curator: turns the files of a public depth dataset into labelled pixels, each dataset with its own short file.

A curator says where its frames are and what is measured in them; the sampling of points, the ranges, the conversion of distances
and the writing are the same for all (`sampling.py`, `writing.py`).

Legend: N labelled pixels, H W pixels of the image.
"""

from __future__ import annotations

import hashlib
import importlib
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.data.depth.points import Unusable
from mmseg_llm.masks import Size

EXTRA = "depth-data"
"""The optional extra that installs what the files of some datasets need."""


@dataclass(frozen=True)
class View:
    """What is known of the image of a frame, as it is stored.

    Attributes:
        size: `(H, W)`.
        camera: its intrinsics and distortion; `camera.distance` is what `metres` are measured along in the files.
        pixels: `(N, 2)` ints, `(x, y)` in the stored image.
        metres: `(N,)`.
        rays: directions `(N, 3)` with Z = 1 of pixels `(N, 2)`, where `camera` cannot tell them (lenses beyond OpenCV's model).
        extra: further fields of the record.
    """

    size: Size
    camera: Camera
    pixels: np.ndarray
    metres: np.ndarray
    rays: Callable[[np.ndarray], np.ndarray] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """One image of a dataset; nothing is read before it is asked for.

    Attributes:
        image: path relative to the folder of the dataset, with forward slashes; unique within a split.
        scene: what must not be on two sides of a split.
        view: reads everything else; raises `Unusable` with a reason, or any error of its files.
        picture: bytes of the image file, where the curator `exports_images`; `image` is then relative to the output's folder.
        camera_name: which of several cameras.
    """

    image: str
    scene: str
    view: Callable[[], View]
    picture: Callable[[], bytes] | None = None
    camera_name: str = ""


class Curator(ABC):
    """A public dataset.

    Attributes:
        name: of the dataset.
        distance: what the labels that are written are measured along.
        valid_range: nearest and farthest metres that are written.
        label_source: what the labels are, in a few words.
        splits: that can be asked for.
        split_rule: what they are by.
        margin: pixels at the border of the image that get no label.
        min_points: a frame with fewer labels is left out.
        exports_images: whether the dataset keeps its images inside other files, so that they are written beside the output.
    """

    name: ClassVar[str]
    distance: ClassVar[Distance]
    valid_range: ClassVar[tuple[float, float]]
    label_source: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    split_rule: ClassVar[str]
    margin: ClassVar[int] = 10
    min_points: ClassVar[int] = 2
    exports_images: ClassVar[bool] = False

    @abstractmethod
    def frames(self, root: Path, split: str) -> Iterator[Frame]:
        """All frames of a split, always in the same order.

        Raises:
            ValueError: if the folder does not hold the dataset.
        """

    def rules(self) -> dict[str, Any]:
        """All that decides about the labels, for JSON."""
        return {
            "dataset": self.name,
            "distance": self.distance,
            "valid_range": list(self.valid_range),
            "label_source": self.label_source,
            "split_rule": self.split_rule,
            "margin": self.margin,
            "min_points": self.min_points,
        }


BY_SCENE = ("train", "val", "all")
"""Splits of a dataset that has no official ones."""


def scene_share(scene: str) -> float:
    """A number from 0 to below 1 that depends on the name of the scene alone."""
    return int.from_bytes(hashlib.sha256(scene.encode()).digest()[:6], "big") / 2**48


def is_in_split(scene: str, split: str, val_share: float) -> bool:
    """Whether a scene is in `train`, `val` or `all`, with this share of all scenes in `val`."""
    return split == "all" or (split == "val") == (scene_share(scene) < val_share)


def scene_rule(val_share: float) -> str:
    """The rule of `is_in_split` in words."""
    return f"val: scenes whose SHA-256 is below {val_share:g} of its range; train: the others"


BROKEN = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, Image.DecompressionBombError),
)
"""What files raise that are missing, cut off or of another kind."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say which file it is that has not the form of its dataset.

    Raises:
        ValueError: for all that reading it raises.
    """
    try:
        yield
    except BROKEN as error:
        raise ValueError(
            f"{path} has not the form of its dataset ({type(error).__name__}: {error}); download it again"
        ) from error


def lacking(image: str, scene: str, what: str, sentence: str, camera_name: str = "") -> Frame:
    """A frame that is counted as `missing <what>` when it is looked at."""

    def fail() -> View:
        raise Unusable(sentence, f"missing {what}")

    return Frame(image, scene, fail, camera_name=camera_name)


def each_frame(scene: str, frames: Callable[[], Iterable[Frame]]) -> Iterator[Frame]:
    """The frames of a scene; where what lists them cannot be read, one frame that says so when it is looked at."""
    try:
        found = list(frames())
    except BROKEN as error:
        cause = error

        def fail() -> View:
            raise Unusable(f"the scene cannot be read ({type(cause).__name__}: {cause})", "unreadable scene") from cause

        found = [Frame(scene, scene, fail)]
    yield from found


def folder_of(path: Path, remedy: str) -> Path:
    """The folder, if it is there.

    Raises:
        ValueError: if it is not; the sentence ends with the remedy.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {remedy}")
    return path


def need(module: str, what: str) -> Any:
    """An optional library.

    Raises:
        ValueError: if it is not installed; the sentence says what for and which extra installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{what} needs {package}, which is not installed: pip install 'mmseg_llm[{EXTRA}]'") from error

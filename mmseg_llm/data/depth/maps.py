"""Depth maps as files: PNG or TIFF of 16 bits in some unit, or NPY in metres.

Legend: H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.data.depth.points import BROKEN_IMAGE, Unusable

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.structures import Size

SUFFIXES = (".png", ".tif", ".tiff", ".npy")


def is_npy(path: str | Path) -> bool:
    """Whether a depth map is in metres, so that it needs no unit."""
    return Path(path).suffix.lower() == ".npy"


def map_size(path: Path) -> Size:
    """`(H, W)` by the header of a depth map.

    Raises:
        Unusable: if the file is missing, broken, or of another kind.
    """
    if is_npy(path):
        return _load_npy(path).shape  # type: ignore[return-value]
    with _open_image(path) as image:
        return (image.height, image.width)


def read_map(path: Path, metres_per_unit: float | None) -> np.ndarray:
    """float32 `(H, W)` metres, 0 where unlabelled.

    Args:
        path: PNG or TIFF of 16 bits, 0 unlabelled; or NPY of floats in metres, where what is not finite or not positive is
            unlabelled.
        metres_per_unit: of a PNG or TIFF; an NPY needs none.

    Raises:
        Unusable: if the file is missing, broken, or of another kind.
    """
    if is_npy(path):
        metres = np.array(_load_npy(path), np.float32)
        metres[~(np.isfinite(metres) & (metres > 0))] = 0
        return metres
    assert metres_per_unit is not None
    with _open_image(path) as image:
        try:
            units = np.asarray(image)
        except BROKEN_IMAGE as error:
            raise _broken(path, error) from error
    return np.multiply(units, metres_per_unit, dtype=np.float32)


def _open_image(path: Path) -> Image.Image:
    """Open a PNG or TIFF of 16 bits without decoding it."""
    from PIL import Image

    try:
        image = Image.open(path)
    except FileNotFoundError as error:
        raise Unusable(f"depth map {path} does not exist", "missing depth") from error
    except (*BROKEN_IMAGE, Image.DecompressionBombError) as error:
        raise _broken(path, error) from error
    if not image.mode.startswith("I;16"):
        image.close()
        raise Unusable(
            f"depth map {path} is of mode '{image.mode}'; write greyscale PNG of 16 bits, or NPY in metres",
            "depth of another kind",
        )
    return image


def _load_npy(path: Path) -> Any:
    """Map an array of floats `(H, W)` into memory."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise Unusable(f"depth map {path} does not exist", "missing depth") from error
    except (ValueError, OSError, EOFError) as error:
        raise _broken(path, error) from error
    if found.ndim != 2 or found.dtype.kind != "f":
        raise Unusable(
            f"depth map {path} holds {found.dtype} of shape {found.shape}; save floats (H, W) in metres",
            "depth of another kind",
        )
    return found


def _broken(path: Path, error: Exception) -> Unusable:
    return Unusable(f"depth map {path} cannot be read ({error}); replace the file", "corrupt depth")

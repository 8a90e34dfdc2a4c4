"""Small readers that several curators share: values of a 16-bit file, depth maps as labelled pixels, numbers of a text file.

Legend: N labelled pixels, H W pixels of a map.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmseg_llm.data.depth.points import Unusable
from mmseg_llm.masks import Size


def read_values(path: Path, size: Size | None = None) -> np.ndarray:
    """The values `(H, W)` that a one-channel image file stores: 16-bit depth, or a mask.

    Args:
        path: of the file.
        size: what it has to be.

    Raises:
        Unusable: if it has several channels or another size.
    """
    from PIL import Image

    with Image.open(path) as image:
        values = np.asarray(image)
    if values.ndim != 2:
        raise Unusable(f"{path} has several channels; a depth map or mask has one", "depth of another kind")
    if size is not None:
        check_size(path, values.shape, size)
    return values


def check_size(path: Path, shape: tuple[int, ...], size: Size) -> None:
    """Raises: Unusable if a map is of another size than its image."""
    if shape != size:
        raise Unusable(
            f"{path} is {shape[1]}x{shape[0]} but its image {size[1]}x{size[0]}; download both again",
            "depth of another size",
        )


def read_numbers(path: Path, *counts: int) -> list[float]:
    """All numbers of a text file, separated by spaces, commas, semicolons or new lines.

    Args:
        path: of the file.
        counts: how many there may be.

    Raises:
        Unusable: if there is something else in it, or another count of numbers.
    """
    words = path.read_text(encoding="utf-8").replace(",", " ").replace(";", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise Unusable(
            f"{path} holds more than numbers ({error}); download it again", "malformed calibration"
        ) from error
    if len(numbers) not in counts:
        wanted = " or ".join(map(str, counts))
        raise Unusable(f"{path} holds {len(numbers)} numbers, not {wanted}; download it again", "malformed calibration")
    return numbers


def labelled(metres: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(N, 2)` and metres `(N,)` of a map `(H, W)` where it is finite and positive, row by row.

    Args:
        metres: 0, infinite or NaN where nothing was measured.
        mask: `(H, W)` bools; pixels that are trusted.
    """
    is_valid = np.isfinite(metres) & (metres > 0)
    if mask is not None:
        is_valid &= mask
    rows, columns = np.nonzero(is_valid)
    return np.stack((columns, rows), axis=-1), metres[rows, columns].astype(np.float64)

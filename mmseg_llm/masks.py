"""Binary masks as COCO run-length encodings; the lowest floor of the library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Box = tuple[float, float, float, float]
Size = tuple[int, int]

MOST_CHUNKS = 12
"""Characters of one run: 60 bits are more than any image has pixels."""


@dataclass(frozen=True)
class Mask:
    """A binary mask as COCO run-length encoding (pycocotools, column-major runs).

    Attributes:
        size: `(H, W)` in pixels.
        counts: compressed RLE string.
    """

    size: Size
    counts: str

    @classmethod
    def from_array(cls, array: np.ndarray) -> Mask:
        """Encode an `(H, W)` array; everything that is not zero is foreground.

        Raises:
            ValueError: if the array is not two-dimensional.
        """
        from pycocotools import mask as coco_mask

        if array.ndim != 2:
            raise ValueError(f"a mask must be an (H, W) array, got shape {tuple(array.shape)}")
        binary = array if array.dtype == np.uint8 and array.max(initial=0) <= 1 else (array != 0).astype(np.uint8)
        rle = coco_mask.encode(np.asfortranarray(binary))
        return cls(size=(int(array.shape[0]), int(array.shape[1])), counts=rle["counts"].decode("ascii"))

    @classmethod
    def empty(cls, size: Size) -> Mask:
        """A mask without foreground."""
        return cls.from_array(np.zeros(size, np.uint8))

    @classmethod
    def from_coco(cls, segmentation: Any, size: Size) -> Mask:
        """Read any COCO `segmentation`: polygons, uncompressed or compressed RLE.

        Args:
            segmentation: list of polygons `[x1, y1, x2, y2, ...]` or an RLE dict.
            size: `(H, W)` of the image.

        Raises:
            ValueError: if the RLE has another size than the image, or the polygons are malformed.
        """
        from pycocotools import mask as coco_mask

        height, width = int(size[0]), int(size[1])
        if isinstance(segmentation, dict):
            if "size" not in segmentation or "counts" not in segmentation:
                raise ValueError(f"an RLE needs the keys 'size' and 'counts', got {sorted(segmentation)}")
            rle_size = tuple(int(side) for side in segmentation["size"])
            if rle_size != (height, width):
                raise ValueError(
                    f"RLE size {rle_size} (height, width) differs from the image size {(height, width)}; "
                    "re-encode the mask at the image's size"
                )
            counts = segmentation["counts"]
            if isinstance(counts, list):
                if sum(counts) != height * width:
                    raise ValueError(
                        f"uncompressed RLE covers {sum(counts)} pixels but the image has {height * width}; "
                        "re-encode the mask at the image's size"
                    )
                rle = coco_mask.frPyObjects(segmentation, height, width)
                counts = rle["counts"]
            counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
            if (covered := _pixels_covered(counts)) != height * width:
                raise ValueError(
                    f"compressed RLE covers {covered} pixels but the image has {height * width}; "
                    "re-encode the mask at the image's size"
                )
            return cls((height, width), counts)
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            raise ValueError("no polygon with at least 3 points; give polygons of 6 or more numbers or an RLE")
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return cls((height, width), rle["counts"].decode("ascii"))

    @classmethod
    def union(cls, masks: Sequence[Mask], size: Size) -> Mask:
        """Pixels that are in any of the masks; the empty mask when there are none.

        Raises:
            ValueError: if a mask has another size.
        """
        from pycocotools import mask as coco_mask

        for mask in masks:
            if mask.size != tuple(size):
                raise ValueError(f"mask of size {mask.size} cannot join masks of size {tuple(size)}")
        if not masks:
            return cls.empty(size)
        if len(masks) == 1:
            return masks[0]
        rle = coco_mask.merge([mask.to_coco(as_bytes=True) for mask in masks])
        return cls((int(size[0]), int(size[1])), rle["counts"].decode("ascii"))

    def to_coco(self, as_bytes: bool = False) -> dict[str, Any]:
        """The COCO RLE dict; `as_bytes` gives the form pycocotools itself works on."""
        return {"size": list(self.size), "counts": self.counts.encode("ascii") if as_bytes else self.counts}

    @cached_property
    def array(self) -> np.ndarray:
        """The mask as bool `(H, W)`.

        Raises:
            ValueError: if the runs exceed H * W pixels.
        """
        from pycocotools import mask as coco_mask

        return coco_mask.decode(self.to_coco(as_bytes=True)).astype(bool)

    @cached_property
    def area(self) -> int:
        """Number of foreground pixels."""
        from pycocotools import mask as coco_mask

        return int(coco_mask.area(self.to_coco(as_bytes=True)))

    @cached_property
    def box(self) -> Box | None:
        """Tight `(x1, y1, x2, y2)`, exclusive right and bottom edges; None when empty."""
        from pycocotools import mask as coco_mask

        if self.area == 0:
            return None
        x, y, width, height = (float(value) for value in coco_mask.toBbox(self.to_coco(as_bytes=True)))
        return (x, y, x + width, y + height)

    def intersection(self, other: Mask) -> int:
        """Number of pixels in both masks.

        Raises:
            ValueError: if the sizes differ.
        """
        from pycocotools import mask as coco_mask

        if self.size != other.size:
            raise ValueError(f"masks of size {self.size} and {other.size} cannot be compared")
        both = coco_mask.merge([self.to_coco(as_bytes=True), other.to_coco(as_bytes=True)], intersect=True)
        return int(coco_mask.area(both))

    def iou(self, other: Mask, ignored: Mask | None = None) -> float:
        """Intersection over union, outside of ignored pixels; 1.0 when both are empty there."""
        if ignored is not None:
            return self.without(ignored).iou(other.without(ignored))
        intersection = self.intersection(other)
        union = self.area + other.area - intersection
        return intersection / union if union else 1.0

    def without(self, other: Mask) -> Mask:
        """The pixels that are not in another mask of the same size."""
        if not self.intersection(other):
            return self
        return Mask.from_array(replace(self).array & ~replace(other).array)


def _pixels_covered(counts: str) -> int:
    """Sum of the runs of a compressed RLE (COCO `rleFrString`), -1 if it ends within a run.

    pycocotools leaves the rest of a mask uninitialised when its runs are too few.
    """
    chunks = np.frombuffer(counts.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if not len(chunks):
        return 0
    is_last = (chunks & 0x20) == 0
    if not is_last[-1]:
        return -1
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > MOST_CHUNKS:
        return -1
    shifts = 5 * (np.arange(len(chunks)) - np.repeat(starts, lengths))
    values = np.add.reduceat((chunks & 0x1F) << shifts, starts)
    values -= np.where(chunks[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    # from the fourth run on, each is the difference to the one before the last
    total = int(values[:1].sum())
    for first in (1, 2):
        total += int(np.cumsum(values[first::2]).sum())
    return total

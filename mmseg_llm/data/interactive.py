"""InteractiveDataset: the folders in which benchmarks of interactive segmentation come (SegAgent specification section 8).

    GrabCut/                      data_GT/*.jpg,*.bmp          boundary_GT/<name>.bmp
    Berkeley/  DAVIS/             img/*.jpg (or images/)       gt/<name>.png (or masks/)
    COCO_MVal/                    img/<category><nn>_<id>.jpg  gt/<the same>.png

Legend: H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmseg_llm.data.base import Faults, SampleDataset
from mmseg_llm.structures import Mask, Query, Sample, Size

Objects = Literal["separate", "union"]

LAYOUTS = tuple((images, masks) for images in ("data_GT", "img", "images") for masks in ("boundary_GT", "gt", "masks"))
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
UNSURE, OBJECT = 128, 255
MOST_VALUES = 64
"""A mask with more values was blurred or compressed with losses."""

_CATEGORY = re.compile(r"([^\d_]+)\d{2}_\d{6,12}")


class _Unfit(Exception):
    """Why a pair of files gives no sample: a reason to count, and words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Pair(NamedTuple):
    """An image with its queries."""

    image: Path
    size: Size
    queries: tuple[Query, ...]


class InteractiveDataset(SampleDataset):
    """One sample per image, one query per object; its text is the category where the file name begins with one, else empty.

    Values of a mask: 0 is background. Where there is nothing but 0, 128 and 255, the object is 255, and 128 is ignored.
    Otherwise every value (or colour) is an object of its own, and 255 beside others is ignored.
    Sample ids are file names without suffix, query ids `<sample id>-<value>`, or the sample id for a union. All masks are read
    at once, so that a broken one is known from the start.

    Args:
        root: folder of the benchmark.
        images: its image folder, by default `data_GT`, `img` or `images`.
        masks: its mask folder, by default `boundary_GT`, `gt` or `masks`.
        objects: `separate`, or the `union` of all objects of an image as one, which published numbers on DAVIS are of.
        max_samples: keep the first images only.
        on_error: `raise` on a file without its counterpart, one that cannot be read, a mask of another size than its image, or
            one without object, or `skip` and count it.
        name: by default the name of the folder.

    Raises:
        ValueError: if the folder is missing or none of its kind, or for a fault with `on_error='raise'`.
    """

    def __init__(
        self,
        root: Path,
        images: str | None = None,
        masks: str | None = None,
        *,
        objects: Objects = "separate",
        max_samples: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        name: str | None = None,
    ) -> None:
        if objects not in get_args(Objects):
            raise ValueError(f"objects is '{objects}'; use one of {', '.join(get_args(Objects))}")
        self.root = Path(root)
        self.images, self.masks = _folders(self.root, images, masks)
        self.name, self.objects = name or self.root.absolute().name, objects
        faults = Faults(on_error)
        self.skipped = faults.counts
        self._pairs: list[_Pair] = []
        for image, mask in self._files(faults):
            if max_samples is not None and len(self._pairs) == max_samples:
                break
            try:
                self._pairs.append(self._read(image, mask))
            except _Unfit as unfit:
                faults.report(unfit.reason, f"{mask}: {unfit}")

    def _files(self, faults: Faults) -> Iterator[tuple[Path, Path]]:
        """Each image with its mask; files without counterpart are reported."""
        images, masks = _by_stem(self.images, faults), _by_stem(self.masks, faults)
        for stem in sorted(masks.keys() - images.keys()):
            faults.report("missing image", f"{masks[stem]} has no image of this name in {self.images}")
        for stem, image in images.items():
            if stem in masks:
                yield image, masks[stem]
            else:
                faults.report("missing mask", f"{image} has no mask of this name in {self.masks}")

    def _read(self, image: Path, mask: Path) -> _Pair:
        """The objects of a mask. Raises: _Unfit."""
        size, values = _size(image), _values(mask)
        if values.shape != size:
            raise _Unfit("other size", f"it is of size {values.shape} (H, W), its image {image} of {size}")
        found = [int(value) for value in np.unique(values) if value]
        if len(found) > MOST_VALUES:
            raise _Unfit(
                "no labels", f"it has {len(found)} values; save it without smoothing, in a format without losses"
            )
        unsure = UNSURE if not set(found) - {UNSURE, OBJECT} else OBJECT if found[-1] == OBJECT else None
        ids = [value for value in found if value != unsure]
        if not ids:
            raise _Unfit("no object", "no pixel of it belongs to an object")
        ignore = Mask.from_array(values == unsure) if unsure in found else None
        named = _CATEGORY.fullmatch(image.stem)
        text = named[1] if named else ""
        if self.objects == "union":
            regions = {image.stem: np.isin(values, ids)}
        else:
            regions = {f"{image.stem}-{value}": values == value for value in ids}
        queries = (
            Query(text=text, masks=(Mask.from_array(region),), id=name, ignore=ignore)
            for name, region in regions.items()
        )
        return _Pair(image, size, tuple(queries))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index` with its objects."""
        image, size, queries = self._pairs[index]
        return Sample(image=image, size=size, queries=queries, id=image.stem, source=self.name)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per object: `(image id, 1)`."""
        return ((pair.image.stem, 1) for pair in self._pairs for _ in pair.queries)


def _folders(root: Path, images: str | None, masks: str | None) -> tuple[Path, Path]:
    """The folders of images and masks.

    Raises:
        ValueError: if there are none.
    """
    for layout in LAYOUTS:
        folders = root / (images or layout[0]), root / (masks or layout[1])
        if folders[0].is_dir() and folders[1].is_dir():
            return folders
    present = ", ".join(sorted(path.name for path in root.iterdir())) if root.is_dir() else "it does not exist"
    raise ValueError(
        f"{root} holds no folders '{images or 'data_GT, img or images'}' and '{masks or 'boundary_GT, gt or masks'}' "
        f"({present or 'it is empty'}); give the folder of one benchmark, or name its image and mask folders"
    )


def _by_stem(folder: Path, faults: Faults) -> dict[str, Path]:
    """Image files of a folder by their name without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() not in SUFFIXES:
            faults.count(f"no image file in {folder.name}")
        elif path.stem in found:
            faults.report(
                "same name", f"{path} has the same name as {found[path.stem].name}; a pair needs one of its own"
            )
        else:
            found[path.stem] = path
    return found


def _size(path: Path) -> Size:
    """`(H, W)` of an image file. Raises: _Unfit."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise _Unfit("broken image", f"its image {path} cannot be read ({error})") from error


def _values(path: Path) -> np.ndarray:
    """Labels int64 `(H, W)` of a mask file: gray values, palette entries, or colours as numbers. Raises: _Unfit."""
    try:
        with Image.open(path) as image:
            if image.mode in {"RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"}:
                colours = np.asarray(image.convert("RGB")).astype(np.int64)  # (H, W, 3)
                is_gray = (colours == colours[..., :1]).all()
                return colours[..., 0] if is_gray else colours @ np.array([1 << 16, 1 << 8, 1])
            return np.asarray(image).astype(np.int64)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise _Unfit("broken mask", f"it cannot be read ({error})") from error

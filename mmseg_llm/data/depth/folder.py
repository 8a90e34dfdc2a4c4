"""DepthFolderDataset: folders of images with depth maps and intrinsics.

Legend: H W pixels of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from mmseg_llm.cameras import Camera, Distance
from mmseg_llm.data.base import Faults, SampleDataset
from mmseg_llm.data.depth.layouts import (
    Intrinsics,
    Pair,
    agree,
    pairs_of_folders,
    pairs_of_list,
    read_intrinsics,
    select_split,
)
from mmseg_llm.data.depth.maps import is_npy, map_size, read_map
from mmseg_llm.data.depth.points import (
    MAX_METRES,
    MIN_METRES,
    REPAIRED,
    Span,
    Unusable,
    check_count,
    check_mode,
    count_many,
    depth_queries,
    draw,
    image_size,
    make_camera,
)
from mmseg_llm.structures import Sample, Size


class _Item(NamedTuple):
    """An image that gives a sample; `num_points` may be drawn of it, 0 where nobody has counted."""

    name: str
    image: str
    depth: str
    size: Size
    camera: Camera
    metres_per_unit: float | None
    num_points: int = 0


class DepthFolderDataset(SampleDataset):
    """One sample per image; its queries of task `depth` are labelled pixels, drawn uniformly by (seed, index).

    Depth maps are greyscale PNG or TIFF of 16 bits (0 unlabelled), or NPY of floats in metres (what is not finite or not positive
    is unlabelled). An image goes with the depth map of its name, whatever the suffixes are, or with that of an annotation list.
    Images of any mode will do. Sample ids are image names, query ids `x,y`.

    `skipped` counts images: `missing image`, `corrupt image`, `missing depth`, `corrupt depth`, `depth of another kind`,
    `depth of another size`, `depth without unit`, `depth of another unit`, `no intrinsics`, `bad focal length`, `malformed
    intrinsics`, `ambiguous name` (several images or maps differ by their suffixes only), `no labelled pixel`. Where one of two
    focal lengths is bad the other stands for both: `focal length repaired`. What never raises is counted only: files
    (`depth without image`, `file of unknown kind`), and with `check_depth` pixels (`depth out of range`).

    Args:
        root: folder that all other paths are relative to.
        images, depth: folders of images and of depth maps with the same names, or one file each.
        intrinsics: four numbers (fx, fy, cx, cy) for all images, a 3x3 `.npy` for all images, or a `.json` as the synthetic
            world writes it: `{distance, metres_per_unit, images: {file name: {fx, fy, cx, cy}}}`. None looks for
            `intrinsics.json` and `intrinsics.npy`.
        annotations: instead of `images` and `depth`, a JSON list `{files: [{rgb, depth, cam_in, depth_scale}]}` with paths
            relative to its folder.
        distance: what the depth maps hold, where no file says it: planar (along the axis), ray, or unspecified.
        metres_per_unit, units_per_metre: scale of PNG and TIFF, where no file says it; give one of them.
        points_per_image: how many labelled pixels of an image to offer, or all that it has.
        margin: pixels from the border where none are drawn.
        min_metres, max_metres: pixels outside are not drawn. By default depth ends at 1000 metres, and a map that has most labels
            beyond is refused as one in another unit, such as an NPY in millimetres; give more, or None, if they are metres.
        split: those images only that `questions.jsonl` assigns to it, as the synthetic world writes it.
        seed: of the drawing.
        on_error: `raise` on an image that cannot be used, or `skip` and count it.
        check_depth: decode every map while opening, to find those without a pixel to draw. Without it only headers are read,
            and such a map raises when it is asked for.
        check_images: read the `header` of every image while opening, or `decode` it to find one that is cut off.
        name: by default that of the folder and the split.

    Raises:
        ValueError: for a missing file or folder, an argument out of range or that the files contradict, nothing to offer, or
            a fault with `on_error='raise'`.
    """

    def __init__(
        self,
        root: Path,
        *,
        images: str = "images",
        depth: str = "depth",
        intrinsics: list[float] | str | None = None,
        annotations: str | None = None,
        distance: Distance | None = None,
        metres_per_unit: float | None = None,
        units_per_metre: float | None = None,
        points_per_image: int = 100,
        margin: int = 0,
        min_metres: float = MIN_METRES,
        max_metres: float | None = MAX_METRES,
        split: str | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        check_depth: bool = True,
        check_images: Literal["header", "decode"] = "header",
        name: str | None = None,
    ) -> None:
        if distance is not None and distance not in get_args(Distance):
            raise ValueError(f"distance is '{distance}'; use one of {', '.join(get_args(Distance))}")
        check_count(points_per_image, seed)
        check_mode(check_images)
        if margin < 0:
            raise ValueError(f"margin is {margin}; it must not be negative")
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"the folder '{self.root}' does not exist; give the folder of images and depth maps")
        self.name = name or "_".join(filter(None, (self.root.absolute().name, split)))
        self.points_per_image, self.margin, self.seed = points_per_image, margin, seed
        self.span = Span.of(min_metres, max_metres)
        cameras = read_intrinsics(self.root, intrinsics)
        self.distance: Distance = agree(cameras.distance, distance, "distance") or "unspecified"
        scale = agree(cameras.metres_per_unit, _scale(metres_per_unit, units_per_metre), "metres_per_unit")
        faults = Faults(on_error)
        self.skipped = faults.counts
        if annotations is None:
            self._base = self.root
            pairs, leftovers = pairs_of_folders(self.root, images, depth)
            count_many(faults, "depth without image", leftovers.orphans)
            count_many(faults, "file of unknown kind", leftovers.unknown)
        else:
            path = self.root / annotations
            self._base, pairs = path.parent, pairs_of_list(path)
        if split is not None:
            pairs = select_split(self.root, pairs, split)
        self._check_depth, self._decodes = check_depth, check_images == "decode"
        self._items = list(self._scan(pairs, cameras, scale, faults))
        if not self._items:
            raise ValueError(f"{self.root}: no image can be used, left out are {self.skipped}")

    def _scan(self, pairs: list[Pair], cameras: Intrinsics, scale: float | None, faults: Faults) -> Iterator[_Item]:
        """All images that give samples; the others are reported."""
        for pair in pairs:
            unit = agree(pair.metres_per_unit, scale, f"metres_per_unit of '{pair.name}'")
            try:
                if pair.rivals:
                    raise Unusable(
                        f"{' and '.join(pair.rivals)} have the same name; keep one of them", "ambiguous name"
                    )
                size = self._size(pair, unit)
                camera, is_repaired = self._camera(pair, cameras, size)
                item, out_of_range = _Item(pair.name, pair.image, pair.depth, size, camera, unit), 0
                if self._check_depth:
                    metres, places = self._places(item)
                    out_of_range = int(np.count_nonzero(metres) - np.count_nonzero(self._is_label(metres)))
                    item = item._replace(num_points=len(places))
            except Unusable as error:
                faults.report(error.reason, f"{self.root}, image '{pair.name}': {error}")
                continue
            count_many(faults, "depth out of range", out_of_range)
            if is_repaired:
                faults.count(REPAIRED)
            yield item

    def _camera(self, pair: Pair, cameras: Intrinsics, size: Size) -> tuple[Camera, bool]:
        """The camera of an image, and whether it was repaired."""
        numbers = pair.intrinsics or cameras.of(pair.name)
        if numbers is None:
            raise Unusable("nobody says its intrinsics; give four numbers or a file as intrinsics", "no intrinsics")
        return make_camera(numbers, self.distance, size=size)

    def _size(self, pair: Pair, unit: float | None) -> Size:
        """Of an image and its depth map, by their headers."""
        if not pair.depth:
            raise Unusable("there is no depth map of its name", "missing depth")
        size, depth_size = image_size(self._base / pair.image, self._decodes), map_size(self._base / pair.depth)
        if size != depth_size:
            raise Unusable(
                f"it is {size[1]}x{size[0]} but its depth map {pair.depth} is {depth_size[1]}x{depth_size[0]}; give maps of "
                "the size of their images",
                "depth of another size",
            )
        if unit is None and not is_npy(pair.depth):
            raise Unusable(
                f"nobody says how long a unit of {pair.depth} is; give metres_per_unit (0.001 for millimetres)",
                "depth without unit",
            )
        return size

    def __len__(self) -> int:
        """Number of usable images."""
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index`.

        Raises:
            ValueError: if its depth map has no pixel to draw, or is no longer what it was.
        """
        index = range(len(self))[index]
        item = self._items[index]
        metres, places = self._places(item)
        places = places[draw(len(places), self.points_per_image, self.seed, index)]
        ys, xs = np.divmod(places, item.size[1])
        points = np.stack((xs, ys), axis=1).tolist()
        return Sample(
            image=self._base / item.image,
            size=item.size,
            queries=depth_queries(points, metres[ys, xs].tolist(), (f"{x},{y}" for x, y in points)),
            id=item.name,
            source=self.name,
            camera=item.camera,
        )

    def _places(self, item: _Item) -> tuple[np.ndarray, np.ndarray]:
        """Depth map, and int64 `(N,)` raster indices of the pixels that may be drawn.

        Raises:
            Unusable: if there are none.
        """
        metres, margin = self._read(item), self.margin
        is_label, num_known = self._is_label(metres), np.count_nonzero(metres)
        if self.span.far <= MAX_METRES and 2 * np.count_nonzero(metres > MAX_METRES) > num_known:
            raise Unusable(
                f"most of {item.depth} is beyond {MAX_METRES:g} metres, up to {metres.max():g}; an NPY holds metres, and PNG and "
                "TIFF need the right metres_per_unit",
                "depth of another unit",
            )
        if margin:
            is_label[:margin] = is_label[-margin:] = False
            is_label[:, :margin] = is_label[:, -margin:] = False
        places = np.flatnonzero(is_label)
        if not len(places):
            raise Unusable(
                f"{item.depth} has no labelled pixel from {self.span.near} to {self.span.far} metres inside a margin of "
                f"{margin} pixels; widen them",
                "no labelled pixel",
            )
        return metres, places

    def _is_label(self, metres: np.ndarray) -> np.ndarray:
        """bool `(H, W)`: which pixels are known and in the range."""
        return (metres > 0) & (metres >= self.span.near) & (metres <= self.span.far)

    def _read(self, item: _Item) -> np.ndarray:
        metres = read_map(self._base / item.depth, item.metres_per_unit)
        if metres.shape != item.size:
            raise Unusable(f"{item.depth} was changed since the dataset was opened; open it again", "changed depth")
        return metres

    def depth_map(self, index: int) -> np.ndarray:
        """float32 `(H, W)` metres of the image at `index` as `sample.camera.distance` says, 0 where unlabelled; all of them,
        whatever margin and range.
        """
        return self._read(self._items[index])

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image name, None)`, as pixels have no masks; decodes depth maps where opening did not."""
        for item in self._items:
            count = item.num_points or len(self._places(item)[1])
            yield from ((item.name, None) for _ in range(min(count, self.points_per_image)))


def _scale(metres_per_unit: float | None, units_per_metre: float | None) -> float | None:
    """Metres per unit by either argument."""
    if metres_per_unit is not None and units_per_metre is not None:
        raise ValueError("metres_per_unit and units_per_metre are both given; give one of them")
    for value in (metres_per_unit, units_per_metre):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"the scale of depth is {value}; give a positive number")
    return 1 / units_per_metre if units_per_metre is not None else metres_per_unit

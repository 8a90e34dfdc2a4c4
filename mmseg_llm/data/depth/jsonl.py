"""DepthJsonlDataset: labelled pixels of images, one image a line (DepthLM specification F.5).

Legend: N labelled pixels, H W pixels of the image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from mmseg_llm.cameras import Distance
from mmseg_llm.data.base import Faults, SampleDataset
from mmseg_llm.data.depth.lines import Line, faults_of, fit, judge, parse_line
from mmseg_llm.data.depth.points import (
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
)
from mmseg_llm.structures import Sample, Size


class _Entry(NamedTuple):
    """What is kept of a line in memory: its bytes in a file, its usable points, the image size, which of its image it is, and
    where the bytes of the image's name are.
    """

    file: int
    start: int
    length: int
    num_points: int
    height: int
    width: int
    repeat: int
    name: int
    name_length: int


class DepthJsonlDataset(SampleDataset):
    """One sample per line, one query of task `depth` per labelled pixel; query ids count the pixels of the line from 0.

    A line is an object with `image` (path in the image folder; a leading slash is stripped), `intrinsics` (`[fx, fy, cx, cy]`
    or `[fx, fy, cx, cy, width, height]`), `pixel_coords` (`[[x, y], ...]`) and `depth` (metres). It may say `distance_type`
    (`z` or `planar`, `euclidean` or `ray`), `valid_range` and `distortion`; `records.DepthRecord` writes all of it. Sample ids
    are image names, with `.2`, `.3`, ... where several lines have the same.

    Every line is checked once. Then its image name and a few numbers of each are kept, and lines are read when asked for.

    `skipped` counts lines (`broken JSON`, `malformed line`, `lists of different length`, `path out of the folder`, `missing
    image`, `corrupt image`, `image of another size`, `bad focal length`, `malformed intrinsics`, `another distance`, `no
    usable point`) and points (`point outside of the image`, `non-finite depth`, `non-positive depth`, `pixel with two
    depths`, `depth out of range`). A range leaves points out on purpose and never raises. Two counts are of lines that are
    offered: where one of two focal lengths is bad the other stands for both (`focal length repaired`), and a field `lens`, as
    the curator of ETH3D writes it, is of a model that a `Camera` cannot say (`unsupported lens`): such a sample looks like a
    pinhole image, its labels along the ray are right, and rays or points in space made of them are not.

    Args:
        annotations: JSONL file or files.
        images: image folder.
        name: by default the stems of the files.
        distance: what the metres of lines without `distance_type` are measured along; `unspecified` when None.
        min_metres, max_metres: labels outside are left out, and so are those outside the `valid_range` of their line.
        points_per_image: how many points of a line to offer, drawn by (seed, index); all when None.
        seed: of the drawing.
        on_error: `raise` on a broken line or point, or `skip` and count it.
        check_images: look for every image and compare its size while opening, by its `header`, or `decode` it to find one
            that is cut off, which takes as long as reading all of them. True means `header`. With False a missing image, or
            one of another size, is found when it is loaded.

    Raises:
        ValueError: for a missing file or folder, an argument out of range, nothing to offer, or a fault with
            `on_error='raise'`.
    """

    def __init__(
        self,
        annotations: Path | list[Path],
        images: Path,
        *,
        name: str | None = None,
        distance: Distance | None = None,
        min_metres: float = MIN_METRES,
        max_metres: float | None = None,
        points_per_image: int | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        check_images: bool | Literal["header", "decode"] = True,
    ) -> None:
        if distance is not None and distance not in get_args(Distance):
            raise ValueError(f"distance is '{distance}'; use one of {', '.join(get_args(Distance))}")
        check_count(points_per_image, seed)
        check = "header" if check_images is True else check_images or None
        if check is not None:
            check_mode(check)
        self.files = [Path(path) for path in ([annotations] if isinstance(annotations, str | Path) else annotations)]
        self.images = Path(images)
        if not self.files:
            raise ValueError("annotations is empty; give at least one file")
        if not self.images.is_dir():
            raise ValueError(
                f"the image folder '{self.images}' does not exist; give the folder that the lines refer to"
            )
        self.name = name or "+".join(dict.fromkeys(path.stem for path in self.files))
        self.distance, self.span = distance, Span.of(min_metres, max_metres)
        self.points_per_image, self.seed = points_per_image, seed
        faults = Faults(on_error)
        self.skipped = faults.counts
        table, names = array("q"), bytearray()
        for entry in self._scan(faults, check, names):
            table.extend(entry)
        self._names = bytes(names)
        self._table = np.asarray(table, np.int64).reshape(-1, len(_Entry._fields))
        if not len(self._table):
            raise ValueError(f"{', '.join(map(str, self.files))}: no line can be used, left out are {self.skipped}")

    def _scan(self, faults: Faults, check: str | None, names: bytearray) -> Iterator[_Entry]:
        """All lines that give samples; the others are reported. Image names are appended to `names`."""
        seen: dict[str, int] = {}
        for file, path in enumerate(self.files):
            for number, start, content in _lines(path):
                where = f"{path}, line {number}"
                try:
                    line = parse_line(content, self.distance, self.span)
                    size = self._size(line, check)
                    line = fit(line, size)
                except Unusable as error:
                    faults.report(error.reason, f"{where}: {error}")
                    continue
                verdict = judge(line, size)
                for reason, sentence in faults_of(line, size, verdict):
                    faults.report(reason, f"{where}: {sentence}")
                count_many(faults, "depth out of range", int(verdict.is_out_of_range.sum()))
                num_points = int(verdict.is_usable.sum())
                if not num_points:
                    faults.count("no usable point")
                    continue
                if line.is_repaired:
                    faults.count(REPAIRED)
                if line.has_lens:
                    faults.count("unsupported lens")
                number_of_image = seen[line.image] = seen.get(line.image, 0) + 1
                name = line.image.encode(errors="surrogatepass")
                yield _Entry(file, start, len(content), num_points, *size, number_of_image, len(names), len(name))
                names += name

    def _size(self, line: Line, check: str | None) -> Size:
        """Of the image, by its line, by its header where that says nothing; they have to agree if checked.

        Raises:
            Unusable: if they do not, or there is no such image.
        """
        if line.size is not None and check is None:
            return line.size
        height, width = image_size(self.images / line.image, decode=check == "decode")
        if line.size not in (None, (height, width)):
            assert line.size is not None
            raise Unusable(
                f"image '{line.image}' is {width}x{height} but its intrinsics say {line.size[1]}x{line.size[0]}; give the "
                "images that were labelled",
                "image of another size",
            )
        return (height, width)

    def __len__(self) -> int:
        """Number of usable lines."""
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        """The line at `index`.

        Raises:
            ValueError: if the file is no longer what it was.
        """
        index = range(len(self))[index]
        line, entry = self._read(index)
        size = (entry.height, entry.width)
        places = np.flatnonzero(judge(line, size).is_usable)
        if len(places) != entry.num_points:
            raise ValueError(f"{self.files[entry.file]} was changed since it was opened; open the dataset again")
        places = places[np.sort(draw(len(places), self.points_per_image, self.seed, index))]
        return Sample(
            image=self.images / line.image,
            size=size,
            queries=depth_queries(line.points[places].tolist(), line.metres[places].tolist(), places.tolist()),
            id=self._id(entry),
            source=self.name,
            camera=line.camera,
        )

    def _read(self, index: int) -> tuple[Line, _Entry]:
        entry = _Entry(*self._table[index].tolist())
        path = self.files[entry.file]
        with path.open("rb") as file:
            file.seek(entry.start)
            content = file.read(entry.length)
        try:
            return fit(parse_line(content, self.distance, self.span), (entry.height, entry.width)), entry
        except Unusable as error:
            raise ValueError(f"{path}, line at byte {entry.start}: {error}; open the dataset again") from error

    def _id(self, entry: _Entry) -> str:
        name = self._names[entry.name : entry.name + entry.name_length].decode(errors="surrogatepass")
        return name + (f".{entry.repeat}" if entry.repeat > 1 else "")

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, None)`, as points have no masks; reads no file."""
        for row in self._table:
            entry = _Entry(*row.tolist())
            number = min(entry.num_points, self.points_per_image or entry.num_points)
            yield from repeat((self._id(entry), None), number)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and content of each line that is not blank.

    Raises:
        ValueError: if there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"no depth annotations '{path}'; give a JSONL file with one image per line")
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, start, line
            start += len(line)

"""How folders of images and depth maps are laid out: which depth belongs to which image, cameras, units and splits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mmseg_llm.cameras import Distance
from mmseg_llm.data.base import read_json
from mmseg_llm.data.depth.maps import SUFFIXES as DEPTH_SUFFIXES
from mmseg_llm.data.depth.points import SUFFIXES, is_inside
from mmseg_llm.data.depth.records import read_distance

SPLITS = "questions.jsonl"
"""File that says which image belongs to which split, as the synthetic world writes it."""
T = TypeVar("T")


class Pair(NamedTuple):
    """An image and its depth map.

    Attributes:
        name: of the image, unique in its dataset.
        image, depth: paths relative to the root; depth is empty where there is none.
        intrinsics: `(fx, fy, cx, cy)`, None where nobody says.
        metres_per_unit: of this depth map, None where its own file does not say.
        rivals: names of several images, or of several depth maps, that differ by their suffixes only; empty where all is clear.
    """

    name: str
    image: str
    depth: str
    intrinsics: tuple[float, ...] | None = None
    metres_per_unit: float | None = None
    rivals: tuple[str, ...] = ()


class Leftovers(NamedTuple):
    """Numbers of files that belong to no pair: depth maps without an image, and files of unknown kind."""

    orphans: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class Intrinsics:
    """Cameras of a folder.

    Attributes:
        common: `(fx, fy, cx, cy)` of all images without their own, None where there is no such.
        own: by image name.
        distance, metres_per_unit: what the file says of all depth maps, None where it says nothing.
    """

    common: tuple[float, ...] | None = None
    own: Mapping[str, Mapping[str, float]] | None = None
    distance: Distance | None = None
    metres_per_unit: float | None = None

    def of(self, name: str) -> tuple[float, ...] | None:
        """`(fx, fy, cx, cy)` of an image."""
        entry = (self.own or {}).get(name)
        return self.common if entry is None else tuple(entry.get(key, math.nan) for key in ("fx", "fy", "cx", "cy"))


def read_intrinsics(root: Path, given: str | Sequence[float] | None) -> Intrinsics:
    """Cameras from four numbers, or a file: 3x3 `.npy`, or `.json` as the synthetic world writes it.

    Args:
        root: folder that paths are relative to.
        given: None takes `intrinsics.json` or `intrinsics.npy` where it is there.

    Raises:
        ValueError: for a missing or malformed file, or another count of numbers.
    """
    if given is None:
        found = [name for name in ("intrinsics.json", "intrinsics.npy") if (root / name).is_file()]
        if not found:
            return Intrinsics()
        given = found[0]
    if not isinstance(given, str | Path):
        if len(given) != 4:
            raise ValueError(f"intrinsics are {list(given)}; give the four numbers fx, fy, cx, cy, or a file")
        return Intrinsics(common=tuple(float(number) for number in given))
    path = root / given
    if path.suffix.lower() == ".npy":
        return Intrinsics(common=_read_matrix(path))
    content = read_json(path)
    own = content.get("images") if isinstance(content, dict) else None
    if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
        raise ValueError(f"{path} holds no cameras; it needs {{'images': {{file name: {{fx, fy, cx, cy}}}}}}")
    try:
        distance, unit = read_distance(content.get("distance")), content.get("metres_per_unit")
        if unit is not None and not 0 < float(unit) < math.inf:
            raise ValueError(f"metres_per_unit is {unit}; give a positive number")
        return Intrinsics(
            None, own, None if distance == "unspecified" else distance, None if unit is None else float(unit)
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_matrix(path: Path) -> tuple[float, ...]:
    """`(fx, fy, cx, cy)` of a 3x3 matrix."""
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"intrinsics {path} cannot be read ({error}); save a 3x3 matrix") from error
    if matrix.shape != (3, 3) or matrix.dtype.kind not in "iuf" or matrix[2].tolist() != [0, 0, 1]:
        raise ValueError(
            f"{path} holds no camera matrix but {matrix.tolist()}; save [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        )
    return tuple(float(matrix[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))


def pairs_of_list(path: Path) -> list[Pair]:
    """Pairs of an annotation list `{files: [{rgb, depth, cam_in, depth_scale}]}`, `depth_scale` in units per metre.

    Raises:
        ValueError: for a missing or malformed file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("files"), list):
        raise ValueError(f"{path} is no annotation list; it needs {{'files': [{{rgb, depth, cam_in, depth_scale}}]}}")
    pairs: dict[str, Pair] = {}
    for number, entry in enumerate(content["files"]):
        try:
            pair = _pair(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: entry {number} is malformed ({error}); it needs rgb and depth as paths inside the folder, cam_in as "
                "four numbers and depth_scale in units per metre"
            ) from error
        if pair.name in pairs:
            raise ValueError(f"{path}: entry {number} is about '{pair.name}' again; keep one of them")
        pairs[pair.name] = pair
    return list(pairs.values())


def _pair(entry: dict[str, Any]) -> Pair:
    """An entry of an annotation list.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if it is malformed.
    """
    image, depth = entry["rgb"], entry.get("depth") or ""
    if not is_inside(image) or (depth and not is_inside(depth)):
        raise ValueError(f"'{image}' or '{depth}' leads out of the folder")
    camera, scale = entry.get("cam_in"), entry.get("depth_scale")
    numbers = None if camera is None else tuple(float(value) for value in camera)
    if numbers is not None and len(numbers) != 4:
        raise ValueError(f"cam_in is {camera}")
    if scale is not None and not 0 < float(scale) < math.inf:
        raise ValueError(f"depth_scale is {scale}")
    return Pair(image, image, depth, numbers, None if scale is None else 1 / float(scale))


def pairs_of_folders(root: Path, images: str, depth: str) -> tuple[list[Pair], Leftovers]:
    """Pairs of images and depth maps with the same name but for the suffix, sorted, and what is left over; or of one image and
    one map.

    Raises:
        ValueError: if a folder is missing, or holds nothing.
    """
    if (root / images).is_file():
        return [Pair(Path(images).name, images, depth)], Leftovers()
    for folder in (root / images, root / depth):
        if not folder.is_dir():
            raise ValueError(f"the folder '{folder}' does not exist; name the folders of images and of depth maps")
    pictures, unknown_pictures = _files(root / images, SUFFIXES, root / depth)
    maps, unknown_maps = _files(root / depth, DEPTH_SUFFIXES, root / images)
    pairs = []
    for stem, names in pictures.items():
        found = maps.get(stem, [])
        for name in names:
            rivals = tuple(names if len(names) > 1 else found if len(found) > 1 else ())
            pairs.append(Pair(name, f"{images}/{name}", f"{depth}/{found[0]}" if found else "", rivals=rivals))
    if not pairs:
        raise ValueError(f"there is no image in '{root / images}'; known are {', '.join(SUFFIXES)}")
    orphans = sum(len(names) for stem, names in maps.items() if stem not in pictures)
    return sorted(pairs, key=lambda pair: pair.name), Leftovers(orphans, unknown_pictures + unknown_maps)


def _files(folder: Path, suffixes: Sequence[str], other: Path) -> tuple[dict[str, list[str]], int]:
    """Sorted names of the files with such a suffix below a folder by their name without it, and the number of other files. Hidden
    files count for nothing, and neither do those of the other folder if it is inside.
    """
    found: dict[str, list[str]] = {}
    unknown = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_other = other != folder and other.is_relative_to(folder) and path.is_relative_to(other)
        if is_other or path.name.startswith("."):
            continue
        if path.suffix.lower() in suffixes:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        elif path.is_file():
            unknown += 1
    return found, unknown


def select_split(root: Path, pairs: Sequence[Pair], split: str) -> list[Pair]:
    """The pairs whose image belongs to a split.

    Raises:
        ValueError: if nothing says which image belongs to which split, or there is no such split.
    """
    path = root / SPLITS
    if not path.is_file():
        raise ValueError(f"split is '{split}' but there is no {path} that says which image belongs to it; leave it out")
    split_of: dict[Any, Any] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                split_of[record["file_name"]] = record["split"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} has no file_name and split ({error}); write it again"
                ) from error
    known = sorted(set(map(str, split_of.values())))
    if split not in known:
        raise ValueError(f"{path} knows no split '{split}'; use one of {', '.join(known)}")
    return [pair for pair in pairs if split_of.get(pair.name) == split]


def agree(said: T | None, given: T | None, what: str) -> T | None:
    """What a file says or the caller gives, which must not contradict each other.

    Raises:
        ValueError: if they do.
    """
    if said is not None and given is not None and said != given:
        raise ValueError(f"{what} is {given} but the files say {said}; leave the argument out, or mend the files")
    return given if said is None else said

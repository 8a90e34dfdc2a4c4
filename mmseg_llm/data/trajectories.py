"""TrajectoryDataset: recorded clicks as training material of click policies (SegAgent specification section 5).

One sample is one step: an image, the mask so far, what the object is called, and what a good annotator does next.

Legend: H W pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, get_args

from mmseg_llm.clicks import NextClick, Stop, Trajectory
from mmseg_llm.data.base import Faults, SampleDataset
from mmseg_llm.data.segagent import from_official
from mmseg_llm.structures import Query, Sample

Final = Literal["finish", "estimate", "none"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FINISHED = ("iou", "nothing_wrong")
"""Why a trajectory stopped if its last mask is good."""

_SPACE = re.compile(r"[ \t\r\n,]*")
_DECODER = json.JSONDecoder()


class _Entry(NamedTuple):
    """What is known of a trajectory before it is read: its bytes in a file, its image, and its number of samples."""

    file: int
    start: int
    length: int
    image: str
    steps: int
    captions: int
    repeat: int
    has_start: bool


class TrajectoryDataset(SampleDataset):
    """One sample per mask so far; its queries are all captions of the object.

    The plain image, which every trajectory without a start mask begins with, is one sample for all objects of the image
    (`group_first`): it is looked at once, and what tells the objects apart is learnt side by side.

    The query of step k starts from the mask before that step (None where it is empty), and its `next_click` is the click of
    that step with the IoU of the mask it was made on. Sample ids are image ids, query ids
    `<object id>/<caption>/<step>`, with `.2`, `.3`, ... behind the object id where several trajectories have the same.

    Files are read once to find where each trajectory lies; masks are decoded when asked for. Masks and IoUs are those of the
    file: targets in the files that SegAgent released may be drawn thicker than COCO's (specification section 3.2), so its IoUs
    are not comparable with those of REFER masks. Those files do not say either why a trajectory stopped, so no sample of them
    teaches to finish.

    Args:
        trajectories: files of `mmseg-llm data trajectories` (one JSON object per line), or SegAgent's own (`.json`).
        source: the dataset that was clicked on; gives images by sample id.
        images: instead of it, an image folder. A trajectory names its file, its file without suffix, or its COCO id.
        final: what to say of the mask after the last step. `finish`: to stop where the trajectory ended with a good mask,
            otherwise only its IoU; `estimate`: only its IoU; `none`: no such sample.
        repeat_first: how many times the first step comes, which is the one that has to find the object.
        group_first: ask about all objects of an image in one sample where nothing has been clicked yet.
        max_samples: keep the first samples only.
        on_error: `raise` on a malformed trajectory or an unknown image, or `skip` and count it.
        name: by default the stems of the files.

    Raises:
        ValueError: for a missing file, an argument out of range, nothing to offer, or a fault with `on_error='raise'`.
    """

    def __init__(
        self,
        trajectories: Path | list[Path],
        source: SampleDataset | None = None,
        images: Path | None = None,
        *,
        final: Final = "finish",
        repeat_first: int = 1,
        group_first: bool = True,
        max_samples: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        name: str | None = None,
    ) -> None:
        if final not in get_args(Final):
            raise ValueError(f"final is '{final}'; use one of {', '.join(get_args(Final))}")
        if repeat_first < 1:
            raise ValueError(f"repeat_first is {repeat_first}; the first step comes at least once")
        if (source is None) == (images is None):
            raise ValueError("give either the source dataset of the trajectories or the folder of their images")
        self.files = [Path(path) for path in ([trajectories] if isinstance(trajectories, str | Path) else trajectories)]
        if not self.files:
            raise ValueError("trajectories is empty; give at least one file")
        self.name = name or "+".join(dict.fromkeys(path.stem for path in self.files))
        self.source, self.final, self.repeat_first = source, final, repeat_first
        self._pictures = _SourceImages(source) if source is not None else _FolderImages(Path(images or ""))
        faults = Faults(on_error)
        self.skipped = faults.counts
        self._entries = list(self._scan(faults))
        self._items = list(self._arrange(group_first))[:max_samples]
        if not self._items:
            raise ValueError(
                f"{', '.join(map(str, self.files))}: no trajectory can be used, left out are {self.skipped}"
            )

    def _scan(self, faults: Faults) -> Iterator[_Entry]:
        """All trajectories that give samples; the others are reported."""
        seen: dict[tuple[str, str], int] = {}
        for file, path in enumerate(self.files):
            for place, start, length, record in _records(path):
                where = f"{path}, {place}"
                if isinstance(record, Exception):
                    faults.report("malformed trajectory", f"{where}: {record}")
                    continue
                try:
                    image, object_id, steps, captions, has_start = _summary(record)
                except (KeyError, TypeError, ValueError) as error:
                    detail = f"lacks the field {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
                    faults.report("malformed trajectory", f"{where}: the trajectory {detail}")
                    continue
                if not self._pictures.has(image):
                    faults.report("unknown image", f"{where}: {self._pictures.explain(image)}")
                elif not captions:
                    faults.count("without caption")
                elif not steps and (not has_start or self.final == "none"):
                    faults.count("without steps")
                else:
                    repeat = seen[image, object_id] = seen.get((image, object_id), 0) + 1
                    yield _Entry(file, start, length, image, steps, captions, repeat, has_start)

    def _arrange(self, group_first: bool) -> Iterator[tuple[tuple[int, ...], int]]:
        """The samples in order: the trajectories whose objects are asked about, and the step."""
        firsts: dict[str, list[int]] = {}
        for number, entry in enumerate(self._entries):
            if group_first and entry.steps and not entry.has_start:
                firsts.setdefault(entry.image, []).append(number)
        for number, entry in enumerate(self._entries):
            plain = firsts.get(entry.image, [])
            if entry.steps and (entry.has_start or not group_first or plain[0] == number):
                together = tuple(plain) if number in plain else (number,)
                yield from [(together, 0)] * self.repeat_first
            yield from (((number,), step) for step in range(1, entry.steps))
            if self.final != "none":
                yield (number,), entry.steps

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        """The mask at `index`.

        Raises:
            ValueError: if a trajectory is malformed, or does not fit its image.
        """
        numbers, step = self._items[index]
        found = [self._queries(self._entries[number], step) for number in numbers]
        size = found[0][0]
        picture = self._pictures.sample(self._entries[numbers[0]].image, size)
        queries = tuple(query for _, part in found for query in part)
        image = self._entries[numbers[0]].image
        return Sample(picture.image, size, queries, id=image, source=self.name, camera=picture.camera)

    def _queries(self, entry: _Entry, step: int) -> tuple[tuple[int, int], tuple[Query, ...]]:
        """Size of the image, and what is asked about one object."""
        trajectory, local = self._read(entry, step)
        object_id = f"{trajectory.object_id}" + (f".{entry.repeat}" if entry.repeat > 1 else "")
        start = trajectory.mask_before(local)
        captions = trajectory.caption if isinstance(trajectory.caption, tuple) else (trajectory.caption,)
        queries = tuple(
            Query(
                text=caption,
                masks=(trajectory.target,),
                id=f"{object_id}/{number}/{step}",
                start=start if start.area else None,
                next_click=self._label(trajectory, local),
                ignore=trajectory.ignore,
            )
            for number, caption in enumerate(captions)
        )
        return trajectory.size, queries

    def _read(self, entry: _Entry, step: int) -> tuple[Trajectory, int]:
        """A trajectory without all that a step does not need, which spares decoding it, and the place of the step in it."""
        path = self.files[entry.file]
        with path.open("rb") as file:
            file.seek(entry.start)
            content = file.read(entry.length)
        around = slice(max(0, step - 1), step + 1)
        try:
            record = json.loads(content)
            if "clicks_list" in record:
                clicks = sorted(record["clicks_list"], key=lambda click: click["idx"])
                return from_official(record | {"clicks_list": clicks[around]}), min(step, 1)
            part = record | {"steps": record["steps"][around], "rejected": []}
            return Trajectory.from_json(part), min(step, 1)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, trajectory of image '{entry.image}' at byte {entry.start}: {error}; record it again"
            ) from error

    def _label(self, trajectory: Trajectory, step: int) -> NextClick:
        """What a good annotator does at a step."""
        iou = trajectory.iou_before(step)
        if step < len(trajectory.steps):
            return NextClick(trajectory.steps[step].click, iou)
        return NextClick(None, iou, is_finished=self.final == "finish" and trajectory.stop in FINISHED)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, 1)`, without decoding masks."""
        for numbers, _ in self._items:
            for entry in map(self._entries.__getitem__, numbers):
                yield from ((entry.image, 1) for _ in range(entry.captions))


class _SourceImages:
    """Images of a dataset by sample id."""

    def __init__(self, source: SampleDataset) -> None:
        self.source = source
        # A dataset counts its queries without decoding masks. Where it counts as many images as it has samples, they are those.
        ids = [image_id for image_id, _ in groupby(image_id for image_id, _ in source.query_counts())]
        if len(ids) != len(source):
            ids = [sample.id for sample in source]
        self._indices: dict[str, int] = {}
        for index, image_id in enumerate(ids):
            self._indices.setdefault(image_id, index)

    def has(self, image: str) -> bool:
        return image in self._indices

    def explain(self, image: str) -> str:
        return f"image '{image}' is no sample id of {self.source.name}; give the dataset that was clicked on"

    def sample(self, image: str, size: tuple[int, int]) -> Sample:
        sample = self.source[self._indices[image]]
        if sample.id != image or tuple(sample.size) != size:
            raise ValueError(
                f"sample '{sample.id}' of {self.source.name} of size {tuple(sample.size)} (H, W) does not fit the trajectory on "
                f"image '{image}' of size {size}; give the dataset that was clicked on"
            )
        return sample


class _FolderImages:
    """Images of a folder by file name, with or without suffix, or by COCO id."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"the image folder '{folder}' does not exist; give the folder of the image files")
        self.folder = folder
        self._found: dict[str, str] = {}

    def has(self, image: str) -> bool:
        """Whether there is a file; names that lead out of the folder have none."""
        if image not in self._found and _is_inside(image):
            for name in _file_names(image):
                if (self.folder / name).is_file():
                    self._found[image] = name
                    break
        return image in self._found

    def explain(self, image: str) -> str:
        if not _is_inside(image):
            return f"image '{image}' leads out of the folder {self.folder}; name it relative to the folder"
        return f"image '{image}' is not in {self.folder} (tried {', '.join(_file_names(image))})"

    def sample(self, image: str, size: tuple[int, int]) -> Sample:
        return Sample(self.folder / self._found[image], size)


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    return bool(name) and not any(
        path.is_absolute() or path.anchor or ".." in path.parts or "\0" in name
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _file_names(image: str) -> list[str]:
    """What the file of an image may be called."""
    names = [image, *(image + suffix for suffix in SUFFIXES)]
    if re.fullmatch("[0-9]{1,12}", image):
        names += [
            f"COCO_train2014_{int(image):012d}.jpg",
            f"COCO_val2014_{int(image):012d}.jpg",
            f"{int(image):012d}.jpg",
        ]
    return names


def _summary(record: dict[str, Any]) -> tuple[str, str, int, int, bool]:
    """Image, object id, number of steps and of captions, and whether there is a mask before the first step.

    Raises:
        KeyError: for a missing field.
        ValueError, TypeError: for a malformed one.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "clicks_list" in record:
        target, steps, image, start = record["gt_ann"], record["clicks_list"], record["image_name"], None
        ious = [step["iou"] for step in steps]
    else:
        target, steps, image, start = record, record["steps"], record["image"], record["start"]
        ious = [record["start_iou"], *(step["iou"] for step in steps)]
        if record["stop"] not in get_args(Stop):
            raise ValueError(f"stop is '{record['stop']}'; known are {', '.join(get_args(Stop))}")
    for iou in ious:
        if not 0.0 <= iou <= 1.0:
            raise ValueError(f"an IoU of it is {iou}; it must lie in [0, 1]")
    caption = target["caption"]
    captions = len(caption) if isinstance(caption, list) else 1
    return str(image), str(target["object_id"]), len(steps), captions, start is not None


def _records(path: Path) -> Iterator[tuple[str, int, int, Any]]:
    """Place in words, first byte, number of bytes and content of each record; the content of a broken line is its error.

    Raises:
        ValueError: if the file is missing, or a `.json` is no file of SegAgent.
    """
    if not path.is_file():
        raise ValueError(f"no trajectory file '{path}'; write one with mmseg-llm data trajectories")
    if path.suffix == ".json":
        yield from _official_records(path)
        return
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    record = ValueError(f"no valid JSON ({error})")
                yield f"line {number}", start, len(line), record
            start += len(line)


def _official_records(path: Path) -> Iterator[tuple[str, int, int, Any]]:
    """As above, from the list `data` of one JSON object; the rest of the file is passed over."""
    text = path.read_bytes().decode("latin-1")  # one character per byte, and the structure of JSON is plain ASCII
    try:
        at = _skip(text, 0, "{")
        while True:
            key, at = _DECODER.raw_decode(text, _skip(text, at))
            at = _skip(text, at, ":")
            if key == "data":
                break
            _, at = _DECODER.raw_decode(text, _skip(text, at))
        at, number = _skip(text, at, "["), 0
        while text[at := _skip(text, at)] != "]":
            start = at
            _, at = _DECODER.raw_decode(text, start)
            yield f"record {number}", start, at - start, json.loads(text[start:at].encode("latin-1"))
            number += 1
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is no SegAgent trajectory file ({error}); expected an object with the list 'data', and JSON lines in "
            "a file named .jsonl"
        ) from error


def _skip(text: str, at: int, mark: str = "") -> int:
    """Behind white space and commas, and behind `mark`, which has to follow."""
    match = _SPACE.match(text, at)
    assert match is not None
    if not text.startswith(mark, match.end()):
        raise ValueError(f"expected '{mark}' at byte {match.end()}")
    return match.end() + len(mark)

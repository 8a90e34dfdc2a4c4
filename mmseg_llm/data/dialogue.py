"""Conversations about images, with a mask for every `<|seg|>` in an answer (STAMP specification section 5).

Two layouts, as a JSON list or as JSONL, one record each:

    {"id": "7", "image": "a/7.jpg", "masks": [{"size": [480, 640], "counts": "..."}],
     "conversations": [{"from": "human", "value": "<image>\\nWhere is the cat?"}, {"from": "gpt", "value": "Here: <|seg|>"}]}
    {"images": ["a/7.jpg"], "masks": ["a/7_0.png"],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the cat?"}]},
                  {"role": "assistant", "content": "Here: <|seg|>"}]}

The image stands before the first question, wherever its placeholder is.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmseg_llm.data.base import Faults, SampleDataset, read_json
from mmseg_llm.structures import Mask, Query, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mmseg_llm.structures import Size

TRIGGER = "<|seg|>"
PLACEHOLDER = re.compile(r"<image>\n|\n<image>|<image>")
SPEAKERS = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


class _Unfit(Exception):
    """A record that gives no sample: `detail` says what is broken, None that it is left out on purpose."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class _Entry(NamedTuple):
    """One record: turns as `[question, answer]`, one mask as in the file per trigger of all answers."""

    id: str
    image: str
    turns: list[list[str]]
    masks: list[Any]


class _Store:
    """Entries in one string of bytes, which the workers of a loader share; reading a list's objects would copy it to each."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._bytes, ends = bytearray(), [0]
        for entry in entries:
            self._bytes += json.dumps(entry).encode()
            ends.append(len(self._bytes))
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> _Entry:
        return _Entry(*json.loads(self._bytes[self._ends[index] : self._ends[index + 1]]))


class DialogueDataset(SampleDataset):
    """One sample per conversation, one `chat` query per answer with the turns before it as its history.

    Records without an image or with several are left out and counted in `skipped`. Images and masks are opened when a sample is
    asked for. Masks are COCO RLEs, lists of polygons (an empty list: nothing) or 8-bit PNGs of 0 and 255, of the image's size.
    Sample ids are image paths, query ids `<record id>-<turn>` (`<record id>.2-<turn>`, ... where a file repeats an id).

    Args:
        path: JSON or `.jsonl`.
        images: folder that image paths are relative to.
        masks: folder that paths of masks are relative to; `images` when None.
        turns: ask for `all` answers of a conversation, or for its `last` one only.
        max_samples: keep the first samples only.
        on_error: `raise` on a broken record, or `skip` and count it.
        check_files: look for the image and mask files at once; a missing one is a broken record.
        name: by default the stem of `path`.

    Raises:
        ValueError: if the file is missing or malformed, or a record is broken; names file and record.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path,
        *,
        masks: str | Path | None = None,
        turns: Literal["all", "last"] = "all",
        max_samples: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        check_files: bool = False,
        name: str | None = None,
    ) -> None:
        if turns not in {"all", "last"}:
            raise ValueError(f"turns is '{turns}'; use 'all' or 'last'")
        self.path, self.images = Path(path), Path(images)
        self.masks = self.images if masks is None else Path(masks)
        self.name = name or self.path.stem
        self.turns, self.check_files = turns, check_files
        faults = Faults(on_error)
        self.skipped = faults.counts
        self._store = _Store(self._entries(faults))
        self._length = len(self._store) if max_samples is None else min(max_samples, len(self._store))

    def _entries(self, faults: Faults) -> Iterator[_Entry]:
        """All sound records; the others are reported."""
        seen: dict[str, int] = {}
        for position, record in enumerate(_records(self.path)):
            given = record.get("id") if isinstance(record, dict) else None
            record_id = f"number {position}" if given is None else str(given)
            try:
                entry = self._entry(record, str(position) if given is None else record_id)
            except _Unfit as unfit:
                if unfit.detail is None:
                    faults.count(unfit.reason)
                else:
                    faults.report(unfit.reason, f"{self.path}: record {record_id}: {unfit.detail}")
                continue
            seen[entry.id] = seen.get(entry.id, 0) + 1
            yield entry if seen[entry.id] == 1 else entry._replace(id=f"{entry.id}.{seen[entry.id]}")

    def _entry(self, record: Any, record_id: str) -> _Entry:
        """Check a record. Raises: _Unfit."""
        if not isinstance(record, dict):
            raise _Unfit("no record", "it is not a JSON object")
        messages = record.get("conversations") or record.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise _Unfit("no conversation", "it has no turns under 'conversations' (LLaVA) or 'messages' (typed chat)")
        image = _image(record, messages)
        turns = _turns(messages)
        masks = _masks(record.get("masks"), sum(answer.count(TRIGGER) for _, answer in turns))
        for root, name in [(self.images, image), *((self.masks, mask) for mask in masks if isinstance(mask, str))]:
            _check_path(root, name, self.check_files)
        return _Entry(record_id, image, turns, masks)

    def __len__(self) -> int:
        """Number of conversations."""
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The conversation at `index`.

        Raises:
            ValueError: if its image or one of its masks is missing, damaged or does not fit.
        """
        entry = self._store[range(len(self))[index]]
        where = f"{self.path}: record {entry.id}"
        image = self.images / entry.image
        size = _image_size(image, where)
        queries = []
        for turn, specs in self._asked(entry):
            question, answer = entry.turns[turn]
            queries.append(
                Query(
                    text=question,
                    masks=tuple(self._mask(spec, size, where) for spec in specs) or None,
                    id=f"{entry.id}-{turn}",
                    task="chat",
                    answer=answer,
                    history=tuple((earlier[0], earlier[1]) for earlier in entry.turns[:turn]),
                )
            )
        return Sample(image=image, size=size, queries=tuple(queries), id=entry.image, source=self.name)

    def _asked(self, entry: _Entry) -> Iterator[tuple[int, list[Any]]]:
        """Each turn that is asked for, with the masks of its triggers."""
        start = 0
        for turn, (_, answer) in enumerate(entry.turns):
            stop = start + answer.count(TRIGGER)
            if self.turns == "all" or turn == len(entry.turns) - 1:
                yield turn, entry.masks[start:stop]
            start = stop

    def _mask(self, spec: Any, size: Size, where: str) -> Mask:
        """Read one mask of an image of `size`."""
        if isinstance(spec, str):
            return _mask_file(self.masks / spec, size, where)
        try:
            return Mask.from_coco(spec, size) if spec else Mask.empty(size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per answer: `(image path, number of masks)`, None where it has no trigger; opens no file."""
        for index in range(len(self)):
            entry = self._store[index]
            for _, specs in self._asked(entry):
                yield entry.image, sum(spec != [] for spec in specs) if specs else None


def _records(path: Path) -> Iterator[Any]:
    """The records of a JSON or JSONL file."""
    if path.suffix != ".jsonl":
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path} is not a list of conversations; give a JSON list, or name a JSONL file .jsonl")
        yield from content
        return
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the dataset folder")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}: line {number} is not valid JSON ({error}); export it again") from error


def _image(record: dict[str, Any], messages: Sequence[dict[str, Any]]) -> str:
    """The path of the record's only image, which typed messages may hold themselves. Raises: _Unfit."""
    paths = record.get("images") or record.get("image")
    if not paths:
        parts = [part for message in messages for part in _parts(message) if isinstance(part, dict)]
        paths = [part["image"] for part in parts if part.get("image")]
    paths = paths if isinstance(paths, list) else [paths]
    if len(paths) != 1:
        raise _Unfit("several images" if paths else "no image")
    if not isinstance(paths[0], str):
        raise _Unfit("image path", f"its image is {str(paths[0])[:40]!r}, give the path of a file")
    return paths[0]


def _parts(message: dict[str, Any]) -> list[Any]:
    """What a turn consists of: strings, or typed parts."""
    content = message.get("value", message.get("content"))
    return content if isinstance(content, list) else [content]


def _turns(messages: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Messages as `[question, answer]` pairs without placeholders. Raises: _Unfit."""
    texts: list[str] = []
    placeholders = 0
    for place, message in enumerate(messages):
        speaker = message.get("from", message.get("role"))
        if SPEAKERS.get(str(speaker)) != place % 2:
            detail = f"its turn {place} is by '{speaker}', but user and assistant have to alternate, the user first"
            raise _Unfit("order of turns", detail)
        text, images = _text(message)
        placeholders += images
        if place % 2 == 0:
            text, images = PLACEHOLDER.subn("", text)
            placeholders += images
        if not text.strip():
            raise _Unfit("empty turn", f"its turn {place} has no text")
        texts.append(text.strip())
    if placeholders > 1:
        raise _Unfit("several images")
    if len(texts) % 2 or not texts:
        raise _Unfit("no answer", "its last question has no answer")
    return [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def _text(message: dict[str, Any]) -> tuple[str, int]:
    """The text of a turn and the number of its typed images. Raises: _Unfit."""
    text, images = "", 0
    for part in _parts(message):
        typed = part if isinstance(part, dict) else {"text": part}
        if isinstance(typed.get("text"), str):
            text += typed["text"]
        elif typed.get("type") == "image" or typed.get("image"):
            images += 1
        else:
            raise _Unfit("unknown content", f"it has the content {str(part)[:40]!r}, which is neither text nor image")
    return text, images


def _masks(masks: Any, count: int) -> list[Any]:
    """The masks of a record, one for each of `count` triggers. Raises: _Unfit."""
    masks = [] if masks is None else masks
    if not isinstance(masks, list) or len(masks) != count:
        given = len(masks) if isinstance(masks, list) else f"{str(masks)[:40]!r} as"
        detail = f"it has {given} masks for {count} {TRIGGER} in its answers, give one per trigger, in their order"
        raise _Unfit("number of masks", detail)
    for mask in masks:
        is_polygons = isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)
        if not is_polygons and not isinstance(mask, (str, dict)):
            detail = f"its mask {str(mask)[:40]!r} is no RLE, no list of polygons and no path of a PNG"
            raise _Unfit("unknown mask", detail)
    return masks


def _check_path(root: Path, name: str, must_exist: bool) -> None:
    """Refuse a path that leads out of its folder (links within the folder are its owner's affair). Raises: _Unfit."""
    inside = "\0" not in name
    if inside and (".." in name or Path(name).is_absolute()):  # the others cannot leave it, which saves time
        top = Path(os.path.normpath(root.absolute()))
        inside = Path(os.path.normpath(top / name)).is_relative_to(top)
    if not inside:
        raise _Unfit("path outside", f"the path {name!r} leads out of the folder {root}, give one relative to it")
    if must_exist and not (root / name).is_file():
        raise _Unfit("missing file", f"{root / name} does not exist")


def _open(path: Path, where: str) -> Image.Image:
    """Open an image file; only its header is read."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise ValueError(f"{where}: {path} does not exist; check the folder, or pass check_files=True") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"{where}: {path} cannot be decoded ({error}); replace the file") from error


def _image_size(path: Path, where: str) -> Size:
    """`(H, W)` of an image file."""
    with _open(path, where) as image:
        return (image.height, image.width)


def _mask_file(path: Path, size: Size, where: str) -> Mask:
    """Read a mask image and check that nothing but 0 and 255 is in it."""
    with _open(path, where) as image:
        if (image.height, image.width) != size:
            raise ValueError(
                f"{where}: the mask {path} is {image.height}x{image.width} (HxW) but its image {size[0]}x{size[1]}; "
                "save it at the size of the image"
            )
        if image.mode not in {"L", "1"}:
            raise ValueError(f"{where}: the mask {path} has the mode {image.mode}; save it as 8-bit gray, 0 and 255")
        try:
            values = np.asarray(image.convert("L"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{where}: {path} cannot be decoded ({error}); replace the file") from error
    strange = values[(values != 0) & (values != 255)]
    if strange.size:
        raise ValueError(
            f"{where}: the mask {path} has the value {strange[0]}; masks are 0 outside and 255 inside, so multiply one of 0 "
            "and 1 by 255 and threshold any other"
        )
    return Mask.from_array(values)

"""Files of trajectories that are written image by image, and that a later call goes on with.

All lines of an image are written at once and say how many they are (`lines_of_image`), so an image that was left in the middle is
told from a finished one. Beside `x.jsonl`, `x.jsonl.rules.json` says how its lines are made: a call with other rules is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmseg_llm.clicks import Trajectory
from mmseg_llm.data.base import SampleDataset, Subset
from mmseg_llm.records import write_json

COUNT = "lines_of_image"
"""Field of a line: how many there are of its image."""
_FIELDS = (
    "image",
    "object_id",
    "caption",
    "stop",
    "target",
    "ignore",
    "start",
    "start_iou",
    "given",
    "steps",
    "rejected",
)


class TrajectoryFile:
    """A file of trajectories, opened to write what it does not hold yet. What was left in the middle is taken away.

    Args:
        path: JSONL file; its folder is made.
        rules: how its lines are made, for JSON.

    Attributes:
        images: that are finished.
        num_lines: of them.

    Raises:
        ValueError: for a file that is damaged, was not written by this class, or holds what other rules made.
    """

    def __init__(self, path: Path, rules: dict[str, Any]) -> None:
        self.path, self.rules_path = path, path.with_name(f"{path.name}.rules.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.images, self.num_lines, end = _finished(path)
        rules = json.loads(json.dumps(rules))
        if path.is_file() and path.stat().st_size:
            self._check(rules)
            os.truncate(path, end)
        else:
            write_json(self.rules_path, rules)
            path.touch()

    def append(self, lines: str) -> None:
        """Write what `to_lines` made of an image."""
        with self.path.open("ab") as file:
            file.write(lines.encode("utf-8"))

    def _check(self, rules: dict[str, Any]) -> None:
        remedy = f"give another output, or delete {self.path} to start again"
        if not self.rules_path.is_file():
            raise ValueError(
                f"{self.path} is there already, but {self.rules_path.name} is not, so nothing says how it was made; {remedy}"
            )
        try:
            before = _flat(json.loads(self.rules_path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{self.rules_path} is damaged ({error}); {remedy}") from error
        now = _flat(rules)
        changes = [
            f"{name} was {_short(before.get(name))} and is {_short(now.get(name))} now"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
        if changes:
            raise ValueError(f"{self.path} was begun with other rules: {'; '.join(changes)}; {remedy}")


def to_lines(trajectories: Sequence[Trajectory]) -> str:
    """The lines of all trajectories of an image."""
    count = {COUNT: len(trajectories)}
    return "".join(json.dumps(t.to_json() | count, ensure_ascii=False) + "\n" for t in trajectories)


def whole_name(dataset: SampleDataset) -> str:
    """Name of a dataset, whose first samples may be all that is asked for: a later call may go on to more of them."""
    return whole_name(dataset.dataset) if isinstance(dataset, Subset) else dataset.name


def _finished(path: Path) -> tuple[set[str], int, int]:
    """Images all of whose lines are there, the number of these lines, and the byte behind the last of them.

    Raises:
        ValueError: for a line that is none of `to_lines`, with its number.
    """
    images: set[str] = set()
    if not path.is_file():
        return images, 0, 0
    image, seen, expected, end, at, finished = "", 0, 0, 0, 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # written in part
            try:
                found, count = _head(line)
                if seen == expected:
                    image, seen, expected = found, 0, count
                elif (found, count) != (image, expected):
                    raise ValueError(
                        f"line {seen + 1} of {expected} of image '{image}' is missing; the file was changed"
                    )
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            seen, at = seen + 1, at + len(line)
            if seen == expected:
                images.add(image)
                end, finished = at, number
    return images, finished, end


def _head(line: bytes) -> tuple[str, int]:
    """Image of a line and how many lines it has; masks stay as they are."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a trajectory record is a JSON object, this is {type(record).__name__}")
    for name in (*_FIELDS, COUNT):
        if name not in record:
            raise ValueError(f"trajectory record lacks the field '{name}'; go on with files of this very command only")
    count = record[COUNT]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{COUNT} is {count!r}; it must be a number from 1 on")
    return str(record["image"]), count


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """Values of nested dicts by dotted name."""
    if not isinstance(content, dict):
        return {name or "content": content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found

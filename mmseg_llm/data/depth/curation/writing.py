"""Where curated records go: a JSONL file that a later call goes on with, and the statistics beside it.

Beside `x.jsonl`, `x.jsonl.rules.json` says how its lines are made, and a call with other rules is refused;
`x.jsonl.stats.json` says what is in it. While it is open the file is locked, where the system can do that.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mmseg_llm.data.depth.records import DepthRecord

_STEP = 1.005  # quantiles are good to half a per cent
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Depths:
    """Count and quantiles of metres that are never all in memory: a histogram with bins of half a per cent."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count, self.low, self.high = 0, math.inf, 0.0

    def add(self, metres: tuple[float, ...]) -> None:
        """Count the metres of a record."""
        values = np.asarray(metres)
        bins, counts = np.unique(np.floor(np.log(values) / math.log(_STEP)).astype(int), return_counts=True)
        for place, count in zip(bins.tolist(), counts.tolist()):
            self._counts[place] = self._counts.get(place, 0) + count
        self.count += len(values)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    def summary(self) -> dict[str, float]:
        """Least, quantiles and most; empty without points."""
        if not self.count:
            return {}
        places = sorted(self._counts)
        reached = np.cumsum([self._counts[place] for place in places])
        found = {"min": self.low}
        for share in QUANTILES:
            place = places[int(np.searchsorted(reached, share * self.count))]
            middle = _STEP ** (place + 0.5)
            found[f"{share:g}"] = round(min(max(middle, self.low), self.high), 4)
        return found | {"max": self.high}


class RecordFile:
    """A JSONL file of depth records, opened to write what it does not hold yet, by one process at a time; a context manager. A
    line that was written in part is taken away.

    Args:
        path: JSONL file; its folder is made.
        rules: how its lines are made, for JSON.

    Attributes:
        images, scenes: of the records that are there.
        depths: what they hold.

    Raises:
        ValueError: for a file that is damaged, that another process writes, or whose rules are unknown or others.
    """

    def __init__(self, path: Path, rules: dict[str, Any]) -> None:
        self.path, self.rules_path = path, path.with_name(f"{path.name}.rules.json")
        self.images: set[str] = set()
        self.scenes: set[str] = set()
        self.depths = Depths()
        path.parent.mkdir(parents=True, exist_ok=True)
        rules = json.loads(json.dumps(rules))
        self._file = path.open("ab")
        try:
            if not _lock(self._file):
                raise ValueError(f"{path} is being written by another process; wait for it, or give another output")
            if path.stat().st_size:
                self._check(rules)
                os.truncate(path, self._scan())
            else:
                replace_file(self.rules_path, json.dumps(rules, indent=2).encode())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RecordFile:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and let others write it; one without records is taken away."""
        if not self.images:
            self.path.unlink(missing_ok=True)
            self.rules_path.unlink(missing_ok=True)
        self._file.close()

    def append(self, record: DepthRecord) -> None:
        """Write one record."""
        line = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        self._count(record)

    def _count(self, record: DepthRecord) -> None:
        self.images.add(record.image)
        self.scenes.add(record.scene_id)
        self.depths.add(record.depth)

    def _scan(self) -> int:
        """Count the records that are there; gives the byte behind the last whole line."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # written in part
                try:
                    record = DepthRecord.from_json(json.loads(line))
                    if record.image in self.images:
                        raise ValueError(f"image '{record.image}' is there twice")
                    self._count(record)
                except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
                    raise ValueError(f"{self.path}, line {number}: {error}; {self._remedy()}") from error
                end += len(line)
        return end

    def _check(self, rules: dict[str, Any]) -> None:
        if not self.rules_path.is_file():
            raise ValueError(
                f"{self.path} is there already, but {self.rules_path.name} is not, so nothing says how it was made; "
                f"{self._remedy()}"
            )
        try:
            before = dict(json.loads(self.rules_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.rules_path} is damaged ({error}); {self._remedy()}") from error
        changes = [
            f"{name} was {before.get(name)!r} and is {rules.get(name)!r} now"
            for name in dict.fromkeys([*before, *rules])
            if before.get(name) != rules.get(name)
        ]
        if changes:
            raise ValueError(f"{self.path} was begun with other rules: {'; '.join(changes)}; {self._remedy()}")

    def _remedy(self) -> str:
        return f"give another output, or delete {self.path} to start again"


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False if another process has. True where system or file system know no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is never seen half written; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)

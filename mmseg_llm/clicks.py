"""Clicks and what they led to: the nouns of interactive segmentation, recorded and predicted, and their JSON forms.

Legend: H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mmseg_llm.masks import Mask, Size

Stop = Literal["iou", "max_clicks", "low_gain", "nothing_wrong", "unknown"]


@dataclass(frozen=True)
class Click:
    """A click of an annotator or a policy on a pixel of the original image: on the object, or on what is no part of it."""

    row: int
    col: int
    is_positive: bool


@dataclass(frozen=True)
class ClickStep:
    """A click, the mask after it, and that mask's IoU with the target."""

    click: Click
    mask: Mask
    iou: float


@dataclass(frozen=True)
class NextClick:
    """The label of a mask so far: what a good annotator does next.

    Attributes:
        click: the best next click; None where none helps.
        iou: of the mask so far, 0 to 1.
        is_finished: whether the mask is good enough to stop; without it and without a click only the IoU is learnt.
    """

    click: Click | None
    iou: float
    is_finished: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError for an IoU out of range, or both a click and the finish."""
        if not 0.0 <= self.iou <= 1.0:
            raise ValueError(f"iou is {self.iou}; it must lie in [0, 1]")
        if self.is_finished and self.click is not None:
            raise ValueError(f"a label is either a click or the finish; leave out {self.click} or is_finished")


@dataclass(frozen=True)
class PolicyStep:
    """A mask within an episode of a policy, and what the policy said on seeing it.

    Attributes:
        click: that led here; None for the mask an episode starts with.
        mask: empty or given at the start.
        text: what the policy said; empty where it was not asked any more.
        estimate: what it takes the IoU of this mask for, 0 to 1; None where it did not say.
        status: how its words were read (`heads.click_policy.text.Status`); empty where it was not asked.
    """

    click: Click | None
    mask: Mask
    text: str = ""
    estimate: float | None = None
    status: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {
            "click": None if self.click is None else asdict(self.click),
            "mask": self.mask.to_coco(),
            "text": self.text,
            "estimate": self.estimate,
            "status": self.status,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], size: Size) -> PolicyStep:
        """Inverse of `to_json`, for an image of `(H, W)`.

        Raises:
            ValueError: if a field is missing or the mask has another size.
        """
        try:
            return cls(
                click=None if record["click"] is None else _click_from_json(record["click"]),
                mask=Mask.from_coco(record["mask"], size),
                text=record["text"],
                estimate=record["estimate"],
                status=record["status"],
            )
        except KeyError as error:
            raise ValueError(f"step of an episode lacks the field {error}; write it with PolicyStep.to_json") from error


@dataclass(frozen=True)
class Trajectory:
    """The clicks that improved the mask of one object; what a policy sees before step k is `mask_before(k)`.

    Attributes:
        target: the object.
        steps: clicks that improved the mask, in order.
        rejected: clicks that did not, with the masks they gave; not part of the episode.
        start: mask before the first step, empty unless clicks were given.
        start_iou: its IoU with the target.
        given: clicks that led to `start`.
        ignore: pixels that no IoU counts.
        stop: why it ended: IoU reached, clicks used up, a click without gain, nothing wrong any more; `unknown` when read
            from a file that does not say.
        image: name of the image, or its COCO id.
        object_id: of the object within its dataset.
        caption: what the object is called; several for datasets with several expressions for one object.
    """

    target: Mask
    steps: tuple[ClickStep, ...]
    rejected: tuple[ClickStep, ...] = ()
    start: Mask | None = None
    start_iou: float = 0.0
    given: tuple[Click, ...] = ()
    ignore: Mask | None = None
    stop: Stop = "unknown"
    image: int | str = ""
    object_id: int | str = 0
    caption: str | tuple[str, ...] = ""

    @property
    def size(self) -> tuple[int, int]:
        """`(H, W)` of the image."""
        return self.target.size

    @property
    def iou(self) -> float:
        """IoU of the last mask."""
        return self.steps[-1].iou if self.steps else self.start_iou

    def mask_before(self, index: int) -> Mask:
        """The mask that step `index` was clicked on; `len(steps)` gives the last mask.

        Raises:
            ValueError: for a step that does not exist.
        """
        if not 0 <= index <= len(self.steps):
            raise ValueError(f"step {index} of a trajectory of {len(self.steps)} steps; use 0 to {len(self.steps)}")
        if index:
            return self.steps[index - 1].mask
        return Mask.empty(self.size) if self.start is None else self.start

    def iou_before(self, index: int) -> float:
        """IoU of `mask_before(index)`, for the same steps."""
        self.mask_before(index)
        return self.steps[index - 1].iou if index else self.start_iou

    def to_json(self) -> dict[str, Any]:
        """A plain dict for JSON, from which `from_json` restores everything; masks as COCO RLE."""
        return {
            "image": self.image,
            "object_id": self.object_id,
            "caption": list(self.caption) if isinstance(self.caption, tuple) else self.caption,
            "stop": self.stop,
            "target": self.target.to_coco(),
            "ignore": None if self.ignore is None else self.ignore.to_coco(),
            "start": None if self.start is None else self.start.to_coco(),
            "start_iou": self.start_iou,
            "given": [asdict(click) for click in self.given],
            "steps": [_step_to_json(step) for step in self.steps],
            "rejected": [_step_to_json(step) for step in self.rejected],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trajectory:
        """Inverse of `to_json`.

        Raises:
            ValueError: if a field is missing, unknown or of another type, or a mask has another size than the target.
        """
        if not isinstance(record, dict):
            raise ValueError(
                f"a trajectory record is a JSON object, this is {type(record).__name__}; write it with Trajectory.to_json"
            )
        try:
            size = (int(record["target"]["size"][0]), int(record["target"]["size"][1]))
            caption = record["caption"]
            if record["stop"] not in get_args(Stop):
                raise ValueError(f"stop is '{record['stop']}'; known are {', '.join(get_args(Stop))}")
            return cls(
                target=Mask.from_coco(record["target"], size),
                steps=tuple(_step_from_json(step, size) for step in record["steps"]),
                rejected=tuple(_step_from_json(step, size) for step in record["rejected"]),
                start=None if record["start"] is None else Mask.from_coco(record["start"], size),
                start_iou=float(record["start_iou"]),
                given=tuple(_click_from_json(click) for click in record["given"]),
                ignore=None if record["ignore"] is None else Mask.from_coco(record["ignore"], size),
                stop=record["stop"],
                image=record["image"],
                object_id=record["object_id"],
                caption=tuple(caption) if isinstance(caption, list) else caption,
            )
        except KeyError as error:
            raise ValueError(f"trajectory record lacks the field {error}; write it with Trajectory.to_json") from error
        except (TypeError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"a field of the trajectory record is damaged ({error}); write it with Trajectory.to_json"
            ) from error


def write_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one JSON object per line."""
    with Path(path).open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(json.dumps(trajectory.to_json(), ensure_ascii=False) + "\n")


def read_trajectories(path: str | Path) -> Iterator[Trajectory]:
    """Read what `write_trajectories` wrote, one at a time.

    Raises:
        ValueError: for a line that is none, with its number.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Trajectory.from_json(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _step_to_json(step: ClickStep) -> dict[str, Any]:
    return {"click": asdict(step.click), "mask": step.mask.to_coco(), "iou": step.iou}


def _step_from_json(step: dict[str, Any], size: tuple[int, int]) -> ClickStep:
    return ClickStep(_click_from_json(step["click"]), Mask.from_coco(step["mask"], size), float(step["iou"]))


def _click_from_json(click: dict[str, Any]) -> Click:
    return Click(int(click["row"]), int(click["col"]), bool(click["is_positive"]))

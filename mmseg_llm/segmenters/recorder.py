"""record: what the click oracle does to an object, step by step, as training material for click policies
(SegAgent specification section 3.2).

Source: SegAgent (CVPR 2025, arXiv 2503.08625); the defaults and the break at the first click without gain are those of its
released script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.oracle import ClickRule, next_click
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.segmenters.environment import Environment, Observation

LowGain = Literal["break", "discard"]
Stop = Literal["iou", "max_clicks", "low_gain", "nothing_wrong", "unknown"]


@dataclass(frozen=True)
class TrajectoryStep:
    """A click, the mask after it, and that mask's IoU with the target."""

    click: Click
    mask: Mask
    iou: float


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
    steps: tuple[TrajectoryStep, ...]
    rejected: tuple[TrajectoryStep, ...] = ()
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
            ValueError: if a field is missing or unknown, or a mask has another size than the target.
        """
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


def record(
    environment: Environment,
    image: Image.Image,
    target: Mask | np.ndarray,
    *,
    ignore: Mask | np.ndarray | None = None,
    max_clicks: int = 20,
    iou_threshold: float = 0.98,
    min_gain: float = 0.0,
    on_low_gain: LowGain = "break",
    rule: ClickRule = "official",
    given: Sequence[Click] = (),
) -> Trajectory:
    """Let the oracle click until the mask is good, the clicks are used up, or a click brings too little.

    Name, id and caption of the object are for the caller to add (`dataclasses.replace`).

    Args:
        environment: segmenter; left where the last click led, discarded ones undone.
        image: RGB.
        target: bool `(H, W)` or mask at image size.
        ignore: likewise, pixels that count neither for the oracle nor for the IoU.
        max_clicks: most clicks of the oracle, discarded ones included.
        iou_threshold: stop at a mask of this IoU, once it is the best so far.
        min_gain: the IoU must exceed the best so far by more than this.
        on_low_gain: a click that gains too little ends the trajectory (`break`, as the released code does), or is undone
            and its pixel not clicked again (`discard`, as the paper says).
        rule: of the oracle, see `next_click`.
        given: clicks made before the oracle takes over.

    Raises:
        ValueError: for a target without pixels, masks of another size than the image, or an argument out of range.
    """
    rules = _Rules(max_clicks, iou_threshold, min_gain, on_low_gain, rule)
    size = (image.height, image.width)
    wanted = _as_array("target", target, size)
    ignored = np.zeros(size, bool) if ignore is None else _as_array("ignore", ignore, size)
    if not (wanted & ~ignored).any():
        raise ValueError("the target has no pixels outside of what is ignored, so no IoU exists; skip this sample")
    shown = environment.reset(image)
    for click in given:
        shown = environment.step(click)
    tried, stop = _click_on(environment, shown, wanted, ignored, rules)
    return Trajectory(
        target=Mask.from_array(wanted),
        steps=tuple(tried[True]),
        rejected=tuple(tried[False]),
        start=Mask.from_array(shown.mask) if given else None,
        start_iou=_iou(wanted, shown.mask, ignored),
        given=tuple(given),
        ignore=None if ignore is None else Mask.from_array(ignored),
        stop=stop,
    )


@dataclass(frozen=True)
class _Rules:
    """Arguments of `record` that say when to stop."""

    max_clicks: int
    iou_threshold: float
    min_gain: float
    on_low_gain: LowGain
    rule: ClickRule

    def __post_init__(self) -> None:
        if self.max_clicks < 1 or self.min_gain < 0 or self.on_low_gain not in get_args(LowGain):
            raise ValueError(
                f"max_clicks={self.max_clicks}, min_gain={self.min_gain}, on_low_gain='{self.on_low_gain}'; "
                f"use at least 1, at least 0, and one of {', '.join(get_args(LowGain))}"
            )


def _click_on(
    environment: Environment, shown: Observation, wanted: np.ndarray, ignored: np.ndarray, rules: _Rules
) -> tuple[dict[bool, list[TrajectoryStep]], Stop]:
    """The oracle's clicks from what is shown on, by whether they gained, and why they ended."""
    best, used = _iou(wanted, shown.mask, ignored), list(shown.clicks)
    tried: dict[bool, list[TrajectoryStep]] = {True: [], False: []}
    for _ in range(rules.max_clicks):
        click = next_click(wanted, shown.mask, ignore=ignored, clicked=used, rule=rules.rule)
        if click is None:
            return tried, "nothing_wrong"
        used.append(click)
        before = environment.snapshot()
        after = environment.step(click)
        iou = _iou(wanted, after.mask, ignored)
        gained = iou > best + rules.min_gain
        tried[gained].append(TrajectoryStep(click, Mask.from_array(after.mask), iou))
        if gained:
            shown, best = after, iou
            if iou >= rules.iou_threshold:
                return tried, "iou"
        elif rules.on_low_gain == "break":
            return tried, "low_gain"
        else:
            environment.restore(before)
    return tried, "max_clicks"


def to_official(trajectory: Trajectory) -> dict[str, Any]:
    """The record of SegAgent's released trajectory files; boxes are `[x, y, width, height]`, `coor` is row and column.

    What the schema has no place for is left out: rejected and given clicks, the start, ignored pixels.
    """
    height, width = trajectory.size
    caption = trajectory.caption
    return {
        "image_name": trajectory.image,
        "height": height,
        "width": width,
        "gt_ann": {
            "object_id": trajectory.object_id,
            "caption": list(caption) if isinstance(caption, tuple) else caption,
            "segmentation": trajectory.target.to_coco(),
            "bbox": _coco_box(trajectory.target),
            "area": trajectory.target.area,
        },
        "clicks_list": [
            {
                "idx": index,
                "coor": [step.click.row, step.click.col],
                "is_positive": step.click.is_positive,
                "mask": step.mask.to_coco(),
                "box": _coco_box(step.mask),
                "area": step.mask.area,
                "iou": step.iou,
            }
            for index, step in enumerate(trajectory.steps)
        ],
    }


def from_official(record: dict[str, Any]) -> Trajectory:
    """Inverse of `to_official`; boxes, areas and IoUs are taken as they are and not checked against the masks.

    Raises:
        ValueError: if a field is missing, or a mask has another size than the image.
    """
    try:
        size, target = (int(record["height"]), int(record["width"])), record["gt_ann"]
        caption = target["caption"]
        steps = tuple(
            TrajectoryStep(
                Click(int(step["coor"][0]), int(step["coor"][1]), bool(step["is_positive"])),
                Mask.from_coco(step["mask"], size),
                float(step["iou"]),
            )
            for step in sorted(record["clicks_list"], key=lambda step: step["idx"])
        )
        return Trajectory(
            target=Mask.from_coco(target["segmentation"], size),
            steps=steps,
            image=record["image_name"],
            object_id=target["object_id"],
            caption=tuple(caption) if isinstance(caption, list) else caption,
        )
    except KeyError as error:
        raise ValueError(f"SegAgent trajectory record lacks the field {error}") from error


def write_official(path: str | Path, trajectories: Iterable[Trajectory], args: dict[str, Any] | None = None) -> None:
    """Write a file as SegAgent releases them, `args` being the settings they were recorded with."""
    data = {"info": {"args": args or {}}, "data": [to_official(trajectory) for trajectory in trajectories]}
    Path(path).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def read_official(path: str | Path) -> list[Trajectory]:
    """Read a trajectory file of SegAgent.

    Raises:
        ValueError: if it is none, or one of its records is malformed (with its index).
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f"{path} is no SegAgent trajectory file; expected an object with the list 'data'")
    trajectories = []
    for index, entry in enumerate(content["data"]):
        try:
            trajectories.append(from_official(entry))
        except ValueError as error:
            raise ValueError(f"{path}, record {index}: {error}") from error
    return trajectories


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


def _iou(target: np.ndarray, mask: np.ndarray, ignored: np.ndarray) -> float:
    """IoU of bool arrays `(H, W)` over what is not ignored; the target is not empty there."""
    return float((target & mask & ~ignored).sum() / ((target | mask) & ~ignored).sum())


def _as_array(name: str, mask: Mask | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    array = mask.array if isinstance(mask, Mask) else np.asarray(mask)
    if array.shape != size:
        raise ValueError(f"{name} of shape {array.shape} does not fit the image of size {size} (H, W)")
    return array.astype(bool)


def _coco_box(mask: Mask) -> list[float]:
    x1, y1, x2, y2 = mask.box or (0.0, 0.0, 0.0, 0.0)
    return [x1, y1, x2 - x1, y2 - y1]


def _step_to_json(step: TrajectoryStep) -> dict[str, Any]:
    return {"click": asdict(step.click), "mask": step.mask.to_coco(), "iou": step.iou}


def _step_from_json(step: dict[str, Any], size: tuple[int, int]) -> TrajectoryStep:
    return TrajectoryStep(_click_from_json(step["click"]), Mask.from_coco(step["mask"], size), float(step["iou"]))


def _click_from_json(click: dict[str, Any]) -> Click:
    return Click(int(click["row"]), int(click["col"]), bool(click["is_positive"]))

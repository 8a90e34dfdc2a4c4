"""record: what the click oracle does to an object, step by step, as training material for click policies
(SegAgent specification section 3.2).

Source: SegAgent (CVPR 2025, arXiv 2503.08625); the defaults and the break at the first click without gain are those of its
released script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mmseg_llm.clicks import Click, ClickStep, Stop, Trajectory
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.oracle import ClickRule, next_click

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.segmenters.environment import Environment, Observation

LowGain = Literal["break", "discard"]


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
    keep_clearing: bool = False,
) -> Trajectory:
    """Let the oracle click until the mask is good, the clicks are used up, or a click brings too little.

    Name, id and caption of the object are for the caller to add (`dataclasses.replace`).

    Args:
        environment: segmenter; left where the last click led, discarded ones undone.
        image: RGB.
        target: bool `(H, W)` or mask at image size.
        ignore: likewise, pixels that count neither for the oracle nor for the IoU.
        max_clicks: most clicks of the oracle, discarded ones included.
        iou_threshold: stop at a mask of this IoU, above 0 and at most 1, once it is the best so far.
        min_gain: the IoU must exceed the best so far by more than this, which is not negative.
        on_low_gain: a click that gains too little ends the trajectory (`break`, as the released code does), or is undone
            and its pixel not clicked again (`discard`, as the paper says).
        rule: of the oracle, see `next_click`.
        given: clicks made before the oracle takes over.
        keep_clearing: count it as a gain, too, where a click clears pixels of a mask that has none of the object: its IoU is 0
            before and after, but there is no way on without it.

    Raises:
        ValueError: for a target without pixels, masks of another size than the image, or an argument out of range.
    """
    rules = _Rules(max_clicks, iou_threshold, min_gain, on_low_gain, rule, keep_clearing)
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
        start_iou=iou_outside(wanted, shown.mask, ignored),
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
    keep_clearing: bool

    def __post_init__(self) -> None:
        check_limits(self.iou_threshold, self.min_gain)
        if self.max_clicks < 1 or self.on_low_gain not in get_args(LowGain):
            raise ValueError(
                f"max_clicks={self.max_clicks}, on_low_gain='{self.on_low_gain}'; "
                f"use at least 1, and one of {', '.join(get_args(LowGain))}"
            )


def check_limits(iou_threshold: float, min_gain: float) -> None:
    """Refuse an IoU to stop at, or a least gain, that is none.

    Raises:
        ValueError: with the value.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; it must be an IoU above 0 and at most 1")
    if not min_gain >= 0:
        raise ValueError(f"min_gain is {min_gain}; it must not be negative")


def _click_on(
    environment: Environment, shown: Observation, wanted: np.ndarray, ignored: np.ndarray, rules: _Rules
) -> tuple[dict[bool, list[ClickStep]], Stop]:
    """The oracle's clicks from what is shown on, by whether they gained, and why they ended."""
    best, used = iou_outside(wanted, shown.mask, ignored), list(shown.clicks)
    tried: dict[bool, list[ClickStep]] = {True: [], False: []}
    for _ in range(rules.max_clicks):
        click = next_click(wanted, shown.mask, ignore=ignored, clicked=used, rule=rules.rule)
        if click is None:
            return tried, "nothing_wrong"
        used.append(click)
        before = environment.snapshot()
        after = environment.step(click)
        iou = iou_outside(wanted, after.mask, ignored)
        gained = iou > best + rules.min_gain
        if rules.keep_clearing and best == 0 and iou == 0:
            gained = int((after.mask & ~ignored).sum()) < int((shown.mask & ~ignored).sum())
        tried[gained].append(ClickStep(click, Mask.from_array(after.mask), iou))
        if gained:
            shown, best = after, iou
            if iou >= rules.iou_threshold:
                return tried, "iou"
        elif rules.on_low_gain == "break":
            return tried, "low_gain"
        else:
            environment.restore(before)
    return tried, "max_clicks"


def iou_outside(target: np.ndarray, mask: np.ndarray, ignored: np.ndarray) -> float:
    """IoU of bool arrays `(H, W)` over what is not ignored; the target is not empty there."""
    return float((target & mask & ~ignored).sum() / ((target | mask) & ~ignored).sum())


def _as_array(name: str, mask: Mask | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    array = replace(mask).array if isinstance(mask, Mask) else np.asarray(mask)  # a copy: the given one keeps no pixels
    if array.shape != size:
        raise ValueError(f"{name} of shape {array.shape} does not fit the image of size {size} (H, W)")
    return array.astype(bool)

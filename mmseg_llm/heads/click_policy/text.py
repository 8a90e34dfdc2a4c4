"""The answers of a click policy: written, and read back (SegAgent specification sections 4.3 and 4.4).

answer  := [ref_box] [iou] click | [ref_box] [iou] "Finish" | [ref_box] [iou]
ref_box := <ref>text</ref><box>(x1,y1),(x2,y2)</box>
iou     := "Current IOU: " number, of the mask before the click
click   := ("Positive" | "Negative") " point: (" number ", " number ")"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mmseg_llm.heads.click_policy.codec import QWEN_BOX, QWEN_MILLI, ClickCodec
from mmseg_llm.masks import Box, Size
from mmseg_llm.structures import Click

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_PAIR = rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
_CONTROL = re.compile(r"<\|[^<>|]*\|>|</?s>")
_REF = re.compile(r"<ref>.*?</ref>", re.DOTALL)
_BOX = re.compile(rf"<box>\s*{_PAIR}\s*,\s*{_PAIR}\s*</box>")
# A word may follow a number directly ("74Positive point"): some separators of the training texts were empty.
_IOU = re.compile(rf"(?<![a-z])current\s+m?iou\b\s*:?\s*({_NUMBER})\s*(%?)", re.IGNORECASE)
_CLICK = re.compile(rf"(?<![a-z])(positive|negative)\s+point\b\s*:?\s*{_PAIR}", re.IGNORECASE)
_MENTION = re.compile(r"(?<![a-z])(?:positive|negative)\s+point\b", re.IGNORECASE)
_FINISH = re.compile(r"(?<![a-z])finish(?:ed)?\b", re.IGNORECASE)


class Status(StrEnum):
    """What an answer turned out to be; every one is counted.

    `out_of_range`: a click whose numbers lie beyond the scale. `no_action`: nothing but an IoU or a box, or nothing at all.
    `malformed`: anything else, such as several clicks, or decimals where the codec writes integers.
    """

    OK = "ok"
    FINISH = "finish"
    NO_ACTION = "no_action"
    MALFORMED = "malformed"
    OUT_OF_RANGE = "out_of_range"


@dataclass(frozen=True)
class ParsedAction:
    """An answer as read.

    Attributes:
        status: what it is.
        click: on a pixel of the image; the nearest pixel where `out_of_range`; None otherwise.
        iou: what the policy thinks of the mask it saw, 0 to 1; None where it says nothing or no IoU.
        box: `(x1, y1, x2, y2)` in pixels, None where there is none with an area.
        overshoot: how far the numbers lie beyond the scale, as a fraction of it.
    """

    status: Status
    click: Click | None = None
    iou: float | None = None
    box: Box | None = None
    overshoot: float = 0.0


def write(
    click: Click | None,
    size: Size,
    codec: ClickCodec = QWEN_MILLI,
    iou: float | None = None,
    is_finished: bool = False,
    box: Box | None = None,
    expression: str = "",
    box_codec: ClickCodec = QWEN_BOX,
) -> str:
    """The canonical answer: `Current IOU: 74, Positive point: (175, 483)`.

    Args:
        click: on a pixel of the image; None to finish or to estimate only.
        size: `(H, W)` of the image.
        codec: of the click and the IoU.
        iou: of the mask before the click, 0 to 1.
        is_finished: write `Finish` in place of a click.
        box: `(x1, y1, x2, y2)` in pixels of the object, written first.
        expression: what the box is of.
        box_codec: of the box.

    Raises:
        ValueError: for a click, box or IoU out of range, both a click and the finish, or nothing to write.
    """
    if click is not None and is_finished:
        raise ValueError(f"an answer is either a click or the finish; leave out {click} or is_finished")
    parts = [] if iou is None else [f"Current IOU: {codec.write_iou(iou)}"]
    if click is not None:
        first, second = (codec.write(number) for number in codec.encode(click.row, click.col, size))
        parts.append(f"{'Positive' if click.is_positive else 'Negative'} point: ({first}, {second})")
    elif is_finished:
        parts.append("Finish")
    prefix = "" if box is None else write_box(box, size, expression, box_codec)
    if not parts and not prefix:
        raise ValueError("nothing to answer; give a click, a box, an IoU or is_finished")
    return " ".join(part for part in (prefix, ", ".join(parts)) if part)


def write_box(box: Box, size: Size, expression: str, codec: ClickCodec = QWEN_BOX) -> str:
    """A box as Qwen-VL writes it: `<ref>left man</ref><box>(68,308),(255,986)</box>`.

    Raises:
        ValueError: if the box has no pixel of the image.
    """
    x1, y1, x2, y2 = (codec.write(number) for number in codec.encode_box(box, size))
    return f"<ref>{expression}</ref><box>({x1},{y1}),({x2},{y2})</box>"


def parse(text: str, size: Size, codec: ClickCodec = QWEN_MILLI, box_codec: ClickCodec = QWEN_BOX) -> ParsedAction:
    """Read an answer; never raises, whatever a model writes.

    Case, spaces and control tokens do not matter; the words of the expression (`<ref>...</ref>`) are no answer.

    Args:
        text: what the model wrote.
        size: `(H, W)` of the image.
        codec: what its points and IoU were trained with; a percent sign overrules the scale of an IoU.
        box_codec: of its boxes.
    """
    text = _REF.sub(" ", _CONTROL.sub(" ", text))
    box, iou = _read_box(text, size, box_codec), _read_iou(text, codec)
    clicks = {(kind.lower(), float(a), float(b)) for kind, a, b in _CLICK.findall(text)}
    is_finish = _FINISH.search(text) is not None
    is_clean = len(_MENTION.findall(text)) == len(_CLICK.findall(text))
    if len(clicks) == 1 and is_clean and not is_finish:
        kind, *values = clicks.pop()
        numbers = (values[0], values[1])
        if codec.decimals or all(number % 1 == 0 or number in (float("inf"), float("-inf")) for number in numbers):
            beyond = codec.overshoot(numbers)
            click = Click(*codec.decode(numbers, size), is_positive=kind == "positive")
            return ParsedAction(Status.OUT_OF_RANGE if beyond > 0 else Status.OK, click, iou, box, beyond)
    elif not clicks and is_clean and is_finish:
        return ParsedAction(Status.FINISH, None, iou, box)
    elif not clicks and is_clean and not re.search(r"\w", _IOU.sub(" ", _BOX.sub(" ", text))):
        return ParsedAction(Status.NO_ACTION, None, iou, box)
    return ParsedAction(Status.MALFORMED, None, iou, box)


def _read_box(text: str, size: Size, codec: ClickCodec) -> Box | None:
    match = _BOX.search(text)
    if match is None:
        return None
    a, b, c, d = (float(number) for number in match.groups())
    x1, y1, x2, y2 = codec.decode_box((a, b, c, d), size)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def find_iou(text: str) -> str | None:
    """The number of the IoU in an answer, as it is written."""
    match = _IOU.search(text)
    return None if match is None else match[1]


def _read_iou(text: str, codec: ClickCodec) -> float | None:
    match = _IOU.search(text)
    if match is None:
        return None
    iou = float(match[1]) / (100 if match[2] else codec.iou_scale)
    return iou if 0.0 <= iou <= 1.0 else None


@dataclass(frozen=True)
class OfficialAction:
    """An answer as the released code reads it.

    Attributes:
        is_positive: sign of the click.
        point: its two numbers, unchecked, in the order they are written; None is a failure that ends the episode.
        box: the four numbers of the box, `(0, 0, 0, 0)` where there is none.
    """

    is_positive: bool | None
    point: tuple[int, int] | None
    box: tuple[float, float, float, float]


def parse_official(text: str) -> OfficialAction:
    """Read an answer as the released code does, with all its gaps; for comparisons with the released weights only.

    The words are case sensitive and a positive point wins; the first parenthesis behind the last `point: ` holds the numbers,
    which must be integers and may be anything.
    """
    match = _BOX.search(text)
    a, b, c, d = (float(number) for number in match.groups()) if match else (0.0, 0.0, 0.0, 0.0)
    sign = next((word == "Positive" for word in ("Positive", "Negative") if f"{word} point" in text), None)
    try:
        first, second, *_ = text.split("point: ")[-1].split("(")[1].split(")")[0].split(",")
        point = None if sign is None else (int(first), int(second))
    except (ValueError, IndexError):
        point = None
    return OfficialAction(None if point is None else sign, point, (a, b, c, d))


def select_official(texts: Sequence[str | None]) -> int | None:
    """Index of the mask that the released post-hoc script returns; for comparisons only (section 6.2, last paragraph).

    The text of a step rates the mask before its click, so the mask before the best rating is meant: index `argmax - 1`, or 0.
    The last mask is never rated, and one unreadable text makes all ratings 0.

    Args:
        texts: of the steps, in order; None where a step has none.

    Returns:
        Index into the masks after each click; None for no texts, which the script leaves out of its mean.
    """
    if not texts:
        return None
    matches = [re.search(rf"Current IOU: ({_NUMBER})", text or "") for text in texts]
    ious = [float(match[1]) if match else 0.0 for match in matches] if all(matches) else [0.0] * len(texts)
    return max(0, ious.index(max(ious)) - 1)

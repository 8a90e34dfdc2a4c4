"""Episodes of a click policy as an annotation tool shows them: every mask with the clicks that led to it, as a strip or a GIF.

For human eyes only; what a policy itself sees is `heads.click_policy.overlay`. Text never covers the image. The colours are
those of Okabe and Ito, which people with any kind of colour vision tell apart.

Legend: H W pixels of the image, h w of its picture in a panel, P panels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmseg_llm.geometry import load_image
from mmseg_llm.inference.visualize import _INK, _MUTED, _PAPER, _check_size, _shorten

if TYPE_CHECKING:
    from mmseg_llm.clicks import Click, PolicyStep
    from mmseg_llm.inference.visualize import Color
    from mmseg_llm.masks import Mask
    from mmseg_llm.structures import Prediction

POSITIVE: Color = (0, 114, 178)
NEGATIVE: Color = (213, 94, 0)
MASK: Color = (0, 158, 115)
TARGET: Color = (240, 228, 66)

FRAME_MS, LAST_FRAME_MS = 900, 2700
_STRIP_SIDE, _STRIP_FONT, _FRAME_SIDE, _FRAME_FONT = 360, 15, 640, 20
_MIN_TEXT = 21  # least width of a panel, in heights of its text
_MAX_COLUMNS = 4
_TRACK: Color = (232, 232, 236)
_SHADE: Color = (246, 246, 248)
_ALPHA = 0.45
_PALETTE_PIXELS = 100_000  # looked at to find a palette


def filmstrip(prediction: Prediction, target: Mask | None = None, columns: int | None = None) -> Image.Image:
    """One panel per mask of an episode, from the one it starts with to the last, below a title and above a legend.

    Each panel shows the image with the mask and all clicks so far, numbered, and says what the policy wrote on seeing it
    and what it took its IoU for. The mask that the prediction answers with is marked.

    Args:
        prediction: of a click policy, with its image.
        target: the true mask; adds its outline and the true IoU of each mask.
        columns: panels side by side; by default at most 4, in rows of about the same length.

    Raises:
        ValueError: for a prediction without trajectory or image, a mask of another size, or no column.
    """
    painter = _Painter(prediction, target, _STRIP_SIDE, _STRIP_FONT)
    count = len(painter.steps)
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; a filmstrip needs at least one")
    columns = min(count, columns or -(-count // -(-count // _MAX_COLUMNS)))
    panels = [painter.panel(index) for index in range(count)]
    return painter.sheet([panels[start : start + columns] for start in range(0, count, columns)])


def animate(prediction: Prediction, target: Mask | None = None) -> list[Image.Image]:
    """The panels of `filmstrip` one by one, larger: RGB frames of equal size, each with title and legend.

    Raises:
        ValueError: for a prediction without trajectory or image, or a mask of another size.
    """
    painter = _Painter(prediction, target, _FRAME_SIDE, _FRAME_FONT)
    return [painter.sheet([[painter.panel(index)]]) for index in range(len(painter.steps))]


def save_animation(prediction: Prediction, path: str | Path, target: Mask | None = None) -> Path:
    """Write `animate` as a GIF that loops: `FRAME_MS` per mask, `LAST_FRAME_MS` for the last one.

    All frames share one palette, so that nothing flickers, and are not dithered.

    Raises:
        ValueError: as `animate`.
    """
    frames = _share_palette(animate(prediction, target))
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _share_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """The frames in 256 colours of their own, found on all of them together; the colours of text and marks stay exact."""
    fixed = np.array([_PAPER, _INK, _MUTED, _TRACK, _SHADE, POSITIVE, NEGATIVE, MASK, TARGET], np.uint8)
    step = max(2, math.isqrt(len(frames) * frames[0].width * frames[0].height // _PALETTE_PIXELS))
    stack = Image.fromarray(np.concatenate([np.asarray(frame)[::step, ::step] for frame in frames]))
    found = stack.quantize(256 - len(fixed), Image.Quantize.MEDIANCUT, kmeans=2).getpalette() or []
    shared = Image.new("P", (1, 1))
    shared.putpalette(fixed.ravel().tolist() + found[: 3 * (256 - len(fixed))])
    return [_in_palette(frame, shared, fixed) for frame in frames]


def _in_palette(frame: Image.Image, palette: Image.Image, fixed: np.ndarray) -> Image.Image:
    """The frame in the colours of a palette; Pillow looks up near ones, so the first, `fixed` ones are set here."""
    indices = np.array(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    codes = _as_codes(np.asarray(frame))
    for index, code in enumerate(_as_codes(fixed)):
        indices[codes == code] = index
    mapped = Image.fromarray(indices).convert("P")
    mapped.putpalette(palette.getpalette() or [])
    return mapped


def _as_codes(pixels: np.ndarray) -> np.ndarray:
    """One number per color of uint8 `(..., 3)`."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


@dataclass(frozen=True)
class _Row:
    """A line of a caption with a bar from 0 to 1."""

    name: str
    values: tuple[float | None, ...]
    color: Color


class _Painter:
    """Draws the parts of a picture of one episode, all panels of the same size.

    Args:
        prediction, target: as `filmstrip`.
        side: longest side of the image in a panel; smaller images are enlarged to it.
        font_size: of captions.
    """

    def __init__(self, prediction: Prediction, target: Mask | None, side: int, font_size: int) -> None:
        _check(prediction, target)
        self.prediction, self.target, self.steps = prediction, target, prediction.trajectory
        image = load_image(prediction.image)  # type: ignore[arg-type]
        _check_size(prediction.size, image)
        scale = side / max(image.size)
        self.shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))  # (w, h)
        self.image = image.resize((2 * self.shape[0], 2 * self.shape[1]), Image.Resampling.LANCZOS)
        self.font, self.small = _font(font_size, is_bold=True), _font(font_size * 0.87)
        self.line = round(font_size * 1.5)
        self.radius = max(font_size * 0.56, 5 * min(self.shape) / 240)
        self.margin = math.ceil(self.radius * 1.6)  # marks of clicks at the edge of the image reach into it
        self.width = max(self.shape[0], _MIN_TEXT * font_size) + 2 * self.margin
        self.texts = [_said(step) for step in self.steps]
        self.words = [_wrap(text, self.small, self.width - 2 * self.margin, 2) for text, _ in self.texts]
        self.rows = self._rows()

    def _rows(self) -> list[_Row]:
        """The bars there is something to show of."""
        estimates = tuple(step.estimate for step in self.steps)
        rows = [_Row("estimated IoU", estimates, _MUTED)] if any(value is not None for value in estimates) else []
        if self.target is not None:
            rows.append(_Row("true IoU", tuple(step.mask.iou(self.target) for step in self.steps), MASK))
        return rows

    def panel(self, index: int) -> Image.Image:
        """The image with a mask and the clicks up to it, above its caption."""
        text_lines = max(len(lines) for lines in self.words)
        top = self.shape[1] + 2 * self.margin
        height = top + self.line * (1 + text_lines + len(self.rows)) + self.margin
        panel = Image.new("RGB", (self.width, height), _SHADE)
        left = (self.width - self.shape[0]) // 2
        panel.paste(self._overlay(self.steps[index].mask), (left, self.margin))
        clicks = [step.click for step in self.steps[: index + 1]]
        panel = self._mark(panel, clicks, left)
        pen = ImageDraw.Draw(panel)
        self._headline(pen, index, top + self.line // 2)
        is_plain = self.texts[index][1]
        for number, text in enumerate(self.words[index]):
            middle = top + self.line * (1 + number) + self.line // 2
            pen.text((self.margin, middle), text, _INK if is_plain else _MUTED, self.small, anchor="lm")
        for number, row in enumerate(self.rows):
            self._bar(pen, row, index, top + self.line * (1 + text_lines + number) + self.line // 2)
        return panel

    def _overlay(self, mask: Mask) -> Image.Image:
        """The picture `(h, w)` with a filled, outlined mask and the outline of the target; drawn finer, then reduced."""
        import cv2

        share = (_ALPHA * self._resized(mask))[..., None]  # (2h, 2w, 1)
        pixels: Any = (1 - share) * np.asarray(self.image, np.float32) + share * np.array(MASK, np.float32)
        pixels = np.ascontiguousarray(pixels.round().astype(np.uint8))
        thick = max(3, round(min(self.shape) / 100))
        lines = (
            (mask, _PAPER, thick + 3),
            (mask, MASK, thick),
            (self.target, _INK, thick + 2),
            (self.target, TARGET, thick),
        )
        for shown, color, width in lines:
            if shown is not None:
                binary = (self._resized(shown) >= 0.5).astype(np.uint8)
                outlines, _ = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
                cv2.drawContours(pixels, outlines, -1, color, width, cv2.LINE_AA)
        return Image.fromarray(pixels).resize(self.shape, Image.Resampling.BOX)

    def _resized(self, mask: Mask) -> np.ndarray:
        """The mask as float32 `(2h, 2w)`: mean over what falls into a pixel, or blocks where it is enlarged."""
        array = Image.fromarray(mask.array.astype(np.float32))
        return np.asarray(array.resize(self.image.size, Image.Resampling.BOX))

    def place(self, click: Click, left: int) -> tuple[float, float]:
        """Where the centre of a clicked pixel lies in a panel whose picture begins at `left`."""
        height, width = self.prediction.size
        x, y = (click.col + 0.5) * self.shape[0] / width, (click.row + 0.5) * self.shape[1] / height
        return left + x, self.margin + y

    def _mark(self, panel: Image.Image, clicks: list[Click | None], left: int) -> Image.Image:
        """The panel with numbered disks; the last click has a wider ring."""
        for number, click in enumerate(clicks):
            if click is not None:
                ring = 0.4 if number == len(clicks) - 1 else 0.18
                panel = self._disk(panel, self.place(click, left), str(number), _color(click), ring)
        return panel

    def _disk(
        self, sheet: Image.Image, centre: tuple[float, float], text: str, color: Color, ring: float = 0.18
    ) -> Image.Image:
        """The sheet with a numbered disk in a white ring, whose width is a share of the radius."""
        for radius, fill in ((1.09 + ring, _INK), (1 + ring, _PAPER), (1, color)):
            sheet = _circle(sheet, centre, radius * self.radius, fill)
        font = _font(self.radius * (1.3 if len(text) < 2 else 1.0), is_bold=True)
        ImageDraw.Draw(sheet).text(centre, text, _PAPER, font, anchor="mm")
        return sheet

    def _headline(self, pen: ImageDraw.ImageDraw, index: int, middle: int) -> None:
        """First line of a caption: which step this is, and whether the prediction answers with it."""
        step, right = self.steps[index], self.width - self.margin
        if step.click is None:
            text = "Start" if step.mask.area else "Start, no mask yet"
        else:
            text = f"Click {index}: {'positive' if step.click.is_positive else 'negative'}"
        pen.text((self.margin, middle), text, _INK, self.font, anchor="lm")
        if index == self._answer():
            pen.text((right, middle), "answer", MASK, self.font, anchor="rm")

    def _answer(self) -> int | None:
        """The last step with the mask that the prediction gives."""
        same = [index for index, step in enumerate(self.steps) if step.mask == self.prediction.answer_mask]
        return same[-1] if same else None

    def _bar(self, pen: ImageDraw.ImageDraw, row: _Row, index: int, middle: int) -> None:
        """A line of a caption: name, bar, number."""
        value, right = row.values[index], self.width - self.margin
        start = self.margin + max(self.small.getlength(other.name) for other in self.rows) + self.line * 0.6
        end, half = right - self.small.getlength("0.00") - self.line * 0.6, self.line * 0.16
        pen.text((self.margin, middle), row.name, _MUTED, self.small, anchor="lm")
        for share, color in ((1.0, _TRACK), (value or 0.0, row.color)):
            if (end - start) * share >= 1:
                pen.rectangle((start, middle - half, start + (end - start) * share, middle + half), color)
        pen.text((right, middle), "-" if value is None else f"{value:.2f}", _INK, self.small, anchor="rm")

    def sheet(self, lines: list[list[Image.Image]]) -> Image.Image:
        """Panels in lines, below the title and above the legend."""
        gap = self.margin
        height, columns = lines[0][0].height, max(len(line) for line in lines)
        width = columns * (self.width + gap) + gap
        top, legend = gap + round(2.3 * self.line), self._legend_places(width)
        bottom = top + len(lines) * (height + gap)
        sheet = Image.new("RGB", (width, bottom + self.line * (legend[-1][1] + 1) + gap), _PAPER)
        pen = ImageDraw.Draw(sheet)
        title, room = _font(self.font.size * 1.15, is_bold=True), width - 2 * gap
        pen.text((gap, gap + self.line // 2), _shorten(self.prediction.query, title, room), _INK, title, anchor="lm")
        summary = _shorten(self._summary(), self.small, room)
        pen.text((gap, gap + self.line + self.line // 2), summary, _MUTED, self.small, anchor="lm")
        for number, line in enumerate(lines):
            for column, panel in enumerate(line):
                sheet.paste(panel, (gap + column * (self.width + gap), top + number * (height + gap)))
        return self._legend(sheet, legend, bottom)

    def _summary(self) -> str:
        """Second line of the title: clicks, what they gained, why it ended."""
        count = sum(step.click is not None for step in self.steps)
        parts = [f"{count} click{'' if count == 1 else 's'}"]
        if self.target is not None:
            first, last = self.steps[0].mask, self.prediction.answer_mask
            parts.append(f"true IoU {first.iou(self.target):.2f} to {last.iou(self.target):.2f}")
        if self.prediction.stop:
            parts.append(f"stopped: {str(self.prediction.stop).replace('_', ' ')}")
        return " \u00b7 ".join(parts)

    def _entries(self) -> list[tuple[str, Color]]:
        """Names and colours of the legend."""
        entries = [("mask", MASK), ("positive click", POSITIVE), ("negative click", NEGATIVE)]
        return entries + ([("true outline", TARGET)] if self.target is not None else [])

    def _legend_places(self, width: int) -> list[tuple[int, int]]:
        """Left edge and line of each entry of the legend within a sheet of some width."""
        places: list[tuple[int, int]] = []
        left, line = self.margin, 0
        for name, _ in self._entries():
            room = round(self.small.getlength(name)) + 2 * self.line
            if left + room > width and left > self.margin:
                left, line = self.margin, line + 1
            places.append((left, line))
            left += room
        return places

    def _legend(self, sheet: Image.Image, places: list[tuple[int, int]], top: int) -> Image.Image:
        """The sheet with its legend from `top` on."""
        for (name, color), (left, line) in zip(self._entries(), places):
            middle, half = top + self.line * line + self.line // 2, self.line * 0.3
            box = (left, middle - half, left + 2 * half, middle + half)
            pen = ImageDraw.Draw(sheet)
            if color == MASK:
                fill = tuple(round((1 - _ALPHA) * 255 + _ALPHA * channel) for channel in color)
                pen.rectangle(box, fill, color, 2)
            elif color == TARGET:
                pen.rectangle(box, _MUTED, color, 2)
            else:
                sheet = _circle(sheet, (left + half, middle), half, color)
            ImageDraw.Draw(sheet).text((left + self.line, middle), name, _INK, self.small, anchor="lm")
        return sheet


def _check(prediction: Prediction, target: Mask | None) -> None:
    """Refuse what cannot be shown as an episode."""
    if not prediction.trajectory:
        raise ValueError(
            f"the prediction for '{prediction.query}' has no trajectory, only click policies make one; "
            "use show() or save it as .jpg or .png"
        )
    if prediction.image is None:
        raise ValueError("this prediction carries no image; set it with dataclasses.replace(prediction, image=...)")
    for mask in (*(step.mask for step in prediction.trajectory), *(() if target is None else (target,))):
        if tuple(mask.size) != tuple(prediction.size):
            raise ValueError(
                f"mask of size {tuple(mask.size)} (H, W) does not belong to an episode on an image of size "
                f"{tuple(prediction.size)}; give masks at the original size"
            )


def _said(step: PolicyStep) -> tuple[str, bool]:
    """What the policy said on seeing a mask, and whether these are its own words, read without trouble."""
    words = " ".join(step.text.split())
    if not words:
        return ("said nothing" if step.status else "not asked"), False
    status = str(step.status)
    return (words, True) if status in {"", "ok", "finish"} else (f"{status.replace('_', ' ')}: {words}", True)


def _wrap(text: str, font: Any, width: float, lines: int) -> list[str]:
    """At most so many lines of at most `width` pixels; what does not fit becomes '...'."""
    words = text.split()
    wrapped: list[str] = []
    while words and len(wrapped) < lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        wrapped.append(_shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return wrapped + ([_shorten(" ".join(words), font, width)] if words else [])


@cache
def _font(size: float, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has no letter beyond ASCII."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if is_bold else ''}.ttf"
    return ImageFont.truetype(str(path), size)


def _circle(sheet: Image.Image, centre: tuple[float, float], radius: float, color: Color) -> Image.Image:
    """The sheet with a smooth disk; `centre` (x, y) counts from the corner of the sheet."""
    import cv2

    pixels: Any = np.array(sheet)
    at = (round((centre[0] - 0.5) * 16), round((centre[1] - 0.5) * 16))  # OpenCV counts from the centres of pixels
    cv2.circle(pixels, at, round(radius * 16), color, -1, cv2.LINE_AA, 4)
    return Image.fromarray(pixels)


def _color(click: Click) -> Color:
    return POSITIVE if click.is_positive else NEGATIVE

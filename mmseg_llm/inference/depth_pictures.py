"""Pictures of depth: near is warm, far is cold, no answer is grey; a scale in metres stands below the image.

Legend: H W pixels, R C rows and columns of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmseg_llm.inference.depth_maps import MAX_PIXELS, within
from mmseg_llm.inference.depth_queries import ALONG, describe_camera, describe_failures
from mmseg_llm.inference.visualize import _INK, _MUTED, _PAPER, _enlargement, _with_legend

if TYPE_CHECKING:
    from mmseg_llm.inference.depth_maps import DepthMap
    from mmseg_llm.structures import Prediction

NO_ANSWER = (150, 150, 154)
COLOUR_MAP = "turbo_r"
LOGARITHMIC_FROM = 4.0
"""Ratio of the farthest to the nearest metres from which the colours follow the logarithm."""


@dataclass(frozen=True)
class Scale:
    """Which metres have which colour.

    Attributes:
        low, high: metres of the first and the last colour; others have the nearest of the two.
        is_logarithmic: whether equal ratios, not equal differences, look alike.
    """

    low: float
    high: float
    is_logarithmic: bool

    @classmethod
    def of(cls, metres: np.ndarray) -> Scale:
        """The scale of metres of any shape, without the outermost two per cent; one metre where there is none."""
        found = metres[np.isfinite(metres) & (metres > 0)]
        low, high = (float(value) for value in np.percentile(found, (2, 98))) if found.size else (1.0, 1.0)
        if high - low < 0.02 * high:  # a wall: what differs less than a model can tell is no contrast
            low, high = 0.98 * low, 1.02 * high
        return cls(low, high, high / low >= LOGARITHMIC_FROM)

    def place(self, metres: np.ndarray | float) -> np.ndarray:
        """Where metres are on the scale, from 0 (near) to 1 (far), of the same shape."""
        bounded = np.clip(metres, self.low, self.high)
        if self.is_logarithmic:
            return np.log(bounded / self.low) / math.log(self.high / self.low)
        return (bounded - self.low) / (self.high - self.low)

    def colours(self, metres: np.ndarray) -> np.ndarray:
        """Colours uint8 `(..., 3)` of metres `(...)`; grey where they are nan."""
        is_known = np.isfinite(metres)
        table = colour_table()
        index = np.rint(self.place(np.where(is_known, metres, self.low)) * (len(table) - 1)).astype(np.int64)
        return np.where(is_known[..., None], table[index], np.array(NO_ANSWER, np.uint8))

    def ticks(self) -> list[float]:
        """A few round numbers of metres within the scale."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        if self.is_logarithmic:
            values = LogLocator(subs=(1, 1.5, 2, 3, 5, 7)).tick_values(self.low, self.high)
        else:
            values = MaxNLocator(5).tick_values(self.low, self.high)
        return [float(value) for value in values if self.low <= value <= self.high]


@cache
def colour_table() -> np.ndarray:
    """uint8 `(256, 3)` from near to far; without the darkest ends, which would look alike."""
    import matplotlib

    return (matplotlib.colormaps[COLOUR_MAP](np.linspace(0.04, 0.96, 256))[:, :3] * 255).round().astype(np.uint8)


def draw_depth(depth: DepthMap, image: Image.Image | None = None, alpha: float = 1.0) -> Image.Image:
    """The colours of a map, or those over its image in grey, above a legend.

    At the size of the image, small ones enlarged; those of more than `MAX_PIXELS` are drawn smaller, unless the map has more.

    Args:
        depth: of a grid or of every pixel.
        image: shown through in grey, and as it is where there is no answer.
        alpha: opacity of the colours.

    Raises:
        ValueError: for an opacity outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give an opacity between 0 and 1")
    scale = Scale.of(depth.metres)
    shown = within(depth.size, max(MAX_PIXELS, depth.metres.size))
    height, width = (side * _enlargement(*shown) for side in shown)
    rows, columns = (
        np.arange(pixels) * cells // pixels for pixels, cells in zip((height, width), depth.metres.shape, strict=True)
    )
    metres = depth.metres[np.ix_(rows, columns)]  # (H, W), each cell a block
    colours = scale.colours(metres)
    if image is not None:
        enlarged = image.resize((width, height), Image.Resampling.BICUBIC)
        grey = np.asarray(enlarged.convert("L"), np.float32)[..., None]  # hues of its own would be mistaken for depth
        mixed = (alpha * colours + (1 - alpha) * grey).round().astype(np.uint8)
        colours = np.where(np.isfinite(metres)[..., None], mixed, np.asarray(enlarged))
    missing = int((~depth.is_valid).sum())
    made = f", {depth.source}" if depth.source else ""
    about = [f"metres {ALONG[depth.distance]}{made}", describe_camera(depth.camera, depth.size)]
    if missing:
        reasons = describe_failures(depth.failures)
        unit = "points" if depth.grid is None else "pixels"
        about.append(
            f"no depth at {missing} of {depth.metres.size} {unit}{f'; no answer: {reasons}' if reasons else ''}"
        )
    return with_scale(Image.fromarray(colours), scale, about, has_gaps=image is None and missing > 0)


def with_scale(picture: Image.Image, scale: Scale, about: Sequence[str], has_gaps: bool = False) -> Image.Image:
    """A picture above its scale in metres and lines of text, the last of which explains the grey if there is any."""
    width = max(picture.width, 320)
    font_size = max(13, round(width / 56))
    font = ImageFont.load_default(font_size)
    margin, bar = font_size, round(1.1 * font_size)
    line = round(1.5 * font_size)
    left, right, indent = 2 * margin, width - 2 * margin, round(1.6 * font_size)
    blocks = [_wrapped(text, font, right - left - indent) for text in about]
    height = 2 * margin + bar + line + round(0.4 * font_size) + line * sum(map(len, blocks))
    sheet = Image.new("RGB", (width, picture.height + height), _PAPER)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    top = picture.height + margin
    ramp = colour_table()[np.linspace(0, 255, right - left).round().astype(np.int64)]
    sheet.paste(Image.fromarray(np.repeat(ramp[None], bar, axis=0)), (left, top))
    end = 0.0
    for value in scale.ticks():
        x, text = left + float(scale.place(value)) * (right - left - 1), f"{value:g} m"
        half = font.getlength(text) / 2
        if x - half < max(0.0, end) or x + half > width:
            continue  # would run into its neighbour or out of the picture
        pen.line((x, top + bar, x, top + bar + font_size // 3), fill=_INK, width=max(1, font_size // 10))
        pen.text((x, top + bar + font_size // 2), text, _INK, font, anchor="ma")
        end = x + half + font_size / 2
    top += bar + line + round(0.4 * font_size)
    for index, block in enumerate(blocks):
        is_legend = has_gaps and index == len(blocks) - 1
        if is_legend:
            middle = top + line // 2
            pen.rectangle((left, middle - font_size // 2, left + font_size, middle + font_size // 2), fill=NO_ANSWER)
        for number, text in enumerate(block):
            start = left + (indent if is_legend or number else 0)
            pen.text((start, top + line // 2), text, _MUTED, font, anchor="lm")
            top += line
    return sheet


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a word that is wider stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_points(image: Image.Image, answers: Sequence[Prediction]) -> Image.Image:
    """The image with a ring at every point, numbered, in the colour of its metres; the numbers are told below.

    Args:
        image: that was asked about.
        answers: one per point.
    """
    metres = np.array([np.nan if answer.depth is None else answer.depth for answer in answers])
    colours = [(int(red), int(green), int(blue)) for red, green, blue in Scale.of(metres).colours(metres)]
    factor = _enlargement(image.height, image.width)
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    radius = max(5, round(min(picture.size) / 60))
    font = ImageFont.load_default(max(12, 2 * radius))
    entries = []
    for number, (answer, colour) in enumerate(zip(answers, colours, strict=True), 1):
        assert answer.measurement is not None
        x, y = answer.measurement.points[0]
        at = ((x + 0.5) * factor, (y + 0.5) * factor)
        for grow, width, ink in ((2, radius // 2 + 2, _PAPER), (0, radius // 2, colour)):  # seen on any ground
            pen.circle(at, radius + grow, outline=ink, width=width)
        pen.text((at[0] + 2 * radius, at[1]), str(number), _PAPER, font, "lm", stroke_width=2, stroke_fill=_INK)
        status = answer.measurement.reason if answer.depth is None else f"{answer.depth:.2f} m"
        entries.append((f"{number}: ({x:g}, {y:g})", status, colour, answer.depth is not None))
    return _with_legend(picture, entries)

"""Questions and answers in words (DepthLM, specification sections C.1, C.2, C.4 and I).

`full` is the wording of the released weights, to the letter for depth; `short` is ours, for small models and many points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmseg_llm.questions import QUESTIONS

Wording = Literal["full", "short"]
NUMBER = "{}"
UNITS = {
    "m": "the meter number only, without the unit",
    "m/s": "the number of meters per second only, without the unit",
    "s": "the number of seconds only, without the unit",
}
# What follows "Given this image, "; {a} and {b} stand for points, {x} for what the question gives.
ASKED = {
    "depth": "how far is {a} from the camera?",
    "planar_depth": "how far is {a} from the camera along its viewing direction?",
    "two_point_distance": "how far are {a} and {b} from each other?",
    "speed": "how many meters per second must the camera move to reach {a} in exactly {x} seconds?",
    "time": "how many seconds does the camera need to reach {a} at {x} meters per second?",
    "object_height": "how tall is {x}?",
    "object_width": "how wide is {x}?",
    "camera_motion": "how many meters did the camera move between the left and the right view?",
}
SHORT = {
    "depth": "how far is {a}?",
    "planar_depth": "how far ahead is {a}?",
    "two_point_distance": "how far are {a} and {b} apart?",
    "speed": "speed to {a} in {x} s?",
    "time": "time to {a} at {x} m/s?",
    "object_height": "how tall is {x}?",
    "object_width": "how wide is {x}?",
    "camera_motion": "how far did the camera move?",
}
# The thinking part; numbers in the order of the chain, the answer last.
THOUGHTS = {
    "depth": "The point is around {} meters away from the camera.",
    "planar_depth": "The point is around {} meters ahead of the camera.",
    "two_point_distance": "The points are around {} meters away from each other.",
    "speed": "The point is around {} meters away from the camera, so the speed is {} meters per second.",
    "time": "The point is around {} meters away from the camera, so the time is {} seconds.",
    "object_height": "It is around {} meters tall.",
    "object_width": "It is around {} meters wide.",
    "camera_motion": "The camera moved around {} meters.",
}
ARROWS = ("the point pointed by the red arrow", "the point pointed by the blue arrow")
NOTE = "The coordinates are in normalised [0, {cells}] format relative to image width and height. "


@dataclass(frozen=True)
class DepthPrompts:
    """How questions and answers read.

    Attributes:
        wording: `full` or `short`.
        thinking: whether answers say the number in a sentence first; `short` ones are a number and its unit.
        decimals: of numbers in answers.
        digits: most digits before the point.
    """

    wording: Wording = "full"
    thinking: bool = True
    decimals: int = 2
    digits: int = 3

    def __post_init__(self) -> None:
        """Raises: ValueError for a number of digits out of range, or short answers that think."""
        if self.wording == "short" and self.thinking:
            raise ValueError("short answers say a number and its unit only; set thinking to false")
        if not (1 <= self.decimals <= 6 and 1 <= self.digits <= 6):
            raise ValueError(f"decimals {self.decimals} must lie in 1..6 and digits {self.digits} too")

    @property
    def largest(self) -> float:
        """The largest number an answer can say."""
        return 10**self.digits - 10**-self.decimals

    def question(self, task: str, points: Sequence[str], given: str, cells: int | None) -> str:
        """The question.

        Args:
            task: a key of `questions.QUESTIONS`.
            points: each as words.
            given: what else it says.
            cells: steps of text coordinates per axis; None where points are arrows.
        """
        words = dict(zip("ab", points, strict=False)) | {"x": given}
        if self.wording == "short":
            return SHORT[task].format(**words)
        note = NOTE.format(cells=cells) if points and cells else ""
        unit = UNITS[QUESTIONS[task].unit]
        think = "thinking process in <think> </think> and " if self.thinking else ""
        asked = ASKED[task].format(**words)
        return f"Given this image, {asked} {note}Output the {think}final answer ({unit}) in <answer> </answer> tags."

    def pieces(self, task: str) -> tuple[list[str], list[str]]:
        """An answer up to its last new number as texts around numbers, and the texts around the repetition that follows.

        The first list has one text before each number; of the second, the number that stands between is said again.
        """
        if self.wording == "short":
            return [""], [f" {QUESTIONS[task].unit}"]
        before, after = "<answer> ", " </answer>"
        if not self.thinking:
            return [before], [after]
        texts = f"<think> {THOUGHTS[task]} </think>\n\n{before}".split(NUMBER)
        return texts[:-1], [texts[-1], after]

    def write(self, value: float) -> str:
        """A number as answers say it.

        Raises:
            ValueError: for a number they cannot say.
        """
        text = f"{value:.{self.decimals}f}"
        if not value >= 0 or float(text) > self.largest:
            raise ValueError(f"{value} cannot be said with {self.digits} digits before the point; raise prompts.digits")
        return text

    def answer(self, task: str, numbers: Sequence[str]) -> list[str]:
        """An answer as texts and numbers in turn, the first one a text."""
        texts, rest = self.pieces(task)
        parts = [part for pair in zip(texts, numbers, strict=True) for part in pair]
        for text in rest[:-1]:
            parts += [text, numbers[-1]]
        return [*parts, rest[-1]]

"""Prompts of the mask decoder (MLLMSeg specification section 1.3).

`{x}` stands for the expressions of a question, `{c}` for one expression in an answer, `{slot}` for its `[SEG]` or `[REJ]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmseg_llm.backbones.chat import Token

SEG = Token("[SEG]")
REJ = Token("[REJ]")


@dataclass(frozen=True)
class AnswerStyle:
    """An answer: `start`, a space (unless it is tight), the parts joined by ", ", a full stop."""

    start: str
    part: str
    is_tight: bool = False

    def parts(self, expressions: Sequence[str], slots: Sequence[Token]) -> list[str]:
        """The answer to several expressions as text and control tokens."""
        pieces: list[str] = [self.start if self.is_tight else f"{self.start} "]
        for i, (expression, slot) in enumerate(zip(expressions, slots, strict=True)):
            # split first: an expression may contain "{slot}" itself
            before, after = (side.replace("{c}", expression) for side in self.part.split("{slot}"))
            pieces += [", " + before if i else before, slot, after]
        return [*pieces, "."]


@dataclass(frozen=True)
class Prompts:
    """Question templates and answer styles; one of each is drawn per training dialogue, the first is used to predict."""

    questions: tuple[str, ...] = (
        "Can you segment {x} in this image?",
        "Please segment {x} in this image.",
        "What are {x} in this image? Please respond with segmentation masks.",
        "What are {x} in this image? Please output segmentation masks.",
    )
    answers: tuple[AnswerStyle, ...] = (
        AnswerStyle("The segmentation results are", "{c} {slot}"),
        AnswerStyle("Sure, they are", "{c}:{slot}"),
        AnswerStyle("Sure,", "the mask of {c} is {slot}"),
        AnswerStyle("Sure,", "the segmentation of {c} is {slot}"),
        AnswerStyle("Sure,", "the referred {c} is {slot}"),
    )

    def __post_init__(self) -> None:
        """Raises: ValueError if a template lacks its placeholder."""
        for question in self.questions:
            if "{x}" not in question:
                raise ValueError(f"question template '{question}' lacks '{{x}}', the place of the expression")
        for answer in self.answers:
            if answer.part.count("{slot}") != 1:
                raise ValueError(f"answer part '{answer.part}' needs '{{slot}}' once, the place of [SEG] or [REJ]")


# The pair the reference evaluates with: another wording than any it trains with, odd spacing included.
OFFICIAL = Prompts(
    questions=(" What are {x}in this image? Please output segmentation masks.",),
    answers=(AnswerStyle("Sure,", "{c}:{slot}", is_tight=True),),
)


def clean_expression(text: str) -> str:
    """Strip blanks and full stops at both ends.

    Raises:
        ValueError: if nothing is left.
    """
    stripped = text.strip().strip(".").strip()
    if not stripped:
        raise ValueError(f"the query {text!r} is empty; give an expression such as 'the red cube'")
    return stripped

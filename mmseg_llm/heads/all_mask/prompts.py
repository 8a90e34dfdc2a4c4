"""Prompts of the all-mask head (STAMP specification section 1.3).

`{x}` stands for the expression. An answer is followed by a space and the trigger `<|seg|>`. The wording is this library's; the
phrases that the released weights were trained with can be given in a config.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmseg_llm.backbones.chat import Token

SEG = Token("<|seg|>")
MASK = Token("<|mask|>")
YES = Token("<|yes|>")
NO = Token("<|no|>")
"""`<|yes|>` and `<|no|>` have ids in the released models but no use; here `<|no|>` is the explicit answer "no target"."""


@dataclass(frozen=True)
class Prompts:
    """Question and answer templates; one of each is drawn per training dialogue, the first is used to predict.

    Attributes:
        questions: about one expression.
        answers: what stands before the trigger.
        absent: the answer to an expression that nothing fits, before its `<|no|>`.
        stub: what stands before the trigger where a mask is forced in a conversation, whose expression nobody knows; the first
            of `answers` that has no place for one when None, else a general sentence.
    """

    questions: tuple[str, ...] = (
        "Segment only {x} in this image.",
        "Can you segment {x} in this image?",
        "Where is {x} in this picture? Answer with a mask.",
        "Where is {x}? Please give a segmentation mask as your answer.",
        "Could you provide the mask for {x}?",
        "Segment and highlight {x} in this image.",
    )
    answers: tuple[str, ...] = (
        "Here is the mask of {x}:",
        "The mask of {x} is:",
        "This is where {x} is:",
        "Sure, the segmentation of {x} is:",
        "Of course, {x} is here:",
    )
    absent: str = "Nothing here fits {x}:"
    stub: str | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError if a question lacks the place of its expression, or there are no templates."""
        if not self.questions or not self.answers:
            raise ValueError("prompts need at least one question and one answer; leave them out for the default ones")
        for question in self.questions:
            if "{x}" not in question:
                raise ValueError(f"question template '{question}' lacks '{{x}}', the place of the expression")

    def forced(self) -> str:
        """What stands before a trigger that is forced in a conversation."""
        if self.stub is not None:
            return self.stub
        return next((answer for answer in self.answers if "{x}" not in answer), "Here is the mask:")


def split_triggers(text: str) -> list[str]:
    """A free-form answer as text and triggers: "the dog <|seg|>." -> ["the dog ", SEG, "."]."""
    pieces: list[str] = []
    for i, part in enumerate(text.split(SEG)):
        pieces += [SEG, part] if i else [part]
    return [piece for piece in pieces if piece]


def fill(template: str, expression: str) -> str:
    """A template with its expression; the expression is never searched for placeholders itself."""
    return expression.join(template.split("{x}"))

"""What a click policy is asked (SegAgent specification section 4.2).

`QWEN_PROMPT` belongs to the released weights, letter by letter. The wording for other backbones is this library's; it names
axis order, scale and colour, so that the prompt says what the codec does.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmseg_llm.backbones.chat import Token
from mmseg_llm.clicks import Click
from mmseg_llm.heads.click_policy.codec import QWEN_MILLI, ClickCodec
from mmseg_llm.heads.click_policy.overlay import Colour
from mmseg_llm.heads.click_policy.text import write

QWEN_SYSTEM = "You are a helpful assistant."
QWEN_QUESTION = (
    "Please optimize the semi-transparent green mask in a point-wise manner based on the image and description content, "
    "so that it covers the target object as accurately as possible. The object description is as follows:"
)
QWEN_PROMPT = (
    f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\nPicture 1: <img>{{IMAGE}}</img>\n"
    f"{QWEN_QUESTION}<ref>{{CAPTION}}</ref><|im_end|>\n<|im_start|>assistant\n"
)
"""The whole conversation of the released Qwen-VL weights, for `{IMAGE}` and `{CAPTION}`; the mask is always called green."""


def qwen_prompt(expression: str, image: str = "") -> str:
    """`QWEN_PROMPT` with its expression, untouched, and what stands for the image.

    An answer that must open with a box is forced by appending `text.write_box(...)`.
    """
    before, after = QWEN_PROMPT.split("{CAPTION}")
    return before.replace("{IMAGE}", image) + expression + after


def qwen_question(expression: str) -> list[str]:
    """The user's words of `QWEN_PROMPT` behind the image, with its control tokens by name."""
    return [QWEN_QUESTION, Token("<ref>"), expression, Token("</ref>")]


@dataclass(frozen=True)
class ClickPrompts:
    """Question templates for backbones that are trained afresh; one is drawn per sample, the first is used to predict.

    Attributes:
        questions: with the place `{x}` (expression) and, where the model should be told, `{colour}`, `{axes}`, `{range}`,
            `{estimate}` (a sentence that asks for the IoU, or nothing) and `{example}`; a tiny language model learns them from
            the answers alone.
    """

    questions: tuple[str, ...] = (
        "You mark one object in this picture with clicks. The object is: {x}. A semi-transparent {colour} mask shows what is "
        "marked so far; there may be none yet. {estimate}Give the one click that helps most: a positive point on a part of the "
        "object that the mask misses, or a negative point where the mask covers something else. A point is {axes}, {range}. "
        "Write Finish in place of a point when the mask is right. Answer like this: {example}",
        "Improve the semi-transparent {colour} mask until it covers exactly this: {x}. {estimate}"
        "Give one point, positive where it must grow or negative where it must shrink, or Finish. "
        "Points are {axes}, {range}, as in: {example}",
    )

    def __post_init__(self) -> None:
        """Raises: ValueError if there is no question, or one lacks the place of the expression."""
        if not self.questions:
            raise ValueError("click prompts need at least one question; leave them out for the default ones")
        for question in self.questions:
            if "{x}" not in question:
                raise ValueError(f"question template '{question}' lacks {{x}}, the place of the expression")

    def question(
        self,
        expression: str,
        codec: ClickCodec = QWEN_MILLI,
        colour: Colour = "green",
        index: int = 0,
        with_iou: bool = True,
    ) -> str:
        """A question about one object.

        Args:
            expression: names the object; never searched for places itself.
            codec: of the answer.
            colour: of the mask in the picture.
            index: of the template.
            with_iou: whether the answer starts with the IoU.
        """
        is_row_first = codec.axis_order == "row_col"
        kind = "decimals" if codec.decimals else "integers"
        ends = ("top left", "bottom right")
        facts = {
            "{colour}": colour,
            "{axes}": "(row, column)" if is_row_first else "(x, y)",
            "{range}": f"{kind} from {codec.write(0)} at the {ends[0]} to {codec.write(codec.largest)} at the {ends[1]}",
            "{estimate}": f"First estimate the overlap (IoU) of the mask with the object from 0 to {codec.write_iou(1.0)}. "
            if with_iou
            else "",
            "{example}": write(Click(350, 966, True), (2000, 2000), codec, iou=0.74 if with_iou else None),
        }
        template = self.questions[index]
        for place, fact in facts.items():
            template = template.replace(place, fact)
        return expression.join(template.split("{x}"))

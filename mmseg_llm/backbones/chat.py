"""Chat templates of the model families, as text and named control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# The constant system message of InternVL2.5 and later, and that of InternVL2 (both are part of the released models).
INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


class Token(str):
    """A control token inside a prompt, by name. Plain strings in a prompt can never become control tokens."""

    __slots__ = ()


@dataclass(frozen=True)
class ChatTemplate:
    """Turns around one image.

    Attributes:
        system: system message; none when empty.
        turn_start, turn_end: control tokens around a turn; in the `vicuna` style only `turn_end` exists, behind answers.
        before_image: text between the header of the user turn and an image.
        image_start, image_context, image_end: control tokens of an image, `image_context` once per image token.
        after_image: text between an image and the question about it.
        bos: opens the sequence where the family has one.
        style: `chatml` turns, the `USER: ... ASSISTANT: ...` line of Vicuna (LLaVA 1.5), or `[INST]...[/INST]...</s>` of
            Mistral, where `turn_start` opens a user turn only, `user_end` closes it and `turn_end` ends the answer.
        user_end: see `style`.
        image_break: control token between the rows of an image, where the family has one.
    """

    system: str = INTERNVL2_5_SYSTEM
    turn_start: str = "<|im_start|>"
    turn_end: str = "<|im_end|>"
    before_image: str = ""
    image_start: str | None = "<img>"
    image_context: str = "<IMG_CONTEXT>"
    image_end: str | None = "</img>"
    after_image: str = "\n"
    bos: str | None = None
    style: Literal["chatml", "vicuna", "mistral"] = "chatml"
    user_end: str | None = None
    image_break: str | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError where the Mistral style is given a system turn, which it has none of, or no end of a user turn."""
        if self.style == "mistral" and (self.system or self.user_end is None):
            raise ValueError(
                f"the mistral style has no system turn and needs user_end, but system is {self.system!r} and user_end "
                f"{self.user_end!r}; leave system empty and name the token, such as [/INST]"
            )

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token the template uses."""
        start = None if self.style == "vicuna" else self.turn_start
        turns = (start, self.user_end, self.turn_end)
        names = (*turns, self.image_start, self.image_context, self.image_break, self.image_end, self.bos)
        return tuple(name for name in names if name is not None)

    def opening(self) -> list[str]:
        """Sequence start and system turn."""
        parts: list[str] = [] if self.bos is None else [Token(self.bos)]
        if self.system and self.style == "vicuna":
            return [*parts, f"{self.system} "]
        if self.system:
            parts += [Token(self.turn_start), f"system\n{self.system}", Token(self.turn_end), "\n"]
        return parts

    def user(self) -> list[str]:
        """Header of a user turn."""
        if self.style == "vicuna":
            return ["USER: "]
        return [Token(self.turn_start)] if self.style == "mistral" else [Token(self.turn_start), "user\n"]

    def image(self, rows: int, columns: int) -> list[str]:
        """An image of so many rows and columns of tokens; the end token stands in the place of a break."""
        start, stop, end = (
            [] if name is None else [Token(name)] for name in (self.image_start, self.image_break, self.image_end)
        )
        lines = [*[Token(self.image_context)] * columns, *stop] * rows
        return [self.before_image, *start, *lines[: len(lines) - len(stop)], *end]

    def end_of_user(self) -> list[str]:
        """End of a user turn."""
        if self.style == "vicuna":
            return [" "]
        return [Token(str(self.user_end))] if self.style == "mistral" else [Token(self.turn_end), "\n"]

    def assistant(self) -> list[str]:
        """Header of an answer."""
        if self.style == "mistral":
            return []
        return ["ASSISTANT:"] if self.style == "vicuna" else [Token(self.turn_start), "assistant\n"]

    @property
    def before_answer(self) -> str:
        """Text between the header and the words of an answer."""
        return " " if self.style == "vicuna" else ""

    @property
    def after_answer(self) -> str:
        """Text between the end token of an answer and the next turn."""
        return "\n" if self.style == "chatml" else ""


QWEN_IMAGE: dict[str, Any] = {
    "image_start": "<|vision_start|>",
    "image_context": "<|image_pad|>",
    "image_end": "<|vision_end|>",
}

TEMPLATES = {
    "internvl2_5": ChatTemplate(),
    "internvl2": ChatTemplate(system=INTERNVL2_SYSTEM),
    "plain": ChatTemplate(system=""),
    "qwen2_vl": ChatTemplate(system="You are a helpful assistant.", after_image="", **QWEN_IMAGE),
    "qwen3_vl": ChatTemplate(system="", after_image="", **QWEN_IMAGE),
    "qwen_vl_chat": ChatTemplate(
        system="You are a helpful assistant.", before_image="Picture 1: ", image_context="<imgpad>"
    ),
    "llava_1_5": ChatTemplate(
        system="",  # the template that the hub folders carry has none; set llava_vicuna for the one of the original code
        turn_end="</s>",
        image_start=None,
        image_context="<image>",
        image_end=None,
        bos="<s>",
        style="vicuna",
    ),
    "llava_vicuna": ChatTemplate(
        system=VICUNA_SYSTEM,
        turn_end="</s>",
        image_start=None,
        image_context="<image>",
        image_end=None,
        bos="<s>",
        style="vicuna",
    ),
    "llava_chatml": ChatTemplate(system="", image_start=None, image_context="<image>", image_end=None),
    "pixtral": ChatTemplate(
        system="",
        turn_start="[INST]",
        user_end="[/INST]",
        turn_end="</s>",
        image_start=None,
        image_context="[IMG]",
        image_break="[IMG_BREAK]",
        image_end="[IMG_END]",
        after_image="",
        bos="<s>",
        style="mistral",
    ),
}

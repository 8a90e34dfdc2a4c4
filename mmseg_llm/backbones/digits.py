"""Numbers as tokens: every digit is one, which is how they are read and written best."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mmseg_llm.backbones.chat import Token

if TYPE_CHECKING:
    from mmseg_llm.backbones.codec import Codec

EXAMPLE = "Current IOU: 74, Positive point: (175, 483)"


def encode_digits(codec: Codec, text: str) -> tuple[int, ...]:
    """Token ids of a text, each digit a token of its own; `decode` gives the text back."""
    return codec.encode(*digit_parts(codec, text))


def digit_parts(codec: Codec, text: str) -> list[str]:
    """A text as parts of a prompt (`Codec.encode`, `Codec.question`) whose digits are encoded one by one.

    Tokenizers of Qwen and Llama 2 split digits by themselves and get the text as it is.
    """
    if not _merges_digits(codec):
        return [text]
    pieces = [piece for piece in re.split(r"([0-9])", text) if piece]
    return [Token(piece) if piece in "0123456789" else piece for piece in pieces]


def _merges_digits(codec: Codec) -> bool:
    digits = set(codec.tokenizer.convert_tokens_to_ids(list("0123456789")))
    return sum(index in digits for index in codec.encode(EXAMPLE)) < sum(letter.isdigit() for letter in EXAMPLE)

"""Answers as tokens: texts that are certain, and numbers digit by digit (specification sections C.8 and G.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmseg_llm.heads.depth_text.prompts import DepthPrompts

if TYPE_CHECKING:
    from mmseg_llm.backbones.codec import Codec

DIGITS = "0123456789"


def encode_parts(codec: Codec, parts: Sequence[str]) -> tuple[int, ...]:
    """Token ids of texts and numbers in turn (`DepthPrompts.answer`)."""
    ids: tuple[int, ...] = ()
    for place, part in enumerate(parts):
        ids += number_ids(codec, part) if place % 2 else codec.encode(part)
    return ids


def number_ids(codec: Codec, number: str) -> tuple[int, ...]:
    """Token ids of a number, one per character."""
    return tuple(codec.token_id(letter) for letter in number)


class NumberGrammar:
    """What may follow the forced start of an answer: a number, then for every further number its text and itself.

    A `Constraint` of decoding. Texts are certain, so they cost no step; the last decimal ends the answer.

    Args:
        codec: of the backbone.
        texts: between the numbers.
        prompts: of the head.
    """

    def __init__(self, codec: Codec, texts: Sequence[str], prompts: DepthPrompts) -> None:
        self._digits = tuple(codec.token_id(letter) for letter in DIGITS)
        self._point, self._end = codec.token_id("."), codec.end_id
        self._texts = [codec.encode(text) for text in texts]
        self._prompts = prompts
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def longest(self) -> int:
        """Most tokens that can follow, the end token included."""
        number = self._prompts.digits + 1 + self._prompts.decimals
        return number * (len(self._texts) + 1) + sum(map(len, self._texts)) + 1

    def allowed(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids that may follow an answer's first tokens."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self._follow(key)
        return self._known[key]

    def numbers(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where each number stands in an answer's tokens, as (start, stop)."""
        spans, at = [], 0
        for text in (*self._texts, ()):
            stop = self._number_end(ids, at)
            spans.append((at, stop))
            at = stop + len(text)
        return spans

    def _number_end(self, ids: Sequence[int], at: int) -> int:
        """Behind the number that starts at a place, or as much of it as there is."""
        stop, decimals = at, -1
        while stop < len(ids) and decimals < self._prompts.decimals:
            if ids[stop] == self._point:
                decimals = 0
            elif ids[stop] not in self._digits or (decimals < 0 and stop - at == self._prompts.digits):
                break
            elif decimals >= 0:
                decimals += 1
            stop += 1
        return stop

    def _follow(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        for place, (start, stop) in enumerate(self.numbers(ids)):
            said = ids[start:stop]
            if not self._is_whole(said):
                return self._digit(said)
            text = self._texts[place] if place < len(self._texts) else (self._end,)
            if len(ids) - stop < len(text):
                return (text[len(ids) - stop],)
        return (self._end,)

    def _is_whole(self, said: tuple[int, ...]) -> bool:
        return self._point in said and len(said) - said.index(self._point) - 1 == self._prompts.decimals

    def _digit(self, said: tuple[int, ...]) -> tuple[int, ...]:
        """What goes on with a number: no leading zero before another digit, and not the number zero."""
        if self._point in said:
            last = len(said) - said.index(self._point) == self._prompts.decimals
            is_zero = last and all(token in (self._point, self._digits[0]) for token in said)
            return self._digits[1:] if is_zero else self._digits
        if not said:
            return self._digits
        if len(said) == self._prompts.digits or said == self._digits[:1]:
            return (self._point,)
        return (*self._digits, self._point)

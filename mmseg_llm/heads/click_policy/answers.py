"""Answers as tokens: a grammar says which token may come next (specification section 4.3).

Numbers are read best digit by digit. Tokenizers of Qwen and Llama split them so; for others the digits are encoded one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmseg_llm.backbones.digits import encode_digits
from mmseg_llm.heads.click_policy.codec import ClickCodec

if TYPE_CHECKING:
    from mmseg_llm.backbones.codec import Codec

IOU_WORDS = "Current IOU: "
ACTIONS = ("Positive point: (", "Negative point: (")
LARGEST_GRAMMAR = 100_000
"""Numbers per coordinate that a grammar lists."""


@dataclass
class _Node:
    """A place in the grammar: the tokens that may follow, and where each leads."""

    children: dict[int, _Node] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], following: _Node) -> None:
        """Let a run of tokens lead to what may follow it."""
        node = self
        for token in tokens:
            node = node.children.setdefault(token, _Node())
        for token, child in following.children.items():
            assert node.children.get(token, child) is child, "two ways to read one answer"
            node.children[token] = child


class AnswerGrammar:
    """`[Current IOU: n, ](Positive|Negative) point: (a, b)`, or `Finish` in place of the point; a `Constraint` of decoding.

    Only numbers that the codec writes are possible: no answer is malformed or out of range.

    Args:
        codec: of the backbone.
        clicks: of the answer.
        with_iou: whether answers start with the IoU.

    Raises:
        ValueError: for a codec of too many numbers to list, or a tokenizer that splits answers in another way than expected.
    """

    def __init__(self, codec: Codec, clicks: ClickCodec, with_iou: bool = True) -> None:
        steps = clicks.scale * 10**clicks.decimals
        if steps > LARGEST_GRAMMAR:
            raise ValueError(
                f"a codec of {steps} numbers per axis is too fine for constrained decoding, which lists them (at most "
                f"{LARGEST_GRAMMAR}); set constrained to false"
            )
        self._codec = codec
        unit = 10**clicks.decimals
        numbers = [clicks.write(number / unit) for number in range(round(clicks.largest * unit) + 1)]
        over = _Node({codec.end_id: _Node()})
        self.root = _Node()
        ious = sorted({clicks.write_iou(number / 1000) for number in range(1001)}) if with_iou else []
        before = f"{IOU_WORDS}{ious[0]}, " if with_iou else ""
        actions = self._actions = _Node()
        lead = ", " if with_iou else ""
        for words in ACTIONS:
            parts = self._literals(f"{before}{words}{numbers[0]}, {numbers[0]})", numbers[0], skip=ious[:1])
            second = self._numbers(numbers, parts[-1], over)
            first = self._numbers(numbers, parts[-2], second)
            actions.add(parts[-3], first)
        finish = self._literals(f"{before}Finish", numbers[0], skip=ious[:1])
        actions.add(finish[-1], over)
        if with_iou:
            self.root.add(finish[0], self._numbers(ious, (), actions))
        else:
            self.root = actions
        self._check(
            f"{before}{ACTIONS[0]}{numbers[-1]}, {numbers[0]})", f"{lead}Finish".lstrip(", ") if not with_iou else ""
        )

    @property
    def action_starts(self) -> list[int]:
        """Tokens that end an IoU: those an action starts with."""
        return list(self._actions.children)

    def after(self, ids: Sequence[int]) -> AnswerGrammar:
        """The grammar of what may follow an answer's first tokens."""
        rest = copy(self)
        for index in ids:
            rest.root = rest.root.children.get(index, _Node())
        return rest

    def allowed(self, ids: Sequence[int]) -> list[int]:
        """Token ids that may follow an answer's first tokens; the end token behind an answer that is over."""
        node = self.root
        for index in ids:
            if index not in node.children:
                return [self._codec.end_id]
            node = node.children[index]
        return list(node.children) or [self._codec.end_id]

    def _numbers(self, texts: Iterable[str], after: Sequence[int], following: _Node) -> _Node:
        """Numbers, then the tokens behind them, then what follows."""
        tail = _Node()
        tail.add(after, following)
        root = _Node()
        for text in texts:
            root.add(self._codec.tokenizer.convert_tokens_to_ids(list(text)), tail)
        return root

    def _literals(self, text: str, number: str, skip: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokens between the numbers of an answer, empty ones included."""
        ids = encode_digits(self._codec, text)
        tokens = self._codec.tokenizer.convert_tokens_to_ids
        found: list[tuple[int, ...]] = []
        for value in (*skip, *[number] * text.count(f"{number}, {number}") * 2):
            digits = tuple(tokens(list(value)))
            at = next((i for i in range(len(ids)) if ids[i : i + len(digits)] == digits), None)
            if at is None:
                raise ValueError(
                    f"the tokenizer '{self._codec.tokenizer.name_or_path}' does not write '{value}' digit by digit; "
                    "set constrained to false"
                )
            found.append(ids[:at])
            ids = ids[at + len(digits) :]
        return [*found, ids]

    def _check(self, *texts: str) -> None:
        for text in filter(None, texts):
            ids = encode_digits(self._codec, text)
            for count, index in enumerate(ids):
                assert index in self.allowed(ids[:count]), f"the grammar does not know its own answer {text!r}"

"""Thousands of questions about one picture: its prefix is computed once and copied, with what all questions start with.

A copy holds a few branches side by side: one each would copy most, all in one row would look at each other's masked tokens, a
cost that grows with their square. Legend: B canvases, K questions of a canvas, R copies, b branches of a copy, L prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.generation import Constraint
    from mmseg_llm.backbones.prefix import Prefix
    from mmseg_llm.structures import Canvas


@dataclass(frozen=True)
class Asked:
    """A question as tokens, the forced start of its answer included, and what may follow (anything when None)."""

    ids: tuple[int, ...]
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Said:
    """Tokens of an answer behind its forced start, without the end token, their probability, and whether it came to an end."""

    ids: tuple[int, ...]
    chance: float
    is_whole: bool


@torch.no_grad()
def ask(
    backbone: Backbone,
    canvases: Sequence[Canvas],
    questions: Sequence[Sequence[Asked]],
    *,
    max_new_tokens: int,
    max_cached: int,
) -> list[list[Said]]:
    """Answer all questions about all canvases, greedily.

    Args:
        backbone: of the head.
        canvases: B pictures, which are opened together.
        questions: per picture, at least one.
        max_new_tokens: bound of an answer.
        max_cached: tokens that the copies of prefixes may hold at once.

    Returns:
        Answers per picture, in order.
    """
    if not canvases:
        return []
    prefix = backbone.open(canvases)
    if max(len(row) for row in questions) == 1:  # nothing to share
        return _generate(backbone, prefix, questions, 0, max_new_tokens)
    start = _common_start([asked.ids for row in questions for asked in row])
    if start:
        block = torch.zeros(len(questions), start, dtype=torch.long, device=prefix.states.device)
        ids = torch.tensor(questions[0][0].ids[:start], device=block.device).expand(len(questions), -1)
        backbone.extend(prefix, block, ids=ids)
    tail = max(len(asked.ids) for row in questions for asked in row) - start + max_new_tokens
    width = max(1, prefix.length // tail)
    shares = [(row, at) for row, asked in enumerate(questions) for at in range(0, len(asked), width)]
    at_once = max(1, max_cached // (prefix.length + width * tail))
    found: list[list[Said]] = [[] for _ in questions]
    for first in range(0, len(shares), at_once):
        part = shares[first : first + at_once]
        copy = prefix.fork(torch.tensor([row for row, _ in part], device=prefix.states.device), is_light=True)
        asked = [questions[row][at : at + width] for row, at in part]
        for (row, _), said in zip(part, _generate(backbone, copy, asked, start, max_new_tokens), strict=True):
            found[row] += said
    return found


def _common_start(questions: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all questions share; each keeps one of its own."""
    if len(questions) < 2:
        return 0
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*(ids[:-1] for ids in questions), strict=False))
    return sum(1 for _ in alike)


def _generate(
    backbone: Backbone, prefix: Prefix, questions: Sequence[Sequence[Asked]], start: int, most: int
) -> list[list[Said]]:
    is_free = any(asked.constraint is None for asked in chain(*questions))
    generated = backbone.generate(
        prefix,
        [[asked.ids[start:] for asked in row] for row in questions],
        max_new_tokens=most,
        constraints=None if is_free else [[asked.constraint for asked in row] for row in questions],  # type: ignore[misc]
    )
    end = backbone.codec.end_id
    return [
        [
            Said(
                ids=tuple(token for token in ids if token != end),
                chance=float(torch.tensor(chances, dtype=torch.float64).prod()),
                is_whole=ids[-1] == end,
            )
            for ids, chances in zip(row, row_chances, strict=True)
        ]
        for row, row_chances in zip(generated.ids, generated.chances, strict=True)
    ]

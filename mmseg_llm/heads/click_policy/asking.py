"""Show pictures to the language model and read what it answers, for many episodes at once.

Episodes that see the same picture - all expressions of an image before the first click - share one row: the picture is encoded
and cached once, and their questions are branches behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmseg_llm.geometry import stretch
from mmseg_llm.heads.click_policy.text import ParsedAction, find_iou

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.backbones.generation import Constraint
    from mmseg_llm.backbones.prefix import Prefix
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead

Seeds = Sequence[int | None]
"""One answer each: None for the greedy one."""


@dataclass(frozen=True, eq=False)
class View:
    """What a policy sees: an image, the mask so far (bool `(H, W)`), and the expression it is about."""

    image: Image.Image
    mask: np.ndarray
    expression: str


@dataclass(frozen=True)
class Reply:
    """An answer as tokens and as text, and how it was read.

    Attributes:
        ids: without what follows its estimate where only that was asked for.
        text: of the ids.
        action: what they say.
    """

    ids: tuple[int, ...]
    text: str
    action: ParsedAction


@dataclass
class Shown:
    """Views whose pictures are cached.

    Attributes:
        views: what is shown.
        rows: row of each view in the prefix, which has one per picture.
        prefix: the cached pictures.
    """

    views: list[View]
    rows: list[int]
    prefix: Prefix

    def select(self, indices: Sequence[int]) -> Shown:
        """Some of the views, in another cache where that is smaller."""
        rows = list(dict.fromkeys(self.rows[i] for i in indices))
        views = [self.views[i] for i in indices]
        if len(rows) == len(self.prefix.features.grids):
            return Shown(views, [self.rows[i] for i in indices], self.prefix)
        forked = self.prefix.fork(torch.tensor(rows, device=self.prefix.states.device))
        return Shown(views, [rows.index(self.rows[i]) for i in indices], forked)


def show(head: ClickPolicyHead, backbone: Backbone, views: Sequence[View]) -> Shown:
    """Draw, encode and cache the pictures of some views, equal ones once."""
    codec = backbone.codec
    numbers: dict[tuple[int, bytes], int] = {}
    rows = [numbers.setdefault((id(view.image), np.packbits(view.mask).tobytes()), len(numbers)) for view in views]
    canvases = []
    for row in range(len(numbers)):
        view = views[rows.index(row)]
        size = codec.geometry.canvas_size((view.image.height, view.image.width))
        canvases.append(stretch(head.overlay(view.image, view.mask), size))
    return Shown(list(views), rows, backbone.open(canvases))


def ask(
    head: ClickPolicyHead,
    backbone: Backbone,
    shown: Shown,
    *,
    seeds: Sequence[Seeds] | None = None,
    openings: Sequence[tuple[int, ...]] | None = None,
    is_estimate: bool = False,
    constrained: bool = False,
) -> list[list[Reply]]:
    """What the model answers to each view.

    Args:
        head: of the policy.
        backbone: that the pictures are shown to.
        shown: the pictures.
        seeds: per view, of each answer; a greedy one when None.
        openings: per view, the first tokens of its answers.
        is_estimate: stop where the IoU has been said.
        constrained: decode under the grammar of answers.

    Returns:
        Per view, one reply per seed.
    """
    codec = backbone.codec
    ends = head.grammar(codec).action_starts if is_estimate and constrained else ()
    count = len(shown.views)
    seeds, openings = seeds or [(None,)] * count, openings or [()] * count
    num_rows = len(shown.prefix.features.grids)
    prompts: list[list[tuple[int, ...]]] = [[] for _ in range(num_rows)]
    drawn: list[list[int | None]] = [[] for _ in range(num_rows)]
    constraints: list[list[Constraint]] = [[] for _ in range(num_rows)]
    first: list[int] = []
    for view, row, own, opening in zip(shown.views, shown.rows, seeds, openings, strict=True):
        first.append(len(prompts[row]))
        prompts[row] += [head.question(view.expression, codec) + opening] * len(own)
        drawn[row] += own
        if constrained:
            constraints[row] += [head.grammar(codec).after(opening)] * len(own)
    generated = backbone.generate(
        shown.prefix,
        prompts,
        max_new_tokens=head.max_new_tokens,
        stop=ends,
        constraints=constraints if constrained else None,
        seeds=drawn,
        sampling=head.search.sampling,
    )
    replies = []
    for view, row, own, opening, start in zip(shown.views, shown.rows, seeds, openings, first, strict=True):
        answers = [opening + tuple(ids) for ids in generated.ids[row][start : start + len(own)]]
        if is_estimate and not constrained:
            answers = [up_to_estimate(codec, ids) for ids in answers]
        texts = [codec.decode(ids) for ids in answers]
        size = (view.image.height, view.image.width)
        replies.append([Reply(ids, text, head.read(text, size)) for ids, text in zip(answers, texts, strict=True)])
    return replies


def up_to_estimate(codec: Codec, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The first tokens of a free answer that hold its whole IoU; none where it has none."""
    wanted = find_iou(codec.decode(ids))
    if wanted is None:
        return ()
    return next(ids[:count] for count in range(1, len(ids) + 1) if find_iou(codec.decode(ids[:count])) == wanted)


def estimate(head: ClickPolicyHead, backbone: Backbone, views: Sequence[View]) -> list[Reply]:
    """What the policy takes the IoU of some masks for, `head.batch_size` pictures at once."""
    found: list[Reply] = []
    for start in range(0, len(views), head.batch_size):
        shown = show(head, backbone, views[start : start + head.batch_size])
        replies = ask(head, backbone, shown, is_estimate=True, constrained=head.constrained)
        found += [reply for (reply,) in replies]
    return found

"""Policies that say what they are told, so that episodes and searches can be tested without a language model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmseg_llm.clicks import Click
from mmseg_llm.heads.click_policy import asking, episodes, search
from mmseg_llm.heads.click_policy.asking import Reply
from mmseg_llm.heads.click_policy.text import write
from mmseg_llm.masks import Mask
from mmseg_llm.structures import Query, Sample

SIZE = (40, 60)


@dataclass
class Shown:
    views: list

    def select(self, indices):
        return Shown([self.views[i] for i in indices])


class Script:
    """`say(view, seed)` gives the text of an answer; what is asked is counted."""

    def __init__(self, monkeypatch, say):
        self.say, self.shown, self.asked = say, 0, 0
        for module in (asking, episodes, search):
            monkeypatch.setattr(module, "show", self.show)
            monkeypatch.setattr(module, "ask", self.ask)

    def show(self, head, backbone, views):
        self.shown += len(views)
        return Shown(list(views))

    def ask(self, head, backbone, shown, *, seeds=None, openings=None, is_estimate=False, constrained=False):
        replies = []
        for i, view in enumerate(shown.views):
            texts = [self.say(view, seed) for seed in (seeds[i] if seeds else [None])]
            if is_estimate:
                texts = [text.split(",")[0] + "," for text in texts]
            self.asked += len(texts)
            replies.append([Reply((1, 2), text, head.read(text, view.mask.shape)) for text in texts])
        return replies


class Backbone:
    class codec:
        end_id = -7


def sample(*targets: np.ndarray, size=SIZE, **fields) -> Sample:
    queries = tuple(Query(f"object {i}", (Mask.from_array(t),), id=str(i), **fields) for i, t in enumerate(targets))
    return Sample(Image.new("RGB", size[::-1], (90, 120, 30)), size, queries, id="image")


def disk(row, col, radius, size=SIZE):
    rows, cols = np.indices(size)
    return (rows - row) ** 2 + (cols - col) ** 2 <= radius**2


def answer(row, col, is_positive=True, iou=0.5, size=SIZE):
    return write(Click(row, col, is_positive), size, iou=iou)

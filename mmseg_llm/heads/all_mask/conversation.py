"""A conversation about one image: several turns and any number of masks, with one pass of the vision tower.

The dialogue lives in one branch of the cache; mask passes hang off it and leave no trace (STAMP specification section 1.5:
earlier masks are represented by their trigger only).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmseg_llm.geometry import load_image
from mmseg_llm.heads.all_mask.answering import Said, find_triggers, finish, open_images
from mmseg_llm.heads.all_mask.passes import Trigger
from mmseg_llm.segmenters import refine_predictions
from mmseg_llm.structures import Prediction, Query, Sample

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.heads.all_mask.head import AllMaskHead
    from mmseg_llm.segmenters import Refiner


@dataclass(frozen=True)
class Reply:
    """An answer with its masks.

    Attributes:
        text: of the whole answer, triggers included.
        spans: the answer in pieces: text, and the index of the mask in `masks` that the text leads to (None behind the last).
        masks: one prediction per trigger, whose text is its span.
    """

    text: str
    spans: tuple[tuple[str, int | None], ...]
    masks: tuple[Prediction, ...]


class Conversation:
    """Turns about one image.

    Args:
        head: of the model.
        backbone: of the model.
        image: path or image.
        refiner: sharpens the masks.
    """

    @torch.no_grad()
    def __init__(
        self,
        head: AllMaskHead,
        backbone: Backbone,
        image: str | Path | Image.Image,
        refiner: Refiner | None = None,
    ) -> None:
        self.head, self.backbone, self.refiner = head, backbone, refiner
        loaded = load_image(image)
        self.sample = Sample(image=loaded, size=(loaded.height, loaded.width), id="conversation")
        self.prefix, (self.canvas,) = open_images(head, backbone, [self.sample])
        self.dense = head.dense_features(self.prefix.features)
        self.branch = self.prefix.open_branches(1)
        self.turns = 0
        self._pending: tuple[int, ...] = ()  # said, but not cached yet

    @torch.no_grad()
    def ask(self, text: str, *, force_segment: bool = False) -> Reply:
        """One turn; the conversation remembers it.

        Args:
            text: what the user says; control tokens in it are plain text.
            force_segment: skip the words: the answer is `Prompts.forced` and one mask.

        Raises:
            ValueError: for an empty text, or when the language model can take no more.
        """
        if not text.strip():
            raise ValueError("the question is empty; ask for something such as 'segment the red cube'")
        codec = self.backbone.codec
        prompt = self._pending + codec.question(text, is_first=self.turns == 0)
        needed = int(self.prefix.next_position[0, self.branch]) + len(prompt) + self.dense.shape[1]
        if codec.context and needed > codec.context:
            raise ValueError(
                f"the conversation and a mask would need {needed} positions, the language model takes {codec.context}; "
                "start a new conversation"
            )
        self.turns += 1
        if force_segment:
            ids, places = self._stub(prompt)
        else:
            generated = self.backbone.generate(
                self.prefix, [[prompt]], max_new_tokens=self.head.max_chat_tokens, keep=True, first=self.branch
            )
            ids, places = generated.ids[0][0], generated.places[0][0]
        is_ended = ids[-1] == codec.end_id
        last = () if places[-1] >= 0 else (ids[-1],)
        end = () if is_ended else (codec.end_id,)
        self._pending = last + end + codec.encode(codec.template.after_answer)
        return self._reply(text, ids, find_triggers(self.head, 0, self.branch, ids, places))

    def _stub(self, prompt: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Give the beginning of an answer instead of generating it; the trigger itself runs with its mask."""
        codec, words = self.backbone.codec, self.head.prompts.forced()
        stub = codec.encode(codec.template.before_answer + (f"{words} " if words else ""))
        block = torch.full((1, len(prompt) + len(stub)), self.branch, device=self.prefix.positions.device)
        start = self.prefix.length + len(prompt)
        self.backbone.extend(self.prefix, block, ids=torch.tensor([prompt + stub], device=block.device))
        return [*stub, self.head.seg_id], [*range(start, start + len(stub)), -1]

    def _reply(self, question: str, ids: list[int], triggers: list[Trigger]) -> Reply:
        codec = self.backbone.codec
        logits = self.head.cell_logits(self.backbone, self.prefix, triggers, self.dense)
        spans: list[tuple[str, int | None]] = []
        masks: list[Prediction] = []
        start = 0
        for place, index in enumerate(ids):
            if index != self.head.seg_id:
                continue
            span = codec.decode(ids[start:place])
            asked = replace(self.sample, queries=(Query(text=question, id=f"{self.turns}.{len(masks)}"),))
            said, cells = Said(0, [0], span), [logits[len(masks)]]
            (_, prediction), *_ = finish(self.head, asked, self.canvas, said, cells, self.head.upsampling)
            spans.append((span, len(masks)))
            masks.append(prediction)
            start = place + 1
        rest = codec.decode(ids[start:])
        if rest or not spans:
            spans.append((rest, None))
        if self.refiner is not None:
            masks = refine_predictions(self.refiner, masks)
        return Reply(codec.decode(ids), tuple(spans), tuple(masks))

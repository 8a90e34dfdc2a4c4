"""SamEnvironment: Segment Anything as the environment of a click policy (SegAgent specification sections 2.3 and 2.4).

All clicks so far are asked again at every step, together with the box where there is one and the low-resolution logits of the
step before; of several candidate masks the one that SAM scores best is kept.

Legend: B prompts of one image, P points, M candidate masks, S side of the square SAM sees, s side of its logits, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakValueDictionary

import numpy as np
import torch

from mmseg_llm.masks import Box
from mmseg_llm.segmenters.base import RefineError
from mmseg_llm.segmenters.environment import Encoded, LockStepEnvironment, Observation, State
from mmseg_llm.segmenters.prompts import content_size, mask_prompt
from mmseg_llm.segmenters.sam import make_engine, to_original
from mmseg_llm.segmenters.sam_engine import SamEngine
from mmseg_llm.segmenters.sam_original import CHECKPOINTS
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

Multimask = Literal["always", "first_only"]


@dataclass(frozen=True, eq=False)
class SamImage(Encoded):
    """An image as the engine embeds it."""

    embedding: Any


@dataclass(frozen=True, eq=False)
class SamState(State):
    """An episode between two steps.

    Attributes:
        image: that is clicked on.
        box: `(x1, y1, x2, y2)` in pixels, asked at every step.
        logits: float32 `(s, s)` of the last step or of the mask it started from.
    """

    image: SamImage
    box: Box | None = None
    logits: torch.Tensor | None = None


class SamEnvironment(LockStepEnvironment[SamImage, SamState]):
    """SAM or SAM 2 that is clicked on.

    Args:
        engine: what runs SAM; built from `model` and `checkpoint` when None.
        model: `vit_b`, `vit_l`, `vit_h` (package `segment-anything`), else a folder or hub id for `transformers`.
        checkpoint: `.pth` file of a `vit_*` model.
        multimask: ask for three candidates `always`, as SegAgent does, or only while one click is all there is
            (`first_only`), which is what SAM was trained for.
        feed_back: give the logits of the last step to the next one.
        device: of the engine built here; a GPU where there is one when None.
        batch_size: clicks on one image tried in one decoder call.

    Raises:
        ValueError: for an argument out of range, or both an engine and a checkpoint.
    """

    def __init__(
        self,
        engine: SamEngine | None = None,
        model: str = "vit_l",
        checkpoint: str | None = None,
        multimask: Multimask = "always",
        feed_back: bool = True,
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        if multimask not in get_args(Multimask):
            raise ValueError(f"multimask is '{multimask}'; choose from {', '.join(get_args(Multimask))}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if checkpoint is not None and (engine is not None or model not in CHECKPOINTS):
            raise ValueError(
                f"checkpoint '{checkpoint}' belongs to model vit_b, vit_l or vit_h; set `model`, no engine"
            )
        self.engine = engine or make_engine(model, checkpoint, device)
        self.multimask = multimask
        self.feed_back = feed_back
        self.batch_size = batch_size
        # Of the images that a state still refers to, by their content.
        self._embedded: WeakValueDictionary[bytes, SamImage] = WeakValueDictionary()

    def __repr__(self) -> str:
        """What the scores of a policy depend on."""
        return f"{type(self).__name__}({self.engine!r}, multimask={self.multimask!r}, feed_back={self.feed_back})"

    def reset(self, image: Image.Image, mask: np.ndarray | None = None, *, box: Box | None = None) -> Observation:
        """Start an episode: with nothing, with a given mask, or with the mask of a box.

        An image that a state refers to costs no second encoder pass.

        Args:
            image: RGB, `(H, W)`.
            mask: bool `(H, W)` to start from; fed back like the logits of a step, so it needs `feed_back`.
            box: `(x1, y1, x2, y2)` in pixels; decoded at once, and asked again with every click.

        Raises:
            ValueError: if the box has no pixel of the image, or the mask another size.
            RefineError: if SAM cannot be loaded, or answers with values that are not finite.
        """
        size = (image.height, image.width)
        if box is not None and not (0 <= box[0] < box[2] <= size[1] and 0 <= box[1] < box[3] <= size[0]):
            raise ValueError(
                f"box {box} (x1, y1, x2, y2) does not fit an image of size {size} (H, W); cut it to the image"
            )
        shown, state = self.begin([image], [mask])[0]
        if box is not None:
            shown, state = self._decode([replace(state, box=box)])[0]
        self._state = state
        return shown

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> SamImage:
        self.engine.prepare()
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes()).digest()
        encoded = self._embedded.get(digest)
        if encoded is None:
            encoded = SamImage(self._owner, (image.height, image.width), self.engine.embed(image))
            self._embedded[digest] = encoded
        return encoded

    def _start(
        self, images: Sequence[SamImage], masks: Sequence[np.ndarray | None]
    ) -> list[tuple[Observation, SamState]]:
        begun = []
        if not self.feed_back and any(mask is not None for mask in masks):
            raise ValueError(
                "a mask cannot start an episode with feed_back=False, which keeps it from SAM; set it to True"
            )
        for image, mask in zip(images, masks):
            state, shown = SamState(image, ()), np.zeros(image.size, bool)
            if mask is not None:
                prompt = mask_prompt(mask, self.engine.mask_side, "fixed", self.engine.is_stretched)
                state, shown = replace(state, logits=prompt.to(self.engine.device)), mask
            begun.append((Observation(shown, shown.astype(np.float32), None), state))
        return begun

    def _advance(self, states: Sequence[SamState], clicks: Sequence[Click]) -> list[tuple[Observation, SamState]]:
        clicked = [replace(state, clicks=(*state.clicks, click)) for state, click in zip(states, clicks)]
        groups: dict[Hashable, list[int]] = {}  # clicks that one decoder call can take
        for place, state in enumerate(clicked):
            alike = (id(state.image), len(state.clicks), state.box is None, state.logits is None)
            groups.setdefault(alike, []).append(place)
        tried: dict[int, tuple[Observation, SamState]] = {}
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                chosen = places[start : start + self.batch_size]
                tried.update(zip(chosen, self._decode([clicked[place] for place in chosen])))
        return [tried[place] for place in range(len(clicked))]

    @torch.inference_mode()
    def _decode(self, states: Sequence[SamState]) -> list[tuple[Observation, SamState]]:
        """Decode states of one image and equally many clicks; each becomes what SAM makes of it."""
        first, device = states[0], self.engine.device
        size = first.image.size
        square = content_size(size, self.engine.image_side, self.engine.is_stretched)
        scale = torch.tensor((square[1] / size[1], square[0] / size[0]), dtype=torch.float64)
        points = labels = boxes = masks = None
        if first.clicks:
            pixels = [[(click.col, click.row) for click in state.clicks] for state in states]
            points = (torch.tensor(pixels, dtype=torch.float64) * scale).float().to(device)  # (B, P, 2)
            labels = torch.tensor(
                [[int(click.is_positive) for click in state.clicks] for state in states], device=device
            )
        if first.box is not None:
            corners = torch.tensor([state.box for state in states], dtype=torch.float64) * scale.repeat(2)
            boxes = corners.float().to(device)  # (B, 4)
        if first.logits is not None and self.feed_back:
            masks = torch.stack([state.logits for state in states if state.logits is not None])  # (B, s, s)
        is_multimask = self.multimask == "always" or (len(first.clicks) == 1 and boxes is None and masks is None)
        logits, scores = self.engine.decode_candidates(
            first.image.embedding, points=points, labels=labels, boxes=boxes, masks=masks, is_multimask=is_multimask
        )
        if not bool(torch.isfinite(logits).all()):  # would pass for an empty mask
            raise RefineError("SAM returned values that are not finite; check its checkpoint")
        best = scores.argmax(1)
        rows = torch.arange(len(states), device=best.device)
        logits, scores = logits[rows, best], scores[rows, best].cpu()  # (B, s, s), (B,)
        return [
            (self._observe(logits[row], float(scores[row]), state), replace(state, logits=logits[row].clone()))
            for row, state in enumerate(states)
        ]

    def _observe(self, logits: torch.Tensor, score: float, state: SamState) -> Observation:
        """One state at a time: maps at the size of the image are large."""
        full = to_original(logits[None], self.engine, state.image.size)[0]  # (H, W)
        return Observation((full > 0).cpu().numpy(), full.sigmoid().cpu().numpy(), score, state.clicks)

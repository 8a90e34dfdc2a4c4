"""SamEnvironment: Segment Anything as the environment of a click policy (SegAgent specification sections 2.3 and 2.4).

All clicks so far are asked again at every step, together with the box where there is one and the low-resolution logits of the
step before; of several candidate masks the one that SAM scores best is kept.

Legend: B prompts of one image, P points, M candidate masks, S side of the square SAM sees, s side of its logits, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from mmseg_llm.masks import Box, Size
from mmseg_llm.segmenters.base import RefineError
from mmseg_llm.segmenters.environment import Environment, Observation, check_click
from mmseg_llm.segmenters.prompts import content_size, mask_prompt
from mmseg_llm.segmenters.sam import make_engine, to_original
from mmseg_llm.segmenters.sam_engine import SamEngine
from mmseg_llm.segmenters.sam_original import CHECKPOINTS
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

Multimask = Literal["always", "first_only"]


@dataclass(frozen=True)
class SamState:
    """An episode between two steps.

    Attributes:
        image: digest of the image it belongs to.
        clicks: so far.
        box: `(x1, y1, x2, y2)` in pixels, asked at every step.
        logits: float32 `(s, s)` of the last step or of the mask it started from; never written to.
    """

    image: bytes
    clicks: tuple[Click, ...] = ()
    box: Box | None = None
    logits: torch.Tensor | None = None


class SamEnvironment(Environment):
    """SAM or SAM 2 that is clicked on.

    Args:
        engine: what runs SAM; built from `model` and `checkpoint` when None.
        model: `vit_b`, `vit_l`, `vit_h` (package `segment-anything`), else a folder or hub id for `transformers`.
        checkpoint: `.pth` file of a `vit_*` model.
        multimask: ask for three candidates `always`, as SegAgent does, or only while one click is all there is
            (`first_only`), which is what SAM was trained for.
        feed_back: give the logits of the last step to the next one.
        device: of the engine built here; a GPU where there is one when None.
        batch_size: clicks tried in one decoder call.

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
        self._size: Size | None = None
        self._embedded: tuple[bytes, Any] | None = None  # digest and embedding of the image
        self._state = SamState(b"")

    def __repr__(self) -> str:
        """What the scores of a policy depend on."""
        return f"{type(self).__name__}({self.engine!r}, multimask={self.multimask!r}, feed_back={self.feed_back})"

    @torch.inference_mode()
    def reset(self, image: Image.Image, box: Box | None = None, mask: np.ndarray | None = None) -> Observation:
        """Start an episode: with nothing, with the mask of a box, or with a given mask.

        The embedding of the last image is kept: another episode on it costs no encoder pass.

        Args:
            image: RGB, `(H, W)`.
            box: `(x1, y1, x2, y2)` in pixels; decoded at once, and asked again with every click.
            mask: bool `(H, W)` to start from; fed back like the logits of a step, so it needs `feed_back`.

        Raises:
            ValueError: if the box has no pixel of the image, or the mask another size.
            RefineError: if SAM cannot be loaded, or answers with values that are not finite.
        """
        size = (image.height, image.width)
        if box is not None and not (0 <= box[0] < box[2] <= size[1] and 0 <= box[1] < box[3] <= size[0]):
            raise ValueError(
                f"box {box} (x1, y1, x2, y2) does not fit an image of size {size} (H, W); cut it to the image"
            )
        if mask is not None and (mask.shape != size or not self.feed_back):
            raise ValueError(
                f"a mask of shape {mask.shape} cannot start an image of size {size} (feed_back={self.feed_back})"
            )
        self.engine.prepare()
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes()).digest()
        if self._embedded is None or self._embedded[0] != digest:
            self._size = self._embedded = None  # frees the old one first
            self._embedded = (digest, self.engine.embed(image))
        self._size = size
        self._state = SamState(digest, box=box)
        if mask is not None:
            prompt = mask_prompt(mask > 0, self.engine.mask_side, "fixed", self.engine.is_stretched)
            self._state = replace(self._state, logits=prompt.to(self.engine.device))
        if box is not None:
            observation, self._state = self._decode([self._state])[0]
            return observation
        shown = np.zeros(size, bool) if mask is None else mask > 0
        return Observation(shown, shown.astype(np.float32), None)

    def step(self, click: Click) -> Observation:
        """See `Environment.step`."""
        check_click(click, self._size)
        observation, self._state = self._decode([self._after(click)])[0]
        return observation

    def step_many(self, clicks: Sequence[Click]) -> list[tuple[Observation, Any]]:
        """See `Environment.step_many`; the clicks are decoded together, each once however often it is proposed."""
        for click in clicks:
            check_click(click, self._size)
        different = list(dict.fromkeys(clicks))
        tried: dict[Click, tuple[Observation, SamState]] = {}
        for start in range(0, len(different), self.batch_size):
            chosen = different[start : start + self.batch_size]
            tried.update(zip(chosen, self._decode([self._after(click) for click in chosen])))
        return [tried[click] for click in clicks]

    def snapshot(self) -> SamState:
        """See `Environment.snapshot`."""
        return self._state

    def restore(self, state: SamState) -> None:
        """See `Environment.restore`.

        Raises:
            ValueError: for the state of another image.
        """
        if self._embedded is None or state.image != self._embedded[0]:
            raise ValueError("this state belongs to another image; call reset with that image first")
        self._state = state

    def _after(self, click: Click) -> SamState:
        """The present state with one more click, not decoded yet."""
        return replace(self._state, clicks=(*self._state.clicks, click))

    @torch.inference_mode()
    def _decode(self, states: Sequence[SamState]) -> list[tuple[Observation, SamState]]:
        """Decode states that differ in their last click only; each becomes what SAM makes of it."""
        assert self._size is not None and self._embedded is not None
        first, device = states[0], self.engine.device
        square = content_size(self._size, self.engine.image_side, self.engine.is_stretched)
        scale = torch.tensor((square[1] / self._size[1], square[0] / self._size[0]), dtype=torch.float64)
        points = labels = boxes = masks = None
        if first.clicks:
            pixels = [[(click.col, click.row) for click in state.clicks] for state in states]
            points = (torch.tensor(pixels, dtype=torch.float64) * scale).float().to(device)  # (B, P, 2)
            labels = torch.tensor(
                [[int(click.is_positive) for click in state.clicks] for state in states], device=device
            )
        if first.box is not None:
            corners = torch.tensor(first.box, dtype=torch.float64) * scale.repeat(2)
            boxes = corners.float().to(device).expand(len(states), 4)
        if first.logits is not None and self.feed_back:
            masks = first.logits.expand(len(states), -1, -1)
        is_multimask = self.multimask == "always" or (len(first.clicks) == 1 and boxes is None and masks is None)
        logits, scores = self.engine.decode_candidates(
            self._embedded[1], points=points, labels=labels, boxes=boxes, masks=masks, is_multimask=is_multimask
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
        assert self._size is not None
        full = to_original(logits[None], self.engine, self._size)[0]  # (H, W)
        return Observation((full > 0).cpu().numpy(), full.sigmoid().cpu().numpy(), score, state.clicks)

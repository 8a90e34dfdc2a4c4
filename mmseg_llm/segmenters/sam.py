"""SamRefiner: coarse masks sharpened by Segment Anything in a cascade of decoder passes (STAMP section 4).

Legend: Q masks of one image, B prompts decoded together, P points, s side of the mask prompt, H W original pixels.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
import torch.nn.functional as functional

from mmseg_llm.masks import Mask, Size
from mmseg_llm.segmenters.base import RefineError, Refiner
from mmseg_llm.segmenters.prompts import Padding, Upsample, content_size, mask_prompt, sample_points, upsample_logits
from mmseg_llm.segmenters.sam_engine import SamEngine, summary
from mmseg_llm.segmenters.sam_original import CHECKPOINTS, SegmentAnythingEngine
from mmseg_llm.segmenters.sam_transformers import TransformersSamEngine

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.segmenters.sam_original import SamSize


class SamRefiner(Refiner):
    """Points and a mask prompt from the coarse mask, then further passes with the same points and the last logits.

    Args:
        engine: what runs SAM; built from `model` and `checkpoint` when None.
        model: `vit_b`, `vit_l`, `vit_h` (package `segment-anything`), else a folder or hub id for `transformers`.
        checkpoint: `.pth` file of a `vit_*` model.
        padding: `official` reproduces what the released STAMP code asks SAM outside of the image, `fixed` does not.
        num_points: drawn from the mask, and as many from its background.
        steps: decoder passes.
        seed: of the points; every mask draws its own, whatever else is refined with it.
        upsample: how the coarse mask becomes pixels.
        device: of the engine built here; a GPU where there is one when None.
        batch_size: masks decoded together.

    Raises:
        ValueError: for an argument out of range, or both an engine and a checkpoint.
    """

    def __init__(
        self,
        engine: SamEngine | None = None,
        model: str = "vit_h",
        checkpoint: str | None = None,
        padding: Padding = "fixed",
        num_points: int = 10,
        steps: int = 3,
        seed: int = 0,
        upsample: Upsample = "nearest",
        device: str | None = None,
        batch_size: int = 16,
    ) -> None:
        for name, value, choices in (("padding", padding, Padding), ("upsample", upsample, Upsample)):
            if value not in get_args(choices):
                raise ValueError(f"{name} is '{value}'; choose from {', '.join(get_args(choices))}")
        for name, number in (("num_points", num_points), ("steps", steps), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        if checkpoint is not None and (engine is not None or model not in CHECKPOINTS):
            raise ValueError(
                f"checkpoint '{checkpoint}' belongs to model vit_b, vit_l or vit_h; set `model`, no engine"
            )
        self.engine = engine or make_engine(model, checkpoint, device)
        self.padding = padding
        self.num_points = num_points
        self.steps = steps
        self.seed = seed
        self.upsample = upsample
        self.batch_size = batch_size
        self._embedded: tuple[bytes, Any] | None = None  # digest and embedding of the last image

    def __repr__(self) -> str:
        """The engine belongs to the protocol of a score, too."""
        return f"{super().__repr__()} on {self.engine!r}"

    @torch.inference_mode()
    def _refine(self, image: Image.Image, coarse_logits: torch.Tensor) -> list[Mask]:
        size = (image.height, image.width)
        coarse = (upsample_logits(coarse_logits, size, self.upsample) > 0).cpu().numpy()  # (Q, H, W)
        if not coarse.any():  # foreground cells smaller than a pixel
            return [Mask.empty(size)] * len(coarse)
        try:
            self.engine.prepare()
            return self._refine_all(self._embed(image), coarse, size)
        except RefineError:
            raise
        except Exception as error:
            raise RefineError(
                f"SAM failed on {len(coarse_logits)} masks of an image of {size} (height, width): {summary(error)}; "
                "lower `batch_size` or choose a smaller model if memory ran out, or refine with GrabCutRefiner"
            ) from error

    def _embed(self, image: Image.Image) -> Any:
        """Embedding of the image; that of the last one is kept, known by its content."""
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes()).digest()
        if self._embedded is None or self._embedded[0] != digest:
            self._embedded = None  # frees the old one first
            self._embedded = (digest, self.engine.embed(image))
        return self._embedded[1]

    def _refine_all(self, embedding: Any, coarse: np.ndarray, size: Size) -> list[Mask]:
        """Cascade over batches of masks that have equally many points (a padding point would change the result)."""
        square = content_size(size, self.engine.image_side, self.engine.is_stretched)
        scale = torch.tensor((square[1] / size[1], square[0] / size[0]), dtype=torch.float64)
        prompts = [sample_points(mask, self.num_points, self.seed) for mask in coarse]
        groups: dict[int, list[int]] = {}
        for row, (points, _) in enumerate(prompts):
            if coarse[row].any():
                groups.setdefault(len(points), []).append(row)
        masks: dict[int, Mask] = {}
        for rows in groups.values():
            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                points = torch.stack([prompts[row][0] * scale for row in chosen]).float()  # (B, P, 2)
                labels = torch.stack([prompts[row][1] for row in chosen])
                dense = torch.stack([self._mask_prompt(coarse[row]) for row in chosen])  # (B, s, s)
                passes = cascade(self.engine, embedding, points, labels, dense, self.steps)
                finals = to_original(passes[-1][0], self.engine, size) > 0  # (B, H, W)
                masks.update(zip(chosen, map(Mask.from_array, finals.cpu().numpy())))
        return [masks.get(row) or Mask.empty(size) for row in range(len(coarse))]

    def _mask_prompt(self, mask: np.ndarray) -> torch.Tensor:
        return mask_prompt(mask, self.engine.mask_side, self.padding, self.engine.is_stretched)


def make_engine(model: str, checkpoint: str | None = None, device: str | None = None) -> SamEngine:
    """The engine of a model name: `vit_b`, `vit_l`, `vit_h`, or anything `transformers` can find."""
    if model in CHECKPOINTS:
        return SegmentAnythingEngine(cast("SamSize", model), checkpoint, device)
    return TransformersSamEngine(model, device)


def cascade(
    engine: SamEngine, embedding: Any, points: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor, steps: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Decoder passes with the same points, each fed with the low-resolution logits of the one before.

    Args:
        engine: with weights.
        embedding: of the image.
        points: float `(B, P, 2)` as (x, y) in pixels of the engine's square.
        labels: `(B, P)`.
        masks: mask prompts `(B, s, s)`.
        steps: number of passes.

    Returns:
        Logits `(B, s, s)` and predicted IoU `(B,)` of each pass.

    Raises:
        RefineError: if the engine returns values that are not finite.
    """
    points, labels, masks = (values.to(engine.device) for values in (points, labels, masks))
    passes = []
    for step in range(steps):
        masks, scores = engine.decode(embedding, points, labels, masks)
        if not bool(torch.isfinite(masks).all()):  # would pass for an empty mask
            raise RefineError(f"SAM returned values that are not finite in pass {step + 1}; check its checkpoint")
        passes.append((masks, scores))
    return passes


def to_original(logits: torch.Tensor, engine: SamEngine, size: Size) -> torch.Tensor:
    """Bring low-resolution logits `(B, s, s)` to the image: up to the square, cut off what is no image, resize.

    Returns:
        `(B, H, W)` logits.
    """
    side = engine.image_side
    height, width = content_size(size, side, engine.is_stretched)
    square = functional.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)
    content = square[..., :height, :width]
    return functional.interpolate(content, size, mode="bilinear", align_corners=False)[:, 0]

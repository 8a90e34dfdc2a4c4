"""Refiner: anything that turns a coarse mask over a whole image into a sharp one at the image's own size.

Legend: Q masks of one image, H W pixels of the original image, h w cells of the coarse map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmseg_llm.geometry import load_image
from mmseg_llm.masks import Mask, Size

if TYPE_CHECKING:
    from PIL import Image

    from mmseg_llm.structures import Prediction

# A mask without logits is given to the refiner as logits of this size: sure, and finite.
SURE_LOGIT = 10.0


class RefineError(ValueError):
    """A refiner could not do its work; the message says what to change. Never replaced by an empty mask."""


class Refiner(ABC):
    """Sharpens the coarse masks of one image (STAMP section 4)."""

    def refine(self, image: Image.Image, coarse_logits: torch.Tensor) -> list[Mask]:
        """Refine Q masks of one image.

        Args:
            image: the original image.
            coarse_logits: float `(Q, h, w)` that cover the whole original image at any resolution; the mask is where
                a logit is above 0.

        Returns:
            Q masks at original size `(H, W)`, in order. A row without foreground gives an empty mask without a call of
            the segmenter.

        Raises:
            RefineError: if the input is malformed, or the segmenter cannot be loaded or fails.
        """
        check_logits(coarse_logits)
        size = (image.height, image.width)
        masks = [Mask.empty(size)] * len(coarse_logits)
        rows = [row for row, logits in enumerate(coarse_logits) if bool((logits > 0).any())]
        if rows:
            refined = self._refine(image.convert("RGB"), coarse_logits[rows].detach().float())
            for row, mask in zip(rows, refined, strict=True):
                masks[row] = mask
        return masks

    def __repr__(self) -> str:
        """Name and settings: part of the protocol of a score."""
        settings = {name: value for name, value in vars(self).items() if isinstance(value, int | float | str)}
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items() if not name.startswith("_"))
        return f"{type(self).__name__}({shown})"

    @abstractmethod
    def _refine(self, image: Image.Image, coarse_logits: torch.Tensor) -> list[Mask]:
        """`refine` for an RGB image and at least one row, each with foreground."""


def check_logits(coarse_logits: torch.Tensor) -> None:
    """Refuse what is no finite float `(Q, h, w)`.

    Raises:
        RefineError: naming the shape, type or row.
    """
    if coarse_logits.ndim != 3 or 0 in coarse_logits.shape[1:] or not coarse_logits.is_floating_point():
        raise RefineError(
            f"coarse logits must be float (Q, h, w), got {coarse_logits.dtype} of shape {tuple(coarse_logits.shape)}; "
            "give one map per mask, over the whole image"
        )
    bad = (~torch.isfinite(coarse_logits)).flatten(1).any(1)
    if bool(bad.any()):
        raise RefineError(
            f"coarse logits of row {int(bad.nonzero()[0, 0])} are not finite; check the head that made them"
        )


def refine_predictions(refiner: Refiner, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Replace the mask and box of predictions by refined ones; score and order are kept.

    Predictions may come from several heads and images in any order: they are gathered by image, so that each image is
    loaded once and refined in one call per resolution of its maps. What the model rejected (`exists` is False) or
    answered without a mask passes unchanged.

    Args:
        refiner: what sharpens the masks.
        predictions: with `image` set, and `mask_logits` (float `(h, w)` over the whole image) where the head has them.

    Raises:
        RefineError: if a prediction lacks its image, or the refiner fails.
        ValueError: if an image cannot be read.
    """
    refined = list(predictions)
    images: dict[str | int, dict[Size, list[int]]] = {}
    for index, prediction in enumerate(predictions):
        logits = _logits(prediction)
        if logits is not None:
            shapes = images.setdefault(_image_key(prediction), {})
            shapes.setdefault((logits.shape[0], logits.shape[1]), []).append(index)
    for shapes in images.values():
        first = next(iter(shapes.values()))[0]
        image = _open(predictions[first])
        for indices in shapes.values():
            rows = [_logits(predictions[index]) for index in indices]
            stacked = torch.from_numpy(np.stack([row for row in rows if row is not None]))  # (Q, h, w)
            for index, mask in zip(indices, refiner.refine(image, stacked), strict=True):
                if mask.size != tuple(predictions[index].size):
                    raise RefineError(
                        f"the image of prediction '{predictions[index].query}' is {mask.size} (height, width) but the "
                        f"prediction was made at {tuple(predictions[index].size)}; give it the image it was made on"
                    )
                refined[index] = replace(predictions[index], mask=mask, box=mask.box, exists=mask.area > 0)
    return refined


def _logits(prediction: Prediction) -> np.ndarray | None:
    """The coarse map of a prediction as float32 `(h, w)`; None where there is nothing to refine."""
    if not prediction.exists:
        return None
    if prediction.mask_logits is not None:
        return np.asarray(prediction.mask_logits, np.float32)
    if prediction.mask is None:
        return None
    return np.where(prediction.mask.array, np.float32(SURE_LOGIT), np.float32(-SURE_LOGIT))


def _image_key(prediction: Prediction) -> str | int:
    """Identity of the image: the path, or the object (ids repeat between data sets and between calls)."""
    image = prediction.image
    return str(Path(image)) if isinstance(image, str | Path) else id(image)


def _open(prediction: Prediction) -> Image.Image:
    """The image of a prediction."""
    if prediction.image is None:
        raise RefineError(
            f"prediction '{prediction.query}' of sample '{prediction.sample_id}' carries no image to refine on; "
            "set it with dataclasses.replace(prediction, image=...)"
        )
    return load_image(prediction.image)

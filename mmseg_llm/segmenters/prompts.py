"""From a coarse mask to what SAM is asked: mask prompt and points (STAMP section 4; pure arithmetic, no model).

Legend: H W pixels of the original image, S side of the mask prompt (256 for SAM), P points.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from mmseg_llm.masks import Size

Padding = Literal["official", "fixed"]
Upsample = Literal["nearest", "bilinear"]

# Probabilities 0 and 1 become these before the logit: -6.9068 and +6.9068.
EXTREMES = (0.001, 0.999)


def upsample_logits(logits: torch.Tensor, size: Size, mode: Upsample = "nearest") -> torch.Tensor:
    """Bring maps `(Q, h, w)` to the image size `(H, W)`.

    Args:
        logits: float maps over the whole image.
        size: `(H, W)`.
        mode: `nearest` takes the cell `floor(y h / H)`, `floor(x w / W)` as STAMP does; `bilinear` aligns pixel centres.

    Returns:
        `(Q, H, W)`.
    """
    if mode == "nearest":
        return functional.interpolate(logits[:, None], size, mode="nearest")[:, 0]
    return functional.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def content_size(size: Size, side: int, is_stretched: bool = False) -> Size:
    """Part `(h, w)` of a `side` x `side` square that an image of `size` fills: the longest side fits, or all of it."""
    if is_stretched:
        return (side, side)
    scale = side / max(size)
    return (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5)))


def mask_prompt(
    mask: np.ndarray, side: int = 256, padding: Padding = "fixed", is_stretched: bool = False
) -> torch.Tensor:
    """Low-resolution logits that tell SAM where the coarse mask is.

    The mask is resized as an 8-bit picture (antialiased bilinear) to the part of the square that the image fills.

    Args:
        mask: bool `(H, W)`.
        side: S.
        padding: what lies right or below of the image. `official` is the arithmetic of the released code: -1 wraps to
            255 there, so that the strip is sure foreground, and a mask that is `(S, S)` already is divided by 255 as if
            it were 8-bit. `fixed` says nothing about the strip (logit 0) and treats all sizes alike.
        is_stretched: whether the image fills the whole square (SAM 2). There is no strip then, nor the special case.

    Returns:
        float32 `(S, S)`.
    """
    height, width = content_size((mask.shape[0], mask.shape[1]), side, is_stretched)
    is_official = padding == "official" and not is_stretched
    if is_official and mask.shape == (side, side):
        return _logit(mask.astype(np.float32) / 255)
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    prompt = torch.full((side, side), float(_logit(np.ones(1, np.float32))) if is_official else 0.0)
    prompt[:height, :width] = _logit(resized)
    return prompt  # (S, S)


def sample_points(mask: np.ndarray, num_points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pixels of the mask and of its background, each uniformly without replacement.

    The stream is that of `torch.manual_seed(seed)` followed by the two permutations; the global generator is untouched.

    Args:
        mask: bool `(H, W)`.
        num_points: of each kind; fewer where the kind has fewer pixels.
        seed: of the generator.

    Returns:
        float64 `(P, 2)` pixels as (x, y), foreground first, and int64 `(P,)` labels 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = torch.from_numpy(mask.reshape(-1).astype(bool))
    points, labels = [], []
    for label, chosen in ((1, flat), (0, ~flat)):
        pixels = chosen.nonzero()[:, 0]  # row-major
        pixels = pixels[torch.randperm(len(pixels), generator=generator)[:num_points]]
        points.append(torch.stack((pixels % mask.shape[1], pixels // mask.shape[1]), 1).double())
        labels.append(torch.full((len(pixels),), label, dtype=torch.int64))
    return torch.cat(points), torch.cat(labels)


def _logit(values: np.ndarray) -> torch.Tensor:
    """Logit of float32 probabilities, exact 0 and 1 moved inside; values between are untouched."""
    low, high = (np.float32(value) for value in EXTREMES)
    inside = np.where(values >= 1, high, np.where(values == 0, low, values)).astype(np.float32)
    return torch.from_numpy(-np.log(1 / inside - 1))  # in this form float32 rounds as the released code does

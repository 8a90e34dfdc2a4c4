"""Mask losses (MLLMSeg specification section 4).

`clean` is what the paper writes: focal loss on logits and Dice. `official` is what the released weights were trained with: its
cross-entropy takes probabilities for logits (a double sigmoid) and rejected rows count in the mean.

Legend: Q rows, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional


def focal(
    logits: torch.Tensor, targets: torch.Tensor, probabilities: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Focal loss per row, mean over pixels.

    Args:
        logits: `(Q, H, W)` what the cross-entropy takes for logits.
        targets: `(Q, H, W)` 0 or 1.
        probabilities: `(Q, H, W)` for the focusing factor.
        alpha: weight of the positives, 1 - alpha that of the negatives.
        gamma: focusing exponent.
    """
    agreement = probabilities * targets + (1 - probabilities) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weight * (1 - agreement) ** gamma * entropy).flatten(1).mean(1)


def dice(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss per row with smoothing 1, `(Q,)`."""
    x, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - (2 * (x * t).sum(1) + 1) / (x.sum(1) + t.sum(1) + 1)


def clean_mask_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> dict[str, torch.Tensor]:
    """Mean focal and Dice loss of `(Q, h, w)` logits at canvas size against binary targets of the same shape."""
    logits, targets = logits.float(), targets.float()
    probabilities = logits.sigmoid()
    return {
        "focal": focal(logits, targets, probabilities, alpha, gamma).mean(),
        "dice": dice(probabilities, targets).mean(),
    }


def official_mask_loss(
    logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], num_rows: int
) -> dict[str, torch.Tensor]:
    """Focal and Dice loss of the reference.

    Args:
        logits: per `[SEG]` row, `(h, w)` at canvas size.
        targets: per `[SEG]` row, `(H, W)` binary at the original size.
        num_rows: rows of the micro-batch, rejected ones included: those add 0 and dilute the mean.
    """
    totals: dict[str, torch.Tensor] = {}
    for row, target in zip(logits, targets, strict=True):
        probabilities = row.sigmoid()[None, None]
        resized = functional.interpolate(probabilities, target.shape, mode="bilinear", align_corners=False)[0]
        truth = target[None].to(resized.dtype)
        terms = {"focal": focal(resized, truth, resized, 0.25, 2.0).sum(), "dice": dice(resized, truth).sum()}
        totals = {name: totals.get(name, 0) + value for name, value in terms.items()}
    return {name: value / (num_rows + 1e-8) for name, value in totals.items()}

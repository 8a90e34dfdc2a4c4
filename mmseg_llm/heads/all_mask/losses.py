"""Mask losses of the cells (STAMP specification section 3.1): binary cross-entropy and Dice, every mask with equal weight.

Legend: Q masks, N cells, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional


def binary_loss(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses per mask.

    Args:
        logits: `(Q, N)`.
        targets: `(Q, N)` in [0, 1].

    Returns:
        `bce` and `dice`, `(Q,)` each, float32; Dice with smoothing 1.
    """
    logits, targets = logits.float(), targets.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return {"bce": entropy, "dice": _dice(logits.sigmoid(), targets)}


def class_loss(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses of a grid whose cells choose one of C classes, class 0 being the background (STAMPlus, arXiv 2608.02791).

    Args:
        logits: `(Q, N, C)`, one row per grid.
        targets: `(Q, N, C)`, shares of each class that sum to 1.

    Returns:
        `bce` (here the cross-entropy over classes) and `dice` (mean over the classes but the first), `(Q,)` each.
    """
    logits, targets = logits.float(), targets.float()
    entropy = -(targets * logits.log_softmax(-1)).sum(-1).mean(1)
    chances, truth = (x[..., 1:].transpose(1, 2).flatten(0, 1) for x in (logits.softmax(-1), targets))
    return {"bce": entropy, "dice": _dice(chances, truth).unflatten(0, (len(logits), -1)).mean(1)}


def _dice(chances: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    overlap = (chances * targets).sum(1)
    return 1 - (2 * overlap + 1) / (chances.sum(1) + targets.sum(1) + 1)

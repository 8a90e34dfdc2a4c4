"""Losses that several heads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as functional

from mmseg_llm.backbones.codec import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.structures import Batch


def answer_loss(backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
    """Cross-entropy of the supervised tokens of a batch; `_token_accuracy` is logged only."""
    states = backbone(batch).states  # (B, N, D)
    is_target = batch.labels[:, 1:] != IGNORE_INDEX
    logits = backbone.logits(states[:, :-1][is_target])  # (tokens, vocabulary)
    wanted = batch.labels[:, 1:][is_target]
    right = (logits.detach().argmax(-1) == wanted).float().mean()
    return {"ce": functional.cross_entropy(logits, wanted), "_token_accuracy": right}

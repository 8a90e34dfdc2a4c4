"""PerceptionModel: one backbone, named heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import torch

    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.heads.base import Head
    from mmseg_llm.structures import Batch, Prediction, Sample


class PerceptionModel(nn.Module):
    """A backbone with the heads that perceive through it.

    Args:
        backbone: vision encoder and language model.
        heads: by name; the first one is the default.

    Raises:
        ValueError: without heads, or when a head does not fit the backbone.
    """

    def __init__(self, backbone: Backbone, heads: dict[str, Head]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("a model needs at least one head; add one under model.heads")
        self.backbone = backbone
        tokens = dict.fromkeys(token for head in heads.values() for token in head.tokens)
        self.num_added_tokens = backbone.prepare(list(tokens))
        for name, head in heads.items():
            head.name = name
            head.bind(backbone)
        self.heads = nn.ModuleDict(heads)

    def head(self, name: str | None = None) -> Head:
        """A head by name, the first one when None.

        Raises:
            ValueError: if there is none of this name.
        """
        if name is None:
            name = next(iter(self.heads))
        if name not in self.heads:
            raise ValueError(f"the model has no head '{name}'; it has {', '.join(self.heads)}")
        return self.heads[name]  # type: ignore[return-value]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of the head the batch was built for."""
        return self.head(batch.head).loss(self.backbone, batch)

    def predict(
        self, samples: Sequence[Sample], head: str | None = None, protocol: str = "generate"
    ) -> list[Prediction]:
        """Answer all queries of all samples in one batch; see `Head.predict`."""
        return self.head(head).predict(self.backbone, samples, protocol)

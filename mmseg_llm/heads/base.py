"""Head: zero or more parameters; owns its prompt, canvas, targets, loss and decoding. A head never imports another head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import numpy as np
from torch import nn

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.segmenters import Refiner
    from mmseg_llm.structures import Batch, Example, Prediction, Sample


class NoExampleError(ValueError):
    """A sample that a head can learn nothing from; loaders say so and take another one."""


class Head(nn.Module):
    """One way of perceiving.

    Life of a head: constructed from its config alone; `bind` once the backbone is known; then `build` in data-loader workers
    (with the weight-free codec only), `loss` in training, `predict` everywhere else.

    Attributes:
        tokens: control tokens the head needs in the vocabulary, in the order of their ids.
        protocols: ways of predicting, the default first.
        name: key of the head in its model.
        label_padding: label at padded positions of a batch.
    """

    tokens: ClassVar[tuple[str, ...]] = ()
    protocols: ClassVar[tuple[str, ...]] = ("generate",)
    name: str = ""
    label_padding: int = -100

    def bind(self, backbone: Backbone) -> None:
        """Create the parameters, whose sizes depend on the backbone, and check what the head relies on.

        Raises:
            ValueError: if the backbone does not fit the head.
        """

    @abstractmethod
    def build(self, sample: Sample, codec: Codec, rng: np.random.Generator) -> Example:
        """Render a labelled sample for training."""

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch) -> dict[str, torch.Tensor]:
        """Named scalar losses, already weighted; their sum is minimised. Names with a leading `_` are only logged."""

    @abstractmethod
    def predict(self, backbone: Backbone, samples: Sequence[Sample], protocol: str = "generate") -> list[Prediction]:
        """Answer all queries of all samples, batched; the result is the same as one by one.

        Returns:
            One prediction per query, sample by sample, in order.
        """

    def converse(self, backbone: Backbone, image: str | Path | Image.Image, refiner: Refiner | None = None) -> Any:
        """Start a conversation about an image.

        Raises:
            ValueError: if this head answers single queries only.
        """
        raise ValueError(
            f"head '{self.name}' answers single queries only; use predict, or a model with an all_mask head"
        )

    def for_workers(self) -> Head:
        """What data workers are given, to `build` with; without large parts that only prediction needs."""
        return self

    def describe(self, protocol: str) -> dict[str, Any]:
        """Settings of this head that scores under a protocol depend on, to be printed with them."""
        return {}

    def metric(self, protocol: str, has_no_target: bool) -> str:
        """The metric protocol that belongs to a way of predicting, on data with or without no-target queries."""
        return "clean"

    def check_protocol(self, protocol: str) -> None:
        """Raise ValueError for a protocol this head does not have."""
        if protocol not in self.protocols:
            raise ValueError(f"head '{self.name}' has no protocol '{protocol}'; use one of {', '.join(self.protocols)}")


def check_choices(function: Callable[..., Any], **values: Any) -> None:
    """Refuse values that are not among the `Literal`s of a signature, for callers that no parser checks.

    Raises:
        ValueError: naming the argument and its choices.
    """
    hints = get_type_hints(function)
    for name, value in values.items():
        choices = get_args(hints[name])
        if value not in choices:
            raise ValueError(f"{name} is '{value}'; use one of {', '.join(map(str, choices))}")

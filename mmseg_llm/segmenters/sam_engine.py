"""SamEngine: what `SamRefiner` needs of a Segment Anything network, whichever library runs it.

Legend: B prompts of one image, P points, M candidate masks, S side of the square the image encoder sees, s side of its logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image

from mmseg_llm.segmenters.prompts import content_size

# Colour statistics (0 to 255) that SAM and SAM 2 were trained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class SamEngine(ABC):
    """A promptable segmenter: one embedding per image, any number of prompts on it; float32 throughout.

    Attributes:
        is_stretched: whether the image fills the square (SAM 2) or keeps its aspect ratio at its top left (SAM).
        module: the loaded network, None before the first use.
    """

    is_stretched: bool = False
    module: Any = None

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def __repr__(self) -> str:
        """Class and model."""
        return f"{type(self).__name__}({getattr(self, 'model', '')!r})"

    def prepare(self) -> None:
        """Load the weights unless they are there.

        Raises:
            RefineError: naming the file or library that is missing, or what does not fit.
        """
        if self.module is None:
            with torch.random.fork_rng(devices=[]):  # building a network draws initial values
                self.module = self._load().float().eval().requires_grad_(False).to(self.device)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """The RGB image as the network sees it: resized, normalised, zero-padded to float32 `(1, 3, S, S)`."""
        side = self.image_side
        height, width = content_size((image.height, image.width), side, self.is_stretched)
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        values = torch.from_numpy(resized).permute(2, 0, 1).float()  # (3, h, w)
        values = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return functional.pad(values, (0, side - width, 0, side - height))[None].to(self.device)

    @property
    @abstractmethod
    def image_side(self) -> int:
        """S."""

    @property
    @abstractmethod
    def mask_side(self) -> int:
        """Side s of the mask prompt and of the low-resolution logits."""

    @abstractmethod
    def _load(self) -> torch.nn.Module:
        """The network with its weights."""

    @abstractmethod
    def embed(self, image: Image.Image) -> Any:
        """Run the image encoder; the result is only for `decode`."""

    @abstractmethod
    def decode_candidates(
        self,
        embedding: Any,
        *,
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
        is_multimask: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass of prompt encoder and mask decoder with any mixture of prompts; at least points or boxes are given.

        Args:
            embedding: of the image.
            points: float `(B, P, 2)` as (x, y) in pixels of the square.
            labels: int `(B, P)`, 1 foreground and 0 background.
            boxes: float `(B, 4)` as (x1, y1, x2, y2) in pixels of the square.
            masks: float `(B, s, s)` logits: mask prompts, or the result of the pass before.
            is_multimask: whether M is 3 or 1.

        Returns:
            Logits `(B, M, s, s)` and predicted IoU `(B, M)`.
        """

    def decode(
        self, embedding: Any, points: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A single mask for each prompt of points and mask: logits `(B, s, s)` and predicted IoU `(B,)`."""
        logits, scores = self.decode_candidates(
            embedding, points=points, labels=labels, boxes=None, masks=masks, is_multimask=False
        )
        return logits[:, 0], scores[:, 0]


def summary(error: Exception) -> str:
    """What an error says in one line, without the pages that some libraries append."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."

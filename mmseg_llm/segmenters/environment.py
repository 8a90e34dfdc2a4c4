"""Environment: an interactive segmenter that a policy or an oracle clicks on (SegAgent specification section 2).

Coordinates are integer (row, col) pixels of the original image. What an image costs is paid once per `reset`; a snapshot holds
clicks and the previous map only, so that candidates can be tried and taken back.

Legend: H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Observation:
    """What an environment shows after a step.

    Attributes:
        mask: bool `(H, W)`.
        chances: float32 `(H, W)` probabilities, None where the segmenter has none.
        score: the segmenter's own estimate of its quality, None where it has none.
        clicks: all clicks so far.
    """

    mask: np.ndarray
    chances: np.ndarray | None
    score: float | None
    clicks: tuple[Click, ...] = ()


class Environment(ABC):
    """One episode at a time on one image."""

    @abstractmethod
    def reset(self, image: Image.Image) -> Observation:
        """Start an episode on an image with an empty mask; encodes the image."""

    @abstractmethod
    def step(self, click: Click) -> Observation:
        """Add a click.

        Raises:
            ValueError: before `reset`, or for a click outside of the image.
        """

    @abstractmethod
    def snapshot(self) -> Any:
        """The state of the episode, cheap and immutable."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Return to a state of this image, exactly."""

    def step_many(self, clicks: Sequence[Click]) -> list[tuple[Observation, Any]]:
        """Try several clicks from the present state, which stays as it is; each with the state it leads to."""
        start = self.snapshot()
        tried = []
        for click in clicks:
            tried.append((self.step(click), self.snapshot()))
            self.restore(start)
        return tried


def check_click(click: Click, size: tuple[int, int] | None) -> None:
    """Refuse clicks that an environment cannot take.

    Raises:
        ValueError: before the first image, or outside of it.
    """
    if size is None:
        raise ValueError("no image to click on; call reset with one first")
    if not (0 <= click.row < size[0] and 0 <= click.col < size[1]):
        raise ValueError(f"click at row {click.row}, column {click.col} lies outside of an image of size {size} (H, W)")

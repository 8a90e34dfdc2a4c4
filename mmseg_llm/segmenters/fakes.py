"""Environments that draw by formula: no weights, exact and fast, for tests and for trying out policies.

They are the stand-ins with which the reference vectors of SegAgent's recorder were made.

Legend: H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.segmenters.environment import Encoded, LockStepEnvironment, Observation, State
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

# Probability above which SegAgent's interactive segmenter calls a pixel foreground.
THRESHOLD = 0.49


@dataclass(frozen=True, eq=False)
class FakeState(State):
    """An episode: its clicks and the arrays `(H, W)` they gave."""

    maps: tuple[np.ndarray, ...]


class FakeEnvironment(LockStepEnvironment[Encoded, FakeState]):
    """What the formulas share; only the size of an image counts.

    Args:
        positive_radius: pixels around a positive click, > 0.
        negative_radius: pixels around a negative click, > 0.

    Raises:
        ValueError: for a radius that is not positive.
    """

    def __init__(self, positive_radius: float, negative_radius: float) -> None:
        super().__init__()
        for name, radius in (("positive_radius", positive_radius), ("negative_radius", negative_radius)):
            if not radius > 0:
                raise ValueError(f"{name} is {radius}; a radius in pixels must be positive")
        self.positive_radius = positive_radius
        self.negative_radius = negative_radius

    def _encode(self, image: Image.Image) -> Encoded:
        return Encoded(self._owner, (image.height, image.width))

    def _start(
        self, images: Sequence[Encoded], masks: Sequence[np.ndarray | None]
    ) -> list[tuple[Observation, FakeState]]:
        starts = [np.zeros(image.size, bool) if mask is None else mask for image, mask in zip(images, masks)]
        return [self._shown(FakeState(image, (), self._maps(start))) for image, start in zip(images, starts)]

    def _advance(self, states: Sequence[FakeState], clicks: Sequence[Click]) -> list[tuple[Observation, FakeState]]:
        tried = []
        for state, click in zip(states, clicks):
            height, width = state.image.size
            rows, cols = np.arange(height)[:, None] - click.row, np.arange(width)[None] - click.col
            maps = self._add(state.maps, rows**2 + cols**2, click)
            tried.append(self._shown(FakeState(state.image, (*state.clicks, click), maps)))
        return tried

    def _shown(self, state: FakeState) -> tuple[Observation, FakeState]:
        chances = self._chances(state.maps)
        return Observation(chances > np.float32(THRESHOLD), chances, None, state.clicks), state

    def _maps(self, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of a mask to start from."""
        return (mask.astype(np.float32),)

    def _chances(self, maps: tuple[np.ndarray, ...]) -> np.ndarray:
        """Float32 `(H, W)` probabilities, an array of its own."""
        return maps[0].copy()

    @abstractmethod
    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        """The arrays after a click at the given squared distances, int64 `(H, W)`."""


class DisksEnvironment(FakeEnvironment):
    """A positive click sets the disk around it and a negative click clears one, in the order of the clicks."""

    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        radius = self.positive_radius if click.is_positive else self.negative_radius
        return (np.where(squares <= radius**2, np.float32(click.is_positive), maps[0]),)


class TargetDisksEnvironment(FakeEnvironment):
    """Disks that are never wrong: they set pixels of the target only, and clear pixels outside of it only.

    Args:
        target: bool `(H, W)`; images of another size are refused.
        positive_radius, negative_radius: as above.

    Raises:
        ValueError: for a target that is no `(H, W)` array, or a radius that is not positive.
    """

    def __init__(self, target: np.ndarray, positive_radius: float, negative_radius: float) -> None:
        super().__init__(positive_radius, negative_radius)
        if target.ndim != 2:
            raise ValueError(f"target must be a bool array (H, W), got shape {target.shape}")
        self.target = target.astype(bool)

    def _encode(self, image: Image.Image) -> Encoded:
        if (image.height, image.width) != self.target.shape:
            raise ValueError(
                f"image of size {(image.height, image.width)} (H, W) does not fit the target of size {self.target.shape}"
            )
        return super()._encode(image)

    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        radius = self.positive_radius if click.is_positive else self.negative_radius
        reached = (squares <= radius**2) & (self.target == click.is_positive)
        return (np.where(reached, np.float32(click.is_positive), maps[0]),)


class SoftEnvironment(FakeEnvironment):
    """Probability `a (1 - b)`; `a` is the largest `1 / (1 + d^2 / r^2)` of the positive clicks, `b` of the negative ones."""

    def _maps(self, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        return mask.astype(float), np.zeros(mask.shape)

    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        attract, repel = maps
        if click.is_positive:
            return np.maximum(attract, 1 / (1 + squares / self.positive_radius**2)), repel
        return attract, np.maximum(repel, 1 / (1 + squares / self.negative_radius**2))

    def _chances(self, maps: tuple[np.ndarray, ...]) -> np.ndarray:
        return (maps[0] * (1 - maps[1])).astype(np.float32)

"""Environments that draw by formula: no weights, exact and fast, for tests and for trying out policies.

They are the stand-ins with which the reference vectors of SegAgent's recorder were made.

Legend: H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.segmenters.environment import Environment, Observation, check_click
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

# Probability above which SegAgent's interactive segmenter calls a pixel foreground.
THRESHOLD = 0.49


@dataclass(frozen=True)
class FakeState:
    """An episode: its clicks and the arrays `(H, W)` they gave, which are never written to."""

    clicks: tuple[Click, ...]
    maps: tuple[np.ndarray, ...]


class FakeEnvironment(Environment):
    """What the formulas share.

    Args:
        positive_radius: pixels around a positive click, > 0.
        negative_radius: pixels around a negative click, > 0.

    Raises:
        ValueError: for a radius that is not positive.
    """

    def __init__(self, positive_radius: float, negative_radius: float) -> None:
        for name, radius in (("positive_radius", positive_radius), ("negative_radius", negative_radius)):
            if not radius > 0:
                raise ValueError(f"{name} is {radius}; a radius in pixels must be positive")
        self.positive_radius = positive_radius
        self.negative_radius = negative_radius
        self._state: FakeState | None = None

    def reset(self, image: Image.Image) -> Observation:
        """Start an episode with an empty mask; only the size of the image counts."""
        self._state = FakeState((), self._start((image.height, image.width)))
        return self._observe()

    def step(self, click: Click) -> Observation:
        """Add a click.

        Raises:
            ValueError: before `reset`, or for a click outside of the image.
        """
        check_click(click, None if self._state is None else self._state.maps[0].shape)
        assert self._state is not None
        size = self._state.maps[0].shape
        rows, cols = np.arange(size[0])[:, None] - click.row, np.arange(size[1])[None] - click.col
        maps = self._add(self._state.maps, rows**2 + cols**2, click)
        self._state = FakeState((*self._state.clicks, click), maps)
        return self._observe()

    def snapshot(self) -> FakeState:
        """The state of the episode.

        Raises:
            ValueError: before `reset`.
        """
        if self._state is None:
            raise ValueError("no episode to take a snapshot of; call reset with an image first")
        return self._state

    def restore(self, state: Any) -> None:
        """Return to a state of this image, exactly."""
        self._state = state

    def _observe(self) -> Observation:
        assert self._state is not None
        chances = self._chances(self._state.maps)
        return Observation(chances > np.float32(THRESHOLD), chances, None, self._state.clicks)

    def _start(self, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """The arrays of an empty mask."""
        return (np.zeros(size, np.float32),)

    def _chances(self, maps: tuple[np.ndarray, ...]) -> np.ndarray:
        """Float32 `(H, W)` probabilities."""
        return maps[0]

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
        target: bool `(H, W)`.
        positive_radius, negative_radius: as above.

    Raises:
        ValueError: for a target that is no `(H, W)` array, or a radius that is not positive.
    """

    def __init__(self, target: np.ndarray, positive_radius: float, negative_radius: float) -> None:
        super().__init__(positive_radius, negative_radius)
        if target.ndim != 2:
            raise ValueError(f"target must be a bool array (H, W), got shape {target.shape}")
        self.target = target.astype(bool)

    def reset(self, image: Image.Image) -> Observation:
        """Start an episode with an empty mask.

        Raises:
            ValueError: if the image is not of the target's size.
        """
        if (image.height, image.width) != self.target.shape:
            raise ValueError(
                f"image of size {(image.height, image.width)} (H, W) does not fit the target of size {self.target.shape}"
            )
        return super().reset(image)

    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        radius = self.positive_radius if click.is_positive else self.negative_radius
        reached = (squares <= radius**2) & (self.target == click.is_positive)
        return (np.where(reached, np.float32(click.is_positive), maps[0]),)


class SoftEnvironment(FakeEnvironment):
    """Probability `a (1 - b)`; `a` is the largest `1 / (1 + d^2 / r^2)` of the positive clicks, `b` of the negative ones."""

    def _start(self, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
        return np.zeros(size), np.zeros(size)

    def _add(self, maps: tuple[np.ndarray, ...], squares: np.ndarray, click: Click) -> tuple[np.ndarray, ...]:
        attract, repel = maps
        if click.is_positive:
            return np.maximum(attract, 1 / (1 + squares / self.positive_radius**2)), repel
        return attract, np.maximum(repel, 1 / (1 + squares / self.negative_radius**2))

    def _chances(self, maps: tuple[np.ndarray, ...]) -> np.ndarray:
        return (maps[0] * (1 - maps[1])).astype(np.float32)

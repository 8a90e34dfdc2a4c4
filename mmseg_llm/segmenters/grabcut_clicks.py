"""GrabCutEnvironment: an interactive segmenter without weights, OpenCV's GrabCut driven by clicks.

Colours alone decide, so it needs more clicks than a trained segmenter; it is for machines without weights, for tests and for
demonstrations on real photographs.

Source: Rother et al., GrabCut, SIGGRAPH 2004, section 3.3 (user interaction).

Legend: H W pixels of the image, h w pixels of the size worked at.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.segmenters.environment import Encoded, LockStepEnvironment, Observation, State
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

# OpenCV's rectangle, which is not read where a mask is given.
NO_BOX = (0, 0, 0, 0)
# Most threads that are taken unasked.
MAX_WORKERS = 16


@dataclass(frozen=True, eq=False)
class GrabCutImage(Encoded):
    """An image at the size worked at: uint8 `(h, w, 3)` in OpenCV's order of colours."""

    pixels: np.ndarray

    def place(self, click: Click) -> tuple[int, int]:
        """Row and column of a click at the size worked at."""
        height, width = self.pixels.shape[:2]
        return int((click.row + 0.5) * height / self.size[0]), int((click.col + 0.5) * width / self.size[1])


@dataclass(frozen=True, eq=False)
class GrabCutState(State):
    """An episode at the size worked at.

    Attributes:
        image: that is clicked on.
        mask: bool `(h, w)` that the clicks gave.
        given: bool `(H, W)`, the mask of a larger image that the episode started from, shown where no click changed it.
        touched: bool `(h, w)`, what clicks decided since; None without `given`.
    """

    image: GrabCutImage
    mask: np.ndarray
    given: np.ndarray | None = None
    touched: np.ndarray | None = None


class GrabCutEnvironment(LockStepEnvironment[GrabCutImage, GrabCutState]):
    """Clicks are disks of sure foreground or background; the mask so far says what the rest probably is.

    A click changes the mask only where the change is connected to it, so that what was right elsewhere stays. Lengths are
    shares of the square root of the image's area; no disk reaches farther than half of the way to a click of the other
    kind. The defaults were chosen on 10 photographs of the GrabCut data
    set; on 18 others of it the oracle reaches a mean IoU of 0.73, 0.81, 0.85 and 0.92 after 1, 3, 5 and 10 clicks.

    Args:
        sure: radius of the disk that is certain around a click.
        first: radius of the disk that a first click makes probable.
        reach: the same of later clicks.
        iterations: of GrabCut, per click.
        max_side: larger images are worked on at this size in pixels, and masks are scaled up.
        seed: of OpenCV's generator, which starts the colour clusters.
        workers: threads that `advance` shares its clicks among, without changing a result; one per processor, at most
            16, when None.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        sure: float = 0.02,
        first: float = 0.2,
        reach: float = 0.08,
        iterations: int = 3,
        max_side: int = 320,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sure", sure, 0.0),
            ("first", first, sure),
            ("reach", reach, sure),
            ("iterations", iterations, 1),
            ("max_side", max_side, 32),
            ("workers", 1 if workers is None else workers, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.sure = sure
        self.first = first
        self.reach = reach
        self.iterations = iterations
        self.max_side = max_side
        self.seed = seed
        self.workers = workers

    def _encode(self, image: Image.Image) -> GrabCutImage:
        import cv2

        pixels: Any = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
        scale = min(1.0, self.max_side / max(image.size))
        if scale < 1:
            side = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            pixels = cv2.resize(pixels, side, interpolation=cv2.INTER_AREA)
        return GrabCutImage(self._owner, (image.height, image.width), pixels)

    def _start(
        self, images: Sequence[GrabCutImage], masks: Sequence[np.ndarray | None]
    ) -> list[tuple[Observation, GrabCutState]]:
        begun = []
        for image, mask in zip(images, masks):
            small = image.pixels.shape[:2]
            if mask is None:
                state = GrabCutState(image, (), np.zeros(small, bool))
            elif small == image.size:
                state = GrabCutState(image, (), mask)
            else:
                state = GrabCutState(image, (), _reduced(mask, small), mask, np.zeros(small, bool))
            begun.append((_observed(state), state))
        return begun

    def _advance(
        self, states: Sequence[GrabCutState], clicks: Sequence[Click]
    ) -> list[tuple[Observation, GrabCutState]]:
        workers = min(len(states), self.workers or min(os.cpu_count() or 1, MAX_WORKERS))
        if workers == 1:
            return list(map(self._clicked, states, clicks))
        with ThreadPoolExecutor(workers) as pool:  # OpenCV works without the interpreter's lock
            return list(pool.map(self._clicked, states, clicks))

    def _clicked(self, state: GrabCutState, click: Click) -> tuple[Observation, GrabCutState]:
        """One click."""
        clicks = (*state.clicks, click)
        reached = self._reached(state.image, clicks, state.mask)
        mask = state.mask.copy()
        mask[reached] = click.is_positive
        touched = None if state.touched is None else state.touched | reached
        after = GrabCutState(state.image, clicks, mask, state.given, touched)
        return _observed(after), after

    def _reached(self, image: GrabCutImage, clicks: tuple[Click, ...], mask: np.ndarray) -> np.ndarray:
        """Pixels `(h, w)` that take the sign of the last of the clicks."""
        import cv2

        click = clicks[-1]
        prior = mask.copy()
        prior[_disk(image, click, self.reach if mask.any() else self.first, clicks)] = click.is_positive
        labels = np.where(prior, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        for earlier in clicks:
            kind = cv2.GC_FGD if earlier.is_positive else cv2.GC_BGD
            labels[_disk(image, earlier, self.sure, clicks)] = kind
        cut = self._cut(image.pixels, labels)
        changed = (cut != mask) & (cut == click.is_positive)
        changed |= _disk(image, click, self.sure, clicks)
        _, parts = cv2.connectedComponents(changed.astype(np.uint8), connectivity=4)
        return parts == parts[image.place(click)]

    def _cut(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """GrabCut from its four classes, uint8 `(h, w)`, to a bool mask."""
        import cv2

        kinds = (cv2.GC_FGD, cv2.GC_PR_FGD)
        probable = np.isin(labels, kinds)
        if probable.all() or not probable.any():
            return probable  # only one kind of colours: nothing to tell apart
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # colour models, filled by OpenCV
        cv2.setRNGSeed(self.seed)  # of this thread
        cv2.grabCut(pixels, labels, NO_BOX, background, foreground, self.iterations, cv2.GC_INIT_WITH_MASK)
        return np.isin(labels, kinds)


def _observed(state: GrabCutState) -> Observation:
    """What a state shows, at the size of the image; an array of its own."""
    size = state.image.size
    if state.mask.shape == size:
        return Observation(state.mask.copy(), None, None, state.clicks)
    mask = _enlarged(state.mask, size)
    if state.given is not None:
        assert state.touched is not None
        mask = np.where(_enlarged(state.touched, size), mask, state.given)
    return Observation(mask, None, None, state.clicks)


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `(h, w)` at the size of the image."""
    import cv2

    return np.asarray(cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) > 0.5)


def _reduced(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `(H, W)` at the size worked at: pixels of which more than half is in it."""
    import cv2

    return np.asarray(cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA) > 0.5)


def _disk(image: GrabCutImage, click: Click, radius: float, clicks: Sequence[Click]) -> np.ndarray:
    """Pixels `(h, w)` within a share of the image around a click, not nearer to a click of the other kind."""
    height, width = image.pixels.shape[:2]
    row, col = image.place(click)
    others = [image.place(other) for other in clicks if other.is_positive != click.is_positive]
    limits = [((row - there[0]) ** 2 + (col - there[1]) ** 2) / 4 for there in others]
    square = min([radius**2 * height * width, *limits])
    return (np.arange(height)[:, None] - row) ** 2 + (np.arange(width)[None] - col) ** 2 <= square

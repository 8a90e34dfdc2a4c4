"""Environment: an interactive segmenter that a policy or an oracle clicks on (SegAgent specification section 2).

Coordinates are integer (row, col) pixels of the original image. What an image costs is paid once per start; a state holds clicks
and the previous map and refers to its image, so that candidates can be tried and taken back, on many images in lock-step.

Legend: B images, K clicks, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
    """One present episode, and any number of others whose states are kept by who plays them."""

    def __repr__(self) -> str:
        """Class and plain public settings: part of the protocol of a score, the same in every run."""
        plain = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and isinstance(value, int | float | str | bool)
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"

    @abstractmethod
    def reset(self, image: Image.Image, mask: np.ndarray | None = None) -> Observation:
        """Start an episode on an image; encodes the image.

        Args:
            image: `(H, W)`.
            mask: bool `(H, W)` to start from; None is the empty mask.

        Raises:
            ValueError: for a mask of another size or with other values.
        """

    @abstractmethod
    def step(self, click: Click) -> Observation:
        """Add a click.

        Raises:
            ValueError: before `reset`, or for a click outside of the image.
        """

    @abstractmethod
    def snapshot(self) -> Any:
        """The state of the episode, cheap and immutable.

        Raises:
            ValueError: before `reset`.
        """

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Return to a state that this environment made, of whatever image, exactly.

        Raises:
            ValueError: for anything else.
        """

    def begin(
        self, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None] | None = None
    ) -> list[tuple[Observation, Any]]:
        """Start an episode on each image; the present episode stays as it is.

        Args:
            images: B of them; one that comes several times is encoded once.
            masks: to start from, see `reset`; None starts all of them empty.

        Returns:
            What each shows and its state; the same state for the same image and mask.

        Raises:
            ValueError: see `reset`; or if there are not as many masks as images.
        """
        images, given = list(images), _masks_of(images, masks)
        chosen, places = distinct((id(image), id(mask)) for image, mask in zip(images, given))
        begun = []
        with self._present():
            for i in chosen:
                shown = self.reset(images[i]) if given[i] is None else self.reset(images[i], given[i])
                begun.append((shown, self.snapshot()))
        return [begun[place] for place in places]

    def advance(self, states: Sequence[Any], clicks: Sequence[Click]) -> list[tuple[Observation, Any]]:
        """Make one click on each state, whatever their images; the present episode stays as it is.

        Args:
            states: K of them.
            clicks: one for each; the same click on the same state is computed once.

        Returns:
            What each shows and its new state.

        Raises:
            ValueError: for a foreign state, a click outside of its image, or if there are not as many clicks as states.
        """
        check_lengths("click", clicks, "state", states)
        chosen, places = distinct((id(state), click) for state, click in zip(states, clicks))
        tried = []
        with self._present():
            for i in chosen:
                self.restore(states[i])
                tried.append((self.step(clicks[i]), self.snapshot()))
        return [tried[place] for place in places]

    def step_many(self, clicks: Sequence[Click]) -> list[tuple[Observation, Any]]:
        """Try several clicks from the present state, which stays as it is; each with the state it leads to."""
        return self.advance([self.snapshot()] * len(clicks), clicks)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Play something else and come back to the present episode, where there is one."""
        try:
            present = self.snapshot()
        except ValueError:  # before the first `reset`
            yield
            return
        try:
            yield
        finally:
            self.restore(present)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an environment keeps of an image; all states of the image refer to it, and it goes with the last of them.

    Attributes:
        owner: which environment made it.
        size: `(H, W)`.
    """

    owner: object
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class State:
    """Where an episode stands; nothing in it is ever written to.

    Attributes:
        image: that is clicked on.
        clicks: so far.
    """

    image: Encoded
    clicks: tuple[Click, ...]


E = TypeVar("E", bound=Encoded)
S = TypeVar("S", bound=State)


class LockStepEnvironment(Environment, Generic[E, S]):
    """An environment whose answer depends on a state and a click alone: an episode is the state it has come to."""

    def __init__(self) -> None:
        self._owner = object()
        self._state: S | None = None

    def reset(self, image: Image.Image, mask: np.ndarray | None = None) -> Observation:
        """See `Environment.reset`."""
        shown, self._state = self.begin([image], [mask])[0]
        return shown

    def step(self, click: Click) -> Observation:
        """See `Environment.step`."""
        shown, self._state = self.advance([self.snapshot()], [click])[0]
        return shown

    def snapshot(self) -> S:
        """See `Environment.snapshot`."""
        if self._state is None:
            raise ValueError("there is no episode yet; call reset with an image first")
        return self._state

    def restore(self, state: S) -> None:
        """See `Environment.restore`."""
        self._state = self._own(state)

    def begin(
        self, images: Sequence[Image.Image], masks: Sequence[np.ndarray | None] | None = None
    ) -> list[tuple[Observation, S]]:
        """See `Environment.begin`."""
        images, given = list(images), _masks_of(images, masks)
        starts = [start_mask(mask, (image.height, image.width)) for image, mask in zip(images, given)]
        different = {id(image): image for image in images}
        encoded = {key: self._encode(image) for key, image in different.items()}
        keys = ((id(image), start if start is None else id(mask)) for image, mask, start in zip(images, given, starts))
        chosen, places = distinct(keys)
        begun = self._start([encoded[id(images[i])] for i in chosen], [starts[i] for i in chosen])
        return [begun[place] for place in places]

    def advance(self, states: Sequence[S], clicks: Sequence[Click]) -> list[tuple[Observation, S]]:
        """See `Environment.advance`."""
        check_lengths("click", clicks, "state", states)
        for state, click in zip(states, clicks):
            check_click(click, self._own(state).image.size)
        chosen, places = distinct((id(state), click) for state, click in zip(states, clicks))
        tried = self._advance([states[i] for i in chosen], [clicks[i] for i in chosen]) if chosen else []
        return [tried[place] for place in places]

    def _own(self, state: S) -> S:
        """The state, if this environment made it."""
        if not isinstance(state, State) or state.image.owner is not self._owner:
            raise ValueError("this state is not of this environment; give one that its snapshot, begin or advance gave")
        return state

    @abstractmethod
    def _encode(self, image: Image.Image) -> E:
        """What is kept of an image."""

    @abstractmethod
    def _start(self, images: Sequence[E], masks: Sequence[np.ndarray | None]) -> list[tuple[Observation, S]]:
        """Episodes from masks that fit and are not empty, or from the empty mask; the arrays may be kept."""

    @abstractmethod
    def _advance(self, states: Sequence[S], clicks: Sequence[Click]) -> list[tuple[Observation, S]]:
        """One or more clicks that were checked, all different."""


def distinct(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Where each different key comes first, and for every key its place among these."""
    order: dict[Hashable, int] = {}
    chosen: list[int] = []
    places: list[int] = []
    for i, key in enumerate(keys):
        if key not in order:
            order[key] = len(chosen)
            chosen.append(i)
        places.append(order[key])
    return chosen, places


def describe_environment(environment: Environment | None) -> str:
    """What a score depends on; empty without an environment."""
    return "" if environment is None else repr(environment)


def check_click(click: Click, size: tuple[int, int]) -> None:
    """Refuse a click outside of an image of a size `(H, W)`.

    Raises:
        ValueError: naming it.
    """
    if not (0 <= click.row < size[0] and 0 <= click.col < size[1]):
        raise ValueError(f"click at row {click.row}, column {click.col} lies outside of an image of size {size} (H, W)")


def check_lengths(name: str, values: Sequence[Any], of: str, others: Sequence[Any]) -> None:
    """Refuse lists that do not belong together.

    Raises:
        ValueError: with both lengths.
    """
    if len(values) != len(others):
        raise ValueError(f"got {len(values)} {name}s for {len(others)} {of}s; give one {name} for each {of}")


def start_mask(mask: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """A mask to start from as a bool array of its own, or None for an empty one.

    Raises:
        ValueError: for a mask of another size `(H, W)`, or with values other than 0 and 1.
    """
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != size:
        raise ValueError(f"mask of shape {mask.shape} does not fit the image of size {size} (H, W); resize it first")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"mask holds values from {mask.min()} to {mask.max()}; give a bool mask, such as chances > 0.5"
        )
    return mask.astype(bool) if mask.any() else None


def _masks_of(images: Sequence[Any], masks: Sequence[np.ndarray | None] | None) -> list[np.ndarray | None]:
    """A mask or None for each image."""
    given: list[np.ndarray | None] = [None] * len(images) if masks is None else list(masks)
    check_lengths("mask", given, "image", images)
    return given

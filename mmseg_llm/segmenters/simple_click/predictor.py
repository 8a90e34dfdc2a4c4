"""SimpleClickEnvironment: clicks on an image, with zoom-in and a flipped second look (SegAgent specification section 2.2).

Every step crops the region of interest of the image and of the previous probability, stretches it to a square, segments it with
all clicks so far, and pastes the probability back; what lies outside of the region becomes 0.

Legend: H W pixels, S side of the network's input, K candidates, P points per sign, F looks (2 with flip, else 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as functional

from mmseg_llm.geometry import load_image
from mmseg_llm.segmenters.environment import Environment, Observation, check_click
from mmseg_llm.structures import Click

if TYPE_CHECKING:
    from PIL import Image

InitMode = Literal["clicks", "direct"]
# First and last row, first and last column, all inclusive.
Region = tuple[int, int, int, int]

# The region of interest is drawn around what is likelier than this, whatever the threshold of the mask is.
ZOOM_CHANCE = 0.5
# A stored region that overlaps the one it would now be less than this is replaced.
ZOOM_OVERLAP = 0.5
# Clicks that lead into a given mask, and the IoU they must reach or else the mask itself is taken.
INIT_CLICKS = 2
INIT_IOU = 0.8


@dataclass(frozen=True, eq=False)
class SimpleClickState:
    """Where an episode stands; nothing in it is ever written to.

    Attributes:
        episode: which `reset` it belongs to.
        clicks: all clicks so far.
        chances: float32 `(1, 1, H, W)` of the last step, None before it.
        region: stored region of interest.
    """

    episode: object
    clicks: tuple[Click, ...] = ()
    chances: torch.Tensor | None = None
    region: Region | None = None


class SimpleClickEnvironment(Environment):
    """An episode of clicks answered by SimpleClick.

    Args:
        network: a file of weights (`load_simple_click` reads it, on the first image), or a module that maps `(B, 4, S, S)`
            (RGB in 0..1, previous probability) and points `(B, 2P, 3)` to logits `(B, 1, S, S)`.
        flip_tta: average the logits with those of the mirrored crop.
        zoom_in: crop to the object; otherwise the whole image is stretched to the square at each step.
        size: S in pixels; 448 for all official scores but those on DAVIS (672).
        threshold: a pixel is in the mask above this probability.
        min_crop: smallest side of a region in pixels of the image.
        expand: side of a region in sides of the object.
        net_clicks_limit: show only so many of the first clicks to the network; all when None.
        init_mode: how an episode starts from a given mask: by clicks into it, with the mask itself where these do not
            lead there, or always with the mask itself as previous prediction.
        device: a GPU where there is one when None.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        network: str | Path | torch.nn.Module,
        *,
        flip_tta: bool = True,
        zoom_in: bool = True,
        size: int = 448,
        threshold: float = 0.49,
        min_crop: int = 200,
        expand: float = 1.4,
        net_clicks_limit: int | None = None,
        init_mode: InitMode = "clicks",
        device: str | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it is a probability between 0 and 1, 0.49 officially")
        for name, value, least in (("size", size, 1), ("min_crop", min_crop, 1), ("expand", expand, 1)):
            if not value >= least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        if net_clicks_limit is not None and net_clicks_limit < 1:
            raise ValueError(f"net_clicks_limit is {net_clicks_limit}; give at least 1, or None for all clicks")
        if init_mode not in get_args(InitMode):
            raise ValueError(f"init_mode is '{init_mode}'; use one of {', '.join(get_args(InitMode))}")
        self.network = network
        self.flip_tta, self.zoom_in, self.size, self.threshold = flip_tta, zoom_in, size, threshold
        self.min_crop, self.expand, self.net_clicks_limit = min_crop, expand, net_clicks_limit
        self.init_mode = init_mode
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._module: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._image: torch.Tensor | None = None  # (1, 3, H, W) in 0..1
        self._state = SimpleClickState(object())

    def __repr__(self) -> str:
        """Weights and settings: part of the protocol of a score."""
        source = type(self.network).__name__ if isinstance(self.network, torch.nn.Module) else str(self.network)
        names = ("flip_tta", "zoom_in", "size", "threshold", "min_crop", "expand", "net_clicks_limit", "init_mode")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({source!r}, {settings})"

    def prepare(self) -> None:
        """Load the weights unless they are there.

        Raises:
            ValueError: if the file is missing or holds something else.
        """
        if self._module is None:
            module = self.network
            if not isinstance(module, torch.nn.Module):
                from mmseg_llm.segmenters.simple_click.weights import load_simple_click

                module = load_simple_click(module)
            self._module = module.eval().requires_grad_(False).to(self.device)

    def reset(self, image: Image.Image, init_mask: np.ndarray | None = None) -> Observation:
        """Start an episode, with an empty mask or (see `init_mode`) from a bool mask `(H, W)` of another source.

        Raises:
            ValueError: if the mask has another size than the image, or is neither bool nor 0/1.
        """
        self.prepare()
        pixels = torch.from_numpy(np.array(load_image(image)))  # (H, W, 3)
        if init_mask is not None:
            init_mask = _as_bool(init_mask, (pixels.shape[0], pixels.shape[1]))
        self._image = (pixels.permute(2, 0, 1)[None].float() / 255).to(self.device)
        self._state = SimpleClickState(object())
        return self._observe() if init_mask is None or not init_mask.any() else self._start_from(init_mask)

    def step(self, click: Click) -> Observation:
        """See `Environment.step`."""
        check_click(click, self.image_size)
        self._state = self._advance([click])[0]
        return self._observe()

    def step_many(self, clicks: Sequence[Click]) -> list[tuple[Observation, Any]]:
        """See `Environment.step_many`; all K candidates pass through the network as one batch."""
        for click in clicks:
            check_click(click, self.image_size)
        states = self._advance(clicks) if clicks else []
        return [(self._observe(state), state) for state in states]

    def snapshot(self) -> SimpleClickState:
        """See `Environment.snapshot`; refers to the present tensors, copies nothing."""
        return self._state

    def restore(self, state: SimpleClickState) -> None:
        """See `Environment.restore`.

        Raises:
            ValueError: for a state of another episode.
        """
        if not isinstance(state, SimpleClickState) or state.episode is not self._state.episode:
            raise ValueError("this state belongs to another episode; restore only what was taken since the last reset")
        self._state = state

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`(H, W)` of the present image."""
        return None if self._image is None else (self._image.shape[-2], self._image.shape[-1])

    def _start_from(self, mask: np.ndarray) -> Observation:
        """Bring the present, empty episode to a given mask."""
        empty = self._state
        if self.init_mode == "clicks":
            from mmseg_llm.segmenters.oracle import next_click

            seen = self._observe()
            for _ in range(INIT_CLICKS):
                click = next_click(mask, seen.mask, clicked=seen.clicks, rule="clean")
                if click is not None:
                    seen = self.step(click)
            if (seen.mask & mask).sum() >= INIT_IOU * (seen.mask | mask).sum():
                return seen
        self._state = replace(empty, chances=torch.from_numpy(mask)[None, None].float().to(self.device))
        return self._observe()

    def _observe(self, state: SimpleClickState | None = None) -> Observation:
        """What a state shows; the arrays are copies."""
        state = state or self._state
        assert self._image is not None
        chances = self._image.new_zeros(self._image.shape[-2:]) if state.chances is None else state.chances[0, 0]
        shown = chances.cpu().numpy().copy()
        return Observation(shown > np.float32(self.threshold), shown, None, state.clicks)

    def _advance(self, clicks: Sequence[Click]) -> list[SimpleClickState]:
        """The states that each of K clicks leads to from the present one."""
        assert self._image is not None and self._module is not None
        size, start = (self._image.shape[-2], self._image.shape[-1]), self._state
        previous = self._image.new_zeros((1, 1, *size)) if start.chances is None else start.chances
        states = [replace(start, clicks=(*start.clicks, click)) for click in clicks]
        regions = [self._region(state, size) for state in states]
        with torch.inference_mode():
            inputs = torch.cat([self._crop(self._image, previous, region) for region in regions])  # (K, 4, S, S)
            points = self._points(states, regions)  # (F K, 2P, 3)
            logits = self._module(torch.cat((inputs, inputs.flip(3))) if self.flip_tta else inputs, points)
            if self.flip_tta:
                straight, mirrored = logits.float().chunk(2)
                logits = (straight + mirrored.flip(3)) * 0.5
            chances = logits.float().sigmoid()  # (K, 1, S, S)
            return [
                replace(state, chances=_paste(looked, region, size), region=region)
                for state, region, looked in zip(states, regions, chances.split(1), strict=True)
            ]

    def _region(self, state: SimpleClickState, size: tuple[int, int]) -> Region:
        """The region of interest of the next look: the stored one, unless a click or the object has left it."""
        whole = (0, size[0] - 1, 0, size[1] - 1)
        if not self.zoom_in:
            return whole
        candidate = whole
        if state.chances is not None:
            likely = (state.chances[0, 0] > ZOOM_CHANCE).cpu().numpy()
            if likely.any():
                candidate = expanded(_extent(likely, state.clicks), size, self.expand, self.min_crop)
        stored = state.region
        if stored is None or overlap(stored, candidate) < ZOOM_OVERLAP:
            return candidate
        # The last row and column of a region count as outside here (specification section 12, number 20).
        is_inside = [
            stored[0] <= click.row < stored[1] and stored[2] <= click.col < stored[3]
            for click in state.clicks
            if click.is_positive
        ]
        return stored if all(is_inside) else candidate

    def _crop(self, image: torch.Tensor, previous: torch.Tensor, region: Region) -> torch.Tensor:
        """Region of image and previous probability, stretched to `(1, 4, S, S)`."""
        top, bottom, left, right = region
        crop = [values[:, :, top : bottom + 1, left : right + 1] for values in (image, previous)]
        return functional.interpolate(
            torch.cat(crop, 1), size=(self.size, self.size), mode="bilinear", align_corners=True
        )

    def _points(self, states: Sequence[SimpleClickState], regions: Sequence[Region]) -> torch.Tensor:
        """Clicks in pixels of S, float32 `(F K, 2P, 3)` of (row, col, order): positive, then negative, padded with -1."""
        looks: list[tuple[list[Any], list[Any]]] = []
        for is_mirrored in (False, True)[: 1 + self.flip_tta]:
            for state, (top, bottom, left, right) in zip(states, regions, strict=True):
                signs: tuple[list[Any], list[Any]] = ([], [])
                for order, click in enumerate(state.clicks[: self.net_clicks_limit]):
                    row = self.size * (click.row - top) / (bottom - top + 1)
                    col = self.size * (click.col - left) / (right - left + 1)
                    signs[0 if click.is_positive else 1].append(
                        (row, self.size - col - 1 if is_mirrored else col, order)
                    )
                looks.append(signs)
        most = max(1, *(len(sign) for signs in looks for sign in signs))
        rows = [[point for sign in signs for point in sign + [(-1, -1, -1)] * (most - len(sign))] for signs in looks]
        return torch.tensor(rows, dtype=torch.float32, device=self.device)


def expanded(extent: Region, size: tuple[int, int], expand: float, min_crop: int) -> Region:
    """An extent grown about its centre to `expand` times its sides, at least `min_crop` pixels, within the image."""
    bounds: list[int] = []
    for low, high, length in ((*extent[:2], size[0]), (*extent[2:], size[1])):
        centre, side = 0.5 * (low + high), max(expand * (high - low + 1), min_crop)
        bounds += [max(0, round(centre - 0.5 * side)), min(length - 1, round(centre + 0.5 * side))]
    return bounds[0], bounds[1], bounds[2], bounds[3]


def overlap(first: Region, second: Region) -> float:
    """Product of the IoUs of two regions along rows and along columns."""
    product = 1.0
    for low, high, other_low, other_high in ((*first[:2], *second[:2]), (*first[2:], *second[2:])):
        shared = max(0, min(high, other_high) - max(low, other_low) + 1)
        product *= shared / (max(high, other_high) - min(low, other_low) + 1)
    return product


def _extent(likely: np.ndarray, clicks: Sequence[Click]) -> Region:
    """Tight region around the likely pixels and all positive clicks."""
    rows, cols = np.flatnonzero(likely.any(1)).tolist(), np.flatnonzero(likely.any(0)).tolist()
    rows += [click.row for click in clicks if click.is_positive]
    cols += [click.col for click in clicks if click.is_positive]
    return min(rows), max(rows), min(cols), max(cols)


def _paste(chances: torch.Tensor, region: Region, size: tuple[int, int]) -> torch.Tensor:
    """Probability `(1, 1, S, S)` of a region at its place in the image `(1, 1, H, W)`, 0 elsewhere."""
    top, bottom, left, right = region
    fitted = functional.interpolate(
        chances, size=(bottom - top + 1, right - left + 1), mode="bilinear", align_corners=True
    )
    return functional.pad(fitted, (left, size[1] - 1 - right, top, size[0] - 1 - bottom))


def _as_bool(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A given mask as bool of the size of the image."""
    mask = np.asarray(mask)
    if mask.shape != size:
        raise ValueError(
            f"init_mask of shape {mask.shape} does not fit the image of size {size} (H, W); resize it first"
        )
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"init_mask holds values from {mask.min()} to {mask.max()}; give a bool mask, such as chances > 0.5"
        )
    return mask.astype(bool)

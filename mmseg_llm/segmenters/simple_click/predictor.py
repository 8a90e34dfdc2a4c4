"""SimpleClickEnvironment: clicks on an image, with zoom-in and a flipped second look (SegAgent specification section 2.2).

Every step crops the region of interest of the image and of the previous probability, stretches it to a square, segments it with
all clicks so far, and pastes the probability back; what lies outside of the region becomes 0.

Legend: H W pixels of an image, S side of the network's input, K clicks seen together, P points per sign, F looks (2 with flip,
else 1).
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
from mmseg_llm.segmenters.environment import Encoded, LockStepEnvironment, Observation, State
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
class SimpleClickImage(Encoded):
    """An image on the device: float32 `(1, 3, H, W)` in 0..1."""

    pixels: torch.Tensor


@dataclass(frozen=True, eq=False)
class SimpleClickState(State):
    """Where an episode stands.

    Attributes:
        image: that is clicked on.
        chances: float32 `(1, 1, H, W)` of the last step, None before it.
        region: stored region of interest.
    """

    image: SimpleClickImage
    chances: torch.Tensor | None = None
    region: Region | None = None


class SimpleClickEnvironment(LockStepEnvironment[SimpleClickImage, SimpleClickState]):
    """Clicks answered by SimpleClick.

    Args:
        network: a file of weights (`load_simple_click` reads it, on the first image), or a module that maps `(B, 4, S, S)`
            (RGB in 0..1, previous probability) and points `(B, 2P, 3)` to logits `(B, 1, S, S)`.
        flip_tta: average the logits with those of the mirrored crop.
        zoom_in: crop to the object; otherwise the whole image is stretched to the square at each step.
        size: S in pixels; 448 for all official scores but those on DAVIS (672).
        threshold: a pixel is in the mask above this probability.
        min_crop: smallest side of a region in pixels of the image.
        expand: side of a region in sides of the object.
        merge_outside: keep the previous probability outside of a region; the official code sets it to 0 there.
        net_clicks_limit: show only so many of the first clicks to the network; all when None.
        init_mode: how an episode starts from a given mask: by clicks into it, with the mask itself where these do not
            lead there, or always with the mask itself as previous prediction.
        batch_size: clicks that pass through the network together, on whatever images.
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
        merge_outside: bool = False,
        net_clicks_limit: int | None = None,
        init_mode: InitMode = "clicks",
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; it is a probability between 0 and 1, 0.49 officially")
        for name, value, least in (
            ("size", size, 1),
            ("min_crop", min_crop, 1),
            ("expand", expand, 1),
            ("batch_size", batch_size, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        if net_clicks_limit is not None and net_clicks_limit < 1:
            raise ValueError(f"net_clicks_limit is {net_clicks_limit}; give at least 1, or None for all clicks")
        if init_mode not in get_args(InitMode):
            raise ValueError(f"init_mode is '{init_mode}'; use one of {', '.join(get_args(InitMode))}")
        self.network = network
        self.flip_tta, self.zoom_in, self.size, self.threshold = flip_tta, zoom_in, size, threshold
        self.min_crop, self.expand, self.net_clicks_limit = min_crop, expand, net_clicks_limit
        self.merge_outside = merge_outside
        self.init_mode, self.batch_size = init_mode, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._module: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __repr__(self) -> str:
        """Weights and settings: part of the protocol of a score."""
        source = type(self.network).__name__ if isinstance(self.network, torch.nn.Module) else str(self.network)
        names = (
            "flip_tta",
            "zoom_in",
            "size",
            "threshold",
            "min_crop",
            "expand",
            "merge_outside",
            "net_clicks_limit",
            "init_mode",
        )
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

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`(H, W)` of the present image."""
        return None if self._state is None else self._state.image.size

    def _encode(self, image: Image.Image) -> SimpleClickImage:
        self.prepare()
        pixels = torch.from_numpy(np.array(load_image(image))).permute(2, 0, 1)  # uint8 (3, H, W)
        return SimpleClickImage(self._owner, (image.height, image.width), (pixels[None].float() / 255).to(self.device))

    def _start(
        self, images: Sequence[SimpleClickImage], masks: Sequence[np.ndarray | None]
    ) -> list[tuple[Observation, SimpleClickState]]:
        begun = [self._shown(SimpleClickState(image, ())) for image in images]
        given = {place: mask for place, mask in enumerate(masks) if mask is not None}
        reached = self._click_into(given, begun) if self.init_mode == "clicks" else {}
        for place, mask in given.items():
            chances = torch.from_numpy(mask)[None, None].float().to(self.device)
            begun[place] = reached.get(place) or self._shown(replace(begun[place][1], chances=chances))
        return begun

    def _click_into(
        self, masks: dict[int, np.ndarray], begun: Sequence[tuple[Observation, SimpleClickState]]
    ) -> dict[int, tuple[Observation, SimpleClickState]]:
        """Episodes, by their place, that a few clicks bring to a given mask; without those that they do not."""
        from mmseg_llm.segmenters.oracle import next_click

        reached = {place: begun[place] for place in masks}
        for _ in range(INIT_CLICKS):
            clicks = {
                place: next_click(masks[place], shown.mask, clicked=shown.clicks, rule="clean")
                for place, (shown, _) in reached.items()
            }
            chosen = {place: click for place, click in clicks.items() if click is not None}
            states = [reached[place][1] for place in chosen]
            reached.update(zip(chosen, self._advance(states, list(chosen.values()))))
        return {
            place: (shown, state)
            for place, (shown, state) in reached.items()
            if (shown.mask & masks[place]).sum() >= INIT_IOU * (shown.mask | masks[place]).sum()
        }

    def _shown(self, state: SimpleClickState) -> tuple[Observation, SimpleClickState]:
        """What a state shows, in arrays of its own."""
        size = state.image.size
        chances = np.zeros(size, np.float32) if state.chances is None else state.chances[0, 0].cpu().numpy().copy()
        return Observation(chances > np.float32(self.threshold), chances, None, state.clicks), state

    def _advance(
        self, states: Sequence[SimpleClickState], clicks: Sequence[Click]
    ) -> list[tuple[Observation, SimpleClickState]]:
        clicked = [replace(state, clicks=(*state.clicks, click)) for state, click in zip(states, clicks)]
        tried = []
        for start in range(0, len(clicked), self.batch_size):
            tried += [self._shown(state) for state in self._look(clicked[start : start + self.batch_size])]
        return tried

    @torch.inference_mode()
    def _look(self, states: Sequence[SimpleClickState]) -> list[SimpleClickState]:
        """What the network makes of K states whose last click it has not seen."""
        assert self._module is not None
        regions = [self._region(state) for state in states]
        inputs = torch.cat([self._crop(state, region) for state, region in zip(states, regions)])  # (K, 4, S, S)
        points = self._points(states, regions)  # (F K, 2P, 3)
        logits = self._module(torch.cat((inputs, inputs.flip(3))) if self.flip_tta else inputs, points)
        if self.flip_tta:
            straight, mirrored = logits.float().chunk(2)
            logits = (straight + mirrored.flip(3)) * 0.5
        chances = logits.float().sigmoid()  # (K, 1, S, S)
        return [
            replace(state, chances=_paste(looked, region, state.image.size, self._under(state)), region=region)
            for state, region, looked in zip(states, regions, chances.split(1), strict=True)
        ]

    def _under(self, state: SimpleClickState) -> torch.Tensor | None:
        """Probability that stays outside of a region."""
        return state.chances if self.merge_outside else None

    def _region(self, state: SimpleClickState) -> Region:
        """The region of interest of the next look: the stored one, unless a click or the object has left it."""
        size = state.image.size
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

    def _crop(self, state: SimpleClickState, region: Region) -> torch.Tensor:
        """Region of image and previous probability, stretched to `(1, 4, S, S)`."""
        top, bottom, left, right = region
        image = state.image.pixels
        previous = torch.zeros_like(image[:, :1]) if state.chances is None else state.chances
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


def _paste(
    chances: torch.Tensor, region: Region, size: tuple[int, int], under: torch.Tensor | None = None
) -> torch.Tensor:
    """Probability `(1, 1, S, S)` of a region at its place in the image `(1, 1, H, W)`, on another one or on 0."""
    top, bottom, left, right = region
    fitted = functional.interpolate(
        chances, size=(bottom - top + 1, right - left + 1), mode="bilinear", align_corners=True
    )
    if under is None:
        return functional.pad(fitted, (left, size[1] - 1 - right, top, size[0] - 1 - bottom))
    pasted = under.clone()
    pasted[:, :, top : bottom + 1, left : right + 1] = fitted
    return pasted

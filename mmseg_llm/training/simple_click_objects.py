"""ClickViews: objects of any labelled dataset as training views with first clicks.

Legend: B batch, H W pixels of an image, S side of a view, P points per sign, N objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.training.data import Draw
from mmseg_llm.training.simple_click_views import PointSampling, Views, colour_changes, draw_map, draw_points, warp

# Number of a dataset and of a sample in it.
Place = tuple[int, int]

DEFAULT_VIEWS, DEFAULT_POINTS = Views(), PointSampling()
# Images tried before a dataset is called one without objects.
TRIES = 50
# A view that shows less of its object than this, in pixels, is drawn again.
LEAST_SEEN = 16


@dataclass(frozen=True)
class ClickExample:
    """A view of an object.

    Attributes:
        image: uint8 `(S, S, 3)`.
        target: bool `(S, S)`.
        points: float32 `(2, P, 3)` of (row, col, order), positive ones first, padded with -1.
    """

    image: np.ndarray
    target: np.ndarray
    points: np.ndarray


def collate_clicks(examples: Sequence[ClickExample]) -> dict[str, torch.Tensor]:
    """`image` uint8 `(B, 3, S, S)`, `target` bool `(B, S, S)`, `points` float32 `(B, 2, P, 3)`."""
    return {
        "image": torch.from_numpy(np.stack([example.image for example in examples])).permute(0, 3, 1, 2).contiguous(),
        "target": torch.from_numpy(np.stack([example.target for example in examples])),
        "points": torch.from_numpy(np.stack([example.points for example in examples])),
    }


class ClickViews(Dataset[ClickExample]):
    """Datasets of samples seen as views of single objects, or of two at once, drawn with replacement.

    Args:
        datasets: every mask of every query is an object.
        side: S.
        shares: how often each dataset is drawn from; by its number of samples when None.
        views, points: how to draw.
        merge: how often two objects of an image are one target.
        min_object: smallest object in pixels of the image.
        cached_images: decoded images kept in memory, per loader process.
        seed: of all draws.

    Raises:
        ValueError: if there are no datasets, or the shares do not fit.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        side: int,
        shares: Sequence[float] | None = None,
        views: Views = DEFAULT_VIEWS,
        points: PointSampling = DEFAULT_POINTS,
        merge: float = 0.15,
        min_object: int = 100,
        cached_images: int = 0,
        seed: int = 0,
    ) -> None:
        self.datasets, self.side, self.views, self.points = list(datasets), side, views, points
        self.merge, self.min_object, self.seed = merge, min_object, seed
        self.cached_images, self._cache = cached_images, dict[Place, tuple[np.ndarray, np.ndarray, np.ndarray]]()
        self._colour = colour_changes(views.colour)
        weights = [len(dataset) for dataset in self.datasets] if shares is None else list(shares)
        if len(weights) != len(self.datasets) or not weights or min(weights) < 0 or not sum(weights):
            raise ValueError(f"shares {weights} do not fit {len(self.datasets)} datasets; give each one, 0 or more")
        self._chances = np.array(weights) / sum(weights)

    def __getitem__(self, draw: Draw) -> ClickExample:
        """The view that a pair of numbers stands for, such as (index, epoch).

        Raises:
            ValueError: if none of many images shows an object.
        """
        rng = np.random.default_rng([self.seed, *draw])
        for _ in range(TRIES):
            dataset = int(rng.choice(len(self.datasets), p=self._chances))
            image, masks, union = self.objects((dataset, int(rng.integers(len(self.datasets[dataset])))))
            example = self._view(image, masks, union, rng) if len(masks) else None
            if example is not None:
                return example
        raise ValueError(
            f"{TRIES} images of {', '.join(dataset.name for dataset in self.datasets)} show no object of "
            f"{self.min_object} pixels; lower data.min_object, or give datasets with masks"
        )

    def objects(self, place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image uint8 `(H, W, 3)`, its objects uint8 0/1 `(N, H, W)` and their union `(H, W)`."""
        if place in self._cache:
            return self._cache[place]
        sample = self.datasets[place[0]][place[1]]
        different = {mask.counts: mask for query in sample.queries for mask in query.masks or ()}
        arrays = [mask.array.astype(np.uint8) for mask in different.values() if mask.area >= self.min_object]
        masks = np.stack(arrays) if arrays else np.zeros((0, *sample.size), np.uint8)
        found = np.asarray(sample.load_image()), masks, np.asarray(masks.any(0), np.uint8)
        if len(self._cache) < self.cached_images:
            self._cache[place] = found
        return found

    def _view(
        self, image: np.ndarray, masks: np.ndarray, union: np.ndarray, rng: np.random.Generator
    ) -> ClickExample | None:
        """A view of one or two objects; None where so little of them is seen that nothing can be clicked on."""
        count = 2 if len(masks) > 1 and rng.random() < self.merge else 1
        whole = masks[rng.choice(len(masks), count, replace=False)].max(0)
        matrix = draw_map(whole, self.side, rng, self.views)
        seen, (target, others) = warp(image, (whole, union), matrix, self.side)
        if target.sum() < LEAST_SEEN:
            return None
        if self._colour is not None:
            self._colour.set_random_seed(int(rng.integers(2**31)))
            seen = self._colour(image=seen)["image"]
        return ClickExample(seen, target, draw_points(target, others, rng, self.points))

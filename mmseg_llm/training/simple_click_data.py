"""SimpleClickDataModule: views to train on, drawn by (seed, epoch, index), and held-out objects to click on.

Legend: H W pixels of an image, S side of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.training.data import EpochSampler, Parcel
from mmseg_llm.training.simple_click_objects import (
    DEFAULT_POINTS,
    DEFAULT_VIEWS,
    ClickExample,
    ClickViews,
    collate_clicks,
)
from mmseg_llm.training.simple_click_views import PointSampling, Views

if TYPE_CHECKING:
    pass


def _single_thread(worker: int) -> None:
    """One thread per loader process; OpenCV would take all cores for images of a few pixels."""
    import cv2

    cv2.setNumThreads(0)


class _Episodes(Dataset[Any]):
    """Held-out objects: image, mask bool `(H, W)`, and one fixed view for the loss."""

    def __init__(self, views: ClickViews, max_objects: int) -> None:
        self.views = views
        dataset = views.datasets[0]
        places = [(i, k) for i in range(len(dataset)) for k in range(len(views.objects((0, i))[1]))]
        if not places:
            raise ValueError(f"{dataset.name} has no object of {views.min_object} pixels to validate on")
        chosen = np.linspace(0, len(places) - 1, min(max_objects, len(places))).round().astype(int)
        self.places = [places[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray, ClickExample]:
        from PIL import Image

        place, number = self.places[index]
        image, masks, _ = self.views.objects((0, place))
        return Image.fromarray(image), masks[number] > 0, self.views[(index, 0)]


class SimpleClickDataModule(LightningDataModule):
    """Datasets of a training of SimpleClick.

    Args:
        train: samples with masks; every mask is an object.
        val: held-out samples.
        shares: how often each dataset of `train` is drawn from; by its number of samples when None.
        side: S of the views.
        batch_size: views per process and step.
        samples_per_epoch: views per epoch; as many as `train` has samples when None.
        views: how views are drawn.
        points: how first points are drawn.
        merge: how often two objects are one target.
        min_object: smallest object in pixels of the image.
        val_objects: most objects that are clicked on at a validation.
        cached_images: decoded images kept in memory, per loader process.
        num_workers: loader processes.
        seed: of shuffling and all draws.
    """

    def __init__(
        self,
        train: list[SampleDataset],
        val: SampleDataset | None = None,
        shares: list[float] | None = None,
        side: int = 448,
        batch_size: int = 32,
        samples_per_epoch: int | None = None,
        views: Views = DEFAULT_VIEWS,
        points: PointSampling = DEFAULT_POINTS,
        merge: float = 0.15,
        min_object: int = 100,
        val_objects: int = 64,
        cached_images: int = 0,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("side", side), ("batch_size", batch_size), ("val_objects", val_objects)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if not 0 <= merge <= 1:
            raise ValueError(f"merge is {merge}; it is a share between 0 and 1")
        self.train, self.val, self.shares, self.side, self.batch_size = train, val, shares, side, batch_size
        self.samples_per_epoch, self.views, self.points, self.merge = samples_per_epoch, views, points, merge
        self.min_object, self.val_objects, self.seed = min_object, val_objects, seed
        self.cached_images, self.num_workers = cached_images, num_workers

    def _views(self, datasets: Sequence[SampleDataset], shares: Sequence[float] | None = None) -> ClickViews:
        return ClickViews(
            *(datasets, self.side, shares, self.views, self.points, self.merge, self.min_object),
            cached_images=self.cached_images,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[ClickExample]:
        """Batches of `collate_clicks`."""
        trainer = self.trainer
        assert trainer is not None
        length = self.samples_per_epoch or sum(len(dataset) for dataset in self.train)
        sampler = EpochSampler(length, self.seed, trainer.global_rank, trainer.world_size)
        return DataLoader(
            self._views(self.train, self.shares),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate_clicks,
            drop_last=len(sampler) >= self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=_single_thread,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Single held-out objects, this rank's share; no loader where no `val` is given."""
        if self.val is None:
            return []
        trainer = self.trainer
        assert trainer is not None
        episodes = _Episodes(self._views([self.val]), self.val_objects)
        share = list(range(trainer.global_rank, len(episodes), trainer.world_size))
        return DataLoader(episodes, batch_size=1, sampler=share, collate_fn=Parcel, num_workers=0)

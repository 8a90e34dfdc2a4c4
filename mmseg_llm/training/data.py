"""PerceptionDataModule: datasets to batches. Heads render samples in the workers, seeded by (seed, epoch, index)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from mmseg_llm.backbones.collate import collate
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.heads.base import NoExampleError
from mmseg_llm.structures import Batch, Example, Sample

if TYPE_CHECKING:
    from mmseg_llm.backbones.codec import Codec
    from mmseg_llm.heads.base import Head
    from mmseg_llm.training.module import PerceptionModule

Draw = tuple[int, int]
MAX_FURTHER = 100  # samples that are tried in place of one that cannot be learnt from


class EpochSampler(Sampler[Draw]):
    """`(index, epoch)` of a shuffled epoch, this rank's share of it; every rank gets the same number, none a duplicate.

    Args:
        length: of the dataset.
        seed: of the shuffling.
        rank, world: process and number of processes.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if length < world:
            raise ValueError(f"a dataset of {length} samples cannot feed {world} processes; use fewer processes")
        self.length, self.seed, self.rank, self.world, self.epoch = length, seed, rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples per rank and epoch."""
        return self.length // self.world

    def __iter__(self) -> Iterator[Draw]:
        """Indices of this epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        share = order[self.rank :: self.world][: len(self)]
        return iter([(int(index), self.epoch) for index in share])


class _Rendered(Dataset[Example]):
    """A dataset seen through a head."""

    def __init__(self, dataset: SampleDataset, head: Head, codec: Codec, seed: int) -> None:
        self.dataset, self.codec, self.seed = dataset, codec, seed
        self.head = head.for_workers()

    def __getitem__(self, draw: Draw) -> Example:
        index, epoch = draw
        reason = ""
        for further in range(MAX_FURTHER):
            rng = np.random.default_rng([self.seed, epoch, index] + [further] * (further > 0))
            try:
                return self.head.build(self.dataset[index], self.codec, rng)
            except NoExampleError as error:
                reason = str(error)
                warnings.warn(f"another sample is taken: {reason}", stacklevel=2)
                index = int(rng.integers(len(self.dataset)))
        raise ValueError(
            f"{MAX_FURTHER} samples of {self.dataset.name} in a row cannot be learnt from; the last: {reason}"
        )


class _Collate:
    """Picklable collation."""

    def __init__(self, codec: Codec, label_padding: int) -> None:
        self.codec, self.label_padding = codec, label_padding

    def __call__(self, examples: Sequence[Example]) -> Parcel:
        return Parcel(collate(examples, self.codec, self.label_padding))


class Parcel:
    """What a loader yields: opaque to Lightning, which otherwise looks into every dataclass and refuses frozen ones."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Parcel:
        """Batches move as a whole; samples stay where they are."""
        content = self.content
        return Parcel(content.to(device, non_blocking=non_blocking)) if isinstance(content, Batch) else self

    def pin_memory(self) -> Parcel:
        """Called by the DataLoader."""
        return Parcel(self.content.pin_memory()) if isinstance(self.content, Batch) else self


class PerceptionDataModule(LightningDataModule):
    """Datasets of a run.

    Args:
        train, val, test: sources of samples; each may be absent where it is not used.
        head: name of the head the training samples are rendered by; the model's first one when None.
        batch_size: images per process and step.
        eval_batch_size: images predicted at once.
        num_workers: loader processes.
        seed: of shuffling and of what heads draw.
    """

    def __init__(
        self,
        train: SampleDataset | None = None,
        val: SampleDataset | None = None,
        test: SampleDataset | None = None,
        head: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.head_name = head
        self.batch_size, self.eval_batch_size, self.num_workers, self.seed = (
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
        )

    def dataset(self, split: str) -> SampleDataset:
        """The dataset of `train`, `val` or `test`.

        Raises:
            ValueError: if it is not configured.
        """
        dataset = getattr(self, split, None) if split in {"train", "val", "test"} else None
        if dataset is None:
            raise ValueError(f"the data config has no '{split}' dataset; add it under data.{split}")
        return dataset

    def train_dataloader(self) -> DataLoader[Example]:
        """Batches rendered by the head."""
        trainer = self.trainer
        assert trainer is not None
        model = cast("PerceptionModule", trainer.lightning_module).model
        head, codec = model.head(self.head_name), model.backbone.codec
        dataset = self.dataset("train")
        sampler = EpochSampler(len(dataset), self.seed, trainer.global_rank, trainer.world_size)
        return DataLoader(
            _Rendered(dataset, head, codec, self.seed),
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_Collate(codec, head.label_padding),
            drop_last=len(sampler) >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _eval_loader(self, split: str) -> DataLoader[Sample]:
        dataset = self.dataset(split)
        trainer = self.trainer
        assert trainer is not None
        # Every sample once: no padding, so ranks may differ in length; scores are gathered by sample id.
        share = list(range(trainer.global_rank, len(dataset), trainer.world_size))
        return DataLoader(
            cast("Dataset[Sample]", dataset),
            batch_size=self.eval_batch_size,
            sampler=share,
            collate_fn=Parcel,
            num_workers=0,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Lists of samples."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Lists of samples."""
        return self._eval_loader("test")

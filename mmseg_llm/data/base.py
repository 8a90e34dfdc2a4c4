"""What a dataset is: a sized, indexable source of `Sample`s that says what it left out."""

from __future__ import annotations

import gc
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmseg_llm.structures import Sample


class SampleDataset(ABC):
    """Map-style source of `Sample`s; knows nothing of models.

    Attributes:
        name: dataset and split, unique among the datasets of a run.
        skipped: reason -> number of records that are not offered.
    """

    name: str
    skipped: dict[str, int]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; raises IndexError past the end."""

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order."""
        return (self[index] for index in range(len(self)))

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, number of target instances)`, None for an unlabelled query.

        Readers that know these numbers without decoding masks override it.
        """
        for sample in self:
            for query in sample.queries:
                yield sample.id, None if query.masks is None else len(query.masks)

    def describe(self) -> dict[str, Any]:
        """Counts: samples, images, queries, queries without target and with several targets, skipped records."""
        images: set[str] = set()
        queries = no_target = multi_target = 0
        for image_id, num_targets in self.query_counts():
            images.add(image_id)
            queries += 1
            no_target += num_targets == 0
            multi_target += (num_targets or 0) > 1
        return {
            "name": self.name,
            "samples": len(self),
            "images": len(images),
            "queries": queries,
            "no_target": no_target,
            "multi_target": multi_target,
            "skipped": dict(self.skipped),
        }


class Faults:
    """What a reader does with a broken record: stop with one sentence, or leave it out and count it.

    Args:
        on_error: `raise` or `skip`.

    Raises:
        ValueError: for another `on_error`.
    """

    def __init__(self, on_error: str) -> None:
        if on_error not in {"raise", "skip"}:
            raise ValueError(f"on_error is '{on_error}'; use 'raise' or 'skip'")
        self.on_error = on_error
        self.counts: dict[str, int] = {}

    def report(self, reason: str, sentence: str) -> None:
        """Raise `sentence`, or count one record under `reason`."""
        if self.on_error == "raise":
            raise ValueError(f"{sentence}; mend the file or pass on_error='skip' to leave such records out")
        self.count(reason)

    def count(self, reason: str) -> None:
        """Count a record that is left out on purpose."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: if the file is missing or is not JSON.
    """
    collects = gc.isenabled()
    gc.disable()  # millions of new containers, none of them garbage: collecting in between nearly doubles the time
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; check the dataset folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download or export it again") from error
    finally:
        if collects:
            gc.enable()


class Subset(SampleDataset):
    """The first samples of a dataset.

    Args:
        dataset: the whole.
        count: how many to keep.

    Raises:
        ValueError: if `count` is not positive.
    """

    def __init__(self, dataset: SampleDataset, count: int) -> None:
        if count < 1:
            raise ValueError(f"a subset of {count} samples is empty; keep at least one")
        self.dataset, self.count = dataset, min(count, len(dataset))
        self.name, self.skipped = f"{dataset.name}[:{self.count}]", dataset.skipped

    def __len__(self) -> int:
        """Number of samples kept."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`."""
        if not -self.count <= index < self.count:
            raise IndexError(index)
        return self.dataset[index % self.count]


class Part(SampleDataset):
    """Samples `start` to `stop` (exclusive) of a dataset: to hold some back where a dataset has no split of its own.

    Args:
        dataset: the whole.
        start, stop: as of a slice.

    Raises:
        ValueError: if nothing is left.
    """

    def __init__(self, dataset: SampleDataset, start: int = 0, stop: int | None = None) -> None:
        self.dataset, self.range = dataset, range(len(dataset))[start:stop]
        if not self.range:
            raise ValueError(f"samples {start} to {stop} of the {len(dataset)} of {dataset.name} are none; widen them")
        self.name, self.skipped = f"{dataset.name}[{self.range.start}:{self.range.stop}]", dataset.skipped

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.range)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index` of this part."""
        return self.dataset[self.range[index]]

"""Several datasets one after the other."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from mmseg_llm.data.base import SampleDataset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmseg_llm.structures import Sample


class Concat(SampleDataset):
    """Plain concatenation, in the given order.

    Sample ids become `<dataset name>/<id>`, because the sets of the RefCOCO family share their image and reference
    ids, and a metric counts equal ids once.

    Args:
        datasets: parts; each with a name of its own.
        name: name of the whole, by default the names joined by `+`.

    Raises:
        ValueError: if there are no parts or two of them have the same name.
    """

    def __init__(self, datasets: Sequence[SampleDataset], name: str | None = None) -> None:
        names = [dataset.name for dataset in datasets]
        if not names:
            raise ValueError("Concat got no datasets; give at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"Concat got datasets of equal names {names}; give each its own `name`")
        self.datasets = list(datasets)
        self.name = name or "+".join(names)
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))

    @property
    def skipped(self) -> dict[str, int]:  # type: ignore[override]
        """Skipped records of all parts, reasons prefixed by the part's name."""
        return {f"{part.name}: {reason}": count for part in self.datasets for reason, count in part.skipped.items()}

    def __len__(self) -> int:
        """Number of samples of all parts."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, negative ones from the end."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} samples")
        part = bisect_right(self._ends, position)
        dataset = self.datasets[part]
        sample = dataset[position - (self._ends[part] - len(dataset))]
        return replace(sample, id=f"{dataset.name}/{sample.id}")

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query of all parts: `(image id, number of target instances)`."""
        for dataset in self.datasets:
            for image_id, count in dataset.query_counts():
                yield f"{dataset.name}/{image_id}", count

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
        repeats: how many times each part comes, with the same ids; once when None. Heads draw anew for every repeat.

    Raises:
        ValueError: if there are no parts, two of them have the same name, or `repeats` does not fit.
    """

    def __init__(
        self, datasets: Sequence[SampleDataset], name: str | None = None, repeats: tuple[int, ...] | None = None
    ) -> None:
        names = [dataset.name for dataset in datasets]
        if not names:
            raise ValueError("Concat got no datasets; give at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"Concat got datasets of equal names {names}; give each its own `name`")
        self.datasets = list(datasets)
        self.repeats = (1,) * len(names) if repeats is None else tuple(repeats)
        if len(self.repeats) != len(names) or min(self.repeats) < 1:
            raise ValueError(
                f"Concat got the repeats {list(self.repeats)} for {len(names)} datasets; give each at least 1"
            )
        self.name = name or "+".join(names)
        self._ends = list(accumulate(len(part) * times for part, times in zip(self.datasets, self.repeats)))

    @property
    def skipped(self) -> dict[str, int]:  # type: ignore[override]
        """Skipped records of all parts, reasons prefixed by the part's name."""
        return {f"{part.name}: {reason}": count for part in self.datasets for reason, count in part.skipped.items()}

    def __len__(self) -> int:
        """Number of samples of all parts, repeats included."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, negative ones from the end."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} samples")
        part = bisect_right(self._ends, position)
        dataset = self.datasets[part]
        start = self._ends[part - 1] if part else 0
        sample = dataset[(position - start) % len(dataset)]
        return replace(sample, id=f"{dataset.name}/{sample.id}")

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query of all parts, repeats included: `(image id, number of target instances)`."""
        for dataset, times in zip(self.datasets, self.repeats):
            for _ in range(times):
                for image_id, count in dataset.query_counts():
                    yield f"{dataset.name}/{image_id}", count

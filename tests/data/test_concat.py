"""Several datasets as one, some of them repeated."""

from __future__ import annotations

import pytest

from mmseg_llm.data import Concat, SampleDataset
from mmseg_llm.structures import Query, Sample


class Numbers(SampleDataset):
    """`count` samples with one unlabelled query each."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.skipped = name, count, {"odd": 1}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return Sample(image="x.jpg", size=(2, 2), queries=(Query("a"),), id=str(index), source=self.name)


def ids(dataset):
    return [sample.id for sample in dataset]


def test_order_and_ids():
    dataset = Concat([Numbers("a", 2), Numbers("b", 1)])
    assert ids(dataset) == ["a/0", "a/1", "b/0"]
    assert dataset[-1].id == "b/0" and dataset.name == "a+b"
    assert dataset.skipped == {"a: odd": 1, "b: odd": 1}
    with pytest.raises(IndexError, match="outside of 3 samples"):
        dataset[3]


def test_repeats():
    dataset = Concat([Numbers("a", 2), Numbers("empty", 0), Numbers("b", 1)], repeats=(2, 5, 3))
    assert ids(dataset) == ["a/0", "a/1", "a/0", "a/1", "b/0", "b/0", "b/0"]
    assert len(dataset) == 7 and dataset[-4].id == "a/1"
    facts = dataset.describe()
    assert (facts["samples"], facts["queries"], facts["images"]) == (7, 7, 3)
    assert facts["skipped"] == {"a: odd": 1, "empty: odd": 1, "b: odd": 1}, "counted once, however often a part comes"
    nested = Concat([dataset, Numbers("c", 1)], repeats=(1, 2))
    assert ids(nested)[-3:] == [f"{dataset.name}/b/0", "c/0", "c/0"]


@pytest.mark.parametrize("repeats", [(1,), (1, 0), (2, -1), (1, 1, 1), ()])
def test_wrong_repeats(repeats):
    with pytest.raises(ValueError, match=r"repeats .* for 2 datasets; give each at least 1"):
        Concat([Numbers("a", 2), Numbers("b", 1)], repeats=repeats)


def test_wrong_parts():
    with pytest.raises(ValueError, match="no datasets"):
        Concat([])
    with pytest.raises(ValueError, match="equal names"):
        Concat([Numbers("a", 1), Numbers("a", 1)])

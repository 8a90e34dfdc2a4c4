"""Questions made from labelled points."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.data import Concat
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.data.depth.questions import GIVEN, QuestionDataset
from mmseg_llm.questions import QUESTIONS, measure
from mmseg_llm.structures import Camera, DepthPoint, Query, Sample

CAMERA = Camera(50.0, 55.0, 20.0, 18.0, "planar")
TASKS = {"depth": 1.0, "planar_depth": 1.0, "two_point_distance": 1.0, "speed": 1.0, "time": 1.0}


class Points(SampleDataset):
    """Three samples of eight points."""

    name, skipped = "points", {}

    def __init__(self, **changes):
        self.changes = changes

    def __len__(self):
        return 3

    def __getitem__(self, index):
        index %= 3
        rng = np.random.default_rng(index)
        points = [DepthPoint(float(x), float(y), float(z)) for x, y, z in rng.uniform(1, 30, (8, 3))]
        queries = tuple(Query("", points=(point,), task="depth", id=str(i)) for i, point in enumerate(points))
        fields = {"camera": CAMERA, "queries": queries, "id": str(index)} | self.changes
        return Sample(Image.new("RGB", (40, 36)), (36, 40), **fields)


def test_labels_follow_from_points():
    """Against the formulas of the specification, section I, written out."""
    found = Counter()
    for sample in QuestionDataset(Points(), TASKS, per_image=40):
        assert len(sample.queries) == 40 and len({query.id for query in sample.queries}) == 40
        for query in sample.queries:
            places = [
                point.metres * np.array([(point.x - 20) / 50, (point.y - 18) / 55, 1.0]) for point in query.points
            ]
            distance = float(np.linalg.norm(places[0]))
            expected = {
                "depth": None,
                "planar_depth": query.points[0].metres,
                "two_point_distance": float(np.linalg.norm(places[0] - places[-1])),
                "speed": distance / float(query.text or "nan"),
                "time": distance / float(query.text or "nan"),
            }[query.task]
            assert query.value == (None if expected is None else pytest.approx(expected))
            assert len(query.points) == QUESTIONS[query.task].num_points
            if query.task in GIVEN:
                low, high = GIVEN[query.task]
                assert low <= float(query.text) <= high
            found[query.task] += 1
    assert found.keys() == TASKS.keys() and min(found.values()) > 10


def test_draws_depend_on_seed_and_index_only():
    first, again, other = (QuestionDataset(Points(), TASKS, per_image=9, seed=seed) for seed in (0, 0, 1))
    assert first[2] == again[2] == first[-1] != other[2]
    assert list(first.query_counts()) == [(str(i), None) for i in range(3) for _ in range(9)]
    twice = QuestionDataset(Concat([Points()], repeats=(2,)), TASKS, per_image=9)
    assert twice.describe()["queries"] == sum(len(sample.queries) for sample in twice) == 54
    assert first.name == "points/depth+planar_depth+two_point_distance+speed+time"
    with pytest.raises(IndexError):
        first[3]


def test_refusals():
    for tasks, message in (
        ({"object_height": 1.0}, "cannot be made from points"),
        ({"depth": 0.0}, "share of 'depth' is 0.0"),
        ({}, "must name one at least"),
    ):
        with pytest.raises(ValueError, match=message):
            QuestionDataset(Points(), tasks)
    two = {"two_point_distance": 1.0}
    with pytest.raises(ValueError, match="has no camera"):
        QuestionDataset(Points(camera=None), two)[0]
    with pytest.raises(ValueError, match="no place in space"):
        QuestionDataset(Points(camera=Camera(50, 50, 20, 18, "unspecified")), two)[0]
    one = Points()[0].queries[:1]
    with pytest.raises(ValueError, match="has 1 points; 'two_point_distance' needs 2"):
        QuestionDataset(Points(queries=one), two)[0]
    with pytest.raises(ValueError, match="does not follow from them"):
        measure("object_width", (), CAMERA)
    with pytest.raises(ValueError, match="no labelled depth"):
        measure("planar_depth", (DepthPoint(1, 1),), CAMERA)

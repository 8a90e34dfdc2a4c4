"""Questions about size and motion: their labels are what the pictures show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.data.synthetic.motion import RANGE, make_motion
from mmseg_llm.data.synthetic.spatial import SpatialSceneDataset


def test_views_show_the_movement():
    """Points of the earlier view, moved by the step, lie on the surfaces of the later one."""
    checked = 0
    for index in range(6):
        motion = make_motion("solid-128", 0, index)
        height, width = motion.depths.shape[1:]
        assert motion.image.shape == (height, 2 * width, 3)
        assert RANGE[0] <= motion.metres <= RANGE[1] and motion.metres == math.hypot(*motion.step)
        y, x = np.mgrid[:height, :width]
        points = np.stack((x.ravel(), y.ravel()), -1)
        before = motion.depths[0].ravel()
        places = motion.camera.place(points, before, "planar")[before > 0]
        sideways, forward = motion.step  # the camera moves over the ground, its axes stay
        moved = places - np.array([sideways, -forward * math.sin(motion.tilt), forward * math.cos(motion.tilt)])
        moved = moved[moved[:, 2] > 0.3]
        pixels = np.rint(motion.camera.project(moved)).astype(int)
        inside = ((pixels >= 0) & (pixels < (width, height))).all(-1)
        seen = motion.depths[1][pixels[inside, 1], pixels[inside, 0]]
        ratio = seen / moved[inside, 2]
        assert np.mean(np.abs(ratio[seen > 0] - 1) < 0.05) > 0.75, index  # the rest is hidden now
        checked += int(inside.sum())
    assert checked > 10000


def test_sizes_are_those_of_the_scene():
    dataset = SpatialSceneDataset(count=12, tasks=("object_height", "object_width"))
    queries = 0
    for index, sample in enumerate(dataset):
        scene = make_scene("solid-128", 0, index, "train")
        assert sample.id == scene.id and sample.camera == scene.camera
        assert np.array_equal(np.asarray(sample.image), scene.image)
        for query in sample.queries:
            (thing,) = [thing for thing in scene.facts.things if thing.box == query.boxes[0]]
            assert query.value == (thing.height if query.task == "object_height" else thing.width)
            meant = [e.targets for e in scene.expressions if e.text == query.text]
            assert meant and all(len(targets) == 1 for targets in meant)
            queries += 1
    assert queries >= 24
    assert sum(1 for _ in dataset.query_counts()) == queries


def test_every_third_is_a_pair_and_splits_differ():
    train, test = (SpatialSceneDataset(split=split, count=6) for split in ("train", "test"))
    assert [sample.queries[0].task == "camera_motion" for sample in train] == [False, False, True] * 2
    assert train[2].size == (128, 256) and train[2].queries[0].value != test[2].queries[0].value
    assert len({sample.id for sample in [*train, *test]}) == 12
    assert train[-1].id == train[5].id
    with pytest.raises(IndexError):
        train[6]
    only = SpatialSceneDataset(count=2, tasks=("camera_motion",))
    assert all(sample.queries[0].task == "camera_motion" for sample in only)


def test_refusals():
    for arguments, message in (
        ({"level": "flat-96"}, "is flat and has no metres"),
        ({"tasks": ("object_mass",)}, "unknown questions"),
        ({"count": 0}, "count is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SpatialSceneDataset(**arguments)
    with pytest.raises(ValueError, match="no camera can move"):
        make_motion("flat-96", 0, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        make_motion("solid-128", 0, -1)

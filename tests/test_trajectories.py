"""Trajectories of a dataset: complete, resumable, and the same for any number of processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.cli import main
from mmseg_llm.clicks import read_trajectories
from mmseg_llm.data.base import SampleDataset, Subset
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Query, Sample
from mmseg_llm.trajectories import Rules, objects, record_dataset, record_sample

DISKS = "class_path: mmseg_llm.segmenters.fakes.DisksEnvironment\ninit_args: {positive_radius: 9, negative_radius: 5}\n"


class Scenes(SampleDataset):
    """Synthetic scenes; number 7 has a query without target."""

    def __init__(self, *indices: int) -> None:
        self.indices, self.name, self.skipped = indices, "scenes", {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return make_scene("flat-96", 0, self.indices[index]).to_sample()


@pytest.fixture
def environment(tmp_path):
    path = tmp_path / "disks.yaml"
    path.write_text(DISKS)
    return path


def test_expressions_of_one_object_share_a_trajectory():
    size = (6, 8)
    first, second = np.zeros(size, bool), np.zeros(size, bool)
    first[1:3, 1:3] = second[4:, 4:] = True
    masks = [(Mask.from_array(first),), (Mask.from_array(second),), (Mask.from_array(first),), (), None]
    queries = tuple(Query(f"q{i}", masks=mask) for i, mask in enumerate(masks))
    sample = Sample(Image.new("RGB", (8, 6)), size, queries)
    assert objects(sample) == [(0, ("q0", "q2")), (1, ("q1",))]


def test_a_file_holds_every_object(environment, tmp_path):
    dataset, output = Scenes(0, 7, 3), tmp_path / "out" / "t.jsonl"
    counts = record_dataset(dataset, environment, output, Rules(max_clicks=6))
    found = list(read_trajectories(output))
    assert counts["objects"] == len(found) == sum(len(objects(sample)) for sample in dataset)
    assert counts["without_target"] == sum(q.is_no_target for sample in dataset for q in sample.queries) > 0
    assert counts["iou"] == pytest.approx(np.mean([t.iou for t in found])) and counts["iou"] > 0.4
    by_id = {sample.id: sample for sample in dataset}
    for trajectory in found:
        queries = {query.id: query for query in by_id[trajectory.image].queries}
        assert trajectory.target == queries[trajectory.object_id].target((96, 96))
        assert set(trajectory.caption) <= {query.text for query in queries.values()} and len(trajectory.steps) <= 6
        ious = [step.iou for step in trajectory.steps]
        assert ious == sorted(ious) and all(
            step.mask.iou(trajectory.target) == pytest.approx(step.iou) for step in trajectory.steps
        )


def test_processes_and_interruptions_change_nothing(environment, tmp_path):
    """Two processes = one; a run that was cut in the middle of an image, and of a line, goes on to the same bytes."""
    dataset = Scenes(0, 1, 7, 3)
    whole, two, cut = (tmp_path / name for name in ("whole", "two", "cut"))
    record_dataset(dataset, environment, whole)
    record_dataset(dataset, environment, two, workers=2)
    assert whole.read_bytes() == two.read_bytes()
    lines = whole.read_bytes().splitlines(keepends=True)
    first = len(objects(dataset[0]))
    cut.write_bytes(b"".join(lines[: first + 1]) + lines[first + 1][:50])
    shutil.copy(tmp_path / "whole.rules.json", tmp_path / "cut.rules.json")
    counts = record_dataset(dataset, environment, cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert counts["present"] == first and counts["objects"] == len(lines) - first
    again = record_dataset(dataset, environment, cut)
    assert again["objects"] == 0 and again["present"] == len(lines) and cut.read_bytes() == whole.read_bytes()


def test_command_line(environment, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    assert main(["data", "synthetic", "--output", str(scenes), "--train", "2", "--val", "1", "--test", "1"]) == 0
    reader = {"root": str(scenes), "split_by": "synthetic", "split": "train", "grefs": True}
    data = tmp_path / "data.yaml"
    data.write_text(json.dumps({"train": {"class_path": "mmseg_llm.data.ReferDataset", "init_args": reader}}))
    arguments = ["data", "trajectories", "--data", str(data), "--output", str(tmp_path / "t.jsonl")]
    assert main([*arguments, "--environment", str(environment), "--max_clicks", "3"]) == 0
    assert "objects (and 0 before), mean IoU" in capsys.readouterr().out
    assert all(len(t.steps) <= 3 for t in read_trajectories(tmp_path / "t.jsonl"))
    assert main([*arguments, "--environment", "nowhere.yaml"]) == 2
    assert "no environment config 'nowhere.yaml'" in capsys.readouterr().err
    assert main([*arguments, "--environment", str(environment), "--workers", "0"]) == 2
    assert "workers is 0" in capsys.readouterr().err


def test_a_damaged_file_is_refused(environment, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": 1}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: trajectory record lacks the field"):
        record_dataset(Scenes(0), environment, path)
    assert path.read_text() == '{"image": 1}\n'


def test_other_rules_do_not_go_on(environment, tmp_path):
    output = tmp_path / "t.jsonl"
    record_dataset(Subset(Scenes(0, 1), 1), environment, output)
    before = output.read_bytes()
    environment.write_text(f"# the same\n{DISKS}")
    assert record_dataset(Subset(Scenes(0, 1), 1), environment, output)["objects"] == 0
    with pytest.raises(
        ValueError, match=r"t\.jsonl was begun with other rules: rules\.max_clicks was 20 and is 3 now; give"
    ):
        record_dataset(Scenes(0, 1), environment, output, Rules(max_clicks=3))
    environment.write_text(DISKS.replace("9", "8"))
    with pytest.raises(ValueError, match=r"environment\.init_args\.positive_radius was 9 and is 8 now"):
        record_dataset(Scenes(0, 1), environment, output)
    assert output.read_bytes() == before
    environment.write_text(DISKS)
    assert record_dataset(Scenes(0, 1), environment, output)["objects"]  # more images of the same dataset
    environment.write_text("{")
    with pytest.raises(ValueError, match=r"disks\.yaml is no valid YAML"):
        record_dataset(Scenes(0), environment, tmp_path / "new.jsonl")


class Hidden(Scenes):
    """Every object of the scenes lies within what is ignored, but for the first."""

    def __getitem__(self, index: int):
        sample = super().__getitem__(index)
        first = sample.queries[0].target(sample.size)
        ignore = Mask.from_array(~first.array)
        return replace(sample, queries=tuple(replace(q, ignore=ignore) for q in sample.queries))


def test_objects_of_ignored_pixels_are_left_out(environment, tmp_path):
    dataset = Hidden(0, 3)
    counts = record_dataset(dataset, environment, tmp_path / "t.jsonl")
    shown = {sample.queries[0].target(sample.size) for sample in dataset}
    found = list(read_trajectories(tmp_path / "t.jsonl"))
    assert {trajectory.target for trajectory in found} == shown and counts["objects"] == 2
    kept = sum(len(trajectory.caption) for trajectory in found)
    assert counts["without_target"] == sum(len(sample.queries) for sample in dataset) - kept > 0


def test_masks_of_the_dataset_keep_no_pixels():
    (sample,) = Scenes(0)
    for starts in (0, 2):
        record_sample(sample, DisksEnvironment(9, 5), Rules(max_clicks=3, random_starts=starts))
    assert all("array" not in vars(mask) for query in sample.queries for mask in query.masks)


@pytest.mark.parametrize(
    "wrong",
    [{"iou_threshold": 0.0}, {"iou_threshold": 1.01}, {"min_gain": -0.1}, {"max_clicks": 0}, {"random_starts": -1}],
)
def test_rules_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        Rules(**wrong)

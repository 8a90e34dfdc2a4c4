"""record on the vectors of the original, its stopping rules on scripted masks, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from golden_files import golden_files, read_golden, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.clicks import ClickStep, Trajectory, read_trajectories, write_trajectories
from mmseg_llm.data.segagent import from_official, read_official, to_official, write_official
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.environment import Environment, Observation
from mmseg_llm.segmenters.fakes import DisksEnvironment, SoftEnvironment, TargetDisksEnvironment
from mmseg_llm.segmenters.recorder import record
from mmseg_llm.segmenters.starts import random_start
from mmseg_llm.structures import Click

TRAJECTORIES = golden_files("segagent_trajectories*")

TARGET = np.zeros((10, 20), bool)
TARGET[3:7, 4:14] = True  # 40 pixels
IMAGE = Image.new("RGB", (20, 10))


class Scripted(Environment):
    """Gives the IoUs it is told, as parts of `TARGET`, whatever is clicked."""

    def __init__(self, *ious: float) -> None:
        self.masks = [np.zeros_like(TARGET) for _ in range(len(ious) + 1)]
        places = np.argwhere(TARGET)
        for mask, iou in zip(self.masks[1:], ious):
            mask[tuple(places[: round(40 * iou)].T)] = True
        self.played = 0

    def reset(self, image):
        self.played, self.clicks = 0, ()
        return Observation(self.masks[0], None, None)

    def step(self, click):
        self.played, self.clicks = self.played + 1, (*self.clicks, click)
        return Observation(self.masks[self.played], None, None, self.clicks)

    def snapshot(self):
        return self.clicks

    def restore(self, state):
        self.clicks = state  # the script goes on


def blob(seed: int = 0, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[: size[0], : size[1]]
    center, radii = rng.uniform(10, 30, 2), rng.uniform(3, 15, 2)
    return ((rows - center[0]) / radii[0]) ** 2 + ((cols - center[1]) / radii[1]) ** 2 < 1


def environment_of(run: dict, target: np.ndarray) -> Environment:
    if run["segmenter"] == "gt_disks":
        return TargetDisksEnvironment(target, run["rp"], run["rn"])
    return {"disks": DisksEnvironment, "soft": SoftEnvironment}[run["segmenter"]](run["rp"], run["rn"])


@pytest.mark.golden
@pytest.mark.parametrize("path", TRAJECTORIES, ids=lambda path: path.stem)
def test_segagent_trajectories(path):
    tensors, meta = read_golden(path)
    size = tuple(tensors["size"].tolist())
    targets = unpack_bits(tensors["gt_bits"], (max(run["object"] for run in meta["runs"]) + 1, *size))
    image = Image.new("RGB", size[::-1])
    for index, (run, official) in enumerate(zip(meta["runs"], meta["records"], strict=True)):
        target, name = targets[run["object"]], f"t{index:02d}"
        trajectory = record(
            environment_of(run, target),
            image,
            target,
            max_clicks=run["max_clicks"],
            iou_threshold=run["max_iou_thr"],
        )
        made = [*trajectory.steps, *trajectory.rejected]
        clicks = [[step.click.row, step.click.col, int(step.click.is_positive)] for step in made]
        assert clicks == tensors[f"{name}.clicks"].tolist(), run
        error = np.abs(np.array([step.iou for step in made]) - tensors[f"{name}.ious"].numpy()).max()
        assert error <= meta["tolerance"]["ious"], run
        masks = unpack_bits(tensors[f"{name}.mask_bits"], (len(made), *size))
        assert (np.stack([step.mask.array for step in made]) == masks).all(), run
        labels = official["gt_ann"]
        trajectory = replace(
            trajectory,
            image=official["image_name"],
            object_id=labels["object_id"],
            caption=tuple(labels["caption"]),
        )
        assert to_official(trajectory) == official, run
        assert from_official(official) == replace(trajectory, rejected=(), stop="unknown"), run


def test_the_fakes_are_exact_and_can_be_undone():
    target = blob()
    image = Image.new("RGB", (50, 40))
    for environment in (DisksEnvironment(6, 4), SoftEnvironment(6, 4), TargetDisksEnvironment(target, 6, 4)):
        with pytest.raises(ValueError, match="reset"):
            environment.step(Click(1, 1, True))
        with pytest.raises(ValueError, match="reset"):
            environment.snapshot()
        assert not environment.reset(image).mask.any()
        first = environment.step(Click(20, 25, True))
        state = environment.snapshot()
        clicks = [Click(22, 25, False), Click(10, 30, True), Click(20, 27, False)]
        expected = [environment.step(click) for click in clicks]
        environment.restore(state)
        tried = environment.step_many(clicks)
        assert (tried[0][0].mask == expected[0].mask).all()
        repeated = [environment.step(click) for click in clicks]
        for a, b in zip(expected, repeated):
            assert (a.mask == b.mask).all() and (a.chances == b.chances).all() and a.clicks == b.clicks
        environment.restore(tried[1][1])
        assert (environment.step(clicks[2]).clicks) == (first.clicks[0], clicks[1], clicks[2])
        with pytest.raises(ValueError, match="row 40"):
            environment.step(Click(40, 1, True))
    with pytest.raises(ValueError, match=r"\(10, 20\)"):
        environment.reset(IMAGE)
    with pytest.raises(ValueError, match="negative_radius is 0"):
        DisksEnvironment(1, 0)
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        TargetDisksEnvironment(target[:, 0], 1, 1)


@pytest.mark.parametrize(
    ("ious", "options", "kept", "rejected", "stop"),
    [
        ((0.25, 0.6, 0.5), {}, [0.25, 0.6], [0.5], "low_gain"),
        ((1.0,), {}, [1.0], [], "iou"),
        ((0.5, 0.5), {}, [0.5], [0.5], "low_gain"),
        ((0.25, 0.6, 0.75, 1.0), {"max_clicks": 3}, [0.25, 0.6, 0.75], [], "max_clicks"),
        ((0.25, 0.8, 1.0), {"iou_threshold": 0.8}, [0.25, 0.8], [], "iou"),
        ((0.25, 0.6, 0.65), {"min_gain": 0.1}, [0.25, 0.6], [0.65], "low_gain"),
        ((0.25, 0.6, 0.5, 0.6, 1.0), {"on_low_gain": "discard"}, [0.25, 0.6, 1.0], [0.5, 0.6], "iou"),
        ((0.25, 0.1, 0.1), {"on_low_gain": "discard", "max_clicks": 3}, [0.25], [0.1, 0.1], "max_clicks"),
    ],
)
def test_stopping_rules(ious, options, kept, rejected, stop):
    environment = Scripted(*ious)
    trajectory = record(environment, IMAGE, TARGET, **options)
    assert [step.iou for step in trajectory.steps] == kept
    assert [step.iou for step in trajectory.rejected] == rejected
    assert trajectory.stop == stop
    assert trajectory.iou == kept[-1]
    assert [trajectory.iou_before(index) for index in range(len(kept) + 1)] == [0.0, *kept]
    assert trajectory.mask_before(0) == Mask.empty((10, 20))
    assert trajectory.mask_before(len(kept)).iou(Mask.from_array(TARGET)) == kept[-1]
    for step in (len(kept) + 1, -1):
        with pytest.raises(ValueError, match=f"step {step} of"):
            trajectory.iou_before(step)
    if options.get("on_low_gain") == "discard":
        assert environment.clicks == tuple(step.click for step in trajectory.steps), "discarded clicks leave nothing"
        every = [step.click for step in (*trajectory.steps, *trajectory.rejected)]
        assert len({(click.row, click.col) for click in every}) == len(every), "no pixel twice"


def test_a_perfect_start():
    """The clean oracle has nothing to do; the official one clicks the first pixel."""
    given = {"given": (Click(4, 5, True),)}
    trajectory = record(Scripted(1.0), IMAGE, TARGET, rule="clean", **given)
    assert (trajectory.steps, trajectory.rejected, trajectory.stop) == ((), (), "nothing_wrong")
    trajectory = record(Scripted(1.0, 0.5), IMAGE, TARGET, **given)
    assert not trajectory.steps and trajectory.stop == "low_gain"
    assert [(step.click, step.iou) for step in trajectory.rejected] == [(Click(0, 0, False), 0.5)]


def test_given_masks_keep_no_pixels():
    target, ignore = Mask.from_array(TARGET), Mask.empty((10, 20))
    record(Scripted(1.0), IMAGE, target, ignore=ignore)
    random_start(target, np.random.default_rng(0))
    assert "array" not in vars(target) and "array" not in vars(ignore)


def test_ignored_pixels_count_for_nothing():
    ignore = np.zeros_like(TARGET)
    ignore[3:7, 9:14] = True
    environment = Scripted(1.0)
    trajectory = record(environment, IMAGE, Mask.from_array(TARGET), ignore=ignore)
    assert trajectory.steps[0].click.col < 9
    assert trajectory.iou == 1.0
    assert trajectory.ignore == Mask.from_array(ignore)
    with pytest.raises(ValueError, match="no pixels"):
        record(environment, IMAGE, TARGET, ignore=TARGET)
    assert record(TargetDisksEnvironment(TARGET, 20, 20), IMAGE, TARGET & ~ignore, ignore=ignore).iou == 1.0


def test_given_clicks_come_first():
    target = blob(3)
    image = Image.new("RGB", (50, 40))
    start = (Click(1, 1, True), Click(20, 20, True))
    trajectory = record(TargetDisksEnvironment(target, 4, 4), image, target, given=start, on_low_gain="discard")
    assert trajectory.given == start
    assert trajectory.mask_before(0) == trajectory.start
    assert trajectory.iou_before(0) == pytest.approx(trajectory.start.iou(trajectory.target))
    assert trajectory.iou >= 0.98
    assert not {(1, 1), (20, 20)} & {(step.click.row, step.click.col) for step in trajectory.steps}
    assert record(TargetDisksEnvironment(target, 4, 4), image, target, given=start, max_clicks=1).iou > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    radii=st.tuples(st.floats(1, 15), st.floats(1, 15)),
    kind=st.sampled_from(("disks", "soft", "gt_disks")),
    on_low_gain=st.sampled_from(("break", "discard")),
    caption=st.one_of(st.text(), st.lists(st.text(), max_size=3).map(tuple)),
    with_ignore=st.booleans(),
)
def test_what_is_recorded_holds_and_survives_json(seed, radii, kind, on_low_gain, caption, with_ignore):
    target = blob(seed)
    ignore = blob(seed + 1) & ~blob(seed + 2) & ~target if with_ignore else None
    environment = environment_of({"segmenter": kind, "rp": radii[0], "rn": radii[1]}, target)
    image = Image.new("RGB", (50, 40))
    trajectory = record(environment, image, target, ignore=ignore, on_low_gain=on_low_gain, max_clicks=8)
    ious = [trajectory.start_iou, *(step.iou for step in trajectory.steps)]
    assert all(a < b for a, b in pairwise(ious)), "every step improves"
    assert all(step.iou <= trajectory.iou for step in trajectory.rejected)
    assert len(trajectory.steps) + len(trajectory.rejected) <= 8
    shown = environment.reset(image)
    for step in trajectory.steps:  # a policy that repeats the kept clicks sees the recorded masks
        shown = environment.step(step.click)
        assert Mask.from_array(shown.mask) == step.mask
    labelled = replace(trajectory, image=seed, object_id="a", caption=caption)
    assert Trajectory.from_json(json.loads(json.dumps(labelled.to_json()))) == labelled
    kept = replace(labelled, rejected=(), ignore=None, stop="unknown")
    assert from_official(json.loads(json.dumps(to_official(labelled)))) == kept


def test_files(tmp_path):
    trajectories = [
        replace(
            record(DisksEnvironment(5, 4), Image.new("RGB", (50, 40)), blob(seed)), image=f"{seed}.jpg", caption="Bär"
        )
        for seed in range(3)
    ]
    write_trajectories(tmp_path / "ours.jsonl", trajectories)
    assert len((tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert list(read_trajectories(tmp_path / "ours.jsonl")) == trajectories
    write_official(tmp_path / "official.json", trajectories, {"max_clicks": 20})
    assert json.loads((tmp_path / "official.json").read_text(encoding="utf-8"))["info"] == {"args": {"max_clicks": 20}}
    assert read_official(tmp_path / "official.json") == [
        replace(trajectory, rejected=(), stop="unknown") for trajectory in trajectories
    ]


def test_malformed_files_say_where(tmp_path):
    trajectory = Trajectory(Mask.from_array(TARGET), (ClickStep(Click(4, 5, True), Mask.from_array(TARGET), 1.0),))
    path = tmp_path / "file"
    for change, words in (
        ({"steps": None}, "field 'steps'"),
        ({"stop": "bored"}, "stop is 'bored'"),
        ({"start": Mask.empty((3, 4)).to_coco()}, r"RLE size \(3, 4\)"),
    ):
        content = {key: value for key, value in (trajectory.to_json() | change).items() if value or key != "steps"}
        path.write_text(json.dumps(trajectory.to_json()) + "\n" + json.dumps(content) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"line 2: .*{words}"):
            list(read_trajectories(path))
    good = trajectory.to_json()
    for damaged, words in (
        ([], "this is list"),
        (None, "this is NoneType"),
        (good | {"target": None}, "damaged"),
        (good | {"target": {"size": []}}, "damaged"),
        (good | {"steps": [None]}, "damaged"),
        (good | {"given": 3}, "damaged"),
        (good | {"target": {"size": [10, 20], "counts": None}}, "damaged"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(damaged) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"file, line 2: .*{words}"):
            list(read_trajectories(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="no SegAgent trajectory file"):
        read_official(path)
    official = to_official(trajectory)
    path.write_text(json.dumps({"data": [official, {**official, "gt_ann": {}}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"record 1: .*'caption'"):
        read_official(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": np.zeros((10, 20), bool)}, "no pixels"),
        ({"target": TARGET.T}, r"\(20, 10\)"),
        ({"ignore": Mask.empty((3, 4))}, r"ignore of shape \(3, 4\)"),
        ({"max_clicks": 0}, "max_clicks=0"),
        ({"min_gain": -1.0}, "min_gain is -1"),
        ({"iou_threshold": 0.0}, "iou_threshold is 0"),
        ({"iou_threshold": 1.1}, "iou_threshold is 1.1"),
        ({"on_low_gain": "stop"}, "on_low_gain='stop'"),
        ({"rule": "best"}, "rule is 'best'"),
    ],
)
def test_errors_name_the_value(options, words):
    with pytest.raises(ValueError, match=words):
        record(Scripted(1.0), **({"image": IMAGE, "target": TARGET} | options))

"""StaR+ on scripted policies and a tiny model: only what does not help is corrected, and nothing is lost on resuming."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from backbones.tiny import scenes
from heads.click_policy.scripted import SIZE, Backbone, Script, answer, disk, sample

from mmseg_llm import improvement
from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.clicks import Click, read_trajectories
from mmseg_llm.data import TrajectoryDataset
from mmseg_llm.data.base import SampleDataset
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.heads.click_policy.prompts import ClickPrompts
from mmseg_llm.improvement import Correction, rollout, rollout_dataset
from mmseg_llm.masks import Mask
from mmseg_llm.model import PerceptionModel
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Sample

TARGET = disk(20, 20, 8) | disk(20, 40, 8)


class Dataset(SampleDataset):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.name, self.skipped = samples, "test", {}

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def play(monkeypatch, say, rules=None, max_clicks=4, target=TARGET, **fields):
    script = Script(monkeypatch, say)
    monkeypatch.setattr(improvement, "show", script.show)
    monkeypatch.setattr(improvement, "ask", script.ask)
    head = ClickPolicyHead(environment=DisksEnvironment(8, 4), max_clicks=max_clicks)
    return rollout(head, Backbone, [sample(target, **fields)], rules or Correction(iou_threshold=0.8))[0]


def test_what_helps_is_kept_and_the_rest_is_corrected(monkeypatch):
    """First a click of one's own that helps, then one into the background, which the oracle replaces."""
    played = play(monkeypatch, lambda view, seed: answer(20, 20) if not view.mask.any() else answer(4, 55))
    main, mistake = played.trajectories
    assert (played.actions, played.corrected, played.ious) == (2, 1, [main.iou])
    own, corrected = main.steps
    assert own.click == Click(20, 20, True)  # not the oracle's: it would click deepest inside, and did not get to
    assert corrected.click.is_positive and abs(corrected.click.col - 40) <= 1 and main.stop == "iou"
    assert [step.click for step in main.rejected] == [Click(4, 55, True)]
    assert main.rejected[0].iou < own.iou < corrected.iou and main.start is None
    # the mask that the mistake led to is a lesson of its own, with the way out of it
    assert mistake.given == (own.click, Click(4, 55, True)) and mistake.start == main.rejected[0].mask
    assert mistake.start_iou == main.rejected[0].iou and len(mistake.steps) == 1
    assert main.caption == mistake.caption == ("object 0",) and main.image == mistake.image == "image"
    for trajectory in (main, mistake):
        for index in range(len(trajectory.steps)):
            assert trajectory.iou_before(index) == pytest.approx(trajectory.mask_before(index).iou(trajectory.target))


def test_finishing_early_and_unreadable_answers_are_corrected(monkeypatch):
    for text in ("Current IOU: 99, Finish", "nonsense"):
        played = play(monkeypatch, lambda view, seed, text=text: text)
        (main,) = played.trajectories
        assert played.actions == played.corrected == len(main.steps)
        assert len(main.steps) >= 2 and not main.rejected and main.stop == "iou"


def test_a_perfect_policy_is_left_alone(monkeypatch):
    centres = [(20, 20), (20, 40)]
    played = play(monkeypatch, lambda view, seed: answer(*centres[int(view.mask.any())]))
    (main,) = played.trajectories
    assert (played.actions, played.corrected) == (2, 0)
    assert [(step.click.row, step.click.col) for step in main.steps] == centres and not main.rejected


def test_an_oracle_that_cannot_help_ends_the_episode(monkeypatch):
    """A target of single pixels, where every disk is too large: no click raises the IoU enough."""
    target = np.zeros(SIZE, bool)
    target[::6, ::6] = True
    played = play(monkeypatch, lambda view, seed: "?", Correction(min_gain=0.5), target=target)
    assert played.trajectories[0].stop == "low_gain" and not played.trajectories[0].steps
    assert (played.actions, played.corrected) == (1, 0)


def test_mistakes_can_be_left_out(monkeypatch):
    """What was rejected and how often it was corrected is told all the same."""
    everything = play(monkeypatch, lambda view, seed: answer(4, 55), Correction(0.8))
    without = play(monkeypatch, lambda view, seed: answer(4, 55), Correction(0.8, keep_mistakes=False))
    assert len(without.trajectories) == 1 < len(everything.trajectories)
    assert without.trajectories[0] == everything.trajectories[0] and without.trajectories[0].rejected
    assert without.corrected == everything.corrected == len(without.trajectories[0].steps) <= without.actions


def test_the_way_out_of_a_mistake_is_that_of_its_own_episode(monkeypatch):
    """A mistake in the corner leaves the object the deepest error; the correction clicked there, but later."""
    say = lambda view, seed: answer(0, 59) if not view.mask.any() else "Finish"  # noqa: E731
    main, mistake = play(monkeypatch, say, target=disk(20, 20, 10), max_clicks=1).trajectories
    assert mistake.given == (Click(0, 59, True),) and mistake.steps[0].click == main.steps[0].click


def test_mistakes_that_change_nothing_teach_nothing_new(monkeypatch):
    (main,) = play(monkeypatch, lambda view, seed: answer(2, 2, is_positive=False)).trajectories
    assert main.rejected and all(step.click == Click(2, 2, False) for step in main.rejected)


def test_ignored_pixels_count_for_nothing(monkeypatch):
    """Half of the disk that a click gives is the object, the other half is ignored."""
    left = np.zeros(SIZE, bool)
    left[:, :21] = True
    whole, half = disk(20, 20, 8), disk(20, 20, 8) & left
    ignore = Mask.from_array(whole & ~left)
    played = play(monkeypatch, lambda view, seed: answer(20, 20), target=half, ignore=ignore)
    (main,) = played.trajectories
    assert main.iou == 1 and main.stop == "iou" and len(main.steps) == 1 and main.ignore == ignore
    assert played.corrected == 0
    main, mistake, *_ = play(
        *(monkeypatch, lambda view, seed: answer(36, 56)), target=disk(20, 10, 5), ignore=Mask.from_array(~left)
    ).trajectories  # a mistake that no IoU sees adds nothing, and the oracle does not clear it
    assert main.rejected[0].iou == 0 and main.steps[0].click.is_positive
    assert mistake.ignore == main.ignore and mistake.steps[0].click.is_positive
    hidden = play(monkeypatch, lambda view, seed: "?", target=half, ignore=Mask.from_array(whole))
    assert not hidden.trajectories and not hidden.actions


def test_masks_of_the_dataset_keep_no_pixels(monkeypatch):
    script = Script(monkeypatch, lambda view, seed: answer(20, 20))
    monkeypatch.setattr(improvement, "show", script.show)
    monkeypatch.setattr(improvement, "ask", script.ask)
    masks = {name: Mask.from_array(TARGET & ~disk(20, 40, 6)) for name in ("start", "ignore")}
    given = sample(TARGET, **masks)
    rollout(ClickPolicyHead(environment=DisksEnvironment(8, 4)), Backbone, [given], Correction())
    assert all("array" not in vars(mask) for mask in (*masks.values(), *given.queries[0].masks))


@pytest.mark.parametrize("limits", [(0.0, 0.0), (1.1, 0.0), (float("nan"), 0.0), (0.9, -0.1), (0.9, float("nan"))])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=r"iou_threshold is|min_gain is"):
        Correction(*limits)


@pytest.fixture(scope="module")
def model():
    head = ClickPolicyHead(
        environment=DisksEnvironment(14, 6), prompts=ClickPrompts(("Click {x}.",)), max_clicks=2, batch_size=8
    )
    return PerceptionModel(InternVLBackbone("internvl-tiny"), {"click_policy": head}).eval()


def test_a_dataset_can_be_stopped_resumed_and_trained_on(model, tmp_path):
    dataset = Dataset(scenes(0, 1, 2, 7))
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    counts = rollout_dataset(model, dataset, whole, batch_size=3)
    assert counts["images"] == 4 and counts["objects"] == sum(
        not query.is_no_target for scene in dataset.samples for query in scene.queries
    )
    assert 0 < counts["corrected"] <= 1
    lines = whole.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["image"] == dataset[2].id) + 1
    begun = [*lines[:cut], lines[cut][:40]]  # stopped within the third image, and within a line
    parts.write_text("\n".join(begun))
    shutil.copy(f"{whole}.rules.json", f"{parts}.rules.json")
    again = rollout_dataset(model, dataset, parts, batch_size=3)
    assert again["present"] == 2 and again["images"] == 2
    assert parts.read_text() == whole.read_text()  # what is drawn does not depend on what is played beside it
    done = rollout_dataset(model, dataset, parts, batch_size=3)
    assert (done["present"], done["images"], done["actions"]) == (4, 0, 0)  # the last image was finished, too
    assert parts.read_text() == whole.read_text()
    material = TrajectoryDataset(whole, dataset)
    head, rng = model.head(), np.random.default_rng(0)
    examples = [head.build(material[i], model.backbone.codec, rng) for i in range(0, len(material), 5)]
    assert len(material) > len(lines) and all(example.suffixes for example in examples)
    for trajectory in read_trajectories(whole):
        assert all(isinstance(step.mask, Mask) for step in trajectory.steps)


def test_needs_a_policy(tmp_path):
    from mmseg_llm.heads import AllMaskHead

    other = PerceptionModel(InternVLBackbone("internvl-tiny"), {"all_mask": AllMaskHead()})
    with pytest.raises(ValueError, match=r"'all_mask' is no click policy.*segagent_tiny"):
        rollout_dataset(other, Dataset(scenes(0)), tmp_path / "out.jsonl")


def test_what_is_reported_is_what_was_done(monkeypatch, model, tmp_path):
    """A policy that always finishes is corrected each time, whether or not its mistakes are kept."""
    script = Script(monkeypatch, lambda view, seed: "Current IOU: 99, Finish")
    monkeypatch.setattr(improvement, "show", script.show)
    monkeypatch.setattr(improvement, "ask", script.ask)
    dataset = Dataset(scenes(0, 7))
    for keep in (True, False):
        output = tmp_path / f"{keep}.jsonl"
        counts = rollout_dataset(model, dataset, output, rules=Correction(keep_mistakes=keep))
        steps = sum(len(trajectory.steps) for trajectory in read_trajectories(output))
        assert counts["corrected"] == steps / counts["actions"] > 0.5 and counts["actions"] >= steps


def test_another_policy_or_other_rules_do_not_go_on(model, tmp_path):
    dataset, output = Dataset(scenes(0)), tmp_path / "out.jsonl"
    rollout_dataset(model, dataset, output, origin="runs/a")
    before = output.read_text()
    with pytest.raises(ValueError, match=r"other rules: policy\.origin was 'runs/a' and is 'runs/b' now; give another"):
        rollout_dataset(model, dataset, output, origin="runs/b")
    with pytest.raises(ValueError, match=r"rules\.min_gain was 0\.0 and is 0\.1 now"):
        rollout_dataset(model, dataset, output, origin="runs/a", rules=Correction(min_gain=0.1))
    assert output.read_text() == before


def test_foreign_lines_are_refused(model, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text('{"text": "hello"}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1: trajectory record lacks the field 'image'"):
        rollout_dataset(model, Dataset(scenes(0)), output)
    assert output.read_text() == '{"text": "hello"}\n'

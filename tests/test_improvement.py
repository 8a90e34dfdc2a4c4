"""StaR+ on scripted policies and a tiny model: only what does not help is corrected, and nothing is lost on resuming."""

from __future__ import annotations

import json

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


def play(monkeypatch, say, rules=None, max_clicks=4, target=TARGET):
    script = Script(monkeypatch, say)
    monkeypatch.setattr(improvement, "show", script.show)
    monkeypatch.setattr(improvement, "ask", script.ask)
    head = ClickPolicyHead(environment=DisksEnvironment(8, 4), max_clicks=max_clicks)
    return rollout(head, Backbone, [sample(target)], rules or Correction(iou_threshold=0.8))[0]


def test_what_helps_is_kept_and_the_rest_is_corrected(monkeypatch):
    """First a click of one's own that helps, then one into the background, which the oracle replaces."""
    main, mistake = play(monkeypatch, lambda view, seed: answer(20, 20) if not view.mask.any() else answer(4, 55))
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
        (main,) = play(monkeypatch, lambda view, seed, text=text: text)
        assert len(main.steps) >= 2 and not main.rejected and main.stop == "iou"


def test_a_perfect_policy_is_left_alone(monkeypatch):
    centres = [(20, 20), (20, 40)]
    (main,) = play(monkeypatch, lambda view, seed: answer(*centres[int(view.mask.any())]))
    assert [(step.click.row, step.click.col) for step in main.steps] == centres and not main.rejected


def test_an_oracle_that_cannot_help_ends_the_episode(monkeypatch):
    """A target of single pixels, where every disk is too large: no click raises the IoU enough."""
    target = np.zeros(SIZE, bool)
    target[::6, ::6] = True
    (main, *_) = play(monkeypatch, lambda view, seed: "?", Correction(min_gain=0.5), target=target)
    assert main.stop == "low_gain" and not main.steps


def test_mistakes_can_be_left_out(monkeypatch):
    found = play(monkeypatch, lambda view, seed: answer(4, 55), Correction(0.8, keep_mistakes=False))
    assert len(found) == 1 and not found[0].rejected


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
    parts.write_text(
        "\n".join(lines[:cut]) + "\n" + lines[cut][:40]
    )  # stopped within the third image, and within a line
    again = rollout_dataset(model, dataset, parts, batch_size=3)
    assert again["present"] == 2 and again["images"] == 2
    assert parts.read_text() == whole.read_text()  # what is drawn does not depend on what is played beside it
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

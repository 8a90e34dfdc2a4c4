"""Annotation filtering: estimates of given masks, their scores, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from backbones.tiny import scenes
from test_improvement import Dataset

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.evaluation import evaluate
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.heads.click_policy.prompts import ClickPrompts
from mmseg_llm.masks import Mask
from mmseg_llm.model import PerceptionModel
from mmseg_llm.rating import rate_dataset
from mmseg_llm.records import read_masks, record_of, write_json
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Prediction


@pytest.fixture(scope="module")
def model():
    head = ClickPolicyHead(environment=DisksEnvironment(14, 6), prompts=ClickPrompts(("Click {x}.",)), max_clicks=2)
    return PerceptionModel(InternVLBackbone("internvl-tiny"), {"click_policy": head}).eval()


def perfect(monkeypatch, model, error=0.0, unanswered=()):
    """A policy that knows the IoU, but for an error, and says nothing about some masks."""

    def rate(backbone, samples):
        found = [q.start.iou(q.target(s.size)) for s in samples for q in s.queries]
        return [None if i in unanswered else max(0.0, iou - error) for i, iou in enumerate(found)]

    monkeypatch.setattr(model.head(), "rate", rate)


def test_annotations_are_kept_by_their_estimate(monkeypatch, model, tmp_path):
    perfect(monkeypatch, model, error=0.1, unanswered={1})
    dataset = Dataset(scenes(0))
    report = rate_dataset(model, dataset, tmp_path / "out.json", keep=0.85)
    count = len(dataset[0].queries)
    assert report["counts"] == {"num_masks": count, "num_kept": count - 1, "num_unanswered": 1}
    assert report["scores"] == {}  # annotations are their own truth
    written = json.loads((tmp_path / "out.json").read_text())["masks"]
    assert [record["keep"] for record in written] == [i != 1 for i in range(count)]
    assert all(record["mask"] == q.target((96, 96)).to_coco() for record, q in zip(written, dataset[0].queries))


def test_the_benchmark_scores_estimates_of_random_masks(monkeypatch, model, tmp_path):
    dataset = Dataset(scenes(0, 1, 7))
    perfect(monkeypatch, model, error=0.05)
    report = rate_dataset(model, dataset, tmp_path / "a.json", is_benchmark=True, keep=0.3, batch_size=2)
    scores = report["scores"]
    assert 0 < scores["MAE"] <= 5 and scores["Spearman"] > 0.8 and scores["num_masks"] == report["counts"]["num_masks"]
    assert report["counts"]["num_masks"] == sum(not q.is_no_target for s in dataset.samples for q in s.queries)
    again = rate_dataset(model, dataset, tmp_path / "b.json", is_benchmark=True, keep=0.3, batch_size=3)
    assert str(again) == str(report) and (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_masks_of_another_head_are_rated(monkeypatch, model, tmp_path):
    dataset = Dataset(scenes(0, 1))
    evaluate(model, dataset, tmp_path / "masks.json")
    perfect(monkeypatch, model)
    report = rate_dataset(model, dataset, tmp_path / "out.json", masks=tmp_path / "masks.json")
    assert report["scores"]["MAE"] == 0 and report["counts"]["num_masks"] == sum(
        len(s.queries) for s in dataset.samples
    )
    with pytest.raises(ValueError, match=r"no mask for query .* of sample .*this very dataset"):
        rate_dataset(model, Dataset(scenes(3)), tmp_path / "out.json", masks=tmp_path / "masks.json")


def test_rate_really_asks_about_the_given_mask(model):
    """Estimates of the tiny model differ with the mask, and batches do not matter."""
    head, sample = model.head(), scenes(0)[0]
    masks = [Mask.empty((96, 96)), *(q.target((96, 96)) for q in sample.queries[:2])]
    shown = [replace(sample, queries=(replace(sample.queries[0], start=mask),)) for mask in masks]
    together = head.rate(model.backbone, shown)
    assert together == [head.rate(model.backbone, [one])[0] for one in shown]
    assert all(value is not None and 0 <= value <= 1 for value in together)


def test_evaluation_of_a_policy_scores_its_episodes_and_goes_on_from_masks(model, tmp_path):
    dataset = Dataset(scenes(0, 7))
    first = evaluate(model, dataset, tmp_path / "first.json", batch_size=1)
    assert first["protocol"]["max_clicks"] == 2 and "DisksEnvironment" in first["protocol"]["environment"]
    assert {"mIoU@1", "NoC@85", "mIoU_selected", "mIoU_best", "PRM_MAE", "cIoU", "gIoU"} <= first["scores"].keys()
    assert sum(first["endings"].values()) == sum(len(s.queries) for s in dataset.samples)
    again = evaluate(model, dataset, tmp_path / "again.json", batch_size=2)
    assert str(first["scores"]) == str(again["scores"])  # as text, since NaN equals nothing
    perfect_masks = [
        record_of(Prediction.answering(sample, i, query.target(sample.size)), query)
        for sample in dataset.samples
        for i, query in enumerate(sample.queries)
    ]
    write_json(tmp_path / "given.json", {"protocol": {}, "predictions": perfect_masks})
    second = evaluate(model, dataset, tmp_path / "second.json", start=tmp_path / "given.json")
    assert second["scores"]["mIoU@0"] == 1 and second["scores"]["mIoU_best"] == 1
    assert 0 <= second["scores"]["worse"] <= 1 and "worse" not in first["scores"]
    assert second["protocol"]["start"].endswith("given.json")
    assert len(read_masks(tmp_path / "given.json")) == sum(len(s.queries) for s in dataset.samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 1.2}, "keep is 1.2"), ({"masks": "x.json", "is_benchmark": True}, "either a file of masks or")],
)
def test_errors(model, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        rate_dataset(model, Dataset(scenes(0)), tmp_path / "out.json", **arguments)

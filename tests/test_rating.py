"""Annotation filtering: estimates of given masks, their scores, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from backbones.tiny import scenes
from test_improvement import Dataset

from mmseg_llm.backbones import InternVLBackbone
from mmseg_llm.cli import main
from mmseg_llm.evaluation import evaluate, format_report
from mmseg_llm.heads import ClickPolicyHead
from mmseg_llm.heads.click_policy.prompts import ClickPrompts
from mmseg_llm.masks import Mask
from mmseg_llm.model import PerceptionModel
from mmseg_llm.rating import rate_dataset
from mmseg_llm.records import read_masks, record_of, write_json
from mmseg_llm.segmenters.fakes import DisksEnvironment
from mmseg_llm.structures import Prediction
from mmseg_llm.trajectories import Rules, record_sample


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
    counts = {"num_masks": count, "num_kept": count - 1, "num_unanswered": 1, "num_without_target": 0}
    assert report["counts"] == counts
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
        not q.is_no_target for s in dataset.samples for q in s.queries
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


def hide(sample, hidden):
    """A sample some of whose objects lie within what is ignored."""
    queries = [replace(q, ignore=q.target(sample.size) if i in hidden else None) for i, q in enumerate(sample.queries)]
    return replace(sample, queries=tuple(queries))


@pytest.mark.parametrize("is_benchmark", [False, True])
def test_queries_without_target_are_left_out_and_counted(monkeypatch, model, tmp_path, is_benchmark):
    dataset = Dataset([hide(scenes(0)[0], {1}), *scenes(7)])
    perfect(monkeypatch, model)
    report = rate_dataset(model, dataset, tmp_path / "out.json", is_benchmark=is_benchmark)
    empty = sum(q.is_no_target for s in dataset.samples for q in s.queries)
    assert empty and report["counts"]["num_without_target"] == empty + 1
    assert report["counts"]["num_masks"] == sum(len(s.queries) for s in dataset.samples) - empty - 1
    named = {(r["sample_id"], r["query_id"]) for r in json.loads((tmp_path / "out.json").read_text())["masks"]}
    assert (dataset[0].id, dataset[0].queries[1].id) not in named and len(named) == report["counts"]["num_masks"]


def test_ignored_pixels_count_for_nothing(monkeypatch, model, tmp_path):
    """The mask is the object and all that is ignored: a perfect one."""
    sample = scenes(0)[0]
    target = sample.queries[0].target(sample.size)
    ignore = Mask.from_array(~target.array)
    query = replace(sample.queries[0], ignore=ignore)
    dataset = Dataset([replace(sample, queries=(query,))])
    everything = Mask.from_array(target.array | ignore.array)
    record = record_of(Prediction.answering(dataset[0], 0, everything), query)
    write_json(tmp_path / "masks.json", {"protocol": {}, "predictions": [record]})
    monkeypatch.setattr(model.head(), "rate", lambda backbone, samples: [0.75])
    report = rate_dataset(model, dataset, tmp_path / "out.json", masks=tmp_path / "masks.json")
    assert report["scores"]["MAE"] == 25


def test_the_protocol_names_seed_and_environment(monkeypatch, model, tmp_path):
    perfect(monkeypatch, model)
    dataset = Dataset(scenes(0))
    reports = [rate_dataset(model, dataset, tmp_path / "o.json", is_benchmark=True, seed=seed) for seed in (0, 3)]
    assert "seed: 0" in format_report(reports[0]) and "seed: 3" in format_report(reports[1])
    assert "DisksEnvironment" in reports[0]["protocol"]["environment"]
    assert reports[0]["scores"] != reports[1]["scores"] or reports[0]["counts"] != reports[1]["counts"]
    assert "seed" not in rate_dataset(model, dataset, tmp_path / "o.json")["protocol"]  # nothing is drawn


def test_the_benchmark_does_not_rate_the_starts_of_the_training(monkeypatch, model, tmp_path):
    dataset, environment = Dataset(scenes(0, 1, 3)), model.head().click_environment()
    perfect(monkeypatch, model)
    rate_dataset(model, dataset, tmp_path / "out.json", is_benchmark=True)
    rated = [record["mask"]["counts"] for record in json.loads((tmp_path / "out.json").read_text())["masks"]]
    rules = Rules(random_starts=1, max_clicks=1)
    trained = {t.start.counts for sample in dataset.samples for t in record_sample(sample, environment, rules)}
    assert sum(counts in trained for counts in rated) < len(rated) / 4


def test_masks_of_the_dataset_keep_no_pixels(model, tmp_path):
    dataset = Dataset([hide(scenes(0)[0], {1})])
    for is_benchmark in (False, True):
        rate_dataset(model, dataset, tmp_path / "out.json", is_benchmark=is_benchmark)
    masks = [mask for query in dataset[0].queries for mask in (*query.masks, query.ignore) if mask is not None]
    assert all("array" not in vars(mask) for mask in masks)


def test_the_verb_has_the_seed_and_says_what_was_left_out(monkeypatch, model, tmp_path, capsys):
    from mmseg_llm import configuration
    from mmseg_llm.inference.perceiver import Perceiver

    perfect(monkeypatch, model)
    monkeypatch.setattr(Perceiver, "from_pretrained", lambda *words, **fields: Perceiver(model))
    read = SimpleNamespace(dataset=lambda split: Dataset(scenes(7)))
    monkeypatch.setattr(configuration, "read_data", lambda path: read)
    words = ["clicks", "rate", "--checkpoint", "run", "--data", "data.yaml", "--output", str(tmp_path / "out.json")]
    assert main([*words, "--benchmark", "true", "--seed", "5"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["protocol"]["seed"] == "5"
    count = sum(query.is_no_target for query in scenes(7)[0].queries)
    assert f"{count} queries without target left out" in capsys.readouterr().out

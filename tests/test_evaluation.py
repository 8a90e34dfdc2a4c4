"""The evaluator: records, recomputation, protocols."""

import json
import random

import pytest
import torch

from mmseg_llm import bench_flows as bench
from mmseg_llm.data.base import SampleDataset, Subset
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.evaluation import evaluate, format_report, score_file, score_records
from mmseg_llm.heads import AllMaskHead, MaskDecoderHead


class Scenes(SampleDataset):
    """Scenes made on the fly."""

    def __init__(self, count: int) -> None:
        self.count, self.name, self.skipped = count, "scenes", {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return make_scene("flat-96", 3, index).to_sample()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return bench.untrained_model()


@pytest.mark.parametrize("protocol", ["generate", "per_expression", "official"])
def test_every_protocol_gives_a_prediction_per_query(model, protocol, tmp_path):
    dataset = Scenes(6)
    report = evaluate(model, dataset, tmp_path / "out.json", protocol=protocol, batch_size=4)
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(content["predictions"]) == sum(len(sample.queries) for sample in dataset)
    assert report["protocol"]["predict"] == protocol
    assert protocol in format_report(report)


@pytest.mark.parametrize("protocol", ["generate", "per_expression", "official"])
def test_batch_size_changes_nothing(model, protocol, tmp_path):
    files = [tmp_path / f"{size}.json" for size in (1, 5)]
    for file, size in zip(files, (1, 5), strict=True):
        evaluate(model, Scenes(5), file, protocol=protocol, batch_size=size)
    first, second = (json.loads(file.read_text()) for file in files)
    assert [r["mask"] for r in first["predictions"]] == [r["mask"] for r in second["predictions"]]
    assert [r["exists"] for r in first["predictions"]] == [r["exists"] for r in second["predictions"]]


def test_order_and_repeats_change_nothing(model, tmp_path):
    path = tmp_path / "out.json"
    evaluate(model, Scenes(6), path)
    records = json.loads(path.read_text())["predictions"]
    shuffled = records + records[:3]
    random.Random(0).shuffle(shuffled)
    again = score_records(shuffled, "clean")
    assert {k: v for k, v in again.items() if v == v} == {k: v for k, v in score_file(path)["scores"].items() if v == v}


def test_perfect_predictions_score_one(model, tmp_path):
    path = tmp_path / "out.json"
    evaluate(model, Scenes(4), path)
    records = json.loads(path.read_text())["predictions"]
    from mmseg_llm.structures import Mask

    for record in records:
        size = tuple(record["size"])
        truth = Mask.union([Mask.from_coco(mask, size) for mask in record["target"]["masks"]], size)
        record.update(mask=truth.to_coco(), exists=truth.area > 0, box=list(truth.box) if truth.box else None)
    scores = score_records(records, "clean")
    assert scores["cIoU"] == scores["gIoU"] == scores["Pr@0.9"] == scores["REC"] == 1.0


def test_the_reference_metric_follows_the_data():
    head = MaskDecoderHead()
    assert head.metric("official", has_no_target=False) == "mllmseg_res"
    assert head.metric("official", has_no_target=True) == "mllmseg_gres"
    assert head.metric("generate", has_no_target=True) == "clean"
    assert AllMaskHead().metric("official", has_no_target=True) == "stamp"
    assert AllMaskHead().metric("force_segment", has_no_target=True) == "clean"


def test_unknown_protocol_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="no protocol 'magic'"):
        evaluate(model, Scenes(1), tmp_path / "out.json", protocol="magic")
    assert list(tmp_path.iterdir()) == []


def test_foreign_file_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no predictions file"):
        score_file(path)


def test_subset():
    subset = Subset(Scenes(5), 2)
    assert len(subset) == 2
    with pytest.raises(IndexError):
        subset[2]

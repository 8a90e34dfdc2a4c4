"""Constant answers on real labels, and depth through the evaluator's records and report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.depth_evaluation import measure_constant
from mmseg_llm.evaluation import describe_rules, evaluate, format_report, score_file, score_records
from mmseg_llm.numbers_in_text import read_metres
from mmseg_llm.quantities import DepthPoint, Measurement
from mmseg_llm.records import read_record, record_of
from mmseg_llm.structures import Camera, Prediction, Query, Sample


class Points(SampleDataset):
    """Samples with depth queries."""

    def __init__(self, samples) -> None:
        self.samples, self.name, self.skipped = list(samples), "points", {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def sample_of(record, distance="unspecified") -> Sample:
    fx, fy, cx, cy, width, height = record["intrinsics"]
    labelled = zip(record["pixel_coords"], record["depth"], strict=True)
    queries = [
        Query("", points=(DepthPoint(x, y, d),), task="depth", id=str(i)) for i, ((x, y), d) in enumerate(labelled)
    ]
    return Sample(
        record["image"], (height, width), tuple(queries), record["image"], camera=Camera(fx, fy, cx, cy, distance)
    )


def small_dataset(metres=(1.0, 1.2, 1.4, 6.0)):
    points = [[10 * place, 20] for place in range(len(metres))]
    records = [
        {"image": name, "intrinsics": [50.0, 50.0, 31.5, 23.5, 64, 48], "pixel_coords": points, "depth": list(metres)}
        for name in "ab"
    ]
    return Points(sample_of(record, "planar") for record in records)


def test_constants_on_ibims(shared_data):
    lines = (shared_data / "ibims1_mini" / "ibims1_mini.jsonl").read_text().splitlines()
    dataset = Points(sample_of(json.loads(line)) for line in lines)
    table = {
        1.5: (0.1446, 0.4806, 3.4609),
        2.0: (0.2304, 0.4686, 3.1931),
        2.5: (0.3208, 0.5180, 2.9856),
        3.0: (0.2804, 0.6296, 2.8517),
    }
    for metres, expected in table.items():
        found = measure_constant(dataset, metres)
        assert [round(found[name], 4) for name in ("delta1", "AbsRel", "RMSE")] == list(expected)
        assert (found["num_points"], found["num_images"], found["num_unlabelled"]) == (2400, 24, 0)
        assert found["answer_metres"] == metres and found["delta1_official"] == found["delta1"]
        assert found["constant2m_delta1"] == pytest.approx(0.2304, abs=5e-5)
    best = measure_constant(dataset)
    assert best["delta1"] == best["constant_delta1"] > 0.3208
    assert best["answer_metres"] == best["constant_metres"]


def test_unlabelled_points_are_counted_and_other_tasks_left_alone():
    dataset = small_dataset()
    extra = (Query("", points=(DepthPoint(1, 1),), task="depth", id="x"), Query("a dog", id="y"))
    dataset.samples[0] = replace(dataset.samples[0], queries=dataset.samples[0].queries + extra)
    found = measure_constant(dataset, 1.2)
    assert (found["num_points"], found["num_unlabelled"], found["delta1"]) == (8, 1, 0.75)


def test_what_constants_are_refused():
    with pytest.raises(ValueError, match=r"answer is -1; give a positive number of metres"):
        measure_constant(small_dataset(), -1)
    with pytest.raises(ValueError, match="dataset points has no labelled depths"):
        measure_constant(Points([Sample("a.png", SIZE, (Query("a dog"),), "a")]), 2.0)


SIZE = (48, 64)


class Guesser:
    """A model that says what it is told to; the head and the model in one."""

    name = "depth_text"

    def __init__(self, texts) -> None:
        self.texts = texts

    def head(self, name):
        return self

    def check_protocol(self, protocol) -> None:
        assert protocol == "generate"

    def metric(self, protocol, has_no_target) -> str:
        return "depth"

    def describe(self, protocol):
        return {"prompt": "short"}

    def parameters(self):
        import torch

        yield torch.zeros(1)

    def predict(self, samples, head, protocol):
        found = []
        for sample in samples:
            for query in sample.queries:
                text = self.texts[int(query.id)]
                reading = read_metres(text)
                point = query.points[0]
                measurement = Measurement(
                    reading.value, reading.reason, ((point.x, point.y),), distance="ray", camera=sample.camera
                )
                found.append(Prediction("", sample.size, query.id, sample.id, text, measurement=measurement))
        return found


TEXTS = ["<answer> 1.30 </answer>", "<answer>1.25</answer>", "I cannot tell", "<answer> -6.00 </answer>"]


def test_evaluation_of_depth(tmp_path):
    path = tmp_path / "out.json"
    report = evaluate(Guesser(TEXTS), small_dataset(), path, batch_size=1)  # type: ignore[arg-type]
    scores = report["scores"]
    assert (
        scores["num_points"],
        scores["num_answered"],
        scores["failed_no_number"],
        scores["failed_non_positive"],
    ) == (8, 4, 2, 2)
    stretch = math.sqrt(1 + (31.5 / 50) ** 2 + (3.5 / 50) ** 2)
    assert abs(1.3 / stretch / 1.0 - 1) < 0.25 and scores["delta1"] == 0.5
    assert scores["delta1_official"] == 0.25, "1.30 is too far as it is, the answer without spaces unread, -6 right"
    assert report["protocol"]["metric"] == "depth" and report["protocol"]["rules"] == describe_rules("depth")
    assert score_file(path)["scores"] == {name: pytest.approx(value, nan_ok=True) for name, value in scores.items()}
    again = evaluate(Guesser(TEXTS), small_dataset(), tmp_path / "again.json", batch_size=2)["scores"]  # type: ignore[arg-type]
    assert again == {name: pytest.approx(value, rel=0, abs=0, nan_ok=True) for name, value in scores.items()}


def test_report_shows_failures_and_the_constant(tmp_path):
    report = evaluate(Guesser(TEXTS), small_dataset(), tmp_path / "out.json")  # type: ignore[arg-type]
    text = format_report(report)
    assert "skipped" not in text
    report["dataset"]["skipped"] = {"bad focal length": 3, "missing image": 1}
    assert "skipped: 3 bad focal length, 1 missing image" in format_report(report)
    assert " delta1  0.5000  (best constant answer: 0.7500)\n" in text
    assert "failed_no_number  2\n" in text and "num_points  8\n" in text and " prompt: short" in text
    widest = max(map(len, report["scores"]))
    assert widest > 16
    for line in text.splitlines():  # names end in one column, whatever their length
        assert line[:widest].strip() and line[widest : widest + 2] in {"  ", ": "}, line
    assert text.count("best constant answer:") == 1


def test_records_restore_every_kind_of_question():
    camera = Camera(50.0, 50.0, 31.5, 23.5, "ray", (0.1, 0.0, 0.0, 0.0))
    depth = Query("", points=(DepthPoint(3.0, 4.0, 1.5),), id="0", task="depth")
    distance = Query(
        "", points=(DepthPoint(3.0, 4.0), DepthPoint(5.0, 6.0)), id="0", task="two_point_distance", value=0.7
    )
    motion = Query("", id="0", task="camera_motion", value=0.2)
    for query in (depth, distance, motion):
        measurement = Measurement(
            1.23, points=((3.0, 4.0),), task=query.task, distance="planar", camera=camera, is_snapped=True
        )
        prediction = Prediction("", SIZE, "0", "a", "<answer> 1.23 </answer>", measurement=measurement)
        record = record_of(prediction, query)
        assert "masks" not in record["target"]
        restored, asked = read_record(json.loads(json.dumps(record)))
        assert asked == query and restored.measurement == measurement
        assert score_records([record], "depth")["num_snapped"] == 1


def test_records_without_labels_are_refused():
    prediction = Prediction("", SIZE, "0", "a", measurement=Measurement(1.0))
    for query in (
        Query("", points=(DepthPoint(3.0, 4.0),), id="0", task="depth"),
        Query("", points=(DepthPoint(3.0, 4.0, 1.0), DepthPoint(5.0, 6.0, 2.0)), id="0", task="two_point_distance"),
        Query("", id="0", task="camera_motion"),
    ):
        with pytest.raises(ValueError, match="query '0' of sample 'a' has no label; evaluate a labelled dataset"):
            record_of(prediction, query)
        with pytest.raises(ValueError, match="query '0' of sample 'a' has no label"):
            record_of(prediction, replace(query, id=""))
    with pytest.raises(
        ValueError, match=r"query '0' \('a dog'\) of sample 'a' has no mask label; evaluate a labelled dataset"
    ):
        record_of(prediction, Query("a dog", id="0"))


def fail(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_points_that_are_nowhere_are_null():
    nowhere = ((math.nan, 4.0), (math.inf, -math.inf))
    measurement = Measurement(None, "outside_image", points=nowhere)
    content = json.loads(json.dumps(measurement.to_json()), parse_constant=fail)
    assert content["points"] == [[None, 4.0], [None, None]]
    (x, y), (u, v) = Measurement.from_json(content).points
    assert y == 4.0 and all(map(math.isnan, (x, u, v)))
    query = Query("", points=(DepthPoint(math.nan, 4.0, 1.5),), id="0", task="depth")
    record = record_of(Prediction("", SIZE, "0", "a", measurement=measurement), query)
    restored, asked = read_record(json.loads(json.dumps(record), parse_constant=fail))
    assert math.isnan(asked.points[0].x) and (asked.points[0].y, asked.points[0].metres) == (4.0, 1.5)
    assert restored.measurement is not None and restored.measurement.reason == "outside_image"
    assert score_records([record], "depth")["failed_outside_image"] == 1


def test_predictions_files_are_plain_json(tmp_path):
    """A point that is nowhere, and scores of buckets that nothing is in."""
    dataset, path = small_dataset(), tmp_path / "out.json"
    first = dataset.samples[0]
    nowhere = replace(first.queries[0], points=(DepthPoint(math.nan, 2.0, 1.0),))
    dataset.samples[0] = replace(first, queries=(nowhere, *first.queries[1:]))
    report = evaluate(Guesser(TEXTS), dataset, path)  # type: ignore[arg-type]
    content = json.loads(path.read_text(), parse_constant=fail)
    assert math.isnan(report["scores"]["delta1_10m_up"]) and content["scores"]["delta1_10m_up"] is None
    assert content["predictions"][0]["measurement"]["points"] == [[None, 2.0]]
    again = score_file(path)["scores"]
    assert again == {name: pytest.approx(value, nan_ok=True) for name, value in report["scores"].items()}
    assert again["failed_bad_camera"] == 1, "a depth of no point cannot be converted"


def test_chances_are_kept_to_four_digits():
    query = Query("", points=(DepthPoint(3.0, 4.0, 1.5),), id="0", task="depth")
    records = [
        record_of(Prediction("", SIZE, "0", "a", score=score, measurement=Measurement(1.0)), query)
        for score in (0.712341, 0.712342)
    ]
    assert records[0] == records[1] and records[0]["score"] == 0.7123
    masked = Query("a dog", masks=(), id="0")
    assert record_of(Prediction("a dog", SIZE, "0", "a", score=0.712341), masked)["score"] == 0.712341


def test_the_scale_is_written_where_there_is_one():
    assert "scale" not in Measurement(1.0).to_json() and Measurement.from_json(Measurement(1.0).to_json()).scale == 1
    shrunk = Measurement(1.0, scale=0.75)
    assert shrunk.to_json()["scale"] == 0.75 and Measurement.from_json(shrunk.to_json()) == shrunk

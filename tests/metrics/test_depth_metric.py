"""Scores of depth as text: the reference's numbers, conventions, invariance, and what is refused."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import golden_files, read_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.metrics import DepthEstimation, describe_depth, score_points
from mmseg_llm.metrics.depth import point_row
from mmseg_llm.metrics.depth_scores import ROW, best_constant, is_within, score_errors
from mmseg_llm.numbers_in_text import read_metres, read_official
from mmseg_llm.quantities import REASONS, DepthPoint, Measurement
from mmseg_llm.questions import QUESTIONS
from mmseg_llm.structures import Camera, Prediction, Query

SIZE = (48, 64)
CAMERA = Camera(50.0, 50.0, 31.5, 23.5, distance="planar")


def pair(sample, index, value, label, text="", task="depth", reason="no_number", **fields):
    """One answered question; depths are labelled on their point, other tasks by a value."""
    measurement = Measurement(value, "" if value is not None else reason, task=task, **fields)
    query = Query("", points=(DepthPoint(10.0, 20.0, label if task == "depth" else None),), id=str(index), task=task,
                  value=None if task == "depth" else label)  # fmt: skip
    return Prediction("", SIZE, query_id=str(index), sample_id=str(sample), text=text, measurement=measurement), query


def spoken(sample, index, text, label):
    reading = read_metres(text)
    return pair(sample, index, reading.value, label, text, reason=reading.reason)


def scores(pairs):
    metric = DepthEstimation()
    for prediction, query in pairs:
        metric.update(prediction, query)
    return metric.compute()


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("depthlm*"), ids=lambda path: path.stem)
def test_golden_metrics(path):
    tensors, meta = read_golden(path)
    texts, labels, expected = meta["metrics"]["texts"], tensors["metric.gt"].tolist(), meta["metrics"]["values"]
    found = scores([spoken(index % 5, index, *item) for index, item in enumerate(zip(texts, labels, strict=True))])
    names = {
        **{f"clean_delta{k}": f"delta{k}" for k in (1, 2, 3)},
        **{"official_delta1": "delta1_official", "abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE"},
        **{"log_rmse": "log_RMSE", "median_scale": "median_scale", "total": "num_points", "valid": "num_answered"},
    }
    assert set(expected) == set(names)
    for key, value in expected.items():
        assert found[names[key]] == pytest.approx(value, rel=0, abs=meta["tolerance"]["metrics"]), key
    official = np.array([np.nan if (number := read_official(text)) is None else number for text in texts])
    assert is_within(official, np.array(labels)).tolist() == (tensors["metric.official_reward"] > 0.5).tolist()
    no_answer = int((tensors["metric.no_answer"] != 0).sum())
    assert found["failed_no_number"] == no_answer and found["num_images"] == 5
    assert (
        sum(value for name, value in found.items() if name.startswith("failed_"))
        == expected["total"] - expected["valid"]
    )


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("depthlm*"), ids=lambda path: path.stem)
def test_golden_rewards_of_single_answers(path):
    _, meta = read_golden(path)
    for row in meta["answers"]:
        found = scores([spoken(0, 0, row["text"], row["gt"])])
        assert found["delta1_official"] == row["official_delta1"], row["text"]
        if row["clean_reason"] != "unspecified":
            is_right = row["clean"] is not None and max(row["clean"] / row["gt"], row["gt"] / row["clean"]) < 1.25
            assert found["delta1"] == is_right, row["text"]


def test_thresholds_are_strict():
    found = scores(
        [pair(0, index, value, 2.0) for index, value in enumerate((2.5, 2.4999, 1.6, 3.125, 3.124, 3.90625))]
    )
    assert [found[f"delta{k}"] for k in (1, 2, 3)] == [1 / 6, 4 / 6, 5 / 6]  # 1.6 = 2 / 1.25 is not below either


def test_error_metrics_by_hand():
    value, label = np.array([1.0, 3.0, np.nan]), np.array([2.0, 2.0, 5.0])
    found = score_errors(value, label)
    logs = np.log([0.5, 1.5])
    assert found["AbsRel"] == 0.5 and found["SqRel"] == 0.5 and found["RMSE"] == 1.0 and found["median_scale"] == 1.0
    assert found["SILog"] == pytest.approx(100 * abs(logs[0] - logs[1]) / 2)
    scaled = score_errors(3 * value, label)
    assert scaled["SILog"] == pytest.approx(found["SILog"]) and scaled["median_scale"] == pytest.approx(3.0)


def test_conventions_are_converted_in_the_clean_column_only():
    stretch = float(CAMERA.stretch_of(np.array([10.0, 20.0])))
    assert stretch > 1.05
    for given_, label_kind, factor in (
        ("ray", "planar", 1 / stretch),
        ("planar", "ray", stretch),
        ("ray", "unspecified", 1.0),
    ):
        camera = replace(CAMERA, distance=label_kind)
        text = "<answer> 3.00 </answer>"
        prediction, query = pair(0, 0, 3.0, 3.0 * factor, text, distance=given_, camera=camera)
        found = scores([(prediction, query)])
        assert found["AbsRel"] == pytest.approx(0.0, abs=1e-12)
        assert found["num_unspecified"] == (label_kind == "unspecified")
    far = pair(0, 0, 3.0, 3.0 / 1.249 / stretch, "<answer> 3.00 </answer>", distance="ray", camera=CAMERA)
    found = scores([far])
    assert (found["delta1"], found["delta1_official"]) == (1.0, 0.0)


@pytest.mark.parametrize("distortion", [(-5.0, 0.0, 0.0, 0.0), (1e300, 0.0, 0.0, 0.0)], ids=["folded", "huge"])
def test_a_camera_that_converts_to_nothing_is_a_failure(distortion):
    camera = replace(CAMERA, distortion=distortion)
    text = "<answer> 3.00 </answer>"
    bad, good = pair(0, 0, 3.0, 3.0, text, distance="ray", camera=camera), pair(0, 1, 3.0, 3.0, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores([bad, good])
    assert (found["num_points"], found["num_answered"], found["failed_bad_camera"]) == (2, 1, 1)
    assert found["delta1"] == 0.5 and found["delta1_official"] == 1.0, "what is read from the text needs no camera"
    assert all(math.isfinite(found[name]) for name in ("AbsRel", "RMSE", "SILog", "median_scale"))
    assert "failed_" not in found and found["num_unspecified"] == 1


def test_the_official_column_follows_the_scale_of_the_picture():
    """A picture at half the unified focal length: the text says twice the metres."""
    shrunk = pair(0, 0, 3.0, 3.0, "<answer> 6.00 </answer>", scale=0.5)
    found = scores([shrunk])
    assert (found["delta1"], found["delta1_official"]) == (1.0, 1.0)
    assert point_row(*shrunk)["official"] == 3.0
    unread = pair(0, 0, 3.0, 3.0, "<answer>6.00</answer>", scale=0.5)
    assert scores([unread])["delta1_official"] == 0.0
    assert point_row(*pair(0, 0, 3.0, 3.0, scale=0.5))["official"] == 3.0, (
        "without text the value, which is scaled already"
    )


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_counted(reason):
    found = scores([pair(0, 0, None, 3.0, reason=reason)])
    assert found[f"failed_{reason}"] == 1 and found["num_answered"] == 0


def test_other_tasks_are_not_converted():
    found = scores([pair(0, 0, 3.0, 3.0, task="planar_depth", distance="ray", camera=CAMERA)])
    assert found["AbsRel"] == 0.0 and "num_unspecified" not in found


def test_failures_are_wrong_and_counted_by_reason():
    pairs = [
        pair(0, 0, 2.0, 2.0),
        *(pair(0, 1 + place, None, 2.0, reason=reason) for place, reason in enumerate(REASONS)),
    ]
    prediction, query = pair(0, 99, 2.0, 2.0)
    pairs += [(replace(prediction, measurement=None), query), pair(0, 100, -2.0, 2.0), pair(0, 101, math.inf, 2.0)]
    found = scores(pairs)
    assert found["num_points"] == len(REASONS) + 4 and found["num_answered"] == 1
    assert found["delta1"] == 1 / found["num_points"] and found["AbsRel"] == 0.0
    counts = {name.removeprefix("failed_"): value for name, value in found.items() if name.startswith("failed_")}
    assert counts == dict.fromkeys(REASONS, 1) | {"no_answer": 2, "non_positive": 2, "non_finite": 2}
    assert found["delta1_official"] == 2 / found["num_points"], "without text the value stands for it, sign and all"


def test_snapped_points_are_counted():
    found = scores([pair(0, 0, 2.0, 2.0, is_snapped=True), pair(0, 1, 2.0, 2.0)])
    assert (found["num_snapped"], found["num_points"]) == (1, 2)


def test_buckets_and_images():
    pairs = [
        pair(0, 0, 1.0, 1.0),
        pair(0, 1, 9.0, 2.0),
        pair(0, 2, 9.0, 2.0),
        pair(1, 3, 5.0, 5.0),
        pair(1, 4, 4.9, 4.999),
    ]
    found = scores(pairs)
    assert [found[f"delta1_{name}"] for name in ("0_2m", "2_5m", "5_10m")] == [1.0, 1 / 3, 1.0]
    assert math.isnan(found["delta1_10m_up"])
    assert found["delta1"] == 0.6 and found["delta1_per_image"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["delta1_low"] == pytest.approx(1 / 3) and found["delta1_high"] == 1.0


def test_the_interval_narrows_with_more_images():
    rng = np.random.default_rng(0)
    widths = []
    for count in (10, 160):
        answers = [
            pair(image, f"{image}-{point}", 1.0 if rng.random() < 0.5 else 9.0, 1.0)
            for image in range(count)
            for point in range(4)
        ]
        found = scores(answers)
        assert found["delta1_low"] < found["delta1"] < found["delta1_high"]
        widths.append(found["delta1_high"] - found["delta1_low"])
    assert 2 < widths[0] / widths[1] < 8  # by the square root: 4


@settings(max_examples=60)
@given(st.lists(st.one_of(st.floats(0.1, 50), st.sampled_from([1.0, 1.25, 1.5625, 2.0, 3.0])), min_size=1, max_size=25))
def test_no_constant_beats_the_best_one(labels):
    labels = np.array(labels)
    best = is_within(best_constant(labels), labels).mean()
    edges = np.unique(np.concatenate((labels * 1.25, labels / 1.25)))
    others = np.concatenate((edges * (1 + 1e-9), edges * (1 - 1e-9), labels, np.sqrt(edges[1:] * edges[:-1])))
    assert best >= max(is_within(other, labels).mean() for other in others) - 1e-12


def random_pairs(count=60):
    rng = np.random.default_rng(1)
    pairs = []
    for index in range(count):
        value = None if rng.random() < 0.2 else float(rng.uniform(0.5, 12))
        text = "" if value is None else f"<answer> {value:.2f} </answer>"
        task = "two_point_distance" if index % 4 == 0 else "depth"
        pairs.append(
            pair(
                f"image {index % 7}",
                index,
                value,
                float(rng.uniform(0.5, 12)),
                text,
                task,
                distance="ray",
                camera=CAMERA,
            )
        )
    return pairs


def same(first, second):
    return list(first) == list(second) and np.array_equal([*first.values()], [*second.values()], equal_nan=True)


def test_same_bits_for_any_order_and_repeats():
    pairs = random_pairs()
    expected = scores(pairs)
    assert same(scores(pairs[::-1] + pairs[:9]), expected)
    assert expected["num_points"] == 45 and expected["two_point_distance.num_points"] == 15


def test_tasks_are_scored_apart():
    pairs = random_pairs()
    mixed = scores(pairs)
    for task, prefix in (("depth", ""), ("two_point_distance", "two_point_distance.")):
        alone = scores([item for item in pairs if item[1].task == task])
        assert same(alone, {name: mixed[prefix + name] for name in alone})
    other = {name for name in mixed if name.startswith("two_point_distance.")}
    assert "two_point_distance.constant_value" in other and not any("2m" in name for name in other)


def test_forward_reset_and_saved_rows():
    pairs = random_pairs()
    metric = DepthEstimation()
    assert metric(*pairs[0])["num_points"] == 1
    for item in pairs:
        metric.update(*item)
    assert same(score_points(metric.point_rows()), scores(pairs)) and same(metric.compute(), scores(pairs))
    metric.reset()
    assert metric.point_rows().shape == (0,)


def _worker(rank, world_size, rendezvous, shards, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    results = []
    for shard in shards:
        metric = DepthEstimation()
        for item in shard:
            metric.update(*item)
        results.append(metric.compute())
    queue.put((rank, results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Uneven shards with a repeated question, and a process that saw nothing."""
    pairs = random_pairs()
    shards = [[pairs[:37], pairs], [pairs[37:] + pairs[:1], []]]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    workers = [context.Process(target=_worker, args=(rank, 2, rendezvous, shards[rank], queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        gathered = [queue.get(timeout=240) for _ in workers]
    finally:
        for worker in workers:
            worker.join(20)
            if worker.is_alive():
                worker.terminate()
    expected = scores(pairs)
    assert sorted(rank for rank, _ in gathered) == [0, 1]
    assert all(same(result, expected) for _, results in gathered for result in results)


def test_nothing_seen_and_description():
    found = score_points(np.zeros(0, ROW))
    assert found["num_points"] == 0 and math.isnan(found["delta1"]) and math.isnan(found["RMSE"])
    line = DepthEstimation().describe()
    assert line == describe_depth() and "strict" in line and "\n" not in line


def test_names_fit_their_columns():
    assert max(map(len, REASONS)) <= ROW["reason"].itemsize and max(map(len, QUESTIONS)) <= ROW["task"].itemsize


def test_refuses():
    prediction, query = pair("a", 0, 2.0, 2.0)
    unsaid = replace(prediction, measurement=Measurement(None, "tired"))
    cases = [
        (replace(prediction, sample_id=""), query, "no sample_id"),
        (replace(prediction, query_id="9"), query, "its own query"),
        (prediction, replace(query, points=(DepthPoint(1, 1),)), "no labelled number"),
        (prediction, replace(query, task="two_point_distance"), "no labelled number"),
        (prediction, replace(query, value=0.0), "is labelled 0.0; a label is a finite number above 0"),
        (prediction, replace(query, value=math.nan), "is labelled nan"),
        (unsaid, query, "the reason 'tired'; use one of no_number"),
    ]
    for bad, asked, message in cases:
        with pytest.raises(ValueError, match=message):
            point_row(bad, asked)
    with pytest.raises(ValueError, match="share sample id and query id"):
        scores([pair("a", 0, 2.0, 2.0), pair("a", 0, 2.0, 2.5)])
    with pytest.raises(ValueError, match="share sample id and query id"):
        scores([pair("a", 0, 2.0, 2.0), pair("a", 0, 2.0, 2.0, task="planar_depth")])

"""Scores of click episodes and of estimates: by hand, the same for any order and world, and what is refused."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.metrics import InteractiveSegmentation, score_episodes, score_estimates
from mmseg_llm.metrics.estimates import auroc, pearson, ranks
from mmseg_llm.metrics.interactive import episode_rows
from mmseg_llm.structures import Click, Mask, PolicyStep, Prediction, Query

SIZE = (10, 20)


def strip(stop: int, start: int = 0) -> Mask:
    """Pixels `start` to `stop` in row-major order."""
    flat = np.zeros(SIZE[0] * SIZE[1], bool)
    flat[start:stop] = True
    return Mask.from_array(flat.reshape(SIZE))


def episode(name, target: Mask, *masks: Mask, estimates=None, ignore=None):
    """A prediction with one mask before and one per click, and its query."""
    said = [None] * len(masks) if estimates is None else estimates
    status = "" if estimates is None else "ok"
    steps = tuple(
        PolicyStep(Click(0, 0, True) if place else None, mask, estimate=estimate, status=status)
        for place, (mask, estimate) in enumerate(zip(masks, said, strict=True))
    )
    prediction = Prediction("x", SIZE, query_id="q", sample_id=str(name), mask=masks[-1] if masks else None)
    masks = (target,) if target.area else ()
    return replace(prediction, trajectory=steps), Query("x", masks=masks, id="q", ignore=ignore)


def scores(episodes, max_clicks=20):
    metric = InteractiveSegmentation(max_clicks)
    for item in episodes:
        metric.update(*item)
    return metric.compute()


def nothing() -> Mask:
    return strip(0)


def test_by_hand():
    """Targets of 100 pixels; IoU in percent = pixels of the mask."""
    first = episode("a", strip(100), nothing(), strip(50), strip(80), strip(90))
    second = episode("b", strip(100), nothing(), strip(85), strip(40))
    found = scores([first, second], 5)
    assert found["mIoU@1"] == (0.5 + 0.85) / 2 and found["cIoU@1"] == 135 / 200
    assert found["mIoU@3"] == found["mIoU@5"] == found["mIoU_last"] == (0.9 + 0.4) / 2  # carried forward
    assert (found["NoC@80"], found["NoC@85"], found["NoC@90"], found["NoC@95"]) == (1.5, 2.0, 4.0, 5.0)
    assert [found[f"failures@{t}"] for t in (80, 85, 90, 95)] == [0, 0, 1, 2]
    assert found["mIoU_best"] == (0.9 + 0.85) / 2 and found["mIoU_selected"] == found["mIoU_last"]
    assert (found["clicks"], found["num_episodes"], found["num_without_target"]) == (2.5, 2, 0)
    assert not {"mIoU@0", "mIoU@7", "worse", "PRM_MAE"} & found.keys()


def test_given_masks_and_estimates():
    target = strip(100)
    better = episode("a", target, strip(50), strip(70), strip(60), estimates=[0.5, 0.9, 0.9])
    spoilt = episode("b", target, strip(90), strip(200), estimates=[None, 0.1])
    same = episode("c", target, strip(80), estimates=[None])
    empty = episode("d", target, nothing(), strip(20), strip(10), estimates=[0.0, None, 0.05])
    found = scores([better, spoilt, same, empty], 3)
    assert found["mIoU@0"] == pytest.approx((0.5 + 0.9 + 0.8 + 0) / 4)
    assert found["cIoU@0"] == (50 + 90 + 80 + 0) / 400
    assert found["mIoU@1"] == pytest.approx((0.7 + 0.5 + 0.8 + 0.2) / 4)
    assert found["worse"] == 1 / 3, "of the episodes that began with a mask"
    assert found["mIoU_last"] == pytest.approx((0.6 + 0.5 + 0.8 + 0.1) / 4)
    assert found["mIoU_selected"] == pytest.approx((0.7 + 0.5 + 0.8 + 0.1) / 4), "first of equals; the last if unknown"
    assert found["mIoU_best"] == pytest.approx((0.7 + 0.9 + 0.8 + 0.2) / 4)
    assert found["NoC@80"] == (3 + 3 + 1 + 3) / 4 and found["failures@80"] == 3, "a given mask is no click"
    errors = np.array([0, 20, 30, 40, 0, 5])  # estimates minus IoUs in percent: 50 90 90 10 0 5 and 50 70 60 50 0 10
    assert found["PRM_MAE"] == pytest.approx(np.abs(errors).mean())
    assert found["PRM_MSE"] == pytest.approx((errors**2).mean())
    assert (found["num_estimates"], found["num_unanswered"]) == (6, 3)
    assert found["clicks"] == 5 / 4


def test_ignored_pixels():
    """The target loses the ignored half, and the mask is not blamed for what it draws there."""
    item = episode("a", strip(100), nothing(), strip(80, 10), ignore=strip(200, 60))
    found = scores([item], 1)
    assert found["mIoU@1"] == 50 / 60 and found["failures@80"] == 0 and found["failures@85"] == 1
    away = episode("a", strip(50), nothing(), strip(120), ignore=strip(200, 60))
    assert scores([away], 1)["mIoU@1"] == 50 / 60


def test_targets_without_pixels():
    items = [episode("a", strip(0), nothing(), strip(9)), episode("b", strip(9), nothing(), ignore=strip(20))]
    found = scores(items)
    assert (found["num_episodes"], found["num_without_target"]) == (0, 2)
    assert all(math.isnan(found[name]) for name in ("mIoU@1", "cIoU_best", "NoC@80", "clicks"))
    found = scores([*items, episode("c", strip(9), nothing(), strip(9))])
    assert (found["mIoU@1"], found["NoC@95"], found["num_episodes"]) == (1.0, 1.0, 1)


def test_thresholds_are_exact():
    """19 / 20 = 0.95 is not below 95 %, whatever the rounding."""
    for percent, inside in ((80, 16), (85, 17), (90, 18), (95, 19)):
        found = scores([episode("a", strip(20), nothing(), strip(inside)), episode("b", strip(20), nothing())])
        assert found[f"failures@{percent}"] == 1


def test_what_is_refused():
    prediction, query = episode("a", strip(9), nothing(), strip(9), strip(9))
    with pytest.raises(ValueError, match="max_clicks is 0"):
        InteractiveSegmentation(0)
    for wrong, message in [
        ((replace(prediction, sample_id=""), query), "has no sample_id"),
        ((prediction, replace(query, id="r")), "has the query_id 'q'"),
        ((replace(prediction, trajectory=()), query), "has 0 masks in its trajectory; a click policy gives"),
        ((prediction, replace(query, masks=None)), "no mask label"),
        ((replace(prediction, size=(10, 21)), query), "cannot (be compared|join)"),
    ]:
        with pytest.raises(ValueError, match=message):
            InteractiveSegmentation().update(*wrong)
    with pytest.raises(ValueError, match=r"3 masks in its trajectory.* at most 1 \(max_clicks"):
        InteractiveSegmentation(1).update(prediction, query)
    with pytest.raises(ValueError, match="1 episodes share sample id and query id"):
        scores([(prediction, query), episode("a", strip(8), nothing())])
    assert "NoC@t first click from 1 with IoU >= t %, else 7" in InteractiveSegmentation(7).describe()


def same(first, second):
    return first.keys() == second.keys() and np.array_equal([*first.values()], [*second.values()], equal_nan=True)


@st.composite
def episodes(draw):
    """Up to six episodes of at most four clicks, some without target, some given a mask, some estimated."""
    stops = st.integers(0, 60)
    items = []
    for name in range(draw(st.integers(0, 6))):
        masks = [strip(stop, stop // 3) for stop in draw(st.lists(stops, min_size=1, max_size=5))]
        said = st.lists(st.none() | st.floats(0, 1), min_size=len(masks), max_size=len(masks))
        ignore = draw(st.none() | stops.map(lambda stop: strip(stop, stop // 2)))
        items.append(episode(name, strip(draw(stops)), *masks, estimates=draw(st.none() | said), ignore=ignore))
    return items


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@given(episodes(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_order_and_split(items, random):
    """Same bits in any order, with repeats, and from two halves joined as a gather does; all within bounds."""
    expected = scores(items, 4)
    shuffled = [*items, *items[:2]]
    random.shuffle(shuffled)
    assert same(scores(shuffled, 4), expected)
    halves = [shuffled[::2], shuffled[1::2]]
    rows = [np.zeros((0, 9), np.int64), *(episode_rows(*item, 4) for half in halves for item in half)]
    assert same(score_episodes(np.concatenate(rows).reshape(-1, 5, 9)), expected)
    for name, value in expected.items():
        if name.startswith(("mIoU", "cIoU")):
            assert math.isnan(value) or 0 <= value <= 1
        if name.startswith("NoC"):
            assert math.isnan(value) or 1 <= value <= 4
    if expected["num_episodes"]:
        assert (
            expected["mIoU_best"] >= max(expected["mIoU_last"], expected["mIoU_selected"], expected["mIoU@3"]) - 1e-12
        )
        assert expected["NoC@80"] <= expected["NoC@85"] <= expected["NoC@90"] <= expected["NoC@95"]


def some_episodes():
    rng = np.random.default_rng(3)
    for name in range(11):
        masks = [strip(int(stop)) for stop in rng.integers(0, 150, rng.integers(1, 6))]
        yield episode(name, strip(int(rng.integers(0, 120))), *masks, estimates=rng.random(len(masks)).tolist())


def _gathered(rank, rendezvous, shards):
    """Scores that one of two processes computes."""
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        results = []
        for shard in shards:
            metric = InteractiveSegmentation(5)
            for item in shard:
                metric.update(*item)
            results.append(metric.compute())
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    return results


def _worker(rendezvous, shards, queue):
    queue.put(_gathered(1, rendezvous, shards))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path):
    """Uneven shards with a repeated episode, and a process that saw nothing; this process is one of the two."""
    items = list(some_episodes())
    shards = [[items[:7], items], [items[7:] + items[:1], []]]
    context = multiprocessing.get_context("spawn")
    queue, rendezvous = context.Queue(), f"file://{tmp_path / 'rendezvous'}"
    worker = context.Process(target=_worker, args=(rendezvous, shards[1], queue))
    worker.start()
    try:
        gathered = _gathered(0, rendezvous, shards[0]) + queue.get(timeout=240)
    finally:
        worker.join(20)
        if worker.is_alive():
            worker.terminate()
    expected = scores(items, 5)
    assert len(gathered) == 4 and all(same(result, expected) for result in gathered)


def test_forward_and_reset():
    items = list(some_episodes())
    metric = InteractiveSegmentation(5)
    assert [metric(*item)["num_episodes"] for item in items[:3]] == [1, 1, 1]
    assert same(metric.compute(), scores(items[:3], 5))
    metric.reset()
    assert metric.episodes().shape == (0, 6, 9)


def test_estimates_by_hand():
    found = score_estimates([0.9, 0.8, 0.6, 0.2, None], [0.95, 0.5, 0.75, 0.3, 0.92])
    assert found["MAE"] == pytest.approx((5 + 30 + 15 + 10) / 4)
    assert found["MSE"] == pytest.approx((25 + 900 + 225 + 100) / 4)
    assert found["Spearman"] == pytest.approx(0.8)  # 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1))
    assert (found["num_masks"], found["num_unanswered"]) == (5.0, 1.0)
    assert (found["precision@0.7"], found["recall@0.7"]) == (0.5, 1 / 3), "the unanswered good mask is not kept"
    assert (found["precision@0.9"], found["recall@0.9"]) == (1.0, 0.5)
    assert found["AUROC@0.5"] == 3 / 4, "the unanswered mask, which is good, ranks below the bad one"
    assert found["AUROC@0.9"] == pytest.approx(3 / 6)


def test_estimates_that_are_undefined():
    found = score_estimates([], [])
    assert all(math.isnan(value) for name, value in found.items() if not name.startswith("num_"))
    assert (found["num_masks"], found["num_unanswered"]) == (0, 0)
    found = score_estimates([0.4, 0.4, math.nan], [0.1, 0.2, 0.3])
    assert found["MAE"] == pytest.approx(25) and math.isnan(found["Pearson"]) and math.isnan(found["Spearman"])
    assert math.isnan(found["precision@0.5"]) and math.isnan(found["recall@0.5"]) and math.isnan(found["AUROC@0.5"])
    for wrong in (([0.1], [0.1, 0.2]), ([1.5], [0.5]), ([0.5], [math.nan]), ([[0.1]], [[0.2]])):
        with pytest.raises(ValueError, match=r"give one for each|must lie in"):
            score_estimates(*wrong)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=30))
@settings(max_examples=100, deadline=None)
def test_ranks_and_areas_by_counting(pairs):
    first, second = (np.array(values, float) for values in zip(*pairs))
    counted = [(first < value).sum() + ((first == value).sum() + 1) / 2 for value in first]
    assert ranks(first).tolist() == counted
    expected = np.nan
    if len(set(first)) > 1 and len(set(second)) > 1:
        expected = np.corrcoef(first, second)[0, 1]
    assert pearson(first, second) == pytest.approx(expected, nan_ok=True)
    is_good = second >= 5
    wins = [float(a > b) + (a == b) / 2 for a in first[is_good] for b in first[~is_good]]
    assert auroc(first, is_good) == pytest.approx(np.mean(wins) if wins else np.nan, nan_ok=True)

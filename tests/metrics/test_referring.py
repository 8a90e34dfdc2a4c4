"""Scores of referring segmentation: official numbers, invariance, and what is refused."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from golden_files import golden_files, read_golden, unpack_bits

from mmseg_llm.metrics import PROTOCOLS, ReferringSegmentation, describe_protocol, score_rows
from mmseg_llm.metrics.referring import expression_row, is_box_right_official
from mmseg_llm.structures import Mask, Prediction, Query

SIZE = (10, 12)


def strip(area: int, start: int = 0, size=SIZE) -> Mask:
    """A mask of `area` pixels in row-major order from pixel `start`."""
    flat = np.zeros(size[0] * size[1], bool)
    flat[start : start + area] = True
    return Mask.from_array(flat.reshape(size))


def pair(sample, query, predicted: Mask | None, target: Mask, exists=True):
    masks = () if target.area == 0 else (target,)
    prediction = Prediction("x", target.size, query_id=str(query), sample_id=str(sample), mask=predicted, exists=exists)
    return prediction, Query("x", masks=masks, id=str(query))


def scores(pairs, protocol="clean"):
    metric = ReferringSegmentation(protocol)
    for prediction, query in pairs:
        metric.update(prediction, query)
    return metric.compute()


def golden_pairs(tensors, with_reject: bool, config):
    start, pairs = 0, []
    for row, size in enumerate(tensors["size"].tolist()):
        predicted = unpack_bits(tensors["pred_bits"], size, start)
        target = unpack_bits(tensors["gt_bits"], size, start)
        start += size[0] * size[1]
        x, y, w, h = tensors["gt_boxes_xywh"][row].tolist()
        assert tensors["pred_prob"].shape[1:] == tuple(config["pred_grid"])
        resized = functional.interpolate(tensors["pred_prob"][row][None, None], size, mode="bilinear")[0, 0]
        assert ((resized >= 0.5).numpy() == predicted).all()
        mask = Mask.from_array(target)
        exists = not (with_reject and bool(tensors["rejected"][row]))
        image = int(tensors["image_index"][row])
        prediction, query = pair(image, row, Mask.from_array(predicted), mask, exists)
        pairs.append((prediction, replace(query, boxes=((x, y, x + w, y + h),) if mask.area else ())))
    return pairs


def check(measured, expected, tolerance, factor=1.0):
    assert expected
    for key, value in expected.items():
        assert measured[key] * factor == pytest.approx(value, rel=0, abs=tolerance * factor), key


@pytest.mark.golden
@pytest.mark.parametrize("path", golden_files("metrics*"), ids=lambda path: path.stem)
def test_golden_metrics(path):
    tensors, meta = read_golden(path)
    values, clean, official = meta["values"], meta["tolerance"]["clean"], meta["tolerance"]["official"]
    never, reject = (golden_pairs(tensors, flag, meta["config"]) for flag in (False, True))
    rows = np.stack([expression_row(*item) for item in never])
    for column, key in ((2, "intersection"), (3, "gt_area"), (4, "pred_area")):
        assert rows[:, column].tolist() == tensors[key].tolist()

    expected = values["clean"]
    names = {"gIoU_per_expression": "gIoU", "mIoU_targets_only": "mIoU"}
    kept = {names.get(key, key): value for key, value in expected.items() if "strict" not in key and "_no_" not in key}
    check(scores(never), kept, clean)
    check(scores(never, "rela"), {"gIoU": expected["gIoU_per_expression_no_empty_rule"]}, clean)
    check(scores(reject, "strict"), values["strict_reject_is_empty_mask"], clean)

    res = values["mllmseg_res_official"]
    measured = scores(never, "mllmseg_res")
    check(measured, {key: res[key] for key in ("cIoU", "gIoU_per_image")}, official)
    check(measured, {"REC": res["rec_prec_at_0_5"], "num_images": res["images"]}, clean)
    gres = values["mllmseg_gres_official"]
    measured = scores(reject, "mllmseg_gres")
    check(measured, {key: gres[key] for key in ("cIoU", "gIoU")}, official)
    check(measured, {key: gres[key] for key in ("N_acc", "T_acc")}, clean)
    check(scores(never, "lisa"), values["lisa_official"], official)
    check(scores(reject, "lisa"), values["segagent_official"], official)

    for block, pairs in (("with_reject", reject), ("never_reject", never)):
        measured, expected = scores(pairs, "rela"), values[f"rela_official_{block}"]
        counts = {key: expected[key] for key in ("N_acc", "T_acc")}
        check(measured, counts, clean)
        check(measured, {key: expected[key] for key in expected if key not in counts}, official, 100.0)
    check(scores(never, "rela"), values["rela_five_thresholds_never_reject"], clean, 100.0)


def wide(area, start=0):
    return strip(area, start, (10, 20))


def test_specification_cases():
    """The worked examples of the MLLMSeg specification, section 6.3."""
    empty = wide(0)
    res = [pair(1, 0, wide(20), wide(10)), pair(1, 1, wide(30), wide(30)), pair(2, 2, wide(25), wide(25, 30))]
    measured = scores(res, "mllmseg_res")
    assert measured["cIoU"] == pytest.approx(0.4, abs=1e-6)
    assert measured["gIoU_per_image"] == pytest.approx(0.375, abs=1e-6)
    assert scores(res)["gIoU"] == 0.5
    gres = [
        pair(1, 0, wide(7), empty, exists=False),
        pair(1, 1, wide(40), empty),
        pair(1, 2, wide(60), wide(30)),
        pair(1, 3, wide(70), wide(80, 20), exists=False),  # would score 50/100
    ]
    measured = scores(gres, "mllmseg_gres")
    assert [measured[key] for key in ("N_acc", "T_acc", "cIoU")] == pytest.approx([0.5, 0.5, 0.4], abs=1e-9)
    assert measured["gIoU"] == pytest.approx(0.5, abs=1e-5)
    strict = scores(gres)
    assert (strict["gIoU"], strict["cIoU"]) == (0.375, 30 / 180)
    assert scores(gres, "rela")["cIoU"] == 30 / (40 + 60 + 100)


def random_pairs(seed=0, count=40):
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        target = Mask.from_array(rng.random(SIZE) < rng.choice([0, 0.3, 0.7]))
        predicted = Mask.from_array(rng.random(SIZE) < rng.choice([0, 0.3, 0.7]))
        pairs.append(pair(f"image {index % 7}", index, predicted, target, exists=bool(rng.random() > 0.2)))
    return pairs


def same(first, second):
    return first.keys() == second.keys() and np.array_equal([*first.values()], [*second.values()], equal_nan=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_same_bits_for_any_order_and_repeats(protocol):
    pairs = random_pairs()
    expected = scores(pairs, protocol)
    assert same(scores(pairs[::-1] + pairs[:9], protocol), expected)
    assert expected["num_expressions"] == 40 and expected["num_images"] == 7
    assert all(isinstance(value, float) for value in expected.values())


def test_forward_and_reset():
    pairs = random_pairs(count=6)
    metric = ReferringSegmentation()
    batches = [metric(*item) for item in pairs]
    assert batches[0]["num_expressions"] == 1
    assert same(metric.compute(), scores(pairs))
    metric.reset()
    assert metric.expression_rows().shape == (0, 8)


def test_saved_rows_can_be_scored_again():
    pairs = random_pairs()
    metric = ReferringSegmentation()
    for item in pairs:
        metric.update(*item)
    for protocol in PROTOCOLS:
        assert same(score_rows(metric.expression_rows(), protocol), scores(pairs, protocol))


def _worker(rank, world_size, rendezvous, shards, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    results = []
    for shard in shards:
        metric = ReferringSegmentation()
        for item in shard:
            metric.update(*item)
        results.append(metric.compute())
    queue.put((rank, results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Uneven shards with a repeated expression, and a process that saw nothing."""
    pairs = random_pairs()
    shards = [[pairs[:27], pairs], [pairs[27:] + pairs[:1], []]]
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


def test_clean_rules_of_rejection():
    empty = strip(0)
    no_target = [pair(1, 0, strip(9), empty, exists=False), pair(1, 1, empty, empty), pair(1, 2, strip(9), empty)]
    measured = scores(no_target)
    assert measured["gIoU"] == measured["N_acc"] == pytest.approx(2 / 3)
    assert measured["cIoU"] == 0.0 and math.isnan(measured["mIoU"]) and math.isnan(measured["T_acc"])
    assert math.isnan(measured["REC"])
    assert scores(no_target, "strict")["N_acc"] == pytest.approx(1 / 3)
    missed = scores([pair(1, 0, strip(9), strip(9), exists=False)])
    assert (missed["cIoU"], missed["mIoU"], missed["REC"], missed["T_acc"]) == (0.0, 0.0, 0.0, 0.0)
    assert same(missed, scores([pair(1, 0, None, strip(9), exists=False)]))


def test_precision_counts_equality():
    measured = scores([pair(1, 0, strip(7), strip(10))])
    assert [measured[f"Pr@0.{tenths}"] for tenths in (5, 6, 7, 8, 9)] == [1, 1, 1, 0, 0]


def test_box_rules():
    target = Mask.from_array(np.pad(np.ones((4, 8)), ((0, 6), (0, 4))))
    half = Mask.from_array(np.pad(np.ones((4, 4)), ((0, 6), (0, 8))))
    prediction, query = pair(1, 0, half, target)
    assert scores([(prediction, query)])["REC"] == 0.0  # IoU exactly 0.5 is not enough
    assert scores([(prediction, replace(query, boxes=((0, 0, 4, 3), (2, 0, 5, 4))))])["REC"] == 1.0
    assert is_box_right_official((0, 0, 11, 11), (0, 0, 10, 10))
    assert not is_box_right_official((0, 0, 8, 8), (0, 0, 10, 10)), "inclusive indices lose a pixel"
    assert not is_box_right_official(None, None)
    # fp16 has steps of 0.5 above 512: 1000.74 becomes 1000.5, which takes the IoU from 0.74 to 0.5.
    assert is_box_right_official((1000, 0, 1002, 2), (1000.0, 0, 1001.0, 1.0))
    assert not is_box_right_official((1000, 0, 1002, 2), (1000.0, 0, 1000.74, 1.0))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_seen_and_description(protocol):
    measured = score_rows(np.zeros((0, 8), np.int64), protocol)
    assert measured["num_expressions"] == 0 and math.isnan(measured["gIoU"])
    line = ReferringSegmentation(protocol).describe()
    assert line == describe_protocol(protocol) and f"protocol {protocol}" in line and "\n" not in line


def test_refuses():
    prediction, query = pair("a", 0, strip(5), strip(5))
    cases = [
        (replace(prediction, sample_id=""), query, "no sample_id"),
        (replace(prediction, query_id="9"), query, "its own query"),
        (replace(prediction, mask=None), query, "has no mask"),
        (replace(prediction, mask=strip(5, 0, (4, 4))), query, "resize the prediction"),
        (prediction, replace(query, masks=None), "no mask label"),
    ]
    for bad, asked, message in cases:
        with pytest.raises(ValueError, match=message):
            ReferringSegmentation().update(bad, asked)
    with pytest.raises(ValueError, match="unknown metric protocol 'best'; use one of clean"):
        ReferringSegmentation("best")
    with pytest.raises(ValueError, match="share sample id and query id"):
        scores([pair("a", 0, strip(5), strip(5)), pair("a", 0, strip(5), strip(6))])
    with pytest.raises(ValueError, match="rows must be"):
        score_rows(np.zeros((3, 2), np.int64))


def test_stamp_rules():
    """STAMP specification section 6: eps 1e-5 in both scores, 1 where the union is empty, no rejection beside the mask."""
    pairs = [
        pair(0, 0, strip(10), strip(20)),
        pair(0, 1, strip(30, 5), strip(30)),
        pair(1, 2, strip(0), strip(0), exists=False),
        pair(1, 3, strip(8), strip(0)),
        pair(2, 4, None, strip(12), exists=False),  # no trigger: an all-zero prediction
    ]
    inter, union = np.array([10, 25, 0, 0, 0]), np.array([20, 35, 0, 8, 12])
    found = scores(pairs, "stamp")
    assert found["cIoU"] == pytest.approx(inter.sum() / (union.sum() + 1e-5), abs=1e-12)
    each = np.where(union == 0, 1.0, inter / (union + 1e-5))
    assert found["gIoU"] == pytest.approx(each.mean(), abs=1e-12)

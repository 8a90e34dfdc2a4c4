"""Masks and predictions: run lengths against numpy, JSON there and back, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.masks import _pixels_covered
from mmseg_llm.structures import Camera, Mask, Measurement, Prediction, Query, Sample, unique_by_id

CAMERA = Camera(50.0, 51.0, 3.0, 2.0, "ray", (0.1, 0.0, 0.0, 0.0), "exif")

sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def mask_lists(draw, count):
    """`count` bool arrays of one size, from empty to full."""
    size, seed = draw(sizes), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return [rng.random(size) < draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])) for _ in range(count)]


@settings(max_examples=80, deadline=None)
@given(mask_lists(1))
def test_mask_round_trip(arrays):
    (array,) = arrays
    mask = Mask.from_array(array)
    assert mask.array.dtype == bool and (mask.array == array).all()
    assert mask == Mask.from_array(array.astype(np.float32) * 0.3) == Mask.from_coco(mask.to_coco(), array.shape)
    assert json.loads(json.dumps(mask.to_coco())) == mask.to_coco()
    rows, columns = np.nonzero(array)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
    assert mask.box == box


@settings(max_examples=80, deadline=None)
@given(mask_lists(3))
def test_mask_algebra_equals_numpy(arrays):
    a, b, c = (Mask.from_array(array) for array in arrays)
    union, both = arrays[0] | arrays[1], arrays[0] & arrays[1]
    assert a.area == arrays[0].sum()
    assert a.intersection(b) == b.intersection(a) == both.sum()
    assert a.iou(b) == (both.sum() / union.sum() if union.any() else 1.0)
    assert (Mask.union([a, b, c], a.size).array == np.logical_or.reduce(arrays)).all()
    assert Mask.union([], a.size) == Mask.empty(a.size) and Mask.empty(a.size).area == 0


def test_mask_from_coco():
    square = np.zeros((6, 8), bool)
    square[1:4, 1:5] = True
    assert (Mask.from_coco([[1, 1, 5, 1, 5, 4, 1, 4], [0, 0]], (6, 8)).array == square).all()
    runs = [1 + 6, 3, 3, 3, 3, 3, 3, 3, 20]
    assert Mask.from_coco({"size": [6, 8], "counts": runs}, (6, 8)) == Mask.from_array(square)
    assert Mask.from_coco(Mask.from_array(square).to_coco(as_bytes=True), (6, 8)) == Mask.from_array(square)


def test_mask_refuses():
    mask = Mask.empty((4, 6))
    cases = [
        (lambda: Mask.from_coco(mask.to_coco(), (6, 4)), r"RLE size \(4, 6\) .* image size \(6, 4\); re-encode"),
        (lambda: Mask.from_coco({"size": [4, 6], "counts": [3]}, (4, 6)), "covers 3 pixels but the image has 24"),
        (lambda: Mask.from_coco({"size": [4, 6], "counts": Mask.empty((4, 5)).counts}, (4, 6)), "covers 20 pixels"),
        (lambda: Mask.from_coco({"size": [4, 6], "counts": Mask.empty((40, 60)).counts[:-1]}, (4, 6)), "covers -1"),
        (lambda: Mask((4, 6), Mask.empty((4, 9)).counts).array, "Invalid RLE"),
        (lambda: Mask.from_coco({"counts": "x"}, (4, 6)), "needs the keys 'size' and 'counts'"),
        (lambda: Mask.from_coco([[1, 2, 3, 4]], (4, 6)), "no polygon with at least 3 points"),
        (lambda: Mask.from_array(np.zeros((1, 4, 6))), r"must be an \(H, W\) array"),
        (lambda: mask.intersection(Mask.empty((6, 4))), "cannot be compared"),
        (lambda: Mask.union([mask, Mask.empty((6, 4))], (4, 6)), "cannot join"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_query_target():
    masks = tuple(Mask.from_array(np.eye(5, k=k)) for k in (0, 1))
    assert Query("x", masks=masks).target((5, 5)).area == 9
    assert not Query("x", masks=masks).is_no_target and not Query("x").is_no_target
    assert Query("x", masks=()).is_no_target and Query("x", masks=(Mask.empty((5, 5)),)).is_no_target
    with pytest.raises(ValueError, match=r"query 'x' \(7\) has no mask label"):
        Query("x", id="7").target((5, 5))


def prediction(array, **changes):
    mask = Mask.from_array(array)
    return Prediction("the cat", array.shape, "q", "s", "it is [SEG]", mask, mask.box, 0.25, **changes)


@settings(max_examples=40, deadline=None)
@given(
    mask_lists(1),
    st.booleans(),
    st.sampled_from([None, Measurement(2.5, points=((1.0, 2.0),), camera=CAMERA), Measurement(None, "no_number")]),
)
def test_prediction_json_round_trip(arrays, exists, measurement):
    """Also with `exists=False` and a mask all the same, which official protocols score."""
    first = prediction(arrays[0], exists=exists, measurement=measurement)
    assert Prediction.from_json(json.loads(json.dumps(first.to_json()))) == first
    without = replace(first, mask=None, box=None)
    assert Prediction.from_json(without.to_json()) == without


def test_prediction_json_refuses():
    record = prediction(np.eye(4)).to_json()
    with pytest.raises(ValueError, match="lacks the field 'text'"):
        Prediction.from_json({key: value for key, value in record.items() if key != "text"})
    with pytest.raises(ValueError, match="re-encode the mask"):
        Prediction.from_json({**record, "size": [4, 5]})


def test_prediction_to_coco():
    array = np.zeros((6, 8))
    array[1:4, 2:7] = 1
    entry = prediction(array).to_coco()
    assert (entry["image_id"], entry["bbox"], entry["area"], entry["score"]) == ("s", [2, 1, 5, 3], 15, 0.25)
    assert Mask.from_coco(entry["segmentation"], (6, 8)).area == 15
    for rejected in (Prediction("x", (6, 8), exists=False), prediction(array, exists=False)):
        empty = rejected.to_coco(image_id=3)
        assert (empty["image_id"], empty["bbox"], empty["area"]) == (3, [0, 0, 0, 0], 0)


def test_prediction_save(tmp_path):
    first = prediction(np.eye(4))
    record = json.loads(first.save(tmp_path / "new" / "p.json").read_text(encoding="utf-8"))
    assert Prediction.from_json(record) == first
    assert (np.asarray(Image.open(first.save(tmp_path / "p.png"))) == np.eye(4) * 255).all()
    with pytest.raises(ValueError, match=r"cannot save a prediction as '\.bmp'"):
        first.save(tmp_path / "p.bmp")
    with pytest.raises(ValueError, match="carries no image"):
        first.save(tmp_path / "p.jpg")


def test_unique_by_id():
    first = prediction(np.eye(4))
    others = [replace(first, query_id="r"), replace(first, score=0.5), replace(first, sample_id="t")]
    assert unique_by_id([first, *others]) == [first, others[0], others[2]]


def test_sample_image_of_another_size(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4)).save(path)
    assert Sample(path, (4, 5)).load_image().size == (5, 4)
    with pytest.raises(ValueError, match=r"a\.png is 4x5 \(HxW\) but its annotations say 5x4"):
        Sample(path, (5, 4)).load_image()


def test_runs_are_counted_as_the_format_says():
    """Against the definition, one character at a time; also of strings that end within a run or hold too few."""

    def by_definition(counts: str) -> int:
        runs, value, shift = [], 0, 0
        for character in counts:
            chunk = ord(character) - 48
            value |= (chunk & 0x1F) << shift
            shift += 5
            if not chunk & 0x20:
                value -= (1 << shift) if chunk & 0x10 else 0
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        return -1 if shift else sum(runs)

    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.3, 0.5, 0.99, 1):
        for height, width in rng.integers(1, 90, (20, 2)):
            counts = Mask.from_array(rng.random((height, width)) < share).counts
            assert _pixels_covered(counts) == height * width
            for length in range(min(8, len(counts))):
                assert _pixels_covered(counts[:length]) == by_definition(counts[:length])

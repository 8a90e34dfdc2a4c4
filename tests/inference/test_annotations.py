"""Files for annotation tools: brush RLE as Label Studio packs it, places in percent, COCO through pycocotools."""

import hashlib
import json
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools.coco import COCO

from mmseg_llm.inference.annotations import (
    clicks_of_answer,
    decode_brush,
    decode_values,
    encode_brush,
    encode_runs,
    from_percent,
    label_studio_config,
    to_coco_file,
    to_label_studio,
    to_percent,
    write_label_studio,
)
from mmseg_llm.structures import Click, Mask, PolicyStep, Prediction

SIZE = (30, 41)


def mask(*boxes, size=SIZE):
    array = np.zeros(size, bool)
    for top, left, bottom, right in boxes:
        array[top:bottom, left:right] = True
    return Mask.from_array(array)


def flat(count, *set_, width):
    array = np.zeros(count, bool)
    for part in set_:
        array[part] = True
    return Mask.from_array(array.reshape(-1, width))


# `mask2rle` of label-studio-sdk 2.1.2 (thi.ng rle-pack); it may append one byte of zeros.
SDK_MASKS = {
    "block": (mask((1, 2, 3, 5), size=(4, 6)), "00000060391bfe1f00b7ff6c02dffe1b0000"),
    "empty": (Mask.empty((3, 5)), "0000003c391bfe3b0000"),
    "full": (mask((0, 0, 2, 2), size=(2, 2)), "00000010391bfdfff0"),
    "long": (mask((100, 0, 130, 150), size=(130, 150)), "000130b0391bffea5f00e8c9ffe0"),
    "very long": (
        mask((0, 0, 1, 1), size=(300, 300)),
        "00057e40391bfc7ffffffc03ffff807ffff00ffffe01ffffc03bf1d800",
    ),
}


@pytest.mark.parametrize("name", SDK_MASKS)
def test_masks_are_packed_as_by_the_label_studio_sdk(name):
    expected, packed = SDK_MASKS[name]
    theirs = bytes.fromhex(packed)
    assert bytes(encode_brush(expected)) in (theirs, theirs[:-1] if theirs[-1] == 0 else theirs)
    assert decode_brush(theirs, expected.size) == expected
    assert decode_brush(list(theirs), expected.size) == expected


def test_a_long_mask_is_packed_as_by_the_sdk():
    packed = bytes(encode_brush(flat(40000, slice(None, None, 7), width=200)))
    digest = "a77b7219d53cd3841fe0d4364a9d081a7562d1680af6a15f0996070a2f1c146a"
    assert digest in (hashlib.sha256(packed).hexdigest(), hashlib.sha256(packed + b"\0").hexdigest())


def test_single_values_and_runs_of_bytes():
    values = np.array([0, 7, 255, 9, 1, 3])
    lengths = np.array([1, 2, 3, 1, 9, 1])
    packed = bytes.fromhex("00000011391bf8001083c5fe004d801000c0")  # encode_rle of the SDK
    assert bytes(encode_runs(lengths, values)) == packed
    assert decode_values(packed, 17).tolist() == np.repeat(values, lengths).tolist()


def test_literal_runs_and_other_sizes_are_read():
    """As Label Studio's editor packs smooth edges; both vectors were decoded by the SDK."""
    packed = bytes.fromhex("0000001838a45cc00af2028793720287a0320287bff01c00")
    pixels = [0] * 4 + [200, 10, 30, 77, 200, 10, 30, 128, 200, 10, 30, 255] + [0] * 8
    assert decode_values(packed, 24).tolist() == pixels
    assert decode_brush(packed, (2, 3)).array.tolist() == [[False, True, True], [True, False, False]]
    assert decode_values(bytes.fromhex("00000008191bf882469f1480"), 8).tolist() == [1, 2, 3, 4, 15, 9, 9, 9]


@settings(max_examples=40, deadline=None)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_masks_come_back(array):
    expected = Mask.from_array(array)
    assert decode_brush(encode_brush(expected), expected.size) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 70_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_runs_come_back(runs):
    lengths, values = (np.array(part) for part in zip(*runs, strict=True))
    expected = np.repeat(values, lengths)
    packed = encode_runs(lengths, values)
    assert np.array_equal(decode_values(packed, len(expected)), expected)
    assert all(0 <= byte <= 255 for byte in packed)


@settings(max_examples=40, deadline=None)
@given(arrays(bool, (6, 7)), st.data())
def test_damage_is_refused_or_gives_a_mask(array, data):
    packed = bytearray(encode_brush(Mask.from_array(array)))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(packed[: data.draw(st.integers(0, len(packed)))])
    try:
        assert decode_brush(cut, (6, 7)).size == (6, 7)
    except ValueError as error:
        assert "brush RLE" in str(error)


def test_brushes_of_other_images_are_refused():
    packed = encode_brush(Mask.empty((10, 10)))
    with pytest.raises(ValueError, match=r"400 values does not fit .*\(20, 10\)"):
        decode_brush(packed, (20, 10))
    with pytest.raises(ValueError, match="holds 400 values of 8 bits; expected at most 100"):
        decode_brush(packed, (5, 5))


def test_a_megapixel_is_fast():
    rows, cols = np.mgrid[:1000, :1000]
    blobs = Mask.from_array(np.sin(rows / 17) * np.sin(cols / 23) > 0.1)
    assert blobs.array.any()
    start = time.perf_counter()
    assert decode_brush(encode_brush(blobs), blobs.size) == blobs
    assert time.perf_counter() - start < 3  # 0.2 s where nothing else runs


# ---- clicks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_percentages_lead_back_to_the_pixel(height, width, down, right, is_positive):
    click = Click(min(int(down * height), height - 1), min(int(right * width), width - 1), is_positive)
    x, y = to_percent(click, (height, width))
    assert 0 < x < 100 and 0 < y < 100
    assert from_percent(x, y, is_positive, (height, width)) == click


def test_places_at_and_beyond_the_edge():
    assert from_percent(100, 100, True, (10, 20)) == Click(9, 19, True)
    assert from_percent(0, 0, False, (10, 20)) == Click(0, 0, False)
    with pytest.raises(ValueError, match=r"x=100\.1, y=5"):
        from_percent(100.1, 5, True, (10, 20))


def episode(query="the cup", **fields):
    masks = [Mask.empty(SIZE), mask((2, 3, 9, 20)), mask((2, 3, 9, 20), (20, 30, 25, 41)), mask((2, 3, 8, 20))]
    clicks = [None, Click(5, 10, True), Click(22, 35, True), Click(8, 5, False)]
    steps = tuple(PolicyStep(click, shown, "", 0.5, "ok") for click, shown in zip(clicks, masks))
    made = Prediction(query, SIZE, mask=masks[-1], box=masks[-1].box, score=0.75, trajectory=steps)
    return replace(made, **fields)


def plain(query="the saucer", **fields):
    found = mask((10, 10, 20, 20))
    return replace(Prediction(query, SIZE, mask=found, box=found.box, score=0.25), **fields)


def test_clicks_are_those_that_led_to_the_answer():
    made = episode()
    clicks = [step.click for step in made.trajectory[1:]]
    assert clicks_of_answer(made) == clicks
    assert clicks_of_answer(replace(made, mask=made.trajectory[1].mask)) == clicks[:1]
    assert clicks_of_answer(replace(made, mask=made.trajectory[0].mask)) == []
    assert clicks_of_answer(replace(made, mask=mask((0, 0, 1, 1)))) == clicks  # made elsewhere, such as by a refiner
    assert clicks_of_answer(replace(made, exists=False)) == []
    assert clicks_of_answer(plain()) == []


# ---- files ------------------------------------------------------------------------------------------------------------


def test_coco_file_comes_back_through_pycocotools(tmp_path):
    answers = [[episode(), plain(exists=False)], [plain()]]
    path = to_coco_file(answers, ["a.jpg", "sub/ü.jpg"], tmp_path / "new" / "coco.json")
    coco = COCO(str(path))
    assert [image["file_name"] for image in coco.loadImgs([1, 2])] == ["a.jpg", "sub/ü.jpg"]
    assert (coco.imgs[1]["height"], coco.imgs[1]["width"]) == SIZE
    first, rejected, second = coco.loadAnns(coco.getAnnIds())
    assert np.array_equal(coco.annToMask(first).astype(bool), answers[0][0].mask.array)
    assert first["bbox"] == [3, 2, 17, 6] and first["area"] == 6 * 17
    assert first["clicks"][2] == {"row": 8, "col": 5, "is_positive": False} and len(first["clicks"]) == 3
    assert not rejected["exists"] and not coco.annToMask(rejected).any()
    assert "clicks" not in second and second["image_id"] == 2
    assert [path.name for path in path.parent.iterdir()] == ["coco.json"]


def test_label_studio_tasks_fit_their_configuration(tmp_path):
    answers = [[episode("a & <b>"), plain(exists=False)], [plain(), plain("other")]]
    tasks = to_label_studio(answers, ["http://host/a.jpg", "/data/b.jpg"], model_version="run 7")
    path = write_label_studio(tasks, tmp_path / "tasks.json")
    assert json.loads(path.read_text(encoding="utf-8")) == tasks
    view = ElementTree.fromstring((tmp_path / "tasks.xml").read_text(encoding="utf-8"))
    (picture,) = view.iter("Image")
    tags = {
        tag.get("name"): (tag.tag.lower(), {label.get("value") for label in tag}) for tag in view if tag.get("toName")
    }
    assert [task["data"] for task in tasks] == [
        {"image": "http://host/a.jpg", "no_target": ["the saucer"]},
        {"image": "/data/b.jpg"},
    ]
    assert picture.get("value") == "$image"
    for task in tasks:
        (made,) = task["predictions"]
        assert made["model_version"] == "run 7"
        ids = [region["id"] for region in made["result"]]
        assert len(set(ids)) == len(ids)
        for region in made["result"]:
            kind, known = tags[region["from_name"]]
            assert region["type"] == kind and set(region["value"][kind]) <= known
            assert region["to_name"] == picture.get("name")
            assert (region["original_height"], region["original_width"], region["image_rotation"]) == (*SIZE, 0)
    assert tasks[0]["predictions"][0]["score"] == 0.75
    assert tasks[1]["predictions"][0]["score"] == 0.25


def test_label_studio_regions_hold_mask_and_clicks():
    made = episode()
    (task,) = to_label_studio([[made]], ["a.jpg"], labels={"the cup": "cup"})
    brush, *points = task["predictions"][0]["result"]
    assert brush["value"]["format"] == "rle" and brush["value"]["brushlabels"] == ["cup"]
    assert decode_brush(brush["value"]["rle"], SIZE) == made.mask
    assert brush["meta"] == {"text": ["the cup"]} and brush["score"] == 0.75
    found = [
        from_percent(point["value"]["x"], point["value"]["y"], point["value"]["keypointlabels"] == ["positive"], SIZE)
        for point in points
    ]
    assert found == clicks_of_answer(made)
    assert {point["parentID"] for point in points} == {brush["id"]}


def test_an_image_without_any_target_has_an_empty_prediction():
    (task,) = to_label_studio([[plain(exists=False), plain("b", mask=None, box=None)]], ["a.jpg"])
    assert task["predictions"][0]["result"] == [] and task["predictions"][0]["score"] == 0
    assert task["data"]["no_target"] == ["the saucer", "b"]


def brushes(path):
    (brush,) = ElementTree.fromstring(path.with_suffix(".xml").read_text(encoding="utf-8")).iter("BrushLabels")
    return [label.get("value") for label in brush]


def test_labels_that_were_found_nowhere_can_be_drawn(tmp_path):
    answers = [[episode(), plain(exists=False)], [plain("a bowl", mask=None, box=None), plain("a tray")]]
    path = write_label_studio(to_label_studio(answers, ["a", "b"]), tmp_path / "tasks.json")
    assert brushes(path) == ["the cup", "the saucer", "a tray", "a bowl"]
    labels = {"the cup": "cup", "the saucer": "saucer", "a bowl": "bowl", "a tray": "cup"}
    path = write_label_studio(to_label_studio(answers, ["a", "b"], labels), tmp_path / "tasks.json", labels)
    assert brushes(path) == ["cup", "saucer", "bowl"]


def test_packing_keeps_no_pixels():
    shown = mask((1, 1, 5, 6))
    encode_brush(shown)
    assert "array" not in vars(shown)


def test_configuration_lists_each_label_once():
    view = ElementTree.fromstring(label_studio_config(["cup", "a < b", "cup"]))
    brush = next(view.iter("BrushLabels"))
    assert [label.get("value") for label in brush] == ["cup", "a < b"]
    assert len({label.get("background") for label in view.iter("Label")}) == 4


def test_refusals_say_what_to_change(tmp_path):
    with pytest.raises(ValueError, match="predictions of 1 images, but 2 names"):
        to_coco_file([[plain()]], ["a", "b"], tmp_path / "x.json")
    with pytest.raises(ValueError, match="image 'a' needs at least one prediction"):
        to_label_studio([[]], ["a"])
    with pytest.raises(ValueError, match=r"'a' needs .* of sizes \[\(2, 2\), \(30, 41\)\]"):
        to_label_studio([[plain(), Prediction("q", (2, 2))]], ["a"])
    with pytest.raises(ValueError, match="query 'the saucer' has no label"):
        to_label_studio([[plain()]], ["a"], labels={"the cup": "cup"})
    with pytest.raises(ValueError, match="needs at least one"):
        label_studio_config([])
    assert not list(tmp_path.iterdir())


def test_brush_picture_is_rgba():
    expected = mask((1, 1, 5, 6))
    picture = Image.fromarray(decode_values(encode_brush(expected), 4 * SIZE[0] * SIZE[1]).reshape(*SIZE, 4), "RGBA")
    assert np.array_equal(np.asarray(picture.getchannel("A")) == 255, expected.array)

"""COCO instances: joins, what is skipped, real annotations."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmseg_llm.data import CocoIndex, CocoInstances, Concat

SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]


def content():
    """Two images of 8x10 pixels, four instances (one crowd), an image without any."""
    crowd = {"size": [8, 10], "counts": [0, 16, 64]}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 10} for i in (1, 2, 3)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": 10, "image_id": 1, "category_id": 7, "segmentation": SQUARE, "bbox": [1, 1, 4, 3]},
            {"id": 11, "image_id": 1, "category_id": 3, "segmentation": SQUARE},
            {"id": 12, "image_id": 1, "category_id": 3, "segmentation": [[6, 4, 9, 4, 9, 8, 6, 8]], "iscrowd": 0},
            {"id": 13, "image_id": 2, "category_id": 3, "segmentation": crowd, "iscrowd": 1},
        ],
    }


def write(folder, value):
    path = folder / "instances.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_one_query_per_category(tmp_path):
    dataset = CocoInstances(write(tmp_path, content()), tmp_path)
    assert [sample.id for sample in dataset] == ["1"]
    sample = dataset[0]
    assert (sample.size, sample.image, sample.source) == ((8, 10), tmp_path / "1.jpg", "instances")
    assert [(query.text, query.id, len(query.masks)) for query in sample.queries] == [
        ("cat", "1-3", 2),
        ("dog", "1-7", 1),
    ]
    assert sample.queries[1].boxes == ((1.0, 1.0, 5.0, 4.0),)
    assert sample.queries[0].boxes[0] == (1.0, 1.0, 5.0, 4.0), "without a bbox, the box of the mask"
    assert sample.queries[0].target(sample.size).area == 12 + 12
    assert dataset.skipped == {"crowd annotation": 1, "image without instances": 2}
    facts = dataset.describe()
    assert (facts["queries"], facts["multi_target"], facts["no_target"], facts["images"]) == (2, 1, 0, 1)
    with pytest.raises(IndexError):
        dataset[1]


def test_categories_and_max_samples(tmp_path):
    path = write(tmp_path, content())
    only_dogs = CocoInstances(path, tmp_path, categories=["dog"])
    assert [query.text for query in only_dogs[0].queries] == ["dog"]
    assert len(CocoInstances(path, tmp_path, max_samples=0)) == 0
    with pytest.raises(ValueError, match=r"instances\.json has no category 'bird'; it has cat, dog"):
        CocoInstances(path, tmp_path, categories=["bird"])


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"image_id": 99}, "missing image", "annotation 10 of image 99: missing image"),
        ({"segmentation": []}, "no mask", "annotation 10 of image 1: no mask"),
        ({"category_id": 99}, "missing category", "annotation 10 has the unknown category 99"),
    ],
)
def test_broken_annotation(tmp_path, change, reason, message):
    value = content()
    value["annotations"][0].update(change)
    path = write(tmp_path, value)
    with pytest.raises(ValueError, match=message) as error:
        CocoInstances(path, tmp_path)
    assert "on_error='skip'" in str(error.value) and str(path) in str(error.value)
    dataset = CocoInstances(path, tmp_path, on_error="skip")
    assert dataset.skipped[reason] == 1
    assert [query.text for query in dataset[0].queries] == ["cat"]


def test_faulty_files(tmp_path):
    duplicate = content()
    duplicate["annotations"].append(duplicate["annotations"][0] | {"category_id": 3})
    unnamed = content()
    del unnamed["images"][1]["file_name"]
    cases = [
        ("{", "is not valid JSON"),
        ([], "lacks the list 'images'"),
        ({"images": []}, "lacks the list 'annotations'"),
        (duplicate, "two different records have the annotation id 10"),
        (unnamed, "image 2 lacks 'file_name'"),
    ]
    for value, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            CocoIndex(write(tmp_path, value))
        assert "instances.json" in str(error.value)
    with pytest.raises(ValueError, match="does not exist"):
        CocoIndex(tmp_path / "none.json")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        CocoInstances(write(tmp_path, content()), tmp_path, on_error="ignore")


def test_rle_of_wrong_size_names_the_annotation(tmp_path):
    value = content()
    value["annotations"][3]["segmentation"]["size"] = [10, 8]
    with pytest.raises(ValueError, match=r"instances\.json: annotation 13: RLE size \(10, 8\)"):
        CocoIndex(write(tmp_path, value)).mask(13)


def test_concat(tmp_path):
    path = write(tmp_path, content())
    parts = [CocoInstances(path, tmp_path, name="a"), CocoInstances(path, tmp_path, name="b", categories=["dog"])]
    both = Concat(parts)
    assert [sample.id for sample in both] == ["a/1", "b/1"]
    assert both[-1].id == "b/1" and both.name == "a+b"
    assert both.skipped["b: image without instances"] == 2
    assert both.describe()["queries"] == 3
    for index in (2, -3):
        with pytest.raises(IndexError):
            both[index]
    with pytest.raises(ValueError, match="equal names"):
        Concat([parts[0], parts[0]])
    with pytest.raises(ValueError, match="no datasets"):
        Concat([])


@pytest.mark.parametrize(("split", "instances", "crowds"), [("train2017", 894, 8), ("val2017", 637, 7)])
def test_real_annotations(shared_data, split, instances, crowds):
    folder = shared_data / "coco_mini"
    dataset = CocoInstances(folder / "annotations" / f"instances_{split}.json", folder / split)
    assert len(dataset.index.annotations) == instances
    assert dataset.skipped["crowd annotation"] == crowds
    found, gaps = 0, []
    for sample in dataset:
        for query in sample.queries:
            found += len(query.masks)
            for mask, box in zip(query.masks, query.boxes, strict=True):
                assert mask.size == sample.size and mask.area > 0
                gaps.append(np.abs(np.subtract(mask.box, box)).max())
    assert found == instances - crowds
    assert np.median(gaps) < 1.0 and max(gaps) < 7.0, "slivers of polygons cover no pixel, but are in the bbox"
    assert np.asarray(dataset[0].load_image()).shape == (*dataset[0].size, 3)

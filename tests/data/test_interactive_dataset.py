"""Folders of interactive benchmarks: values of masks, ignored pixels, categories, and what is reported."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.configuration import read_part
from mmseg_llm.data import InteractiveDataset, SampleDataset
from mmseg_llm.masks import Mask

SIZE = (4, 6)


def labels(*values: int) -> np.ndarray:
    """One row per value (the first on top), the rest background."""
    array = np.zeros(SIZE, np.uint8)
    for row, value in enumerate(values):
        array[row] = value
    return array


def row(*rows: int) -> Mask:
    array = np.zeros(SIZE, bool)
    array[list(rows)] = True
    return Mask.from_array(array)


def folder(root, pairs, images="img", masks="gt", suffixes=(".jpg", ".png")):
    """Write pairs: name -> labels or an image."""
    for name in (images, masks):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, mask in pairs.items():
        Image.new("RGB", SIZE[::-1]).save(root / images / f"{name}{suffixes[0]}")
        image = Image.fromarray(mask) if isinstance(mask, np.ndarray) else mask
        image.save(root / masks / f"{name}{suffixes[1]}")
    return root


def objects(sample):
    return {query.id: query.masks for query in sample.queries}


@pytest.mark.parametrize(
    ("values", "found", "ignored"),
    [
        ((255,), {"a-255": 0}, None),
        ((1, 0), {"a-1": 0}, None),
        ((255, 128), {"a-255": 0}, 1),
        ((1, 2, 3), {"a-1": 0, "a-2": 1, "a-3": 2}, None),
        ((1, 255), {"a-1": 0}, 1),
        ((7, 128, 255), {"a-7": 0, "a-128": 1}, 2),
        ((38, 75), {"a-38": 0, "a-75": 1}, None),
    ],
)
def test_values(tmp_path, values, found, ignored):
    (sample,) = InteractiveDataset(folder(tmp_path, {"a": labels(*values)}))
    assert objects(sample) == {name: (row(place),) for name, place in found.items()}
    assert all(query.ignore == (None if ignored is None else row(ignored)) for query in sample.queries)
    (whole,) = InteractiveDataset(tmp_path, objects="union")
    assert objects(whole) == {"a": (row(*found.values()),)}


def test_modes(tmp_path):
    palette = Image.fromarray(labels(1, 2)).convert("P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    palette.putdata(labels(1, 2).ravel().tolist())
    gray = Image.fromarray(labels(255, 128))
    pairs = {
        "bits": Image.fromarray(labels(255) > 0),
        "colour": palette.convert("RGB"),
        "gray": gray.convert("RGB"),
        "palette": palette,
        "wide": Image.fromarray(labels(0, 3).astype(np.uint16) * 300),
    }
    dataset = InteractiveDataset(folder(tmp_path, pairs))
    found = {sample.id: list(objects(sample).values()) for sample in dataset}
    both = [(row(0),), (row(1),)]
    assert found["bits"] == found["gray"] == [(row(0),)] and found["wide"] == [(row(1),)]
    assert found["palette"] == both and sorted(found["colour"], key=str) == sorted(both, key=str)
    assert dataset[2].queries[0].ignore == row(1)


def test_layouts_and_categories(tmp_path):
    mask = labels(255)
    folder(tmp_path / "GrabCut", {"b": mask}, "data_GT", "boundary_GT", (".JPG", ".bmp"))
    names = ["stop sign00_000000126592", "dog12_000000000042", "dog", "000", "x1_000000000001"]
    folder(tmp_path / "COCO_MVal", dict.fromkeys(names, mask), "images", "masks")
    (sample,) = InteractiveDataset(tmp_path / "GrabCut")
    assert (sample.id, sample.source, sample.size) == ("b", "GrabCut", SIZE) and sample.queries[0].text == ""
    dataset = InteractiveDataset(tmp_path / "COCO_MVal", name="coco")
    texts = {sample.id: sample.queries[0].text for sample in dataset}
    assert texts == {names[0]: "stop sign", names[1]: "dog", "dog": "", "000": "", names[4]: ""}
    assert dataset.name == dataset[0].source == "coco" and dataset.describe()["queries"] == 5
    assert len(InteractiveDataset(tmp_path / "COCO_MVal", max_samples=2)) == 2
    (tmp_path / "COCO_MVal/masks").rename(tmp_path / "COCO_MVal/labels")
    assert len(InteractiveDataset(tmp_path / "COCO_MVal", masks="labels")) == 5
    for wrong, message in [
        ("COCO_MVal", r"holds no folders 'data_GT, img or images' and .* \(images, labels\); give the folder"),
        ("no", "it does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            InteractiveDataset(tmp_path / wrong)
    with pytest.raises(ValueError, match="objects is 'all'"):
        InteractiveDataset(tmp_path / "GrabCut", objects="all")


def test_faults_are_reported(tmp_path):
    noise = np.arange(24, dtype=np.uint8).reshape(SIZE)
    good = {"good": labels(255), "several": labels(1, 2)}
    bad = {"empty": labels(), "unsure": labels(128), "small": labels(255)[:-1], "torn": labels(255)}
    folder(tmp_path, good | bad)
    (tmp_path / "gt/torn.png").write_bytes((tmp_path / "gt/torn.png").read_bytes()[:40])
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "gt/blurred.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "img/blurred.jpg")
    (tmp_path / "img/text.jpg").write_text("no image")
    Image.fromarray(noise).save(tmp_path / "gt/text.png")
    Image.fromarray(noise).save(tmp_path / "gt/widow.png")
    Image.fromarray(noise).save(tmp_path / "img/orphan.png")
    Image.fromarray(noise).save(tmp_path / "img/good.bmp")
    (tmp_path / "img/Thumbs.db").write_text("x")
    (tmp_path / "gt/.hidden").write_text("x")
    with pytest.raises(ValueError, match=r"good\.jpg has the same name as good\.bmp.*; mend the file or pass on_error"):
        InteractiveDataset(tmp_path)
    (tmp_path / "img/good.bmp").unlink()
    with pytest.raises(ValueError, match=r"widow\.png has no image of this name in"):
        InteractiveDataset(tmp_path)
    dataset = InteractiveDataset(tmp_path, on_error="skip")
    assert [sample.id for sample in dataset] == ["good", "several"]
    expected = ["missing image", "missing mask", "other size", "broken mask", "broken image", "no labels"]
    assert dataset.skipped == dict.fromkeys(expected, 1) | {"no object": 2, "no image file in img": 1}


def test_other_processes_and_configs(tmp_path):
    folder(tmp_path / "set", {"a": labels(1, 2), "b": labels(255, 128)})
    dataset = InteractiveDataset(tmp_path / "set")
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset) and dataset[-1].id == "b"
    assert list(dataset.query_counts()) == [("a", 1), ("a", 1), ("b", 1)]
    with pytest.raises(IndexError):
        dataset[2]
    config = {"root": str(tmp_path / "set"), "objects": "union"}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"class_path": "mmseg_llm.data.InteractiveDataset", "init_args": config}))
    assert len(read_part(path, "dataset", "", SampleDataset, is_subclass=True)) == 2


@pytest.mark.parametrize(("name", "images", "queries"), [("GrabCut", 28, 28), ("DAVIS", 25, 34), ("COCO_MVal", 76, 76)])
def test_real_benchmarks(shared_data, name, images, queries):
    root = shared_data / "interactive_mini" / name
    if not root.is_dir():
        pytest.skip(f"real data is absent: {root} does not exist")
    dataset = InteractiveDataset(root)
    facts = dataset.describe()
    assert (facts["samples"], facts["queries"], facts["skipped"]) == (images, queries, {})
    assert all(sample.load_image().size == sample.size[::-1] for sample in list(dataset)[:3])
    ignored = sum(query.ignore is not None for sample in dataset for query in sample.queries)
    assert ignored == (20 if name == "GrabCut" else 0)
    if name == "COCO_MVal":
        assert len({sample.queries[0].text for sample in dataset} - {""}) == 76
    union = InteractiveDataset(root, objects="union")
    assert all(len(sample.queries) == 1 for sample in union)

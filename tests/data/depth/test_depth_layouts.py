"""Which depth map belongs to which image of a folder, and what belongs to nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mmseg_llm.data import DepthFolderDataset


@pytest.fixture
def folder(tmp_path):
    """Three images with depth in millimetres: `a` and `b` as PNG, `c` as NPY in metres."""
    units = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 100
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    for name in ("a.jpg", "b.png", "c.png"):
        Image.new("RGB", (16, 12)).save(tmp_path / "images" / name)
    for name in "ab":
        Image.fromarray(units).save(tmp_path / "depth" / f"{name}.png")
    np.save(tmp_path / "depth" / "c.npy", units / 1000)
    return tmp_path


def read(folder, **arguments) -> DepthFolderDataset:
    return DepthFolderDataset(folder, **{"intrinsics": [50.0, 51.0, 7.5, 5.5], "metres_per_unit": 0.001} | arguments)


def test_images_and_maps_may_lie_in_one_tree(folder):
    (folder / "images" / "depth").mkdir()
    (folder / "depth" / "a.png").rename(folder / "images" / "depth" / "a.png")
    dataset = read(folder, depth="images/depth", on_error="skip")
    assert [sample.id for sample in dataset] == ["a.jpg"] and dataset.skipped == {"missing depth": 2}


def test_suffixes_may_be_capitals_and_tif(folder):
    names = {"images": ("a.JPG", "b.TIF", "c.PNG"), "depth": ("a.PNG", "b.tiff", "c.NPY")}
    for part, files in names.items():
        for name in files:
            (path,) = (folder / part).glob(f"{name[0]}.*")
            if "tif" in name.lower():
                Image.open(path).save(folder / part / name)
                path.unlink()
            else:
                path.rename(folder / part / name)
    dataset = read(folder)
    assert [sample.id for sample in dataset] == ["a.JPG", "b.TIF", "c.PNG"] and dataset.skipped == {}
    np.testing.assert_array_equal(dataset.depth_map(0), dataset.depth_map(1))


def test_files_that_belong_to_nothing_are_counted(folder):
    (folder / "images" / "a.jpg").rename(folder / "images" / "d.jpg")
    (folder / "images" / "notes.txt").touch()
    (folder / "depth" / "a.exr").touch()
    (folder / "depth" / ".hidden").touch()
    assert read(folder, on_error="skip").skipped == {
        "depth without image": 1,
        "file of unknown kind": 2,
        "missing depth": 1,
    }


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([{"depth": "depth/a.png"}], "entry 0 is malformed \\('rgb'\\)"),
        ([{"rgb": "../a.jpg"}], "leads out of the folder"),
        ([{"rgb": "a.jpg", "cam_in": [1, 2]}], "cam_in is"),
        ([{"rgb": "a.jpg", "depth_scale": 0}], "depth_scale is 0"),
        ([{"rgb": "a.jpg", "depth_scale": float("inf")}], "depth_scale is inf"),
        ([{"rgb": "a.jpg"}, {"rgb": "a.jpg"}], "entry 1 is about 'a.jpg' again"),
        ({"rgb": "a.jpg"}, "no annotation list"),
    ],
)
def test_annotation_lists_that_make_no_sense_are_named(folder, entries, sentence):
    (folder / "list.json").write_text(json.dumps({"files": entries}))
    with pytest.raises(ValueError, match=sentence):
        read(folder, annotations="list.json")

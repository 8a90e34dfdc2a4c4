"""Folders of depth maps as samples: real cameras, the synthetic world's exact depth, and everything that can be wrong."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.cameras import Camera
from mmseg_llm.configuration import read_part
from mmseg_llm.data import DepthFolderDataset, SampleDataset
from mmseg_llm.data.synthetic import make_scene, write_dataset

SIZE = (12, 16)
K = [50.0, 51.0, 7.5, 5.5]


def ramp() -> np.ndarray:
    """uint16 `(12, 16)` millimetres, every pixel another, the first unlabelled."""
    return np.arange(12 * 16, dtype=np.uint16).reshape(SIZE) * 100


@pytest.fixture
def folder(tmp_path):
    """Three images with depth in millimetres: `a` and `b` as PNG, `c` as NPY; `b` is grey."""
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    for name, mode, suffix in (("a", "RGB", "jpg"), ("b", "L", "png"), ("c", "RGB", "png")):
        Image.new(mode, SIZE[::-1]).save(tmp_path / "images" / f"{name}.{suffix}")
    for name in "ab":
        Image.fromarray(ramp()).save(tmp_path / "depth" / f"{name}.png")
    metres = ramp() / 1000
    metres[1, :4] = np.nan, np.inf, -1, -np.inf
    np.save(tmp_path / "depth" / "c.npy", metres)
    return tmp_path


def read(folder, **arguments) -> DepthFolderDataset:
    return DepthFolderDataset(folder, **{"intrinsics": K, "metres_per_unit": 0.001} | arguments)


def labels(sample):
    return [(point.x, point.y, point.metres) for query in sample.queries for point in query.points]


def assert_labels_lie_in(dataset: DepthFolderDataset, index: int) -> None:
    """Every query is a labelled pixel of the depth map, and none comes twice."""
    sample, metres = dataset[index], dataset.depth_map(index)
    assert metres.dtype == np.float32 and metres.shape == sample.size
    for query, (x, y, label) in zip(sample.queries, labels(sample), strict=True):
        assert query.task == "depth" and query.id == f"{x},{y}" and label == metres[y, x] > 0
    assert len({query.id for query in sample.queries}) == len(sample.queries)


def test_an_image_is_a_sample(folder):
    dataset = read(folder, distance="planar", points_per_image=1000)
    assert [sample.id for sample in dataset] == ["a.jpg", "b.png", "c.png"] and dataset.skipped == {}
    assert dataset.name == folder.name and dataset[-1].id == "c.png"
    for index, sample in enumerate(dataset):
        assert sample.size == SIZE and sample.camera == Camera(*K, "planar") and sample.source == dataset.name
        assert sample.load_image().mode == "RGB"
        assert_labels_lie_in(dataset, index)
        assert len(sample.queries) == 12 * 16 - (1 if index < 2 else 5), "unlabelled pixels are no query"
        known = dataset.depth_map(index) > 0
        np.testing.assert_allclose(dataset.depth_map(index)[known], ramp()[known] / 1000, rtol=1e-6)
    with pytest.raises(IndexError):
        dataset[3]


def test_points_are_drawn_by_seed_and_index_alone(folder):
    dataset = read(folder, points_per_image=10, seed=3)
    drawn = [labels(sample) for sample in dataset]
    for index in (2, 0, 1, -1):
        assert labels(pickle.loads(pickle.dumps(dataset))[index]) == drawn[index]
    assert all(len(kept) == 10 for kept in drawn) and drawn[0] != drawn[1]
    assert labels(read(folder, points_per_image=10, seed=4)[0]) != drawn[0]
    assert list(dataset.query_counts()) == [(sample.id, None) for sample in dataset for _ in sample.queries]
    uncounted = read(folder, points_per_image=1000, check_depth=False)
    assert list(uncounted.query_counts()) == list(read(folder, points_per_image=1000).query_counts())


def test_pixels_are_drawn_uniformly(folder):
    counts = np.zeros(SIZE)
    for seed in range(300):
        for x, y, _ in labels(read(folder, points_per_image=20, seed=seed, check_depth=False)[0]):
            counts[y, x] += 1
    assert counts[0, 0] == 0 and counts.sum() == 6000
    expected = 6000 / (12 * 16 - 1)
    assert np.sum((counts.reshape(-1)[1:] - expected) ** 2 / expected) < 260, "chi-square of 190 degrees of freedom"


@settings(max_examples=25, deadline=None)
@given(margin=st.integers(0, 5), near=st.floats(0, 5), far=st.floats(10, 20))
def test_margin_and_range_hold(tmp_path_factory, margin, near, far):
    root = tmp_path_factory.mktemp("folder")
    for name in ("images", "depth"):
        (root / name).mkdir()
        Image.fromarray(ramp() if name == "depth" else np.zeros(SIZE, np.uint8)).save(root / name / "a.png")
    dataset = read(root, margin=margin, min_metres=near, max_metres=far, points_per_image=1000)
    found = {(x, y) for x, y, _ in labels(dataset[0])}
    metres = dataset.depth_map(0)
    for y, x in np.ndindex(SIZE):
        is_inner = margin <= x < 16 - margin and margin <= y < 12 - margin
        assert ((x, y) in found) == (is_inner and metres[y, x] > 0 and near <= metres[y, x] <= far)


def test_units_are_given_either_way(folder):
    in_metres = read(folder).depth_map(0)
    assert np.array_equal(read(folder, metres_per_unit=None, units_per_metre=1000).depth_map(0), in_metres)
    quarter = read(folder, metres_per_unit=None, units_per_metre=256)
    assert np.array_equal(quarter.depth_map(0), ramp() / 256)
    assert np.array_equal(quarter.depth_map(2), read(folder).depth_map(2)), "NPY is in metres"


def spoil(folder, what):
    """Break the image `b` or its depth map."""
    image, depth = folder / "images" / "b.png", folder / "depth" / "b.png"
    if what == "missing depth":
        depth.unlink()
    elif what == "corrupt depth":
        depth.write_bytes(depth.read_bytes()[:40] if len(depth.read_bytes()) < 100 else depth.read_bytes()[:90])
    elif what == "corrupt image":
        image.write_bytes(b"no image")
    elif what == "depth of another size":
        Image.fromarray(ramp()[:6]).save(depth)
    elif what == "cut image":
        Image.effect_noise(SIZE[::-1], 50).save(image)
        image.write_bytes(image.read_bytes()[:120])
    elif what == "two images":
        Image.new("RGB", SIZE[::-1]).save(image.with_suffix(".JPEG"))
    elif what == "two maps":
        np.save(depth.with_suffix(".npy"), ramp() / 1000)
    elif what == "millimetres":
        depth.unlink()
        np.save(depth.with_suffix(".npy"), ramp().astype(float))
    elif what == "no labelled pixel":
        Image.fromarray(np.zeros(SIZE, np.uint16)).save(depth)
    elif what == "8 bits":
        Image.fromarray(ramp().astype(np.uint8)).save(depth)
    elif what == "colours":
        Image.new("RGB", SIZE[::-1]).save(depth)
    else:
        depth.unlink()
        np.save(depth.with_suffix(".npy"), ramp() if what == "whole numbers" else ramp()[None] / 1000)


@pytest.mark.parametrize(
    ("what", "reason", "sentence"),
    [
        ("missing depth", "missing depth", "no depth map of its name"),
        ("corrupt depth", "corrupt depth", "cannot be read"),
        ("corrupt image", "corrupt image", "cannot be opened"),
        ("depth of another size", "depth of another size", "16x12 but its depth map depth/b.png is 16x6"),
        ("no labelled pixel", "no labelled pixel", "no labelled pixel"),
        ("8 bits", "depth of another kind", "mode 'L'; write greyscale PNG of 16 bits"),
        ("colours", "depth of another kind", "mode 'RGB'; write greyscale PNG of 16 bits"),
        ("whole numbers", "depth of another kind", "holds uint16 .* save floats"),
        ("three axes", "depth of another kind", r"shape \(1, 12, 16\)"),
    ],
)
def test_faults_raise_one_sentence_or_are_counted(folder, what, reason, sentence):
    spoil(folder, what)
    with pytest.raises(ValueError, match=f"image 'b.png': .*{sentence}.*on_error='skip'"):
        read(folder)
    dataset = read(folder, on_error="skip")
    assert [sample.id for sample in dataset] == ["a.jpg", "c.png"] and dataset.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("what", "arguments", "skipped", "sentence"),
    [
        ("two images", {}, {"ambiguous name": 2}, r"b\.JPEG and b\.png have the same name; keep one"),
        ("two maps", {}, {"ambiguous name": 1}, r"b\.npy and b\.png have the same name; keep one"),
        (
            "millimetres",
            {},
            {"depth of another unit": 1},
            r"most of depth/b\.npy is beyond 1000 metres, up to 19100; an NPY",
        ),
        ("cut image", {"check_images": "decode"}, {"corrupt image": 1}, "cannot be opened"),
    ],
)
def test_images_that_nobody_should_guess_about(folder, what, arguments, skipped, sentence):
    spoil(folder, what)
    with pytest.raises(ValueError, match=f"image 'b.*': .*{sentence}.*on_error='skip'"):
        read(folder, **arguments)
    dataset = read(folder, on_error="skip", **arguments)
    assert [sample.id for sample in dataset] == ["a.jpg", "c.png"] and dataset.skipped == skipped


def test_depth_beyond_a_kilometre_is_counted_or_wanted(folder):
    metres = ramp() / 1000
    metres[0, :5] = 1001.0
    np.save(folder / "depth" / "c.npy", metres)
    assert read(folder).skipped == {"depth out of range": 5}
    spoil(folder, "millimetres")
    for far in (None, 20_000):
        dataset = read(folder, max_metres=far, points_per_image=1000)
        assert dataset.skipped == {} and max(metres for _, _, metres in labels(dataset[1])) == 19100


def test_normalised_intrinsics_are_a_bad_focal_length(folder):
    with pytest.raises(
        ValueError, match=r"the focal lengths are 0\.6 and 0\.69, with which an image of 16x12 sees more than"
    ):
        read(folder, intrinsics=[0.6, 0.69, 0.5, 0.5])


def test_a_map_without_labels_raises_late_where_nobody_looked(folder):
    spoil(folder, "no labelled pixel")
    dataset = read(folder, check_depth=False)
    with pytest.raises(ValueError, match=r"depth/b\.png has no labelled pixel"):
        dataset[1]
    assert len(dataset[0].queries) == 100


def test_a_png_needs_a_unit(folder):
    with pytest.raises(ValueError, match="give metres_per_unit"):
        read(folder, metres_per_unit=None)
    dataset = read(folder, metres_per_unit=None, on_error="skip", check_depth=False)
    assert [sample.id for sample in dataset] == ["c.png"] and dataset.skipped == {"depth without unit": 2}


def write_cameras(folder, **content) -> None:
    images = {name: dict(zip(("fx", "fy", "cx", "cy"), K)) for name in ("a.jpg", "b.png", "c.png")}
    (folder / "intrinsics.json").write_text(json.dumps({"images": images} | content))


def test_cameras_of_each_image_come_from_a_file(folder):
    own = {"a.jpg": {"fx": 0, "fy": 40, "cx": 7, "cy": 5}, "c.png": {"fx": 0, "cx": 7, "cy": 5}}
    write_cameras(folder, images=own, distance="euclidean", metres_per_unit=0.002)
    dataset = DepthFolderDataset(folder, on_error="skip")
    assert [sample.id for sample in dataset] == ["a.jpg"]
    assert dataset[0].camera == Camera(40, 40, 7, 5, "ray")
    assert dataset.depth_map(0).max() == pytest.approx(0.002 * 191 * 100)
    assert dataset.skipped == {"focal length repaired": 1, "no intrinsics": 1, "bad focal length": 1}


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ({"distance": "planar"}, {"distance": "ray"}, "distance is ray but the files say planar"),
        ({"metres_per_unit": 0.5}, {"metres_per_unit": 0.25}, "metres_per_unit is 0.25 but the files say 0.5"),
        ({"distance": "depth"}, {}, "distance_type is 'depth'"),
        ({"images": [K]}, {}, "holds no cameras"),
        ({"metres_per_unit": -0.001}, {}, r"intrinsics\.json: metres_per_unit is -0\.001; give a positive number"),
        ({"metres_per_unit": 0}, {}, r"metres_per_unit is 0; give a positive number"),
    ],
)
def test_files_that_contradict_or_make_no_sense_are_named(folder, content, arguments, sentence):
    write_cameras(folder, **content)
    with pytest.raises(ValueError, match=sentence):
        DepthFolderDataset(folder, **arguments)


def test_one_matrix_is_the_camera_of_all(folder):
    np.save(folder / "intrinsics.npy", [[50, 0, 7.5], [0, 51, 5.5], [0, 0, 1]])
    dataset = DepthFolderDataset(folder, units_per_metre=1000)
    assert {sample.camera for sample in dataset} == {Camera(*K, "unspecified")}
    np.save(folder / "intrinsics.npy", np.eye(4))
    with pytest.raises(ValueError, match="holds no camera matrix"):
        DepthFolderDataset(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"images": "rgb"}, "rgb' does not exist"),
        ({"distance": "z"}, "distance is 'z'"),
        ({"units_per_metre": 1000}, "both given"),
        ({"metres_per_unit": 0}, "scale of depth is 0"),
        ({"margin": -1}, "margin is -1"),
        ({"points_per_image": 0}, "points_per_image is 0"),
        ({"intrinsics": [1, 2, 3]}, "four numbers"),
        ({"intrinsics": "cameras.npy"}, r"cameras\.npy cannot be read"),
        ({"intrinsics": None}, "nobody says its intrinsics"),
        ({"split": "train"}, "questions.jsonl that says"),
        ({"annotations": "none.json"}, r"none\.json does not exist"),
        ({"margin": 8, "on_error": "skip"}, "no image can be used, left out are .*no labelled pixel': 3"),
    ],
)
def test_arguments_that_make_no_sense_are_named(folder, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(folder, **arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "x"
    write_dataset(root, "solid-128", {"train": 6, "test": 3}, seed=5)
    return root


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("test", 3)])
def test_synthetic_labels_are_the_depth_of_the_renderer(world, split, count):
    dataset = DepthFolderDataset(world, split=split, points_per_image=50)
    assert len(dataset) == count and dataset.name == f"x_{split}" and dataset.skipped == {}
    for index, sample in enumerate(dataset):
        scene = make_scene("solid-128", 5, index, stream=split)
        assert sample.id == f"{split}_{index:06d}.png" and sample.camera == scene.camera
        assert np.abs(dataset.depth_map(index) - scene.depth).max() <= 0.000501
        assert len(sample.queries) == 50
        for x, y, metres in labels(sample):
            assert metres == pytest.approx(scene.depth[y, x], abs=0.000501)
        assert np.array_equal(np.asarray(sample.load_image()), scene.image)


def test_synthetic_splits_are_known(world):
    assert len(DepthFolderDataset(world)) == 9
    with pytest.raises(ValueError, match="knows no split 'val'; use one of test, train"):
        DepthFolderDataset(world, split="val")


@pytest.mark.parametrize(
    ("name", "share", "farthest", "camera"),
    [
        ("nyu", (0.67, 0.76), 8.3, (518.8579, 519.46961, 325.58245, 253.73617)),
        ("kitti", (0.18, 0.21), 85, (707.0493, 707.0493, 604.0814, 180.5066)),
    ],
)
def test_annotation_lists_of_real_cameras(shared_data, name, share, farthest, camera):
    root = shared_data / "depth_mini" / name
    dataset = DepthFolderDataset(root, annotations="test_annotations.json", distance="planar", margin=10)
    files = json.loads((root / "test_annotations.json").read_text())["files"]
    assert [sample.id for sample in dataset] == [entry["rgb"] for entry in files]
    for index, sample in enumerate(dataset):
        metres = dataset.depth_map(index)
        assert share[0] < np.mean(metres > 0) < share[1] and 0.5 * farthest < metres.max() <= farthest
        assert sample.camera == Camera(*camera, "planar") and len(sample.queries) == 100
        assert sample.load_image().size == sample.size[::-1]
        assert_labels_lie_in(dataset, index)


def test_one_image_with_its_map(shared_data):
    root = shared_data / "depth_mini" / "nyu_unidepth"
    dataset = DepthFolderDataset(root, images="rgb.png", depth="depth.png", metres_per_unit=0.001)
    assert len(dataset) == 1 and dataset[0].id == "rgb.png" and dataset.depth_map(0).max() == 10
    assert dataset[0].camera.fx == pytest.approx(518.8579)
    assert_labels_lie_in(dataset, 0)


def test_yaml_takes_numbers_and_files(folder, tmp_path):
    np.save(folder / "camera.npy", [[50, 0, 7.5], [0, 51, 5.5], [0, 0, 1]])
    for intrinsics in ("[50, 51, 7.5, 5.5]", "camera.npy"):
        (tmp_path / "part.yaml").write_text(
            "class_path: mmseg_llm.data.DepthFolderDataset\n"
            f"init_args: {{root: '{folder}', intrinsics: {intrinsics}, metres_per_unit: 0.001, margin: 2}}\n"
        )
        dataset = read_part(tmp_path / "part.yaml", "dataset", "part.yaml", SampleDataset, is_subclass=True)
        assert list(dataset) == list(read(folder, margin=2))

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slanted import PLANE, pinhole_rays, read, sun_rooms
from toy_curator import LENS, Toy

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation import curate
from mmseg_llm.data.depth.curation.base import View, is_in_split, scene_share
from mmseg_llm.data.depth.curation.sampling import draw

# drawing


def test_points_are_the_same_for_the_same_seed_and_image_and_others_otherwise():
    view, toy = Toy().view(0), Toy()

    def drawn(seed, key):
        return {tuple(point) for point in draw(view, toy, 20, seed, key)[0].tolist()}

    assert drawn(3, "a") == drawn(3, "a") and len(drawn(3, "a")) == 20
    assert drawn(3, "a") != drawn(4, "a") and drawn(3, "a") != drawn(3, "b")


def test_metres_are_turned_along_the_ray_and_ranges_are_of_the_result():
    view, toy = Toy().view(0), Toy()
    pixels, metres = draw(view, toy, 10_000, 0, "a")
    rays = pinhole_rays(pixels, *LENS)
    np.testing.assert_allclose(metres, PLANE.along_axis(rays) * np.linalg.norm(rays, axis=-1))
    assert len(pixels) == (64 - 20) * (48 - 20) == len(np.unique(pixels, axis=0))
    assert pixels.min(0).tolist() == [10, 10] and pixels.max(0).tolist() == [53, 37]
    toy.valid_range = (4.0, 4.2)
    _, fewer = draw(view, toy, 10_000, 0, "a")
    assert sorted(fewer) == sorted(metres[(metres >= 4.0) & (metres <= 4.2)]) and len(fewer) > 20


def test_a_rare_range_is_found_among_many_pixels():
    toy = Toy()
    toy.valid_range = (1.0, 2.0)
    view = Toy().view(0)
    metres = np.full(len(view.metres), 50.0)
    metres[np.flatnonzero((view.pixels == (20, 20)).all(-1))] = 1.5
    found, values = draw(View((48, 64), Camera(*LENS, "ray"), view.pixels, metres), toy, 3, 0, "a")
    assert found.tolist() == [[20, 20]] and values.tolist() == [1.5]


def test_labels_that_are_written_as_zero_or_are_no_number_are_no_labels():
    toy = Toy()
    toy.valid_range = (0.0, 10.0)
    pixels = np.array([[20, 20], [21, 20], [22, 20], [23, 20], [24, 20]])
    metres = np.array([0.004, np.nan, np.inf, -1.0, 0.006])
    assert draw(View((48, 64), Camera(*LENS, "ray"), pixels, metres), toy, 9, 0, "a")[1].tolist() == [0.006]


# distortion

numbers = partial(st.floats, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    numbers(-0.2, 0.2), numbers(-0.05, 0.05), numbers(-0.01, 0.01), numbers(-0.01, 0.01), st.integers(0, 2**31)
)  # fmt: skip
def test_undistorting_is_the_inverse_of_distorting(k1, k2, p1, p2, seed):
    camera = Camera(500.0, 510.0, 320.0, 240.0, distortion=(k1, k2, p1, p2, 0.01))
    pixels = np.random.default_rng(seed).uniform((100, 80), (540, 400), (30, 2))
    np.testing.assert_allclose(camera.project(camera.rays(pixels)), pixels, atol=1e-5)


def test_rays_of_a_distorted_image_are_longer_by_all_of_its_distortion():
    camera = Camera(100.0, 100.0, 50.0, 50.0, "planar", (-0.2, 0.0, 0.0, 0.0))
    view = View((100, 100), camera, np.array([[85, 50], [50, 50]]), np.array([4.0, 4.0]))
    pixels, metres = draw(view, Toy(), 2, 0, "a")
    (x,) = (root.real for root in np.roots([-0.2, 0, 1, -0.35]) if abs(root.imag) < 1e-9 and 0 < root.real < 1)
    found = dict(zip(map(tuple, pixels.tolist()), metres))
    assert found == {(85, 50): pytest.approx(4 * np.hypot(1, x)), (50, 50): pytest.approx(4.0)}
    assert x > 0.35


# splits


def test_no_scene_is_on_both_sides_of_a_split():
    scenes = [f"scene{number}" for number in range(2000)]
    val = {scene for scene in scenes if is_in_split(scene, "val", 0.1)}
    train = {scene for scene in scenes if is_in_split(scene, "train", 0.1)}
    assert not val & train and val | train == set(scenes) == {s for s in scenes if is_in_split(s, "all", 0.1)}
    assert 150 < len(val) < 250
    assert scene_share("scene0") == scene_share("scene0") != scene_share("scene1")


def test_the_split_of_a_dataset_is_by_scene_and_not_by_frame(tmp_path, monkeypatch):
    monkeypatch.setattr("mmseg_llm.data.depth.curation.sunrgbd.VAL_SHARE", 0.5)
    sun_rooms(tmp_path / "s")
    sides = {}
    for split in ("train", "val", "all"):
        curate("sunrgbd", tmp_path / "s", tmp_path / f"{split}.jsonl", split)
        sides[split] = {record["scene_id"] for record in read(tmp_path / f"{split}.jsonl")}
    assert sides["train"] and sides["val"] and sides["train"].isdisjoint(sides["val"])
    assert sides["train"] | sides["val"] == sides["all"] and len(sides["all"]) == 4


def test_nothing_in_the_dataset_is_changed(tmp_path):
    sun_rooms(tmp_path / "s")

    def tree():
        return {
            path: path.is_file() and (path.stat().st_mtime_ns, path.read_bytes())
            for path in (tmp_path / "s").rglob("*")
        }

    before = tree()
    curate("sunrgbd", tmp_path / "s", tmp_path / "o" / "out.jsonl", "all")
    assert tree() == before and len(read(tmp_path / "o" / "out.jsonl")) == 8
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert names == {"out.jsonl", "out.jsonl.rules.json", "out.jsonl.stats.json"}

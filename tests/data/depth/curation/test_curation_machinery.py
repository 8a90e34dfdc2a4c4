import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation
from slanted import PLANE, expected, grid, labels, picture, pinhole_rays, read

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.curation import CURATORS, curate, find_curator, run
from mmseg_llm.data.depth.curation.base import Curator, Frame, View, each_frame, is_in_split, scene_share
from mmseg_llm.data.depth.curation.lidar import camera_from_lidar, inverse, move, project, rigid, visible_points
from mmseg_llm.data.depth.curation.reading import read_numbers
from mmseg_llm.data.depth.curation.sampling import draw
from mmseg_llm.data.depth.curation.writing import Depths
from mmseg_llm.data.depth.points import Unusable
from mmseg_llm.verbs.depth_data import curate as verb

LENS = (60.0, 62.0, 30.0, 22.0)
CAMERA = Camera(*LENS, "planar")


class Toy(Curator):
    """Images 0 to 9 of a plane; those in `broken` cannot be read."""

    name, distance, valid_range = "toy", "ray", (0.005, 100.0)
    label_source, splits, split_rule = "made up", ("all",), "all"

    def __init__(self, broken=(), count=10):
        self.broken, self.count = broken, count

    def frames(self, root, split):
        for number in range(self.count):
            yield Frame(f"{number}.png", f"scene {number // 2}", partial(self.view, number), camera_name="left")

    def view(self, number):
        if number in self.broken:
            raise Unusable("it is made to fail", "made to fail")
        pixels = grid(64, 48).reshape(-1, 2)
        return View((48, 64), CAMERA, pixels, PLANE.along_axis(pinhole_rays(pixels, *LENS)))


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


# motions


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_quaternions_turn_as_scipy_says(seed):
    w, x, y, z = np.random.default_rng(seed).normal(size=4)
    motion = rigid([w, x, y, z], [1, 2, 3])
    np.testing.assert_allclose(motion[:3, :3], Rotation.from_quat([x, y, z, w]).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(inverse(motion) @ motion, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(move(motion, [[0, 0, 0]]), [[1, 2, 3]])


def test_a_quaternion_of_length_zero_is_refused():
    with pytest.raises(ValueError, match=r"quaternion \[0, 0, 0, 0\] is no rotation"):
        rigid([0, 0, 0, 0], [0, 0, 0])


def test_driving_between_sweep_and_image_moves_the_points():
    """The vehicle drives 2 m ahead and turns left by 90 degrees; a point 10 m ahead is then 8 m to its right."""
    turned = rigid([np.sqrt(0.5), 0, 0, np.sqrt(0.5)], [2, 0, 0])
    camera = rigid([0.5, -0.5, 0.5, -0.5], [0, 0, 1.5])  # X right, Y down, Z ahead; 1.5 m up
    point = np.array([[10.0, 0.0, 0.5]])
    seen = move(camera_from_lidar(np.eye(4), np.eye(4), turned, camera), point)
    np.testing.assert_allclose(seen, [[8.0, 1.0, 0.0]], atol=1e-12)
    still = move(camera_from_lidar(np.eye(4), np.eye(4), np.eye(4), camera), point)
    np.testing.assert_allclose(still, [[0.0, 1.0, 10.0]], atol=1e-12)


# occlusion


def test_what_is_behind_is_hidden_and_what_is_beside_is_not():
    pixels = np.array([[20, 20], [22, 20], [40, 20], [20, 20], [21, 20]])
    depth = np.array([5.0, 9.0, 9.0, 8.0, 5.3])
    assert visible_points(pixels, depth, (48, 64), radius=3).tolist() == [True, False, True, False, True]
    assert visible_points(pixels, depth, (48, 64), radius=1).tolist() == [True, False, True, False, True]
    assert visible_points(pixels[:2], depth[:2], (48, 64), radius=1).tolist() == [True, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4), st.floats(0, 0.5))
def test_visibility_is_what_comparing_all_pairs_says(seed, radius, tolerance):
    rng = np.random.default_rng(seed)
    pixels, depth = rng.integers(0, (20, 15), (60, 2)), rng.uniform(1, 10, 60).astype(np.float32)
    found = visible_points(pixels, depth, (15, 20), radius, tolerance)
    for place in range(60):
        apart = np.abs(pixels - pixels[place]).max(-1)
        nearest = depth[apart == 0].min()
        wanted = depth[place] == nearest and depth[place] * (1 - tolerance) <= depth[apart <= radius].min()
        assert found[place] == wanted


def test_projected_points_are_one_per_pixel_in_the_image_and_in_front():
    rays = pinhole_rays(np.array([[20, 20], [20, 20], [63, 47], [64, 20], [20.4, 30.4]]), *LENS)
    points = np.concatenate((rays * [[4], [7], [5], [5], [6]], -rays))
    pixels, metres = project(points, CAMERA, (48, 64), "planar", radius=0)
    assert sorted(map(tuple, pixels.tolist())) == [(20, 20), (20, 30), (63, 47)]
    assert sorted(metres) == [4, 5, 6]
    _, along = project(points[:1], CAMERA, (48, 64), "ray")
    assert along == pytest.approx(4 * np.linalg.norm(rays[0]))


# splits


def test_no_scene_is_on_both_sides_of_a_split():
    scenes = [f"scene{number}" for number in range(2000)]
    val = {scene for scene in scenes if is_in_split(scene, "val", 0.1)}
    train = {scene for scene in scenes if is_in_split(scene, "train", 0.1)}
    assert not val & train and val | train == set(scenes) == {s for s in scenes if is_in_split(s, "all", 0.1)}
    assert 150 < len(val) < 250
    assert scene_share("scene0") == scene_share("scene0") != scene_share("scene1")


def sun_rooms(root, count=8):
    for number in range(count):
        folder = root / "xtion" / "sun3ddata" / f"room{number % 4}" / f"frame{number}"
        picture(folder / "image" / "0.jpg")
        (folder / "intrinsics.txt").write_text("60 0 30 0 62 22 0 0 1")
        (folder / "depth_bfx").mkdir()
        Image.fromarray(np.full((48, 64), 2000 << 3, np.uint16)).save(folder / "depth_bfx" / "0.png")


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


# runs


def test_records_say_all_there_is_to_say(tmp_path):
    stats = run.curate(Toy(), tmp_path, tmp_path / "out.jsonl", "all", points_per_image=30)
    record = read(tmp_path / "out.jsonl")[3]
    np.testing.assert_allclose(labels(record)[1], expected(record))
    del record["pixel_coords"], record["depth"]
    assert record == {
        "image": "3.png",
        "intrinsics": [*LENS, 64, 48],
        "distance_type": "euclidean",
        "dataset": "toy",
        "scene_id": "scene 1",
        "camera": "left",
        "valid_range": [0.005, 100.0],
        "label_source": "made up",
    }
    assert (stats["frames"], stats["scenes"], stats["points"], stats["seed"]) == (10, 5, 300, 0)


def test_a_run_that_was_stopped_is_gone_on_with(tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run.curate(Toy([4]), tmp_path, whole, "all")
    run.curate(Toy([4], 6), tmp_path, part, "all")
    content = part.read_bytes()
    part.write_bytes(content[:-300])  # stopped within a line
    stats = run.curate(Toy([4]), tmp_path, part, "all")
    assert part.read_bytes() == whole.read_bytes() and stats["frames_before"] == 4
    beside = [Path(f"{path}.stats.json").read_bytes() for path in (whole, part)]
    assert beside[0] == beside[1] and json.loads(beside[0])["skipped"] == {"made to fail": 1}
    again = run.curate(Toy([4]), tmp_path, part, "all")
    assert again["frames_before"] == again["frames"] == 9 and part.read_bytes() == whole.read_bytes()


def test_a_file_of_other_rules_is_left_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, output, "all")
    content = output.read_bytes()
    with pytest.raises(
        ValueError, match=r"begun with other rules: seed was 0 and is 1 now; give another output, or delete"
    ):
        run.curate(Toy(), tmp_path, output, "all", seed=1)
    (tmp_path / "out.jsonl.rules.json").unlink()
    with pytest.raises(ValueError, match="nothing says how it was made"):
        run.curate(Toy(), tmp_path, output, "all")
    assert output.read_bytes() == content


def test_a_damaged_output_is_named_with_its_line(tmp_path):
    output = tmp_path / "out.jsonl"
    run.curate(Toy(), tmp_path, output, "all")
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: depth record lacks the field 'image'; .*delete"):
        run.curate(Toy(), tmp_path, output, "all")


def test_a_failing_frame_is_counted_or_raised(tmp_path):
    stats = run.curate(Toy([0, 7]), tmp_path, tmp_path / "a.jsonl", "all")
    assert stats["skipped"] == {"made to fail": 2} and stats["frames"] == 8
    with pytest.raises(
        ValueError, match=r"^toy, frame 0\.png: it is made to fail; mend the file or pass on_error='skip'"
    ):
        run.curate(Toy([0]), tmp_path, tmp_path / "b.jsonl", "all", on_error="raise")


def test_a_scene_that_cannot_be_listed_is_one_failing_frame():
    def frames():
        yield Frame("a", "s", Toy().view)
        raise KeyError("samples")

    (frame,) = each_frame("s", frames)
    with pytest.raises(Unusable, match="the scene cannot be read") as caught:
        frame.view()
    assert caught.value.reason == "unreadable scene"


def test_frames_with_too_few_labels_are_counted(tmp_path):
    toy = Toy(count=2)
    toy.min_points = 2000
    stats = run.curate(toy, tmp_path, tmp_path / "out.jsonl", "all", points_per_image=5)
    assert stats["skipped"] == {"too few labels": 2} and stats["points"] == 0 and stats["depth"] == {}


def test_bad_arguments_are_one_sentence(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="there is no curator 'kitti'; use one of argoverse2, ddad"):
        curate("kitti", tmp_path, output)
    with pytest.raises(ValueError, match="ibims1 has no split 'train'; use test"):
        curate("ibims1", tmp_path, output)
    with pytest.raises(ValueError, match="is no folder; give the folder of sunrgbd"):
        curate("sunrgbd", tmp_path / "none", output)
    with pytest.raises(ValueError, match="holds no frame of the split 'train' of sunrgbd"):
        curate("sunrgbd", tmp_path, output)
    with pytest.raises(ValueError, match="points_per_image is 0"):
        curate("sunrgbd", tmp_path, output, points_per_image=0)
    with pytest.raises(ValueError, match="on_error is 'stop'"):
        curate("sunrgbd", tmp_path, output, on_error="stop")
    assert not output.exists()


def test_every_curator_can_be_made_and_says_what_it_writes():
    for name in CURATORS:
        curator = find_curator(name)
        assert curator.name == name and curator.splits and json.dumps(curator.rules())
        assert (curator.distance == "planar") == (name in {"nuscenes", "ddad", "ibims1"})  # specification H


def test_quantiles_need_no_list_of_all_metres():
    depths, values = Depths(), np.random.default_rng(0).lognormal(1, 1, 20_000)
    for part in np.split(values, 100):
        depths.add(tuple(part))
    summary = depths.summary()
    for share in (0.01, 0.25, 0.5, 0.99):
        assert summary[f"{share:g}"] == pytest.approx(np.quantile(values, share), rel=0.01)
    assert (summary["min"], summary["max"], depths.count) == (values.min(), values.max(), 20_000)


def test_a_calibration_of_other_numbers_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1, 2; 3\n4")
    assert read_numbers(path, 4) == [1, 2, 3, 4]
    with pytest.raises(Unusable, match="holds 4 numbers, not 9; download it again"):
        read_numbers(path, 9)
    path.write_text("fx 4")
    with pytest.raises(Unusable, match="holds more than numbers"):
        read_numbers(path, 4)


def test_the_verb_prints_a_short_report(tmp_path, capsys):
    sun_rooms(tmp_path / "s", 1)
    picture(tmp_path / "s" / "kv2" / "b" / "image" / "0.jpg")
    (tmp_path / "s" / "kv2" / "b" / "intrinsics.txt").write_text("60 0 30 0 62 22 0 0 1")
    output = tmp_path / "out.jsonl"
    verb(dataset="sunrgbd", root=tmp_path / "s", output=output, split="all", points=9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{output}: 1 frames (0 of them before) of 1 scenes, 9 points, ray metres from 2.0")
    assert lines[1:] == ["skipped: 1 missing depth", f"images are relative to {tmp_path / 's'}"]

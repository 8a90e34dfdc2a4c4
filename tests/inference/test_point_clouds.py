"""Clouds against the formulas of specification G.5, and files that other programs can read."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from depth_fakes import CAMERA, SIZE, PlaneWorld, noise

from mmseg_llm.cameras import Camera
from mmseg_llm.inference.cloud_view import page
from mmseg_llm.inference.perceiver import Perceiver
from mmseg_llm.inference.point_clouds import PointCloud

SLANTED = (0.12, 0.2, 0.3)


def cloud_of(world, **options):
    return Perceiver(world).point_cloud(noise(), CAMERA, **{"grid": (12, 16)} | options)


def placed(world, points):
    """Points in space: the pinhole formula with nothing but the intrinsics."""
    z = world.planar(CAMERA, points)
    x, y = (points[..., 0] - CAMERA.cx) / CAMERA.fx * z, (points[..., 1] - CAMERA.cy) / CAMERA.fy * z
    return np.stack((x, y, z), -1).reshape(-1, 3)


def read_ply(data):
    """A reader that knows the format, not the writer."""
    header, _, body = data.partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii").splitlines() if not line.startswith("comment")]
    assert lines[:2] == [["ply"], ["format", "binary_little_endian", "1.0"]] and lines[2][:2] == ["element", "vertex"]
    kinds = {"float": "<f4", "uchar": "u1"}
    dtype = np.dtype([(name, kinds[kind]) for _, kind, name in lines[3:]])
    assert len(body) == int(lines[2][2]) * dtype.itemsize
    return np.frombuffer(body, dtype)


@pytest.mark.parametrize("distance", ["ray", "planar"])
def test_points_are_where_they_are_in_space(distance):
    world = PlaneWorld(distance, SLANTED, lambda x, y: "no_number" if x < 8 else None)
    cloud = cloud_of(world)
    grid = Perceiver(world).depth_map(noise(), CAMERA, grid=(12, 16)).points[:, 1:]
    assert len(cloud) == 12 * 15 and cloud.failures == {"no_number": 12} and cloud.distance == distance
    assert cloud.points == pytest.approx(placed(world, grid), rel=1e-5)
    assert cloud.points @ SLANTED == pytest.approx(1, rel=1e-5)  # one plane
    assert cloud.spacing == pytest.approx(8)
    at = np.rint(grid.reshape(-1, 2)).astype(int)
    assert np.array_equal(cloud.colours, np.asarray(noise())[at[:, 1], at[:, 0]])


def test_dense_clouds_have_a_point_for_every_pixel():
    world = PlaneWorld("ray", SLANTED)
    cloud = cloud_of(world, dense=True)
    assert len(cloud) == SIZE[0] * SIZE[1] and cloud.spacing == 1
    assert cloud.points @ SLANTED == pytest.approx(1, abs=5e-3)
    assert np.array_equal(cloud.colours, np.asarray(noise()).reshape(-1, 3))


def test_axes_are_right_down_forward():
    """The upper left of an image is left of and above the camera's axis."""
    first = cloud_of(PlaneWorld()).points[0]
    assert first[0] < 0 and first[1] < 0 and first[2] == pytest.approx(4)


def test_unspecified_metres_make_no_cloud():
    with pytest.raises(ValueError, match="no place in space"):
        cloud_of(PlaneWorld("unspecified"))
    assert len(cloud_of(PlaneWorld("unspecified"), distance="ray")) == 192


def test_a_map_without_image_has_no_colours():
    depth = replace(Perceiver(PlaneWorld()).depth_map(noise(), CAMERA, grid=(4, 4)), image=None)
    with pytest.raises(ValueError, match="no image to take colours from"):
        PointCloud.of(depth)


def test_ply_can_be_read_back(tmp_path):
    cloud = cloud_of(PlaneWorld("ray", SLANTED))
    vertices = read_ply(cloud.save(tmp_path / "new" / "a.ply").read_bytes())
    assert np.array_equal(np.stack([vertices[axis] for axis in "xyz"], -1), cloud.points)
    assert np.array_equal(np.stack([vertices[c] for c in ("red", "green", "blue")], -1), cloud.colours)


def test_ply_of_other_readers(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    cloud = cloud_of(PlaneWorld())
    vertices = plyfile.PlyData.read(cloud.save(tmp_path / "a.ply"))["vertex"]
    assert np.array_equal(vertices["z"], cloud.points[:, 2]) and np.array_equal(vertices["red"], cloud.colours[:, 0])


def test_npz_and_other_suffixes(tmp_path):
    cloud = cloud_of(PlaneWorld("planar"))
    content = np.load(cloud.save(tmp_path / "a.npz"), allow_pickle=False)
    assert np.array_equal(content["points"], cloud.points) and np.array_equal(content["colours"], cloud.colours)
    about = json.loads(str(content["about"]))
    assert Camera.from_json(about["camera"]) == CAMERA and about["distance"] == "planar" and about["failures"] == {}
    with pytest.raises(ValueError, match=r"'.obj'; use .ply"):
        cloud.save(tmp_path / "a.obj")


def content_of(text):
    return json.loads(re.search(r"^const content = (.*);$", text, re.MULTILINE)[1])


def test_page_holds_the_cloud_and_needs_nothing_else(tmp_path):
    cloud = replace(cloud_of(PlaneWorld("ray", SLANTED, lambda x, y: "no_unit" if x < 8 else None)), name="<b>&.png")
    text = cloud.save(tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(|@[A-Z]+@", text)
    content = content_of(text)
    points = np.frombuffer(base64.b64decode(content["points"]), "<f4").reshape(-1, 3)
    assert np.array_equal(points, cloud.points) and content["count"] == len(cloud)
    colours = np.frombuffer(base64.b64decode(content["colours"]), np.uint8).reshape(-1, 3)
    assert np.array_equal(colours, cloud.colours)
    assert len(base64.b64decode(content["shades"])) == 3 * len(cloud)
    assert "<b>&" not in text and text.count("&lt;b&gt;&amp;.png") == 2
    assert "180 points" in text and "12 without an answer (no_unit 12)" in text and "intrinsics as given" in text


def test_large_clouds_are_thinned_and_it_is_said():
    text = page(cloud_of(PlaneWorld(), dense=True), most_points=4000)
    assert "3,072 of 12,288 points" in text
    assert content_of(text)["count"] == 3072 and content_of(text)["spacing"] == pytest.approx(2)


def test_thinned_clouds_have_no_pattern():
    """Neighbours are everywhere as far apart: no seams, no threads."""
    cloud = cloud_of(PlaneWorld("planar"), dense=True)
    content = content_of(page(cloud, most_points=4000))
    points = np.frombuffer(base64.b64decode(content["points"]), "<f4").reshape(-1, 3)
    pixels = np.rint(CAMERA.project(points)).astype(int)
    for axis in (0, 1):
        assert (np.diff(np.unique(pixels[:, axis])) == 2).all()
    by_chance = content_of(page(replace(cloud, cells=None), most_points=3000))
    assert by_chance["count"] == 3000
    assert by_chance == content_of(page(replace(cloud, cells=None), most_points=3000))
    pixels = CAMERA.project(np.frombuffer(base64.b64decode(by_chance["points"]), "<f4").reshape(-1, 3))
    counts = np.histogram2d(*pixels.T, bins=(4, 3))[0]
    assert counts.min() > 180 and len(np.unique(np.rint(pixels[:, 0]))) == SIZE[1]


def test_clouds_in_few_rows_of_a_map_are_thinned_too():
    cloud = cloud_of(PlaneWorld("planar"), dense=True)
    row = cloud.cells[:, 0] == 0
    strip = replace(cloud, points=cloud.points[row], colours=cloud.colours[row], cells=cloud.cells[row])
    assert content_of(page(strip, most_points=60))["count"] == 60


def test_points_that_are_interpolated_are_no_answers(tmp_path):
    cloud = cloud_of(PlaneWorld(), dense=True)
    said = "interpolated from 192 answers (12x16)"
    assert cloud.source == cloud.about()["source"] == said and f"12,288 points, {said}" in page(cloud)
    assert f"comment {said}\n".encode() in cloud.to_ply() and len(read_ply(cloud.to_ply())) == 12288
    assert "interpolated" not in page(cloud_of(PlaneWorld())) and b"interpolated" not in cloud_of(PlaneWorld()).to_ply()


def test_dense_clouds_of_large_images_are_bounded():
    cloud = cloud_of(PlaneWorld("ray", SLANTED), dense=True, max_pixels=3072)
    assert len(cloud) == 3072 and cloud.spacing == pytest.approx(2)
    assert cloud.points @ SLANTED == pytest.approx(1, abs=5e-3)


def test_metres_without_a_place_are_counted():
    camera = replace(CAMERA, distortion=(-0.9, 0.0, 0.0, 0.0))
    cloud = PointCloud.of(
        replace(Perceiver(PlaneWorld("planar")).depth_map(noise(), CAMERA, grid=(12, 16)), camera=camera)
    )
    assert np.isfinite(cloud.points).all() and 0 < cloud.num_unplaced < 192 and len(cloud) == 192 - cloud.num_unplaced
    assert f"{cloud.num_unplaced} left out, as the camera sees no ray there" in page(cloud)
    assert cloud.about()["num_unplaced"] == cloud.num_unplaced and len(cloud.colours) == len(cloud.cells) == len(cloud)


def test_assumed_intrinsics_are_told_on_the_page():
    assert "intrinsics are an assumption" in page(Perceiver(PlaneWorld()).point_cloud(noise(), grid=(4, 4)))


def test_an_empty_cloud_is_no_page(tmp_path):
    cloud = cloud_of(PlaneWorld(fails=lambda x, y: "no_number"))
    assert len(read_ply(cloud.to_ply())) == 0
    with pytest.raises(ValueError, match=r"no points to look at \(no_number 192\)"):
        cloud.save(tmp_path / "a.html")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_is_valid(tmp_path):
    script = re.search(r"<script>(.*)</script>", page(cloud_of(PlaneWorld())), re.DOTALL)[1]
    (tmp_path / "a.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "a.js"], check=True, capture_output=True)


BROWSER = """
const rects = %s, nothing = () => {};
const made = id => ({ addEventListener: nothing, append: nothing, style: {}, parentElement: { firstChild: {} }, clientWidth: %d,
  clientHeight: %d, getContext: () => null, getBoundingClientRect: () => rects[id] });
const document = { getElementById: made, createElement: made }, window = { addEventListener: nothing };
"""
PROJECTION = """
const { clip } = matrices(canvas.clientWidth / canvas.clientHeight);
const row = (i, p) => clip[i] * p[0] + clip[4 + i] * p[1] + clip[8 + i] * p[2] + clip[12 + i];
console.log(JSON.stringify(Array.from({ length: content.count }, (_, i) => points.slice(3 * i, 3 * i + 3)).map(p => {
  const w = row(3, p);
  return [(row(0, p) / w + 1) / 2 * canvas.clientWidth, (1 - row(1, p) / w) / 2 * canvas.clientHeight, w];
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1000, 600), (500, 900)])
@pytest.mark.parametrize("slope", [SLANTED, (0.0, 0.0, 0.05), (0.0, 0.5, 0.2)])
def test_the_first_look_shows_the_whole_cloud_beside_the_panels(tmp_path, width, height, slope):
    script = re.search(r"<script>(.*)</script>", page(cloud_of(PlaneWorld("planar", slope))), re.DOTALL)[1]
    left, top = (width - 252, 14) if width > 640 else (width - 252, 213)
    panels = {
        "about": (14, 14, 364, 205),
        "tools": (left, top, width - 14, top + 127),
        "help": (14, height - 54, 504, height - 14),
    }
    rects = {name: dict(zip(("left", "top", "right", "bottom"), edges, strict=True)) for name, edges in panels.items()}
    (tmp_path / "a.js").write_text(BROWSER % (json.dumps(rects), width, height) + script + PROJECTION)
    done = subprocess.run(["node", tmp_path / "a.js"], check=True, capture_output=True, text=True)
    x, y, w = np.array(json.loads(done.stdout)).T
    assert len(x) == 192 and (w > 0).all() and x.min() > 0 and x.max() < width and y.min() > 0 and y.max() < height
    for x1, y1, x2, y2 in panels.values():
        assert not ((x > x1) & (x < x2) & (y > y1) & (y < y2)).any()
    assert max(np.ptp(x) / width, np.ptp(y) / height) > 0.4  # and not from afar

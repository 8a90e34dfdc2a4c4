"""Cameras: rays, conversions, points in space, and what is assumed where nothing is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.cameras import Camera, assume_camera, exif_camera, find_camera

focals = st.floats(50, 2000)
centres = st.floats(-50, 700)
metres = st.floats(0.01, 100)
lenses = st.sampled_from([(), (-0.2, 0.04, 0.001, -0.002), (0.1, -0.05, 0.0, 0.0, 0.01)])


@st.composite
def cameras(draw):
    return Camera(draw(focals), draw(focals), draw(centres), draw(centres), "ray")


@settings(max_examples=80, deadline=None)
@given(cameras(), st.lists(st.tuples(centres, centres, metres), min_size=1, max_size=5))
def test_conversions_are_inverse_and_points_project_back(camera, rows):
    points, depth = np.array(rows)[:, :2], np.array(rows)[:, 2]
    ray = camera.convert(depth, points, "planar", "ray")
    assert (ray >= depth - 1e-9).all()
    assert np.allclose(camera.convert(ray, points, "ray", "planar"), depth)
    assert np.array_equal(camera.convert(depth, points, "unspecified", "ray"), depth)
    assert np.array_equal(camera.convert(depth, points, "planar", "unspecified"), depth)
    planar_places, ray_places = camera.place(points, depth, "planar"), camera.place(points, ray, "ray")
    assert np.allclose(planar_places[:, 2], depth) and np.allclose(planar_places, ray_places)
    assert np.allclose(np.linalg.norm(ray_places, axis=1), ray)
    assert np.allclose(camera.project(planar_places), points, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(lenses, st.floats(0, 639), st.floats(0, 479), metres)
def test_distortion_is_undone_exactly(lens, x, y, depth):
    camera = Camera(600.0, 590.0, 322.0, 238.0, distortion=lens)
    point = np.array([[x, y]])
    place = camera.place(point, depth, "planar")
    assert np.abs(camera.project(place) - point).max() < 1e-6
    assert place[0, 2] == pytest.approx(depth)
    if lens and math.hypot(x - 322, y - 238) > 100:
        assert np.abs(camera.pinhole.project(place) - point).max() > 0.05
    assert camera.rays(np.zeros((0, 2))).shape == (0, 3) and camera.project(np.zeros((0, 3))).shape == (0, 2)


def test_known_factor_of_ibims():
    """Euclidean by planar metres, from the specification: mean 1.075 over the sample points; here one by hand."""
    camera = Camera(559.62, 558.14, 361.87, 241.99)
    factor = camera.stretch_of(np.array([519.0, 129.0]))
    assert factor == pytest.approx(math.sqrt(1 + (157.13 / 559.62) ** 2 + (112.99 / 558.14) ** 2), rel=1e-9)


def test_scaled_camera_sees_the_same_rays():
    camera = Camera(500.0, 510.0, 300.0, 200.0)
    small = camera.scaled((0.5, 0.25), (3.0, -2.0))
    points = np.array([[10.0, 20.0], [400.0, 300.0]])
    moved = (points + 0.5) * (0.5, 0.25) + (3.0, -2.0) - 0.5
    assert np.allclose(small.rays(moved), camera.rays(points))


def test_refusals_and_json():
    for name, value in (("fx", 0.0), ("fy", float("nan")), ("fx", -3.0), ("cy", float("inf"))):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Camera(**{"fx": 1.0, "fy": 1.0, "cx": 0.0, "cy": 0.0} | {name: value})
    with pytest.raises(ValueError, match="no place in space"):
        Camera(1, 1, 0, 0).place(np.zeros((1, 2)), 1.0, "unspecified")
    with pytest.raises(ValueError, match="field of view"):
        assume_camera((10, 10), 180)
    camera = Camera(*np.float32([50.5, 51, 3, 4]), "ray", tuple(np.float32([0.5, 0.25, 0, 0])), "exif")
    assert Camera.from_json(json.loads(json.dumps(camera.to_json()))) == camera


def test_assumed_cameras():
    camera = assume_camera((300, 400), 90)
    assert (camera.fx, camera.fy) == pytest.approx((200, 200)) and camera.origin == "assumed"
    assert (camera.cx, camera.cy) == (199.5, 149.5)
    image = Image.new("RGB", (400, 300))
    assert find_camera(image).origin == "assumed"
    given_camera = Camera(1.0, 1.0, 0.0, 0.0)
    assert find_camera(image, given_camera) is given_camera


def test_exif_focal_length(tmp_path):
    """27 mm on a 3:2 full frame: the diagonal of 43.27 mm is that of the picture."""
    image = Image.new("RGB", (600, 400))
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 27
    image.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as stored:
        camera = find_camera(stored)
        assert camera.origin == "exif" and camera.fx == pytest.approx(27 / 36 * 600)
        assert find_camera(stored, fov=50).origin == "assumed"
    assert exif_camera(image) is None
    exif.get_ifd(0x8769)[0xA405] = 0
    image.save(tmp_path / "b.jpg", exif=exif)
    with Image.open(tmp_path / "b.jpg") as stored:
        assert exif_camera(stored) is None

"""Points of an image through Perceiver: which camera, which head, and nothing lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from depth_fakes import CAMERA, SIZE, PlaneWorld, noise
from PIL import Image

from mmseg_llm import Camera
from mmseg_llm.geometry import upright
from mmseg_llm.inference.depth_queries import describe_camera, describe_failures, failures_of, open_view
from mmseg_llm.inference.perceiver import Perceiver

POINTS = [(10, 20), (127, 95), (200, 20), (0, 0), (-3, 5)]


def photograph(path, millimetres=None, orientation=1):
    image = noise((60, 90))
    exif = image.getexif()
    exif[0x0112] = orientation
    if millimetres is not None:
        exif.get_ifd(0x8769)[0xA405] = millimetres
    image.save(path, exif=exif)
    return path


def test_points_are_answered_in_order_and_none_is_dropped():
    world = PlaneWorld(slope=(0.1, 0.2, 0.3))
    found = Perceiver(world).predict(noise(), points=POINTS, camera=CAMERA)
    expected = world.ray(CAMERA, np.array(POINTS[:2], float))
    assert [item.depth for item in found[:2]] == pytest.approx(list(expected))
    assert [item.measurement.reason for item in found] == ["", "", "outside_image", "", "outside_image"]
    assert [item.measurement.points[0] for item in found] == POINTS
    assert failures_of(found) == {"outside_image": 2}
    assert world.calls == [("depth_text", "generate", [len(POINTS)])]


def test_protocol_and_head_can_be_chosen():
    world = PlaneWorld()
    Perceiver(world).predict(noise(), points=[(1, 1)], head="depth_text", protocol="other")
    assert world.calls == [("depth_text", "other", [1])]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(mode):
    image = Image.new("I;16", (20, 20)) if mode == "I;16" else noise((20, 20)).convert(mode)
    assert Perceiver(PlaneWorld()).predict(image, points=[(5, 5)])[0].depth is not None


def test_where_the_camera_comes_from_is_told(tmp_path):
    plain, known = photograph(tmp_path / "plain.jpg"), photograph(tmp_path / "known.jpg", 28)
    ask = Perceiver(PlaneWorld()).predict

    def origin(image, **options):
        camera = ask(image, points=[(1, 1)], **options)[0].measurement.camera
        return camera.origin, camera.fx

    assert origin(plain, camera=CAMERA) == ("given", 100.0)
    assert origin(plain) == ("assumed", pytest.approx(45 / np.tan(np.radians(30))))
    assert origin(plain, fov=90) == ("assumed", pytest.approx(45))
    assert origin(known, fov=90) == ("assumed", pytest.approx(45))
    exif = ("exif", pytest.approx(28 * np.hypot(60, 90) / np.hypot(36, 24)))
    assert origin(known) == exif
    with Image.open(known) as opened:
        assert origin(opened) == exif


def test_intrinsics_of_a_numpy_matrix_can_be_written():
    matrix = np.array([[100, 0, 61], [0, 110, 40], [0, 0, 1]], np.float32)
    camera = Camera(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])
    json.dumps(Perceiver(PlaneWorld()).predict(noise(), points=[(1, 1)], camera=camera)[0].to_json())


def test_points_are_of_stored_pixels(tmp_path):
    """A photograph that its EXIF data turn stays as it is stored, and so does its camera."""
    view = open_view(photograph(tmp_path / "turned.jpg", 28, orientation=6))
    assert view.orientation == 6 and open_view(photograph(tmp_path / "plain.jpg")).orientation == 1
    assert view.size == (60, 90) and (view.camera.cx, view.camera.cy) == (44.5, 29.5) and view.name == "turned.jpg"


def test_a_photograph_can_be_turned_first(tmp_path):
    """Upright as the model should see it; the focal length in its EXIF data stays."""
    with Image.open(photograph(tmp_path / "turned.jpg", 28, orientation=6)) as image:
        view, stored = open_view(upright(image)), open_view(image)
    assert view.size == (90, 60) and view.orientation == 1 and view.camera.origin == "exif"
    assert (view.camera.fx, view.camera.cx) == (stored.camera.fx, 29.5)


def test_cameras_and_failures_in_words():
    assert describe_camera(CAMERA, SIZE).startswith(
        "intrinsics as given: fx 100.0, fy 110.0, cx 61.0, cy 40.0 px (65 deg"
    )
    assumed = describe_camera(open_view(noise()).camera, SIZE)
    assert "an assumption" in assumed and "(60 degrees)" in assumed and "give a camera" in assumed
    tall = open_view(noise((128, 96)), fov=80).camera
    assert "(80 degrees)" in describe_camera(tall, (128, 96))
    assert describe_failures({"no_number": 3, "outside_image": 1}) == "no_number 3, outside_image 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either queries"),
        ({"queries": "a", "points": [(1, 1)]}, "either queries"),
        ({"points": []}, "one or more pairs"),
        ({"points": [(1, 2, 3)]}, "one or more pairs"),
        ({"points": [(1, float("nan"))]}, "finite"),
        ({"points": [(1, 1)], "camera": CAMERA, "fov": 60}, "both a camera and a field of view"),
        ({"points": [(1, 1)], "fov": 180}, "fits no pinhole camera"),
        ({"points": [(1, 1)], "start": []}, "start masks are for queries"),
        ({"queries": "a", "camera": CAMERA}, "is for points"),
        (
            {"points": [(1, 1)], "head": "mask_decoder"},
            "'mask_decoder' is none that measures depth; use head 'depth_text'",
        ),
        ({"points": [(1, 1)], "head": "nothing"}, "no head 'nothing'"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Perceiver(PlaneWorld()).predict(noise(), **options)


def test_a_model_without_depth_head_says_so():
    with pytest.raises(
        ValueError, match="no head that measures depth; it has mask_decoder; take a model with a depth_text"
    ):
        Perceiver(PlaneWorld(distance=None)).predict(noise(), points=[(1, 1)])


def test_broken_images_are_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded"):
        Perceiver(PlaneWorld()).predict(path, points=[(1, 1)])

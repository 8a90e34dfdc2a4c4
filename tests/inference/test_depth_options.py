"""Options of `predict --task depth` as text and as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmseg_llm.cameras import Camera
from mmseg_llm.inference.depth_options import DepthRequest, parse_grid, parse_points, read_cameras, read_request

FOUR = {"fx": 1, "fy": 2, "cx": 3, "cy": 4}


def cameras(tmp_path, content):
    path = tmp_path / "camera.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_cameras(str(path))


def test_options_as_text():
    assert parse_points(" 120,80; 40.5,-6 ;") == [(120, 80), (40.5, -6)] and parse_grid("48X64") == (48, 64)
    assert read_request(None, points=["1,2;3,4", "5,6"]).points == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FOUR | {"distance": "ray"}, Camera(1, 2, 3, 4, "ray")),
        (FOUR | {"width": 640, "height": 480}, Camera(1, 2, 3, 4)),
        ([1, 2, 3, 4], Camera(1, 2, 3, 4)),
        ({"a.png": [1, 2, 3, 4], "b.png": FOUR}, {"a.png": Camera(1, 2, 3, 4), "b.png": Camera(1, 2, 3, 4)}),
        (
            {"distance": "ray", "metres_per_unit": 0.001, "images": {"a.png": FOUR}},
            {"a.png": Camera(1, 2, 3, 4, "ray")},
        ),
        ({"images": {"a.png": [1, 2, 3, 4]}}, {"a.png": Camera(1, 2, 3, 4)}),
        (FOUR | {"distortion": [0.1, 0, 0, 0]}, Camera(1, 2, 3, 4, distortion=(0.1, 0, 0, 0))),
    ],
)
def test_camera_files(tmp_path, content, expected):
    assert cameras(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds no camera; write"),
        ("{", r"holds no camera \(Expecting"),
        ("{}", "holds no camera; write"),
        ("3", "holds no camera; write"),
        (FOUR | {"focal": 2}, r"holds no camera \(got an unexpected keyword argument 'focal'\)"),
        ({"fx": 1}, "missing 3 required"),
        ({"a.png": 3}, "holds no camera of 'a.png'; write"),
        ([1, 2, 3, None], "holds no camera"),
        ([1, 2, 3, "x"], "could not convert"),
        ({"a.png": FOUR | {"fx": -1}}, r"a camera of 'a.png' that cannot be: fx is -1\.0"),
        (FOUR | {"distortion": [0.1]}, r"cannot be: distortion is"),
        (FOUR | {"origin": "foo"}, "cannot be: origin is 'foo'"),
        ({"distance": "up", "images": {"a.png": FOUR}}, "distance is 'up'"),
    ],
)
def test_what_is_no_camera_file_is_said(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        cameras(tmp_path, content)
    assert "camera.json" in str(caught.value)


def test_cameras_are_found_by_name_or_end_of_the_path():
    own, other = Camera(1, 1, 1, 1), Camera(2, 2, 2, 2)
    request = DepthRequest(camera={"a.png": own, "left/b.png": other, "b.png": own})
    assert request.camera_of(Path("x/a.png")) == own
    assert request.camera_of(Path("x/left/b.png")) == other and request.camera_of(Path("x/right/b.png")) == own
    with pytest.raises(ValueError, match=r"no camera of c\.png"):
        request.camera_of(Path("c.png"))
    assert DepthRequest(camera=own).camera_of(Path("c.png")) == own and DepthRequest().camera_of(Path("c.png")) is None

"""What readers of depth share: paths that stay inside, drawing, and cameras."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmseg_llm.cameras import Camera
from mmseg_llm.data.depth.points import Span, Unusable, draw, is_inside, is_plausible_focal, make_camera


@pytest.mark.parametrize("name", ["a.png", "rgb/a.png", "a..b/c.png", "rgb/./a.png", "..a.png"])
def test_names_inside(name):
    assert is_inside(name)


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/../../b", "/etc/passwd", "C:\\a", "a\\..\\..\\b", "\\\\host\\a", "a\0b"]
)
def test_names_that_lead_out(name):
    assert not is_inside(name)


@given(
    count=st.integers(0, 200), wanted=st.none() | st.integers(1, 250), seed=st.integers(0, 9), index=st.integers(0, 9)
)
def test_drawn_points_are_distinct_and_repeatable(count, wanted, seed, index):
    drawn = draw(count, wanted, seed, index)
    assert len(drawn) == min(count, wanted or count) == len(set(drawn.tolist()))
    assert set(drawn.tolist()) <= set(range(count))
    assert np.array_equal(drawn, draw(count, wanted, seed, index))


def test_a_camera_is_mended_only_from_one_good_focal_length():
    assert make_camera([5, 6, 1, 2], "planar", [0.1, 0, 0, 0]) == (Camera(5, 6, 1, 2, "planar", (0.1, 0, 0, 0)), False)
    assert make_camera([0, 6, 1, 2], "ray") == (Camera(6, 6, 1, 2, "ray"), True)
    for intrinsics, reason in (
        ([0, float("inf"), 1, 2], "bad focal length"),
        ([5, 6, float("nan"), 2], "malformed intrinsics"),
        ([5, "six", 1, 2], "malformed intrinsics"),
        ([5, 6, 1], "malformed intrinsics"),
    ):
        with pytest.raises(Unusable) as error:
            make_camera(intrinsics, "planar")
        assert error.value.reason == reason


def test_a_span_holds_labels():
    assert Span.of(0, None) == (0, np.inf) and Span.of(0.5, 2) == (0.5, 2)
    for near, far in ((-1, 2), (2, 2), (float("nan"), 2), (0, float("nan"))):
        with pytest.raises(ValueError, match="hold no labels"):
            Span.of(near, far)


@pytest.mark.parametrize("size", [(480, 640), (640, 480)])
def test_focal_lengths_see_at_most_170_degrees_of_the_longer_side(size):
    for degrees, is_good in ((60, True), (169, True), (171, False)):
        focal = 320 / np.tan(np.radians(degrees / 2))
        assert is_plausible_focal(focal, size) == is_good
    assert not any(is_plausible_focal(focal, size) for focal in (0.9, 0.0, -500.0, float("nan"), float("inf")))


def test_a_focal_length_that_is_no_pixels_is_bad():
    assert make_camera([0.9, 500, 1, 2], "ray", size=(480, 640)) == (Camera(500, 500, 1, 2, "ray"), True)
    with pytest.raises(
        Unusable, match=r"0\.9 and 1\.2, with which an image of 640x480 sees more than 170 degrees"
    ) as error:
        make_camera([0.9, 1.2, 0.5, 0.5], "ray", size=(480, 640))
    assert error.value.reason == "bad focal length"

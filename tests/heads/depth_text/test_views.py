"""Pictures at the unified focal length: where points fall, what is padded, cropped, squeezed and shrunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.backbones.image_geometry import ImageGeometry
from mmseg_llm.cameras import Camera
from mmseg_llm.heads.depth_text.marker import draw_marker, draw_markers, fits, snap
from mmseg_llm.heads.depth_text.views import Augmentation, Change, UnviewableError, make_view, unified_size, unify

LARGE = ImageGeometry((28, 28), 14, 2, min_pixels=28 * 28, max_pixels=2800 * 2800)
FIXED = ImageGeometry((96, 96), 8, 2)


def picture(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    pixels = np.stack((250 * x / (width - 1), 250 * y / (height - 1), np.zeros_like(x)), -1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


sizes = st.tuples(st.integers(20, 90), st.integers(20, 90))
focals = st.floats(30, 200)


@settings(max_examples=60, deadline=None)
@given(sizes, focals, focals, focals, st.sampled_from(["clean", "legacy"]))
def test_points_stay_on_what_they_mark(size, fx, fy, focal, geometry):
    """Every pixel of the picture is mapped to within half a pixel of where it is drawn, and back."""
    camera = Camera(fx, fy, size[1] / 2, size[0] / 2)
    if geometry == "legacy":
        camera = Camera(fx, fx, size[1] / 2, size[0] / 2)
    view = make_view(picture(*size), camera, focal, LARGE, geometry)
    points = np.stack(np.meshgrid(np.arange(size[1]), np.arange(size[0])), -1).reshape(-1, 2).astype(float)
    pixels = view.locate(points)
    # truncation of the size may put the last pixel of the legacy arithmetic just outside
    edge = 0 if geometry == "clean" else 1
    assert (pixels >= 0).all() and (pixels < np.array(view.inner[::-1]) + edge).all()
    back = view.picture.to_original(pixels)
    allowed = 0.5 / np.array(view.picture.scale) if geometry == "clean" else 1.6 / np.minimum(view.picture.scale, 1.0)
    assert (np.abs(back - points) <= allowed + 1e-6).all()


def test_clean_geometry_has_one_focal_length_and_whole_tokens():
    camera = Camera(50.0, 80.0, 20.0, 30.0)
    view = make_view(picture(60, 41), camera, 100.0, LARGE)
    assert view.inner == (75, 82)  # 60 * 100 / 80, 41 * 100 / 50
    canvas = view.finish(LARGE)
    assert canvas.size == (84, 84) and canvas is view.picture
    seen = camera.scaled(canvas.scale, canvas.offset)
    assert (seen.fx, seen.fy) == pytest.approx((100, 100), rel=0.01)
    pixels = np.asarray(canvas.image)
    assert not pixels[75:].any() and not pixels[:, 82:].any() and pixels[:75, 20:82, 0].all()


def test_legacy_geometry_stretches_after_drawing():
    view = make_view(picture(60, 80), Camera(50.0, 80.0, 40.0, 30.0), 100.0, LARGE, "legacy")
    assert view.inner == (120, 160)  # both axes by fx
    marked = draw_marker(view.picture.image, (80, 60))
    canvas = view.finish(LARGE, marked)
    assert canvas.size == LARGE.canvas_size((120, 160)) == (112, 168)
    assert np.allclose(canvas.to_original(canvas.to_canvas(np.array([[3.0, 7.0]]))), [[3.0, 7.0]])
    assert (np.asarray(canvas.image)[..., 0] > np.asarray(view.finish(LARGE).image)[..., 0]).any()
    with pytest.raises(ValueError, match="legacy geometry stretches pictures"):
        make_view(picture(60, 80), Camera(50.0, 50.0, 40.0, 30.0), 60.0, FIXED, "legacy")


@settings(max_examples=60, deadline=None)
@given(sizes, focals, focals)
def test_shrinking_is_told_and_fits(size, fx, focal):
    camera = Camera(fx, fx, size[1] / 2, size[0] / 2)
    unified = unify(picture(*size), camera, focal)
    view = make_view(picture(*size), camera, focal, FIXED, overflow="shrink")
    assert view.picture.size == (96, 96) and view.inner[0] <= 96 and view.inner[1] <= 96
    if max(unified.inner) <= 96:
        assert view.ratio == 1 and view.inner == unified.inner
    else:
        assert view.ratio < 1 and max(view.inner) >= 94
        assert view.inner[0] / unified.inner[0] == pytest.approx(view.ratio, abs=0.6 / unified.inner[0])
        with pytest.raises(ValueError, match="set the head's focal to at most"):
            make_view(picture(*size), camera, focal, FIXED)


def test_bounds_of_a_dynamic_backbone_count():
    tight = ImageGeometry((12, 12), 6, 2, min_pixels=64 * 64, max_pixels=96 * 96)
    camera = Camera(100.0, 100.0, 60.0, 60.0)
    with pytest.raises(ValueError, match="more than the backbone takes"):
        make_view(picture(120, 120), camera, 100.0, tight)
    view = make_view(picture(120, 120), camera, 100.0, tight, overflow="shrink")
    assert view.finish(tight).size[0] * view.finish(tight).size[1] <= 96 * 96
    assert 0.7 < view.ratio < 0.81


def test_crop_is_central_and_maps_points():
    camera = Camera(50.0, 50.0, 40.0, 30.0)
    view = make_view(picture(60, 80), camera, 50.0, LARGE, change=Change(crop=(40, 50)))
    assert view.inner == (40, 50)
    assert view.locate(np.array([[15.0, 10.0], [64.0, 49.0]])).tolist() == [[0, 0], [49, 39]]
    assert view.shows(view.locate(np.array([[15.0, 10.0], [14.0, 10.0], [65.0, 20.0]]))).tolist() == [
        True,
        False,
        False,
    ]
    original = np.asarray(picture(60, 80))
    assert np.array_equal(np.asarray(view.picture.image)[:40, :50], original[10:50, 15:65])


def test_squeeze_moves_rows_only():
    camera = Camera(50.0, 50.0, 40.0, 30.0)
    view = make_view(picture(60, 80), camera, 50.0, LARGE, change=Change(factor=2.0))
    assert view.inner == (40, 80)
    assert view.locate(np.array([[15.0, 30.5]])).tolist() == [[15, 20]]


def test_augmentation_is_seeded_and_in_range():
    augment = Augmentation((20, 30), (40, 41), {"noisy": (1.0, 1.3)})
    crops = [augment.draw(np.random.default_rng(seed)) for seed in range(30)]
    assert crops == [augment.draw(np.random.default_rng(seed)) for seed in range(30)]
    assert all(20 <= change.crop[0] <= 30 and change.crop[1] in (40, 41) and change.factor is None for change in crops)
    noisy = augment.draw(np.random.default_rng(0), "noisy")
    assert noisy.crop is None and 1.0 <= noisy.factor <= 1.3
    with pytest.raises(ValueError, match="the range"):
        Augmentation((30, 20))


def test_distortion_is_undone():
    """A point of a distorted photograph lies where the undistorted picture shows the same thing."""
    camera = Camera(60.0, 60.0, 40.0, 30.0, distortion=(-0.2, 0.05, 0.0, 0.0))
    view = make_view(picture(60, 80), camera, 60.0, LARGE)
    points = np.array([[10.0, 12.0], [70.0, 50.0], [40.0, 30.0]])
    pixels = view.locate(points)
    shown = np.asarray(view.picture.image)[pixels[:, 1], pixels[:, 0], :2].astype(float)
    wanted = points * 250 / np.array([79, 59])
    assert np.abs(shown - wanted).max() < 5  # of 250; without undoing it is off by more than 7
    plain = np.asarray(picture(60, 80))[pixels[:, 1], pixels[:, 0], :2].astype(float)
    assert np.abs(plain - wanted).max() > 7


@pytest.mark.parametrize("overflow", ["error", "shrink"])
@pytest.mark.parametrize(
    ("focal", "reason", "message"),
    [
        (5000.0, "bad_camera", "nothing is left of an image"),
        (0.9, "bad_camera", "field of view of more than 170 degrees"),  # in units of the image's width
        (2.0, "bad_camera", "field of view of more than 170 degrees"),
    ],
)
def test_impossible_cameras(focal, reason, message, overflow):
    """They are refused before a picture is made that no memory holds."""
    with pytest.raises(UnviewableError, match=message) as found:
        make_view(picture(60, 80), Camera(focal, focal, 40.0, 30.0), 30.0, FIXED, overflow=overflow)
    assert found.value.reason == reason


def test_a_huge_picture_is_never_made(monkeypatch):
    """A wide but possible camera at a long focal length: 9000 x 12000 pixels, of which nothing is resized but the result."""
    made = []
    real = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: made.append(size) or real(self, size, *a, **k)
    )
    camera = Camera(10.0, 10.0, 40.0, 30.0)
    assert unified_size((60, 80), camera, 1500.0) == (9000, 12000)
    with pytest.raises(UnviewableError, match="more than the backbone takes") as found:
        make_view(picture(60, 80), camera, 1500.0, FIXED)
    assert found.value.reason == "too_large" and not made
    view = make_view(picture(60, 80), camera, 1500.0, FIXED, overflow="shrink")
    assert (len(made) == 1 and max(view.inner) == 96) or max(view.inner) == 95
    advised = int(str(found.value).split("at most ")[1].split(",")[0])
    assert make_view(picture(60, 80), camera, advised, FIXED).ratio == 1


lenses = st.sampled_from([(), (-0.2, 0.05, 0.0, 0.0), (0.1, -0.02, 0.001, 0.0)])


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(50, 200), st.floats(30, 200), st.sampled_from(["clean", "legacy"]), lenses)
def test_back_is_the_inverse_of_locate(size, fx, focal, geometry, lens):
    """What a pixel of the picture is reported as lies on that pixel again."""
    camera = Camera(fx, fx, size[1] / 2, size[0] / 2, distortion=lens)
    view = make_view(picture(*size), camera, focal, LARGE, geometry)
    y, x = np.mgrid[: view.inner[0], : view.inner[1]]
    pixels = np.stack((x.ravel(), y.ravel()), -1)
    assert np.array_equal(view.locate(view.back(pixels)), pixels)


def test_points_that_undistortion_cuts_away_are_not_shown():
    """A strong barrel: the corners of the photograph lie outside of the picture; what has no ray lies nowhere."""
    camera = Camera(60.0, 60.0, 40.0, 30.0, distortion=(-0.3, 0.02, 0.0, 0.0))
    view = make_view(picture(60, 80), camera, 60.0, LARGE)
    shown = view.shows(view.locate(np.array([[40.0, 30.0], [0.0, 0.0], [79.0, 59.0], [np.nan, 3.0]])))
    assert shown.tolist() == [True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(13, 40), st.integers(13, 40)), st.integers(1, 6), st.data())
def test_markers_paint_beside_the_target(size, marker, data):
    plain = Image.new("RGB", (size[1], size[0]), (9, 9, 9))
    point = (data.draw(st.integers(-3, size[1] + 3)), data.draw(st.integers(-3, size[0] + 3)))
    moved = snap(size, np.array(point), marker)
    assert fits(size, moved, marker)
    assert fits(size, np.array(point), marker) == (moved == point).all()
    pixels = np.asarray(draw_marker(plain, tuple(moved.tolist()), marker))
    painted = (pixels == (255, 0, 0)).all(-1)
    assert painted.sum() == marker + 2 * (marker // 2)
    assert not painted[moved[1], moved[0]] and painted[moved[1], moved[0] - 1]
    assert not painted[:, moved[0] + 1 :].any()
    assert not (np.asarray(plain) != 9).any()


def test_no_arrow_covers_what_another_points_at():
    plain = Image.new("RGB", (40, 40), (9, 9, 9))
    points = np.array([[15, 20], [17, 20]])
    pixels = np.asarray(draw_markers(plain, points))
    assert (pixels[20, [15, 17]] == 9).all()
    assert (pixels[20, 16] == (0, 0, 255)).all() and (pixels[20, 14] == (0, 0, 255)).all()
    assert (pixels[20, 10] == (255, 0, 0)).all()


def test_markers_refuse_the_border():
    with pytest.raises(ValueError, match="cannot be drawn"):
        draw_marker(Image.new("RGB", (20, 20)), (4, 10))
    with pytest.raises(ValueError, match="too small for arrows"):
        snap((10, 40), np.array([3, 3]))

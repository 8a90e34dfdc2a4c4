"""Canvases of dynamic resolution: bounds, aspect, and the rule of the stock processors."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmseg_llm.backbones.image_geometry import MAX_ASPECT_RATIO, ImageGeometry

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 4000))


@st.composite
def geometries(draw) -> ImageGeometry:
    """With pixel bounds from one token to thousands, sometimes one bound for both."""
    patch, merge = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    area = (patch * merge) ** 2
    low = draw(st.integers(area, 1600 * area))
    high = draw(st.one_of(st.just(low), st.integers(low, 3200 * area)))
    return ImageGeometry((patch * merge, patch * merge), patch, merge, min_pixels=low, max_pixels=high)


def is_too_long(size) -> bool:
    return max(size) > MAX_ASPECT_RATIO * min(size)


@settings(max_examples=500, deadline=None)
@given(geometries(), SIDES, SIDES)
@example(ImageGeometry((28, 28), 14, 2, min_pixels=3136, max_pixels=12845056), 10, 1500)  # half a token high
@example(ImageGeometry((28, 28), 14, 2, min_pixels=784, max_pixels=784), 1, 200)
@example(ImageGeometry((28, 28), 14, 2, min_pixels=784, max_pixels=784), 1, 201)
def test_canvas_is_that_of_the_stock_processor(geometry, height, width):
    arguments = (height, width, geometry.step, geometry.min_pixels, geometry.max_pixels)
    if is_too_long((height, width)):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(*arguments)
        with pytest.raises(
            ValueError, match="more than 200 times as long as it is wide, which no token grid fits; crop"
        ):
            geometry.canvas_size((height, width))
    else:
        assert geometry.canvas_size((height, width)) == smart_resize(*arguments)


@settings(max_examples=500, deadline=None)
@given(geometries(), SIDES, SIDES)
def test_canvas_properties(geometry, height, width):
    assume(not is_too_long((height, width)))
    rows, columns = geometry.canvas_size((height, width))
    step, low, high = geometry.step, geometry.min_pixels, geometry.max_pixels
    assert rows % step == columns % step == 0 and min(rows, columns) >= step
    assert geometry.canvas_size((width, height)) == (columns, rows)
    near = [round(side / step) * step for side in (height, width)]  # without bounds
    if near[0] * near[1] > high:  # scaled down, rounded down: at most the upper bound unless a side is one token
        assert rows * columns <= high or min(rows, columns) == step
        ratio = math.sqrt(high / (height * width))
    elif near[0] * near[1] < low:  # scaled up, rounded up: the one rounding that nothing bounds from above
        assert rows * columns >= low
        ratio = math.sqrt(low / (height * width))
    else:
        assert low <= rows * columns <= high and [rows, columns] == near
        ratio = 1.0
    for side, original in ((rows, height), (columns, width)):  # the aspect, within a token per side
        assert abs(side - original * ratio) < step + 1e-6 or side == step


@settings(max_examples=200, deadline=None)
@given(geometries(), SIDES, SIDES)
def test_a_canvas_within_the_bounds_is_its_own_canvas(geometry, height, width):
    assume(not is_too_long((height, width)))
    canvas = geometry.canvas_size((height, width))
    assume(geometry.min_pixels <= canvas[0] * canvas[1] <= geometry.max_pixels and not is_too_long(canvas))
    assert geometry.canvas_size(canvas) == canvas


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 400), st.integers(1, 400))
def test_covered_is_what_whole_tokens_see(patch, merge, height, width):
    step = patch * merge
    geometry = ImageGeometry((step, step), patch, merge)
    seen = geometry.covered((height, width))
    assert all(inner <= outer < inner + step and inner % step == 0 for inner, outer in zip(seen, (height, width)))
    rows, columns = geometry.token_grid((height, width))
    assert seen == (rows * step, columns * step) and geometry.num_tokens((height, width)) == rows * columns


@settings(max_examples=100, deadline=None)
@given(geometries(), SIDES, SIDES)
def test_dynamic_canvases_are_covered_whole(geometry, height, width):
    assume(not is_too_long((height, width)))
    canvas = geometry.canvas_size((height, width))
    assert geometry.covered(canvas) == canvas
    rows, columns = geometry.patch_grid(canvas)
    assert (rows * geometry.patch, columns * geometry.patch) == canvas
    assert geometry.num_tokens(canvas) * geometry.merge**2 == rows * columns


def test_fixed_canvas():
    geometry = ImageGeometry((336, 224), 14, 2)
    assert not geometry.is_dynamic
    assert geometry.canvas_size((1, 4000)) == (336, 224)  # any aspect
    assert (geometry.patch_grid(), geometry.token_grid(), geometry.num_tokens()) == ((24, 16), (12, 8), 96)
    assert geometry.covered() == (336, 224)
    assert ImageGeometry((100, 100), 14, 1).covered() == (98, 98)


@pytest.mark.parametrize("bounds", [{}, {"min_pixels": 784, "max_pixels": 7840}])
@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-3, 5)])
def test_empty_images_are_refused(size, bounds):
    with pytest.raises(ValueError, match=r"of size \(.*\) \(height, width\) has no pixels"):
        ImageGeometry((28, 28), 14, 2, **bounds).canvas_size(size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (100, 112)}, r"\(100, 112\) must be a multiple of patch \* merge = 28"),
        ({"image_size": (112, 100)}, r"\(112, 100\) must be a multiple"),
        ({"min_pixels": 784}, "give both min_pixels and max_pixels"),
        ({"max_pixels": 784}, "give both min_pixels and max_pixels"),
        ({"min_pixels": 783, "max_pixels": 7840}, r"min_pixels 783 .* at least one token \(784 pixels\)"),
        ({"min_pixels": 1000, "max_pixels": 999}, "min_pixels 1000 and max_pixels 999 must be .* in this order"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageGeometry(**({"image_size": (448, 448), "patch": 14, "merge": 2} | settings))

"""Coordinates as text: every style there and back, what is accepted, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.backbones.coordinates import CoordinateCodec

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
SHARES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6)
CODECS = st.one_of(
    st.just(CoordinateCodec(bins=0)),  # pixels of the canvas
    st.builds(CoordinateCodec, bins=st.one_of(st.sampled_from([100, 1000]), st.integers(1, 2000))),
    st.builds(
        CoordinateCodec,
        bins=st.one_of(st.sampled_from([1, 10, 11, 100, 101, 1000]), st.integers(1, 2000)),
        style=st.just("fraction"),
    ),
)


def spread(shares, size) -> np.ndarray:
    """Points all over a canvas, its borders included."""
    return np.array(shares, np.float64).reshape(-1, 2) * (size[1], size[0]) - 0.5


def cells_of(codec, size) -> np.ndarray:
    return np.array([codec.bins or size[1], codec.bins or size[0]])


@settings(max_examples=400, deadline=None)
@given(CODECS, SIZES, SHARES, st.sampled_from([", ", " ", "),(", "\n"]))
def test_text_round_trip(codec, size, shares, separator):
    points = spread(shares, size)
    words = codec.write(points, size)
    assert len(words) == points.size
    restored = codec.read(f"points: ({separator.join(words)}).", size)
    assert restored.shape == points.shape
    half = np.array([size[1], size[0]]) / cells_of(codec, size) / 2
    assert (np.abs(restored - points) <= half * (1 + 1e-9)).all()
    assert codec.write(restored, size) == words  # cells are fixed points
    for word in words:
        assert word.isdigit() if codec.style == "integer" else 0 <= float(word) <= 1


@settings(max_examples=200, deadline=None)
@given(CODECS, SIZES, st.data())
def test_every_cell_is_its_own_text(codec, size, data):
    """Neighbouring cells never share their text: a fraction has decimals enough."""
    columns, rows = cells_of(codec, size)
    cells = np.array([[data.draw(st.integers(0, n - 1)) for n in (columns, rows)] for _ in range(4)])
    centres = codec.decode(cells, size)
    assert np.array_equal(codec.encode(centres, size), cells)
    words = codec.write(centres, size)
    assert np.array_equal(codec.encode(codec.read(" ".join(words), size), size), cells)


@settings(max_examples=200, deadline=None)
@given(CODECS, SIZES, SHARES)
def test_encode_is_monotonic_and_within_the_cells(codec, size, shares):
    points = np.sort(spread(shares, size), axis=0)
    cells = codec.encode(points, size)
    assert cells.dtype == np.int64 and ((cells >= 0) & (cells < cells_of(codec, size))).all()
    assert (np.diff(cells, axis=0) >= 0).all()
    shaped = codec.encode(points.reshape(1, -1, 2), size)
    assert np.array_equal(shaped[0], cells)


def test_pixels_are_themselves():
    codec = CoordinateCodec(bins=0)
    points = np.array([[0, 0], [639, 479], [17, 300]])
    assert np.array_equal(codec.encode(points, (480, 640)), points)
    assert np.array_equal(codec.decode(points, (480, 640)), points)
    assert codec.write(points, (480, 640)) == ["0", "0", "639", "479", "17", "300"]
    assert np.array_equal(codec.read("(0,0) (639, 479) [17 300]", (480, 640)), points)


def test_thousandths_of_the_canvas():
    codec = CoordinateCodec(bins=1000)
    assert codec.write([[319.5, 119.5]], (480, 640)) == ["500", "250"]
    # 1001 values are read, 1000 written: the far border belongs to the last cell
    assert np.array_equal(codec.read("(1000, 1000)", (480, 640)), codec.read("(999, 999)", (480, 640)))
    assert codec.write([[639.5, 479.5]], (480, 640)) == ["999", "999"]


def test_fractions_of_the_canvas():
    codec = CoordinateCodec(bins=1000, style="fraction")
    assert codec.write([[319.5, 119.5]], (480, 640)) == ["0.500", "0.250"]
    assert np.array_equal(codec.read("0.5 0.25", (480, 640)), codec.decode([[500, 250]], (480, 640)))
    assert np.array_equal(codec.read("1.0, 1", (480, 640)), codec.decode([[999, 999]], (480, 640)))


def test_text_without_numbers_has_no_points():
    assert CoordinateCodec().read("there is none", (480, 640)).shape == (0, 2)


@settings(max_examples=200, deadline=None)
@given(CODECS, SIZES, st.sampled_from([0, 1]), st.sampled_from([-1e-3, 1e-3, 1e4, float("nan"), float("inf")]))
def test_points_outside_are_refused(codec, size, axis, past):
    point = np.array([[0.0, 0.0]])
    point[0, axis] = -0.5 + past if past < 0 else (size[1], size[0])[axis] - 0.5 + past
    with pytest.raises(ValueError, match=r"outside of the canvas of size \(\d+, \d+\) \(height, width\); map it there"):
        codec.encode(point, size)
    with pytest.raises(ValueError, match="outside of the canvas"):
        codec.write(point, size)


@settings(max_examples=200, deadline=None)
@given(CODECS, SIZES, st.sampled_from([0, 1]), st.booleans())
def test_numbers_outside_are_refused(codec, size, axis, is_negative):
    limit = 1 if codec.style == "fraction" else int(cells_of(codec, size)[axis])
    words = ["0", "0"]
    words[axis] = "-1" if is_negative else str(limit + 1)
    with pytest.raises(ValueError, match=r"a number in '.*' lies outside of the canvas of size"):
        codec.read(", ".join(words), size)


@settings(max_examples=50, deadline=None)
@given(CODECS, st.integers(0, 4))
def test_odd_numbers_are_no_points(codec, count):
    text = " ".join(["0"] * (2 * count + 1))
    with pytest.raises(ValueError, match=rf"{2 * count + 1} numbers in .* are no \(x, y\) pairs"):
        codec.read(text, (480, 640))


def test_fractions_need_bins():
    with pytest.raises(ValueError, match="fractions need bins > 0, such as 1000"):
        CoordinateCodec(bins=0, style="fraction")

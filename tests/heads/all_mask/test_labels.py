"""Cell labels: every rule against a direct reading of its definition, on any size and canvas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmseg_llm.geometry import frame, stretch
from mmseg_llm.heads.all_mask.labels import cell_labels, check_rule
from mmseg_llm.masks import Mask
from mmseg_llm.structures import Canvas

sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
grids = st.tuples(st.integers(1, 8), st.integers(1, 8))


def canvas_of(size, canvas_size=(64, 48)) -> Canvas:
    return stretch(Image.new("RGB", (size[1], size[0])), canvas_size)


def random_mask(size, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < 0.6


@settings(max_examples=60, deadline=None)
@given(sizes, grids, st.integers(0, 1000))
def test_coverage_keeps_the_area(size, grid, seed):
    """Cells share the image without gap or overlap: their mean is the mask's share of the image."""
    array = random_mask(size, seed)
    labels = cell_labels(Mask.from_array(array), canvas_of(size), grid, "coverage")
    assert labels.shape == grid and labels.min() >= 0 and labels.max() <= 1
    assert abs(labels.mean() - array.mean()) < 1e-5


@settings(max_examples=60, deadline=None)
@given(sizes, grids, st.integers(0, 1000))
def test_rules_agree_with_their_definition(size, grid, seed):
    array = random_mask(size, seed)
    mask, canvas = Mask.from_array(array), canvas_of(size)
    coverage = cell_labels(mask, canvas, grid, "coverage")
    area = cell_labels(mask, canvas, grid, "area")
    centre = cell_labels(mask, canvas, grid, "centre")
    strict = cell_labels(mask, canvas, grid, "centre_strict")
    is_clear = np.abs(coverage - 0.5) > 1e-6
    assert np.array_equal(area[is_clear], (coverage > 0.5).astype(np.float32)[is_clear])
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) * size[0] / grid[0], (j + 0.5) * size[1] / grid[1]
            assert centre[i, j] == array[int(y), int(x)]
            around = array[max(0, int(np.floor(y - 0.5))) :, max(0, int(np.floor(x - 0.5))) :][:2, :2]
            if strict[i, j]:  # all pixels with a weight are foreground, the one under the centre among them
                assert array[int(y), int(x)]
            elif around.all():
                pytest.fail("all pixels around the centre are foreground")


@pytest.mark.parametrize("rule", ["area", "coverage", "centre", "centre_strict"])
def test_full_and_empty(rule):
    """The rounding of the reference, which loses cells of a full mask (specification 3.3), is repaired."""
    size, grid = (480, 640), (28, 37)
    canvas = canvas_of(size, (784, 1036))
    assert cell_labels(Mask.from_array(np.ones(size, bool)), canvas, grid, rule).min() >= 1 - 1e-6
    assert cell_labels(Mask.empty(size), canvas, grid, rule).max() == 0


def test_strict_rule_is_biased_to_the_background():
    size, grid = (97, 141), (9, 13)
    y, x = np.mgrid[: size[0], : size[1]]
    mask = Mask.from_array(((y - 48) / 40) ** 2 + ((x - 70) / 55) ** 2 < 1)
    sums = {rule: cell_labels(mask, canvas_of(size), grid, rule).sum() for rule in ("centre", "centre_strict")}
    assert sums["centre_strict"] < sums["centre"]


def test_only_the_framed_part_of_a_canvas_counts():
    """A tower that drops the last pixels: the grid covers less than the image."""
    array = np.zeros((100, 100), bool)
    array[:, 96:] = True
    canvas = stretch(Image.new("RGB", (100, 100)), (100, 100))
    seen = frame(canvas, (96, 96))
    assert cell_labels(Mask.from_array(array), canvas, (4, 4), "coverage")[0, 3] == pytest.approx(4 / 25)
    assert cell_labels(Mask.from_array(array), seen, (4, 4), "coverage").max() == 0


def test_errors():
    with pytest.raises(ValueError, match="unknown label rule 'votes'; use one of area"):
        check_rule("votes")
    with pytest.raises(ValueError, match=r"mask of size \(3, 4\) does not fit an image of size \(8, 9\)"):
        cell_labels(Mask.empty((3, 4)), canvas_of((8, 9)), (2, 2), "area")

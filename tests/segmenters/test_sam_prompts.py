"""The arithmetic of SAM prompts: what is asked inside and outside of the image, and which pixels are clicked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_llm.segmenters.prompts import content_size, mask_prompt, sample_points, upsample_logits

LIMIT = float(np.log(999.0))  # logit of 0.999


@st.composite
def masks(draw) -> np.ndarray:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return rng.random((height, width)) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))


@settings(max_examples=60, deadline=None)
@given(mask=masks(), side=st.sampled_from((16, 64, 256)), padding=st.sampled_from(("official", "fixed")))
def test_prompt_is_finite_in_range_and_padded_as_named(mask, side, padding):
    prompt = mask_prompt(mask, side, padding)
    assert prompt.shape == (side, side)
    assert prompt.dtype == torch.float32
    assert torch.isfinite(prompt).all()
    assert prompt.abs().max() <= LIMIT + 1e-3
    height, width = content_size(mask.shape, side)
    strip = torch.ones(side, side, dtype=torch.bool)
    strip[:height, :width] = False
    if mask.shape != (side, side):
        assert torch.all((prompt[strip] - (LIMIT if padding == "official" else 0.0)).abs() < 1e-3)
        same_inside = mask_prompt(mask, side, "fixed")[:height, :width]
        assert torch.equal(prompt[:height, :width], same_inside)
    assert max(height, width) == side


@settings(max_examples=40, deadline=None)
@given(mask=masks(), num_points=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_points_lie_where_their_label_says(mask, num_points, seed):
    points, labels = sample_points(mask, num_points, seed)
    columns, rows = points.long().unbind(1)
    assert np.array_equal(mask[rows.numpy(), columns.numpy()], labels.numpy() == 1)
    assert int((labels == 1).sum()) == min(num_points, int(mask.sum()))
    assert int((labels == 0).sum()) == min(num_points, int((~mask).sum()))
    assert len({tuple(point) for point in points.tolist()}) == len(points), "drawn without replacement"


def test_points_follow_the_global_stream_without_touching_it():
    mask = np.random.default_rng(0).random((31, 47)) < 0.3
    torch.manual_seed(1234)
    expected = torch.from_numpy(mask.reshape(-1)).nonzero()[:, 0][torch.randperm(int(mask.sum()))[:10]]
    before = torch.get_rng_state()
    points, _ = sample_points(mask, 10, 1234)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(points[:10, 1] * 47 + points[:10, 0], expected.double())
    assert torch.equal(sample_points(mask, 10, 1234)[0], points)
    assert not torch.equal(sample_points(mask, 10, 1235)[0], points)


def test_a_mask_of_prompt_size_is_special_only_officially():
    mask = np.zeros((256, 256), bool)
    mask[40:90, 30:200] = True
    official, fixed = mask_prompt(mask, 256, "official"), mask_prompt(mask, 256, "fixed")
    assert official.max() < 0, "the released code tells SAM that nothing is foreground"
    assert official[50, 50] == pytest.approx(-5.537, abs=1e-3)
    assert fixed[50, 50] == pytest.approx(LIMIT, abs=1e-3)
    assert torch.equal(mask_prompt(mask, 256, "official", is_stretched=True), fixed)


def test_stretched_prompt_fills_the_square():
    mask = np.zeros((30, 60), bool)
    mask[:, :30] = True
    prompt = mask_prompt(mask, 64, "official", is_stretched=True)
    assert (prompt[:, :31] > 0).all()
    assert (prompt[:, 33:] < 0).all()


def test_upsampling_rules():
    logits = torch.tensor([[[-1.0, 3.0], [-1.0, -1.0]]])
    nearest = upsample_logits(logits, (3, 5))
    rows, columns = torch.arange(3) * 2 // 3, torch.arange(5) * 2 // 5
    assert torch.equal(nearest[0], logits[0][rows[:, None], columns[None]])
    smooth = upsample_logits(torch.tensor([[[0.0, 4.0]]]), (1, 4), "bilinear")
    assert smooth[0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((150, 200), (192, 256)), ((200, 150), (256, 192)), ((1, 999), (1, 256)), ((7, 7), (256, 256))],
)
def test_content_size(size, expected):
    assert content_size(size, 256) == expected
    assert content_size(size, 256, is_stretched=True) == (256, 256)

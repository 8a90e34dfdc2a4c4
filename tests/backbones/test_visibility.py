"""Visibility: the pattern against a brute-force reading of its definition."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmseg_llm.backbones.visibility import Visibility


def sees(block, reach, bidirectional, i: int, j: int) -> bool:
    """Whether token i sees token j, of one sequence; padding rows fall back to what stock causal masks show them."""
    if block[i] < 0:
        real = [k for k in range(i + 1) if block[k] >= 0]
        return j in real if real else j == i
    if block[j] < 0:
        return False
    if block[i] == block[j]:
        return bool(j <= i or bidirectional[block[i]])
    return bool(j < reach[block[i]][block[j]])


def brute_force(visibility: Visibility) -> torch.Tensor:
    blocks = visibility.block.tolist()
    length = len(blocks[0])
    return torch.tensor(
        [
            [[sees(block, reach, flags, i, j) for j in range(length)] for i in range(length)]
            for block, reach, flags in zip(blocks, visibility.reach.tolist(), visibility.bidirectional.tolist())
        ]
    )


@st.composite
def visibilities(draw) -> Visibility:
    batch, length, count = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    block = draw(arrays(np.int64, (batch, length), elements=st.integers(-1, count - 1)))
    reach = draw(arrays(np.int64, (batch, count, count), elements=st.integers(0, length)))
    flags = draw(arrays(np.bool_, (batch, count)))
    return Visibility(*(torch.from_numpy(array) for array in (block, reach, flags)))


@settings(max_examples=150, deadline=None)
@given(visibilities(), st.data())
def test_allowed_equals_brute_force(visibility, data):
    expected = brute_force(visibility)
    assert torch.equal(visibility.allowed(), expected)
    count = data.draw(st.integers(1, visibility.block.shape[1]))
    assert torch.equal(visibility.allowed(count), expected[:, -count:])


@settings(max_examples=60, deadline=None)
@given(visibilities())
def test_eager_equals_sdpa(visibility):
    allowed = visibility.render("sdpa")
    assert allowed.dtype == torch.bool and allowed.ndim == 4
    for dtype in (torch.float32, torch.bfloat16):
        added = visibility.render("eager", dtype)
        assert added.dtype == dtype and torch.isfinite(added).all()
        assert torch.equal(added == 0, allowed)
        assert (added[~allowed] == torch.finfo(dtype).min).all()


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 8))))
def test_causal_with_padding_anywhere(is_real):
    allowed = Visibility.causal(torch.from_numpy(is_real)).allowed().numpy()
    length = is_real.shape[1]
    stock = np.tril(np.ones((length, length), bool)) & is_real[:, None]
    has_key = stock.any(-1)
    assert (allowed[has_key] == stock[has_key]).all()
    assert (allowed.any(-1)).all()  # no row is empty, whose softmax would be NaN
    assert (allowed[~has_key] == np.broadcast_to(np.eye(length, dtype=bool), stock.shape)[~has_key]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_padding_equals_the_stock_mask(side):
    """Real rows see what transformers' own mask shows them."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    real = real if side == "left" else real.flip(1)
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation="sdpa")
    stock = create_causal_mask(
        config=config, inputs_embeds=torch.zeros(2, 5, 8), attention_mask=real, past_key_values=None
    )
    ours = Visibility.causal(real).render("sdpa")
    rows = real.bool()
    assert torch.equal(ours[:, 0][rows], stock[:, 0][rows])


def test_branches_see_the_prefix_and_themselves():
    visibility = Visibility.branches(torch.tensor([[0, 0, 1, 1, 2, -1]]), 3)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 1, 1, 1, 0],
        ]
    ).bool()
    assert torch.equal(visibility.allowed()[0], expected)


def test_bidirectional_block_hangs_off_a_dialogue():
    base = Visibility.branches(torch.tensor([[0, 0, 1, 1, 1]]), 2)
    grown = base.with_block(1, 2, seen=4, bidirectional=True)
    assert torch.equal(grown.allowed(), brute_force(grown))
    # sees the prefix, the first two tokens of its parent, and all of itself in both directions
    assert grown.allowed(2)[0].tolist() == [[True, True, True, True, False, True, True]] * 2
    assert not grown.allowed()[0, :5, 5:].any()
    two = grown.with_block(1, 1, seen=5, bidirectional=True)
    assert two.allowed(1)[0, 0].tolist() == [True] * 5 + [False, False, True]  # blind to its sister


def test_select_and_to():
    visibility = Visibility.causal(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(visibility.select(rows).allowed(), visibility.allowed()[rows])
    assert visibility.to("meta").block.is_meta


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|sdpa"])
def test_refuses_implementations_that_ignore_it(name):
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*sdpa, eager, flex_attention"):
        Visibility.causal(torch.ones(1, 2)).render(name)

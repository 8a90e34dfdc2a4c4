"""Visibility: the pattern against a brute-force reading of its definition."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmseg_llm.backbones.visibility import Visibility, check_attention


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


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_refusal_says_what_to_set(name):
    expected = (
        f"attention implementation '{name}' ignores a visibility; "
        "load the model with attention set to one of sdpa, eager, flex_attention"
    )
    for refuse in (check_attention, Visibility.causal(torch.ones(1, 2)).render):
        with pytest.raises(ValueError) as caught:
            refuse(name)
        assert str(caught.value) == expected


# ---- patterns that grow -----------------------------------------------------------------------------------------------


class Reader:
    """One sequence, token by token, as the words of the module put it: which block hangs off which, and up to where."""

    def __init__(self, blocks, parents) -> None:
        self.blocks = list(blocks)
        self.parents = dict(parents)  # block: (parent, bound on the parent's tokens)
        self.flags = {}

    def reaches(self, block: int, other: int, place: int) -> bool:
        """Whether tokens of `block` see the token of `other` at `place`: what the parent sees stays visible."""
        if block not in self.parents:
            return False
        parent, bound = self.parents[block]
        return place < bound if other == parent else self.reaches(parent, other, place)

    def sees(self, i: int, j: int) -> bool:
        mine, its = self.blocks[i], self.blocks[j]
        if mine < 0:
            real = [k for k in range(i + 1) if self.blocks[k] >= 0]
            return j in real if real else j == i
        if its < 0:
            return False
        if mine == its:
            return j <= i or self.flags.get(mine, False)
        return self.reaches(mine, its, j)

    def matrix(self) -> torch.Tensor:
        places = range(len(self.blocks))
        return torch.tensor([[self.sees(i, j) for j in places] for i in places])


@st.composite
def grown(draw) -> tuple[Visibility, list[Reader]]:
    """A prefix, padded on either side, with branches or without; then blocks opened and filled in random order."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    starts = [draw(st.integers(0, length - 1)) for _ in range(batch)]
    ends = [draw(st.integers(start + 1, length)) for start in starts]
    block = torch.full((batch, length), -1)
    for row, (start, end) in enumerate(zip(starts, ends)):
        block[row, start:end] = 0
    if draw(st.booleans()):
        visibility = Visibility.causal(block >= 0)
        readers = [Reader(row, {}) for row in block.tolist()]
    else:
        count = draw(st.integers(1, 3))
        more = draw(arrays(np.int64, (batch, draw(st.integers(0, 4))), elements=st.integers(-1, count - 1)))
        block = torch.cat([block, torch.from_numpy(more)], dim=1)
        visibility = Visibility.branches(block, count)
        readers = [Reader(row, {k: (0, len(row)) for k in range(1, count)}) for row in block.tolist()]
    for _ in range(draw(st.integers(1, 4))):
        length, count = visibility.block.shape[1], visibility.num_blocks
        bounds = st.integers(0, length + 3)  # a bound may lie ahead, where the parent's next tokens will be
        is_free = draw(st.booleans())
        if draw(st.booleans()):
            new = draw(st.integers(1, 3))
            parents = draw(arrays(np.int64, (batch, new), elements=st.integers(0, count - 1)))
            seen = draw(arrays(np.int64, (batch, new), elements=bounds))
            visibility = visibility.open_blocks(*map(torch.from_numpy, (parents, seen)), bidirectional=is_free)
            filled = draw(arrays(np.int64, (batch, draw(st.integers(0, 6))), elements=st.integers(-1, count + new - 1)))
            visibility = visibility.append(torch.from_numpy(filled))
        else:
            parent, size = draw(st.integers(0, count - 1)), draw(st.integers(1, 3))
            same = draw(st.booleans())
            seen = np.full((batch, 1), draw(bounds)) if same else draw(arrays(np.int64, (batch, 1), elements=bounds))
            given_bound = int(seen[0, 0]) if same else torch.from_numpy(seen[:, 0])
            visibility = visibility.with_block(parent, size, seen=given_bound, bidirectional=is_free)
            new, parents, filled = 1, np.full((batch, 1), parent), np.full((batch, size), count)
        for row, reader in enumerate(readers):
            for j in range(new):
                reader.parents[count + j] = (int(parents[row, j]), int(seen[row, j]))
                reader.flags[count + j] = is_free
            reader.blocks += filled[row].tolist()
    return visibility, readers


@settings(max_examples=300, deadline=None)
@given(grown(), st.data())
def test_grown_patterns_equal_the_reader(pattern, data):
    visibility, readers = pattern
    expected = torch.stack([reader.matrix() for reader in readers])
    assert visibility.block.tolist() == [reader.blocks for reader in readers]
    assert torch.equal(visibility.allowed(), expected)
    assert expected.any(-1).all()
    count = data.draw(st.integers(1, expected.shape[1]))
    assert torch.equal(visibility.allowed(count), expected[:, -count:])
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(readers) - 1), min_size=1, max_size=4)))
    assert torch.equal(visibility.select(rows).allowed(), expected[rows])


@settings(max_examples=100, deadline=None)
@given(grown())
def test_growing_never_changes_what_older_tokens_saw_of_each_other(pattern):
    """So that cached keys and values stay right."""
    visibility, _ = pattern
    before = visibility.allowed()
    first = visibility.block[:, :1].clamp(min=0)
    later = visibility.open_blocks(first, first + 1, bidirectional=True)
    later = later.append(torch.full_like(first, visibility.num_blocks))
    length = before.shape[1]
    assert torch.equal(later.allowed()[:, :length, :length], before)
    assert not later.allowed()[:, :length, length:].any()


def test_isolated_bidirectional_blocks_of_two_branches():
    """Two masks off one branch and one off another, of two rows with other bounds; nobody sees a sister."""
    block = torch.tensor([[-1, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, -1]])
    visibility = Visibility.branches(block, 3)
    parents, seen = torch.tensor([[1, 1, 2]] * 2), torch.tensor([[3, 4, 6], [4, 3, 5]])
    visibility = visibility.open_blocks(parents, seen, bidirectional=True)
    visibility = visibility.append(torch.tensor([[3, 3, 4, 4, 5, 5], [3, 3, 4, -1, 5, 5]]))
    expected = [
        ["-#----", "-##---", "-###--", "-#--#-", "-#--##"],
        ["#-----", "##----", "###---", "####--", "##--#-"],
    ]
    allowed = visibility.allowed()
    for row, lines in enumerate(expected):
        first = 1 - row  # the first token of row 0 is padding
        assert ["".join("-#"[seen] for seen in line[:6]) for line in allowed[row, first : first + 5].int()] == lines
    masks = [["".join("-#"[seen] for seen in line) for line in allowed[row, 6:].int()] for row in range(2)]
    assert masks[0] == ["-##---##----"] * 2 + ["-###----##--"] * 2 + ["-#--##----##"] * 2
    padding = "#####-###---"
    assert masks[1] == [*["####--##----"] * 2, "###-----#---", padding, *["##--#-----##"] * 2]


# ---- how implementations get it ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(grown(), st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_eager_never_gets_a_bool_mask(pattern, data, dtype):
    visibility, _ = pattern
    count = data.draw(st.one_of(st.none(), st.integers(1, visibility.block.shape[1])))
    mask = visibility.render("eager", dtype, count)
    allowed = visibility.allowed(count)[:, None]
    assert mask.dtype == dtype and mask.shape == allowed.shape
    assert torch.equal(mask.exp() > 0, allowed)  # what the softmax leaves of it


def dense(mask, batch: int) -> torch.Tensor:
    """A FlexAttention mask, entry by entry."""
    rows, columns = mask.seq_lengths
    b, q, k = torch.arange(batch)[:, None, None], torch.arange(rows)[:, None], torch.arange(columns)
    return mask.mask_mod(b, torch.zeros_like(b), q, k).expand(batch, rows, columns)


@settings(max_examples=60, deadline=None)
@given(st.one_of(visibilities(), grown().map(lambda pattern: pattern[0])), st.data())
def test_flex_attention_equals_allowed(visibility, data):
    batch, length = visibility.block.shape
    count = data.draw(st.one_of(st.none(), st.integers(1, length)))
    mask = visibility.render("flex_attention", num_queries=count)
    assert mask.seq_lengths == (count or length, length)
    assert torch.equal(dense(mask, batch), visibility.allowed(count))


@pytest.mark.parametrize("count", [None, 150])
def test_flex_attention_over_several_tiles(count, monkeypatch):
    """Tiles of 128 x 128: none that holds a visible entry is skipped, only full ones go unmasked, and the result is SDPA's."""
    from torch.nn.attention import flex_attention as flex

    torch.manual_seed(0)
    block = torch.zeros(2, 300, dtype=torch.long)
    block[0, :140], block[:, 250:] = -1, 1
    visibility = Visibility.branches(block, 2).with_block(1, 260, seen=torch.tensor([270, 300]), bidirectional=True)
    mask = visibility.render("flex_attention", num_queries=count)
    allowed = visibility.allowed(count)
    assert torch.equal(dense(mask, 2), allowed)
    rows, columns = (-(-n // 128) for n in allowed.shape[1:])
    padded = torch.nn.functional.pad(allowed, (0, 128 * columns - allowed.shape[2], 0, 128 * rows - allowed.shape[1]))
    tiles = padded.unflatten(2, (columns, 128)).unflatten(1, (rows, 128))  # (B, rows, 128, columns, 128)
    assert torch.equal(mask.to_dense()[:, 0].bool(), tiles.any(4).any(2))
    assert int(mask.full_kv_num_blocks.sum()) == int(tiles.all(4).all(2).sum()) > 0
    assert (mask.to_dense() == 0).any()

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    q, k, v = torch.randn(2, 2, allowed.shape[1], 16), *torch.randn(2, 2, 2, allowed.shape[2], 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visibility.render("sdpa", num_queries=count))
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=mask), expected, rtol=0, atol=1e-5)

"""Who may attend to whom: one object for training, prefill and cached inference.

Tokens belong to blocks. A token sees (1) its own block, causally or - in a bidirectional block - entirely, and (2) of every
other block the tokens before a bound, which is zero for blocks it must not see. That covers a plain causal sequence, padding,
a bidirectional mask span, the isolated branches behind a shared image prefix, and mask blocks hanging off a dialogue.

Legend: B sequences, N query tokens, S key tokens, K blocks, J new blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
# Vision towers see no visibility; FlexAttention would only cost them compilation.
VISION_ATTENTION = {"flex_attention": "sdpa"}


def check_attention(implementation: str) -> None:
    """Refuse implementations that would silently drop a visibility.

    Raises:
        ValueError: for FlashAttention and everything else that takes no mask of this kind.
    """
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation '{implementation}' ignores a visibility; "
            f"load the model with attention set to one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


@dataclass(frozen=True)
class Visibility:
    """Attention pattern of a batch of packed sequences.

    Attributes:
        block: `(B, S)` block of each token; -1 is padding, seen by nobody.
        reach: `(B, K, K)` exclusive upper bound on the positions of block j's tokens that block i sees, i != j.
        bidirectional: `(B, K)` whether the tokens of a block see their whole block.
    """

    block: torch.Tensor
    reach: torch.Tensor
    bidirectional: torch.Tensor

    @classmethod
    def causal(cls, is_real: torch.Tensor) -> Visibility:
        """Ordinary left-to-right attention; `is_real` `(B, S)` is False at padding, on either side."""
        batch = is_real.shape[0]
        block = torch.where(is_real.bool(), 0, -1)
        return cls(
            block=block,
            reach=block.new_zeros(batch, 1, 1),
            bidirectional=torch.zeros(batch, 1, dtype=torch.bool, device=block.device),
        )

    @classmethod
    def branches(cls, block: torch.Tensor, num_blocks: int) -> Visibility:
        """Isolated branches behind a shared prefix: block 0 is the prefix, blocks k > 0 see it and themselves only.

        Args:
            block: `(B, S)` with -1 at padding.
            num_blocks: K, the prefix included.
        """
        batch, length = block.shape
        reach = block.new_zeros(batch, num_blocks, num_blocks)
        reach[:, 1:, 0] = length
        return cls(
            block=block,
            reach=reach,
            bidirectional=torch.zeros(batch, num_blocks, dtype=torch.bool, device=block.device),
        )

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.bidirectional.shape[1]

    def open_blocks(self, parents: torch.Tensor, seen: torch.Tensor, *, bidirectional: bool) -> Visibility:
        """Room for J new blocks, which get their tokens with `append`; they are isolated from each other.

        Args:
            parents: `(B, J)` block each one hangs off; what the parent sees stays visible.
            seen: `(B, J)` exclusive bound on the positions of the parent's tokens.
            bidirectional: whether the tokens of a new block see each other in both directions.
        """
        batch, old = self.bidirectional.shape
        new = parents.shape[1]
        reach = self.reach.new_zeros(batch, old + new, old + new)
        reach[:, :old, :old] = self.reach
        inherited = self.reach.gather(1, parents[..., None].expand(-1, -1, old))  # (B, J, K)
        reach[:, old:, :old] = inherited.scatter(2, parents[..., None], seen[..., None])
        flags = self.bidirectional.new_full((batch, new), bidirectional)
        return Visibility(self.block, reach, torch.cat([self.bidirectional, flags], dim=1))

    def append(self, block: torch.Tensor) -> Visibility:
        """More tokens at the end, of the blocks `block` `(B, M)`; -1 is padding."""
        return replace(self, block=torch.cat([self.block, block], dim=1))

    def with_block(self, parent: int, length: int, *, seen: int | torch.Tensor, bidirectional: bool) -> Visibility:
        """One new block of `length` tokens behind `parent` in every sequence; `seen` is one bound, or `(B,)` of them."""
        batch, count = self.bidirectional.shape
        bounds = torch.as_tensor(seen, device=self.block.device).expand(batch)[:, None]
        parents = torch.full_like(bounds, parent)
        opened = self.open_blocks(parents, bounds, bidirectional=bidirectional)
        return opened.append(self.block.new_full((batch, length), count))

    def allowed(self, num_queries: int | None = None) -> torch.Tensor:
        """`(B, N, S)` bool of the last `num_queries` tokens (all when None).

        Padding rows, which nobody reads, see the real tokens before them, as stock causal masks have it.
        """
        length = self.block.shape[1]
        first = 0 if num_queries is None else length - num_queries
        keys = torch.arange(length, device=self.block.device)
        queries = keys[first:]
        query_block = self.block[:, first:]
        before = keys <= queries[:, None]  # (N, S)
        is_real = (self.block >= 0)[:, None]  # (B, 1, S)
        # What each block sees, wherever its token stands, and what it sees only behind itself; nothing of size N x S is wider
        # than a bool.
        own = self.block[:, None] == torch.arange(self.num_blocks, device=keys.device)[:, None]  # (B, K, S)
        bound = self.reach.gather(2, self.block.clamp(min=0)[:, None].expand(-1, self.num_blocks, -1))  # (B, K, S)
        always = ((~own & (keys < bound)) | (own & self.bidirectional[..., None])) & is_real
        index = query_block.clamp(min=0)[..., None].expand(-1, -1, length)  # (B, N, S), a view
        seen = always.gather(1, index) | (own.gather(1, index) & before)
        seen = torch.where((query_block >= 0)[..., None], seen, before & is_real)
        # A row without any key is NaN under softmax: such padding attends to itself.
        return seen | (~seen.any(-1, keepdim=True) & (keys == queries[:, None]))

    def render(
        self, implementation: str, dtype: torch.dtype = torch.float32, num_queries: int | None = None
    ) -> torch.Tensor | BlockMask:
        """The mask that the attention implementation honours.

        Returns:
            `(B, 1, N, S)`, bool for SDPA, additive for eager; a block mask of this shape for FlexAttention.

        Raises:
            ValueError: for implementations that would silently ignore it.
        """
        check_attention(implementation)
        if implementation == "flex_attention":
            return self._block_mask(num_queries)
        allowed = self.allowed(num_queries)[:, None]
        if implementation == "sdpa":
            return allowed
        # eager adds the mask to the scores, where a bool mask would be silently wrong
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def _block_mask(self, num_queries: int | None) -> BlockMask:
        """The rule of `allowed` as a function of indices; only the flags of its blocks of tokens are kept."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, length = self.block.shape
        count = length if num_queries is None else num_queries
        first = length - count
        block, reach, both_ways = self.block, self.reach, self.bidirectional
        is_alone = (block >= 0).cumsum(1) == 0  # padding before every real token; sees itself, so that no row is empty

        def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
            query = q + first
            q_block, k_block = block[b, query], block[b, k]
            i, j = q_block.clamp(min=0), k_block.clamp(min=0)
            is_before = k <= query
            seen = torch.where(i == j, is_before | both_ways[b, i], k < reach[b, i, j])
            return (torch.where(q_block >= 0, seen, is_before) & (k_block >= 0)) | (is_alone[b, query] & (k == query))

        return create_block_mask(visible, B=batch, H=None, Q_LEN=count, KV_LEN=length, device=str(block.device))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Visibility:
        """The same pattern on `device`."""
        moved = {item.name: getattr(self, item.name).to(device, non_blocking=non_blocking) for item in fields(self)}
        return replace(self, **moved)

    def select(self, rows: torch.Tensor) -> Visibility:
        """The pattern of some sequences, in the order (and multiplicity) of `rows`."""
        return Visibility(self.block[rows], self.reach[rows], self.bidirectional[rows])

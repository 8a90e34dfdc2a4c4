"""Who may attend to whom: one object for training, prefill and cached inference.

Tokens belong to blocks. A token sees (1) its own block, causally or - in a bidirectional block - entirely, and (2) of every
other block the tokens before a bound, which is zero for blocks it must not see. That covers a plain causal sequence, padding,
a bidirectional mask span, the isolated branches behind a shared image prefix, and mask blocks hanging off a dialogue.

Legend: B sequences, N query tokens, S key tokens, K blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


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

    def with_block(self, parent: int, length: int, *, seen: int, bidirectional: bool) -> Visibility:
        """Append a block of `length` tokens that sees the positions before `seen` of `parent` and what those see.

        Args:
            parent: block it hangs off; the blocks that the parent sees stay visible.
            length: number of tokens appended to every sequence.
            seen: exclusive bound on the positions of the parent's tokens.
            bidirectional: whether the new tokens see each other in both directions.
        """
        batch, count = self.bidirectional.shape
        block = torch.cat([self.block, self.block.new_full((batch, length), count)], dim=1)
        reach = self.reach.new_zeros(batch, count + 1, count + 1)
        reach[:, :count, :count] = self.reach
        reach[:, count, :count] = self.reach[:, parent]
        reach[:, count, parent] = seen
        flag = self.bidirectional.new_full((batch, 1), bidirectional)
        return Visibility(block, reach, torch.cat([self.bidirectional, flag], dim=1))

    def allowed(self, num_queries: int | None = None) -> torch.Tensor:
        """`(B, N, S)` bool of the last `num_queries` tokens (all when None).

        Padding rows, which nobody reads, see the real tokens before them, as stock causal masks have it.
        """
        length = self.block.shape[1]
        first = 0 if num_queries is None else length - num_queries
        key_block = self.block
        query_block = self.block[:, first:]
        keys = torch.arange(length, device=self.block.device)
        queries = keys[first:]
        q = query_block.clamp(min=0)  # (B, N)
        k = key_block.clamp(min=0)  # (B, S)
        rows = self.reach.gather(1, q[..., None].expand(-1, -1, self.reach.shape[-1]))  # (B, N, K)
        bound = rows.gather(2, k[:, None].expand(-1, q.shape[1], -1))  # (B, N, S)
        both_ways = self.bidirectional.gather(1, q)[..., None]
        own = (q[..., None] == k[:, None]) & ((keys <= queries[:, None]) | both_ways)
        other = (q[..., None] != k[:, None]) & (keys < bound)
        is_query = (query_block >= 0)[..., None]
        seen = torch.where(is_query, own | other, keys <= queries[:, None]) & (key_block >= 0)[:, None]
        # A row without any key is NaN under softmax: such padding attends to itself.
        return seen | (~seen.any(-1, keepdim=True) & (keys == queries[:, None]))

    def render(
        self, implementation: str, dtype: torch.dtype = torch.float32, num_queries: int | None = None
    ) -> torch.Tensor:
        """The 4-D mask `(B, 1, N, S)` that the attention implementation honours: bool for SDPA, additive for eager.

        Raises:
            ValueError: for implementations that would silently ignore it.
        """
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"attention implementation '{implementation}' ignores a visibility; "
                f"load the model with attention set to one of {', '.join(ATTENTION_IMPLEMENTATIONS)}"
            )
        allowed = self.allowed(num_queries)[:, None]
        if implementation == "sdpa":
            return allowed
        # eager adds the mask to the scores, where a bool mask would be silently wrong
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Visibility:
        """The same pattern on `device`."""
        moved = {item.name: getattr(self, item.name).to(device, non_blocking=non_blocking) for item in fields(self)}
        return replace(self, **moved)

    def select(self, rows: torch.Tensor) -> Visibility:
        """The pattern of some sequences, in the order (and multiplicity) of `rows`."""
        return Visibility(self.block[rows], self.reach[rows], self.bidirectional[rows])

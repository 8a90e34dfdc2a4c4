"""One prefix, many suffixes: the cached state of an image and everything that was said about it so far.

The branches of an image lie behind its prefix in the same cache row, as isolated blocks: nothing is copied per branch, and the
attention pattern is the very object that training packs with. Legend: B images, S cached tokens, K blocks, J new blocks, M new
tokens, L prefix tokens, T image tokens, D width.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmseg_llm.backbones.visibility import Visibility

if TYPE_CHECKING:
    from mmseg_llm.backbones.features import VisionFeatures


@dataclass(frozen=True)
class Mark:
    """A point to return to with `Prefix.rollback`."""

    length: int
    visibility: Visibility
    positions: torch.Tensor
    next_position: torch.Tensor


@dataclass
class Prefix:
    """Key-value cache with its visibility, positions and image features.

    Attributes:
        cache: transformers `DynamicCache` of S tokens.
        visibility: pattern of the S cached tokens.
        positions: `(B, S)` rotary position of each cached token (its place in time where there are several axes).
        next_position: `(B, K)` rotary position of the next token of each block.
        states: `(B, L, D)` post-norm states of the shared prefix.
        image_positions: `(B, T)` positions of the image tokens, -1 at padding.
        features: of the vision tower.
    """

    cache: Any
    visibility: Visibility
    positions: torch.Tensor
    next_position: torch.Tensor
    states: torch.Tensor
    image_positions: torch.Tensor
    features: VisionFeatures

    @property
    def length(self) -> int:
        """Number of cached tokens per row, padding included."""
        return self.visibility.block.shape[1]

    def open_branches(self, count: int) -> int:
        """Add `count` isolated causal blocks behind the shared prefix; returns the index of the first one."""
        parents = self.positions.new_zeros(len(self.positions), count)
        starts = self.next_position[:, :1].expand(-1, count)
        return self.open_blocks(parents, torch.full_like(parents, self.length), starts, bidirectional=False)

    def open_blocks(
        self, parents: torch.Tensor, seen: torch.Tensor, starts: torch.Tensor, *, bidirectional: bool
    ) -> int:
        """Add blocks that hang off others.

        Args:
            parents: `(B, J)` block of the last visible token of each.
            seen: `(B, J)` exclusive bound on the visible tokens of the parent, as places in the cache; these may be places
                that the parent's next tokens are about to take.
            starts: `(B, J)` rotary position of the first token of each.
            bidirectional: whether their tokens see each other in both directions.

        Returns:
            Index of the first new block.
        """
        first = self.visibility.num_blocks
        self.visibility = self.visibility.open_blocks(parents, seen, bidirectional=bidirectional)
        self.next_position = torch.cat([self.next_position, starts], dim=1)
        return first

    def append(self, block: torch.Tensor) -> torch.Tensor:
        """Register new tokens `block` `(B, M)` (-1 is padding); returns their rotary positions `(B, M)`."""
        count = self.next_position.shape[1]
        kept = torch.where(block >= 0, block, count)  # padding is counted apart
        counts = block.new_zeros(len(block), count + 1).scatter_add(1, kept, torch.ones_like(block))  # (B, K + 1)
        order = kept.argsort(dim=1, stable=True)  # block after block, each in the order of its tokens
        before = (counts.cumsum(1) - counts).gather(1, kept.gather(1, order))
        rank = torch.arange(block.shape[1], device=block.device) - before
        rank = torch.empty_like(block).scatter(1, order, rank)  # (B, M) within the block
        positions = self.next_position.gather(1, block.clamp(min=0)) + rank.masked_fill(block < 0, 0)
        self.next_position = self.next_position + counts[:, :count]
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.visibility = self.visibility.append(block)
        return positions

    def mark(self) -> Mark:
        """Remember this point."""
        return Mark(self.length, self.visibility, self.positions, self.next_position)

    def rollback(self, mark: Mark) -> None:
        """Forget everything after `mark`, exactly."""
        surplus = self.length - mark.length
        if surplus:
            self.cache.crop(-surplus)
        self.visibility, self.positions, self.next_position = mark.visibility, mark.positions, mark.next_position

    def fork(self, rows: torch.Tensor, *, is_light: bool = False) -> Prefix:
        """An independent copy of some rows, in the order (and multiplicity) of `rows`; this prefix stays as it is.

        Args:
            rows: to copy.
            is_light: leave out what only heads that read features and states of the prefix need; `states` then holds one token.
        """
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]  # selecting gives them new tensors
        cache.batch_select_indices(rows)
        return Prefix(
            cache=cache,
            visibility=self.visibility.select(rows),
            positions=self.positions[rows],
            next_position=self.next_position[rows],
            states=self.states[:, -1:][rows] if is_light else self.states[rows],
            image_positions=self.image_positions[rows],
            features=self.features if is_light else self.features.select(rows),
        )

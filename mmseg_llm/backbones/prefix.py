"""One prefix, many suffixes: the cached state of an image and everything that was said about it so far.

The branches of an image lie behind its prefix in the same cache row, as isolated blocks: nothing is copied per branch, and the
attention pattern is the very object that training packs with. Legend: B images, S cached tokens, K blocks, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from mmseg_llm.backbones.visibility import Visibility

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import VisionFeatures


@dataclass(frozen=True)
class Mark:
    """A point to return to with `Prefix.rollback`."""

    length: int
    visibility: Visibility
    next_position: torch.Tensor


@dataclass
class Prefix:
    """Key-value cache with its visibility, positions and image features.

    Attributes:
        cache: transformers `DynamicCache` of S tokens.
        visibility: pattern of the S cached tokens.
        next_position: `(B, K)` rotary position of the next token of each block.
        states: `(B, L, D)` post-norm states of the shared prefix.
        image_positions: `(B, T)` positions of the image tokens.
        features: of the vision tower.
    """

    cache: Any
    visibility: Visibility
    next_position: torch.Tensor
    states: torch.Tensor
    image_positions: torch.Tensor
    features: VisionFeatures

    @property
    def length(self) -> int:
        """Number of cached tokens per row, padding included."""
        return self.visibility.block.shape[1]

    def open_branches(self, count: int) -> int:
        """Add `count` isolated blocks that see all blocks there are now; returns the index of the first one."""
        old = self.visibility
        batch, first = old.bidirectional.shape
        reach = old.reach.new_zeros(batch, first + count, first + count)
        reach[:, :first, :first] = old.reach
        reach[:, first:, 0] = self.length
        flags = old.bidirectional.new_zeros(batch, count)
        self.visibility = Visibility(old.block, reach, torch.cat([old.bidirectional, flags], dim=1))
        self.next_position = torch.cat([self.next_position, self.next_position[:, :1].expand(-1, count)], dim=1)
        return first

    def append(self, block: torch.Tensor) -> torch.Tensor:
        """Register new tokens `block` `(B, M)` (-1 is padding); returns their rotary positions `(B, M)`."""
        count = self.next_position.shape[1]
        member = torch.nn.functional.one_hot(block.clamp(min=0), count) * (block >= 0)[..., None]  # (B, M, K)
        rank = (member.cumsum(1) - 1).gather(2, block.clamp(min=0)[..., None])[..., 0]
        positions = self.next_position.gather(1, block.clamp(min=0)) + rank.clamp(min=0)
        self.next_position = self.next_position + member.sum(1)
        self.visibility = replace(self.visibility, block=torch.cat([self.visibility.block, block], dim=1))
        return positions

    def mark(self) -> Mark:
        """Remember this point."""
        return Mark(self.length, self.visibility, self.next_position)

    def rollback(self, mark: Mark) -> None:
        """Forget everything after `mark`, exactly."""
        surplus = self.length - mark.length
        if surplus:
            self.cache.crop(-surplus)
        self.visibility, self.next_position = mark.visibility, mark.next_position

    def fork(self, rows: torch.Tensor) -> Prefix:
        """An independent copy of some rows, in the order (and multiplicity) of `rows`; this prefix stays as it is."""
        from copy import deepcopy

        cache = deepcopy(self.cache)
        cache.batch_select_indices(rows)
        return Prefix(
            cache=cache,
            visibility=self.visibility.select(rows),
            next_position=self.next_position[rows],
            states=self.states[rows],
            image_positions=self.image_positions[rows],
            features=self.features.select(rows),
        )


@dataclass
class Generated:
    """What `Backbone.generate` returns.

    Attributes:
        ids: `ids[row][branch]` generated token ids, the end token included when it was reached.
        states: `states[row][branch]` `(T, D)`: the state that emitted each of these tokens.
    """

    ids: list[list[list[int]]]
    states: list[list[torch.Tensor]] = field(default_factory=list)

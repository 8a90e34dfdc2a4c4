"""What a vision tower gives: features of a batch of images, padded where their grids differ.

Legend: B images, P patches, T image tokens, V vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmseg_llm.masks import Size


@dataclass(frozen=True)
class VisionFeatures:
    """Both views of an image that heads use.

    Attributes:
        patches: `(B, P, V)` patch tokens of the last vision layer, raster order, before the projector.
        tokens: `(B, T, D)` projected tokens, raster order, as the language model gets them.
        grids: rows and columns of the image tokens of each image; what lies behind them is zero padding.
        deep: `(B, T, D)` each, added behind the first language layers (DeepStack); empty for most families.
    """

    patches: torch.Tensor
    tokens: torch.Tensor
    grids: tuple[Size, ...]
    deep: tuple[torch.Tensor, ...] = ()

    def select(self, rows: torch.Tensor) -> VisionFeatures:
        """Features of some rows, in the order (and multiplicity) of `rows`."""
        return VisionFeatures(
            self.patches[rows],
            self.tokens[rows],
            tuple(self.grids[row] for row in rows.tolist()),
            tuple(layer[rows] for layer in self.deep),
        )


def gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`states` `(B, N, D)` at `positions` `(B, T)`, as `(B, T, D)`; zero where a position is negative (padding)."""
    picked = states.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
    return picked.masked_fill((positions < 0)[..., None], 0) if (positions < 0).any() else picked


def scatter(into: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`into` `(B, N, D)` with `values` `(B, T, D)` at `positions` `(B, T)`; those at negative positions are left out."""
    index = positions.masked_fill(positions < 0, into.shape[1])[..., None].expand(-1, -1, into.shape[-1])
    room = torch.cat([into, into.new_zeros(len(into), 1, into.shape[-1])], dim=1)
    return room.scatter(1, index, values.to(into.dtype))[:, :-1]


def split_rows(flat: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows of images one after the other, `(sum of counts, D)`, as a padded `(B, max, D)`."""
    if len(set(counts)) == 1:
        return flat.unflatten(0, (len(counts), counts[0]))
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(counts)), batch_first=True)

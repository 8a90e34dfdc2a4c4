"""DySample: learned 2x upsampling by point sampling (MLLMSeg specification section 2.2; style "lp").

Legend: B batch, C channels, G groups, H W low-resolution grid, s scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn


class DySample(nn.Module):
    """Each output cell samples the input bilinearly at a learned offset from its own place; zero offsets are plain bilinear.

    Args:
        channels: C, a multiple of `groups`.
        scale: s.
        groups: channels are split into groups with offsets of their own.
        grid_in_float32: compute sampling positions in float32 whatever the input type (the reference computes them in bf16,
            which moves them by up to 0.06 source pixel).
    """

    init_pos: torch.Tensor

    def __init__(self, channels: int, scale: int = 2, groups: int = 4, grid_in_float32: bool = True) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be split into {groups} groups; use a multiple")
        self.scale, self.groups, self.grid_in_float32 = scale, groups, grid_in_float32
        self.offset = nn.Conv2d(channels, 2 * groups * scale**2, 1)
        step = (torch.arange(scale) - (scale - 1) / 2) / scale  # positions of the sub-cells around the centre
        x = step.expand(scale, scale)  # sub-column j
        pos = torch.stack([x, x.T])[:, None].expand(2, groups, scale, scale)  # (axis, G, i, j)
        self.register_buffer("init_pos", pos.reshape(1, -1, 1, 1).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample `(B, C, H, W)` to `(B, C, s H, s W)`."""
        batch, _, height, width = x.shape
        offset = 0.25 * self.offset(x) + self.init_pos  # (B, 2 G s s, H, W)
        if self.grid_in_float32:
            offset = offset.float()
        # channel index = ((axis * G + group) * s + i) * s + j: shuffle the (i, j) pairs onto the fine grid
        offset = functional.pixel_shuffle(offset.unflatten(1, (2 * self.groups, -1)).flatten(1, 2), self.scale)
        offset = offset.unflatten(1, (2, self.groups))  # (B, axis, G, s H, s W)
        centres = self._centres(height, width, offset)  # (axis, H, W)
        fine = centres.repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)[None, :, None]
        size = offset.new_tensor([width, height]).view(1, 2, 1, 1, 1)
        grid = (2 * (fine + offset) / size - 1).permute(0, 2, 3, 4, 1).flatten(0, 1)  # (B G, s H, s W, 2)
        # bf16 on CPU gave NaN on non-contiguous single images
        groups = x.reshape(batch * self.groups, -1, height, width).contiguous()
        sampled = _sample(groups.to(grid.dtype), grid).to(groups.dtype)
        return sampled.reshape(batch, -1, self.scale * height, self.scale * width)

    @staticmethod
    def _centres(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
        columns = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
        return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])


def _sample(values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return functional.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)

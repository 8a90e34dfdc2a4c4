"""Vision tower and resampler of Qwen-VL-Chat (SegAgent specification section 10.1); parameter names are the official ones,
but for `attn.in_proj`, whose rows lie in blocks of queries, keys and values here (see `qwen_vl_chat_layout`).

Legend: B images, P patches, T image tokens, S rows of a table of positions, V vision width, D language width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmseg_llm.masks import Size


def resize_positions(table: torch.Tensor, grid: Size) -> torch.Tensor:
    """A square table of positions for another grid, bicubic in float32; the table itself is never changed.

    Args:
        table: `(S, width)`, raster order, S a square.
        grid: rows and columns.

    Returns:
        `(rows * columns, width)` of the type of the table.
    """
    side = math.isqrt(len(table))
    if grid == (side, side):
        return table
    image = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, width, side, side)
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.to(table.dtype)


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions `(side * side, width)`: the column in the first half of the width, the row in the other.

    Each half holds the sines of all frequencies, then their cosines.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], -1)  # (side, width / 2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1).float()


class VisionAttention(nn.Module):
    """Full self-attention over patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Attend within each image `(B, P, V)`."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(states).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, P, V / heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Token by token `(B, P, V)`."""
        return self.c_proj(F.gelu(self.c_fc(states)))


class VisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = VisionAttention(width, config.num_attention_heads)
        self.mlp = VisionMlp(width, config.intermediate_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """One layer `(B, P, V)`."""
        states = states + self.attn(self.ln_1(states))
        return states + self.mlp(self.ln_2(states))


class VisionTower(nn.Module):
    """ViT without a class token and without a norm at its end.

    Args:
        config: `QwenVlChatVisionConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.num_positions, config.hidden_size))
        self.ln_pre = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch states `(B, P, V)`, raster order, of `(B, 3, h, w)`."""
        patches = self.conv1(pixels.to(self.conv1.weight.dtype))
        grid = (patches.shape[2], patches.shape[3])
        states = patches.flatten(2).transpose(1, 2)  # (B, P, V)
        states = self.ln_pre(states + resize_positions(self.positional_embedding, grid))
        for block in self.blocks:
            states = block(states)
        return states


class AttentionPool(nn.Module):
    """Learned queries that attend to all patches once; positions are added to queries and keys, not to values.

    Args:
        config: `QwenVlChatVisionConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.output_size, config.layer_norm_eps
        self.query = nn.Parameter(torch.zeros(config.num_queries, width))
        # a buffer: it never trains, whatever is unfrozen
        self.register_buffer("pos_embed", sine_positions(math.isqrt(config.num_queries), width))
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.num_pool_heads, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, T, D)` of square grids of patches `(B, P, V)`."""
        side = math.isqrt(patches.shape[1])
        positions: Any = self.pos_embed
        values = self.ln_kv(self.kv_proj(patches))  # (B, P, D)
        keys = values + resize_positions(positions, (side, side))
        queries = (self.ln_q(self.query) + positions)[None].expand(len(patches), -1, -1)
        return self.attn(queries, keys, values, need_weights=False)[0]


class Resampler(nn.Module):
    """From patches to the tokens of the language model.

    Args:
        config: `QwenVlChatVisionConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.attn_pool = AttentionPool(config)
        self.ln_post = nn.LayerNorm(config.output_size, config.layer_norm_eps)
        self.proj = nn.Parameter(torch.zeros(config.output_size, config.output_size))  # multiplied from the right

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, P, V)` to `(B, T, D)`."""
        return self.ln_post(self.attn_pool(patches)) @ self.proj

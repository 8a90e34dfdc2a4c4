"""SimpleClick: a plain vision transformer that segments what clicks point at (arXiv 2210.11006).

Parameters carry the official state-dict names (SegAgent specification section 11). What official files hold but no forward
pass reads is dropped on loading.

Legend: B batch, C channels, D width, N tokens, P points per sign, S side of the square input, g = S / patch tokens per side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

# Colour statistics (0 to 1) of ImageNet, applied inside of the network.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CLICK_RADIUS = 5.0
# Windows have the side of a 224 pixel image, which the backbone was pre-trained on.
WINDOW_PIXELS = 224
UNUSED = ("backbone.cls_token", "backbone.fc_norm.", "backbone.head.", "head.up_conv1.", "head.up_conv2.")


@dataclass(frozen=True)
class SimpleClickSize:
    """Sizes of a network.

    Attributes:
        width: D of the backbone.
        depth, heads: of the backbone.
        patch: side of a patch in pixels.
        levels: channels of the pyramid at strides 4, 8, 16, 32.
        head_channels: width of the segmentation head.
        position_side: S that the position embedding is stored for.
        click_radius: of the disk drawn around a click, in pixels of the input.
    """

    width: int
    depth: int
    heads: int
    patch: int
    levels: tuple[int, int, int, int]
    head_channels: int = 256
    position_side: int = 448
    click_radius: float = CLICK_RADIUS

    @property
    def global_every(self) -> int:
        """Every how many blocks attention spans the whole image."""
        return 6 if self.depth == 12 else max(1, self.depth // 4)


SIZES = {
    "test": SimpleClickSize(16, 8, 2, 16, (8, 8, 16, 16), head_channels=8, position_side=64),
    # Not official: for one CPU thread. Inputs of S = 96; the disk covers the same share of a patch as it does officially.
    "tiny": SimpleClickSize(128, 6, 2, 8, (24, 48, 64, 64), head_channels=24, position_side=96, click_radius=2.5),
    "xtiny": SimpleClickSize(160, 8, 4, 16, (96, 192, 288, 384), head_channels=128),
    "base": SimpleClickSize(768, 12, 12, 16, (128, 256, 512, 1024)),
    "large": SimpleClickSize(1024, 24, 16, 16, (192, 384, 768, 1536)),
    "huge": SimpleClickSize(1280, 32, 16, 14, (240, 480, 960, 1920)),
}


def interpolate_positions(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Position embedding `(1, 1 + N, D)` for another grid `(1, 1 + grid^2, D)`: bicubic, the class row is kept."""
    old = round((embedding.shape[1] - 1) ** 0.5)
    if old == grid:
        return embedding
    maps = embedding[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, old, old)
    maps = functional.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((embedding[:, :1], maps.flatten(2).transpose(1, 2)), dim=1)


def click_disks(points: torch.Tensor, size: tuple[int, int], radius: float = CLICK_RADIUS) -> torch.Tensor:
    """Where a click is near: float 0/1 `(B, 2, H, W)`, positive clicks first.

    Args:
        points: float `(B, 2P, 3)` of (row, col, order), P positive ones and then P negative ones, padded with -1.
        size: `(H, W)`.
        radius: how far "near" reaches, in pixels.
    """
    points = points.unflatten(1, (2, -1))  # (B, 2, P, 3)
    rows = torch.arange(size[0], device=points.device, dtype=points.dtype)
    cols = torch.arange(size[1], device=points.device, dtype=points.dtype)
    row_distance = (rows - points[..., 0, None]).square()  # (B, 2, P, H)
    col_distance = (cols - points[..., 1, None]).square()  # (B, 2, P, W)
    near = row_distance[..., :, None] + col_distance[..., None, :] <= radius**2  # (B, 2, P, H, W)
    is_valid = points[..., :2].amax(-1) >= 0
    return (near & is_valid[..., None, None]).any(2).to(points.dtype)


class PatchEmbed(nn.Module):
    """Pixels to tokens."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` of `(B, 3, S, S)`, row by row."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, N, D)`; all tokens of a row see each other."""
        query, key, value = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, d)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(..., D)` to `(..., D)`."""
        return self.fc2(functional.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Backbone(nn.Module):
    """Vision transformer whose blocks attend within windows, a few of them globally."""

    def __init__(self, size: SimpleClickSize) -> None:
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbed(size.width, size.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size.position_side // size.patch) ** 2, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))

    def windows(self, side: int) -> tuple[int, int]:
        """Windows per side and tokens per window side of an input of S = `side`.

        Raises:
            ValueError: if patches or windows do not tile it.
        """
        grid = side // self.size.patch
        count = max(1, grid // (WINDOW_PIXELS // self.size.patch))
        if side % self.size.patch or grid % count or not grid:
            raise ValueError(
                f"side {side} is not tiled by patches of {self.size.patch} and equal windows; use 448 or 672"
            )
        return count, grid // count

    def forward(self, pixels: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Last feature map.

        Args:
            pixels: normalised colours `(B, 3, S, S)`.
            added: `(B, N, D)`, added to the patch tokens.

        Returns:
            `(B, D, g, g)`.
        """
        count, side = self.windows(pixels.shape[-1])
        grid = count * side
        tokens = self.patch_embed(pixels) + added + interpolate_positions(self.pos_embed, grid)[:, 1:]
        # Attention does not care for the order of tokens: sorted by window once, both kinds of blocks are mere views.
        tokens = tokens.unflatten(1, (count, side, count, side)).transpose(2, 3).flatten(1, 4)  # (B, N, D)
        for index, block in enumerate(self.blocks):
            is_global = (index + 1) % self.size.global_every == 0
            rows = tokens if is_global else tokens.reshape(-1, side * side, self.size.width)
            tokens = block(rows).reshape_as(tokens)
        maps = tokens.unflatten(1, (count, count, side, side)).transpose(2, 3)
        return maps.reshape(-1, grid, grid, self.size.width).permute(0, 3, 1, 2)


def _project(kind: type[nn.Module], channels: int, out: int, **options: int) -> list[nn.Module]:
    """A convolution of some kind and its norm, over all channels at once."""
    return [kind(channels, out, **options), nn.GroupNorm(1, out)]


class Pyramid(nn.Module):
    """Feature maps at strides 4, 8, 16, 32 from the one map of the backbone (strides for patches of 16)."""

    def __init__(self, size: SimpleClickSize) -> None:
        super().__init__()
        width, (first, second, third, fourth) = size.width, size.levels
        wide4, wide8, wide32 = max(2 * first, width // 2), max(second, width // 2), max(fourth, 2 * width)
        half = {"kernel_size": 2, "stride": 2}
        point = {"kernel_size": 1}
        self.down_4 = nn.Sequential(
            *_project(nn.ConvTranspose2d, width, wide4, **half),
            nn.GELU(),
            *_project(nn.ConvTranspose2d, wide4, wide4 // 2, **half),
            *_project(nn.Conv2d, wide4 // 2, first, **point),
            nn.GELU(),
        )
        up, down = _project(nn.ConvTranspose2d, width, wide8, **half), _project(nn.Conv2d, width, wide32, **half)
        self.down_8 = nn.Sequential(*up, *_project(nn.Conv2d, wide8, second, **point), nn.GELU())
        self.down_16 = nn.Sequential(*_project(nn.Conv2d, width, third, **point), nn.GELU())
        self.down_32 = nn.Sequential(*down, *_project(nn.Conv2d, wide32, fourth, **point), nn.GELU())

    def forward(self, maps: torch.Tensor) -> list[torch.Tensor]:
        """Four maps, the finest first, of `(B, D, g, g)`."""
        return [self.down_4(maps), self.down_8(maps), self.down_16(maps), self.down_32(maps)]


class ConvRelu(nn.Module):
    """1x1 convolution and ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`(B, C, h, w)` to `(B, out, h, w)`."""
        return functional.relu(self.conv(maps))


class SegmentationHead(nn.Module):
    """One logit per cell of the finest level."""

    def __init__(self, levels: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvRelu(level, channels) for level in levels)
        self.fusion_conv = ConvRelu(channels * len(levels), channels)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, 1, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Logits `(B, 1, 4g, 4g)`."""
        size = levels[0].shape[-2:]
        resized = [
            functional.interpolate(conv(level), size=size, mode="bilinear", align_corners=False)
            for conv, level in zip(self.convs, levels, strict=True)
        ]
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(resized, 1))))


class SimpleClick(nn.Module):
    """Logits from an image, the previous prediction and all clicks.

    Args:
        size: a name of `SIZES`, or sizes of one's own.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, size: SimpleClickSize | str = "large") -> None:
        super().__init__()
        if isinstance(size, str):
            if size not in SIZES:
                raise ValueError(f"SimpleClick has no size '{size}'; choose from {', '.join(SIZES)}")
            size = SIZES[size]
        self.size = size
        self.patch_embed_coords = PatchEmbed(size.width, size.patch)
        self.backbone = Backbone(size)
        self.neck = Pyramid(size)
        self.head = SegmentationHead(size.levels, size.head_channels)
        self.register_load_state_dict_pre_hook(_drop_unused)

    def features(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Backbone output `(B, D, g, g)`; arguments as of `forward`."""
        pixels, previous = inputs[:, :3], inputs[:, 3:]
        pixels = (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[:, None, None]
        size = (inputs.shape[-2], inputs.shape[-1])
        disks = click_disks(points.to(inputs), size, self.size.click_radius)
        coordinates = torch.cat((previous, disks), 1)  # (B, 3, S, S)
        return self.backbone(pixels, self.patch_embed_coords(coordinates))

    def forward(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Segment.

        Args:
            inputs: float `(B, 4, S, S)`: RGB in 0..1 and the previous probability.
            points: float `(B, 2P, 3)` of (row, col, order) in pixels of S, positive ones first, padded with -1.

        Returns:
            Logits `(B, 1, S, S)`.

        Raises:
            ValueError: if the input is not square, has other channels, or is not tiled by windows.
        """
        side = inputs.shape[-1]
        if inputs.ndim != 4 or inputs.shape[1] != 4 or inputs.shape[2] != side:
            raise ValueError(f"SimpleClick takes (B, 4, S, S), got {tuple(inputs.shape)}; resize the crop to a square")
        if points.ndim != 3 or points.shape[1] % 2 or not points.shape[1]:
            raise ValueError(
                f"points must be (B, 2P, 3), got {tuple(points.shape)}; pad both signs to the same P with -1"
            )
        logits = self.head(self.neck(self.features(inputs, points)))  # (B, 1, 4g, 4g)
        return functional.interpolate(logits, size=(side, side), mode="bilinear", align_corners=True)


def _drop_unused(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Forget what official files hold but nothing reads, so that strict loading stays strict about all the rest."""
    for key in [key for key in state if key.startswith(tuple(prefix + name for name in UNUSED))]:
        del state[key]

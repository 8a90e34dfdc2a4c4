"""The network of the head: detail-enhanced semantic-consistent feature fusion (DSFF) and the light-weight mask decoder.

MLLMSeg specification sections 2 and 3. Module names are those of the reference, so a released head loads by its own keys.
Everything up to the text is computed once per image, the rest once per expression.

Legend: I images, Q queries, P patches (p x p grid), T image tokens (t x t grid), V vision width, D language width, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

from mmseg_llm.heads.mask_decoder.dysample import DySample


class FusionBlock(nn.Module):
    """One post-norm decoder layer behind which a last LayerNorm stands (specification section 2.1)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, ffn, dropout, "relu", batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(width))

    def forward(self, target: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """`target` `(I, P, C)` attends to itself, then to `memory` `(I, T, C)`."""
        return self.decoder(target, memory)

    def before_memory(self, target: torch.Tensor) -> torch.Tensor:
        """The part that does not depend on the memory: self-attention and its norm, `(I, P, C)`."""
        layer = self.decoder.layers[0]
        attended = layer.self_attn(target, target, target, need_weights=False)[0]
        return layer.norm1(target + layer.dropout1(attended))

    def after_single_memory(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """The rest, for a memory of one token `(Q, C)`: softmax over one key is 1, so attention is one added vector.

        Args:
            x: `before_memory` of each query's image, `(Q, P, C)`.
            memory: `(Q, C)`.
        """
        layer = self.decoder.layers[0]
        attention = layer.multihead_attn
        width = memory.shape[-1]
        value = functional.linear(memory, attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
        added = attention.out_proj(value)[:, None]  # (Q, 1, C)
        x = layer.norm2(x + layer.dropout2(added))
        hidden = layer.dropout(functional.relu(layer.linear1(x)))
        x = layer.norm3(x + layer.dropout3(layer.linear2(hidden)))
        norm = self.decoder.norm
        assert norm is not None
        return norm(x)


class MaskDecoder(nn.Module):
    """From vision patches, language states of the image tokens and one state per expression to mask logits.

    Args:
        vision_width: V.
        text_width: D.
        patch: side of a vision patch in canvas pixels; the output has the canvas' size.
        width: C; None takes V, as in the reference. Another width projects the patches first.
        heads: attention heads.
        ffn: hidden width of the feed-forward parts; None takes C.
        dropout: of both blocks.
        merge: p / t.
        groups: of DySample.
        grid_in_float32: see `DySample`.
        offset_init: standard deviation of DySample's offset weights; None is the reference's Xavier init.
    """

    def __init__(
        self,
        *,
        vision_width: int,
        text_width: int,
        patch: int = 14,
        width: int | None = None,
        heads: int = 8,
        ffn: int | None = None,
        dropout: float = 0.1,
        merge: int = 2,
        groups: int = 4,
        grid_in_float32: bool = True,
        offset_init: float | None = None,
    ) -> None:
        super().__init__()
        width = width or vision_width
        self.patch = patch
        self.img_vit_down = nn.Identity() if width == vision_width else nn.Linear(vision_width, width)
        self.img_llm_down = nn.Linear(text_width, width)
        self.text_down = nn.Linear(text_width, width)
        self.ca_layer_v2l = FusionBlock(width, heads, ffn or width, dropout)
        self.upsample_adapter_l = DySample(width, merge, groups, grid_in_float32)
        self.text_out_adapter = nn.Linear(3 * width, width)
        self.ca_layer_vl = FusionBlock(width, heads, ffn or width, dropout)
        self.conv1 = nn.Sequential(nn.Conv2d(width, patch**2, 3, padding=1), nn.BatchNorm2d(patch**2), nn.ReLU())
        self.conv2 = nn.Conv2d(1, 1, 5, padding=2)
        self._initialise(offset_init)

    def _initialise(self, offset_init: float | None) -> None:
        """Xavier-uniform for all weight matrices, DySample's offsets included (specification section 3.3)."""
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.xavier_uniform_(parameter)
        for block in (self.ca_layer_v2l, self.ca_layer_vl):
            for linear in (block.decoder.layers[0].linear1, block.decoder.layers[0].linear2):
                if not linear.bias.is_meta:
                    nn.init.zeros_(linear.bias)
        offset = self.upsample_adapter_l.offset
        if not offset.weight.is_meta:
            assert offset.bias is not None
            nn.init.zeros_(offset.bias)
            if offset_init is not None:
                nn.init.normal_(offset.weight, std=offset_init)

    def fuse(self, patches: torch.Tensor, image_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """DSFF: fused features F and the text-aware patches A, both `(I, P, C)`."""
        vit = self.img_vit_down(patches)
        states = self.img_llm_down(image_states)  # (I, T, C)
        aware = self.ca_layer_v2l(vit, states)
        side = round(states.shape[1] ** 0.5)
        coarse = states.transpose(1, 2).unflatten(2, (side, side))  # (I, C, t, t)
        fine = self.upsample_adapter_l(coarse).flatten(2).transpose(1, 2)  # (I, P, C)
        return self.text_out_adapter(torch.cat([aware, vit, fine], dim=-1)), aware

    def encode_image(self, patches: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """All that can be known of an image before an expression is read.

        Args:
            patches: `(I, P, V)`.
            image_states: `(I, T, D)` states one position before each image token.

        Returns:
            `(I, P, C)` to give to `decode`.
        """
        fused, _ = self.fuse(patches, image_states)
        return self.ca_layer_vl.before_memory(fused)

    def decode_features(self, cache: torch.Tensor, query_states: torch.Tensor) -> torch.Tensor:
        """Features Z `(Q, P, C)` of each expression; arguments as in `decode`."""
        return self.ca_layer_vl.after_single_memory(cache, self.text_down(query_states))

    def decode(self, cache: torch.Tensor, query_states: torch.Tensor) -> torch.Tensor:
        """Mask logits.

        Args:
            cache: `encode_image` of each query's image, `(Q, P, C)`.
            query_states: `(Q, D)`, the state that emitted each `[SEG]`.

        Returns:
            `(Q, h, w)` logits at canvas size.
        """
        features = self.decode_features(cache, query_states)
        side = round(features.shape[1] ** 0.5)
        grid = features.transpose(1, 2).unflatten(2, (side, side)).contiguous()  # (Q, C, p, p)
        pixels = functional.pixel_shuffle(self.conv1(grid), self.patch)  # (Q, 1, h, w)
        return self._smooth(pixels)

    def _smooth(self, pixels: torch.Tensor) -> torch.Tensor:
        """`conv2` of `(Q, 1, h, w)` as a depthwise convolution over the queries, `(Q, h, w)`.

        The same numbers; a convolution of one channel is the case CPU kernels are slowest at (10x, forward and backward).
        """
        count = pixels.shape[0]
        weight, bias = self.conv2.weight.expand(count, -1, -1, -1), self.conv2.bias
        assert bias is not None
        return functional.conv2d(pixels.transpose(0, 1), weight, bias.expand(count), padding=2, groups=count)[0]

"""What the tests of Pixtral share: comparing tensors, noise for images, prompts, and the stock processor."""

from __future__ import annotations

import torch
from transformers import PixtralImageProcessor, PixtralProcessor


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def noise(*shapes) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *shape) for shape in shapes]


def prompt_of(backbone, shape, text: str = "how far is it?") -> tuple[int, ...]:
    return backbone.codec.image_prefix(shape) + backbone.codec.question(text)


def stock_processor(backbone, longest: int = 96) -> PixtralProcessor:
    side = backbone.codec.geometry.patch
    images = PixtralImageProcessor(patch_size={"height": side, "width": side}, size={"longest_edge": longest})
    return PixtralProcessor(images, backbone.codec.tokenizer, patch_size=side)

"""Ways of perceiving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.heads.all_mask.head import AllMaskHead
    from mmseg_llm.heads.base import Head
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.heads.depth_text.head import DepthTextHead
    from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead

__all__ = ["AllMaskHead", "ClickPolicyHead", "DepthTextHead", "Head", "MaskDecoderHead"]

__getattr__ = lazy(
    __name__,
    {
        "AllMaskHead": "all_mask.head",
        "ClickPolicyHead": "click_policy.head",
        "DepthTextHead": "depth_text.head",
        "Head": "base",
        "MaskDecoderHead": "mask_decoder.head",
    },
)

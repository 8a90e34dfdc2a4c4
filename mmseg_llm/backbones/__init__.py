"""Adapters of model families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.internvl import InternVLBackbone
    from mmseg_llm.backbones.llava import LlavaBackbone
    from mmseg_llm.backbones.pixtral import PixtralBackbone
    from mmseg_llm.backbones.qwen_vl import QwenVLBackbone
    from mmseg_llm.backbones.qwen_vl_chat import QwenVlChatBackbone

__all__ = ["Backbone", "InternVLBackbone", "LlavaBackbone", "PixtralBackbone", "QwenVLBackbone", "QwenVlChatBackbone"]

__getattr__ = lazy(
    __name__,
    {
        "Backbone": "base",
        "InternVLBackbone": "internvl",
        "LlavaBackbone": "llava",
        "PixtralBackbone": "pixtral",
        "QwenVLBackbone": "qwen_vl",
        "QwenVlChatBackbone": "qwen_vl_chat",
    },
)

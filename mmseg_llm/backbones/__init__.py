"""Adapters of model families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.backbones.internvl import InternVLBackbone
    from mmseg_llm.backbones.llava import LlavaBackbone
    from mmseg_llm.backbones.qwen_vl import QwenVLBackbone

__all__ = ["Backbone", "InternVLBackbone", "LlavaBackbone", "QwenVLBackbone"]

_HOMES = {
    "Backbone": "mmseg_llm.backbones.base",
    "InternVLBackbone": "mmseg_llm.backbones.internvl",
    "LlavaBackbone": "mmseg_llm.backbones.llava",
    "QwenVLBackbone": "mmseg_llm.backbones.qwen_vl",
}


def __getattr__(name: str) -> Any:
    """Import adapters on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.backbones' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

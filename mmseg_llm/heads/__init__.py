"""Ways of perceiving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.heads.all_mask.head import AllMaskHead
    from mmseg_llm.heads.base import Head
    from mmseg_llm.heads.mask_decoder.head import MaskDecoderHead

__all__ = ["AllMaskHead", "Head", "MaskDecoderHead"]

_HOMES = {
    "AllMaskHead": "mmseg_llm.heads.all_mask.head",
    "Head": "mmseg_llm.heads.base",
    "MaskDecoderHead": "mmseg_llm.heads.mask_decoder.head",
}


def __getattr__(name: str) -> Any:
    """Import heads on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.heads' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

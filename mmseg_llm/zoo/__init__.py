"""Conversion of checkpoints that others released."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.zoo.stamp import convert_stamp, load_stamp, state_dict_stamp

__all__ = ["convert_stamp", "load_stamp", "state_dict_stamp"]

_HOMES = {
    "convert_stamp": "mmseg_llm.zoo.stamp",
    "load_stamp": "mmseg_llm.zoo.stamp",
    "state_dict_stamp": "mmseg_llm.zoo.stamp",
}


def __getattr__(name: str) -> Any:
    """Import converters on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.zoo' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

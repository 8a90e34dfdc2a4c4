"""Training with Lightning; the only part of the library that imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.training.data import PerceptionDataModule
    from mmseg_llm.training.module import PerceptionModule

__all__ = ["PerceptionDataModule", "PerceptionModule"]

_HOMES = {"PerceptionDataModule": "mmseg_llm.training.data", "PerceptionModule": "mmseg_llm.training.module"}


def __getattr__(name: str) -> Any:
    """Import Lightning on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.training' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

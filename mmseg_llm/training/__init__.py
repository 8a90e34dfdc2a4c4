"""Training with Lightning; the only part of the library that imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.training.data import PerceptionDataModule
    from mmseg_llm.training.module import PerceptionModule

__all__ = ["PerceptionDataModule", "PerceptionModule"]

__getattr__ = lazy(__name__, {"PerceptionDataModule": "data", "PerceptionModule": "module"})

"""Promptable segmenters that sharpen the coarse masks of any head; imported on first use, weights on first refinement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.segmenters.base import RefineError, Refiner, refine_predictions
    from mmseg_llm.segmenters.grabcut import GrabCutRefiner
    from mmseg_llm.segmenters.sam import SamRefiner
    from mmseg_llm.segmenters.sam_engine import SamEngine
    from mmseg_llm.segmenters.sam_original import SegmentAnythingEngine
    from mmseg_llm.segmenters.sam_transformers import TransformersSamEngine

__all__ = [
    "GrabCutRefiner",
    "RefineError",
    "Refiner",
    "SamEngine",
    "SamRefiner",
    "SegmentAnythingEngine",
    "TransformersSamEngine",
    "refine_predictions",
]

_HOMES = {
    "GrabCutRefiner": "mmseg_llm.segmenters.grabcut",
    "RefineError": "mmseg_llm.segmenters.base",
    "Refiner": "mmseg_llm.segmenters.base",
    "SamEngine": "mmseg_llm.segmenters.sam_engine",
    "SamRefiner": "mmseg_llm.segmenters.sam",
    "SegmentAnythingEngine": "mmseg_llm.segmenters.sam_original",
    "TransformersSamEngine": "mmseg_llm.segmenters.sam_transformers",
    "refine_predictions": "mmseg_llm.segmenters.base",
}


def __getattr__(name: str) -> Any:
    """Import refiners on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.segmenters' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

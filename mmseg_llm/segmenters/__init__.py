"""Promptable segmenters that sharpen the coarse masks of any head; imported on first use, weights on first refinement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.segmenters.base import RefineError, Refiner, refine_predictions
    from mmseg_llm.segmenters.environment import Environment, Observation
    from mmseg_llm.segmenters.grabcut import GrabCutRefiner
    from mmseg_llm.segmenters.grabcut_clicks import GrabCutEnvironment
    from mmseg_llm.segmenters.sam import SamRefiner
    from mmseg_llm.segmenters.sam_clicks import SamEnvironment
    from mmseg_llm.segmenters.sam_engine import SamEngine
    from mmseg_llm.segmenters.sam_original import SegmentAnythingEngine
    from mmseg_llm.segmenters.sam_transformers import TransformersSamEngine
    from mmseg_llm.segmenters.simple_click.predictor import SimpleClickEnvironment

__all__ = [
    "Environment",
    "GrabCutEnvironment",
    "GrabCutRefiner",
    "Observation",
    "RefineError",
    "Refiner",
    "SamEngine",
    "SamEnvironment",
    "SamRefiner",
    "SegmentAnythingEngine",
    "SimpleClickEnvironment",
    "TransformersSamEngine",
    "refine_predictions",
]

__getattr__ = lazy(
    __name__,
    {
        "Environment": "environment",
        "GrabCutEnvironment": "grabcut_clicks",
        "GrabCutRefiner": "grabcut",
        "Observation": "environment",
        "RefineError": "base",
        "Refiner": "base",
        "SamEngine": "sam_engine",
        "SamEnvironment": "sam_clicks",
        "SamRefiner": "sam",
        "SegmentAnythingEngine": "sam_original",
        "SimpleClickEnvironment": "simple_click.predictor",
        "TransformersSamEngine": "sam_transformers",
        "refine_predictions": "base",
    },
)

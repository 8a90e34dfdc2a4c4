"""From images and questions to predictions, pictures and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.inference.visualize import draw_predictions, plot_curves

__all__ = ["Perceiver", "draw_predictions", "plot_curves"]

_HOMES = {
    "Perceiver": "mmseg_llm.inference.perceiver",
    "draw_predictions": "mmseg_llm.inference.visualize",
    "plot_curves": "mmseg_llm.inference.visualize",
}


def __getattr__(name: str) -> Any:
    """Import on first use: drawing needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.inference' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

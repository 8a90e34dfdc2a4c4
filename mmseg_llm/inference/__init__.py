"""From images and questions to predictions, pictures and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.inference.visualize import draw_predictions, plot_curves

__all__ = ["Perceiver", "draw_predictions", "plot_curves"]

__getattr__ = lazy(
    __name__,
    {
        "Perceiver": "perceiver",
        "draw_predictions": "visualize",
        "plot_curves": "visualize",
    },
)

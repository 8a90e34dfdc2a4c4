"""From images and questions to predictions, metres, pictures and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.inference.depth_maps import DepthMap
    from mmseg_llm.inference.object_depth import ObjectDepth, draw_objects
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.inference.point_clouds import PointCloud
    from mmseg_llm.inference.visualize import draw_predictions, plot_curves

__all__ = ["DepthMap", "ObjectDepth", "Perceiver", "PointCloud", "draw_objects", "draw_predictions", "plot_curves"]

__getattr__ = lazy(
    __name__,
    {
        "DepthMap": "depth_maps",
        "ObjectDepth": "object_depth",
        "Perceiver": "perceiver",
        "PointCloud": "point_clouds",
        "draw_objects": "object_depth",
        "draw_predictions": "visualize",
        "plot_curves": "visualize",
    },
)

"""mmseg_llm: vision-language models that see pixels. One backbone, many ways to perceive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.cameras import Camera
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.structures import Mask, Prediction, Query, Sample

__version__ = "0.1.0"
__all__ = ["Camera", "Mask", "Perceiver", "Prediction", "Query", "Sample", "__version__"]

__getattr__ = lazy(
    __name__,
    {
        "Camera": "cameras",
        "Mask": "structures",
        "Perceiver": "inference.perceiver",
        "Prediction": "structures",
        "Query": "structures",
        "Sample": "structures",
    },
)

"""SimpleClick as an environment: network, click predictor and the reading of official weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.segmenters.simple_click.network import SIZES, SimpleClick, SimpleClickSize
    from mmseg_llm.segmenters.simple_click.predictor import SimpleClickEnvironment, SimpleClickState
    from mmseg_llm.segmenters.simple_click.weights import convert_simple_click, load_simple_click

__all__ = [
    "SIZES",
    "SimpleClick",
    "SimpleClickEnvironment",
    "SimpleClickSize",
    "SimpleClickState",
    "convert_simple_click",
    "load_simple_click",
]

__getattr__ = lazy(
    __name__,
    {
        "SIZES": "network",
        "SimpleClick": "network",
        "SimpleClickEnvironment": "predictor",
        "SimpleClickSize": "network",
        "SimpleClickState": "predictor",
        "convert_simple_click": "weights",
        "load_simple_click": "weights",
    },
)

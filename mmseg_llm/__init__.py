"""mmseg_llm: vision-language models that see pixels. One backbone, many ways to perceive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.structures import Mask, Prediction, Query, Sample

__version__ = "0.1.0"
__all__ = ["Mask", "Perceiver", "Prediction", "Query", "Sample", "__version__"]

_HOMES = {"Perceiver": "mmseg_llm.inference.perceiver"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import mmseg_llm` stays instant."""
    if name not in __all__:
        raise AttributeError(f"module 'mmseg_llm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "mmseg_llm.structures")), name)

"""Readers: every dataset yields `Sample`s and knows nothing of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.data.coco import CocoIndex, CocoInstances
    from mmseg_llm.data.concat import Concat
    from mmseg_llm.data.dialogue import DialogueDataset
    from mmseg_llm.data.refer import ReferDataset
    from mmseg_llm.data.unpickle import load_plain_pickle

__all__ = [
    "CocoIndex",
    "CocoInstances",
    "Concat",
    "DialogueDataset",
    "ReferDataset",
    "SampleDataset",
    "load_plain_pickle",
]

_HOMES = {
    "CocoIndex": "coco",
    "CocoInstances": "coco",
    "Concat": "concat",
    "DialogueDataset": "dialogue",
    "ReferDataset": "refer",
    "SampleDataset": "base",
    "load_plain_pickle": "unpickle",
}


def __getattr__(name: str) -> Any:
    """Import a reader on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmseg_llm.data' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"mmseg_llm.data.{_HOMES[name]}"), name)

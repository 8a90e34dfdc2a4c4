"""Readers: every dataset yields `Sample`s and knows nothing of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.data.base import Part, SampleDataset
    from mmseg_llm.data.coco import CocoIndex, CocoInstances
    from mmseg_llm.data.concat import Concat
    from mmseg_llm.data.depth.folder import DepthFolderDataset
    from mmseg_llm.data.depth.jsonl import DepthJsonlDataset
    from mmseg_llm.data.depth.questions import QuestionDataset
    from mmseg_llm.data.dialogue import DialogueDataset
    from mmseg_llm.data.interactive import InteractiveDataset
    from mmseg_llm.data.refer import ReferDataset
    from mmseg_llm.data.synthetic.spatial import SpatialSceneDataset
    from mmseg_llm.data.trajectories import TrajectoryDataset
    from mmseg_llm.data.unpickle import load_plain_pickle

__all__ = [
    "CocoIndex",
    "CocoInstances",
    "Concat",
    "DepthFolderDataset",
    "DepthJsonlDataset",
    "DialogueDataset",
    "InteractiveDataset",
    "Part",
    "QuestionDataset",
    "ReferDataset",
    "SampleDataset",
    "SpatialSceneDataset",
    "TrajectoryDataset",
    "load_plain_pickle",
]

__getattr__ = lazy(
    __name__,
    {
        "CocoIndex": "coco",
        "CocoInstances": "coco",
        "Concat": "concat",
        "DepthFolderDataset": "depth.folder",
        "DepthJsonlDataset": "depth.jsonl",
        "DialogueDataset": "dialogue",
        "InteractiveDataset": "interactive",
        "Part": "base",
        "QuestionDataset": "depth.questions",
        "ReferDataset": "refer",
        "SampleDataset": "base",
        "SpatialSceneDataset": "synthetic.spatial",
        "TrajectoryDataset": "trajectories",
        "load_plain_pickle": "unpickle",
    },
)

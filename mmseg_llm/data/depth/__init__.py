"""Labelled depth: JSONL files of points, folders of depth maps, and the records that curators write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.data.depth.folder import DepthFolderDataset
    from mmseg_llm.data.depth.jsonl import DepthJsonlDataset
    from mmseg_llm.data.depth.records import DepthRecord, write_depth_jsonl

__all__ = ["DepthFolderDataset", "DepthJsonlDataset", "DepthRecord", "write_depth_jsonl"]

__getattr__ = lazy(
    __name__,
    {
        "DepthFolderDataset": "folder",
        "DepthJsonlDataset": "jsonl",
        "DepthRecord": "records",
        "write_depth_jsonl": "records",
    },
)

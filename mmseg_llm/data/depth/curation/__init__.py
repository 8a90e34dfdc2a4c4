"""Curators: public depth datasets, in the layout they are downloaded in, become JSONL files of labelled pixels."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmseg_llm.data.depth.curation.base import Curator

CURATORS: dict[str, str] = {
    "argoverse2": "argoverse2.Argoverse2",
    "ddad": "ddad.Ddad",
    "eth3d": "eth3d.Eth3d",
    "ibims1": "ibims1.Ibims1",
    "matterport3d": "matterport3d.Matterport3d",
    "nuscenes": "nuscenes.NuScenes",
    "nyuv2": "nyuv2.NyuV2",
    "nyuv2_sun": "sunrgbd.NyuInSunRgbd",
    "scannetpp": "scannetpp.ScanNetPP",
    "sunrgbd": "sunrgbd.SunRgbd",
    "waymo": "waymo.Waymo",
}
"""Module and class of every curator, by name of its dataset."""


def find_curator(name: str) -> Curator:
    """The curator of a dataset.

    Raises:
        ValueError: if there is none.
    """
    if name not in CURATORS:
        raise ValueError(f"there is no curator '{name}'; use one of {', '.join(CURATORS)}")
    module, _, kind = CURATORS[name].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), kind)()


def curate(
    name: str,
    root: str | Path,
    output: str | Path,
    split: str = "train",
    seed: int = 0,
    points_per_image: int = 100,
    on_error: Literal["raise", "skip"] = "skip",
) -> dict[str, Any]:
    """Write the labelled pixels of a split of a dataset as JSONL; see `run.curate`.

    Args:
        name: one of `CURATORS`.
        root: folder of the dataset.
        output: JSONL file.
        split: which ones there are depends on the dataset.
        seed: of the drawing of points.
        points_per_image: labelled pixels per image, at most.
        on_error: leave a broken frame out and count it, or stop with one sentence.

    Returns:
        The statistics that are written beside the output, and `frames_before`.

    Raises:
        ValueError: for an unknown dataset, and as `run.curate` does.
    """
    from mmseg_llm.data.depth.curation import run

    curator = find_curator(name)
    return run.curate(
        curator, Path(root), Path(output), split, seed=seed, points_per_image=points_per_image, on_error=on_error
    )

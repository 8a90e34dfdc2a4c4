"""Verb that turns public depth datasets into JSONL files of labelled pixels: `mmseg-llm data curate`.

Heavy libraries are imported inside the verb, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def curate(
    *,
    dataset: str,
    root: Path,
    output: Path,
    split: str = "train",
    points: int = 100,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "skip",
) -> None:
    """Write labelled pixels of a public depth dataset as JSONL; goes on where an earlier call was stopped.

    Args:
        dataset: argoverse2, ddad, eth3d, ibims1, matterport3d, nuscenes, nyuv2, nyuv2_sun, scannetpp, sunrgbd or waymo.
        root: folder of the dataset as it is downloaded; nothing in it is changed.
        output: JSONL file to write; <output>.rules.json says how it was made, <output>.stats.json what is in it.
        split: train, val, test, all, ...; which ones there are depends on the dataset.
        points: labelled pixels per image, at most.
        seed: of the drawing of points.
        on_error: leave broken frames out and count them, or stop at the first.
    """
    from mmseg_llm.data.depth.curation import curate as run

    stats = run(dataset, root, output, split, seed, points, on_error)
    skipped, depth = stats["skipped"], stats["depth"]
    print(
        f"{output}: {stats['frames']} frames ({stats['frames_before']} of them before) of {stats['scenes']} scenes, "
        f"{stats['points']} points, {stats['distance']} metres"
        + (f" from {depth['min']:.2f} to {depth['max']:.2f}, median {depth['0.5']:.2f}" if depth else "")
    )
    print("skipped: " + (", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing"))
    print(f"images are relative to {stats['images']}")

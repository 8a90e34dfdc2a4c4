"""Verbs about depth datasets: `mmseg-llm data curate` makes JSONL files of public ones, `data constant` scores a constant answer.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
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
    print(_skipped(skipped))
    for reason, sentence in stats["first_skipped"].items():
        print(f"first {reason}: {sentence}")
    print(f"images are relative to {stats['images']}")


def constant(
    *,
    data: Path,
    split: Literal["train", "val", "test"] = "test",
    metres: float | None = None,
    max_samples: int | None = None,
) -> None:
    """Score the same answer for every labelled point of a depth dataset, as the labels are, nothing converted.

    Args:
        data: data config (configs/data/depth_*.yaml).
        split: which dataset of the data config.
        metres: the answer; the best one by default.
        max_samples: score the first images only.
    """
    from mmseg_llm.configuration import read_split
    from mmseg_llm.depth_evaluation import measure_constant

    dataset = read_split(data, split, max_samples)
    for name, value in measure_constant(dataset, metres).items():
        print(f"{name:>18}  {value:.4f}" if isinstance(value, float) else f"{name:>18}  {value}")
    print(_skipped(dataset.skipped))


def _skipped(counts: dict[str, int]) -> str:
    """What was left out and why, in one line."""
    return "skipped: " + (", ".join(f"{count} {reason}" for reason, count in counts.items()) or "nothing")

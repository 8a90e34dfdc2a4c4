"""curate: the frames of a dataset become a JSONL file of depth records."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mmseg_llm.data.base import Faults
from mmseg_llm.data.depth.curation.base import BROKEN, Curator, Frame
from mmseg_llm.data.depth.curation.sampling import draw
from mmseg_llm.data.depth.curation.writing import RecordFile, replace_file
from mmseg_llm.data.depth.points import Unusable, check_count
from mmseg_llm.data.depth.records import DepthRecord

UNREADABLE = "unreadable frame"


def curate(
    curator: Curator,
    root: Path,
    output: Path,
    split: str,
    *,
    seed: int = 0,
    points_per_image: int = 100,
    on_error: Literal["raise", "skip"] = "skip",
) -> dict[str, Any]:
    """Write the labelled pixels of a split; goes on where an earlier call was stopped. Files of the dataset are only read.

    Args:
        curator: of the dataset.
        root: folder of the dataset.
        output: JSONL file; `<output>.rules.json` says how its lines are made, `<output>.stats.json` what is in it.
        split: one of `curator.splits`.
        seed: of the drawing of points.
        points_per_image: labelled pixels per image, at most.
        on_error: leave a broken frame out and count it, or stop with one sentence.

    Returns:
        The statistics; `images` is the folder that the records' images are relative to.

    Raises:
        ValueError: for an argument out of range, a folder without the dataset, an output of other rules, no frame at all, or a
            broken frame with `on_error='raise'`.
    """
    if split not in curator.splits:
        raise ValueError(f"{curator.name} has no split '{split}'; use {' or '.join(curator.splits)}")
    check_count(points_per_image, seed)
    faults = Faults(on_error)
    draws = {"split": split, "seed": seed, "points_per_image": points_per_image}
    rules = curator.rules() | draws
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give the folder of {curator.name}")
    frames = curator.frames(root, split)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{root} holds no frame of the split '{split}' of {curator.name}; check the folder")
    file = RecordFile(output, rules)
    present = len(file.images)
    for frame in chain((first,), frames):
        if frame.image not in file.images:
            _take(frame, curator, file, faults, seed=seed, count=points_per_image)
    stats = rules | {
        "images": str(output.parent if curator.exports_images else root),
        "frames": len(file.images),
        "scenes": len(file.scenes),
        "points": file.depths.count,
        "skipped": dict(sorted(faults.counts.items())),
        "depth": file.depths.summary(),
    }
    replace_file(output.with_name(f"{output.name}.stats.json"), json.dumps(stats, indent=2).encode())
    return stats | {"frames_before": present}


def _take(frame: Frame, curator: Curator, file: RecordFile, faults: Faults, *, seed: int, count: int) -> None:
    """Write the record of a frame, or report why there is none."""
    try:
        view = frame.view()
        pixels, metres = draw(view, curator, max(count, curator.min_points), seed, frame.image)
    except Unusable as error:
        faults.report(error.reason or UNREADABLE, f"{curator.name}, frame {frame.image}: {error}")
        return
    except BROKEN as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        faults.report(UNREADABLE, f"{curator.name}, frame {frame.image}: it {detail}")
        return
    if len(metres) < curator.min_points:
        faults.count("too few labels")
        return
    if frame.picture is not None and not (target := file.path.parent / frame.image).is_file():
        replace_file(target, frame.picture())
    camera, (height, width) = view.camera, view.size
    file.append(
        DepthRecord(
            image=frame.image,
            intrinsics=(camera.fx, camera.fy, camera.cx, camera.cy, width, height),
            pixel_coords=pixels[:count],  # type: ignore[arg-type]
            depth=metres[:count],  # type: ignore[arg-type]
            distance=curator.distance,
            dataset=curator.name,
            scene_id=frame.scene,
            camera_name=frame.camera_name,
            label_source=curator.label_source,
            valid_range=curator.valid_range,
            distortion=camera.distortion,
            extra=view.extra,
        )
    )

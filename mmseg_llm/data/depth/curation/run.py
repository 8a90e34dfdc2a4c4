"""curate: the frames of a dataset become a JSONL file of depth records."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mmseg_llm.data.base import Faults
from mmseg_llm.data.depth.curation.base import BROKEN, Curator, Frame, View
from mmseg_llm.data.depth.curation.sampling import draw
from mmseg_llm.data.depth.curation.writing import RecordFile, replace_file
from mmseg_llm.data.depth.points import BAD_FOCAL, Unusable, check_count, is_inside, is_plausible_focal
from mmseg_llm.data.depth.records import DepthRecord

UNREADABLE = "unreadable frame"


class Reports(Faults):
    """Faults that remember the first sentence of each reason.

    Attributes:
        first: reason -> sentence.
    """

    def __init__(self, on_error: str) -> None:
        super().__init__(on_error)
        self.first: dict[str, str] = {}

    def report(self, reason: str, sentence: str) -> None:
        """Raise `sentence`, or count one frame under `reason`."""
        super().report(reason, sentence)
        self.first.setdefault(reason, sentence)

    def note(self, reason: str, sentence: str) -> None:
        """Count one frame that is left out on purpose."""
        self.count(reason)
        self.first.setdefault(reason, sentence)


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
        The statistics; `images` is the folder that the records' images are relative to, `first_skipped` has the sentence about
        the first frame of every reason in `skipped`.

    Raises:
        ValueError: for an argument out of range, a folder without the dataset, an output of other rules or another root or that
            another process writes, no frame at all or none that can be used, or a broken frame with `on_error='raise'`.
    """
    if split not in curator.splits:
        raise ValueError(f"{curator.name} has no split '{split}'; use {' or '.join(curator.splits)}")
    check_count(points_per_image, seed)
    faults = Reports(on_error)
    draws = {"split": split, "seed": seed, "points_per_image": points_per_image}
    rules = curator.rules() | draws | {"root": str(root.resolve())}
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give the folder of {curator.name}")
    frames = curator.frames(root, split)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{root} holds no frame of the split '{split}' of {curator.name}; check the folder")
    seen: set[str] = set()
    with RecordFile(output, rules) as file:
        present = len(file.images)
        for frame in chain((first,), frames):
            if frame.image in seen:
                faults.report("frame listed twice", f"{curator.name}, frame {frame.image}: the dataset names it again")
            elif frame.image not in file.images:
                _take(frame, curator, file, faults, seed=seed, count=points_per_image)
            seen.add(frame.image)
    if not file.images:
        raise ValueError(f"no frame of {root} can be used: {_first_of(faults)}")
    stats = rules | {
        "images": str(output.parent if curator.exports_images else root),
        "frames": len(file.images),
        "scenes": len(file.scenes),
        "points": file.depths.count,
        "skipped": dict(sorted(faults.counts.items())),
        "first_skipped": dict(sorted(faults.first.items())),
        "depth": file.depths.summary(),
    }
    replace_file(output.with_name(f"{output.name}.stats.json"), json.dumps(stats, indent=2).encode())
    return stats | {"frames_before": present}


def _first_of(faults: Reports) -> str:
    """All reasons with their counts and the first sentence of each."""
    return "; ".join(f"{count} {reason}, first {faults.first[reason]}" for reason, count in faults.counts.items())


def _check_focal(view: View) -> None:
    """Raises: Unusable for focal lengths that cannot be."""
    for focal in (view.camera.fx, view.camera.fy):
        if not is_plausible_focal(focal, view.size):
            raise Unusable(
                f"its focal length is {focal:g} for an image of {view.size[1]}x{view.size[0]}; it must be in pixels of the image",
                BAD_FOCAL,
            )


def _take(frame: Frame, curator: Curator, file: RecordFile, faults: Reports, *, seed: int, count: int) -> None:
    """Write the record of a frame, or report why there is none."""
    where = f"{curator.name}, frame {frame.image}"
    target = None if frame.picture is None else file.path.parent / frame.image
    picture = None
    try:
        if not is_inside(frame.image):
            raise Unusable("it leads out of the folder of the dataset", "path out of the folder")
        view = frame.view()
        _check_focal(view)
        pixels, metres = draw(view, curator, max(count, curator.min_points), seed, frame.image)
        is_enough = len(metres) >= curator.min_points
        if is_enough and frame.picture is not None and target is not None and not target.is_file():
            picture = frame.picture()
    except Unusable as error:
        faults.report(error.reason or UNREADABLE, f"{where}: {error}")
        return
    except BROKEN as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
        faults.report(UNREADABLE, f"{where}: it {detail}")
        return
    if not is_enough:
        faults.note(
            "too few labels", f"{where}: it has {len(metres)} labels and {curator.name} needs {curator.min_points}"
        )
        return
    if target is not None and picture is not None:
        replace_file(target, picture)
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

"""Trajectory files as SegAgent releases them (specification section 3.2): read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmseg_llm.clicks import Click, ClickStep, Trajectory
from mmseg_llm.masks import Mask


def to_official(trajectory: Trajectory) -> dict[str, Any]:
    """The record of SegAgent's released trajectory files; boxes are `[x, y, width, height]`, `coor` is row and column.

    What the schema has no place for is left out: rejected and given clicks, the start, ignored pixels.
    """
    height, width = trajectory.size
    caption = trajectory.caption
    return {
        "image_name": trajectory.image,
        "height": height,
        "width": width,
        "gt_ann": {
            "object_id": trajectory.object_id,
            "caption": list(caption) if isinstance(caption, tuple) else caption,
            "segmentation": trajectory.target.to_coco(),
            "bbox": _coco_box(trajectory.target),
            "area": trajectory.target.area,
        },
        "clicks_list": [
            {
                "idx": index,
                "coor": [step.click.row, step.click.col],
                "is_positive": step.click.is_positive,
                "mask": step.mask.to_coco(),
                "box": _coco_box(step.mask),
                "area": step.mask.area,
                "iou": step.iou,
            }
            for index, step in enumerate(trajectory.steps)
        ],
    }


def from_official(record: dict[str, Any]) -> Trajectory:
    """Inverse of `to_official`; boxes, areas and IoUs are taken as they are and not checked against the masks.

    Raises:
        ValueError: if a field is missing, or a mask has another size than the image.
    """
    try:
        size, target = (int(record["height"]), int(record["width"])), record["gt_ann"]
        caption = target["caption"]
        steps = tuple(
            ClickStep(
                Click(int(step["coor"][0]), int(step["coor"][1]), bool(step["is_positive"])),
                Mask.from_coco(step["mask"], size),
                float(step["iou"]),
            )
            for step in sorted(record["clicks_list"], key=lambda step: step["idx"])
        )
        return Trajectory(
            target=Mask.from_coco(target["segmentation"], size),
            steps=steps,
            image=record["image_name"],
            object_id=target["object_id"],
            caption=tuple(caption) if isinstance(caption, list) else caption,
        )
    except KeyError as error:
        raise ValueError(f"SegAgent trajectory record lacks the field {error}") from error


def write_official(path: str | Path, trajectories: Iterable[Trajectory], args: dict[str, Any] | None = None) -> None:
    """Write a file as SegAgent releases them, `args` being the settings they were recorded with."""
    data = {"info": {"args": args or {}}, "data": [to_official(trajectory) for trajectory in trajectories]}
    Path(path).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def read_official(path: str | Path) -> list[Trajectory]:
    """Read a trajectory file of SegAgent.

    Raises:
        ValueError: if it is none, or one of its records is malformed (with its index).
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f"{path} is no SegAgent trajectory file; expected an object with the list 'data'")
    trajectories = []
    for index, entry in enumerate(content["data"]):
        try:
            trajectories.append(from_official(entry))
        except ValueError as error:
            raise ValueError(f"{path}, record {index}: {error}") from error
    return trajectories


def _coco_box(mask: Mask) -> list[float]:
    x1, y1, x2, y2 = mask.box or (0.0, 0.0, 0.0, 0.0)
    return [x1, y1, x2 - x1, y2 - y1]

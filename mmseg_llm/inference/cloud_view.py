"""A point cloud as one HTML page to look around in; nothing is loaded from anywhere.

Legend: N points.
"""

from __future__ import annotations

import base64
import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmseg_llm.inference.point_clouds import PointCloud

MOST_POINTS = 400_000
"""On a page, about 10 MB; of larger clouds every so-many-th row and column of the map is shown, and the page says so."""
TEMPLATE = "cloud_view.html"


def page(cloud: PointCloud, most_points: int = MOST_POINTS) -> str:
    """The page: drag to turn, wheel to zoom, double click to go back; colours of the image or of the depth.

    Args:
        cloud: with at least one point.
        most_points: of larger clouds no more than so many are shown, evenly chosen.

    Raises:
        ValueError: without points.
    """
    from mmseg_llm.inference.depth_pictures import Scale, colour_table
    from mmseg_llm.inference.depth_queries import ALONG, describe_camera, describe_failures

    if not len(cloud):
        raise ValueError(
            f"the cloud has no points to look at ({describe_failures(cloud.failures) or 'nothing was asked'})"
        )
    chosen = _evenly(cloud, most_points)
    points, colours = cloud.points[chosen], cloud.colours[chosen]
    scale = Scale.of(points[:, 2])
    count = f"{len(chosen):,} points" if len(chosen) == len(cloud) else f"{len(chosen):,} of {len(cloud):,} points"
    notes = [
        f"{count}, {cloud.source}" if cloud.source else count,
        f"metres; measured {ALONG[cloud.distance]}",
        describe_camera(cloud.camera, cloud.size),
    ]
    if cloud.failures:
        notes.append(f"{sum(cloud.failures.values()):,} without an answer ({describe_failures(cloud.failures)})")
    if cloud.num_unplaced:
        notes.append(f"{cloud.num_unplaced:,} left out, as the camera sees no ray there")
    camera = cloud.camera
    content = {
        "count": len(points),
        "points": _packed(points.astype("<f4")),
        "colours": _packed(colours.astype(np.uint8)),
        "shades": _packed(scale.colours(points[:, 2])),
        "ramp": [[int(channel) for channel in colour] for colour in colour_table()[::15]],
        "ticks": [{"text": f"{value:g}", "place": float(scale.place(value))} for value in scale.ticks()],
        "camera": {"fx": camera.fx, "fy": camera.fy, "cx": camera.cx, "cy": camera.cy},
        "size": list(cloud.size),
        "spacing": cloud.spacing * float(np.sqrt(len(cloud) / len(points))),
    }
    template = (files("mmseg_llm") / "assets" / TEMPLATE).read_text(encoding="utf-8")
    title = escape(cloud.name or "point cloud")
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        template.replace("@TITLE@", title)
        .replace("@NOTES@", lines)
        .replace("@CONTENT@", json.dumps(content, indent=None))
    )


def _evenly(cloud: PointCloud, most_points: int) -> np.ndarray:
    """Indices `(K,)` of at most so many points: of every so-many-th row and column of the map, so that no pattern shows.

    Points that do not say where in a map they are, or are in few of its rows, get chosen by chance, always the same ones.
    """
    if len(cloud) <= most_points:
        return np.arange(len(cloud))
    if cloud.cells is not None:
        step = 1
        while len(chosen := np.flatnonzero((cloud.cells % step == step // 2).all(axis=-1))) > most_points:
            step += 1
        if len(chosen) > most_points / 8:
            return chosen
    return np.sort(np.random.default_rng(0).choice(len(cloud), most_points, replace=False))


def _packed(array: np.ndarray) -> str:
    """The bytes of an array, for `atob`."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")

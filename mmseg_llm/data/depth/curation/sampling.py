"""What happens to the labelled pixels of every dataset: drawing, ranges, and metres along one thing from metres along another.

Legend: N labelled pixels, P points of a record.
"""

from __future__ import annotations

import hashlib

import numpy as np

from mmseg_llm.data.depth.curation.base import Curator, View
from mmseg_llm.data.depth.points import MIN_METRES


def draw(view: View, curator: Curator, count: int, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` labelled pixels of a view, drawn without repetition: the same for the same seed and key.

    Args:
        view: with its labels as they are in the files.
        curator: gives ranges, margin, and what the result is measured along.
        count: P, at most.
        seed, key: of the draw; the key names the record.

    Returns:
        Pixels `(P, 2)` and metres `(P,)` along `curator.distance`.
    """
    (height, width), margin = view.size, curator.margin
    (low, high), pixels, metres = curator.valid_range, view.pixels, view.metres
    x, y = pixels[:, 0], pixels[:, 1]
    is_inside = (x >= margin) & (x < width - margin) & (y >= margin) & (y < height - margin)
    candidates = np.flatnonzero(is_inside & np.isfinite(metres) & (metres > 0))
    digest = hashlib.sha256(key.encode()).digest()
    order = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")]).permutation(candidates)
    chosen, lengths = [np.empty(0, np.int64)], [np.empty(0)]
    found = 0
    for start in range(0, len(order), 4 * count):
        part = order[start : start + 4 * count]
        converted = measure(view, curator, pixels[part], metres[part])
        is_kept = (converted >= max(low, MIN_METRES)) & (converted <= high)
        chosen.append(part[is_kept])
        lengths.append(converted[is_kept])
        found += int(is_kept.sum())
        if found >= count:
            break
    return pixels[np.concatenate(chosen)[:count]], np.concatenate(lengths)[:count]


def measure(view: View, curator: Curator, pixels: np.ndarray, metres: np.ndarray) -> np.ndarray:
    """Metres `(N,)` of pixels `(N, 2)` along what the curator writes, from what the files hold."""
    if view.camera.distance == curator.distance:
        return metres
    rays = (view.rays or view.camera.rays)(pixels)
    stretch = np.linalg.norm(rays, axis=-1)
    return metres * stretch if curator.distance == "ray" else metres / stretch

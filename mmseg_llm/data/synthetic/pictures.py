"""Renders the scenes of a dataset in one or several processes and writes their image and depth files."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmseg_llm.data.synthetic.records import scene_record
from mmseg_llm.data.synthetic.scene import make_scene

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmseg_llm.data.synthetic.levels import Level

_CHUNK = 32
_COMPRESSION = 4  # of PNG; higher levels take longer than rendering and save little


def write_pictures(
    folder: Path, level: Level, splits: dict[str, int], seed: int, workers: int
) -> Iterator[dict[str, Any]]:
    """Write `images/` (and `depth/` of solid levels) below `folder`.

    Yields:
        The `scene_record` of each scene, in the order of the splits and of the scenes in each, whatever `workers` is.
    """
    (folder / "images").mkdir()
    if level.renderer == "solid":
        (folder / "depth").mkdir()
    jobs = [
        (split, range(start, min(start + _CHUNK, count)))
        for split, count in splits.items()
        for start in range(0, count, _CHUNK)
    ]
    work = partial(_write_chunk, folder, level, seed)
    if workers == 1:
        yield from chain.from_iterable(map(work, jobs))
        return
    # Forked workers need neither an importable main module nor the seconds of a fresh interpreter.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        yield from chain.from_iterable(pool.map(work, jobs))


def _write_chunk(folder: Path, level: Level, seed: int, job: tuple[str, range]) -> list[dict[str, Any]]:
    """Render and write some scenes of a split; gives their records."""
    split, indices = job
    records = []
    for index in indices:
        scene = make_scene(level, seed, index, stream=split)
        name = f"{split}_{index:06d}.png"
        Image.fromarray(scene.image).save(folder / "images" / name, compress_level=_COMPRESSION)
        if scene.depth is not None:
            millimetres = np.rint(scene.depth.astype(np.float64) * 1000).astype(np.uint16)
            Image.fromarray(millimetres).save(folder / "depth" / name, compress_level=_COMPRESSION)
        records.append(scene_record(scene, name, split))
    return records

"""How much a refiner improves masks that are right but coarse: ground truth on a grid of cells, before and after.

python tools/measure_refiner.py --refiner configs/segmenters/grabcut.yaml --level solid-224
python tools/measure_refiner.py --refiner configs/segmenters/grabcut.yaml --data configs/data/custom_coco.yaml --split val
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mmseg_llm.cli import guarded
from mmseg_llm.configuration import read_data, read_refiner
from mmseg_llm.data.synthetic import make_scene
from mmseg_llm.geometry import stretch
from mmseg_llm.heads.all_mask.labels import cell_labels
from mmseg_llm.masks import Mask
from mmseg_llm.structures import Sample


def samples(level: str, data: Path | None, split: str) -> Iterator[Sample]:
    """Labelled images: of a data config, or scenes of a level without end."""
    if data is not None:
        dataset = read_data(data).dataset(split)
        yield from (dataset[index] for index in range(len(dataset)))
    index = 0
    while data is None:
        yield make_scene(level, seed=2, index=index).to_sample()
        index += 1


def main(
    *,
    refiner: Path,
    level: str = "solid-224",
    data: Path | None = None,
    split: str = "val",
    masks: int = 60,
    cells: int = 16,
) -> None:
    """Measure and print.

    Args:
        refiner: its config.
        level: of synthetic scenes, where no data is given.
        data: config of labelled images.
        split: of the data.
        masks: ground-truth masks of at least four cells to measure on.
        cells: rows and columns of the coarse grid.
    """
    sharpen = read_refiner(refiner)
    before: list[float] = []
    after: list[float] = []
    for sample in samples(level, data, split):
        image = sample.load_image()
        canvas = stretch(image, (cells * 16, cells * 16))
        seen: set[str] = set()
        for query in sample.queries:
            if query.is_no_target or len(before) == masks:
                continue
            truth = query.target(sample.size)
            shares = cell_labels(truth, canvas, (cells, cells), "area")
            if shares.sum() < 4 or truth.counts in seen:
                continue
            seen.add(truth.counts)
            logits = torch.from_numpy(np.where(shares > 0, 10.0, -10.0).astype(np.float32))[None]
            coarse = torch.nn.functional.interpolate(logits[None], truth.size, mode="nearest")[0, 0] > 0
            before.append(Mask.from_array(coarse.numpy()).iou(truth))
            after.append(sharpen.refine(image, logits)[0].iou(truth))
        if len(before) == masks:
            break
    if not before:
        raise ValueError("no mask of at least four cells was found; lower --cells or choose other data")
    worse = sum(a < b - 0.02 for a, b in zip(after, before, strict=True))
    source = level if data is None else f"{data} ({split})"
    print(f"{sharpen!r}\n{source}: {len(before)} masks on {cells} x {cells} cells")
    print(f"mean IoU {np.mean(before):.3f} -> {np.mean(after):.3f}; worse by more than 0.02: {worse}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(guarded(lambda: auto_cli(main, as_positional=False, exit_on_error=False)))

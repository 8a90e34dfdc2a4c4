"""Depth maps of one or more runs beside the truth, in one picture with one scale.

    python tools/compare_depth.py --checkpoint runs/depth_tiny --data configs/data/depth_synthetic_solid.yaml \
        --output docs/depth.jpg

Columns: the images, the labels, then per run a grid of answers and the same at full resolution.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mmseg_llm import Perceiver
from mmseg_llm.cli import guarded
from mmseg_llm.configuration import read_data
from mmseg_llm.data import DepthFolderDataset
from mmseg_llm.inference.depth_pictures import Scale, with_scale


def main(
    *,
    checkpoint: list[Path],
    data: Path,
    output: Path,
    split: str = "test",
    first: int = 0,
    images: int = 3,
    rows: int = 48,
    columns: int = 48,
    side: int = 192,
) -> None:
    """Draw.

    Args:
        checkpoint: run folders; repeat --checkpoint for more.
        data: config of a folder of depth maps.
        output: picture to write.
        split: of the data.
        first: image to start with.
        images: how many.
        rows, columns: of the grid that is asked.
        side: pixels that a picture is wide.
    """
    dataset = read_data(data).dataset(split)
    if not isinstance(dataset, DepthFolderDataset):
        raise ValueError(f"{data} holds no depth maps to compare with; give one such as depth_synthetic_solid.yaml")
    perceivers = [Perceiver.from_pretrained(folder) for folder in checkpoint]
    shown: list[list[np.ndarray | Image.Image]] = []
    for index in range(first, min(first + images, len(dataset))):
        sample = dataset[index]
        truth = dataset.depth_map(index)
        cells: list[np.ndarray | Image.Image] = [sample.load_image(), np.where(truth > 0, truth, np.nan)]
        for perceiver in perceivers:
            found = perceiver.depth_map(sample.load_image(), sample.camera, grid=(rows, columns)).as_planar()
            cells += [found.metres, found.resized().metres]
        shown.append(cells)
    scale = Scale.of(
        np.concatenate([cell.ravel() for cells in shown for cell in cells if isinstance(cell, np.ndarray)])
    )
    sheet = Image.new("RGB", (side * len(shown[0]), side * len(shown)))
    for y, cells in enumerate(shown):
        for x, cell in enumerate(cells):
            picture = cell if isinstance(cell, Image.Image) else Image.fromarray(scale.colours(cell))
            smooth = Image.Resampling.BICUBIC if isinstance(cell, Image.Image) else Image.Resampling.NEAREST
            sheet.paste(picture.resize((side, side), smooth), (x * side, y * side))
    names = "; ".join(f"{folder.name}: {rows} x {columns} answers, then all pixels" for folder in checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with_scale(sheet, scale, [f"image; labels along the axis; {names}"]).save(output, quality=90)
    print(f"written: {output}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    words = ["--checkpoint+" if word == "--checkpoint" else word for word in sys.argv[1:]]
    sys.exit(guarded(lambda: auto_cli(main, args=words, as_positional=False, exit_on_error=False)))

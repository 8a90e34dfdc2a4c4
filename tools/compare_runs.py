"""Several runs on the same labelled images, side by side in one picture.

    python tools/compare_runs.py --checkpoint runs/quickstart --checkpoint runs/stamp_tiny \
        --data configs/data/synthetic_flat96.yaml --output docs/heads.jpg

With `--refiner`, the last run is shown a second time with refined masks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mmseg_llm import Perceiver
from mmseg_llm.cli import guarded
from mmseg_llm.configuration import read_data, read_refiner
from mmseg_llm.inference.visualize import comparison_sheet
from mmseg_llm.segmenters import refine_predictions


def main(
    *,
    checkpoint: list[Path],
    data: Path,
    output: Path,
    split: str = "test",
    first: int = 0,
    images: int = 4,
    refiner: Path | None = None,
) -> None:
    """Draw.

    Args:
        checkpoint: run folders; repeat --checkpoint for more.
        data: config of labelled images.
        output: picture to write.
        split: of the data.
        first: image to start with.
        images: how many; the first expression of each is shown.
        refiner: config of a refiner.
    """
    dataset = read_data(data).dataset(split)
    samples = [dataset[index] for index in range(first, min(first + images, len(dataset)))]
    samples = [replace(sample, queries=sample.queries[:1]) for sample in samples]
    columns = []
    for folder in checkpoint:
        found = Perceiver.from_pretrained(folder).model.predict(samples)
        columns.append([replace(item, query=f"{folder.name}: {item.query}") for item in found])
    if refiner is not None:
        sharp = refine_predictions(read_refiner(refiner), columns[-1])
        columns.append([replace(item, query=f"{refiner.stem} on {item.query}") for item in sharp])
    rows = [
        (sample.load_image(), column[i], sample.queries[0].target(sample.size))
        for i, sample in enumerate(samples)
        for column in columns
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    comparison_sheet(rows, columns=len(columns)).save(output, quality=92)
    print(f"written: {output}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    words = ["--checkpoint+" if word == "--checkpoint" else word for word in sys.argv[1:]]
    sys.exit(guarded(lambda: auto_cli(main, args=words, as_positional=False, exit_on_error=False)))

"""How many clicks a segmenter needs on a benchmark of interactive segmentation: NoC and IoU after k clicks of the oracle.

python tools/measure_environment.py --environment configs/environments/grabcut.yaml --root data/GrabCut
python tools/measure_environment.py --environment configs/environments/grabcut.yaml --root data/DAVIS --objects union
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from mmseg_llm.cli import guarded
from mmseg_llm.configuration import read_environment
from mmseg_llm.data import InteractiveDataset
from mmseg_llm.evaluation import format_report
from mmseg_llm.oracle_evaluation import measure_oracle


def main(
    *,
    environment: Path,
    root: Path,
    name: str | None = None,
    objects: Literal["separate", "union"] = "separate",
    max_clicks: int = 20,
    batch_size: int = 16,
    rule: Literal["clean", "official"] = "clean",
    max_samples: int | None = None,
    output: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        environment: config of the segmenter that is clicked on.
        root: folder of the benchmark (GrabCut, Berkeley, DAVIS, COCO_MVal or of their kind).
        name: of the dataset; that of the folder by default.
        objects: every object of an image, or their union as one (as published numbers on DAVIS are).
        max_clicks: on each object.
        batch_size: images at once; the scores do not depend on it.
        rule: of the oracle where nothing is left to click.
        max_samples: the first images only.
        output: JSON file to write, with all episodes.
    """
    dataset = InteractiveDataset(root, objects=objects, max_samples=max_samples, name=name)
    report = measure_oracle(
        read_environment(environment), dataset, max_clicks=max_clicks, batch_size=batch_size, rule=rule, output=output
    )
    print(format_report(report))
    print(f"{'seconds':>16}: {report['seconds']} in all, {report['seconds_per_click']} per click")
    if output is not None:
        print(f"{'written':>16}: {output}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(guarded(lambda: auto_cli(main, as_positional=False, exit_on_error=False)))

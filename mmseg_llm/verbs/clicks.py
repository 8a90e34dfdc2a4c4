"""Verbs of interactive segmentation: `mmseg-llm clicks ...`.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def measure(
    *,
    environment: Path,
    root: Path | None = None,
    data: Path | None = None,
    clicker: Literal["oracle", "random", "centre"] = "oracle",
    split: Literal["train", "val", "test"] = "test",
    objects: Literal["separate", "union"] = "separate",
    max_clicks: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    output: Path | None = None,
    max_samples: int | None = None,
) -> None:
    """How good masks become by clicks: IoU after k clicks and NoC, of the oracle or of a baseline.

    Args:
        environment: config of the segmenter that is clicked on (configs/environments/*.yaml).
        root: folder of an interactive segmentation benchmark (GrabCut, Berkeley, DAVIS, COCO_MVal or of their kind).
        data: data config instead, whose queries are the objects.
        clicker: the oracle; random pixels with random signs; or the centre of the image, once.
        split: which dataset of the data config.
        objects: every object of a benchmark image, or their union as one.
        max_clicks: on each object.
        batch_size: images at once; does not change the result.
        seed: of random clicks.
        output: JSON file to write, with all episodes.
        max_samples: the first images only.
    """
    from mmseg_llm.configuration import read_environment, read_split
    from mmseg_llm.data import InteractiveDataset
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.evaluation import format_report
    from mmseg_llm.oracle_evaluation import measure_clicks

    if (root is None) == (data is None):
        raise ValueError("give either --root, the folder of a benchmark, or --data, a data config")
    dataset: SampleDataset
    if root is not None:
        dataset = InteractiveDataset(root, objects=objects, max_samples=max_samples)
    else:
        assert data is not None
        dataset = read_split(data, split, max_samples)
    report = measure_clicks(
        *(read_environment(environment), dataset),
        clicker=clicker,
        max_clicks=max_clicks,
        batch_size=batch_size,
        seed=seed,
        output=output,
    )
    print(format_report(report))
    print(f"{'seconds':>16}: {report['seconds']} in all, {report['seconds_per_click']} per click")
    if output is not None:
        print(f"{'written':>16}: {output}")


def rate(
    *,
    checkpoint: Path,
    data: Path,
    output: Path,
    masks: Path | None = None,
    benchmark: bool = False,
    keep: float = 0.8,
    split: Literal["train", "val", "test"] = "test",
    head: str | None = None,
    environment: Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
    seed: int = 0,
    max_samples: int | None = None,
) -> None:
    """Filter annotations: let a click policy estimate how well masks fit their expressions.

    Args:
        checkpoint: run folder with a click policy.
        data: data config (configs/data/*.yaml); its own masks are rated by default.
        output: JSON file to write: estimate and verdict of each mask.
        masks: predictions file of evaluate whose masks are rated instead.
        benchmark: rate masks that random clicks made, whose IoU is known (true or false).
        keep: estimate from which a mask is kept.
        split: which dataset of the data config.
        head: name of the policy; the first head by default.
        environment: config of what random clicks are made on, other than in the training of the policy.
        batch_size: images at once; does not change the result.
        device: cpu, cuda, ...; a GPU where there is one by default.
        seed: of the random clicks of the benchmark.
        max_samples: the first images only.
    """
    from mmseg_llm.configuration import read_environment, read_split
    from mmseg_llm.evaluation import format_report
    from mmseg_llm.inference.perceiver import Perceiver
    from mmseg_llm.rating import rate_dataset

    perceiver = Perceiver.from_pretrained(checkpoint, device=device)
    perceiver.click_on(None if environment is None else read_environment(environment), head)
    dataset = read_split(data, split, max_samples)
    report = rate_dataset(
        *(perceiver.model, dataset, output),
        masks=masks,
        is_benchmark=benchmark,
        keep=keep,
        head=head,
        batch_size=batch_size,
        seed=seed,
    )
    print(format_report(report))
    counts = report["counts"]
    print(
        f"{'kept':>16}: {counts['num_kept']} of {counts['num_masks']} masks, {counts['num_unanswered']} without estimate; "
        f"{counts['num_without_target']} queries without target left out"
    )
    print(f"{'written':>16}: {output}")

"""Verbs that make and inspect datasets: `mmseg-llm data ...`.

Heavy libraries are imported inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal


def synthetic(
    *,
    output: Path,
    level: str = "flat-96",
    train: int = 6000,
    val: int = 64,
    test: int = 300,
    seed: int = 0,
    workers: int = 1,
) -> None:
    """Write a synthetic dataset as COCO instances and RefCOCO references; returns at once if it is there already.

    Args:
        output: folder to write.
        level: difficulty, from flat-96 to scene-448.
        train: scenes.
        val: scenes.
        test: scenes.
        seed: of the scenes.
        workers: processes.
    """
    from mmseg_llm.data.synthetic.writer import write_dataset

    splits = {name: count for name, count in (("train", train), ("val", val), ("test", test)) if count}
    report = write_dataset(output, level, splits, seed=seed, workers=workers)
    print(f"{output}: {report['counts']['images']} images, {report['counts']['expressions']} expressions")


def trajectories(
    *,
    data: Path,
    environment: Path,
    output: Path,
    split: Literal["train", "val", "test"] = "train",
    max_clicks: int = 20,
    iou_threshold: float = 0.98,
    min_gain: float = 0.0,
    on_low_gain: Literal["break", "discard"] = "break",
    random_starts: int = 0,
    workers: int = 1,
    max_samples: int | None = None,
) -> None:
    """Let the oracle click on every object of a dataset; goes on where an earlier call was stopped.

    Args:
        data: data config (configs/data/*.yaml).
        environment: config of the segmenter that is clicked on (configs/environments/*.yaml).
        output: JSONL file to write, one trajectory per line; <output>.rules.json says how it was made.
        split: which dataset of the data config.
        max_clicks: most clicks on an object.
        iou_threshold: a mask of this IoU is good enough.
        min_gain: what a click must add to the best IoU so far.
        on_low_gain: whether a click that adds less ends the trajectory or is taken back.
        random_starts: trajectories per object that go on from random clicks, instead of the one from an empty mask.
        workers: processes.
        max_samples: the first images only.
    """
    from mmseg_llm.configuration import read_split
    from mmseg_llm.trajectories import Rules, record_dataset

    dataset = read_split(data, split, max_samples)
    counts = record_dataset(
        *(dataset, environment, output),
        Rules(max_clicks, iou_threshold, min_gain, on_low_gain, random_starts),
        workers=workers,
    )
    quality = f", mean IoU {counts['iou']:.3f} after {counts['clicks']:.1f} clicks" if counts["objects"] else ""
    print(
        f"{output}: {counts['objects']} objects (and {counts['present']} before){quality}; "
        f"{counts['without_target']} queries without target"
    )


def describe(*, data: Path) -> None:
    """Count what a data config offers, and what it skips.

    Args:
        data: data config (configs/data/*.yaml).
    """
    from mmseg_llm.configuration import read_data

    module = read_data(data)
    for split in ("train", "val", "test"):
        if getattr(module, split) is not None:
            print(json.dumps({split: module.dataset(split).describe()}))


def rollouts(
    *,
    checkpoint: Path,
    data: Path,
    output: Path,
    split: Literal["train", "val", "test"] = "train",
    head: str | None = None,
    environment: Path | None = None,
    iou_threshold: float = 0.95,
    min_gain: float = 0.0,
    greedy: bool = False,
    batch_size: int = 16,
    device: str | None = None,
    max_samples: int | None = None,
) -> None:
    """StaR+: let a click policy play, let the oracle correct it, and write both as training data; can be stopped and resumed.

    Args:
        checkpoint: run folder with a click policy.
        data: data config (configs/data/*.yaml).
        output: JSONL file to write; train on it together with the oracle's own trajectories. <output>.rules.json says how it
            was made.
        split: which dataset of the data config.
        head: name of the policy; the first head by default.
        environment: config of what is clicked on, other than in the training of the policy.
        iou_threshold: a mask of this IoU ends an episode.
        min_gain: an action that adds no more than this to the IoU is corrected.
        greedy: play the likeliest answers instead of drawing them.
        batch_size: images at once.
        device: cpu, cuda, ...; a GPU where there is one by default.
        max_samples: the first images only.
    """
    from mmseg_llm.configuration import read_environment, read_split
    from mmseg_llm.improvement import Correction, rollout_dataset
    from mmseg_llm.inference.perceiver import Perceiver

    perceiver = Perceiver.from_pretrained(checkpoint, device=device)
    perceiver.click_on(None if environment is None else read_environment(environment), head)
    dataset = read_split(data, split, max_samples)
    rules = Correction(iou_threshold, min_gain, greedy)
    counts = rollout_dataset(
        *(perceiver.model, dataset, output),
        head=head,
        rules=rules,
        batch_size=batch_size,
        origin=str(checkpoint.resolve()),
    )
    print(
        f"{output}: {counts['objects']} objects on {counts['images']} images (and {counts['present']} images before), "
        f"{counts['trajectories']} trajectories, {100 * counts['corrected']:.1f} % of {counts['actions']} actions corrected, "
        f"mean IoU {counts['iou']:.3f}"
    )


def sft(
    *,
    trajectories: list[Path],
    output: Path,
    style: Literal["llava", "qwen", "chat"] = "chat",
    data: Path | None = None,
    images: Path | None = None,
    split: Literal["train", "val", "test"] = "train",
    checkpoint: Path | None = None,
    head: str | None = None,
    with_iou: bool | None = None,
    image_format: Literal["jpg", "png"] = "jpg",
) -> None:
    """Write trajectories as instruction data for other trainers: LLaVA, Qwen-VL, LLaMA-Factory, ms-swift.

    Args:
        trajectories: JSONL files of data trajectories or rollouts, or SegAgent's own JSON.
        output: folder to write.
        style: whose format; chat is read by LLaMA-Factory and ms-swift.
        data: data config whose images were clicked on.
        images: folder of the images instead.
        split: which dataset of the data config.
        checkpoint: run folder of a click policy; take its codec, overlay, prompts and with_iou, so that the export fits it.
        head: name of that policy; the first head by default.
        with_iou: answers start with the IoU of the mask so far (true or false); as in the run, or true, by default.
        image_format: of the pictures.
    """
    from mmseg_llm.configuration import read_split
    from mmseg_llm.data import TrajectoryDataset
    from mmseg_llm.sft import export_sft, read_policy

    fitting: dict[str, Any] = {}
    if checkpoint is not None:
        policy = read_policy(checkpoint, style, head)
        fitting = {name: getattr(policy, name) for name in ("codec", "overlay", "prompts", "with_iou")}
    elif head is not None:
        raise ValueError(f"--head {head} names a head of a run; give its folder as --checkpoint")
    if with_iou is not None:
        fitting["with_iou"] = with_iou
    source = None if data is None else read_split(data, split)
    dataset = TrajectoryDataset(list(trajectories), source, images)
    counts = export_sft(dataset, output, style, image_format=image_format, **fitting)
    print(
        f"{output}: {counts['records']} records, {counts['images']} pictures ({counts['written']} written), "
        f"{sum(counts['skipped'].values())} queries skipped"
    )

"""Trajectories of a whole dataset: the oracle clicks on every object, on all cores, and can be stopped and resumed.

One JSON line per object in the order of the dataset, whatever the number of processes (SegAgent specification section 3).
"""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.clicks import Click, Trajectory
from mmseg_llm.resuming import TrajectoryFile, to_lines, whole_name
from mmseg_llm.segmenters.recorder import LowGain, check_limits, record
from mmseg_llm.segmenters.starts import random_start

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.structures import Query, Sample, Size


@dataclass(frozen=True)
class Rules:
    """When a trajectory ends, see `recorder.record`, and where it starts.

    Attributes:
        max_clicks, iou_threshold, min_gain, on_low_gain: of `record`.
        random_starts: trajectories per object that go on from random clicks (`starts.random_start`) in place of the one from
            an empty mask; 0 records that one.
        seed: of the random clicks.
    """

    max_clicks: int = 20
    iou_threshold: float = 0.98
    min_gain: float = 0.0
    on_low_gain: LowGain = "break"
    random_starts: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError for a negative number of starts, or limits out of range."""
        check_limits(self.iou_threshold, self.min_gain)
        if self.max_clicks < 1:
            raise ValueError(f"max_clicks is {self.max_clicks}; it must be at least 1")
        if self.random_starts < 0:
            raise ValueError(f"random_starts is {self.random_starts}; it must not be negative")


def has_target(query: Query, size: Size) -> bool:
    """Whether a labelled query asks for something that has pixels outside of what is ignored; without them no IoU exists.

    Raises:
        ValueError: if the query is unlabelled.
    """
    target = query.target(size)
    return target.area > (0 if query.ignore is None else target.intersection(query.ignore))


def objects(sample: Sample) -> list[tuple[int, tuple[str, ...]]]:
    """The objects of a sample: index of the first query of each different target, and all expressions for it.

    Queries without label, without target, or with one of ignored pixels only are no objects.
    """
    found: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for index, query in enumerate(sample.queries):
        if query.masks is None or not has_target(query, sample.size):
            continue
        key = (query.target(sample.size).counts, "" if query.ignore is None else query.ignore.counts)
        found.setdefault(key, (index, []))[1].append(query.text)
    return [(index, tuple(texts)) for index, texts in found.values()]


def record_sample(sample: Sample, environment: Environment, rules: Rules) -> list[Trajectory]:
    """The trajectories of each object of a sample, object by object."""
    image = sample.load_image()
    recorded = []
    for index, texts in objects(sample):
        query = sample.queries[index]
        target = query.target(sample.size)
        for number in range(rules.random_starts or 1):
            given: list[Click] = []
            if rules.random_starts:
                draw = zlib.crc32(f"{sample.id}\n{query.id or index}".encode())
                given = random_start(target, np.random.default_rng([rules.seed, draw, number]))
            trajectory = record(
                environment,
                image,
                target,
                ignore=query.ignore,
                max_clicks=rules.max_clicks,
                iou_threshold=rules.iou_threshold,
                min_gain=rules.min_gain,
                on_low_gain=rules.on_low_gain,
                given=given,
                keep_clearing=bool(given),
            )
            recorded.append(replace(trajectory, image=sample.id, object_id=query.id or str(index), caption=texts))
    return recorded


def record_dataset(
    dataset: SampleDataset, environment: Path, output: Path, rules: Rules | None = None, workers: int = 1
) -> dict[str, Any]:
    """Write the trajectories of all objects of a dataset; goes on where an earlier call was stopped.

    Args:
        dataset: of labelled samples.
        environment: config of the segmenter that is clicked on (`configs/environments/*.yaml`).
        output: JSONL file; the images that it holds already are not clicked on again. What it was made with lies beside it
            (`<output>.rules.json`).
        rules: when a trajectory ends.
        workers: processes.

    Returns:
        Counts: `objects` written now, `present` before, `without_target` queries, mean `iou` and `clicks` of those written now.

    Raises:
        ValueError: for a file that is damaged elsewhere than in its last line, or was begun with other rules, another environment
            or dataset; or an environment that cannot be built.
    """
    from rich.progress import track

    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one is needed")
    rules = rules or Rules()
    made_with = {"rules": asdict(rules), "environment": _settings(environment), "dataset": whole_name(dataset)}
    file = TrajectoryFile(output, made_with)
    indices = [index for index in range(len(dataset)) if not file.images or dataset[index].id not in file.images]
    counts = {"objects": 0, "present": file.num_lines, "without_target": 0, "iou": 0.0, "clicks": 0.0}
    results = _run(dataset, environment, rules, indices, workers)
    for result in track(results, description="clicking", total=len(indices), transient=True):
        file.append(result.lines)
        counts["objects"] += len(result.ious)
        counts["without_target"] += result.without_target
        counts["iou"] += sum(result.ious)
        counts["clicks"] += result.clicks
    for name in ("iou", "clicks"):
        counts[name] = counts[name] / counts["objects"] if counts["objects"] else 0.0
    return counts


def _settings(environment: Path) -> Any:
    """What a config says, whatever its layout and comments.

    Raises:
        ValueError: if it is missing or no YAML.
    """
    import yaml

    if not environment.is_file():
        raise ValueError(
            f"no environment config '{environment}'; give a file such as configs/environments/grabcut.yaml"
        )
    try:
        return yaml.safe_load(environment.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{environment} is no valid YAML: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class _Result:
    """What an image gives: lines of the file, IoU of each, clicks in all, and queries that are no objects."""

    lines: str
    ious: list[float]
    clicks: int
    without_target: int


_STATE: dict[str, Any] = {}
"""Of a worker process: its dataset and environment."""


def _start(dataset: SampleDataset, environment: Path) -> None:
    import cv2

    from mmseg_llm.configuration import read_environment

    cv2.setNumThreads(1)  # processes are the parallelism here
    _STATE.update(dataset=dataset, environment=read_environment(environment))


def _work(index: int, rules: Rules) -> _Result:
    sample = _STATE["dataset"][index]
    recorded = record_sample(sample, _STATE["environment"], rules)
    missing = sum(query.masks is None or not has_target(query, sample.size) for query in sample.queries)
    return _Result(to_lines(recorded), [t.iou for t in recorded], sum(len(t.steps) for t in recorded), missing)


def _run(
    dataset: SampleDataset, environment: Path, rules: Rules, indices: list[int], workers: int
) -> Iterator[_Result]:
    """Results in the order of the indices."""
    work = partial(_work, rules=rules)
    if workers == 1:
        _start(dataset, environment)
        yield from map(work, indices)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads of OpenCV and torch
    with ProcessPoolExecutor(workers, context, _start, (dataset, environment)) as pool:
        yield from pool.map(work, indices, chunksize=4)

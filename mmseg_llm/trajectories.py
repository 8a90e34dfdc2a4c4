"""Trajectories of a whole dataset: the oracle clicks on every object, on all cores, and can be stopped and resumed.

One JSON line per object in the order of the dataset, whatever the number of processes (SegAgent specification section 3).
"""

from __future__ import annotations

import json
import multiprocessing
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.clicks import Click, Trajectory, read_trajectories
from mmseg_llm.segmenters.recorder import LowGain, record
from mmseg_llm.segmenters.starts import random_start

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.structures import Sample


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
        """Raises: ValueError for a negative number of starts."""
        if self.random_starts < 0:
            raise ValueError(f"random_starts is {self.random_starts}; it must not be negative")


def objects(sample: Sample) -> list[tuple[int, tuple[str, ...]]]:
    """The objects of a sample: index of the first query of each different target, and all expressions for it.

    Queries without label or without target are no objects.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for index, query in enumerate(sample.queries):
        if query.masks is None or query.is_no_target:
            continue
        found.setdefault(query.target(sample.size).counts, (index, []))[1].append(query.text)
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
        output: JSONL file; what it holds already is not computed again.
        rules: when a trajectory ends.
        workers: processes.

    Returns:
        Counts: `objects` written now, `present` before, `without_target` queries, mean `iou` and `clicks` of those written now.

    Raises:
        ValueError: for a file that is damaged elsewhere than in its last line, or an environment that cannot be built.
    """
    from rich.progress import track

    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one is needed")
    rules = rules or Rules()
    output.parent.mkdir(parents=True, exist_ok=True)
    present = _present(output)
    done: dict[str, int] = {}
    for trajectory in present:
        done[str(trajectory.image)] = done.get(str(trajectory.image), 0) + 1
    indices = [
        index for index in range(len(dataset)) if not done or _is_open(dataset, index, done, rules.random_starts or 1)
    ]
    counts = {"objects": 0, "present": len(present), "without_target": 0, "iou": 0.0, "clicks": 0.0}
    with output.open("a", encoding="utf-8") as file:
        for index, lines in track(
            _run(dataset, environment, rules, indices, workers),
            description="clicking",
            total=len(indices),
            transient=True,
        ):
            skip = done.get(dataset[index].id, 0) if done else 0  # of an image that was half done
            counts["without_target"] += lines["without_target"]
            for line, iou, clicks in lines["trajectories"][skip:]:
                file.write(line + "\n")
                counts["objects"] += 1
                counts["iou"] += iou
                counts["clicks"] += clicks
            file.flush()
    for name in ("iou", "clicks"):
        counts[name] = counts[name] / counts["objects"] if counts["objects"] else 0.0
    return counts


def _present(output: Path) -> list[Trajectory]:
    """What an earlier call wrote."""
    return list(read_trajectories(output)) if whole_lines(output) else []


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that may have been left in the middle of one, whose piece is taken away; none without a file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        path.write_bytes(whole)
    return whole.decode("utf-8").splitlines()


def _is_open(dataset: SampleDataset, index: int, done: dict[str, int], per_object: int) -> bool:
    """Whether a sample has objects that are not written yet."""
    sample = dataset[index]
    count = len(objects(sample)) * per_object
    return done.get(sample.id, 0) < count or not count


_STATE: dict[str, Any] = {}
"""Of a worker process: its dataset and environment."""


def _start(dataset: SampleDataset, environment: Path) -> None:
    import cv2

    from mmseg_llm.configuration import read_environment

    cv2.setNumThreads(1)  # processes are the parallelism here
    _STATE.update(dataset=dataset, environment=read_environment(environment))


def _work(index: int, rules: Rules) -> tuple[int, dict[str, Any]]:
    sample = _STATE["dataset"][index]
    recorded = record_sample(sample, _STATE["environment"], rules)
    lines = [(json.dumps(t.to_json(), ensure_ascii=False), t.iou, len(t.steps)) for t in recorded]
    missing = sum(query.masks is None or query.is_no_target for query in sample.queries)
    return index, {"trajectories": lines, "without_target": missing}


def _run(
    dataset: SampleDataset, environment: Path, rules: Rules, indices: list[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results in the order of the indices."""
    work = partial(_work, rules=rules)
    if workers == 1:
        _start(dataset, environment)
        yield from map(work, indices)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit threads of OpenCV and torch
    with ProcessPoolExecutor(workers, context, _start, (dataset, environment)) as pool:
        yield from pool.map(work, indices, chunksize=4)

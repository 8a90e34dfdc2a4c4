"""What an environment is worth: an oracle, or a baseline, clicks on every object of a dataset, and all masks are scored.

The standard protocol of interactive segmentation (NoC, IoU after k clicks; SegAgent specification section 8): a click that does
not help ends nothing, unlike in recorded trajectories, which would make NoC too high. The score is computed from the very records
in the file, so it can always be computed again.

Legend: H W pixels.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmseg_llm.evaluation import score_records
from mmseg_llm.masks import Mask
from mmseg_llm.records import record_of, write_json
from mmseg_llm.segmenters.environment import describe_environment
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.structures import Click, PolicyStep, Prediction, Query, Sample

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.segmenters.environment import Environment, Observation


Clicker = Literal["oracle", "random", "centre"]
CLICKERS: dict[str, str] = {
    "oracle": "oracle (rule clean), clicks until nothing is wrong",
    "random": "random pixels with random signs",
    "centre": "one positive click at the centre of the image",
}


def measure_clicks(
    environment: Environment,
    dataset: SampleDataset,
    *,
    clicker: Clicker = "oracle",
    max_clicks: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Click on every labelled object, write `output` (JSON) and return the report without the episodes.

    Args:
        environment: segmenter that is clicked on.
        dataset: labelled samples; a query's `start` is what its episode starts from, its `ignore` is nowhere wrong.
        clicker: who clicks, see `CLICKERS`.
        max_clicks: on each object.
        batch_size: images whose episodes run in lock-step; does not change the result.
        seed: of random clicks, which are the same for an object whatever is clicked beside it.
        output: file to write; it is replaced only when all is done.

    Returns:
        `scores` (see `metrics.interactive`), their `protocol`, counts of the `dataset`, `seconds` in all and
        `seconds_per_click` of the environment.

    Raises:
        ValueError: for a query without label, or an argument out of range.
    """
    from rich.progress import track

    from mmseg_llm.metrics.interactive import describe_interactive

    if clicker not in CLICKERS:
        raise ValueError(f"clicker is '{clicker}'; use one of {', '.join(CLICKERS)}")
    if max_clicks < 1 or batch_size < 1:
        raise ValueError(f"max_clicks is {max_clicks} and batch_size {batch_size}; both must be at least 1")
    started, clock = time.monotonic(), _Clock()
    records = []
    for start in track(range(0, len(dataset), batch_size), description="clicking", transient=True):
        samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        for prediction, query in play(environment, samples, max_clicks, clicker, seed, clock):
            records.append(record_of(prediction, query))
    report = {
        "scores": score_records(records, "interactive", max_clicks),
        "protocol": {
            "predict": CLICKERS[clicker],
            "metric": "interactive",
            "rules": describe_interactive(max_clicks),
            "dataset": dataset.name,
            "environment": describe_environment(environment),
            "max_clicks": max_clicks,
        },
        "dataset": dataset.describe(),
        "seconds": round(time.monotonic() - started, 2),
        "seconds_per_click": round(clock.seconds / max(1, clock.clicks), 4),
    }
    if output is not None:
        records.sort(key=lambda record: (record["sample_id"], record["query_id"]))
        write_json(output, {**report, "predictions": records})
    return report


def play(
    environment: Environment,
    samples: Sequence[Sample],
    max_clicks: int,
    clicker: Clicker = "oracle",
    seed: int = 0,
    clock: _Clock | None = None,
) -> Iterator[tuple[Prediction, Query]]:
    """The episodes of all queries of a few samples, in lock-step: every mask, and why they stopped.

    Raises:
        ValueError: for a query without label, or whose masks have another size than the image.
    """
    clock = clock or _Clock()
    episodes, images = [], []
    for sample in samples:
        image = sample.load_image()
        for index in range(len(sample.queries)):
            episodes.append(_Episode.of(sample, index))
            images.append(image)
    starts = [episode.query.start for episode in episodes]
    masks = [None if start is None else replace(start).array for start in starts] if any(starts) else None
    with clock:
        begun = environment.begin(images, masks)
    for episode, (shown, state) in zip(episodes, begun, strict=True):
        episode.see(shown, state)
    for _ in range(max_clicks):
        asked = [(episode, episode.next_click(clicker, seed)) for episode in episodes if not episode.is_over]
        going = [(episode, click) for episode, click in asked if click is not None]
        if not going:
            break
        with clock:
            shown_after = environment.advance([episode.state for episode, _ in going], [click for _, click in going])
        clock.clicks += len(going)
        for (episode, click), (shown, state) in zip(going, shown_after, strict=True):
            episode.see(shown, state, click)
    yield from ((episode.prediction(), episode.query) for episode in episodes)


@dataclass
class _Clock:
    """Time spent within, and clicks made in it."""

    seconds: float = 0.0
    clicks: int = 0
    _since: float = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._since


@dataclass
class _Episode:
    """One object while it is clicked on; `wanted` and `ignored` are bool `(H, W)`."""

    sample: Sample
    index: int
    wanted: np.ndarray
    ignored: np.ndarray
    state: Any = None
    mask: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    steps: list[PolicyStep] = field(default_factory=list)
    is_over: bool = False

    @classmethod
    def of(cls, sample: Sample, index: int) -> _Episode:
        """An episode that has not begun. Masks are decoded from copies: those of the dataset would keep their pixels."""
        query, size = sample.queries[index], (int(sample.size[0]), int(sample.size[1]))
        wanted = replace(query.target(size)).array
        ignored = np.zeros(size, bool) if query.ignore is None else replace(query.ignore).array
        has_target = (wanted & ~ignored).any()
        return cls(sample, index, wanted, ignored, is_over=not has_target)  # without a target there is no IoU to raise

    @property
    def query(self) -> Query:
        """What is clicked on."""
        return self.sample.queries[self.index]

    def see(self, shown: Observation, state: Any, click: Click | None = None) -> None:
        """Note the mask that a click led to."""
        self.mask, self.state = shown.mask, state
        self.steps.append(PolicyStep(click, Mask.from_array(shown.mask)))

    def next_click(self, clicker: Clicker, seed: int) -> Click | None:
        """What is clicked next; None, and the end, where the oracle finds nothing wrong and behind the one central click."""
        click, (height, width) = None, self.wanted.shape
        used = [step.click for step in self.steps if step.click is not None]
        if clicker == "random":
            name = zlib.crc32(f"{self.sample.id}\n{self.query.id or self.index}".encode())
            row, col, sign = np.random.default_rng([seed, name, len(used)]).random(3)
            click = Click(int(row * height), int(col * width), bool(sign < 0.5))
        elif clicker == "centre":
            click = None if used else Click(height // 2, width // 2, True)
        elif ((self.wanted ^ self.mask) & ~self.ignored).any():
            click = next_click(self.wanted, self.mask, ignore=self.ignored, clicked=used, rule="clean")
        self.is_over = click is None
        return click

    def prediction(self) -> Prediction:
        """All that was seen."""
        stop = "nothing_wrong" if self.is_over else "max_clicks"
        mask = self.steps[-1].mask
        return Prediction.answering(self.sample, self.index, mask, trajectory=tuple(self.steps), stop=stop)

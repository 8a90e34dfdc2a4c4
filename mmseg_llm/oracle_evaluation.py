"""What an environment is worth: the click oracle plays every object of a dataset, and the masks after each click are scored.

The standard protocol of interactive segmentation (NoC, IoU after k clicks; SegAgent specification section 8): a click that does
not help ends nothing, unlike in recorded trajectories, which would make NoC too high. The score is computed from the very records
in the file, so it can always be computed again.

Legend: H W pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.oracle import ClickRule, next_click
from mmseg_llm.structures import Click, PolicyStep, Prediction, Query, Sample

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.segmenters.environment import Environment, Observation


def measure_oracle(
    environment: Environment,
    dataset: SampleDataset,
    max_clicks: int = 20,
    batch_size: int = 16,
    rule: ClickRule = "clean",
    output: Path | None = None,
) -> dict[str, Any]:
    """Let the oracle click on every labelled object, write `output` (JSON) and return the report without the episodes.

    Args:
        environment: segmenter that is clicked on.
        dataset: labelled samples; a query's `start` is what its episode starts from, its `ignore` is nowhere wrong.
        max_clicks: on each object.
        batch_size: images whose episodes run in lock-step; does not change the result.
        rule: of the oracle, see `next_click`.
        output: file to write; it is replaced only when all is done.

    Returns:
        `scores` (see `metrics.interactive`), their `protocol`, counts of the `dataset`, `seconds` in all and
        `seconds_per_click` of the environment.

    Raises:
        ValueError: for a query without label, or an argument out of range.
    """
    from rich.progress import track

    from mmseg_llm.metrics.interactive import describe_interactive

    if max_clicks < 1 or batch_size < 1:
        raise ValueError(f"max_clicks is {max_clicks} and batch_size {batch_size}; both must be at least 1")
    started, clock = time.monotonic(), _Clock()
    records = []
    for start in track(range(0, len(dataset), batch_size), description="clicking", transient=True):
        samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        for prediction, query in play(environment, samples, max_clicks, rule, clock):
            records.append(_record(prediction, query))
    report = {
        "scores": score_episode_records(records, max_clicks),
        "protocol": {
            "predict": f"oracle (rule {rule}), clicks until nothing is wrong",
            "metric": "interactive",
            "rules": describe_interactive(max_clicks),
            "dataset": dataset.name,
            "environment": describe_environment(environment),
        },
        "dataset": dataset.describe(),
        "seconds": round(time.monotonic() - started, 2),
        "seconds_per_click": round(clock.seconds / max(1, clock.clicks), 4),
    }
    if output is not None:
        records.sort(key=lambda record: (record["sample_id"], record["query_id"]))
        _write(output, {**report, "predictions": records})
    return report


def play(
    environment: Environment, samples: Sequence[Sample], max_clicks: int, rule: ClickRule, clock: _Clock | None = None
) -> Iterator[tuple[Prediction, Query]]:
    """The episodes of all queries of a few samples, in lock-step: every mask, and why the oracle stopped.

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
        asked = [(episode, episode.next_click(rule)) for episode in episodes if not episode.is_over]
        going = [(episode, click) for episode, click in asked if click is not None]
        if not going:
            break
        with clock:
            shown_after = environment.advance([episode.state for episode, _ in going], [click for _, click in going])
        clock.clicks += len(going)
        for (episode, click), (shown, state) in zip(going, shown_after, strict=True):
            episode.see(shown, state, click)
    yield from ((episode.prediction(), episode.query) for episode in episodes)


def score_episode_records(records: Sequence[dict[str, Any]], max_clicks: int) -> dict[str, float]:
    """Scores of written episodes; the order does not matter and repeats count once.

    Raises:
        ValueError: if there are none, or one is malformed.
    """
    from mmseg_llm.metrics.interactive import InteractiveSegmentation

    if not records:
        raise ValueError("there are no episodes to score; give a dataset with queries")
    scorer = InteractiveSegmentation(max_clicks, sync_on_compute=False)  # the records are all here already
    for record in records:
        prediction, truth = Prediction.from_json(record), record["target"]
        masks = tuple(Mask.from_coco(mask, prediction.size) for mask in truth["masks"])
        ignore = None if truth["ignore"] is None else Mask.from_coco(truth["ignore"], prediction.size)
        scorer.update(prediction, Query(prediction.query, masks=masks, id=prediction.query_id, ignore=ignore))
    return scorer.compute()


def describe_environment(environment: Environment) -> str:
    """Its own words, or its class and its plain public attributes."""
    if type(environment).__repr__ is not object.__repr__:
        return repr(environment)
    plain = {
        name: value
        for name, value in vars(environment).items()
        if not name.startswith("_") and isinstance(value, int | float | str | bool)
    }
    return f"{type(environment).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


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

    def next_click(self, rule: ClickRule) -> Click | None:
        """The oracle's click; None, and the end, where nothing is wrong any more."""
        click = None
        if ((self.wanted ^ self.mask) & ~self.ignored).any():
            used = [step.click for step in self.steps if step.click is not None]
            click = next_click(self.wanted, self.mask, ignore=self.ignored, clicked=used, rule=rule)
        self.is_over = click is None
        return click

    def prediction(self) -> Prediction:
        """All that was seen."""
        stop = "nothing_wrong" if self.is_over else "max_clicks"
        mask = self.steps[-1].mask
        return Prediction.answering(self.sample, self.index, mask, trajectory=tuple(self.steps), stop=stop)


def _record(prediction: Prediction, query: Query) -> dict[str, Any]:
    """An episode with its ground truth, for JSON."""
    truth = {
        "masks": [mask.to_coco() for mask in query.masks or ()],
        "boxes": None if query.boxes is None else [list(box) for box in query.boxes],
        "ignore": None if query.ignore is None else query.ignore.to_coco(),
    }
    return {**prediction.to_json(), "target": truth}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)

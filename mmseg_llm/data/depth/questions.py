"""QuestionDataset: other questions about space, made from labelled points (specification section I).

Legend: N points of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, repeat

import numpy as np

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.questions import QUESTIONS, measure
from mmseg_llm.structures import Query, Sample

GIVEN = {"speed": (1.0, 10.0), "time": (0.5, 5.0)}
"""Range of the number that a question gives: seconds to reach a point, metres per second to go there."""


class QuestionDataset(SampleDataset):
    """Samples of a depth dataset with questions drawn from their labelled points.

    Args:
        dataset: of depth queries.
        tasks: kind of question -> its share; `depth` keeps a depth query as it is.
        per_image: questions drawn per image, by (seed, index).
        seed: of the draws.

    Raises:
        ValueError: for an unknown kind, one whose label does not follow from points, or shares that are no shares.
    """

    def __init__(self, dataset: SampleDataset, tasks: dict[str, float], per_image: int = 20, seed: int = 0) -> None:
        for task, share in tasks.items():
            if task not in QUESTIONS or (QUESTIONS[task].measure is None and task != "depth"):
                known = [name for name, kind in QUESTIONS.items() if kind.measure is not None]
                raise ValueError(
                    f"questions '{task}' cannot be made from points; use some of depth, {', '.join(known)}"
                )
            if not share > 0:
                raise ValueError(f"the share of '{task}' is {share}; it must be above 0")
        if not tasks or per_image < 1:
            raise ValueError(f"tasks {tasks} must name one at least, and per_image {per_image} be at least 1")
        self.dataset, self.tasks, self.per_image, self.seed = dataset, dict(tasks), per_image, seed
        self.name, self.skipped = f"{dataset.name}/{'+'.join(tasks)}", dataset.skipped

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            ValueError: if it has too few labelled points, no camera, or labels of unspecified kind.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        sample = self.dataset[index]
        rng = np.random.default_rng([self.seed, index % len(self)])
        names = list(self.tasks)
        shares = np.array([self.tasks[name] for name in names])
        drawn = rng.choice(len(names), self.per_image, p=shares / shares.sum())
        queries = tuple(self._query(sample, names[kind], number, rng) for number, kind in enumerate(drawn))
        return replace(sample, queries=queries)

    def _query(self, sample: Sample, task: str, number: int, rng: np.random.Generator) -> Query:
        """A question about points of a sample."""
        points = [query.points[0] for query in sample.queries if query.task == "depth"]
        count = QUESTIONS[task].num_points
        if len(points) < count:
            raise ValueError(f"sample {sample.id} of {sample.source} has {len(points)} points; '{task}' needs {count}")
        if sample.camera is None:
            raise ValueError(
                f"sample {sample.id} of {sample.source} has no camera, without which '{task}' has no label"
            )
        chosen = tuple(points[int(place)] for place in rng.choice(len(points), count, replace=False))
        given = f"{rng.uniform(*GIVEN[task]):.1f}" if task in GIVEN else ""
        value = None if task == "depth" else measure(task, chosen, sample.camera, given)
        return Query(text=given, points=chosen, task=task, id=str(number), value=value)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, None)`."""
        for image_id, _ in groupby(image_id for image_id, _ in self.dataset.query_counts()):
            yield from repeat((image_id, None), self.per_image)

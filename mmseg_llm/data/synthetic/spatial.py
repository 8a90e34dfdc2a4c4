"""SpatialSceneDataset: questions about size and motion, which only a renderer can answer, on scenes rendered when asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from mmseg_llm.data.base import SampleDataset
from mmseg_llm.data.synthetic.levels import get_level
from mmseg_llm.data.synthetic.motion import make_motion
from mmseg_llm.data.synthetic.scene import Scene, make_scene
from mmseg_llm.structures import Camera, Query, Sample

TASKS = ("object_height", "object_width", "camera_motion")


class SpatialSceneDataset(SampleDataset):
    """Solid scenes with questions `object_height` and `object_width` about each object that some expression means alone, or
    pairs of views with the question `camera_motion`.

    Scenes are those of a dataset that was written with the same level, seed and split.

    Args:
        level: of solid scenes.
        split: name of the sequence of scenes.
        count: samples; every third is a pair of views where all kinds are asked.
        seed: of the world.
        tasks: kinds of questions.

    Raises:
        ValueError: for a flat level, an unknown kind, or no samples.
    """

    def __init__(
        self,
        level: str = "solid-128",
        split: str = "train",
        count: int = 1000,
        seed: int = 0,
        tasks: tuple[str, ...] = TASKS,
    ) -> None:
        if get_level(level).renderer != "solid":
            raise ValueError(f"level '{level}' is flat and has no metres; use one such as solid-128")
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"unknown questions {unknown} among {list(tasks)}; choose from {', '.join(TASKS)}")
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        self.level, self.split, self.count, self.seed, self.tasks = level, split, count, seed, tuple(tasks)
        self.name, self.skipped = f"spatial-{level}_{split}", {}

    def __len__(self) -> int:
        """Number of samples."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`."""
        if not -self.count <= index < self.count:
            raise IndexError(index)
        index %= self.count
        sizes = [task for task in self.tasks if task != "camera_motion"]
        is_pair = "camera_motion" in self.tasks and (not sizes or index % 3 == 2)
        return self._pair(index) if is_pair else self._scene(index, sizes)

    def _scene(self, index: int, tasks: list[str]) -> Sample:
        while not (names := _names(scene := make_scene(self.level, self.seed, index, self.split))):
            index += self.count  # of this scene nothing can be said that means one object alone
        queries = [
            Query(
                text, task=task, id=f"{target}/{task}", value=_size(scene, target, task), boxes=(scene.boxes[target],)
            )
            for target, text in names.items()
            for task in tasks
        ]
        return self._sample(scene.image, tuple(queries), scene.id, scene.camera)

    def _pair(self, index: int) -> Sample:
        motion = make_motion(self.level, self.seed, index, self.split)
        query = Query("", task="camera_motion", id="0", value=motion.metres)
        return self._sample(
            motion.image, (query,), f"motion/{self.level}/{self.seed}/{self.split}/{index}", motion.camera
        )

    def _sample(self, image: np.ndarray, queries: tuple[Query, ...], name: str, camera: Camera | None) -> Sample:
        return Sample(Image.fromarray(image), image.shape[:2], queries, name, self.name, camera)

    def query_counts(self) -> Iterator[tuple[str, int | None]]:
        """Per query: `(image id, None)`."""
        for sample in self:
            yield from ((sample.id, None) for _ in sample.queries)


def _names(scene: Scene) -> dict[int, str]:
    """An expression that means each object alone, where there is one."""
    found: dict[int, str] = {}
    for expression in scene.expressions:
        if len(expression.targets) == 1 and not expression.is_plural:
            found.setdefault(expression.targets[0], expression.text)
    return found


def _size(scene: Scene, target: int, task: str) -> float:
    thing = scene.facts.things[target]
    return thing.height if task == "object_height" else thing.width

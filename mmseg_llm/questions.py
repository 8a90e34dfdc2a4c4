"""Questions about space whose answer is one number: its unit, and how its label follows from labelled points.

DepthLM, section on further 3-D tasks (specification section I). How they are worded is the head's affair.

Legend: P points of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmseg_llm.cameras import Camera
from mmseg_llm.quantities import DepthPoint

Measure = Callable[[np.ndarray, float], float]
"""Label from the places `(P, 3)` in space of its points and the number that the question gives (nan without)."""


@dataclass(frozen=True)
class Question:
    """A kind of question.

    Attributes:
        unit: of the answer.
        num_points: pixels it refers to.
        measure: its label by labelled points; None where only the dataset knows it.
        given: what else the question says (`Query.text`): nothing, a `number`, or an `expression`.
    """

    unit: str
    num_points: int = 0
    measure: Measure | None = None
    given: str = ""


def _distance(places: np.ndarray, given: float) -> float:
    return float(np.linalg.norm(places[0]))


QUESTIONS: dict[str, Question] = {
    "depth": Question("m", 1),  # along what, is said by the head and the labels, not by the question
    "planar_depth": Question("m", 1, lambda places, given: float(places[0, 2])),
    "two_point_distance": Question("m", 2, lambda places, given: float(np.linalg.norm(places[0] - places[1]))),
    "speed": Question("m/s", 1, lambda places, given: _distance(places, given) / given, "number"),
    "time": Question("s", 1, lambda places, given: _distance(places, given) / given, "number"),
    "object_height": Question("m", given="expression"),
    "object_width": Question("m", given="expression"),
    "camera_motion": Question("m"),
}


def measure(task: str, points: Sequence[DepthPoint], camera: Camera, given: str = "") -> float:
    """The label of a question about labelled points, in its unit.

    Raises:
        ValueError: for a question whose label does not follow from points, points without labels, or labels of unspecified kind.
    """
    question = QUESTIONS[task]
    if question.measure is None or len(points) != question.num_points:
        raise ValueError(f"the label of '{task}' about {len(points)} points does not follow from them")
    metres = [point.metres for point in points]
    if any(value is None for value in metres):
        raise ValueError(f"a point of '{task}' has no labelled depth")
    pixels = np.array([(point.x, point.y) for point in points], np.float64)
    places = camera.place(pixels, np.array(metres, np.float64), camera.distance)
    return question.measure(places, float(given) if question.given == "number" else float("nan"))

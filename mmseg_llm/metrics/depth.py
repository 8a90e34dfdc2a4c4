"""Depth and other quantities as text: answers become rows, rows become scores (`depth_scores.py`).

Legend: P questions, W int64 words of a row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics import Metric

from mmseg_llm.metrics.depth_scores import ROW, WORDS, describe_depth, labelled_value, score_points, unique_points
from mmseg_llm.metrics.referring import stable_key
from mmseg_llm.numbers_in_text import read_official
from mmseg_llm.quantities import REASONS, DepthPoint, Measurement

if TYPE_CHECKING:
    from mmseg_llm.cameras import Camera
    from mmseg_llm.structures import Prediction, Query


class DepthEstimation(Metric):
    """delta1 and its companions, AbsRel, RMSE, SILog, the same bits for any world size, order and batch size.

    A question is known by its `(sample id, query id)` and counts once, however often it is updated. The state is one row per
    question (`depth_scores.ROW`, its bytes as int64), gathered, never averaged.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Prediction, query: Query) -> None:
        """Add one question.

        Raises:
            ValueError: if the two do not belong together or are not labelled (see `point_row`).
        """
        words = point_row(prediction, query).reshape(1).view(np.int64).reshape(1, WORDS)
        self.rows.append(torch.from_numpy(words).to(self.device))  # (1, W)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes; one that saw nothing takes part with zero rows (of the right type)."""
        if not self._is_synced and not len(self.rows):
            self.rows = [torch.zeros((0, WORDS), dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def point_rows(self) -> np.ndarray:
        """The rows `(P,)` of this process (of all, once synchronised), repeats dropped, sorted by key.

        Raises:
            ValueError: if equal ids stand for questions with different labels.
        """
        parts = [self.rows] if isinstance(self.rows, torch.Tensor) else self.rows
        arrays = [part.reshape(-1, WORDS).cpu().numpy() for part in parts]
        words = np.concatenate([np.zeros((0, WORDS), np.int64), *arrays])
        return unique_points(words.reshape(-1).view(ROW))

    def compute(self) -> dict[str, float]:
        """Scores of everything seen (see `score_points`)."""
        return score_points(self.point_rows())

    def describe(self) -> str:
        """The rules in one line, to be printed with the scores."""
        return describe_depth()


def point_row(prediction: Prediction, query: Query) -> np.ndarray:
    """Everything the scores need of one question, as a scalar array of `ROW`.

    Raises:
        ValueError: if ids are missing or differ, the query has no positive label, or the reason of a missing value is unknown.
    """
    name = f"prediction for query '{query.id or query.text}' of sample '{prediction.sample_id}'"
    if not prediction.sample_id:
        raise ValueError(f"{name} has no sample_id; set it, scores count each (sample id, query id) once")
    if query.id and prediction.query_id != query.id:
        raise ValueError(f"{name} has the query_id '{prediction.query_id}'; pair each prediction with its own query")
    label = labelled_value(query)
    if label is None:
        raise ValueError(f"{name} has no labelled number to compare with; evaluate a dataset with metres or values")
    if not (math.isfinite(label) and label > 0):
        raise ValueError(
            f"{name} is labelled {label}; a label is a finite number above 0, leave others out of the dataset"
        )
    found = prediction.measurement or Measurement(None, "no_answer", task=query.task)
    value, reason = _checked(found, name)
    official = _official(prediction.text, found)
    is_depth = query.task == "depth"
    if value is not None and is_depth and found.camera is not None and query.points:
        value = _converted(value, query.points[0], found, found.camera)
        reason = "bad_camera" if value is None else ""
    wanted = "unspecified" if found.camera is None else found.camera.distance
    task = query.task.encode()
    assert len(task) <= ROW["task"].itemsize, query.task
    row = np.zeros((), ROW)
    row["sample_key"] = stable_key(prediction.sample_id)
    row["query_key"] = stable_key(query.id or prediction.query_id or query.text)
    row["task"], row["label"], row["reason"] = task, label, reason.encode()
    row["value"], row["official"] = (np.nan if number is None else number for number in (value, official))
    row["is_snapped"] = found.is_snapped
    row["is_unspecified"] = is_depth and value is not None and "unspecified" in (found.distance, wanted)
    return row


def _official(text: str, found: Measurement) -> float | None:
    """What the reference evaluation reads, at the scale of the answer; the value where there is no text."""
    if not text:
        return found.value
    number = read_official(text)
    return None if number is None else number * found.scale


def _converted(value: float, point: DepthPoint, found: Measurement, camera: Camera) -> float | None:
    """A depth along what the label is measured along, None where the camera gives no positive number for it."""
    with np.errstate(all="ignore"):
        converted = float(camera.convert(value, np.array((point.x, point.y)), found.distance, camera.distance))
    return converted if math.isfinite(converted) and converted > 0 else None


def _checked(found: Measurement, name: str) -> tuple[float | None, str]:
    """`(value, "")`, or `(None, reason)` where there is none to be scored.

    Raises:
        ValueError: for a reason that is not in `REASONS`.
    """
    if found.value is not None and not math.isfinite(found.value):
        return None, "non_finite"
    if found.value is not None:
        return (found.value, "") if found.value > 0 else (None, "non_positive")
    if found.reason not in REASONS:
        raise ValueError(f"{name} has no value and the reason '{found.reason}'; use one of {', '.join(REASONS)}")
    return None, found.reason

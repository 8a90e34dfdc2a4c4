"""What a constant answer is worth on a dataset with labelled depth: the baseline that every model has to beat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mmseg_llm.metrics.depth import DepthEstimation
from mmseg_llm.metrics.depth_scores import best_constant, labelled_value
from mmseg_llm.quantities import Measurement
from mmseg_llm.structures import Prediction

if TYPE_CHECKING:
    from mmseg_llm.data.base import SampleDataset


def measure_constant(dataset: SampleDataset, metres: float | None = None) -> dict[str, float]:
    """Scores of one answer for all labelled depths of a dataset, in the labels' own convention.

    Args:
        dataset: its questions of the task `depth` are asked; `num_unlabelled` counts those without label.
        metres: the answer; the one with the highest delta1 when None. The scores give it as `answer_metres`.

    Raises:
        ValueError: for an answer that is no positive number, or a dataset without labelled depths.
    """
    if metres is not None and not (math.isfinite(metres) and metres > 0):
        raise ValueError(f"the constant answer is {metres}; give a positive number of metres")
    asked, num_unlabelled = [], 0
    for sample in dataset:
        for index, query in enumerate(sample.queries):
            if query.task == "depth" and labelled_value(query) is None:
                num_unlabelled += 1
            elif query.task == "depth":
                asked.append((sample.id, query.id or str(index), sample.size, query))
    if not asked:
        raise ValueError(f"dataset {dataset.name} has no labelled depths; a constant answer cannot be scored on it")
    answer = (
        best_constant(np.array([labelled_value(query) for *_, query in asked], np.float64))
        if metres is None
        else metres
    )
    metric = DepthEstimation(sync_on_compute=False)
    for sample_id, query_id, size, query in asked:
        found = Measurement(answer)  # of unspecified kind: nothing is converted
        metric.update(Prediction(query.text, size, query_id=query_id, sample_id=sample_id, measurement=found), query)
    scores = metric.compute()
    del scores["num_unspecified"]
    return {"answer_metres": answer, **scores, "num_unlabelled": num_unlabelled}

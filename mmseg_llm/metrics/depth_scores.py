"""Scores of numbers read from answers - depth in metres, and other quantities - from plain rows; numpy only.

A row is one question (`ROW`). Rows can be kept in a file and scored again. Sums run in float64 over rows sorted by key, so
that the numbers are the same bits for any order and sharding.

Legend: P questions (points); p predicted, g labelled value.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mmseg_llm.structures import Query

ROW = np.dtype(
    [
        *(("sample_key", "<i8"), ("query_key", "<i8")),
        *(("task", "S32"), ("label", "<f8"), ("value", "<f8"), ("official", "<f8"), ("reason", "S16")),
        *(("is_snapped", "<i8"), ("is_unspecified", "<i8")),
    ]
)
"""`value` is what the clean columns score, along what the label is measured along, and `official` what the official one does;
both NaN where there is none. `reason`: why there is no `value`. `is_unspecified`: nobody says what one of the two is measured
along, so that nothing was converted. The keys are stable 63-bit hashes of the ids."""

WORDS = ROW.itemsize // 8
"""Length of a row as int64, as it is gathered and sorted."""

RATIO = 1.25
RANGES = ((0.0, 2.0, "0_2m"), (2.0, 5.0, "2_5m"), (5.0, 10.0, "5_10m"), (10.0, np.inf, "10m_up"))
"""Buckets of labelled metres: at least, below, name."""

RESAMPLES, SEED = 1000, 0


def describe_depth() -> str:
    """One line that belongs beside every number: what is counted, what a failure is worth, what is converted."""
    return (
        "depth: over all labelled points, delta_k = share with max(p/g, g/p) < 1.25^k (strict); an answer without a value is "
        "wrong in every delta and left out of AbsRel, SqRel, RMSE, log_RMSE (natural), SILog = 100 sqrt(var(ln p/g)) and "
        "median_scale = median p/g; a depth is converted to what its label is measured along (planar or ray) where both are "
        "known; delta1_low, delta1_high: 95 % bootstrap over images; delta1_official as the reference evaluation: its reading "
        "of the text (times the scale of a picture that had to be shrunk), nothing converted, signs not checked; "
        "constant_delta1: the best constant answer in hindsight"
    )


def labelled_value(query: Query) -> float | None:
    """The number a question is labelled with: its own value, else, of a depth, the metres of its point; None without label."""
    if query.value is not None or query.task != "depth":
        return query.value
    return query.points[0].metres if query.points else None


def unique_points(rows: np.ndarray) -> np.ndarray:
    """Sort rows `(P,)` of `ROW` by key and drop repeats of a question, as samplers that pad for equal ranks make.

    The result does not depend on the order: of repeats that differ (non-deterministic kernels), the smallest stays.

    Raises:
        ValueError: if one key stands for questions with different labels.
    """
    if not len(rows):
        return rows
    words = np.unique(np.ascontiguousarray(rows).view(np.int64).reshape(len(rows), WORDS), axis=0)
    rows = words.reshape(-1).view(ROW)
    repeats = (words[1:, :2] == words[:-1, :2]).all(1)
    clashes = repeats & ((rows["label"][1:] != rows["label"][:-1]) | (rows["task"][1:] != rows["task"][:-1]))
    if clashes.any():
        raise ValueError(
            f"{int(clashes.sum())} questions share sample id and query id with one of a different label; "
            "give every Query an id that is unique within its sample, and every sample one that is unique in the run"
        )
    return rows[np.concatenate(([True], ~repeats))]


def score_points(rows: np.ndarray) -> dict[str, float]:
    """Scores of rows `(P,)` of `ROW`: fractions in [0, 1], metres, counts as int; NaN where nothing is there to average.

    Where several tasks are in the rows, the names of all but `depth` begin with `<task>.`.

    Raises:
        ValueError: see `unique_points`.
    """
    rows = unique_points(rows)
    tasks = sorted(np.unique(rows["task"]).tolist(), key=lambda task: (task != b"depth", task)) or [b"depth"]
    scores: dict[str, float] = {}
    for task in tasks:
        prefix = f"{task.decode()}." if len(tasks) > 1 and task != b"depth" else ""
        found = _score_task(rows[rows["task"] == task], task == b"depth")
        scores.update({prefix + name: value for name, value in found.items()})
    return scores


def _score_task(rows: np.ndarray, is_depth: bool) -> dict[str, float]:
    """Scores of one task; ranges and the constant of 2 m for depths only."""
    label, value = rows["label"], rows["value"]
    _, image_of = np.unique(rows["sample_key"], return_inverse=True)
    hits = is_within(value, label)
    scores: dict[str, float] = {f"delta{k}": _mean(is_within(value, label, k)) for k in (1, 2, 3)}
    scores.update(score_errors(value, label))
    scores["delta1_per_image"], scores["delta1_low"], scores["delta1_high"] = _over_images(hits, image_of)
    scores["delta1_official"] = _mean(is_within(rows["official"], label))
    constant = best_constant(label)
    scores["constant_metres" if is_depth else "constant_value"] = constant
    scores["constant_delta1"] = _mean(is_within(constant, label))
    if is_depth:
        scores["constant2m_delta1"] = _mean(is_within(2.0, label))
        for low, high, name in RANGES:
            scores[f"delta1_{name}"] = _mean(hits[(label >= low) & (label < high)])
    scores["num_points"], scores["num_images"] = len(rows), len(np.unique(image_of))
    scores["num_answered"], scores["num_snapped"] = int((~np.isnan(value)).sum()), int(rows["is_snapped"].sum())
    if is_depth:
        scores["num_unspecified"] = int(rows["is_unspecified"].sum())
    reasons = Counter(rows["reason"][np.isnan(value)].tolist())
    return scores | {f"failed_{reason.decode()}": count for reason, count in sorted(reasons.items())}


def is_within(value: np.ndarray | float, label: np.ndarray, k: int = 1) -> np.ndarray:
    """`(P,)` whether max(p/g, g/p) < 1.25^k; NaN and 0 are not, and a sign is not looked at (as in the reference)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.maximum(value / label, label / value) < RATIO**k


def score_errors(value: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Error metrics of `(P,)` positive values and labels, NaN values left out."""
    answered = ~np.isnan(value)
    p, g = value[answered], label[answered]
    error, log_ratio = p - g, np.log(p / g)
    return {
        "AbsRel": _mean(np.abs(error) / g),
        "SqRel": _mean(error**2 / g),
        "RMSE": float(np.sqrt(_mean(error**2))),
        "log_RMSE": float(np.sqrt(_mean(log_ratio**2))),
        "SILog": 100 * float(np.sqrt(_mean((log_ratio - _mean(log_ratio)) ** 2))),
        "median_scale": float(np.median(p / g)) if len(p) else float("nan"),
    }


def best_constant(label: np.ndarray) -> float:
    """The constant answer with the highest delta1 for `(P,)` labels, the smallest of equals; NaN without labels.

    A constant is right for labels that lie within a factor of 1.25^2 of each other; of the fullest such window, it is the
    geometric middle.
    """
    if not len(label):
        return float("nan")
    ordered = np.sort(label)
    behind = np.searchsorted(ordered, ordered * RATIO**2, side="left")  # first label that is too far, per first label
    first = int(np.argmax(behind - np.arange(len(ordered))))
    return float(np.sqrt(ordered[first] * ordered[behind[first] - 1]))


def _over_images(hits: np.ndarray, image_of: np.ndarray) -> tuple[float, float, float]:
    """Mean over images of the share of `(P,)` hits, and the 95 % bootstrap interval of the share over all points.

    Images are drawn with replacement, as the points of one image are not independent; the seed is fixed.
    """
    if not len(hits):
        return float("nan"), float("nan"), float("nan")
    num_images = int(image_of.max()) + 1
    right, total = np.bincount(image_of, hits, num_images), np.bincount(image_of, minlength=num_images)
    rng = np.random.default_rng(SEED)
    shares = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = rng.integers(num_images, size=num_images)
        shares[index] = right[drawn].sum() / total[drawn].sum()
    low, high = np.percentile(shares, (2.5, 97.5)).tolist()
    return _mean(right / total), low, high


def _mean(values: np.ndarray) -> float:
    """Mean in float64, NaN where there are no values."""
    return float(values.sum(dtype=np.float64) / len(values)) if len(values) else float("nan")

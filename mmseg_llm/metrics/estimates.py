"""How well IoUs are estimated, and how well annotations can be filtered by the estimates (SegAgent specification section 7.2).

Pure numpy. Legend: N masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

THRESHOLDS = (0.5, 0.7, 0.9)
"""A mask is good if its IoU is at least this, and kept if its estimate is."""


def score_estimates(
    estimates: Sequence[float | None] | np.ndarray, ious: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Everything about `(N,)` estimates of `(N,)` true IoUs, both 0 to 1, an estimate None or NaN where there was no answer.

    `MAE` and `MSE` are on a scale of 0 to 100. They and the correlations are over the masks with an answer; in `AUROC@t`,
    `precision@t` and `recall@t` a mask without one counts as estimated lowest and is not kept. NaN where undefined.

    Raises:
        ValueError: for lists of different lengths, or numbers out of range.
    """
    estimated, truth = np.array(estimates, np.float64), np.array(ious, np.float64)  # None becomes NaN
    if estimated.shape != truth.shape or truth.ndim != 1:
        raise ValueError(f"got estimates of shape {estimated.shape} for IoUs of shape {truth.shape}; give one for each")
    answered = ~np.isnan(estimated)
    for name, values in (("estimate", estimated[answered]), ("IoU", truth)):
        if not ((values >= 0) & (values <= 1)).all():
            wrong = values[~((values >= 0) & (values <= 1))][0]
            raise ValueError(f"an {name} is {wrong}; it must lie in [0, 1]")
    scores = regression(100 * estimated[answered], 100 * truth[answered])
    kept_by = np.where(answered, estimated, -np.inf)
    for threshold in THRESHOLDS:
        is_good, is_kept = truth >= threshold, kept_by >= threshold
        both = float((is_good & is_kept).sum())
        scores[f"AUROC@{threshold}"] = auroc(kept_by, is_good)
        scores[f"precision@{threshold}"] = _ratio(both, float(is_kept.sum()))
        scores[f"recall@{threshold}"] = _ratio(both, float(is_good.sum()))
    scores["num_masks"], scores["num_unanswered"] = float(len(truth)), float((~answered).sum())
    return scores


def regression(estimates: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`MAE`, `MSE`, `Pearson` and `Spearman` of two float `(N,)` in their own scale; NaN where undefined."""
    error = estimates - truth
    return {
        "MAE": _ratio(float(np.abs(error).sum()), len(error)),
        "MSE": _ratio(float((error**2).sum()), len(error)),
        "Pearson": pearson(estimates, truth),
        "Spearman": pearson(ranks(estimates), ranks(truth)),
    }


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Linear correlation of two float `(N,)`; NaN where one of them is constant or there are fewer than two."""
    if not len(first) or (first == first[0]).all() or (second == second[0]).all():
        return float("nan")
    a, b = first - first.mean(), second - second.mean()
    return float(np.clip((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), -1, 1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of `(N,)` values, float64; equal values share the mean of their places."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def auroc(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Chance that a positive of `(N,)` has the higher score than a negative, equal ones counted half; NaN without either."""
    positives = int(is_positive.sum())
    negatives = len(is_positive) - positives
    wins = float(ranks(scores)[is_positive].sum()) - positives * (positives + 1) / 2
    return _ratio(wins, positives * negatives)


def _ratio(numerator: float, denominator: float) -> float:
    """A fraction, NaN where the denominator is 0."""
    return numerator / denominator if denominator else float("nan")

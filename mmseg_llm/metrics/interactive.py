"""Interactive segmentation: how good the mask is after each click, and how well that is known (SegAgent specification, 8).

Legend: Q episodes, K clicks at most, C columns; I intersection, U union, in pixels of the original image that are not ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics import Metric

from mmseg_llm.masks import Mask
from mmseg_llm.metrics.estimates import regression
from mmseg_llm.metrics.referring import stable_key

if TYPE_CHECKING:
    from mmseg_llm.structures import Prediction, Query

COLUMNS = (
    *("sample_key", "query_key", "click", "intersection", "union"),
    *("target_area", "num_clicks", "has_start", "estimate"),
)
"""A row is the mask after `click` clicks of an episode of `num_clicks` clicks; rows beyond them repeat its last mask.
`has_start`: whether the episode began with a mask that is not empty. `estimate`: in units of 1e-9, see `UNASKED`."""

UNASKED, UNANSWERED = -2, -1
"""Instead of an estimate: the policy was not asked about this mask, or was asked and did not say."""

UNIT = 10**9
CLICKS = (0, 1, 3, 5, 7, 10, 20)
PERCENT = (80, 85, 90, 95)


class InteractiveSegmentation(Metric):
    """IoU after k clicks, number of clicks, and estimates, the same bits for any world size, order and batch size.

    An episode is known by its `(sample id, query id)` and counts once. The state is one int64 row per episode and number of
    clicks (`COLUMNS`), gathered, never averaged.

    Args:
        max_clicks: K, most clicks of an episode; what NoC counts for an episode that never gets there.

    Raises:
        ValueError: if `max_clicks` is not positive.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[torch.Tensor]

    def __init__(self, max_clicks: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_clicks < 1:
            raise ValueError(f"max_clicks is {max_clicks}; at least one click is needed")
        self.max_clicks = max_clicks
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Prediction, query: Query) -> None:
        """Add an episode.

        Raises:
            ValueError: if the two do not belong together, or there is no episode or label (see `episode_rows`).
        """
        self.rows.append(torch.from_numpy(episode_rows(prediction, query, self.max_clicks)).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes; one that saw nothing takes part with zero rows (of the right type)."""
        if not self._is_synced and not len(self.rows):
            self.rows = [torch.zeros((0, len(COLUMNS)), dtype=torch.int64, device=self.device)]
        super().sync(*args, **kwargs)

    def episodes(self) -> np.ndarray:
        """The int64 `(Q, K + 1, C)` of this process (of all, once synchronised), repeats dropped, sorted by key.

        Raises:
            ValueError: if equal ids stand for episodes with different ground truth.
        """
        parts = [self.rows] if isinstance(self.rows, torch.Tensor) else self.rows
        arrays = [part.reshape(-1, self.max_clicks + 1, len(COLUMNS)).cpu().numpy() for part in parts]
        return unique_episodes(np.concatenate([np.zeros((0, self.max_clicks + 1, len(COLUMNS)), np.int64), *arrays]))

    def compute(self) -> dict[str, float]:
        """Scores of everything seen (see `score_episodes`)."""
        return score_episodes(self.episodes())

    def describe(self) -> str:
        """The protocol in one line, to be printed with the scores."""
        return describe_interactive(self.max_clicks)


def describe_interactive(max_clicks: int) -> str:
    """One line that belongs beside every number: carrying forward, averaging unit, ignored pixels, empty targets."""
    return (
        f"interactive, at most {max_clicks} clicks: IoU at original size without ignored pixels, targets without pixels left "
        f"out (num_without_target); mIoU per episode, cIoU = sum I / sum U; @k after k clicks, an episode that stopped "
        f"earlier keeps its last mask; NoC@t first click from 1 with IoU >= t %, else {max_clicks}; failures@t episodes "
        "that never get there; last mask, selected = highest estimate (the last where there is none), best = highest IoU; "
        "worse = share of given masks that end up worse; PRM in points of 100"
    )


def episode_rows(prediction: Prediction, query: Query, max_clicks: int) -> np.ndarray:
    """Everything the scores need of one episode, as int64 `(max_clicks + 1, C)` with the columns `COLUMNS`.

    Raises:
        ValueError: if ids are missing or differ, the query has no mask label, sizes differ, or the prediction holds no episode
            or more clicks than `max_clicks`.
    """
    name = f"prediction for query '{query.id or query.text}' of sample '{prediction.sample_id}'"
    if not prediction.sample_id:
        raise ValueError(f"{name} has no sample_id; set it, scores count each (sample id, query id) once")
    if query.id and prediction.query_id != query.id:
        raise ValueError(f"{name} has the query_id '{prediction.query_id}'; pair each prediction with its own query")
    steps = prediction.trajectory
    if not 1 <= len(steps) <= max_clicks + 1:
        raise ValueError(
            f"{name} has {len(steps)} masks in its trajectory; a click policy gives the one it starts from and one per click, "
            f"at most {max_clicks} (max_clicks of the metric)"
        )
    target, ignore = query.target(prediction.size), query.ignore
    if ignore is not None and ignore.intersection(target):
        target = Mask.from_array(target.array & ~ignore.array)
    rows = np.zeros((max_clicks + 1, len(COLUMNS)), np.int64)
    rows[:, 0] = stable_key(prediction.sample_id)
    rows[:, 1] = stable_key(query.id or prediction.query_id or query.text)
    rows[:, 2] = np.arange(max_clicks + 1)
    for place, step in enumerate(steps):
        intersection = step.mask.intersection(target)
        counted = step.mask.area - (0 if ignore is None else step.mask.intersection(ignore))
        rows[place:, 3], rows[place:, 4] = intersection, target.area + counted - intersection
    rows[:, 5], rows[:, 6], rows[:, 7] = target.area, len(steps) - 1, steps[0].mask.area > 0
    rows[:, 8] = UNASKED
    rows[: len(steps), 8] = [_estimate(step.estimate, bool(step.status or step.text)) for step in steps]
    return rows


def unique_episodes(episodes: np.ndarray) -> np.ndarray:
    """Sort int64 `(Q, K + 1, C)` by key and drop repeats of an episode, as samplers that pad for equal ranks make.

    The result does not depend on the order: of repeats that differ (non-deterministic kernels), the smallest stays.

    Raises:
        ValueError: if one key stands for episodes with different ground truth.
    """
    if not len(episodes):
        return episodes
    episodes = np.unique(episodes.reshape(len(episodes), -1), axis=0).reshape(-1, *episodes.shape[1:])
    repeats = (episodes[1:, 0, :2] == episodes[:-1, 0, :2]).all(1)
    clashes = repeats & (episodes[1:, 0, 5] != episodes[:-1, 0, 5])
    if clashes.any():
        raise ValueError(
            f"{int(clashes.sum())} episodes share sample id and query id with one of different ground truth; "
            "give every Query an id that is unique within its sample, and every sample one that is unique in the run"
        )
    return episodes[np.concatenate(([True], ~repeats))]


def score_episodes(episodes: np.ndarray) -> dict[str, float]:
    """Scores of int64 `(Q, K + 1, C)`: fractions in [0, 1], clicks, counts as int; NaN where nothing is there to average.

    `@0` and `worse` are given where episodes start with masks, `PRM_*` where a policy was asked for estimates.
    """
    episodes = unique_episodes(np.asarray(episodes, np.int64))
    is_target = episodes[:, 0, 5] > 0
    seen = episodes[is_target]
    clicks, intersection, union = seen[:, 0, 6], seen[..., 3], seen[..., 4]  # (Q,), (Q, K + 1), (Q, K + 1)
    max_clicks, has_start = episodes.shape[1] - 1, seen[:, 0, 7] > 0
    scores: dict[str, float] = {}
    for k in CLICKS:
        if k <= max_clicks and (k or has_start.any()):
            _overlap(scores, f"@{k}", intersection[:, k], union[:, k])
    for percent in PERCENT:
        reached = 100 * intersection[:, 1:] >= percent * union[:, 1:]  # exact in integers
        first = np.where(reached.any(1), reached.argmax(1) + 1, max_clicks)
        scores[f"NoC@{percent}"] = _mean(first)
        scores[f"failures@{percent}"] = int((~reached.any(1)).sum())
    each = np.arange(len(seen))
    for name, place in (("last", clicks), ("selected", _selected(seen)), ("best", _best(seen))):
        _overlap(scores, f"_{name}", intersection[each, place], union[each, place])
    if has_start.any():
        is_worse = intersection[:, -1] * union[:, 0] < intersection[:, 0] * union[:, -1]
        scores["worse"] = _mean(is_worse[has_start])
    scores["clicks"] = _mean(clicks)
    scores.update(_estimates(seen))
    scores["num_episodes"], scores["num_without_target"] = len(seen), int((~is_target).sum())
    return scores


def _estimate(estimate: float | None, was_asked: bool) -> int:
    """An estimate as an integer."""
    if estimate is None:
        return UNANSWERED if was_asked else UNASKED
    return round(min(max(estimate, 0.0), 1.0) * UNIT)


def _overlap(scores: dict[str, float], name: str, intersection: np.ndarray, union: np.ndarray) -> None:
    """Add mIoU and cIoU of `(Q,)` masks."""
    scores[f"mIoU{name}"] = _mean(intersection / union)
    scores[f"cIoU{name}"] = float(intersection.sum() / union.sum()) if len(union) else float("nan")


def _selected(episodes: np.ndarray) -> np.ndarray:
    """`(Q,)` number of clicks of the mask that is estimated best, the first of equals; the last where none is estimated."""
    estimates = episodes[..., 8]
    return np.where((estimates >= 0).any(1), estimates.argmax(1), episodes[:, 0, 6])


def _best(episodes: np.ndarray) -> np.ndarray:
    """`(Q,)` number of clicks of the mask that is best, the first of equals."""
    return (episodes[..., 3] / episodes[..., 4]).argmax(1)


def _estimates(episodes: np.ndarray) -> dict[str, float]:
    """How well the IoUs of all masks of an episode were estimated, 0 to 100; nothing where nobody was asked."""
    if not (episodes[..., 8] != UNASKED).any():
        return {}
    answered = episodes[..., 8] >= 0
    truth = 100 * episodes[..., 3][answered] / episodes[..., 4][answered]
    found = regression(100 * episodes[..., 8][answered] / UNIT, truth)
    counts = {"num_estimates": int(answered.sum()), "num_unanswered": int((episodes[..., 8] == UNANSWERED).sum())}
    return {f"PRM_{name}": value for name, value in found.items()} | counts


def _mean(values: np.ndarray) -> float:
    """Mean in float64, NaN where there are no values."""
    return float(values.sum(dtype=np.float64) / len(values)) if len(values) else float("nan")

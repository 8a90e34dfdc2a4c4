"""StaR+: a policy plays on labelled images, the oracle corrects what did not help, and both become new training material
(SegAgent paper section 4.2, algorithm 1; specification section 6.3).

An action that raises the IoU is kept as the label of the mask it was made on; any other is taken back and the oracle's click
becomes the label, from which the episode goes on. What a mistake led to is kept, too, with the oracle's way out of it.

Legend: H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.clicks import Click, ClickStep, Stop, Trajectory
from mmseg_llm.heads.click_policy.asking import Reply, View, ask, show
from mmseg_llm.heads.click_policy.episodes import Episode, draw_seed, open_episodes, usable
from mmseg_llm.heads.click_policy.head import ClickPolicyHead
from mmseg_llm.masks import Mask
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.trajectories import whole_lines

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters.environment import Observation
    from mmseg_llm.structures import Sample


@dataclass(frozen=True)
class Correction:
    """What counts as help.

    Attributes:
        iou_threshold: a mask of this IoU ends an episode.
        min_gain: what an action must add to the IoU of the mask it was made on; one that adds as much or less is corrected.
        is_greedy: play the likeliest answers instead of drawing them.
        keep_mistakes: also record the masks that mistakes led to.
    """

    iou_threshold: float = 0.95
    min_gain: float = 0.0
    is_greedy: bool = False
    keep_mistakes: bool = True


@dataclass
class _Rollout:
    """An episode with its label; `target` is bool `(H, W)`."""

    episode: Episode
    target: np.ndarray
    iou: float
    kept: list[ClickStep] = field(default_factory=list)
    rejected: list[ClickStep] = field(default_factory=list)
    mistakes: list[Trajectory] = field(default_factory=list)
    corrected: int = 0
    stop: Stop | None = None

    def iou_of(self, mask: np.ndarray) -> float:
        """With the target, which is not empty."""
        return float((mask & self.target).sum() / (mask | self.target).sum())

    def oracle(self, mask: np.ndarray, clicks: Sequence[Click]) -> Click | None:
        """Its next click on a mask."""
        return next_click(self.target, mask, clicked=clicks, rule="clean")

    def go(self, click: Click, observation: Observation, state: Any) -> None:
        """Keep a click and go on from its mask."""
        self.iou = self.iou_of(observation.mask)
        self.kept.append(ClickStep(click, Mask.from_array(observation.mask), self.iou))
        self.episode.move(click, observation, state)


def rollout(
    head: ClickPolicyHead, backbone: Backbone, samples: Sequence[Sample], rules: Correction
) -> list[list[Trajectory]]:
    """Play and correct all labelled queries of some samples, in lock-step.

    Args:
        head: of the policy, with its environment; `head.search` says how answers are drawn.
        backbone: it looks through.
        samples: labelled; queries without a target are passed over.
        rules: what counts as help.

    Returns:
        Per sample, its trajectories: one per query, followed by those that start from its mistakes.
    """
    asked = [
        replace(s, queries=tuple(q for q in s.queries if q.masks is not None and not q.is_no_target)) for s in samples
    ]
    played = []
    for episode in open_episodes(head, head.click_environment(), asked):
        query = asked[episode.row].queries[episode.query_id]
        target = query.target(asked[episode.row].size).array
        played.append(_Rollout(episode, target, 0.0))
        played[-1].iou = played[-1].iou_of(episode.view.mask)
    for _ in range(head.max_clicks):
        alive = [item for item in played if item.stop is None]
        for item in alive:
            if item.iou >= rules.iou_threshold:
                item.stop = "iou"
        alive = [item for item in alive if item.stop is None]
        if not alive:
            break
        _step(head, backbone, alive, rules)
    for item in played:
        item.stop = item.stop or ("iou" if item.iou >= rules.iou_threshold else "max_clicks")
    found: list[list[Trajectory]] = [[] for _ in samples]
    for item in played:
        sample = asked[item.episode.row]
        found[item.episode.row] += _trajectories(item, sample, item.episode.query_id)
    return found


def _step(head: ClickPolicyHead, backbone: Backbone, alive: Sequence[_Rollout], rules: Correction) -> None:
    """One action of each episode, corrected where it did not help."""
    environment = head.click_environment()
    before = [item.episode.state for item in alive]
    masks = [item.episode.view.mask for item in alive]
    clicks = [usable(head, reply.action).click for reply in _answers(head, backbone, alive, rules)]
    tried = {i: click for i, click in enumerate(clicks) if click is not None}
    results = environment.advance([before[i] for i in tried], list(tried.values()))
    outcome = dict(zip(tried, results, strict=True))
    wrong: list[int] = []
    for i, item in enumerate(alive):
        click = clicks[i]
        if click is not None and item.iou_of(outcome[i][0].mask) > item.iou + rules.min_gain:
            item.go(click, *outcome[i])
        else:
            wrong.append(i)
    _correct(head, [(alive[i], before[i], masks[i]) for i in wrong], rules)
    if rules.keep_mistakes:
        _leave_mistakes(head, [(alive[i], clicks[i], outcome[i]) for i in wrong if i in outcome])


def _answers(head: ClickPolicyHead, backbone: Backbone, alive: Sequence[_Rollout], rules: Correction) -> list[Reply]:
    found: list[Reply] = []
    for start in range(0, len(alive), head.batch_size):
        chunk = [item.episode for item in alive[start : start + head.batch_size]]
        views: list[View] = [episode.view for episode in chunk]
        seeds = [(None,) if rules.is_greedy else (draw_seed(e.key, e.steps, 0),) for e in chunk]
        answers = ask(head, backbone, show(head, backbone, views), seeds=seeds, constrained=head.constrained)
        found += [reply for (reply,) in answers]
    return found


def _correct(head: ClickPolicyHead, wrong: Sequence[tuple[_Rollout, Any, np.ndarray]], rules: Correction) -> None:
    """Put the oracle's click in the place of an action that did not help; where that does not help either, it is over."""
    found = [(item, state, item.oracle(mask, item.episode.clicks)) for item, state, mask in wrong]
    for item, _, click in found:
        if click is None:
            item.stop = "nothing_wrong"
    going = [(item, state, click) for item, state, click in found if click is not None]
    results = head.click_environment().advance([state for _, state, _ in going], [click for _, _, click in going])
    for (item, _, click), (observation, state) in zip(going, results, strict=True):
        if item.iou_of(observation.mask) > item.iou + rules.min_gain:
            item.corrected += 1
            item.go(click, observation, state)
        else:
            item.stop = "low_gain"


def _leave_mistakes(
    head: ClickPolicyHead, wrong: Sequence[tuple[_Rollout, Click | None, tuple[Observation, Any]]]
) -> None:
    """Record the masks that mistakes led to, with the oracle's click on them."""
    found = []
    for item, click, (observation, state) in wrong:
        assert click is not None
        iou = item.iou_of(observation.mask)
        item.rejected.append(ClickStep(click, Mask.from_array(observation.mask), iou))
        if np.array_equal(observation.mask, item.episode.view.mask):
            continue  # the same picture as one that is recorded already
        way_out = item.oracle(observation.mask, [*item.episode.clicks, click])
        if way_out is not None:
            found.append((item, observation, iou, state, way_out))
    results = head.click_environment().advance([entry[3] for entry in found], [entry[4] for entry in found])
    for (item, observation, iou, _, way_out), (after, _) in zip(found, results, strict=True):
        step = ClickStep(way_out, Mask.from_array(after.mask), item.iou_of(after.mask))
        item.mistakes.append(
            Trajectory(
                target=Mask.from_array(item.target),
                steps=(step,),
                start=Mask.from_array(observation.mask),
                start_iou=iou,
                given=(*observation.clicks,),
                stop="max_clicks",
            )
        )


def _trajectories(item: _Rollout, sample: Sample, index: int) -> list[Trajectory]:
    """What an episode leaves, under the name of its query."""
    query, start = sample.queries[index], item.episode.steps[0].mask
    main = Trajectory(
        target=Mask.from_array(item.target),
        steps=tuple(item.kept),
        rejected=tuple(item.rejected),
        start=start if start.area else None,
        start_iou=item.iou_of(start.array),
        stop=item.stop or "max_clicks",
    )
    name = query.id or str(index)
    return [replace(t, image=sample.id, object_id=name, caption=(query.text,)) for t in (main, *item.mistakes)]


def rollout_dataset(
    model: PerceptionModel,
    dataset: SampleDataset,
    output: Path,
    *,
    head: str | None = None,
    rules: Correction | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Write the corrected trajectories of a policy on a dataset; goes on where an earlier call was stopped.

    Train on the file together with the oracle's own, from the start (algorithm 1): `TrajectoryDataset` takes both.

    Args:
        model: with a click policy, on its device.
        dataset: labelled.
        output: JSONL file; the images it holds already are not played again.
        head: name of the policy; the first head when None.
        rules: what counts as help.
        batch_size: images at once; part of nothing that is written.

    Returns:
        Counts: `images`, `objects` and `trajectories` written now, `present` images before, `actions`, share of them that was
        `corrected`, mean final `iou`.

    Raises:
        ValueError: for a head that is no click policy, or a damaged file.
    """
    from rich.progress import track

    policy = model.head(head)
    if not isinstance(policy, ClickPolicyHead):
        raise ValueError(f"head '{policy.name}' is no click policy; train one with configs/segagent_tiny.yaml")
    rules = rules or Correction()
    output.parent.mkdir(parents=True, exist_ok=True)
    done = _finished_images(output)
    indices = [index for index in range(len(dataset)) if not done or dataset[index].id not in done]
    counts: dict[str, Any] = {"images": 0, "objects": 0, "trajectories": 0, "present": len(done)}
    totals = {"actions": 0, "corrected": 0, "iou": 0.0}
    with output.open("a", encoding="utf-8") as file:
        starts = range(0, len(indices), batch_size)
        for start in track(starts, description="playing", transient=True):
            samples = [dataset[index] for index in indices[start : start + batch_size]]
            for found in rollout(policy, model.backbone, samples, rules):
                file.write("".join(json.dumps(t.to_json(), ensure_ascii=False) + "\n" for t in found))
                counts["images"] += 1
                counts["trajectories"] += len(found)
                for trajectory in _mains(found):
                    counts["objects"] += 1
                    totals["actions"] += len(trajectory.steps) + (trajectory.stop == "low_gain")
                    totals["corrected"] += len(trajectory.rejected)
                    totals["iou"] += trajectory.iou
            file.flush()
    totals["corrected"] /= max(1, totals["actions"])
    totals["iou"] /= max(1, counts["objects"])
    return counts | totals


def _mains(found: Sequence[Trajectory]) -> Iterator[Trajectory]:
    """The episodes among what a sample left, without those that start from mistakes."""
    return (trajectory for trajectory in found if not trajectory.given)


def _finished_images(output: Path) -> set[str]:
    """Images that an earlier call finished; what it left of the last one is taken away, which may be a part."""
    lines = whole_lines(output)
    images = [str(json.loads(line)["image"]) for line in lines]
    if not images:
        return set()
    kept = [line for line, image in zip(lines, images, strict=True) if image != images[-1]]
    output.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return set(images) - {images[-1]}

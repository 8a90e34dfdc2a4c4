"""StaR+: a policy plays on labelled images, the oracle corrects what did not help, and both become new training material
(SegAgent paper section 4.2, algorithm 1; specification section 6.3).

An action that raises the IoU is kept as the label of the mask it was made on; any other is taken back and the oracle's click
becomes the label, from which the episode goes on. What a mistake led to is kept, too, with the oracle's way out of it.

Legend: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.clicks import Click, ClickStep, Stop, Trajectory
from mmseg_llm.heads.click_policy.asking import Reply, View, ask, show
from mmseg_llm.heads.click_policy.episodes import Episode, draw_seed, open_episodes, usable
from mmseg_llm.heads.click_policy.head import ClickPolicyHead
from mmseg_llm.masks import Mask, Size
from mmseg_llm.resuming import TrajectoryFile, to_lines, whole_name
from mmseg_llm.segmenters.environment import describe_environment
from mmseg_llm.segmenters.oracle import next_click
from mmseg_llm.segmenters.recorder import check_limits, iou_outside
from mmseg_llm.trajectories import has_target

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.data.base import SampleDataset
    from mmseg_llm.model import PerceptionModel
    from mmseg_llm.segmenters.environment import Observation
    from mmseg_llm.structures import Query, Sample


@dataclass(frozen=True)
class Correction:
    """What counts as help.

    Attributes:
        iou_threshold: a mask of this IoU ends an episode.
        min_gain: what an action must add to the IoU of the mask it was made on; one that adds as much or less is corrected.
        is_greedy: play the likeliest answers instead of drawing them.
        keep_mistakes: also record the masks that mistakes led to, with the way out of them, as trajectories of their own.
    """

    iou_threshold: float = 0.95
    min_gain: float = 0.0
    is_greedy: bool = False
    keep_mistakes: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError for values out of range."""
        check_limits(self.iou_threshold, self.min_gain)


@dataclass
class Played:
    """What the policy's play on one sample left.

    Attributes:
        trajectories: one per query, followed by those that start from its mistakes.
        ious: of the last mask of each query.
        actions: of the policy.
        corrected: actions in whose place the oracle's click was put.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    ious: list[float] = field(default_factory=list)
    actions: int = 0
    corrected: int = 0


@dataclass
class _Rollout:
    """An episode with its label; `target` and `ignored` are bool `(H, W)`."""

    episode: Episode
    target: np.ndarray
    ignored: np.ndarray
    start_iou: float = 0.0
    iou: float = 0.0
    kept: list[ClickStep] = field(default_factory=list)
    rejected: list[ClickStep] = field(default_factory=list)
    mistakes: list[Trajectory] = field(default_factory=list)
    actions: int = 0
    corrected: int = 0
    stop: Stop | None = None

    @classmethod
    def of(cls, episode: Episode, query: Query, size: Size) -> _Rollout:
        """An episode at its start. Masks are decoded from copies: those of the dataset would keep their pixels."""
        target = replace(query.target(size)).array
        ignored = np.zeros(target.shape, bool) if query.ignore is None else replace(query.ignore).array
        item = cls(episode, target, ignored)
        item.start_iou = item.iou = item.iou_of(episode.view.mask)
        return item

    def iou_of(self, mask: np.ndarray) -> float:
        """With the target, over what is not ignored."""
        return iou_outside(self.target, mask, self.ignored)

    def oracle(self, mask: np.ndarray, clicks: Sequence[Click]) -> Click | None:
        """Its next click on a mask."""
        return next_click(self.target, mask, ignore=self.ignored, clicked=clicks, rule="clean")

    def go(self, click: Click, observation: Observation, state: Any) -> None:
        """Keep a click and go on from its mask."""
        self.iou = self.iou_of(observation.mask)
        self.kept.append(ClickStep(click, Mask.from_array(observation.mask), self.iou))
        self.episode.move(click, observation, state)


def rollout(head: ClickPolicyHead, backbone: Backbone, samples: Sequence[Sample], rules: Correction) -> list[Played]:
    """Play and correct all labelled queries of some samples, in lock-step.

    Args:
        head: of the policy, with its environment; `head.search` says how answers are drawn.
        backbone: it looks through.
        samples: labelled; queries without a target outside of what is ignored are passed over.
        rules: what counts as help.
    """
    asked = [_asked(sample) for sample in samples]
    played = [
        _Rollout.of(episode, asked[episode.row].queries[episode.query_id], asked[episode.row].size)
        for episode in open_episodes(head, head.click_environment(), asked)
    ]
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
    found = [Played() for _ in samples]
    for item in played:
        left = found[item.episode.row]
        left.trajectories += _trajectories(item, asked[item.episode.row])
        left.ious.append(item.iou)
        left.actions += item.actions
        left.corrected += item.corrected
    return found


def _asked(sample: Sample) -> Sample:
    """A sample with the queries that can be played, each under its name."""
    queries = [
        replace(query, id=query.id or str(index))
        for index, query in enumerate(sample.queries)
        if query.masks is not None and has_target(query, sample.size)
    ]
    return replace(sample, queries=tuple(queries))


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
        item.actions += 1
        if click is not None and item.iou_of(outcome[i][0].mask) > item.iou + rules.min_gain:
            item.go(click, *outcome[i])
        else:
            wrong.append(i)
    mistakes = [(alive[i], tried[i], outcome[i]) for i in wrong if i in outcome]
    for item, click, (observation, _) in mistakes:
        item.rejected.append(ClickStep(click, Mask.from_array(observation.mask), item.iou_of(observation.mask)))
    if rules.keep_mistakes:
        _leave_mistakes(head, mistakes)  # of episodes that are where the mistakes were made, so before the correction
    _correct(head, [(alive[i], before[i], masks[i]) for i in wrong], rules)


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


def _leave_mistakes(head: ClickPolicyHead, wrong: Sequence[tuple[_Rollout, Click, tuple[Observation, Any]]]) -> None:
    """Record the masks that mistakes led to, with the oracle's click on them."""
    found = []
    for item, click, (observation, state) in wrong:
        if np.array_equal(observation.mask, item.episode.view.mask):
            continue  # the same picture as one that is recorded already
        way_out = item.oracle(observation.mask, [*item.episode.clicks, click])
        if way_out is not None:
            found.append((item, observation, state, way_out))
    results = head.click_environment().advance([entry[2] for entry in found], [entry[3] for entry in found])
    for (item, observation, _, way_out), (after, _) in zip(found, results, strict=True):
        step = ClickStep(way_out, Mask.from_array(after.mask), item.iou_of(after.mask))
        item.mistakes.append(
            Trajectory(
                target=Mask.from_array(item.target),
                steps=(step,),
                start=Mask.from_array(observation.mask),
                start_iou=item.iou_of(observation.mask),
                given=(*observation.clicks,),
                stop="max_clicks",
            )
        )


def _trajectories(item: _Rollout, sample: Sample) -> list[Trajectory]:
    """What an episode leaves, under the name of its query."""
    query, start = sample.queries[item.episode.query_id], item.episode.steps[0].mask
    main = Trajectory(
        target=Mask.from_array(item.target),
        steps=tuple(item.kept),
        rejected=tuple(item.rejected),
        start=start if start.area else None,
        start_iou=item.start_iou,
        stop=item.stop or "max_clicks",
    )
    about: dict[str, Any] = {
        "image": sample.id,
        "object_id": query.id,
        "caption": (query.text,),
        "ignore": query.ignore,
    }
    return [replace(trajectory, **about) for trajectory in (main, *item.mistakes)]


def rollout_dataset(
    model: PerceptionModel,
    dataset: SampleDataset,
    output: Path,
    *,
    head: str | None = None,
    rules: Correction | None = None,
    batch_size: int = 16,
    origin: str = "",
) -> dict[str, Any]:
    """Write the corrected trajectories of a policy on a dataset; goes on where an earlier call was stopped.

    Train on the file together with the oracle's own, from the start (algorithm 1): `TrajectoryDataset` takes both.

    Args:
        model: with a click policy, on its device.
        dataset: labelled.
        output: JSONL file; the images it holds already are not played again. What it was made with lies beside it
            (`<output>.rules.json`).
        head: name of the policy; the first head when None.
        rules: what counts as help.
        batch_size: images at once; part of nothing that is written.
        origin: where the model is from, such as its run folder: a file of another one is not gone on with.

    Returns:
        Counts: `images`, `objects` and `trajectories` written now, `present` images before, `actions` of the policy, share of
        them that was `corrected`, mean final `iou`.

    Raises:
        ValueError: for a head that is no click policy, or a file that is damaged or was begun with other rules.
    """
    from rich.progress import track

    policy = model.head(head)
    if not isinstance(policy, ClickPolicyHead):
        raise ValueError(f"head '{policy.name}' is no click policy; train one with configs/segagent_tiny.yaml")
    rules = rules or Correction()
    file = TrajectoryFile(output, _made_with(policy, rules, origin) | {"dataset": whole_name(dataset)})
    indices = [index for index in range(len(dataset)) if not file.images or dataset[index].id not in file.images]
    counts: dict[str, Any] = {"images": len(indices), "objects": 0, "trajectories": 0, "present": len(file.images)}
    counts |= {"actions": 0, "corrected": 0, "iou": 0.0}
    for start in track(range(0, len(indices), batch_size), description="playing", transient=True):
        samples = [dataset[index] for index in indices[start : start + batch_size]]
        for played in rollout(policy, model.backbone, samples, rules):
            file.append(to_lines(played.trajectories))
            counts["objects"] += len(played.ious)
            counts["trajectories"] += len(played.trajectories)
            counts["actions"] += played.actions
            counts["corrected"] += played.corrected
            counts["iou"] += sum(played.ious)
    counts["corrected"] /= max(1, counts["actions"])
    counts["iou"] /= max(1, counts["objects"])
    return counts


def _made_with(policy: ClickPolicyHead, rules: Correction, origin: str) -> dict[str, Any]:
    """What the trajectories of a dataset depend on, the dataset left out."""
    names = ("name", "max_clicks", "constrained", "on_failure", "seed")
    plays = {name: getattr(policy, name) for name in names} | {"origin": origin}
    plays["sampling"] = [policy.search.temperature, policy.search.top_p]
    environment = describe_environment(policy.click_environment())
    return {"rules": asdict(rules), "policy": plays, "environment": environment}

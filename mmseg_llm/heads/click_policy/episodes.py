"""Episodes of a click policy in lock-step: look at the mask, answer, click, look again (SegAgent paper section 3; specification
sections 1 and 4.4).

Legend: H W pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseg_llm.clicks import Click, PolicyStep
from mmseg_llm.heads.click_policy.asking import Reply, View, ask, estimate, show
from mmseg_llm.heads.click_policy.text import ParsedAction, Status
from mmseg_llm.masks import Mask

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.segmenters.environment import Environment, Observation
    from mmseg_llm.structures import Sample

SLIGHT_OVERSHOOT = 0.01
"""How far beyond the scale a click may lie and still be moved to the edge, with `on_failure` clamp (section 4.4)."""


class Ending(StrEnum):
    """Why an episode is over. An answer without a usable click ends it under the name of its `Status`.

    `stuck`: the policy repeated a click that had changed nothing. `converged`: its estimates rose no more. `good_enough`: they
    reached the bound asked for. `aborted`: an unusable answer took the whole episode with it.
    """

    FINISH = "finish"
    MAX_CLICKS = "max_clicks"
    STUCK = "stuck"
    CONVERGED = "converged"
    GOOD_ENOUGH = "good_enough"
    NO_ACTION = "no_action"
    MALFORMED = "malformed"
    OUT_OF_RANGE = "out_of_range"
    ABORTED = "aborted"


@dataclass
class Episode:
    """One expression about one image.

    Attributes:
        row, query_id: sample and query.
        key: of what is sampled; the same whatever is played beside it.
        view: what the policy sees now.
        state: of the environment.
        chances: of the last click, float32 `(H, W)`, where the environment has any.
        steps: so far; the last one is what is seen now.
        ending: why it is over; empty while it is not.
    """

    row: int
    query_id: int
    key: int
    view: View
    state: Any
    chances: np.ndarray | None
    steps: list[PolicyStep]
    ending: str = ""

    @property
    def clicks(self) -> list[Click]:
        """All clicks of the policy."""
        return [step.click for step in self.steps if step.click is not None]

    def hear(self, reply: Reply) -> None:
        """Note what was said about the present mask."""
        self.steps[-1] = said(self.steps[-1], reply)

    def move(self, click: Click, observation: Observation, state: Any) -> None:
        """Go to the mask that a click led to."""
        self.state, self.view, self.chances = state, replace(self.view, mask=observation.mask), observation.chances
        self.steps.append(PolicyStep(click, Mask.from_array(observation.mask)))


def draw_seed(key: int, steps: Sequence[PolicyStep], number: int) -> int:
    """Seed of the `number`-th draw behind a path: the same whatever is played beside it."""
    return zlib.crc32(f"{key} {[step.click for step in steps]} {number}".encode())


def said(step: PolicyStep, reply: Reply) -> PolicyStep:
    """A step with what was said about its mask."""
    return replace(step, text=reply.text, estimate=reply.action.iou, status=str(reply.action.status))


def rated(step: PolicyStep, reply: Reply) -> PolicyStep:
    """A step with the estimate of its mask, where nothing else was asked for."""
    return replace(step, text=reply.text, estimate=reply.action.iou, status="estimate")


def open_episodes(head: ClickPolicyHead, environment: Environment, samples: Sequence[Sample]) -> list[Episode]:
    """One episode for each query of each sample, from its start mask or an empty one.

    Raises:
        ValueError: for a start mask of another size than its image.
    """
    asked = [(row, i) for row, sample in enumerate(samples) for i in range(len(sample.queries))]
    images = {row: samples[row].load_image() for row in dict.fromkeys(row for row, _ in asked)}
    masks: list[np.ndarray | None] = []
    for row, i in asked:
        start, size = samples[row].queries[i].start, samples[row].size
        if start is not None and start.size != tuple(size):
            raise ValueError(
                f"query {samples[row].queries[i].text!r} of sample {samples[row].id} starts from a mask of size {start.size} "
                f"(H, W), its image has {tuple(size)}; resize the mask"
            )
        masks.append(
            None if start is None else replace(start).array
        )  # a copy keeps its pixels, the dataset's mask does not
    begun = environment.begin([images[row] for row, _ in asked], masks)
    keys = {row: zlib.crc32(image.tobytes()) for row, image in images.items()}
    episodes = []
    for (row, i), mask, (observation, state) in zip(asked, masks, begun, strict=True):
        query = samples[row].queries[i]
        key = zlib.crc32(f"{head.seed}\n{keys[row]}\n{query.text}".encode())
        # a given mask is what is seen and rated first, whatever the segmenter makes of it
        view = View(images[row], observation.mask if mask is None else mask, query.text.strip())
        first = PolicyStep(None, Mask.from_array(view.mask))
        episodes.append(Episode(row, i, key, view, state, observation.chances, [first]))
    return episodes


def play(
    head: ClickPolicyHead,
    backbone: Backbone,
    environment: Environment,
    samples: Sequence[Sample],
    *,
    rate_last: bool,
    is_official: bool = False,
) -> list[Episode]:
    """Greedy episodes, all of them one click at a time.

    Args:
        head: of the policy.
        backbone: it looks through.
        environment: it clicks on.
        samples: whose queries are asked.
        rate_last: also ask about the mask after the last click, for its estimate.
        is_official: read answers as the released code does.
    """
    episodes = open_episodes(head, environment, samples)
    for _ in range(head.max_clicks):
        alive = [episode for episode in episodes if not episode.ending]
        if not alive:
            break
        decided = decide(head, backbone, alive, is_official=is_official)
        moving = []
        for episode, (reply, action) in zip(alive, decided, strict=True):
            episode.hear(reply)
            if action.click is None:
                episode.ending = ending_of(head, action)
            else:
                moving.append((episode, action.click))
        for start in range(0, len(moving), head.batch_size):
            advance(environment, moving[start : start + head.batch_size], stops_when_stuck=not is_official)
    for episode in episodes:
        episode.ending = episode.ending or Ending.MAX_CLICKS
    if rate_last:
        unrated = [episode for episode in episodes if not episode.steps[-1].status]
        for episode, reply in zip(unrated, estimate(head, backbone, [e.view for e in unrated]), strict=True):
            episode.steps[-1] = rated(episode.steps[-1], reply)
    return episodes


def advance(
    environment: Environment, moving: Sequence[tuple[Episode, Click]], *, stops_when_stuck: bool = True
) -> None:
    """Click once in each of some episodes.

    One that repeats a click that changed nothing, not even a probability, is over: the same picture would get the same answer.
    """
    results = environment.advance([episode.state for episode, _ in moving], [click for _, click in moving])
    for (episode, click), (observation, state) in zip(moving, results, strict=True):
        is_same = np.array_equal(observation.mask, episode.view.mask) and (
            observation.chances is None
            or (episode.chances is not None and np.array_equal(observation.chances, episode.chances))
        )
        if stops_when_stuck and click in episode.clicks and is_same:
            episode.ending = Ending.STUCK
        episode.move(click, observation, state)


def decide(
    head: ClickPolicyHead, backbone: Backbone, episodes: Sequence[Episode], *, is_official: bool = False
) -> list[tuple[Reply, ParsedAction]]:
    """What the policy says to each mask, and what is done about it: a click where the answer has one to be used."""
    found: list[tuple[Reply, ParsedAction]] = []
    for start in range(0, len(episodes), head.batch_size):
        chunk = episodes[start : start + head.batch_size]
        shown = show(head, backbone, [episode.view for episode in chunk])
        replies = [
            answers[0] for answers in ask(head, backbone, shown, constrained=head.constrained and not is_official)
        ]
        if is_official:
            replies = [head.read_official(r, e.view.mask.shape) for r, e in zip(replies, chunk, strict=True)]
        failed = [i for i, reply in enumerate(replies) if is_failure(usable(head, reply.action))]
        if failed and head.on_failure == "resample" and not is_official:
            seeds = [[draw_seed(chunk[i].key, chunk[i].steps, n) for n in range(head.resamples)] for i in failed]
            again = ask(head, backbone, shown.select(failed), seeds=seeds, constrained=head.constrained)
            for i, answers in zip(failed, again, strict=True):
                replies[i] = next((r for r in answers if not is_failure(usable(head, r.action))), replies[i])
        found += [(reply, usable(head, reply.action)) for reply in replies]
    return found


def ending_of(head: ClickPolicyHead, action: ParsedAction) -> str:
    """The name under which an answer without a click ends an episode."""
    return str(Ending.ABORTED if head.on_failure == "abort" and is_failure(action) else action.status)


def usable(head: ClickPolicyHead, action: ParsedAction) -> ParsedAction:
    """An action as the policy for failures takes it: the click of an answer out of range is dropped unless it may be moved."""
    if action.status is not Status.OUT_OF_RANGE:
        return action
    if head.on_failure == "clamp" and action.overshoot <= SLIGHT_OVERSHOOT:
        return action
    return replace(action, click=None)


def is_failure(action: ParsedAction) -> bool:
    """Whether an answer neither clicks nor says that it is finished."""
    return action.click is None and action.status is not Status.FINISH

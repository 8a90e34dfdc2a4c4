"""Search: several clicks are tried at each step, and the policy's own estimates of the masks decide (SegAgent paper section 4.3,
algorithm 2; specification section 6.2).

What an estimate was read from is cached and goes on to the next clicks; a click that several answers agree on is tried once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmseg_llm.backbones.generation import Sampling
from mmseg_llm.clicks import Click, PolicyStep
from mmseg_llm.heads.click_policy.asking import Reply, Seeds, Shown, View, ask, show
from mmseg_llm.heads.click_policy.episodes import (
    Ending,
    Episode,
    draw_seed,
    ending_of,
    is_failure,
    open_episodes,
    rated,
    said,
    usable,
)
from mmseg_llm.masks import Mask

if TYPE_CHECKING:
    from mmseg_llm.backbones.base import Backbone
    from mmseg_llm.heads.click_policy.head import ClickPolicyHead
    from mmseg_llm.segmenters.environment import Environment
    from mmseg_llm.structures import Sample


@dataclass(frozen=True)
class Search:
    """How much is tried.

    Attributes:
        candidates: K, answers per mask: the greedy one and K - 1 that are drawn.
        beams: masks that are kept at each step; 1 is the greedy search of the paper.
        patience: steps without a better estimate before the search stops; None never stops it.
        min_gain: what counts as better must be by more than this.
        good_enough: stop at an estimate of this IoU; None never does.
        temperature, top_p: of the drawn answers. The released checkpoint's own top_p of 0.3 would make them nearly equal.
    """

    candidates: int = 1
    beams: int = 1
    patience: int | None = 2
    min_gain: float = 0.0
    good_enough: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ValueError for values out of range."""
        for name, value in (("candidates", self.candidates), ("beams", self.beams), ("patience", self.patience)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.min_gain < 0:
            raise ValueError(f"min_gain is {self.min_gain}; it must not be negative")
        if self.good_enough is not None and not 0 < self.good_enough <= 1:
            raise ValueError(f"good_enough is {self.good_enough}; it is an IoU between 0 and 1")
        Sampling(self.temperature, self.top_p)

    @property
    def sampling(self) -> Sampling:
        """Of the drawn answers."""
        return Sampling(self.temperature, self.top_p)


@dataclass
class Node:
    """A mask of the tree and the path to it.

    Attributes:
        state: of the environment.
        view: what is seen.
        steps: from the start to here.
        shown, index: where its picture is cached.
        opening: the tokens of its estimate.
        ending: why nothing follows it.
    """

    state: Any
    view: View
    steps: tuple[PolicyStep, ...]
    shown: Shown | None = None
    index: int = 0
    opening: tuple[int, ...] = ()
    ending: str = ""

    @property
    def estimate(self) -> float:
        """IoU that the policy takes its mask for; below any where it did not say."""
        found = self.steps[-1].estimate
        return -1.0 if found is None else found


@dataclass
class Tree:
    """The search of one episode."""

    episode: Episode
    nodes: list[Node]
    best: Node
    stale: int = 0

    def keep(self, found: Sequence[Node], search: Search) -> None:
        """Go on with the best of some nodes; earlier ones win between equals."""
        self.nodes = sorted(found, key=lambda node: -node.estimate)[: search.beams]
        leader = self.nodes[0]
        if leader.estimate > self.best.estimate + search.min_gain:
            self.best, self.stale = leader, 0
        else:
            self.stale += 1
        if all(node.ending for node in self.nodes):
            self.episode.ending = leader.ending
        elif search.good_enough is not None and self.best.estimate >= search.good_enough:
            self.episode.ending = Ending.GOOD_ENOUGH
        elif search.patience is not None and self.stale >= search.patience:
            self.episode.ending = Ending.CONVERGED

    def close(self) -> Episode:
        """The episode along the path that was followed, or the one to the best mask where that lies off it."""
        self.episode.ending = self.episode.ending or Ending.MAX_CLICKS
        followed = self.nodes[0].steps
        is_on = len(followed) >= len(self.best.steps) and followed[len(self.best.steps) - 1] == _clicked(
            self.best, followed
        )
        self.episode.steps = list(followed if is_on else self.best.steps)
        return self.episode


def _clicked(node: Node, path: Sequence[PolicyStep]) -> PolicyStep:
    """The last step of a node as it stands in a path: what was said about it may have been completed there."""
    last, there = node.steps[-1], path[len(node.steps) - 1]
    return replace(last, text=there.text, status=there.status)


def search(
    head: ClickPolicyHead, backbone: Backbone, environment: Environment, samples: Sequence[Sample]
) -> list[Episode]:
    """Play all queries of all samples, the trees of all episodes in lock-step."""
    episodes = open_episodes(head, environment, samples)
    together = max(1, head.batch_size // (head.search.candidates * head.search.beams))
    for start in range(0, len(episodes), together):  # so that no more pictures are kept than are looked at together
        _grow(head, backbone, environment, episodes[start : start + together])
    return episodes


def _grow(head: ClickPolicyHead, backbone: Backbone, environment: Environment, episodes: Sequence[Episode]) -> None:
    """The trees of some episodes, in lock-step."""
    roots = [Node(episode.state, episode.view, tuple(episode.steps)) for episode in episodes]
    rate(head, backbone, roots)
    trees = [Tree(episode, [root], root) for episode, root in zip(episodes, roots, strict=True)]
    for tree in trees:
        if head.search.good_enough is not None and tree.best.estimate >= head.search.good_enough:
            tree.episode.ending = Ending.GOOD_ENOUGH
    for _ in range(head.max_clicks):
        alive = [tree for tree in trees if not tree.episode.ending]
        if not alive:
            break
        open_nodes = [(tree, node) for tree in alive for node in tree.nodes if not node.ending]
        children = expand(head, backbone, environment, open_nodes)
        grown = [child for siblings in children for child in siblings if child.shown is None and not child.ending]
        rate(head, backbone, grown)
        for tree in alive:
            found = [node for node in tree.nodes if node.ending]
            found += [
                child
                for (owner, _), nodes in zip(open_nodes, children, strict=True)
                if owner is tree
                for child in nodes
            ]
            tree.keep(found, head.search)
    for tree in trees:
        tree.close()


def rate(head: ClickPolicyHead, backbone: Backbone, nodes: Sequence[Node]) -> None:
    """Let the policy estimate the masks of some nodes; their pictures stay cached."""
    for start in range(0, len(nodes), head.batch_size):
        chunk = nodes[start : start + head.batch_size]
        shown = show(head, backbone, [node.view for node in chunk])
        replies = ask(head, backbone, shown, is_estimate=True, constrained=head.constrained)
        for index, (node, (reply,)) in enumerate(zip(chunk, replies, strict=True)):
            node.steps = (*node.steps[:-1], rated(node.steps[-1], reply))
            node.shown, node.index, node.opening = shown, index, reply.ids


def expand(
    head: ClickPolicyHead,
    backbone: Backbone,
    environment: Environment,
    nodes: Sequence[tuple[Tree, Node]],
) -> list[list[Node]]:
    """The nodes that the proposals for each node lead to; a node itself, ended, where the policy would stop."""
    proposals = propose(head, backbone, nodes)
    moves: list[tuple[Node, Click, Reply]] = []
    children: list[list[Node | int]] = []  # a number is a move, whose result is not known yet
    for (_, node), replies in zip(nodes, proposals, strict=True):
        own: dict[Click | str, Node | int] = {}
        for reply in replies:
            action = usable(head, reply.action)
            if action.click is not None and action.click not in own:
                own[action.click] = len(moves)
                moves.append((node, action.click, reply))
            elif action.click is None and not is_failure(action):
                own.setdefault("finish", replace(node, steps=_heard(node, reply), ending=str(Ending.FINISH)))
        if not own:  # none of the answers can be used
            ending = ending_of(head, usable(head, replies[0].action))
            own["failed"] = replace(node, steps=_heard(node, replies[0]), ending=ending)
        node.shown = None  # its picture is not needed any more
        children.append([replace(child, shown=None) if isinstance(child, Node) else child for child in own.values()])
    results = environment.advance([node.state for node, _, _ in moves], [click for _, click, _ in moves])
    grown = []
    for (node, click, reply), (observation, state) in zip(moves, results, strict=True):
        step = PolicyStep(click, Mask.from_array(observation.mask))
        grown.append(Node(state, replace(node.view, mask=observation.mask), (*_heard(node, reply), step)))
    return [[grown[child] if isinstance(child, int) else child for child in own] for own in children]


def _heard(node: Node, reply: Reply) -> tuple[PolicyStep, ...]:
    """The path to a node, what was said about its mask completed."""
    return (*node.steps[:-1], said(node.steps[-1], reply))


def propose(head: ClickPolicyHead, backbone: Backbone, nodes: Sequence[tuple[Tree, Node]]) -> list[list[Reply]]:
    """K answers for each node, behind its cached picture and estimate; more where none can be used, with `resample`."""
    groups: dict[int, list[int]] = {}
    for number, (_, node) in enumerate(nodes):
        groups.setdefault(id(node.shown), []).append(number)
    found: dict[int, list[Reply]] = {}
    for numbers in groups.values():
        chosen = [nodes[number] for number in numbers]
        shown = chosen[0][1].shown
        assert shown is not None
        count = head.search.candidates
        seeds = [[None, *_seeds(tree, node, 1, count)] for tree, node in chosen]
        replies = _ask(head, backbone, shown, chosen, seeds)
        failed = [i for i, own in enumerate(replies) if all(is_failure(usable(head, r.action)) for r in own)]
        if failed and head.on_failure == "resample":
            again = [chosen[i] for i in failed]
            more = _ask(head, backbone, shown, again, [_seeds(*item, count, count + head.resamples) for item in again])
            for i, own in zip(failed, more, strict=True):
                replies[i] = replies[i] + own
        found.update(zip(numbers, replies, strict=True))
    return [found[number] for number in range(len(nodes))]


def _ask(
    head: ClickPolicyHead,
    backbone: Backbone,
    shown: Shown,
    chosen: Sequence[tuple[Tree, Node]],
    seeds: Sequence[Seeds],
) -> list[list[Reply]]:
    """Answers behind the cached pictures and estimates of some nodes."""
    return ask(
        head,
        backbone,
        shown.select([node.index for _, node in chosen]),
        seeds=seeds,
        openings=[node.opening for _, node in chosen],
        constrained=head.constrained,
    )


def _seeds(tree: Tree, node: Node, first: int, stop: int) -> list[int]:
    """Of some draws at a node."""
    return [draw_seed(tree.episode.key, node.steps, number) for number in range(first, stop)]
